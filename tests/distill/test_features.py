"""Matching the teacher's inner states: against textbook formulas in float64, across widths, and as
a stage.
"""

from __future__ import annotations

import pytest
import torch
from conftest import make_context
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from compress.distill.batches import make_loss, one_batch
from compress.distill.features import FeatureLoss, check_pairs, layer_pairs, relation_kl
from compress.distill.losses import Mix
from compress.distill.online import OnlineTeacher
from compress.distill.settings import Features, SchemeName, Signal
from compress.distill.taps import tapped
from compress.errors import Interrupted
from compress.models.checkpoint import load_model, save_model
from compress.stages.distill import Distill

ONLINE = Signal(scheme=SchemeName.online)


def student_of(teacher, folder, **changes):
    """A random model of the teacher's tokenizer with another shape."""
    torch.manual_seed(1)
    config = LlamaConfig(
        **{
            "vocab_size": 512,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            **changes,
        }
    )
    save_model(AutoModelForCausalLM.from_config(config), folder / "student", tokenizer_from=teacher)
    return folder / "student"


def test_pairs_are_evenly_spaced_and_end_at_the_last_blocks():
    assert layer_pairs(20, 30, 4) == [(4, 7), (9, 14), (14, 21), (19, 29)]
    assert layer_pairs(2, 4, 2) == layer_pairs(2, 4, 9) == [(0, 1), (1, 3)]


@pytest.mark.parametrize("pairs", [[[0, 1], [1, 1]], [[1, 0], [0, 2]], [[0, 4]], [[2, 3]], [[0]]])
def test_pairs_that_do_not_rise_or_exist_are_refused(pairs):
    with pytest.raises(ValueError, match="both rising, below 2 and 4"):
        check_pairs(pairs, 2, 4)


def test_relation_kl_equals_the_textbook_sum():
    torch.manual_seed(0)
    student, teacher, mask = (
        torch.randn(2, 5, 6),
        torch.randn(2, 5, 9),
        torch.tensor([1, 1, 1, 0, 1, 1, 0, 1, 1, 1], dtype=torch.bool),
    )
    expected = 0.0
    for row in range(2):
        for at in range(5):
            if not mask[row * 5 + at]:
                continue
            for head in range(3):
                p, q = (
                    (
                        x[row, : at + 1, head * d : head * d + d].double()
                        @ x[row, at, head * d : head * d + d].double()
                        / d**0.5
                    ).softmax(0)
                    for x, d in ((teacher, 3), (student, 2))
                )
                expected += float((p * (p / q).log()).sum()) / 3
    assert float(relation_kl(student, teacher, mask, 3)) == pytest.approx(expected, rel=1e-5)


def test_layer_distance_and_its_gradient_equal_the_textbook_in_float64(context, tmp_path):
    parent = student_of(context.teacher, tmp_path)
    student, teacher = load_model(parent).double(), load_model(context.teacher).double()
    source = OnlineTeacher(teacher, context.text())
    loss = FeatureLoss(
        make_loss(Mix(0.0, 1.0)), student, source, Features(layers=0.7, pairs=[[0, 1], [1, 3]])
    ).double()
    batch = one_batch(context.text(), source, [0, 1])
    batch["mask"][0, :7] = False
    total, count = loss(student, batch)
    total.backward()
    mine = student.get_input_embeddings().weight.grad.clone()

    student.zero_grad()
    out = student(batch["inputs"], output_hidden_states=True)
    logs = out.logits.log_softmax(-1).gather(-1, batch["labels"][..., None])[..., 0]
    expected = -(logs * batch["mask"]).sum()
    theirs = teacher(batch["inputs"], output_hidden_states=True).hidden_states
    second = []
    with tapped(student, [1]) as seen:  # transformers norms the last of its hidden_states
        student(batch["inputs"])
    with tapped(teacher, [3]) as last:
        teacher(batch["inputs"])
    for projection, s, t in zip(
        loss.projections,
        (out.hidden_states[1], seen["layer1"]),
        (theirs[2], last["layer3"]),
        strict=True,
    ):
        s, t = projection(s), t.double()
        s, t = (x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() for x in (s, t))
        second.append(((s - t).pow(2).mean(-1) * batch["mask"]).sum())
    expected = expected + 0.7 * sum(second) / 2
    expected.backward()
    assert float(total) == pytest.approx(
        float(expected), rel=1e-6
    )  # Llama's norms are fp32 whatever the model is
    theirs = student.get_input_embeddings().weight.grad
    assert float((mine - theirs).norm() / theirs.norm()) < 1e-6


@pytest.mark.parametrize(
    "features",
    [
        Features(layers=1.0),
        Features(relations=1.0),
        Features(layers=0.5, relations=0.5, pairs=[[1, 2]]),
    ],
)
def test_a_student_of_another_width_and_depth_comes_closer_inside(context, tmp_path, features):
    parent = student_of(context.teacher, tmp_path)
    stage = Distill(
        kl_weight=0.0, ce_weight=0.0, features=features, signal=ONLINE, tokens=32 * 4 * 30, lr=3e-3
    )
    metrics = stage.run(parent, tmp_path / "out", context)
    assert metrics["loss_last_nats"] < 0.9 * metrics["loss_first_nats"]
    assert set(load_file(tmp_path / "out/model.safetensors")) == set(
        load_file(parent / "model.safetensors")
    )  # projections stay behind


def test_an_interrupted_run_with_projections_ends_in_the_same_bits(tiny_teacher, tmp_path):
    parent = student_of(tiny_teacher, tmp_path)
    stage = Distill(features=Features(layers=1.0), signal=ONLINE, tokens=32 * 4 * 5)
    whole, parts = tmp_path / "a", tmp_path / "b"
    whole.mkdir()
    parts.mkdir()
    stage.run(parent, tmp_path / "whole", make_context(tiny_teacher, whole))
    context = make_context(tiny_teacher, parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress.distill.batches.one_batch", _interrupting(one_batch, at=3))
        with pytest.raises(Interrupted):
            stage.run(parent, tmp_path / "resumed", context)
    stage.run(parent, tmp_path / "resumed", context)
    for name, tensor in load_file(tmp_path / "whole/model.safetensors").items():
        assert torch.equal(tensor, load_file(tmp_path / "resumed/model.safetensors")[name]), name


def _interrupting(function, at):
    """`function`, the `at`-th call of which also sends SIGINT to this process."""
    import signal

    calls = []

    def called(*arguments):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return function(*arguments)

    return called
