"""Whether a tokenizer can cope with any text, and gives the same ids for it every time.

A tokenizer.json may hold regular expressions, which Oniguruma matches by backtracking: one like
`(a+)+$` takes exponential time on a run of "aaaa" before a text that does not fit, and then ends
the program with a panic, on whatever text first has such a run. Before a tokenizer is used, runs of
the characters that its patterns name, and of one of each common kind, are tokenised in a process
under limits. A normalizer can multiply text: what comes out is counted.
"""

import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path

from compress.confined import Failure, Limits, ask
from compress.doors import read_json

LIMITS = Limits(seconds=10.0, memory_bytes=3 << 29)  # a vocabulary of 262,144 ids takes 0.5 GB
# Characters: a pattern that takes their third power runs into Oniguruma's own limit of 10 million
# steps.
RUN = 1000
MOST = 100  # tokens and normalised characters of one: NFKC makes 18 of one, bytes are 4 at most
DROPOUT = re.compile(rb'"dropout"\s*:\s*[-+.\w]*[1-9]')
KINDS = "aA1_-.é漢 \t\n"
NAMED = 80  # characters of the patterns that are tried at most


def check_tokenizer(file: Path) -> None:
    """ValueError naming a tokenizer.json whose patterns end or outlast the process, that multiplies
    text, or that tokenises at random.
    """
    if file.is_file():
        _check(file, file.stat().st_mtime_ns, file.stat().st_size)


@cache
def _check(file: Path, changed: int, size: int) -> None:
    data = file.read_bytes()

    # Merges left out at random.
    if DROPOUT.search(data):  # or a token of that name
        model = read_json(file).get("model")
        if isinstance(model, dict) and model.get("dropout"):
            raise ValueError(
                f"{file}: model.dropout is {model['dropout']}, so one text has other tokens each"
                " time; set it to null"
            )

    # Runs of the characters that its patterns name, in a process that may be ended.
    patterns = re.findall(rb'"(?:Regex|String)"\s*:\s*("(?:[^"\\]|\\.)*")', data)
    texts = runs(patterns)
    for text, answer in zip(texts, ask("tokenize", texts, LIMITS, file=str(file)), strict=False):
        if isinstance(answer, Failure):
            if answer.ended or "PanicException" in answer.why:
                raise ValueError(
                    f"{file}: its patterns fail on a run of {text[0]!r} ({answer.why}); mend the"
                    " pre_tokenizer or normalizer, or take another tokenizer"
                )
        elif answer > MOST * len(text):
            raise ValueError(
                f"{file}: it makes {answer:,} tokens or characters of {len(text):,} characters, a"
                f" run of {text[0]!r}; mend the normalizer, or take another tokenizer"
            )


def runs(patterns: list[bytes]) -> list[str]:
    """Texts on which a backtracking pattern shows itself: each ends with a character that is
    unlike what it repeats.
    """
    characters: dict[str, None] = dict.fromkeys(KINDS)
    for pattern in patterns:
        with suppress(ValueError):  # no JSON text, which the tokenizer's own reader says
            characters |= dict.fromkeys(json.loads(pattern))
    return [character * RUN + "\x01" for character in list(characters)[: len(KINDS) + NAMED]]
