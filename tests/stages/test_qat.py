"""QAT as a stage: learned scales resume bit for bit, and the distribution to learn is the parent's
or the teacher's.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from conftest import make_context
from safetensors.torch import load_file

from compress.distill.batches import one_batch
from compress.errors import ConfigError, Interrupted
from compress.models.checkpoint import load_model
from compress.quant.grids import GRIDS
from compress.quant.settings import Balance, GridName, Method, Scales
from compress.stages.ptq import Ptq
from compress.stages.qat import LearnFrom, Qat, Trained


def files(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / name) for name in ("model.safetensors", "quant.safetensors")}


def same(one: Path, other: Path) -> bool:
    a, b = files(one), files(other)
    return all(torch.equal(tensor, b[name][key]) for name in a for key, tensor in a[name].items())


def interrupt(stage: Qat, teacher: Path, out: Path, context, monkeypatch) -> None:
    """Run the stage and stop it by a signal in its third step."""
    calls = []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return one_batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("compress.distill.batches.one_batch", interrupting)
        with pytest.raises(Interrupted):
            stage.run(teacher, out, context)


def test_learned_scales_interrupted_and_resumed_end_in_the_same_bits(
    tiny_teacher, tmp_path, monkeypatch
):
    stage = Qat(tokens=32 * 4 * 5, scales=Scales.learned, lr=3e-3)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    stage.run(tiny_teacher, tmp_path / "whole", make_context(tiny_teacher, tmp_path / "a"))

    context = make_context(tiny_teacher, tmp_path / "b")
    interrupt(stage, tiny_teacher, tmp_path / "resumed", context, monkeypatch)
    stage.run(tiny_teacher, tmp_path / "resumed", context)
    assert same(tmp_path / "whole", tmp_path / "resumed")


def test_learned_scales_are_not_those_of_the_rule(tiny_teacher, tmp_path):
    for name in ("round", "learned"):
        (tmp_path / name).mkdir()
        stage = Qat(tokens=32 * 4 * 3, scales=Scales(name), lr=3e-3)
        stage.run(
            tiny_teacher, tmp_path / f"{name}-out", make_context(tiny_teacher, tmp_path / name)
        )
    made = [files(tmp_path / f"{name}-out")["quant.safetensors"] for name in ("round", "learned")]
    scales = [name for name in made[0] if name.endswith(".scales")]
    assert scales and all(not torch.equal(made[0][name], made[1][name]) for name in scales)


def test_qad_learns_from_the_teacher_and_not_from_its_parent(tiny_teacher, tmp_path):
    from compress.stages.prune_depth import PruneDepth

    PruneDepth(blocks=1, calibration_sequences=2).run(
        tiny_teacher, tmp_path / "cut", make_context(tiny_teacher, tmp_path)
    )
    first = {}
    for who in LearnFrom:
        (tmp_path / who).mkdir()
        metrics = Qat(tokens=32 * 4 * 2, learn_from=who).run(
            tmp_path / "cut", tmp_path / f"{who}-out", make_context(tiny_teacher, tmp_path / who)
        )
        first[who] = metrics["loss_first_nats"]
    assert (
        first[LearnFrom.teacher] > first[LearnFrom.parent]
    )  # the cut is farther from its teacher than rounding takes it from itself


def test_adapters_merge_on_the_grid_and_resume_bit_for_bit(tiny_teacher, tmp_path, monkeypatch):
    from compress.quant.codes import load_quantized

    stage, saved = Qat(tokens=32 * 4 * 4, rank=4, lr=1e-2), []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    metrics = stage.run(
        tiny_teacher, tmp_path / "whole", make_context(tiny_teacher, tmp_path / "a")
    )
    assert metrics["loss_last_nats"] < metrics["loss_first_nats"]

    context = make_context(tiny_teacher, tmp_path / "b")
    interrupt(stage, tiny_teacher, tmp_path / "resumed", context, monkeypatch)
    for state in context.work.glob("state-*/tensors-0.safetensors"):
        saved += load_file(state)
    assert not [name for name in saved if name.endswith("proj.weight")] and [
        name for name in saved if name.endswith("quant_a")
    ]
    stage.run(tiny_teacher, tmp_path / "resumed", context)
    assert same(tmp_path / "whole", tmp_path / "resumed")
    state = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(
        torch.equal(made.decode(), state[name])
        for name, made in load_quantized(tmp_path / "whole").items()
    )


def test_a_negative_rank_is_refused():
    with pytest.raises(ConfigError, match="qat.rank=-1 must be 0"):
        Qat(rank=-1)


def uneven(model) -> None:
    """Channels of very different size, as trained models have them."""
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight.mul_(
                torch.linspace(-2, 2, len(block.input_layernorm.weight)).exp()
            )


def test_training_starts_from_the_same_function_which_rounding_costs_less(tiny_teacher, tmp_path):
    from compress.models.checkpoint import load_model
    from compress.quant.fake import attach

    plain = load_model(tiny_teacher)
    uneven(plain)
    gaps = {}
    for scales in (None, Scales.round, Scales.learned):
        folder = tmp_path / str(scales)
        folder.mkdir()
        context, model, start = make_context(tiny_teacher, folder), load_model(tiny_teacher), None
        uneven(model)
        ids, layout = context.calibration(4), "q4_0"
        with torch.no_grad():
            whole = plain(ids).logits
            if scales:
                layout, start, _ = Qat(
                    balance=Balance.awq, calibration_sequences=4, scales=scales
                ).start(model, tiny_teacher, context)
                assert not torch.equal(
                    plain.model.layers[0].self_attn.q_proj.weight,
                    model.model.layers[0].self_attn.q_proj.weight,
                )
                assert torch.allclose(whole, model(ids).logits, atol=1e-4)
            attach(model, layout, str(scales or "round"), start=start)
            gaps[scales] = float((model(ids).logits - whole).square().mean())
    assert gaps[Scales.learned] < gaps[Scales.round] < gaps[None]


@pytest.mark.parametrize("method", [Method.nearest, Method.gptq])
def test_a_balanced_start_is_found_again_bit_for_bit(tiny_teacher, tmp_path, monkeypatch, method):
    stage = Qat(
        tokens=32 * 4 * 4,
        scales=Scales.learned,
        balance=Balance.awq,
        method=method,
        calibration_sequences=4,
        lr=3e-3,
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    stage.run(tiny_teacher, tmp_path / "whole", make_context(tiny_teacher, tmp_path / "a"))

    context, written = make_context(tiny_teacher, tmp_path / "b"), []

    def failing(file: Path, data: bytes) -> None:
        written.append(file)
        if len(written) == 3:
            raise OSError("no space left")
        write_whole(file, data)

    from compress.store import write_whole

    with monkeypatch.context() as patch:
        patch.setattr("compress.quant.blockwise.write_whole", failing)
        with pytest.raises(OSError, match="no space"):
            stage.run(tiny_teacher, tmp_path / "resumed", context)
    interrupt(stage, tiny_teacher, tmp_path / "resumed", context, monkeypatch)
    stage.run(tiny_teacher, tmp_path / "resumed", context)
    assert same(tmp_path / "whole", tmp_path / "resumed")


def test_training_starts_from_gptq_codes_with_every_weight_as_near_as_they_allow(
    tiny_teacher, tmp_path
):
    wanted = {"calibration_sequences": 4, "method": Method.gptq}
    stage = Qat(tokens=32 * 4, scales=Scales.learned, **wanted)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    model, teacher = load_model(tiny_teacher), load_model(tiny_teacher)
    layout, start, _ = stage.start(model, tiny_teacher, make_context(tiny_teacher, tmp_path / "a"))

    # The codes are those of ptq; weights whose code is the nearest one are as they were.
    rounding = Ptq(scales=Scales.search, **wanted)
    rounding.run(tiny_teacher, tmp_path / "gptq", make_context(tiny_teacher, tmp_path / "b"))
    rounded = files(tmp_path / "gptq")["quant.safetensors"]
    as_they_were = []
    for name, made in start.items():
        weight, before = model.get_parameter(name), teacher.get_parameter(name)
        assert torch.equal(rounded[f"{name}.codes"], made.codes)
        assert torch.equal(GRIDS[layout[name]].codes(weight, made.scales), made.codes)
        as_they_were.append((weight == before).float().mean())
    assert 0.5 < sum(as_they_were) / len(as_they_were) < 1


def test_scales_alone_are_trained_behind_gptq_codes_and_resume_bit_for_bit(
    tiny_teacher, tmp_path, monkeypatch
):
    wanted = {"grid": GridName.iq4_nl, "balance": Balance.awq, "calibration_sequences": 4}
    stage = Qat(tokens=32 * 4 * 5, scales=Scales.learned, train=Trained.scales, lr=1e-2, **wanted)
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    stage.run(tiny_teacher, tmp_path / "whole", make_context(tiny_teacher, tmp_path / "a"))

    # The codes are GPTQ's, the scales are not.
    rounding = Ptq(method=Method.gptq, scales=Scales.search, **wanted)
    rounding.run(tiny_teacher, tmp_path / "gptq", make_context(tiny_teacher, tmp_path / "c"))
    trained, rounded = (files(tmp_path / name)["quant.safetensors"] for name in ("whole", "gptq"))
    assert all(torch.equal(trained[key], rounded[key]) for key in rounded if "codes" in key)
    assert not all(torch.equal(trained[key], rounded[key]) for key in rounded if "scales" in key)

    context = make_context(tiny_teacher, tmp_path / "b")
    interrupt(stage, tiny_teacher, tmp_path / "resumed", context, monkeypatch)
    stage.run(tiny_teacher, tmp_path / "resumed", context)
    assert same(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("wrong", [{"scales": Scales.round}, {"rank": 4}])
def test_scales_alone_need_learned_scales_and_no_adapters(wrong):
    with pytest.raises(ConfigError, match="qat.train=scales: rank=. and scales="):
        Qat(**{"scales": Scales.learned, "train": Trained.scales} | wrong)


def test_calibration_is_refused_where_nothing_is_balanced():
    with pytest.raises(
        ConfigError, match="calibration_sequences=4 must be at least 1, and is used by balance"
    ):
        Qat(calibration_sequences=4)
