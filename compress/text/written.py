"""Text that the teacher writes itself: conversations out of nothing, or continuations of given
prompts.

generated:COUNTxTOKENS:PROMPTS
    Sequence-level distillation (arXiv 1606.07947, section 3.2): of plain text the teacher continues
    the first PROMPT_TOKENS tokens by up to TOKENS; in a chat it answers the questions anew, turn by
    turn.
generated:COUNTxTOKENS:nothing
    An instruct teacher gets nothing but the start of a user's turn, writes the question and then
    answers it in up to TOKENS tokens (Magpie, arXiv 2406.08464, section 2.1). It has learned on
    such turns, so what comes is near what it was trained on: the best stand-in for data that nobody
    has any more. Left to itself a small teacher mostly plans trips and launches products, so OPENED
    of the conversations begin with one to five given words (`configs/conversations/openings.txt`).
    A base model writes from BOS.

It samples from the TOP_P nucleus (arXiv 1904.09751): plain text at temperature 1, questions at
QUESTION_TEMPERATURE, above which a small teacher asks for things that do not exist, answers at
ANSWER_TEMPERATURE, near what it says when asked. Of the conversations out of nothing those are kept
that ended by themselves, do not loop, are not too short, resemble no earlier question and share no
phrase with what students are evaluated on (`Filter`).

What is written is kept in the store, piece by piece, so that an interrupted run goes on where it
stopped; every conversation has a seed of its own, which its row names (`text/authors.py`: in which
engine).
"""

import json
import re
import time
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compress.keys import author_inputs
from compress.models.chats import Chat, Document, content, prompt_ids
from compress.models.tokenizer import load_tokenizer
from compress.models.tokens import opening
from compress.store import fsync, sha256_json, write_whole
from compress.text.authors import (
    AT_ONCE,
    TOP_K,
    TOP_P,
    Author,
    Log,
    open_author,
)
from compress.text.conversations import from_nothing

PROMPT_TOKENS = 32  # of a plain document, which the teacher continues


def parse(source: str) -> tuple[int, int, str]:
    """(documents, tokens each at most, prompts) of a `generated:` source. ValueError when it is
    malformed.
    """
    match = re.fullmatch(r"generated:(\d{1,9})x(\d{1,9}):(.+)", source)
    if not match or not int(match[1]) or not int(match[2]):
        raise ValueError(
            f"data source {source[:200]!r} is not generated:COUNTxTOKENS:PROMPTS with numbers above"
            " 0, as in generated:200x128:embedded:docstrings or generated:500x160:nothing"
        )

    # Prompts that are written first would need a teacher's time that nobody asked for by name.
    if match[3].startswith("generated:"):
        raise ValueError(
            f"data source {source[:80]!r} asks for text on prompts that are to be written"
            " themselves; write the prompts first, or name text that is there"
        )
    return int(match[1]), int(match[2]), match[3]


def generated(
    source: str, teacher: Path, folder: Path, log: Log, read: Callable[[str], list[Document]]
) -> list[Document]:
    """The documents of a `generated:` source; `read` gives those of another one. ValueError when
    it is malformed, its prompts are too few, or the teacher writes nothing usable.
    """
    count, tokens, name = parse(source)
    if name == "nothing":
        rows = from_nothing(count, tokens, teacher, folder, log)
        return [_document(row, f"{source}, row {number}") for number, row in enumerate(rows, 1)]

    prompts = read(name)[:count]
    if len(prompts) < count:
        raise ValueError(
            f"data source {source!r} wants {count} prompts; {name} has {len(prompts)} documents:"
            " ask for at most that many"
        )

    # Everything that decides what is written names the file that keeps it.
    engine = "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"
    decisive = [
        author_inputs(teacher),
        [content(prompt) for prompt in prompts],
        tokens,
        PROMPT_TOKENS,
        TOP_P,
        TOP_K,
        engine,
        AT_ONCE[engine],
    ]
    finished = folder / f"generated-{sha256_json(decisive)[:32]}.jsonl"
    if not finished.is_file():
        part = finished.with_suffix(".part")
        _continue_all(part, prompts, tokens, teacher, engine, log)
        fsync(part)
        part.replace(finished)
        fsync(folder)

    # A row of the file is the text, or the turns of an answered chat.
    lines = finished.read_text("utf-8").split("\n")
    rows_of_prompts: list[Any] = [json.loads(line) for line in lines if line]
    documents: list[Document] = []
    for prompt, row in zip(prompts, rows_of_prompts, strict=True):
        documents.append(prompt.part(row) if isinstance(prompt, Chat) else row)
    return documents


def _document(row: dict[str, Any], where: str) -> Document:
    """A row that was written from nothing, as a chat or a text."""
    return Chat(row["messages"], where=where) if row.get("messages") else row["text"]


def _continue_all(
    part: Path, prompts: list[Document], tokens: int, teacher: Path, engine: str, log: Log
) -> None:
    """Append what is missing to `part`, a piece at a time; a torn last piece is written again."""
    lines = part.read_text(encoding="utf-8").split("\n")[:-1] if part.is_file() else []
    piece = AT_ONCE[engine]
    done = len(lines) // piece * piece
    write_whole(part, "".join(line + "\n" for line in lines[:done]).encode())

    tokenizer = load_tokenizer(teacher)
    begun = time.monotonic()
    with closing(open_author(engine, teacher, part.parent)) as author:
        for start in range(done, len(prompts), piece):
            rows = _rows(author, tokenizer, prompts[start : start + piece], tokens, start)
            with part.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)

            written = start + len(rows)
            seconds_left = (time.monotonic() - begun) / (written - done) * (len(prompts) - written)
            log(f"teacher writes {written}/{len(prompts)} documents, {seconds_left:.0f} s left")


def _rows(
    author: Author, tokenizer: Any, prompts: list[Document], tokens: int, start: int
) -> list[Chat | str]:
    """What the teacher makes of a piece of the prompts, the first of which is number `start`: chats
    one by one, texts as one batch, in the order of the prompts.
    """
    answered = [
        _answered(author, tokenizer, prompt, tokens, start + i)
        for i, prompt in enumerate(prompts)
        if isinstance(prompt, Chat)
    ]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    continued = _continued(author, tokenizer, texts, tokens, start)

    chats_in_order = iter(answered)
    texts_in_order = iter(continued)
    return [
        next(chats_in_order) if isinstance(prompt, Chat) else next(texts_in_order)
        for prompt in prompts
    ]


def _continued(
    author: Author, tokenizer: Any, texts: list[str], tokens: int, seed: int
) -> list[str]:
    """The beginnings of the texts with what the teacher writes behind them."""
    if not texts:
        return []
    prompts = [
        ids[:PROMPT_TOKENS]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    ]

    # The author sees BOS where the tokenizer begins texts so; the text itself holds none.
    begun = [[*opening(tokenizer), *ids] for ids in prompts]
    answers = author.write(begun, tokens, 1.0, [seed + i for i in range(len(prompts))])
    return [
        tokenizer.decode(ids) + answer.text for ids, answer in zip(prompts, answers, strict=True)
    ]


def _answered(author: Author, tokenizer: Any, chat: Chat, tokens: int, seed: int) -> Chat:
    """The same questions with the teacher's own answers."""
    so_far = chat.part([])
    for turn in chat:
        if turn["role"] == "assistant":
            seeds = [seed + len(so_far)]
            answer = author.write([prompt_ids(tokenizer, so_far)], tokens, 1.0, seeds)[0]
            turn = turn | {"content": answer.text.strip()}
        so_far.append(turn)
    return so_far
