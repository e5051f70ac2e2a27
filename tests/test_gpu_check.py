"""`scripts/gpu_check.sh`, dry: a line a check, whatever it does; and the arithmetic behind MFU.

What the checks say of a GPU only a GPU can show.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import gpu_memory  # noqa: E402
import gpu_models  # noqa: E402
import gpu_speed  # noqa: E402
import gpu_stages  # noqa: E402
from gpu_check import Check  # noqa: E402
from gpu_models import Place  # noqa: E402

from compress.prune.shape import check_text  # noqa: E402
from compress.stages import STAGES  # noqa: E402


def dry_run(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    line = ["sh", "scripts/gpu_check.sh", "--dry-run", *arguments]
    env = os.environ | {"PYTHON": sys.executable, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    lines = (out / "gpu_check.jsonl").read_text().splitlines()
    return done, {row["check"]: row for row in map(json.loads, lines)}


def test_a_dry_run_of_the_cheapest_checks_writes_a_line_each(tmp_path):
    done, rows = dry_run(tmp_path / "out", "environment", "memory-ptq_awq")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(rows) == ["environment", "memory-ptq_awq"]
    assert all(row["status"] == "ok" and row["dry_run"] for row in rows.values())
    about = rows["environment"]
    assert about["peak_flops"] > 1e6 and about["versions"]["torch"] and about["git_sha"]
    peak = rows["memory-ptq_awq"]
    assert peak["shape"] == "7B" and peak["host_peak_bytes"] > 1e7 and peak["length"] == 32
    assert peak["stage_peak_bytes"] is None and "predicted_bytes" in peak
    assert (tmp_path / "out" / "memory-ptq_awq.log").is_file()
    assert "memory-ptq_awq" in done.stdout


@pytest.mark.slow
def test_the_whole_dry_run_has_no_check_that_fails(tmp_path):
    command = [sys.executable, "scripts/gpu_check.py", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--minutes", "60"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = (tmp_path / "gpu_check.jsonl").read_text().splitlines()
    rows = {row["check"]: row for row in map(json.loads, lines)}
    assert list(rows) == list(gpu_check.CHECKS)
    assert [name for name, row in rows.items() if row["status"] == "failed"] == []
    assert done.returncode == 0
    assert rows["resume"]["weights_max_difference"] == 0
    assert rows["fsdp2"]["losses_max_relative_difference"] < 1e-4


def raises(place):
    raise ValueError("two\nlines")


def lacks(place):
    raise ModuleNotFoundError("No module named 'x'", name="x")


def hangs(place):
    time.sleep(60)


def dies(place):
    os._exit(9)


def works(place):
    return {"answer": 1.5}


@pytest.mark.parametrize(
    ("work", "status", "why"),
    [
        (works, "ok", None),
        (raises, "failed", "ValueError: two"),
        (lacks, "skipped", "needs x, which is not installed"),
        (hangs, "failed", "longer than 1 s"),
        (dies, "failed", "the process died (9)"),
    ],
)
def test_whatever_a_check_does_is_a_line_and_ends_in_time(work, status, why, tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # whose children have these checks, too
    monkeypatch.setattr(gpu_check.multiprocessing, "get_context", lambda kind: fork)
    monkeypatch.setitem(gpu_check.CHECKS, "double", Check(work, 0.5))
    begun = time.monotonic()
    line = gpu_check.run("double", Place(tmp_path, True), tmp_path, 100.0)
    assert (line["status"], line.get("why")) == (status, why)
    assert line.get("answer") == (1.5 if work is works else None)
    assert time.monotonic() - begun < 30
    assert gpu_check.shown("double", line).startswith("double")


def test_what_lacks_a_package_or_time_is_skipped_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(gpu_check.PACKAGES, "no_such_module", "no-such-package")
    monkeypatch.setitem(gpu_check.CHECKS, "double", Check(works, 9, ("no_such_module",)))
    line = gpu_check.run("double", Place(tmp_path, True), tmp_path, 100.0)
    assert line["status"] == "skipped" and "needs no-such-package" in line["why"]
    line = gpu_check.run("environment", Place(tmp_path, True), tmp_path, 3.0)
    assert line == {"status": "skipped", "why": "no time left"}


def test_every_stage_is_checked():
    assert {run.technique for run in gpu_stages.RUNS.values()} == set(STAGES)
    assert {run.technique for run in gpu_memory.RUNS.values()} == {
        *("prune_width", "ptq", "lora", "distill", "qat")
    }
    assert set(gpu_memory.DRY) == set(gpu_memory.RUNS)


@pytest.mark.parametrize("runs", [gpu_stages.RUNS, gpu_memory.RUNS])
def test_settings_are_legal_at_real_sizes(runs):
    """Which a dry run, of other sizes, does not say."""
    for name, run in runs.items():
        settings = {key: value for key, value in run.settings.items() if key != "data"}
        stage = STAGES[run.technique](**settings)
        at_7b = runs is gpu_memory.RUNS
        blocks = {"num_hidden_layers": run.blocks} if at_7b else {}
        shape = "7B" if at_7b else run.shape
        config = gpu_models.config_of(shape, False, **blocks).to_dict()
        stage.check_shape(config)
        rows, length = (run.rows, run.length) if at_7b else (gpu_stages.ROWS, gpu_stages.LENGTH)
        assert stage.calibration_rows() <= rows, name
        if run.technique == "prune_width":
            calibrated = (stage.calibration_rows(), length)
            check_text(name, calibrated, config["intermediate_size"], None)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_a_token_are_those_that_torch_counts(tied):
    """Torch's counter sees whole attention, of which a causal one needs half, and no vectors."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = gpu_models.config_of("0.5B", True, tie_word_embeddings=tied, vocab_size=512)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    vectors = sum(p.numel() for p in model.parameters() if p.dim() == 1)
    ids = torch.zeros(2, 48, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(ids).logits.sum().backward()
    attention = config.num_hidden_layers * config.hidden_size * 48
    counted = counter.get_total_flops() / ids.numel()
    ours = gpu_speed.flops_a_token(config, 48)
    assert counted == pytest.approx(ours - 6 * vectors + 6 * attention, rel=1e-6)
    assert gpu_speed.flops_a_token(config, 48, passes=1) == pytest.approx(ours / 3)


def test_a_card_that_is_listed_has_its_data_sheet_s_rate_and_another_is_measured(
    tmp_path, monkeypatch
):
    place = Place(tmp_path, True)
    monkeypatch.setattr(gpu_speed, "product_flops", lambda place: 5e12)
    for name, flops in (
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA RTX 6000 Ada Generation", 364e12),
        ("Some Other Card", 5e12),
    ):
        monkeypatch.setattr(gpu_speed, "card", lambda name=name: name)
        found = gpu_speed.peak_flops(place)
        assert found["peak_flops"] == flops and found["product_flops"] == 5e12
        assert ("measured" in found["peak_flops_from"]) == (flops == 5e12)


def test_the_tokenizer_has_as_many_ids_as_the_shape_and_text_stays_within(tmp_path):
    from compress.models.tokenizer import load_tokenizer, token_count

    gpu_models.write_tokenizer(tmp_path, 70_000)  # bytes, all pairs, some triples
    tokenizer = load_tokenizer(tmp_path)
    assert token_count(tokenizer) == 70_000
    assert tokenizer.decode(tokenizer.encode("Größe 漢")) == "Größe 漢"
    text = gpu_models.random_text(512, 6, 40)
    assert text.ids.shape == (6, 41) and int(text.ids.min()) >= 0 and int(text.ids.max()) < 512
    assert len(text.ids.unique()) > 50


def test_peaks_are_taken_without_files_and_everything_is_put_back(tmp_path):
    from compress.models import checkpoint
    from compress.stages.training import Optimization

    before = checkpoint.load_model, Optimization.reserve
    with gpu_memory.without_files(gpu_memory.Peak()):
        place = Place(tmp_path, True)
        model = checkpoint.load_model(place.hollow("7B", num_hidden_layers=3), torch.bfloat16)
        assert model.dtype == torch.bfloat16 and len(model.model.layers) == 3
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert float(model.lm_head.weight.float().std()) == pytest.approx(0.02, rel=0.1)
        inverse = model.model.rotary_emb.inv_freq
        assert inverse.device.type != "meta" and inverse.isfinite().all()
    assert (checkpoint.load_model, Optimization.reserve) == before
