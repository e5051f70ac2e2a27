"""Whether a tokenizer's own patterns can cope with any text.

A tokenizer.json may hold regular expressions, which Oniguruma matches by backtracking: one like
`(a+)+$` takes exponential time on a run of "aaaa" before a text that does not fit, and then ends
the program with a panic, on whatever text first has such a run. Before a tokenizer is used, runs of
the characters that its patterns name, and of one of each common kind, are tokenised in a process
under limits.
"""

import json
import re
from functools import cache
from pathlib import Path

from compress.confined import Failure, Limits, ask

LIMITS = Limits(seconds=10.0, memory_bytes=4 << 30)  # a vocabulary of 262,144 ids takes 0.5 GB
# characters: a pattern that takes their third power runs into Oniguruma's own limit of 10 million
# steps
RUN = 1000
KINDS = "aA1_-.é漢 \t\n"
NAMED = 80  # characters of the patterns that are tried at most


def check_tokenizer(file: Path) -> None:
    """ValueError naming a tokenizer.json whose patterns end or outlast the process; nothing for a
    file without patterns.
    """
    if file.is_file():
        _check(file, file.stat().st_mtime_ns, file.stat().st_size)


@cache
def _check(file: Path, changed: int, size: int) -> None:
    patterns = re.findall(rb'"Regex"\s*:\s*("(?:[^"\\]|\\.)*")', file.read_bytes())
    if not patterns:
        return
    for text, answer in zip(
        texts := runs(patterns), ask("tokenize", texts, LIMITS, file=str(file)), strict=False
    ):
        if isinstance(answer, Failure) and (answer.ended or "PanicException" in answer.why):
            raise ValueError(
                f"{file}: its patterns fail on a run of {text[0]!r} ({answer.why}); mend the"
                " pre_tokenizer or normalizer, or take another tokenizer"
            )


def runs(patterns: list[bytes]) -> list[str]:
    """Texts on which a backtracking pattern shows itself: each ends with a character that is
    unlike what it repeats.
    """
    named: dict[str, None] = dict.fromkeys(KINDS)
    for pattern in patterns:
        named |= dict.fromkeys(json.loads(pattern))
    return [character * RUN + "\x01" for character in list(named)[: len(KINDS) + NAMED]]
