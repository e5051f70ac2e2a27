"""The accountant: bytes of every stage, by formulas; held against peaks of real processes, and
against what parts of it must be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_planning import costs, recipe

from compress import planning
from compress.errors import ResourceError
from compress.memory import BASE, Account, Given, Item, Setup, weight_bytes
from compress.models.checkpoint import load_model, read_config
from compress.models.decoder_sizes import Shape
from compress.stages import STAGES
from compress.train.moments import empty_moments

ROOT = Path(__file__).resolve().parents[1]
QWEN_7B = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}


def given(shape: Shape, **setup) -> Given:
    return Given(shape, shape, 2048, Setup(**setup), gpu=True)


def test_a_shape_counts_what_the_model_has(tiny_teacher):
    shape = Shape(read_config(tiny_teacher))
    model = load_model(tiny_teacher)
    assert shape.params == model.num_parameters()
    block = model.model.layers[0]
    assert shape.block == sum(p.numel() for p in block.parameters())
    assert shape.matrices == 4 * sum(p.numel() for p in block.parameters() if p.dim() > 1)
    assert (shape.ffn, shape.hidden, shape.queries, shape.keys) == (192, 64, 64, 32)


def test_a_peak_is_of_one_phase_and_its_places_are_one_on_a_cpu():
    account = Account(
        {
            "a": [*BASE, Item("x", device=5e9, host=1e9)],
            "b": [*BASE, Item("y", device=1e9, host=7e9)],
        }
    )
    assert account.device() == 5.6e9 and account.host() == 7.45e9
    assert account.together() == 8.45e9
    assert account.listed() == "y 8.00 GB"


@pytest.mark.parametrize("kind", ["fp32", "int8", "host"])
def test_moments_take_the_bytes_that_are_told(kind):
    weight = torch.nn.Parameter(torch.zeros(512, 256))
    moments = empty_moments(weight, kind)
    told = weight_bytes(Setup(moments=kind), trained=True)["moments"]
    expected = 0 if kind == "host" else sum(m.nbytes for m in moments.values()) / weight.numel()
    assert told == expected


def test_a_7b_on_one_80_gb_gpu_and_128_gb_of_host_memory():
    shape = Shape(QWEN_7B)
    bf16 = {"precision": "bf16_stochastic", "activation_checkpointing": True}
    fitting = [
        (STAGES["prune_width"](ffn=14208), {"precision": "bf16"}),
        (STAGES["prune_depth"](blocks=4), {"precision": "bf16"}),
        (STAGES["ptq"](method="gptq"), {"precision": "bf16"}),
        (STAGES["ptq"](balance="awq"), {"precision": "bf16"}),
        (STAGES["distill"](), bf16 | {"moments": "int8"}),
        (STAGES["lora"](), {"precision": "bf16", "activation_checkpointing": True}),
    ]
    for stage, setup in fitting:
        account = stage.memory(given(shape, **setup))
        assert account.device() < 80e9 and account.host() < 128e9, (stage, account.listed())
    whole = STAGES["distill"]().memory(given(shape, precision="bf16"))
    assert whole.device() > 16 * shape.params > 80e9


def test_pruning_and_rounding_take_little_more_host_memory_than_the_bf16_model():
    shape = Shape(QWEN_7B)
    limit = 1.3 * 2 * shape.params + 2e9
    for stage in (
        STAGES["prune_width"](ffn=14208),
        STAGES["prune_heads"](kv_groups=2),
        STAGES["ptq"](),
        STAGES["ptq"](method="gptq", balance="awq"),
    ):
        setup = {"precision": "bf16"}
        states = 4 * stage.calibration_rows() * 2048 * shape.hidden
        assert stage.memory(given(shape, **setup)).host() - states < limit, stage


def test_a_recipe_that_needs_more_than_there_is_is_refused_with_what_would_fit(tiny_teacher):
    plans = list(costs(tiny_teacher, recipe()).values())
    planning.check_memory(plans, planning.Room(None, 2**34))
    with pytest.raises(ResourceError, match="teacher: needs .* MB on this machine, .*lora"):
        planning.check_memory(plans, planning.Room(None, 10**7))
    with pytest.raises(ResourceError, match="on the GPU, which has 10.0 MB: .*moments=int8"):
        planning.check_memory(plans, planning.Room(10**7, 2**34))
    with pytest.raises(ResourceError, match="on the host, which has 10.0 MB"):
        planning.check_memory(plans, planning.Room(2**34, 10**7))


def measured(model: str, cases: list[str], folder: Path) -> list[dict]:
    script = ROOT / "scripts" / "bench_memory.py"
    command = [sys.executable, str(script), "measure", model, *cases, "--results", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BENCH_FOLDER": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["stage"] for row in rows] == cases, done.stderr
    return rows


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="VmHWM is Linux's")
def test_the_peak_of_a_small_distillation_is_the_one_told(tmp_path):
    for row in measured("30M", ["distill"], tmp_path):
        assert row["told_bytes"] == pytest.approx(row["peak_bytes"], rel=0.15), row


@pytest.mark.slow
def test_peaks_of_stages_at_0_4b_are_those_told(tmp_path):
    cases = ["prune_depth", "prune_width", "prune_heads", "ptq", "ptq_awq", "ptq_gptq"]
    cases += ["distill", "distill_checkpointed", "distill_int8", "lora"]
    cases += ["qat", "qat_adapters", "qat_scales"]
    for row in measured("0.4B", cases, tmp_path):
        assert row["told_bytes"] == pytest.approx(row["peak_bytes"], rel=0.15), row
