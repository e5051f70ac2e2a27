"""The training loop: resumed equals uninterrupted bit for bit, steps are those of plain autograd
in float64, bad numbers stop it.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import threading

import pytest
import torch
from conftest import make_context

from compress.distill.batches import make_batches, make_loss, one_batch
from compress.distill.losses import Mix
from compress.distill.online import OnlineTeacher
from compress.distill.schemes import Scheme
from compress.distill.signals import Signals
from compress.errors import Interrupted, ResourceError
from compress.models.checkpoint import digest, load_model, save_model
from compress.models.cpu_kernels import use_cpu_kernels
from compress.stages.distill import Distill
from compress.stages.qat import Qat
from compress.train.loop import train
from compress.train.optimizer import BETAS, MOMENTS, StochasticAdamW, learning_rate, stochastic_bf16
from compress.train.plan import Plan
from compress.train.trainer import Trainer


def arguments(work, steps=12, **changes):
    plan = Plan(steps, **{"lr": 1e-3, "warmup_fraction": 0.2, "seed": 5} | changes)
    return {"plan": plan, "work": work, "label": "test", "log": lambda message: None}


def batches_of(context):
    data = context.text()
    signals = Signals(
        context.signals,
        context.teacher,
        data,
        Scheme(),
        seed=0,
        precision="fp32",
        log=lambda m: None,
    )
    return make_batches(data, signals, seed=5, sequences=24, batch=4)


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

        def interrupting(step, micro, stop=stop):
            if step == stop - 1:
                signal.raise_signal(signal.SIGINT)
            return batches(step, micro)

        with pytest.raises(Interrupted):
            train(student(context), loss, interrupting, **arguments(work, steps))
        again = student(context)
        result = train(again, loss, batches, **arguments(work, steps))
        assert [row["step"] for row in result.curve] == list(range(steps))
        assert all(torch.equal(expected[name], p) for name, p in weights(again).items()), (
            f"split after step {stop}"
        )


def test_micro_batches_give_the_same_gradient_as_one_batch_with_ragged_masks(context, tmp_path):
    data = context.chat()
    results = []
    for micro in (1, 2, 4):
        model = student(context)
        batches = make_batches(data, None, seed=5, sequences=24, batch=4)
        result = train(
            model,
            make_loss(Mix(0.0, 1.0)),
            batches,
            **arguments(tmp_path / str(micro), 1, micro=micro),
        )
        results.append(result.curve[0])
    for row in results[1:]:
        assert row["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)


def test_gradient_norm_is_that_of_the_mean_cross_entropy(context, tmp_path):
    batches = make_batches(context.text(), None, seed=5, sequences=8, batch=4)
    row = train(
        student(context), make_loss(Mix(0.0, 1.0)), batches, **arguments(tmp_path / "w", 1, micro=2)
    ).curve[0]
    model = student(context)
    inputs = torch.cat([b["inputs"] for b in batches(0, 2)])
    labels = torch.cat([b["labels"] for b in batches(0, 2)])
    loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert row["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def plain_gradients(model, teacher, batches, mix):
    """Gradients in float64 of the mean over all labels, by autograd through all logits."""
    model, teacher = model.double(), teacher.double()
    losses, labels_seen = [], 0
    for batch in batches:
        for inputs, labels, mask in zip(
            batch["inputs"], batch["labels"], batch["mask"], strict=True
        ):
            log_q = model(inputs[None]).logits[0].log_softmax(-1)
            with torch.no_grad():
                log_p = teacher(inputs[None]).logits[0].log_softmax(-1)
            for at in mask.nonzero()[:, 0].tolist():
                kl = (log_p[at].exp() * (log_p[at] - log_q[at])).sum()
                losses.append(mix.kl_weight * kl - mix.ce_weight * log_q[at, labels[at]])
                labels_seen += 1
    loss = torch.stack(losses).sum() / labels_seen
    return float(loss), dict(
        zip(
            dict(model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    ("mix", "clip"), [(Mix(0.0, 1.0), 0.25), (Mix(0.7, 0.4), 0.25), (Mix(0.7, 0.4), 100.0)]
)
def test_a_step_of_plain_gradient_descent_is_that_of_float64_autograd_on_the_labels_alone(
    mix, clip, context, tmp_path, monkeypatch
):
    # Under AdamW a gradient of any scale makes the same step; under plain descent it does not.
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)
    )
    chat, model = context.chat(), student(context)
    kept = torch.rand(chat.mask.shape, generator=torch.Generator().manual_seed(0)) > 0.4
    data = dataclasses.replace(chat, mask=chat.mask & kept)
    teacher = OnlineTeacher(load_model(context.teacher), data)
    batches = make_batches(data, teacher, seed=5, sequences=24, batch=4)
    counts = [int(batch["mask"].sum()) for batch in batches(0, 2)]
    assert (
        len(set(counts)) == 2 and sum(counts) < 4 * context.seq_len
    )  # ragged, and not every token is a label
    plan = {"micro": 2, "lr": 0.2, "grad_clip": clip, "warmup_fraction": 1.0}
    curve = train(
        model, make_loss(mix, teacher.teacher_head), batches, **arguments(tmp_path / "w", 2, **plan)
    ).curve

    whole, exact = load_model(context.teacher), student(context).double()
    before = weights(exact)
    for step, rate in enumerate((0.1, 0.2 * 0.55)):  # half warm; then warm, and half of the cosine
        loss, gradients = plain_gradients(exact, whole, batches(step, 2), mix)
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        assert norm > 0.3  # above the small clip
        assert curve[step]["loss"] == pytest.approx(loss, rel=1e-4) and curve[step][
            "grad_norm"
        ] == pytest.approx(norm, rel=1e-3)
        with torch.no_grad():
            for name, p in exact.named_parameters():
                p.sub_(rate * min(1.0, clip / norm) * gradients[name])
    for name, p in weights(model).items():
        moved = weights(exact)[name] - before[name]
        assert ((p.double() - before[name]) - moved).norm() <= 1e-3 * moved.norm() + 1e-6, name


def test_no_row_of_the_validation_is_trained_on(context, tmp_path, monkeypatch):
    text, read = context.text(), []
    short = dataclasses.replace(text, ids=text.ids[:24], mask=text.mask[:24])
    monkeypatch.setattr(
        "compress.distill.batches.one_batch",
        lambda data, source, rows: read.append(rows) or one_batch(data, source, rows),
    )
    stage = Distill(
        tokens=32 * 4 * 12, micro_batch_sequences=2, validations=2, validation_sequences=8
    )
    (tmp_path / "out").mkdir()
    stage.run(context.teacher, tmp_path / "out", dataclasses.replace(context, text=lambda: short))
    held, trained = read[:8], {row for rows in read[8:] for row in rows}
    assert held == [[row] for row in range(16, 24)]
    assert trained == set(range(16))  # each of the others, and none of these


def test_a_nan_stops_with_stage_step_and_tensor(context, tmp_path):
    model = student(context)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match=r"test, step 0: .* is not finite.*lower the learning rate"
    ):
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

    monkeypatch.setattr("compress.distill.schemes.encode", no_teacher)
    second = make_context(context.teacher, tmp_path, work=tmp_path / "work2")
    (tmp_path / "two").mkdir()
    stage.run(context.teacher, tmp_path / "two", second)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_a_signal_behind_the_last_step_still_stops(context, tmp_path):
    batches, loss = batches_of(context), make_loss(Mix(1.0, 0.0))
    calls, held = [], batches(0, 4)

    def measured(model, batch):
        calls.append(1)
        if len(calls) > len(held):  # the measurement behind the last step
            signal.raise_signal(signal.SIGTERM)
        return loss(model, batch)

    with pytest.raises(Interrupted):
        train(
            student(context),
            loss,
            batches,
            **arguments(tmp_path / "w", 3, validations=1),
            validation=(measured, held),
        )


def test_distillation_brings_the_student_closer(context, tmp_path):
    model = student(context)
    curve = train(
        model, make_loss(Mix(1.0, 0.0)), batches_of(context), **arguments(tmp_path / "w", 30)
    ).curve
    assert sum(r["loss"] for r in curve[-5:]) < 0.7 * sum(r["loss"] for r in curve[:5])


def test_sigterm_from_another_thread_saves_and_stops(context, tmp_path):
    killer, given = (
        threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGTERM)),
        batches_of(context),
    )

    def batches(step, micro):
        if step == 3:  # by now the handlers are in place, however busy the machine
            killer.start()
        return given(step, micro)

    old = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(Interrupted):
            train(
                student(context),
                make_loss(Mix(1.0, 0.0)),
                batches,
                **arguments(tmp_path / "w", 100_000),
            )
        assert len(list((tmp_path / "w").glob("state-*"))) == 1
    finally:
        signal.signal(signal.SIGTERM, old)


def test_wsd_stays_at_the_peak_and_falls_at_the_end():
    rates = [learning_rate(step, 100, 1.0, 10, "wsd", 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and set(rates[10:81]) == {1.0}
    assert rates[90] == pytest.approx(0.55) and rates[99] == pytest.approx(0.145)


def test_stochastic_rounding_is_bf16_and_right_on_average():
    torch.manual_seed(0)
    x = torch.randn(200)
    rounded = torch.stack([stochastic_bf16(x).float() for _ in range(4000)])
    step = (rounded.amax(0) - rounded.amin(0)).clamp_min(1e-9)
    assert ((rounded.mean(0) - x).abs() <= 4.5 * 0.5 * step / 4000**0.5).all()
    assert (rounded.unique(dim=0).bfloat16().float() == rounded.unique(dim=0)).all()
    nearest = (
        torch.finfo(torch.bfloat16).eps * x.abs()
    )  # of a number's own neighbours, no other is taken
    assert ((rounded - x).abs() <= nearest).all()


def test_stochastic_adamw_follows_torchs_adamw_where_nearest_rounding_stands_still():
    start, gradient, steps = torch.full((4000,), 1.0), torch.full((4000,), 0.3), 40
    fp32, bf16, nearest = (
        torch.nn.Parameter(start.clone().to(kind))
        for kind in (torch.float32, torch.bfloat16, torch.bfloat16)
    )
    torch.manual_seed(0)
    optimizers = [
        torch.optim.AdamW([fp32], 1e-4, betas=BETAS, weight_decay=0.0),
        StochasticAdamW([bf16], 1e-4),
        torch.optim.AdamW([nearest], 1e-4, betas=BETAS, weight_decay=0.0),
    ]
    for _ in range(steps):
        for parameter, optimizer in zip((fp32, bf16, nearest), optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    assert float(1 - fp32.mean()) == pytest.approx(steps * 1e-4, rel=1e-3)
    assert float(1 - bf16.float().mean()) == pytest.approx(steps * 1e-4, rel=0.05)
    assert torch.equal(nearest.float(), start)


def test_bf16_weights_train_and_resume_in_the_same_bits(context, tmp_path):
    batches, loss, plan = (
        batches_of(context),
        make_loss(Mix()),
        {"precision": "bf16_stochastic", "lr": 3e-3},
    )
    whole = student(context)
    curve = train(whole, loss, batches, **arguments(tmp_path / "whole", 20, **plan)).curve
    assert all(p.dtype == torch.bfloat16 for p in whole.parameters())
    assert sum(r["loss"] for r in curve[-5:]) < 0.8 * sum(r["loss"] for r in curve[:5])

    def interrupting(step, micro):
        if step == 7:
            signal.raise_signal(signal.SIGINT)
        return batches(step, micro)

    with pytest.raises(Interrupted):
        train(student(context), loss, interrupting, **arguments(tmp_path / "cut", 20, **plan))
    again = student(context)
    train(again, loss, batches, **arguments(tmp_path / "cut", 20, **plan))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True)
    )


def test_bf16_weights_leave_the_rotary_frequencies_in_fp32(context, tmp_path):
    model, loaded = student(context), load_model(context.teacher)
    train(
        model,
        make_loss(Mix()),
        batches_of(context),
        **arguments(tmp_path / "w", 1, precision="bf16_stochastic"),
    )
    save_model(model, tmp_path / "out", context.teacher)
    reloaded = load_model(tmp_path / "out", torch.bfloat16)
    use_cpu_kernels(reloaded)
    for one in (model, reloaded):
        for name, buffer in one.named_buffers():
            assert (
                torch.equal(buffer, dict(loaded.named_buffers())[name])
                and buffer.dtype == torch.float32
            )
    ids = torch.arange(30)[None]
    torch.testing.assert_close(model(ids).logits, reloaded(ids).logits, rtol=0, atol=0)


def test_gradients_of_bf16_weights_add_up_over_micro_batches_in_fp32(tmp_path, monkeypatch):
    model, seen = torch.nn.Linear(4, 1, bias=False), []
    monkeypatch.setattr(
        StochasticAdamW,
        "step",
        lambda self: seen.extend(p.grad.clone() for p in self.param_groups[0]["params"]),
    )
    shares = [1.0] + [2.0**-9] * 255  # each below half of the last place of 1 in bf16

    def loss(model_, batch):
        return (model_.weight.float() * batch["inputs"]).sum(), torch.tensor(1)

    plan = {"precision": "bf16_stochastic", "grad_clip": 1e9}
    train(
        model,
        loss,
        lambda step, micro: [{"inputs": torch.tensor(share)} for share in shares],
        **arguments(tmp_path, 1, **plan),
    )
    assert model.weight.dtype == torch.bfloat16
    torch.testing.assert_close(seen[0] * len(shares), torch.full((1, 4), sum(shares)))


def test_one_process_trains_in_one_precision_after_the_other_as_the_jobs_of_a_sweep_do(
    context, tmp_path
):
    losses = [
        train(
            student(context),
            make_loss(Mix()),
            batches_of(context),
            **arguments(tmp_path / kind, 1, precision=kind),
        ).curve[0]["loss"]
        for kind in ("bf16", "fp32")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05) and losses[0] != losses[1]


def test_activation_checkpointing_changes_no_number(context, tmp_path):
    rows = [
        train(
            student(context),
            make_loss(Mix()),
            batches_of(context),
            **arguments(tmp_path / str(on), 2, activation_checkpointing=on),
        ).curve
        for on in (False, True)
    ]
    for plain, recomputed in zip(*rows, strict=True):
        assert recomputed["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert recomputed["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_out_of_memory_halves_the_micro_batch_at_the_same_global_batch(context, tmp_path):
    loss, said = make_loss(Mix()), []

    def small_memory(model, batch):
        if len(batch["inputs"]) > 1:
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )
        return loss(model, batch)

    whole = train(student(context), loss, batches_of(context), **arguments(tmp_path / "a", 3)).curve
    tight = train(
        student(context),
        small_memory,
        batches_of(context),
        **arguments(tmp_path / "b", 3) | {"log": said.append},
    ).curve
    assert [row["loss"] for row in tight] == pytest.approx([row["loss"] for row in whole], rel=1e-5)
    assert [line for line in said if "out of memory" in line] == [
        "test, step 0: out of memory; going on with micro-batches of 2 sequences",
        "test, step 0: out of memory; going on with micro-batches of 1 sequences",
    ]


def test_what_training_holds_is_asked_for_before_the_signal_is_made(context, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("memory", (), {"available": 1_000_000})()
    )
    monkeypatch.setattr("psutil.swap_memory", lambda: type("swap", (), {"free": 0})())
    cases = [
        (Distill(tokens=256), {}, "4 MB"),
        (Distill(tokens=256, validations=1), {}, "5 MB"),
        (Qat(tokens=256), {}, "5 MB"),
        (Distill(tokens=256), {"precision": "bf16_stochastic"}, "3 MB"),
    ]
    for stage, changes, needed in cases:
        message = (
            rf"test: training needs {needed} on cpu \(0.0 GB are free\): .*no room;"
            r" .*bf16_stochastic.*fsdp2.*lora.*rank=N.*smaller student"
        )
        with pytest.raises(ResourceError, match=message):
            stage.run(context.teacher, tmp_path / "out", dataclasses.replace(context, **changes))
    assert not context.signals.exists()


def test_qat_of_adapters_alone_needs_little(context, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("memory", (), {"available": 2_000_000})()
    )
    monkeypatch.setattr("psutil.swap_memory", lambda: type("swap", (), {"free": 0})())
    model = load_model(context.teacher)
    Qat().reserve(model, context, copies=1, frozen=True)
    with pytest.raises(ResourceError):
        Qat().reserve(model, context, copies=1)


def test_moments_that_have_no_room_end_with_what_would_fit(context, tmp_path, monkeypatch):
    def full(self):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda parameters, **_: type("Full", (torch.optim.SGD,), {"step": full})(parameters, 1.0),
    )
    with pytest.raises(ResourceError, match="test, step 0: .*no room; .*a smaller student"):
        train(
            student(context), make_loss(Mix()), batches_of(context), **arguments(tmp_path / "a", 3)
        )


def untied(model):
    """With a head of its own: on its way to the meta device a model's tied weights come apart."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16_stochastic"])
def test_a_resumed_optimizer_lies_where_its_weights_lie(precision, context, tmp_path, monkeypatch):
    batches = batches_of(context)

    def interrupting(step, micro):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return batches(step, micro)

    with pytest.raises(Interrupted):
        train(
            untied(student(context)),
            make_loss(Mix()),
            interrupting,
            **arguments(tmp_path / "w", 5, precision=precision),
        )
    # A device that is not the CPU, without one: fused AdamW on it reads its step there.
    monkeypatch.setattr("compress.train.trainer.best_device", lambda: torch.device("meta"))
    adamw = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim,
        "AdamW",
        lambda parameters, **options: adamw(parameters, **options | {"fused": False}),
    )
    trainer = Trainer(
        untied(student(context)),
        make_loss(Mix()),
        Plan(5, lr=1e-3, precision=precision),
        tmp_path / "w",
    )
    assert trainer.state["step"] == 3 and len(trainer.optimizer.state) == len(trainer.trained)
    for p, state in trainer.optimizer.state.items():
        assert all(
            value.device == p.device for value in state.values() if isinstance(value, torch.Tensor)
        )
        assert (
            all(state[moment].shape == p.shape for moment in MOMENTS)
            and float(state["step"] if precision != "fp32" else 3) == 3
        )


def test_memory_for_not_even_one_sequence_stops(context, tmp_path):
    def no_memory(model, batch):
        raise RuntimeError("CUDA out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        train(student(context), no_memory, batches_of(context), **arguments(tmp_path / "a", 3))


def validation_of(context):
    data = context.text()
    signals = Signals(
        context.signals,
        context.teacher,
        data,
        Scheme(),
        seed=0,
        precision="fp32",
        log=lambda m: None,
    )
    return make_loss(Mix()), [one_batch(data, signals, [40, 41])]


def test_the_best_weights_by_validation_are_returned_and_training_stops_early(context, tmp_path):
    model, best = student(context), {}
    held = validation_of(context)

    def destructive(model_, batch):
        total, count = make_loss(Mix())(model_, batch)
        return (
            total if steps_seen[0] < 8 else -30 * total
        ), count  # after step 8 it moves away from the teacher

    steps_seen, plain = [0], batches_of(context)

    def counted(step, micro):
        steps_seen[0] = step
        if step == 8:
            best.update(weights(model))
        return plain(step, micro)

    result = train(
        model,
        destructive,
        counted,
        **arguments(tmp_path / "w", 40, validations=10, patience=2, schedule="wsd"),
        validation=held,
    )
    measured = {row["step"]: row["validation_kl"] for row in result.measured}
    assert result.outcome["best_step_index"] == 8 == min(measured, key=measured.get)
    assert len(result.curve) == 16 and result.outcome["paid_flag"] == 1.0
    assert all(torch.equal(p, best[name]) for name, p in weights(model).items())


def test_a_stage_that_only_does_harm_did_not_pay_and_changes_nothing(context, tmp_path):
    model = student(context)
    before = weights(model)

    def harm(model_, batch):
        total, count = make_loss(Mix())(model_, batch)
        return -total, count

    result = train(
        model,
        harm,
        batches_of(context),
        **arguments(tmp_path / "w", 12, validations=4),
        validation=validation_of(context),
    )
    assert result.outcome["paid_flag"] == 0.0 and result.outcome["best_step_index"] == 0
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_the_best_weights_survive_an_interruption(context, tmp_path):
    batches, held, finals = batches_of(context), validation_of(context), []
    for stop in (None, 5):
        work = tmp_path / str(stop)

        def maybe(step, micro, stop=stop):
            if step == stop:
                signal.raise_signal(signal.SIGTERM)
            return batches(step, micro)

        plan = {
            "lr": 0.3,
            "validations": 4,
            "schedule": "wsd",
        }  # so high a rate that the first measurement stays the best
        if stop:
            with pytest.raises(Interrupted):
                train(
                    student(context),
                    make_loss(Mix()),
                    maybe,
                    **arguments(work, 12, **plan),
                    validation=held,
                )
        model = student(context)
        result = train(
            model, make_loss(Mix()), batches, **arguments(work, 12, **plan), validation=held
        )
        finals.append((weights(model), result.outcome))
    assert finals[0][1] == finals[1][1]
    assert all(torch.equal(p, finals[1][0][name]) for name, p in finals[0][0].items())
