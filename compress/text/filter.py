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
    files = [
        *sorted((configs_dir() / "tasks").glob("*/*.jsonl")),
        *sorted((configs_dir() / "open").glob("*.jsonl")),
    ]
    rows = []
    for file in files:
        rows += [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]

    # Questions and prompts; where a row has no question, its choices are sentences to tell apart.
    texts = []
    for row in rows:
        texts += [text for text in (row.get("query"), row.get("prompt")) if text]
    for row in rows:
        if not row.get("query"):
            texts += [text for text in row.get("choices", []) if len(text.split()) > 3]
    return tuple(texts)


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

    PHRASE = 8  # words
    ALIKE = 0.7  # share of word triples

    def __init__(self, avoid: Sequence[str] = ()) -> None:
        self.phrases: dict[int, set[tuple[str, ...]]] = defaultdict(set)
        for text in avoid:
            words = words_of(text)
            size = min(self.PHRASE, len(words))
            if size > 2:
                self.phrases[size].update(_grams(words, size))
        # Word triple -> numbers of the questions that hold it; and how many each question has.
        self.holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self.triples: list[int] = []

    def reason(self, turns: Sequence[str], ended: bool) -> str:
        """Empty when the conversation of these turns, question first, is to be kept."""
        if not ended:
            return "unended"
        if any(loops(turn) for turn in turns):
            return "looping"

        # Turns of even number are questions.
        words = [words_of(turn) for turn in turns]
        if any(len(turn) < (3 if i % 2 == 0 else 1) for i, turn in enumerate(words)):
            return "short"
        if any(self._evaluated(turn) for turn in words):
            return "evaluated"

        # Intersection over union with every earlier question that shares a triple.
        triples = set(_grams(words[0], 3))
        shared: Counter[int] = Counter()
        for triple in triples:
            shared.update(self.holders.get(triple, ()))
        if any(
            count / (len(triples) + self.triples[i] - count) > self.ALIKE
            for i, count in shared.items()
        ):
            return "duplicate"

        for triple in triples:
            self.holders[triple].append(len(self.triples))
        self.triples.append(len(triples))
        return ""

    def _evaluated(self, words: Sequence[str]) -> bool:
        """Whether a turn holds a phrase of what students are evaluated on."""
        for size, phrases in self.phrases.items():
            if any(gram in phrases for gram in _grams(words, size)):
                return True
        return False


def _grams(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """All runs of `size` words."""
    return (tuple(words[i : i + size]) for i in range(len(words) - size + 1))
