"""The training loop: resumed equals uninterrupted bit for bit, gradients are means over labels, bad numbers stop it."""

from __future__ import annotations

import os
import random
import signal
import threading

import pytest
import torch
from conftest import make_context

from compress.checkpoint import digest, load_model
from compress.distill.losses import Mix
from compress.distill.schemes import Scheme
from compress.distill.signal import Signals
from compress.distill.steps import make_batches, make_loss
from compress.errors import Interrupted
from compress.stages.distill import Distill
from compress.train import loop
from compress.train.loop import learning_rate, train


def arguments(work, steps=12, **changes):
    return {
        "steps": steps, "lr": 1e-3, "warmup_fraction": 0.2, "grad_clip": 1.0, "seed": 5, "precision": "fp32", "work": work, "label": "test",
        "log": lambda message: None,
    } | changes  # fmt: skip


def batches_of(context, micro=4):
    data = context.text()
    signals = Signals(context.signals, context.teacher, data, Scheme(), seed=0, precision="fp32", log=lambda m: None)
    return make_batches(data, signals, seed=5, sequences=24, batch=4, micro=micro)


def student(context):
    torch.manual_seed(1)
    model = load_model(context.teacher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_twenty_random_splits_end_in_the_same_bits(context, tmp_path, monkeypatch):
    steps, batches, loss = 8, batches_of(context), make_loss(Mix(1.0, 0.1))
    whole = student(context)
    train(whole, loss, batches, **arguments(tmp_path / "whole", steps))
    expected = weights(whole)
    rng = random.Random(0)
    for trial in range(20):
        stop, work = rng.randrange(1, steps), tmp_path / str(trial)

        def interrupting(step, stop=stop):
            if step == stop - 1:
                signal.raise_signal(signal.SIGINT)
            return batches(step)

        with pytest.raises(Interrupted):
            train(student(context), loss, interrupting, **arguments(work, steps))
        again = student(context)
        result = train(again, loss, batches, **arguments(work, steps))
        assert [row["step"] for row in result.curve] == list(range(steps))
        assert all(torch.equal(expected[name], p) for name, p in weights(again).items()), f"split after step {stop}"


def test_micro_batches_give_the_same_gradient_as_one_batch_with_ragged_masks(context, tmp_path):
    data = context.chat()
    results = []
    for micro in (1, 2, 4):
        model = student(context)
        batches = make_batches(data, None, seed=5, sequences=24, batch=4, micro=micro)
        result = train(model, make_loss(Mix(0.0, 1.0)), batches, **arguments(tmp_path / str(micro), 1))
        results.append(result.curve[0])
    for row in results[1:]:
        assert row["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)


def test_gradient_norm_is_that_of_the_mean_cross_entropy(context, tmp_path):
    batches = make_batches(context.text(), None, seed=5, sequences=8, batch=4, micro=2)
    row = train(student(context), make_loss(Mix(0.0, 1.0)), batches, **arguments(tmp_path / "w", 1)).curve[0]
    model = student(context)
    inputs = torch.cat([b["inputs"] for b in batches(0)])
    labels = torch.cat([b["labels"] for b in batches(0)])
    loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_nan_stops_with_stage_step_and_tensor(context, tmp_path):
    model = student(context)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"test, step 0: .* is not finite.*lower the learning rate"):
        train(model, make_loss(Mix(0.0, 1.0)), batches_of(context), **arguments(tmp_path / "w"))


def test_schedule_warms_up_and_ends_near_a_tenth():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert max(rates) == pytest.approx(0.9821, abs=1e-3)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_second_student_does_not_run_the_teacher_again(context, tmp_path, monkeypatch):
    stage = Distill(tokens=256, batch_sequences=2, micro_batch_sequences=2)
    (tmp_path / "one").mkdir()
    stage.run(context.teacher, tmp_path / "one", context)

    def no_teacher(*_):
        raise AssertionError("the teacher ran again")

    monkeypatch.setattr("compress.distill.signal.encode", no_teacher)
    second = make_context(context.teacher, tmp_path, work=tmp_path / "work2")
    (tmp_path / "two").mkdir()
    stage.run(context.teacher, tmp_path / "two", second)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_distillation_brings_the_student_closer(context, tmp_path):
    model = student(context)
    curve = train(model, make_loss(Mix(1.0, 0.0)), batches_of(context), **arguments(tmp_path / "w", 30)).curve
    assert sum(r["loss"] for r in curve[-5:]) < 0.7 * sum(r["loss"] for r in curve[:5])


def test_sigterm_from_another_thread_saves_and_stops(context, tmp_path):
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
    old = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        timer.start()
        with pytest.raises(Interrupted):
            train(student(context), make_loss(Mix(1.0, 0.0)), batches_of(context), **arguments(tmp_path / "w", 100_000))
        assert len(list((tmp_path / "w").glob("state-*"))) == 1
    finally:
        signal.signal(signal.SIGTERM, old)
    assert loop.SAVE_SECONDS > 0
