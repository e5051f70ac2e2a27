"""Documents in, packed token sequences out: what every training stage, calibration and the
held-out scores read.

Documents (`sources.py`) are tokenised, ended with EOS, concatenated and cut to sequences of L + 1
tokens, so that position i predicts i + 1. Where the tokenizer begins every text with BOS, as
Gemma's and Llama 3's do, a plain text begins with it too, and it is no label; a chat begins as its
template says. Documents are shuffled once, with a fixed seed, before they are joined: the first n
sequences are a sample of the whole, which a small token budget, the calibration and the teacher's
signal all read. With weights, the source that is furthest behind its share of the tokens comes
next, until that one is used up: nothing is repeated.

`mask` marks the labels that count: everything in plain text; in chat everything too when a student
learns from a teacher, who has an opinion on every token, or only the answers (`chat_labels`,
`chats.py`). Sequences without a label, such as a question of pages, are left out. With packing
"documents" a token sees its own document only (positions start again at each), and its first token,
which nothing announces, is no label; with "stream" a row is one text. Epoch e of training is a
permutation seeded by (seed, e), so that resuming needs no replay.

Legend: S sequences, L positions, R rows of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from compress.keys import token_inputs
from compress.models.chats import Chat, Document, Tokens, chat_tokens, content, render
from compress.models.tokenizer import load_tokenizer
from compress.models.tokens import encode, opening
from compress.store import sha256_file, sha256_json, write_whole
from compress.text.sources import documents
from compress.text.written import generated
from compress.train.packed import Packed, _permutation

DOCUMENTS_AT_ONCE = 1000  # rendered and tokenised together


def _shuffled(tokenizer: Any, texts: list[Document], chat_labels: str) -> Iterator[Tokens]:
    """Ids and label mask of each document, BOS and EOS included,
    in an order that is always the same.
    """
    order = _permutation(0, 0, len(texts))
    for start in range(0, len(order), DOCUMENTS_AT_ONCE):
        batch = [texts[i] for i in order[start : start + DOCUMENTS_AT_ONCE]]
        plain = [document for document in batch if isinstance(document, str)]
        chats = [document for document in batch if isinstance(document, Chat)]

        # Each kind is tokenised together, and given in the order of the documents.
        plain_in_order = iter(_plain_tokens(tokenizer, plain))
        chats_in_order = iter(_chats(tokenizer, chats, chat_labels))
        for document in batch:
            yield next(plain_in_order) if isinstance(document, str) else next(chats_in_order)


def _plain_tokens(tokenizer: Any, texts: list[str]) -> list[Tokens]:
    """Texts between BOS, where the tokenizer adds one, and EOS. All but BOS are labels."""
    before = np.array(opening(tokenizer), dtype=np.int32)
    after = np.array([tokenizer.eos_token_id], dtype=np.int32)
    rows = []
    for ids in encode(tokenizer, texts):
        mask = np.ones(len(before) + len(ids) + 1, dtype=bool)
        mask[: len(before)] = False
        rows.append((np.concatenate([before, ids, after]), mask))
    return rows


def _chats(tokenizer: Any, chats: list[Chat], chat_labels: str) -> list[Tokens]:
    """Chats as the teacher's template renders them: their answers as labels, or everything."""
    if chat_labels == "answers":
        return chat_tokens(tokenizer, chats)
    return [
        (ids, np.ones(len(ids), dtype=bool)) for ids in encode(tokenizer, render(tokenizer, chats))
    ]


def _mixed(streams: list[Iterator[Tokens]], weights: list[float]) -> Iterator[Tokens]:
    """Documents of several streams in proportion to their weights."""
    taken = [0] * len(streams)
    while True:
        # Tokens that each stream lacks of its share, once the next token is there.
        behind = [
            weight / sum(weights) * (1 + sum(taken)) - count
            for weight, count in zip(weights, taken, strict=True)
        ]
        chosen = behind.index(max(behind))

        # One that is used up ends the text: its share could not be kept.
        document = next(streams[chosen], None)
        if document is None:
            return
        taken[chosen] += len(document[0])
        yield document


def pack(
    sources: list[str],
    teacher: Path,
    seq_len: int,
    cache_dir: Path,
    *,
    tokens_of: Path | None = None,
    weights: list[float] | None = None,
    packing: str = "stream",
    chat_labels: str = "all",
    log: Callable[[str], None] = lambda message: None,
) -> Packed:
    """`sources` in the teacher's tokens, or in those of the checkpoint `tokens_of`, packed to
    (S, seq_len + 1), cached on disk by content.

    ValueError when they don't fill one sequence, or no sequence has a label. `chat_labels`: "all"
    tokens of a chat count as labels, or only the "answers".
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    texts = [
        (
            generated(source, teacher, cache_dir, log, documents)
            if source.startswith("generated:")
            else documents(source, log)
        )
        for source in sources
    ]

    # Everything that decides the tokens names the file that keeps them.
    decisive = {
        "tokens": token_inputs(tokens_of or teacher),
        "texts": sha256_json([[content(document) for document in source] for source in texts]),
        "seq_len": seq_len,
        "weights": weights or [],
        "chat_labels": chat_labels,
        "schema": 4,
    }
    path = cache_dir / f"{sha256_json(decisive)}.safetensors"
    if not path.is_file():
        tokenizer = load_tokenizer(tokens_of or teacher)
        streams = [
            _shuffled(tokenizer, source, chat_labels)
            for source in (texts if weights else [list(chain(*texts))])
        ]
        columns = _joined(list(_mixed(streams, weights or [1.0])), seq_len, sources)
        write_whole(path, save(columns))

    # The first token of a document is no label there; sequences without a label are left out.
    columns = load_file(path)
    ids_SL, mask_SL, first_SL = (
        columns[name].view(-1, seq_len + 1) for name in ("ids", "mask", "first")
    )
    if packing == "documents":
        mask_SL = mask_SL & ~first_SL
    labelled_S = mask_SL[:, 1:].any(1)
    if not labelled_S.all():
        ids_SL, mask_SL, first_SL = ids_SL[labelled_S], mask_SL[labelled_S], first_SL[labelled_S]
        _tell_labels(sources, labelled_S, log)

    # The name is of what came out: a newer tokenizer that cuts alike changes nothing.
    name = sha256_json([sha256_file(path), packing])
    return Packed(ids_SL, mask_SL, name, None if packing == "stream" else first_SL)


def _joined(pairs: list[Tokens], seq_len: int, sources: list[str]) -> dict[str, Tensor]:
    """Documents one behind the other, cut to whole sequences: ids int32, label mask bool, and bool
    where a document begins; each (S * (seq_len + 1),). Empties `pairs`: with large text both have
    no room. ValueError when they don't fill one sequence.
    """
    ids, mask = (np.concatenate(column) for column in zip(*pairs, strict=True))
    assert len(ids) == len(mask)
    first = np.zeros(len(ids), dtype=bool)
    first[np.cumsum([0, *(len(pair[0]) for pair in pairs[:-1])])] = True
    pairs.clear()

    count = len(ids) // (seq_len + 1) * (seq_len + 1)
    if count == 0:
        raise ValueError(
            f"{sources} hold {len(ids)} tokens, one sequence needs {seq_len + 1}; add text or"
            " lower data.seq_len"
        )
    columns = {"ids": ids, "mask": mask, "first": first}
    return {name: torch.from_numpy(column[:count]) for name, column in columns.items()}


def _tell_labels(sources: list[str], labelled_S: Tensor, log: Callable[[str], None]) -> None:
    """Say how many sequences have no label and are left out. ValueError when all are."""
    without = int((~labelled_S).sum())
    count = len(labelled_S)
    if without == count:
        hint = "give chats with assistant turns, or set data.chat_labels=all"
        raise ValueError(
            f"{sources}: none of {count} sequences holds a token of an answer, so there is nothing"
            f" to learn; {hint}"
        )

    log(
        f"{', '.join(sources)}: {without} of {count} sequences hold no token of an answer and are"
        " left out"
    )
