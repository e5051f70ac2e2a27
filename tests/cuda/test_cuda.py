"""A GPU computes what the CPU does: stages, losses and gradients, training, grids, the walk.

Without a GPU the comparisons that cost least run on the CPU alone, so that this file stays true.
"""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from conftest import make_context
from safetensors import safe_open
from safetensors.torch import load_file

from compress.distill import schemes
from compress.distill.batches import make_batches, make_loss
from compress.distill.fused_head import head_loss
from compress.distill.losses import Dense, Mix, Sparse
from compress.models.checkpoint import load_model
from compress.models.head import Head
from compress.models.walk import Walk
from compress.quant.codes import load_quantized
from compress.quant.grids import GRIDS
from compress.score.fidelity import States, closeness
from compress.stages import STAGES
from compress.stages.lora import LoraData
from compress.train.loop import train
from compress.train.plan import Plan
from compress.train.state import Saver
from compress.train.trainer import LossModule

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = pytest.param("cuda", marks=NEEDS_GPU)
DEVICES = ["cpu", CUDA]
TRAINED = {"tokens": 256, "batch_sequences": 2, "micro_batch_sequences": 1}
CALIBRATED = {"calibration_sequences": 8}
STAGE_RUNS = {
    "prune_depth": ("prune_depth", {"blocks": 1, "calibration_sequences": 2}),
    "prune_vocab": ("prune_vocab", {"ids": 448}),
    "prune_width": ("prune_width", {"ffn": 128, "multiple": 32} | CALIBRATED),
    "prune_heads": ("prune_heads", {"kv_groups": 1} | CALIBRATED),
    "sparsify": ("sparsify", {"calibration_sequences": 2}),
    "distill": ("distill", TRAINED),
    "lora": ("lora", TRAINED | {"rank": 2, "data": LoraData.text}),
    "ptq": ("ptq", {}),
    "gptq": ("ptq", {"method": "gptq"} | CALIBRATED),
    "awq": ("ptq", {"balance": "awq", "scales": "search"} | CALIBRATED),
    "qat": ("qat", TRAINED),
}
ON_THE_CPU_TOO = ("ptq",)
GOLDEN = Path(__file__).parents[1] / "golden" / "grids.safetensors"


def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all numbers together, relative."""
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    a, b = (torch.cat([t[name].double().flatten() for name in other]) for t in (one, other))
    return float((a - b).norm() / b.norm())


def made(name, teacher, folder, **changes):
    technique, settings = STAGE_RUNS[name]
    folder.mkdir()
    context = make_context(teacher, folder, **changes)
    metrics = STAGES[technique](**settings).run(teacher, folder / "out", context)
    return folder / "out", metrics


@pytest.mark.parametrize(
    ("device", "name"),
    [("cpu", name) for name in ON_THE_CPU_TOO]
    + [pytest.param("cuda", name, marks=NEEDS_GPU) for name in STAGE_RUNS],
)
def test_a_stage_makes_the_weights_that_it_makes_on_the_cpu(
    device, name, tiny_teacher, tmp_path, monkeypatch
):
    here, metrics = made(name, tiny_teacher, tmp_path / "here")
    on_the_cpu(monkeypatch)
    there, expected = made(name, tiny_teacher, tmp_path / "there")
    weights = [load_file(out / "model.safetensors") for out in (here, there)]
    assert distance(*weights) < 5e-3
    assert metrics.keys() == expected.keys()
    for key, value in expected.items():
        assert metrics[key] == pytest.approx(value, rel=2e-2, abs=1e-4), key
    if name == "ptq":  # by itself each matrix is rounded to the same codes
        ours, theirs = (load_quantized(out) for out in (here, there))
        assert all(torch.equal(ours[key].codes, theirs[key].codes) for key in theirs)
        assert all(torch.equal(ours[key].scales, theirs[key].scales) for key in theirs)


def oracle(h, w, teacher_h, teacher_w, labels, mask, mix):
    """Loss and gradients in float64 by autograd on the CPU, from the formula."""
    h, w = (x.double().cpu().requires_grad_() for x in (h, w))
    log_q = (h @ w.T).log_softmax(-1)
    p = (teacher_h.double().cpu() @ teacher_w.double().cpu().T).softmax(-1)
    kl_N = (p * (p.log() - log_q)).sum(-1)
    ce_N = -log_q.gather(1, labels.cpu()[:, None])[:, 0]
    loss = ((mix.kl_weight * kl_N + mix.ce_weight * ce_N) * mask.cpu()).sum()
    loss.backward()
    return loss.detach(), h.grad, w.grad


def drawn(device):
    g = torch.Generator().manual_seed(3)
    shapes = ((70, 24), (130, 24), (70, 16), (130, 16))
    h, w, teacher_h, teacher_w = (torch.randn(s, generator=g).to(device) for s in shapes)
    labels = torch.randint(130, (70,), generator=g).to(device)
    mask = (torch.rand(70, generator=g) < 0.8).to(device)
    return h, w, teacher_h, teacher_w, labels, mask


@pytest.mark.parametrize("kind", ["dense", "sparse"])
@pytest.mark.parametrize("device", DEVICES)
def test_losses_and_gradients_are_those_of_float64_on_the_cpu(device, kind):
    h, w, teacher_h, teacher_w, labels, mask = drawn(device)
    mix = Mix(0.7, 0.3)
    target = Dense(teacher_h, Head(teacher_w))
    if kind == "sparse":  # all of p is kept
        p = (teacher_h.double() @ teacher_w.double().T).softmax(-1)
        ids = torch.arange(130, device=device).expand(70, -1).contiguous()
        target = Sparse(ids, p.float(), -(p * p.log()).sum(-1).float())
    leaf_h, leaf_w = (x.clone().requires_grad_() for x in (h, w))
    loss = head_loss(leaf_h, Head(leaf_w), labels, mask, target, mix, 16)
    loss.backward()
    expected, grad_h, grad_w = oracle(h, w, teacher_h, teacher_w, labels, mask, mix)
    torch.testing.assert_close(loss.detach().double().cpu(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(leaf_h.grad.double().cpu(), grad_h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(leaf_w.grad.double().cpu(), grad_w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_computes_in_bf16_and_leaves_masters_and_their_gradients_in_fp32(
    device, tiny_teacher, context
):
    rows = context.text().batch([0, 1])
    batch = {name: tensor.to(device) for name, tensor in rows.items()}
    losses = {}
    for autocast in (False, True):
        model = load_model(tiny_teacher).to(device)
        seen = []
        model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda _, args, out, seen=seen: seen.append(out.dtype)
        )
        loss, count = LossModule(model, make_loss(Mix(0.0, 1.0)), autocast)(batch)
        loss.backward()
        assert seen == [torch.bfloat16 if autocast else torch.float32]
        assert {(p.dtype, p.grad.dtype) for p in model.parameters()} == {(torch.float32,) * 2}
        losses[autocast] = float(loss) / int(count)
    assert losses[True] == pytest.approx(losses[False], rel=1e-2)
    assert losses[True] != losses[False]


class Killed(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_stochastic"])
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_a_resumed_training_goes_on_from_the_optimizer_s_own_state(
    device, precision, context, tmp_path, monkeypatch
):
    if device == "cpu" and precision != "fp32":
        pytest.skip("tests/train looks at it on the CPU")
    monkeypatch.setattr(Saver, "due", property(lambda saver: True))
    batches = make_batches(context.text(), None, seed=0, sequences=16, batch=4)

    def until(stop):
        def given(step, micro):
            if step == stop:
                raise Killed
            return batches(step, micro)

        return given

    def run(folder, given):
        model = load_model(context.teacher)
        plan = Plan(6, 1e-3, micro=2, precision=precision)
        loss = make_loss(Mix(0.0, 1.0))
        curve = train(model, loss, given, plan, work=folder, label="test", log=print).curve
        return model.state_dict(), curve

    with pytest.raises(Killed):
        run(tmp_path / "cut", until(4))
    resumed, curve = run(tmp_path / "cut", until(-1))
    whole, expected = run(tmp_path / "whole", until(-1))
    assert [row["step"] for row in curve] == list(range(6))
    losses, others = ([row["loss"] for row in rows] for rows in (curve, expected))
    assert losses == pytest.approx(others, rel=1e-5 if precision == "fp32" else 1e-2)
    if device == "cpu":
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert distance(resumed, whole) < (1e-4 if precision == "fp32" else 2e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_codes_of_llama_cpp_s_grids_are_its_own_bytes(device):
    with safe_open(GOLDEN, framework="pt") as golden:
        weight = golden.get_tensor("weight").float().to(device)
        names = sorted(set(golden.keys()) - {"weight"})
        assert len(names) >= 5
        for name in names:
            codes, scales = GRIDS[name].encode(weight)
            packed = GRIDS[name].pack(codes.cpu(), scales.cpu())
            assert torch.equal(packed, golden.get_tensor(name)), name


@NEEDS_GPU
def test_a_walk_has_one_block_on_the_gpu_and_gives_what_it_gives_on_the_cpu(tiny_teacher, context):
    ids = context.calibration(6)
    finals = {}
    for device in ("cpu", "cuda"):
        model = load_model(tiny_teacher)
        walk = Walk(model, ids, device=torch.device(device))
        for index, block in enumerate(walk.blocks):
            walk.call(index, walk.states[0])
            others = {
                parameter.device.type
                for other in walk.blocks
                for parameter in other.parameters()
                if other is not block
            }
            assert others == {"cpu"} and next(block.parameters()).device.type == device
            walk.advance(index)
        finals[device] = walk.final_states()
        assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    torch.testing.assert_close(finals["cuda"], finals["cpu"], rtol=1e-4, atol=1e-4)


@NEEDS_GPU
def test_closeness_on_the_gpu_is_that_of_the_cpu(monkeypatch):
    g = torch.Generator().manual_seed(5)
    one, other = (
        States(torch.randn(600, 16, generator=g), Head(torch.randn(90, 16, generator=g)))
        for _ in range(2)
    )
    here = closeness(one, other, rows=6)
    on_the_cpu(monkeypatch)
    there = closeness(one, other, rows=6)
    assert here["kl_rows"] == pytest.approx(there["kl_rows"], rel=1e-4)
    assert here["top1_rows"] == pytest.approx(there["top1_rows"])


@NEEDS_GPU
def test_a_step_of_bf16_autocast_on_the_gpu_leaves_no_model_behind(tiny_teacher, context, tmp_path):
    """What a stage leaves on the device would lack the next one; the first run makes what the
    libraries keep.
    """
    allocated = []
    for number in range(2):
        own = dataclasses.replace(context, precision="bf16", work=tmp_path / f"work-{number}")
        own.work.mkdir()
        STAGES["distill"](**TRAINED).run(tiny_teacher, tmp_path / f"out-{number}", own)
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[1] <= allocated[0]


@pytest.mark.parametrize("device", DEVICES)
def test_a_signal_is_the_same_in_chunks_of_any_size(device, monkeypatch):
    """GPUs take larger ones; where a hit falls hangs on the last bits of a sum."""
    g = torch.Generator().manual_seed(6)
    hidden, weight = (torch.randn(shape, generator=g) for shape in ((96, 16), (300, 16)))
    shards = []
    for size in (8, 96):
        monkeypatch.setattr(schemes, "CHUNK", size)
        monkeypatch.setattr(schemes, "GPU_CHUNK", size)
        draws = torch.Generator().manual_seed(1)
        head = Head(weight.to(device))
        shards.append(schemes.encode(hidden.to(device), head, schemes.Scheme(), draws))
    one, other = shards
    assert all(torch.equal(one[name], other[name]) for name in ("heads", "draws"))
    assert (one["ids_low"].int() == other["ids_low"].int()).double().mean() > 0.99
    for name in ("probs", "rest", "entropy"):
        torch.testing.assert_close(one[name], other[name], rtol=2e-3, atol=1e-3)
