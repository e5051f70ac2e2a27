"""Every family of `models/blocks.py` through every stage, and those without a row through what
needs none: each result opens in stock transformers and writes text. And every family from a cut to
every file that can hold it, which its own runtime opens, writes text with and proves to be the
checkpoint.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_families as tiny
import torch
from conftest import make_context
from transformers import AutoModelForCausalLM

from compress.distill.settings import SchemeName, Signal
from compress.formats import parse
from compress.formats.llamacpp import LlamaCpp
from compress.formats.onnxruntime import OnnxRuntime
from compress.formats.runtimes import runtime_of
from compress.formats.torch_runtime import head as checkpoint_head
from compress.models.blocks import ROWS, Work, named
from compress.models.checkpoint import load_model, read_config
from compress.models.model_config import config_object, meta_model
from compress.quant.codes import check_packable, load_quantized, quantizable, unquantized
from compress.quant.settings import GridName
from compress.score.fidelity import States, closeness, hidden_of
from compress.score.parity import figures, parity
from compress.stages.distill import Distill
from compress.stages.lora import Lora
from compress.stages.prune_depth import PruneDepth
from compress.stages.prune_experts import PruneExperts
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
    "prune_experts": (
        Work.experts,
        PruneExperts(experts=3, floor_tokens=1, calibration_sequences=8),
    ),
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
    written = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    assert written[0] == whole[0, -1].argmax()
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
        message = f"{architecture} can't be {work}: {row.reason(work)}; allowed are "
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


FILES = ("gguf:Q4_0", "onnx", "compressed_tensors")
FAST_CHAINS = ("mistral windowless", "gemma3_text", "gpt2")
CHAINS = [
    pytest.param(name, marks=() if name in FAST_CHAINS else pytest.mark.slow) for name in tiny.TINY
]


def config_in_gguf(name: str) -> dict[str, Any]:
    """A checkpoint's config as a GGUF can say it."""
    return tiny.config_of(name, in_gguf=True).to_dict() | {"architectures": [tiny.CLASSES[name]]}


def is_held(config: dict[str, Any], file: str) -> bool:
    """Whether a file has a place for a checkpoint of this config, as is asked before work."""
    try:
        parse(file)[0].module.check_architecture(config_object(config))
        if file == "compressed_tensors":
            check_packable(meta_model(config))
    except ValueError:
        return False
    return True


def states_of(path: Path, kind: str, ids_SL: torch.Tensor) -> States:
    """What a file's own runtime computes."""
    head = runtime_of(kind).head(path)
    if kind == "torch":
        return States(hidden_of(load_model(path), ids_SL), head)
    runtime = LlamaCpp(path, 1, 128, 1) if kind == "llama.cpp" else OnnxRuntime(path, 1, 128)
    states = torch.cat(runtime.hidden_states(ids_SL[:, :-1].tolist()))
    runtime.close()
    return States(states, head)


def steps_of(config: dict[str, Any]) -> dict[str, Any]:
    """Stages of a chain, the cut first: one that leaves blocks and heads as a GGUF wants them."""
    row = named(config)
    cut = {} if row is None else {"prune_width": CUTS["prune_width"][1]}
    if row is not None and row.reason(Work.width):
        cut = {"prune_depth": dataclasses.replace(CUTS["prune_depth"][1], keep_last=0)}
    learnt = {"distill": TRAINED["distill"], "lora": TRAINED["lora"]}
    data = {"method": "gptq", "calibration_sequences": 2}
    calibrated = row is not None and not row.reason(Work.calibrated)
    ptq = Ptq(grid=GridName.q4_0, **data if calibrated else {})
    return cut | learnt | {"ptq": ptq, "qat": Qat(**SHORT, grid=GridName.q4_0)}


@pytest.mark.parametrize("name", CHAINS)
def test_a_family_goes_from_a_cut_to_every_file_that_can_hold_it(name, tmp_path):
    parent = tiny.build(name, tmp_path / "teacher")
    context = make_context(parent, tmp_path)
    for step, stage in steps_of(read_config(parent)).items():
        out = tmp_path / step
        out.mkdir()
        stage.run(parent, out, context)
        opens(out)
        parent = parent if step == "ptq" else out

    # Rounded without training and trained under rounding, each file of both.
    mixture = any(key in read_config(parent) for key in ("num_experts", "num_local_experts"))
    heldout = context.text().ids[-3:].long()
    for checkpoint in (tmp_path / "ptq", tmp_path / "qat"):
        for file in FILES:
            if not is_held(read_config(checkpoint), file):
                continue
            format, kind, _ = parse(file)
            path = checkpoint.with_name(f"{checkpoint.name}-{format.place(kind)}")
            format.module.write(checkpoint, path, kind)
            measure = figures if mixture else parity  # of a mixture arithmetic decides
            states = states_of(path, format.runtime, heldout)
            measured = measure(checkpoint, path, file, heldout, states, 1)
            assert measured["parity_values_differing"] == 0, file
            assert (
                measured["parity_strings_differing"] == measured["parity_eos_differing_flag"] == 0
            )

            # It writes what the checkpoint would, or nearly.
            said = measured["parity_greedy_tokens_count"]
            assert mixture or said > 0 or measured["parity_greedy_gap_nats"] < 0.1, file


def test_no_family_and_no_step_is_left_out():
    assert {row.architecture for row in ROWS} == set(tiny.NAMES) - set(tiny.OTHERS)
    assert len(ROWS) == 15 and len(STEPS) == 11 and len(PAIRS) == 165
    assert len(OTHER_PAIRS) == 5 * len(tiny.OTHERS) == 85

    # Of each chain the files.
    configs = [config_in_gguf(name) for name in tiny.TINY]
    steps = [len(steps_of(config)) for config in configs]
    held = {file: sum(is_held(config, file) for config in configs) for file in FILES}
    assert len(CHAINS) == 34 and sum(steps) == 17 * 5 + 17 * 4
    assert held == {"gguf:Q4_0": 31, "onnx": 4, "compressed_tensors": 25}


def test_the_tables_of_pages_say_of_files_what_is_held():
    """A family is held where a model of it is."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
    from make_families import files_of

    for row in ROWS:
        names = [name for name in tiny.TINY if tiny.CLASSES[name] == row.architecture]
        for file in FILES:
            held = any(is_held(config_in_gguf(name), file) for name in names)
            assert held == files_of(row)[file.partition(":")[0]], (row.family, file)


@pytest.mark.parametrize("architecture", [*tiny.OTHERS, "Qwen3MoeForCausalLM"])
def test_what_stays_off_a_grid_is_small_and_no_matrix_of_a_linear_layer(architecture):
    model = tiny.model_of(architecture)
    off = unquantized(model)
    sparse = any(getattr(model.config, key, 0) for key in ("num_experts", "num_local_experts"))
    types = getattr(model.config, "layer_types", None) or ()
    mixers = {"conv", "linear_attention", "mamba"} & set(types)
    assert bool(off) == (sparse or bool(mixers))
    assert all("conv" in name or "gate" in name or "router" in name for name in off)
    assert sum(model.get_parameter(name).numel() for name in off) < 0.03 * model.num_parameters()
