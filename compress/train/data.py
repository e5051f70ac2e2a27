"""Documents in, packed token sequences out: what every training stage, calibration and the held-out scores read.

Documents are tokenised, ended with EOS, concatenated and cut to sequences of L + 1 tokens, so that position i predicts i + 1. They are
shuffled once, with a fixed seed, before they are joined: the first n sequences are a sample of the whole, which a small token budget, the
calibration and the teacher's signal all read. With weights, the source that is furthest behind its share of the tokens comes next, until
that one is used up: nothing is repeated.

`mask` marks the labels that count: everything in plain text; in chat everything too when a student learns from a teacher, who has an opinion
on every token, or only the answers (`chat_labels`). With packing "documents" a token sees its own document
only (positions start again at each), and its first token, which nothing announces, is no label; with "stream" a row is one text. Epoch e of
training is a permutation seeded by (seed, e), so that resuming needs no replay.

A *source* of documents is one string:

embedded:docstrings      docstrings of the running Python's standard library (PSF licence), read with `ast`, never imported
embedded:topics          `pydoc_data.topics`, the language reference's help texts (PSF licence)
embedded:docstring_chat  question and answer pairs made of the docstrings' first paragraphs
embedded:conversations   what the embedded teacher wrote out of nothing (`configs/conversations/README.md`), in its own chat template
embedded:conversations_heldout   the last tenth of these, which the source above leaves out: never trained on
PATH                     .txt (documents split at blank lines), .jsonl / .json lines or .parquet with `text`, `messages`, or a
                         `prompt|question` / `answer|response|completion` pair
hub:NAME[@CONFIG]:SPLIT:FIELD   a hub dataset (FIELD as above; needs the network)
generated:COUNTxTOKENS:PROMPTS  what the teacher writes itself, out of nothing or on prompts (`train/written.py`)

Legend: S sequences, L positions, R rows of a batch.
"""

from __future__ import annotations

import ast
import inspect
import json
import lzma
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from compress.assets import configs_dir
from compress.checkpoint import load_tokenizer
from compress.keys import token_inputs
from compress.store import sha256_file, sha256_json, write_whole
from compress.train.written import Document, generated

SKIPPED_MODULES = ("test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "__pycache__")
MIN_CHARACTERS = 80  # shorter docstrings are one-line summaries that teach little and cost an EOS each
HELDOUT_SHARE = 0.1  # of the embedded conversations
Tokens = tuple[np.ndarray, np.ndarray]  # ids int32 and label mask bool of one document
DOCUMENTS_AT_ONCE = 1000  # tokenised together


@cache
def _docstrings() -> tuple[tuple[str, str], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(part in SKIPPED_MODULES for part in parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            continue  # a few files of other Python versions lie in some installations
        module = ".".join(parts).removesuffix(".py").removesuffix(".__init__")
        for name, text in _docs_below(tree, module):
            if len(text) >= MIN_CHARACTERS:
                found.setdefault(text, name)
    return tuple((name, text) for text, name in found.items())


def _docs_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> Iterator[tuple[str, str]]:
    if text := ast.get_docstring(node):
        yield name, inspect.cleandoc(text)
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docs_below(child, f"{name}.{child.name}")


def _docstring_chat() -> list[Document]:
    chats: list[Document] = []
    for name, text in _docstrings():
        answer = " ".join(text.split("\n\n")[0].split())
        if name.count(".") >= 1 and "._" not in name and MIN_CHARACTERS <= len(answer) <= 600:
            question = f"What does `{name}` do in Python's standard library?"
            chats.append([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])
    return chats


def conversations_file() -> Path:
    """The conversations that ship with the package."""
    return configs_dir() / "conversations" / "conversations.jsonl.xz"


@cache
def _conversations() -> tuple[list[Document], list[Document]]:
    """Those to train on and those held out."""
    with lzma.open(conversations_file(), "rt", encoding="utf-8") as lines:
        rows: list[Document] = [json.loads(line)["messages"] for line in lines]
    kept = len(rows) - round(HELDOUT_SHARE * len(rows))
    return rows[:kept], rows[kept:]


EMBEDDED: dict[str, Callable[[], list[Document]]] = {
    "docstrings": lambda: [text for _, text in _docstrings()],
    "topics": lambda: [text.strip() for _, text in sorted(topics.items())],
    "docstring_chat": _docstring_chat,
    "conversations": lambda: _conversations()[0],
    "conversations_heldout": lambda: _conversations()[1],
}


def _document(row: dict[str, Any], where: str) -> Document:
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("messages"), list):
        return row["messages"]
    question = row.get("prompt", row.get("question"))
    answer = row.get("answer", row.get("response", row.get("completion")))
    if isinstance(question, str) and isinstance(answer, str):
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    raise ValueError(f"{where} has the fields {sorted(row)}; needed: text, messages, or prompt|question with answer|response|completion")


def _json_line(line: str, where: str) -> Document:
    try:
        return _document(json.loads(line), where)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error.msg}); one JSON object a line is needed") from error


def _from_hub(source: str) -> list[Document]:
    match = re.fullmatch(r"hub:([^:@]+)(?:@([^:]+))?:(.+):(\w+)", source)
    if not match:
        raise ValueError(f"data source {source!r} is not hub:NAME[@CONFIG]:SPLIT:FIELD, as in hub:Salesforce/wikitext@wikitext-2-raw-v1:test:text")
    try:
        return list(_from_datasets(match[1], name=match[2], split=match[3], field=match[4]))
    except OSError as error:
        why = type(error).__name__
        raise ValueError(f"data source {source} can't be had ({why}); check the name and the network, or use a local file") from error


def _from_datasets(path: str, field: str | None = None, **how: Any) -> Iterator[Document]:
    import datasets

    for number, row in enumerate(datasets.load_dataset(path, **how)):
        yield row[field] if field else _document(row, f"{path}, row {number}")


def documents(source: str) -> list[Document]:
    """All documents of a source. ValueError when it is unknown, missing, malformed or has no text."""
    kind, _, name = source.partition(":")
    if kind == "embedded":
        if name not in EMBEDDED:
            raise ValueError(f"data source {source!r} is unknown; embedded sources are {', '.join(sorted(EMBEDDED))}")
        found = EMBEDDED[name]()
    else:
        found = _from_hub(source) if kind == "hub" else _from_file(Path(source).expanduser())
    if not any(document.strip() if isinstance(document, str) else document for document in found):
        raise ValueError(f"data source {source} has no usable text; give a file with at least one document")
    return found


def _from_file(path: Path) -> list[Document]:
    if not path.is_file():
        raise ValueError(f"data file {path} does not exist; sources are embedded:NAME, hub:NAME:SPLIT:FIELD or a .txt, .jsonl or .parquet file")
    if path.suffix == ".txt":
        return [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    if path.suffix in (".jsonl", ".json"):
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        return [_json_line(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if path.suffix == ".parquet":
        return list(_from_datasets("parquet", data_files=str(path), split="train"))
    raise ValueError(f"data file {path} ends in {path.suffix!r}; allowed: .txt, .jsonl, .json (one object a line), .parquet")


@dataclass(frozen=True)
class Packed:
    """ids (S, L+1) int32, mask (S, L+1) bool, the digest that names them; first (S, L+1) bool marks documents' first tokens."""

    ids: Tensor
    mask: Tensor
    digest: str
    first: Tensor | None = None  # None: rows are one text each

    def rows(self, seed: int, start: int, count: int, first: int) -> list[int]:
        """Sequence numbers of positions start..start+count of the endless shuffled stream over the `first` sequences."""
        size = min(len(self.ids), first)
        return [_permutation(seed, index // size, size)[index % size] for index in range(start, start + count)]

    def inputs(self, rows: list[int]) -> dict[str, Tensor]:
        """inputs (R, L) int64 and, where documents are apart, positions (R, L) int64: what a model is given."""
        ids_RL = self.ids[rows, :-1].long()
        if self.first is None:
            return {"inputs": ids_RL}
        index_L = torch.arange(ids_RL.shape[1])
        start_RL = torch.where(self.first[rows, :-1], index_L, 0).cummax(-1).values
        return {"inputs": ids_RL, "positions": index_L - start_RL}

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """`inputs`, and labels (R, L) int64 with their mask (R, L) bool."""
        return self.inputs(rows) | {"labels": self.ids[rows, 1:].long(), "mask": self.mask[rows, 1:].contiguous()}


@cache
def _permutation(seed: int, epoch: int, size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


def _shuffled(tokenizer: Any, texts: list[Document], chat_labels: str) -> Iterator[Tokens]:
    """Ids and label mask of each document, EOS included, in an order that is always the same."""
    order = _permutation(0, 0, len(texts))
    for start in range(0, len(order), DOCUMENTS_AT_ONCE):
        some = [texts[i] for i in order[start : start + DOCUMENTS_AT_ONCE]]

        # Plain text, and chats of which every token is a label, are tokenised together.
        whole = [d if isinstance(d, str) else _rendered(tokenizer, d) for d in some if isinstance(d, str) or chat_labels == "all"]
        encoded = iter(tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"] if whole else [])
        for document in some:
            if isinstance(document, str):
                ids = np.array([*next(encoded), tokenizer.eos_token_id], dtype=np.int32)
            elif chat_labels == "all":
                ids = np.array(next(encoded), dtype=np.int32)
            else:
                yield _chat_tokens(tokenizer, document)
                continue
            yield ids, np.ones(len(ids), dtype=bool)


def _rendered(tokenizer: Any, turns: list[dict[str, str]]) -> str:
    """A chat as text. ValueError when the teacher has no template for it."""
    if not tokenizer.chat_template:
        raise ValueError("chat data was given, but the teacher's tokenizer has no chat template; use plain text sources")
    return tokenizer.apply_chat_template(turns, tokenize=False)


def _chat_tokens(tokenizer: Any, turns: list[dict[str, str]]) -> Tokens:
    """Ids of a chat, and which of them are an answer's."""
    ids: list[int] = []
    mask: list[bool] = []
    for turn in range(len(turns)):  # the ids that a turn adds to the rendered prefix belong to that turn
        now = tokenizer(_rendered(tokenizer, turns[: turn + 1]), add_special_tokens=False, verbose=False)["input_ids"]
        mask += [turns[turn]["role"] == "assistant"] * (len(now) - len(ids))
        ids = now
    return np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)


def _mixed(streams: list[Iterator[Tokens]], weights: list[float]) -> Iterator[Tokens]:
    """Documents of several streams in proportion to their weights."""
    taken = [0] * len(streams)
    while True:
        behind = [weight / sum(weights) * (1 + sum(taken)) - count for weight, count in zip(weights, taken, strict=True)]
        chosen = behind.index(max(behind))
        if (document := next(streams[chosen], None)) is None:
            return
        taken[chosen] += len(document[0])
        yield document


def pack(sources: list[str], teacher: Path, seq_len: int, cache_dir: Path, *, weights: list[float] | None = None, packing: str = "stream",
         chat_labels: str = "all", log: Callable[[str], None] = lambda message: None) -> Packed:  # fmt: skip
    """`sources` in the teacher's tokens, packed to (S, seq_len + 1), cached on disk by content. ValueError when they don't fill one sequence.

    `chat_labels`: "all" tokens of a chat count as labels, or only the "answers".
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    texts = [generated(s, teacher, cache_dir, log, documents) if s.startswith("generated:") else documents(s) for s in sources]
    named = {
        "tokens": token_inputs(teacher), "texts": sha256_json(texts), "seq_len": seq_len, "weights": weights or [],
        "chat_labels": chat_labels, "schema": 3,
    }  # fmt: skip
    path = cache_dir / f"{sha256_json(named)}.safetensors"
    if not path.is_file():
        tokenizer = load_tokenizer(teacher)
        streams = [_shuffled(tokenizer, source, chat_labels) for source in (texts if weights else [list(chain(*texts))])]
        pairs = list(_mixed(streams, weights or [1.0]))
        ids, mask = (np.concatenate(column) for column in zip(*pairs, strict=True))
        first = np.zeros(len(ids), dtype=bool)
        first[np.cumsum([0, *(len(pair[0]) for pair in pairs[:-1])])] = True
        count = len(ids) // (seq_len + 1) * (seq_len + 1)
        if count == 0:
            raise ValueError(f"{sources} hold {len(ids)} tokens, one sequence needs {seq_len + 1}; add text or lower data.seq_len")
        write_whole(path, save({name: torch.from_numpy(column[:count]) for name, column in (("ids", ids), ("mask", mask), ("first", first))}))
    ids_SL, mask_SL, first_SL = (load_file(path)[name].view(-1, seq_len + 1) for name in ("ids", "mask", "first"))
    name = sha256_json([sha256_file(path), packing])  # of what came out: a newer tokenizer that cuts alike changes nothing
    return Packed(ids_SL, mask_SL, name) if packing == "stream" else Packed(ids_SL, mask_SL & ~first_SL, name, first_SL)
