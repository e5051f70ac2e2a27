"""Whether a text repeats itself: the commonest way in which a damaged language model fails when it
writes by itself.

A text loops when one of three holds, with words as separated by white space, in lower case:

- run         a unit of 1 to 24 words stands at least three times in a row, and these repeats are at
              least 8 words together
- recurrence  the same five words in a row occur at least four times, anywhere: lists that name one
              thing again and again
- characters  a unit of 1 to 4 characters stands at least twelve times in a row, as in
              "1000000000000"; rules and indents are left out

The bounds let through what people write on purpose: "ha ha ha", "apple apple apple", a refrain, a
table's rule.
"""

import re
from collections import Counter

UNIT_WORDS = 24  # the longest unit of a run
RUN_REPEATS, RUN_WORDS = 3, 8
GRAM_WORDS, GRAM_TIMES = 5, 4
_CHARACTERS = re.compile(r"([^\s\-=_.*#~|]{1,4})\1{11,}")


def loops(text: str) -> bool:
    """Whether `text` repeats itself, by the definition above."""
    words = text.lower().split()
    return bool(_CHARACTERS.search(text)) or _has_run(words) or _recurs(words)


def _has_run(words: list[str]) -> bool:
    """Whether a unit stands RUN_REPEATS times in a row over at least RUN_WORDS words.

    A unit of u words that stands r times is a stretch of (r - 1) u words equal to the ones u
    before.
    """
    for unit in range(1, min(UNIT_WORDS, len(words) // RUN_REPEATS) + 1):
        enough = max((RUN_REPEATS - 1) * unit, RUN_WORDS - unit)
        stretch = 0
        for i in range(unit, len(words)):
            stretch = stretch + 1 if words[i] == words[i - unit] else 0
            if stretch >= enough:
                return True
    return False


def _recurs(words: list[str]) -> bool:
    """Whether some GRAM_WORDS words in a row occur GRAM_TIMES times."""
    grams = Counter(tuple(words[i : i + GRAM_WORDS]) for i in range(len(words) - GRAM_WORDS + 1))
    return max(grams.values(), default=0) >= GRAM_TIMES
