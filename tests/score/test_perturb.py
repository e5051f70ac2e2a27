"""Damages to prompts: what each leaves alone, and that they depend on the text only."""

import re

import pytest

from compress.errors import ConfigError
from compress.score.perturb import PERTURBATIONS, perturbed
from compress.score.settings import Eval

TEXT = (
    "Question: Which of these do green plants make out of water, air and light?\n" * 4 + "Answer:"
)


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_damage_is_the_same_every_time_and_another_for_another_text(name):
    assert perturbed(TEXT, name) == perturbed(TEXT, name) != TEXT
    others = [perturbed(f"{i} {TEXT}", name) for i in range(5)]
    assert len({(len(other), other[-200:]) for other in others}) > 1
    assert isinstance(perturbed("", name), str) and isinstance(perturbed("a", name), str)


def test_each_damage_does_what_it_is_called():
    typos, case, whitespace, truncation = (
        perturbed(TEXT, name) for name in ("typos", "case", "whitespace", "truncation")
    )
    assert sorted(typos) == sorted(TEXT) and [len(w) for w in typos.split()] == [
        len(w) for w in TEXT.split()
    ]
    assert case.lower() == TEXT.lower() and case != TEXT
    assert whitespace.split() == TEXT.split() and len(whitespace) > len(TEXT)
    assert TEXT.endswith(truncation) and 0.55 * len(TEXT) < len(truncation) < 0.9 * len(TEXT)
    changed = sum(a != b for a, b in zip(typos.split(), TEXT.split(), strict=True))
    assert 0.05 < changed / len(TEXT.split()) < 0.4


def test_contexts_of_one_item_keep_what_they_have_in_common():
    first, second = perturbed([TEXT + " Ann", TEXT + " Bo"], "typos")
    assert (
        first[: len(TEXT)]
        == second[: len(TEXT)]
        == perturbed(TEXT + " Ann", "typos")[: len(TEXT)]
        != TEXT
    )


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(
        ConfigError, match="eval.perturbations='typo' is no perturbation; did you mean 'typos'"
    ):
        Eval(perturbations=["typo"])


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("new_tokens", 1, 2),
        ("heldout_sequences", 1, 2),
        ("repeats", 0, 1),
        ("batch_sizes", [4, 0], 1),
    ],
)
def test_settings_that_give_no_figure_are_refused_before_work_starts(name, value, least):
    with pytest.raises(
        ConfigError, match=rf"eval\.{name}={re.escape(str(value))} must be at least {least}"
    ):
        Eval(**{name: value})
