"""Small damages to a prompt that leave its question answerable: how much of a score hangs on the
exact wording?

Each is a pure function of a text and a random generator seeded by sha256 of the damage's name and
the text: teacher, student and every run see the same. Contexts of one item's choices (winogrande)
share a seed, so what they have in common stays in common.
"""

import hashlib
import random
import re
from collections.abc import Callable
from functools import partial

SHARE = 0.2  # of the words


def _words(text: str, rng: random.Random, change: Callable[[str, random.Random], str]) -> str:
    """A text with a share of its words changed."""
    return re.sub(
        r"\S+", lambda word: change(word[0], rng) if rng.random() < SHARE else word[0], text
    )


def _swap_letters(word: str, rng: random.Random) -> str:
    """A word with two neighbouring letters in each other's place."""
    at = rng.randrange(max(1, len(word) - 1))
    return word[:at] + word[at : at + 2][::-1] + word[at + 2 :]


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "typos": partial(_words, change=_swap_letters),
    "case": partial(_words, change=lambda word, rng: word.swapcase()),
    "whitespace": partial(_words, change=lambda word, rng: " " * rng.randint(1, 3) + word),
    # The beginning goes, as where a window is too short.
    "truncation": lambda text, rng: text[int(len(text) * rng.uniform(0.1, 0.4)) :].lstrip(),
}


def perturbed(context: str | list[str], name: str) -> str | list[str]:
    """One item's context, or its contexts, with the damage `name` of `PERTURBATIONS`."""
    texts = [context] if isinstance(context, str) else context
    seed = hashlib.sha256(f"{name}\n{texts[0]}".encode()).hexdigest()
    changed = [PERTURBATIONS[name](text, random.Random(seed)) for text in texts]
    return changed[0] if isinstance(context, str) else changed
