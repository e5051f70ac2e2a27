"""Conversations that a teacher writes from nothing."""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

from compress.assets import configs_dir
from compress.keys import author_inputs
from compress.models.chats import prompt_ids, render
from compress.models.checkpoint import digest
from compress.models.tokenizer import load_tokenizer
from compress.store import sha256_json, write_whole
from compress.text.authors import (
    ANSWER_TEMPERATURE,
    AT_ONCE,
    QUESTION_TEMPERATURE,
    TOP_K,
    TOP_P,
    Author,
    Log,
    engine_for,
    open_author,
)
from compress.text.filter import Filter, evaluation_texts

QUESTION_TOKENS = 64
OPENED = 0.9  # share of the conversations out of nothing that begin with given words
SECOND_TURN = 0.2  # share of them with a second question
FUTILE_PIECES = 20  # pieces in a row without a usable conversation that end the attempt


@cache
def openings() -> tuple[str, ...]:
    """The given first words of questions."""
    file = configs_dir() / "conversations" / "openings.txt"
    return tuple(line for line in file.read_text(encoding="utf-8").split("\n") if line)


def from_nothing(
    count: int, tokens: int, teacher: Path, folder: Path, log: Log
) -> list[dict[str, Any]]:
    """`count` rows {"messages" or "text", "seed", "opening", "teacher", "engine"} that the teacher
    wrote, in the order of their seeds, kept in `folder` piece by piece.

    ValueError when FUTILE_PIECES pieces in a row hold nothing usable.
    """
    engine = engine_for(teacher)
    avoid = evaluation_texts()
    kept = Kept(folder / f"conversations-{_key(teacher, tokens, engine, avoid)}.jsonl")
    accept = Filter(avoid)
    for row in kept.rows:
        accept.reason(_turns(row), True)
    if len(kept.rows) >= count:
        return kept.rows[:count]

    tokenizer = load_tokenizer(teacher)
    author_columns = {"teacher": digest(teacher)[:16], "engine": engine}
    rows_before = len(kept.rows)
    futile_pieces = 0
    begun = time.monotonic()
    with closing(open_author(engine, teacher, folder)) as author:
        while len(kept.rows) < count:
            # A piece, and what of it is usable.
            seeds = list(range(kept.next_seed, kept.next_seed + AT_ONCE[engine]))
            usable = []
            for row in _piece(author, tokenizer, tokens, seeds):
                reason = accept.reason(_turns(row), row.pop("ended"))
                kept.rejected[reason] += bool(reason)
                if not reason:
                    usable.append(row | author_columns)
            kept.add(usable, seeds[-1] + 1)

            # A teacher that writes nothing usable ends the attempt.
            futile_pieces = 0 if usable else futile_pieces + 1
            if futile_pieces == FUTILE_PIECES:
                raise ValueError(
                    f"{teacher}: of {kept.next_seed} conversations {len(kept.rows)} are usable,"
                    f" none of the last ones ({kept.told()}); allow more tokens, or name text in"
                    " data.train"
                )

            seconds_a_row = (time.monotonic() - begun) / max(1, len(kept.rows) - rows_before)
            seconds_left = max(0.0, seconds_a_row * (count - len(kept.rows)))
            log(
                f"teacher writes: {len(kept.rows)}/{count} kept; not: {kept.told()};"
                f" {seconds_left:.0f} s left"
            )
    return kept.rows[:count]


def _key(teacher: Path, tokens: int, engine: str, avoid: tuple[str, ...]) -> str:
    """Digest of what decides a row's text. COUNT is not in it: a larger one goes on with the same
    file.
    """
    decisive = [
        author_inputs(teacher),
        tokens,
        engine,
        AT_ONCE[engine],
        openings(),
        avoid,
        QUESTION_TOKENS,
        # How conversations are drawn and sampled.
        OPENED,
        SECOND_TURN,
        QUESTION_TEMPERATURE,
        ANSWER_TEMPERATURE,
        TOP_P,
        TOP_K,
    ]
    return sha256_json(decisive)[:32]


class Kept:
    """The rows written so far, in a file: a piece is its rows and a line {"next_seed", "rejected"},
    so that one that was torn by a kill is written again."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: list[dict[str, Any]] = []
        self.next_seed = 0
        self.rejected: Counter[str] = Counter()  # reason of `Filter` -> conversations

        # Lines count when the end of their piece is there.
        complete: list[dict[str, Any]] = []
        piece: list[dict[str, Any]] = []
        for line in file.read_text(encoding="utf-8").split("\n")[:-1] if file.is_file() else []:
            row = json.loads(line)
            piece.append(row)
            if "next_seed" in row:
                self.next_seed = row["next_seed"]
                self.rejected = Counter(row["rejected"])
                complete += piece
                piece = []

        # The next piece is appended behind the last complete one.
        self.rows = [row for row in complete if "next_seed" not in row]
        write_whole(file, "".join(json.dumps(row) + "\n" for row in complete).encode())

    def add(self, usable: list[dict[str, Any]], next_seed: int) -> None:
        """Append a piece."""
        self.rows = self.rows + usable
        self.next_seed = next_seed
        end = {"next_seed": next_seed, "rejected": dict(self.rejected)}
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in [*usable, end])

    def told(self) -> str:
        """How many were rejected, by reason."""
        reasons = [f"{why} {number}" for why, number in self.rejected.most_common() if number]
        return ", ".join(reasons) or "none"


def _turns(row: dict[str, Any]) -> list[str]:
    """What is said in a row, turn by turn."""
    return [turn["content"] for turn in row["messages"]] if "messages" in row else [row["text"]]


def _piece(
    author: Author, tokenizer: Any, tokens: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A conversation for each seed, in their order: where the author has several slots each goes
    its own way, else all together.
    """
    parts = [[seed] for seed in seeds] if author.slots > 1 else [list(seeds)]
    with ThreadPoolExecutor(author.slots) as pool:
        written = pool.map(partial(_written, author, tokenizer, tokens), parts)
        return list(chain.from_iterable(written))


def _written(
    author: Author, tokenizer: Any, tokens: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """A conversation for each seed, or without a chat template a text, as rows that say whether
    the teacher `ended` them.
    """
    if not tokenizer.chat_template:
        start = (
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        )
        texts = author.write([[start]] * len(seeds), tokens, 1.0, seeds)
        return [
            {"text": answer.text.strip(), "seed": seed, "opening": "", "ended": answer.ended}
            for seed, answer in zip(seeds, texts, strict=True)
        ]

    rows = [_begun(seed) for seed in seeds]
    question_ids = partial(_question_ids, tokenizer)
    for turn in (1, 2):
        # Those that go on so far are asked, and answer where the question came to an end.
        asked = [row for row in rows if row["ended"] and row["turns"] >= turn]
        _say(author, asked, "user", QUESTION_TOKENS, QUESTION_TEMPERATURE, question_ids)
        answering = [row for row in asked if row["ended"]]
        _say(
            author,
            answering,
            "assistant",
            tokens,
            ANSWER_TEMPERATURE,
            lambda row: prompt_ids(tokenizer, row["messages"]),
        )

        # A second turn that fails is dropped, not the conversation.
        if turn == 2:
            for row in asked:
                if not row["ended"]:
                    row["messages"] = row["messages"][:2]
                    row["ended"] = True

    for row in rows:
        del row["turns"]
    return rows


def _begun(seed: int) -> dict[str, Any]:
    """A row without a turn: what its seed alone decides, its opening and how many turns it gets."""
    draw = random.Random(seed)
    opening = draw.choice(openings()) if draw.random() < OPENED else ""
    return {
        "messages": [],
        "seed": seed,
        "opening": opening,
        "ended": True,
        "turns": 2 if draw.random() < SECOND_TURN else 1,
    }


def _say(
    author: Author,
    rows: list[dict[str, Any]],
    role: str,
    tokens: int,
    temperature: float,
    prompt: Callable[[dict[str, Any]], list[int]],
) -> None:
    """Let the teacher write the next turn of every row."""
    if not rows:
        return
    seeds = [row["seed"] for row in rows]
    answers = author.write([prompt(row) for row in rows], tokens, temperature, seeds)

    # The given words open the first question only.
    for row, answer in zip(rows, answers, strict=True):
        opening = row["opening"] if role == "user" and not row["messages"] else ""
        row["messages"].append({"role": role, "content": (opening + answer.text).strip()})
        row["ended"] = answer.ended


def _question_ids(tokenizer: Any, row: dict[str, Any]) -> list[int]:
    """Token ids up to where the words of the next user turn begin, and its opening."""
    # A mark in place of the words shows where the template puts them.
    mark = "\ue000question\ue000"
    turns = [*row["messages"], {"role": "user", "content": mark}]
    rendered = render(tokenizer, [turns])[0]
    before, mark_there, _ = rendered.partition(mark)
    if not mark_there:
        raise ValueError(
            "the teacher's chat template drops what the user says; use plain text in data.train, or"
            " mend the template"
        )

    text = before + ("" if row["messages"] else row["opening"])
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
