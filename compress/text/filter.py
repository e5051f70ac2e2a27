"""Which conversations that a teacher wrote are worth training on,
and which must not be trained on.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache

from compress.assets import configs_dir
from compress.text.repetition import loops


def words_of(text: str) -> tuple[str, ...]:
    """Words and numbers in lower case, without punctuation."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


@cache
def evaluation_texts() -> tuple[str, ...]:
    """What students are asked in the embedded tasks and open prompts: nothing like it may be
    trained on.
    """
    rows = []
    for file in [
        *sorted((configs_dir() / "tasks").glob("*/*.jsonl")),
        *sorted((configs_dir() / "open").glob("*.jsonl")),
    ]:
        rows += [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    texts = [text for row in rows for text in (row.get("query"), row.get("prompt")) if text]
    return tuple(
        texts
        + [
            text
            for row in rows
            if not row.get("query")
            for text in row.get("choices", [])
            if len(text.split()) > 3
        ]
    )


class Filter:
    """Why a conversation is not kept, in a word; what is kept is remembered.

    unended    the teacher did not stop by itself
    looping    a turn repeats itself (`repetition.loops`)
    short      a question of fewer than 3 words or an answer without a word
    evaluated  it shares PHRASE words in a row with a text that students are evaluated on, or holds
               a shorter such text whole
    duplicate  more than ALIKE of its first question's word triples, of both together, are those of
               an earlier question
    """

    PHRASE, ALIKE = 8, 0.7

    def __init__(self, avoid: Sequence[str] = ()) -> None:
        self.phrases: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        for text in avoid:
            words = words_of(text)
            size = min(self.PHRASE, len(words))
            if size > 2:
                self.phrases[size].update(_grams(words, size))
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(
            list
        )  # of each triple, the questions that hold it
        self.triples: list[int] = []  # how many triples each question has

    def reason(self, turns: Sequence[str], ended: bool) -> str:
        """Empty when the conversation of these turns, question first, is to be kept."""
        if not ended:
            return "unended"
        if any(loops(turn) for turn in turns):
            return "looping"
        words = [words_of(turn) for turn in turns]
        if any(len(turn) < (3 if i % 2 == 0 else 1) for i, turn in enumerate(words)):
            return "short"
        if any(
            gram in grams
            for turn in words
            for size, grams in self.phrases.items()
            for gram in _grams(turn, size)
        ):
            return "evaluated"
        triples = set(_grams(words[0], 3))
        shared = Counter(holder for triple in triples for holder in self.holders.get(triple, ()))
        if any(
            count / (len(triples) + self.triples[i] - count) > self.ALIKE
            for i, count in shared.items()
        ):
            return "duplicate"
        for triple in triples:
            self.holders[triple].append(len(self.triples))
        self.triples.append(len(triples))
        return ""


def _grams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))
