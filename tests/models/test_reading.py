"""A larger vocabulary read in a smaller one's tokens, beside sums written out in float64."""

from __future__ import annotations

import shutil

import pytest
import torch
from conftest import make_context

from compress.formats.gguf import export_gguf
from compress.models.checkpoint import load_model, read_config
from compress.models.head import Fold, Head, head_of, hidden_states
from compress.models.reading import fold_of, read_in, reading
from compress.models.tokenizer import load_tokenizer
from compress.models.vocabulary import Vocabulary, is_cut_of, of_tokenizer
from compress.stages.prune_vocab import PruneVocab


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    PruneVocab(ids=320).run(tiny_teacher, folder / "out", make_context(tiny_teacher, folder))
    return folder / "out"


SMALL = Vocabulary({0: "a", 1: "b", 2: "c", 3: "ab"}, [("a", "b")])
LARGE = Vocabulary(
    {0: "c", 1: "a", 2: "b", 3: "ab", 4: "abc", 5: "ca"}, [("a", "b"), ("ab", "c"), ("c", "a")]
)


def test_a_dropped_token_counts_for_the_first_piece_of_its_text():
    fold = fold_of(SMALL, LARGE)
    assert fold.kept_S.tolist() == [1, 2, 0, 3]
    pieces = dict(zip(fold.dropped_D.tolist(), fold.pieces_D.tolist(), strict=True))
    assert pieces == {4: 3, 5: 2}  # abc begins with ab, ca with c


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_folded_logits_give_the_summed_probabilities(softcap):
    torch.manual_seed(0)
    fold = fold_of(SMALL, LARGE)
    hidden_NH = torch.randn(7, 5, dtype=torch.float64)
    head = Head(torch.randn(6, 5, dtype=torch.float64), scale=1.7, softcap=softcap)
    p_NV = head.logits(hidden_NH).softmax(-1)
    folded = Head(head.weight_VH, scale=1.7, softcap=softcap, fold=fold)
    assert folded.ids_count == 4

    expected_NS = torch.stack(
        [p_NV[:, 1], p_NV[:, 2], p_NV[:, 0] + p_NV[:, 5], p_NV[:, 3] + p_NV[:, 4]], 1
    )
    torch.testing.assert_close(folded.logits(hidden_NH).softmax(-1), expected_NS)


def test_what_is_beyond_the_smallest_number_stays_finite():
    fold = Fold(torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([0]))
    logits = fold.logits(torch.tensor([[0.0, -500.0, 500.0]]))
    assert logits.isfinite().all() and logits.softmax(-1)[0, 0] == 1


def test_the_teacher_takes_the_students_ids_and_answers_in_them(tiny_teacher, student):
    fold = reading(student, tiny_teacher)
    assert reading(tiny_teacher, tiny_teacher) is None
    ids_student = load_tokenizer(student)("The other mother", return_tensors="pt")["input_ids"]

    plain, read = load_model(tiny_teacher), load_model(tiny_teacher)
    head = read_in(read, fold).detach()
    with torch.no_grad():
        p_NV = plain(fold.kept_S[ids_student]).logits[0].double().softmax(-1)
        p_NS = head.logits(hidden_states(read, ids_student)).double().softmax(-1)
    expected_NS = p_NV[:, fold.kept_S]
    for dropped, piece in zip(fold.dropped_D.tolist(), fold.pieces_D.tolist(), strict=True):
        expected_NS[:, piece] += p_NV[:, dropped]
    torch.testing.assert_close(p_NS, expected_NS, rtol=1e-5, atol=1e-9)
    assert torch.equal(head_of(plain).weight_VH, head.weight_VH)  # a tied head stays whole


def test_every_dropped_token_begins_with_its_piece(tiny_teacher, student):
    fold = reading(student, tiny_teacher)
    larger, smaller = load_tokenizer(tiny_teacher), load_tokenizer(student)
    for dropped, piece in zip(fold.dropped_D.tolist(), fold.pieces_D.tolist(), strict=True):
        token = larger.convert_ids_to_tokens(dropped)
        assert token.startswith(smaller.convert_ids_to_tokens(piece))
    kept = larger.convert_ids_to_tokens(fold.kept_S.tolist())
    assert kept == smaller.convert_ids_to_tokens(list(range(len(fold.kept_S))))


def test_a_file_of_cut_tokens_is_read_as_its_checkpoint_is(tiny_teacher, student, tmp_path):
    file = tmp_path / "m.gguf"
    export_gguf(student, file, "F16")
    here, there = reading(student, tiny_teacher), reading(file, tiny_teacher)
    assert all(
        torch.equal(a, b) for a, b in zip(vars(here).values(), vars(there).values(), strict=True)
    )


@pytest.mark.parametrize(
    "small",
    [
        Vocabulary({0: "a", 1: "b", 2: "x"}, [("a", "b")]),  # a foreign token
        Vocabulary({0: "a", 1: "b", 3: "ab"}, [("a", "b")]),  # a gap
        Vocabulary({0: "a", 1: "b", 2: "ab"}, []),  # its merges are missing
        Vocabulary({0: "c", 1: "a", 2: "ca", 3: "b"}, [("a", "b")]),  # other merges
    ],
)
def test_what_was_not_cut_out_is_no_reading(small):
    assert is_cut_of(SMALL, LARGE) and not is_cut_of(small, LARGE)
    assert not is_cut_of(LARGE, SMALL)


def test_other_tokens_are_refused_by_name(tiny_teacher, student, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(student, other)
    text = (other / "tokenizer.json").read_text().replace("<|im_start|>", "<|jm_start|>")
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="is not cut out of the second: id 1 is '<.jm_start.>'"):
        reading(other, tiny_teacher)
    assert read_config(student)["vocab_size"] == len(of_tokenizer(load_tokenizer(student)).tokens)
