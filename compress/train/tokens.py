"""Text to token ids: in pieces that bound memory, every failure of the tokenizer a sentence."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

PIECE = 1_000_000  # characters that are tokenised as one: they take about 150 bytes each meanwhile
AT_ONCE = 2_000_000  # characters of the pieces that are tokenised together
PIECES = 1000  # so many at most
ENDS = (
    "\n\n",
    "\n",
    " ",
)  # where a long document is cut: behind a paragraph, else a line, else a word


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A text in parts of at most `size` characters, cut behind the last paragraph, line or word that fits."""
    start = 0
    while len(text) - start > size:
        ends = (text.rfind(mark, start + 1, start + size - len(mark)) + len(mark) for mark in ENDS)
        cut = next((end for end in ends if end > start + 2), start + size)
        yield text[start:cut]
        start = cut
    yield text[start:]


def encode(tokenizer: Any, texts: Sequence[str], size: int = PIECE) -> list[np.ndarray]:
    """Ids int32 of each text, without the special tokens that a tokenizer adds. ValueError when it fails."""
    parts = [(owner, piece) for owner, text in enumerate(texts) for piece in pieces(text, size)]
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    start = 0
    while start < len(parts):
        end, room = start, max(AT_ONCE, len(parts[start][1]))
        while end < len(parts) and end - start < PIECES and len(parts[end][1]) <= room:
            room -= len(parts[end][1])
            end += 1
        for (owner, _), row in zip(
            parts[start:end],
            _encoded(tokenizer, [piece for _, piece in parts[start:end]]),
            strict=True,
        ):
            ids[owner].append(np.array(row, dtype=np.int32))
        start = end
    return [np.concatenate(rows) for rows in ids]


def _encoded(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    try:
        return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    except BaseException as error:
        if (
            type(error).__name__ != "PanicException"
        ):  # of Rust: no Exception, and of no importable class
            raise
        raise ValueError(
            f"the tokenizer fails on a text ({error}); mend the patterns in its tokenizer.json"
        ) from error


def opening(tokenizer: Any) -> list[int]:
    """The BOS with which this tokenizer begins every text, as Gemma's and Llama 3's do; [] where it adds none."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and whole[: len(bare) + 1] == [bos, *bare] else []
