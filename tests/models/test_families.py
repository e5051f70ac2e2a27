"""Every family of `models/blocks.py` through every stage, and those without a row through what
needs none: each result opens in stock transformers and writes text.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import tiny_families as tiny
import torch
from conftest import make_context
from transformers import AutoModelForCausalLM

from compress.distill.settings import SchemeName, Signal
from compress.formats.torch_runtime import head as checkpoint_head
from compress.models.blocks import ROWS, Work
from compress.models.checkpoint import load_model, read_config
from compress.quant.codes import load_quantized, quantizable, unquantized
from compress.quant.settings import GridName
from compress.score.fidelity import States, closeness, hidden_of
from compress.stages.distill import Distill
from compress.stages.lora import Lora
from compress.stages.prune_depth import PruneDepth
from compress.stages.prune_heads import PruneHeads
from compress.stages.prune_width import PruneWidth
from compress.stages.ptq import Ptq
from compress.stages.qat import Qat

SHORT = {"tokens": 64, "batch_sequences": 2, "micro_batch_sequences": 2}
HIDDEN = Signal(scheme=SchemeName.hidden)
CUTS = {
    "prune_width": (Work.width, PruneWidth(ffn=64, calibration_sequences=8, damping=0.01)),
    "prune_depth": (
        Work.depth,
        PruneDepth(blocks=1, fold=False, calibration_sequences=2),
    ),
    "fold": (Work.fold, PruneDepth(blocks=1, calibration_sequences=2, fold_sequences=8)),
    "prune_heads": (Work.heads, PruneHeads(kv_groups=1, calibration_sequences=8, damping=0.01)),
    "awq": (Work.calibrated, Ptq(balance="awq", grid=GridName.int4_g32, calibration_sequences=2)),
}
TRAINED = {
    "distill": Distill(**SHORT, signal=HIDDEN),
    "lora": Lora(**SHORT, rank=2, data="text"),
    "ptq": Ptq(grid=GridName.int4_g32),
    "qat": Qat(**SHORT, grid=GridName.int8),
}
STEPS = (*CUTS, *TRAINED, "score")
# One of each structure is in the fast set: fused, ungated, transposed, mixtures, norms behind.
FAST = ("Gemma3", "Phi3", "Granite", "GPTNeoX", "GPT2", "Qwen3Moe")


def _marked(architecture: str, step: str):
    fast = architecture.startswith(FAST) or architecture == "Lfm2ForCausalLM"
    return pytest.param(architecture, step, marks=() if fast else pytest.mark.slow)


PAIRS = [_marked(row.architecture, step) for row in ROWS for step in STEPS]
OTHER_PAIRS = [_marked(name, step) for name in tiny.OTHERS for step in (*TRAINED, "score")]


@pytest.fixture(scope="module")
def shared(tiny_teacher, tmp_path_factory):
    """A context whose text is packed once, and where parents are kept."""
    folder = tmp_path_factory.mktemp("families")
    context = make_context(tiny_teacher, folder)
    text = context.text()
    return folder, dataclasses.replace(
        context,
        calibration=lambda n: text.ids[:n, :-1].long(),
        chat=lambda: text,
    )


def opens(out: Path) -> torch.nn.Module:
    """Stock transformers opens it, decodes with a cache as without one, and writes text."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :16], use_cache=True)
        rest = model(ids[:, 16:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(rest, whole[:, 16:], rtol=1e-3, atol=1e-3)
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    return model


def scored(parent: Path) -> None:
    """KL by hidden states and head is that of stock transformers' logits, in float64."""
    one, other = load_model(parent), load_model(parent)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids_SL = torch.randint(3, 500, (2, 17), generator=torch.Generator().manual_seed(0))
    head = checkpoint_head(parent)
    from compress.models.head import head_of

    measured = closeness(
        States(hidden_of(one, ids_SL), head), States(hidden_of(other, ids_SL), head_of(other))
    )
    stock = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).eval()
    with torch.no_grad():
        log_p, log_q = (
            model(ids_SL[:, :-1]).logits.double().log_softmax(-1) for model in (stock, other)
        )
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert measured["kl"] == pytest.approx(expected, rel=1e-3, abs=1e-7) and expected > 1e-5


@pytest.mark.parametrize(("architecture", "step"), [*PAIRS, *OTHER_PAIRS])
def test_a_family_goes_through_a_stage_or_is_refused_by_name(shared, tmp_path, architecture, step):
    folder, context = shared
    parent = tiny.make(folder / architecture, architecture, context.teacher)
    if step == "score":
        scored(parent)
        return

    # A row says what it can't.
    work, stage = CUTS[step] if step in CUTS else (None, TRAINED[step])
    context = dataclasses.replace(context, teacher=parent, work=tmp_path, signals=tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    row = next((row for row in ROWS if row.architecture == architecture), None)
    if work is not None and row.reason(work):
        message = f"{architecture} can't be {work}: {row.reason(work)}; allowed are Llama"
        with pytest.raises(ValueError, match=re.escape(message)):
            stage.run(parent, out, context)
        assert not list(out.iterdir())
        return

    stage.run(parent, out, context)
    model = opens(out)
    if work is not None and step != "awq":
        assert stage.check_shape(read_config(parent)) == read_config(out)
        assert model.num_parameters() < load_model(parent).num_parameters()
    if step in ("ptq", "qat", "awq"):
        assert set(load_quantized(out)) == set(quantizable(load_model(out)))


def test_no_family_and_no_step_is_left_out():
    assert {row.architecture for row in ROWS} == set(tiny.NAMES) - set(tiny.OTHERS)
    assert len(ROWS) == 15 and len(STEPS) == 10 and len(PAIRS) == 150
    assert len(OTHER_PAIRS) == 5 * len(tiny.OTHERS) == 85


@pytest.mark.parametrize("architecture", [*tiny.OTHERS, "Qwen3MoeForCausalLM"])
def test_what_stays_off_a_grid_is_small_and_no_matrix_of_a_linear_layer(architecture):
    model = tiny.model_of(architecture)
    off = unquantized(model)
    assert all("conv" in name or "gate" in name or "router" in name for name in off)
    assert sum(model.get_parameter(name).numel() for name in off) < 0.03 * model.num_parameters()
