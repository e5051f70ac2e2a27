"""Documents in, packed token sequences out: what every training stage, calibration and the held-out scores read.

Documents are tokenised, ended with EOS, concatenated and cut to sequences of L + 1 tokens, so that position i predicts i + 1. They are
shuffled once, with a fixed seed, before they are joined: the first n sequences are a sample of the whole, which a small token budget, the
calibration and the teacher's signal all read. With weights, the source that is furthest behind its share of the tokens comes next, until
that one is used up: nothing is repeated.

`mask` marks the labels that count: everything in plain text, only the answers in chat. With packing "documents" a token sees its own document
only (positions start again at each), and its first token, which nothing announces, is no label; with "stream" a row is one text. Epoch e of
training is a permutation seeded by (seed, e), so that resuming needs no replay.

Legend: S sequences, L positions, R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint import load_tokenizer, tokenizer_digest
from compress.store import sha256_json
from compress.train.sources import Document, documents, generated

Tokens = tuple[np.ndarray, np.ndarray]  # ids int32 and label mask bool of one document
DOCUMENTS_AT_ONCE = 1000  # tokenised together


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


def _shuffled(tokenizer: Any, texts: list[Document]) -> Iterator[Tokens]:
    """Ids and label mask of each document, EOS included, in an order that is always the same."""
    order = _permutation(0, 0, len(texts))
    for start in range(0, len(order), DOCUMENTS_AT_ONCE):
        some = [texts[i] for i in order[start : start + DOCUMENTS_AT_ONCE]]
        plain = [document for document in some if isinstance(document, str)]
        encoded = iter(tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else [])
        for document in some:
            if isinstance(document, str):
                ids = np.array([*next(encoded), tokenizer.eos_token_id], dtype=np.int32)
                yield ids, np.ones(len(ids), dtype=bool)
            else:
                yield _chat_tokens(tokenizer, document)


def _chat_tokens(tokenizer: Any, turns: list[dict[str, str]]) -> Tokens:
    if not tokenizer.chat_template:
        raise ValueError("chat data was given, but the teacher's tokenizer has no chat template; use plain text sources")
    ids: list[int] = []
    mask: list[bool] = []
    for turn in range(len(turns)):  # the ids that a turn adds to the rendered prefix belong to that turn
        rendered = tokenizer.apply_chat_template(turns[: turn + 1], tokenize=False)
        now = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
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
         log: Callable[[str], None] = lambda message: None) -> Packed:  # fmt: skip
    """Documents of `sources` in the teacher's tokens, packed to (S, seq_len + 1), cached on disk by content.

    ValueError when there are fewer tokens than one sequence needs.
    """
    texts = [generated(s, teacher, cache_dir, log) if s.startswith("generated:") else documents(s) for s in sources]
    named = {"tokenizer": tokenizer_digest(teacher), "texts": sha256_json(texts), "seq_len": seq_len, "weights": weights or [], "schema": 2}
    path = cache_dir / f"{sha256_json(named)}.safetensors"
    if not path.is_file():
        tokenizer = load_tokenizer(teacher)
        streams = [_shuffled(tokenizer, source) for source in (texts if weights else [list(chain(*texts))])]
        pairs = list(_mixed(streams, weights or [1.0]))
        ids, mask = (np.concatenate(column) for column in zip(*pairs, strict=True))
        first = np.zeros(len(ids), dtype=bool)
        first[np.cumsum([0, *(len(pair[0]) for pair in pairs[:-1])])] = True
        count = len(ids) // (seq_len + 1) * (seq_len + 1)
        if count == 0:
            raise ValueError(f"{sources} hold {len(ids)} tokens, one sequence needs {seq_len + 1}; add text or lower data.seq_len")
        beside = path.with_suffix(".part")
        save_file({name: torch.from_numpy(column[:count]) for name, column in (("ids", ids), ("mask", mask), ("first", first))}, beside)
        beside.replace(path)
    ids_SL, mask_SL, first_SL = (load_file(path)[name].view(-1, seq_len + 1) for name in ("ids", "mask", "first"))
    digest = sha256_json([path.stem, packing])
    return Packed(ids_SL, mask_SL, digest) if packing == "stream" else Packed(ids_SL, mask_SL & ~first_SL, digest, first_SL)
