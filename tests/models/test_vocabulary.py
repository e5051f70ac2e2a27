"""A model is scored in the teacher's ids only where they mean the same to it."""

from __future__ import annotations

import json
import shutil

import pytest

from compress.formats.gguf import export_gguf
from compress.models.checkpoint import Model, model_of
from compress.models.tokenizer import load_tokenizer
from compress.models.vocabulary import Vocabulary, check_same, difference, of_gguf, of_tokenizer
from compress.score.scorer import Scorer
from compress.score.settings import Eval
from compress.store import Store
from compress.text.packing import pack


@pytest.mark.parametrize(
    ("mine", "other", "told"),
    [
        (Vocabulary({0: "a", 1: "b"}, []), Vocabulary({0: "a", 1: "b"}, []), ""),
        (
            Vocabulary({0: "a", 1: "b"}, []),
            Vocabulary({0: "a", 1: "c", 2: "d"}, []),
            "id 1 is 'b' in the one and 'c' in the other",
        ),
        (
            Vocabulary({0: "a"}, []),
            Vocabulary({0: "a", 5: "b"}, []),
            "id 5 is no token in the one and 'b' in the other",
        ),
        (
            Vocabulary({0: "a"}, [("a", "b")]),
            Vocabulary({0: "a"}, [("a", "b"), ("c", "d")]),
            "rule 2 is missing in the one and 'c' + 'd'",
        ),
        (
            Vocabulary({0: "a"}, []),
            Vocabulary({0: "a"}, [("a", "b")]),
            "",
        ),  # a file that does not hold them
    ],
)
def test_the_first_difference_is_named(mine, other, told):
    assert difference(mine, other).startswith(told) and bool(told) == bool(difference(mine, other))


@pytest.fixture
def other(tiny_teacher, tmp_path):
    """The tiny teacher with two tokens of its vocabulary in each other's place."""
    folder = tmp_path / "other"
    shutil.copytree(tiny_teacher, folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    vocab = state["model"]["vocab"]
    a, b = (next(token for token, i in vocab.items() if i == number) for number in (300, 301))
    vocab[a], vocab[b] = 301, 300
    (folder / "tokenizer.json").write_text(json.dumps(state))
    return folder


def scorer_of(teacher, folder) -> Scorer:
    settings = Eval(tasks=[], heldout_sequences=2, open_limit=1)
    return Scorer(
        Store(folder / "store"),
        settings,
        lambda tokens: {
            "text": pack(["embedded:topics"], teacher, 32, folder / "data", tokens_of=tokens)
        },
        teacher,
        1,
    )


def test_another_tokenizer_of_as_many_ids_is_refused_before_anything_is_scored(
    tiny_teacher, other, tmp_path, monkeypatch
):
    scorer = scorer_of(tiny_teacher, tmp_path)
    monkeypatch.setattr("compress.score.alone.load_model", lambda *a: pytest.fail("it was opened"))
    with pytest.raises(
        ValueError,
        match=r"have different tokenizers: id 300 is .* in the one and .* in the other.*--teacher",
    ):
        scorer.measure(model_of(other))


def test_other_merges_are_another_tokenizer(tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "m")
    state = json.loads((tmp_path / "m" / "tokenizer.json").read_text())
    state["model"]["merges"].reverse()
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="have different tokenizers: rule 1 is"):
        check_same(model_of(tmp_path / "m"), tiny_teacher)


def test_another_template_and_end_are_told_and_fine(tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    (tmp_path / "m" / "tokenizer_config.json").write_text(
        json.dumps(config | {"eos_token": "<|endoftext|>"})
    )
    template, end = check_same(model_of(tmp_path / "m"), tiny_teacher)
    assert "another chat template" in template and "another end token" in end


def test_a_gguf_holds_the_vocabulary_it_was_made_with(tiny_teacher, other, tmp_path):
    export_gguf(tiny_teacher, tmp_path / "m.gguf", "F16")
    assert (
        difference(of_gguf(tmp_path / "m.gguf"), of_tokenizer(load_tokenizer(tiny_teacher))) == ""
    )
    assert of_gguf(tmp_path / "m.gguf").rules
    model = Model(tmp_path / "m.gguf", "", "llama.cpp")
    assert check_same(model, tiny_teacher) == []
    with pytest.raises(ValueError, match="different tokenizers: id 300"):
        check_same(model, other)
