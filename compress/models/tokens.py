"""Text to token ids: in pieces that bound memory, every failure of the tokenizer a sentence."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

PIECE = 500_000  # characters that are tokenised as one: they take some 250 bytes each meanwhile
AT_ONCE = 1_000_000  # characters of the pieces that are tokenised together
PIECES = 1000  # so many at most
# Where a long document is cut: behind a paragraph, else a line, else a word.
ENDS = ("\n\n", "\n", " ")


def pieces(text: str, size: int = PIECE) -> Iterator[str]:
    """A text in parts of at most `size` characters, cut behind the last paragraph, line or word
    that fits.
    """
    start = 0
    while len(text) - start > size:
        ends = (text.rfind(mark, start + 1, start + size - len(mark)) + len(mark) for mark in ENDS)
        cut = next((end for end in ends if end > start + 2), start + size)
        yield text[start:cut]
        start = cut
    yield text[start:]


def encode(tokenizer: Any, texts: Sequence[str], size: int = PIECE) -> list[np.ndarray]:
    """Ids int32 of each text, without the special tokens that a tokenizer adds. ValueError when it
    fails.
    """
    rows: list[list[np.ndarray]] = [[] for _ in texts]
    for owner, ids, _ in _encoded(tokenizer, texts, size):
        rows[owner].append(np.array(ids, dtype=np.int32))
    return [np.concatenate(parts) for parts in rows]


def encode_with_ends(
    tokenizer: Any, texts: Sequence[str], size: int = PIECE
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `encode`, and for each id how many of the text's characters
    it and those before it stand for.

    ValueError for a tokenizer that can't tell.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "the tokenizer does not say which characters a token stands for, so answers can't be"
            " told from questions: set data.chat_labels=all, or use a model with a tokenizer.json"
        )

    # Places in a piece, moved by what lies before the piece.
    rows: list[list[np.ndarray]] = [[] for _ in texts]
    ends: list[list[np.ndarray]] = [[] for _ in texts]
    behind = [0] * len(texts)
    for owner, ids, offsets in _encoded(tokenizer, texts, size, return_offsets_mapping=True):
        rows[owner].append(np.array(ids, dtype=np.int32))
        ends[owner].append(behind[owner] + np.array([end for _, end in offsets[0]], dtype=np.int64))
        behind[owner] += offsets[1]

    # An id may stand for no character of its own: ends never go back.
    return [
        (np.concatenate(ids), np.maximum.accumulate(np.concatenate(places)))
        for ids, places in zip(rows, ends, strict=True)
    ]


def _encoded(
    tokenizer: Any, texts: Sequence[str], size: int, **options: bool
) -> Iterator[tuple[int, list[int], tuple[list[tuple[int, int]], int]]]:
    """(number of the text, ids, (their places where asked for, characters)) of every piece,
    in order.
    """
    parts = [(owner, piece) for owner, text in enumerate(texts) for piece in pieces(text, size)]
    start = 0
    while start < len(parts):
        # As many pieces as are tokenised together.
        end = start
        room = max(AT_ONCE, len(parts[start][1]))
        while end < len(parts) and end - start < PIECES and len(parts[end][1]) <= room:
            room -= len(parts[end][1])
            end += 1

        texts_together = [piece for _, piece in parts[start:end]]
        try:
            encoded = tokenizer(texts_together, add_special_tokens=False, verbose=False, **options)
        except BaseException as error:
            # A panic of Rust's is no Exception, and its class can't be imported.
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(
                f"the tokenizer fails on a text ({error}); mend the patterns in its tokenizer.json"
            ) from error

        places = encoded["offset_mapping"] if options else [[]] * len(texts_together)
        for (owner, piece), ids, offsets in zip(
            parts[start:end], encoded["input_ids"], places, strict=True
        ):
            yield owner, ids, (offsets, len(piece))
        start = end


def opening(tokenizer: Any) -> list[int]:
    """The BOS with which this tokenizer begins every text, as Gemma's and Llama 3's do; [] where
    it adds none.
    """
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and with_special[: len(bare) + 1] == [bos, *bare] else []
