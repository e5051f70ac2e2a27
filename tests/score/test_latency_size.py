"""compress/score/latency.py and size.py on tiny checkpoints."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.score.latency import (
    Timing,
    compare_speed,
    geometric_mean,
    measure,
    read_bytes_per_second,
)
from compress.score.size import size


def checkpoint(out, tied=True, layers=2):
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(out)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))
    ).save_pretrained(out)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_params_equal_torch_with_the_tied_head_counted_once(tmp_path, tied):
    model = checkpoint(tmp_path, tied)
    result = size(tmp_path)
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["size_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    assert result["bits_per_weight"] == pytest.approx(16, rel=0.05)


def test_a_tied_head_that_is_stored_anyway_is_counted_once(tmp_path):
    checkpoint(tmp_path, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    stored = size(tmp_path)["params"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert size(tmp_path)["params"] == stored - 256 * 64


def test_an_imported_checkpoint_has_the_size_of_its_packed_source(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "source.json").write_text('{"source_bytes": 12345}')
    assert size(tmp_path)["size_bytes"] == 12345


def test_shards_are_summed(tmp_path):
    model = checkpoint(tmp_path, layers=4)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert size(tmp_path)["params"] == sum(p.numel() for p in model.parameters())


def test_a_truncated_file_is_named(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"{}")
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        size(tmp_path)


KEYS = {f"latency_ms_p{q}" for q in (50, 90, 95, 99)} | {
    "ttft_ms_p50",
    "tok_per_sec",
    "peak_rss_bytes",
    "bandwidth_share",
}


def test_latency_numbers_are_consistent_and_memory_is_the_child_s_own(tmp_path):
    model = checkpoint(tmp_path)
    ballast = np.ones(125_000_000)  # 1 GB here: ru_maxrss of a child would begin with it
    how = Timing(
        prompt_tokens=8,
        new_tokens=6,
        repeats=3,
        threads=1,
        processes=2,
        prompt_lengths=(4, 32),
        batch_sizes=(1, 2),
    )
    scores, intervals, facts = measure(tmp_path, "torch", how).values()
    assert set(scores) == KEYS | {f"ttft_ms_p50/{n}" for n in (4, 32)} | {
        f"throughput_tok_per_sec/{n}" for n in (1, 2)
    }
    assert (
        0
        < scores["latency_ms_p50"]
        <= scores["latency_ms_p90"]
        <= scores["latency_ms_p95"]
        <= scores["latency_ms_p99"]
    )
    assert 50e6 < scores["peak_rss_bytes"] < ballast.nbytes
    assert set(intervals) == set(scores) - {"peak_rss_bytes"}
    assert all(low <= scores[key] <= high for key, (low, high) in intervals.items())
    assert facts["weight_bytes"] == sum(2 * p.numel() for p in model.parameters()) + sum(
        4 * b.numel() for b in model.buffers()
    )
    assert (facts["processes"], facts["repeats"]) == (2, 3) and len(facts["load"]) == 2
    assert len(facts["pinned_cpus"]) == 1 and set(facts["pinned_cpus"]) <= os.sched_getaffinity(0)


def test_one_process_prints_one_json_line_and_gives_no_interval(tmp_path, monkeypatch):
    checkpoint(tmp_path)
    lines = []
    real = subprocess.run

    def listening(*arguments, **options):
        done = real(*arguments, **options)
        lines.extend(done.stdout.splitlines())
        return done

    monkeypatch.setattr(subprocess, "run", listening)
    latency = measure(
        tmp_path, "torch", Timing(prompt_tokens=8, new_tokens=3, repeats=1, threads=1)
    )
    assert len(lines) == 1 and set(latency["scores"]) == KEYS and latency["intervals"] == {}


def test_settings_and_directories_that_can_t_be_measured_are_refused(tmp_path):
    for wrong in (
        {"repeats": 0},
        {"processes": 0},
        {"new_tokens": 1},
        {"prompt_lengths": (16, 0)},
        {"context_lengths": (16,)},
    ):
        with pytest.raises(
            ValueError, match=f"{next(iter(wrong))}=.*allowed: counts from 1, new_tokens from 2"
        ):
            Timing(**wrong)
    with pytest.raises(
        ValueError, match=r"measuring .* failed with exit 1: .*config\.json is missing"
    ):
        measure(tmp_path)
    with pytest.raises(ValueError, match="at least 2 blocks of A B B A for its interval, got 1"):
        compare_speed((tmp_path, "torch"), (tmp_path, "torch"), Timing(), blocks=1)


def test_intervals_over_processes_are_student_s_and_cover_19_of_20():
    values = [20.1, 21.4, 19.7, 22.0]
    theirs = np.exp(ttest_1samp(np.log(values), 0).confidence_interval(0.95))
    assert geometric_mean(values) == pytest.approx((np.exp(np.mean(np.log(values))), *theirs))
    draws = np.random.default_rng(0).lognormal(3, 0.05, (2000, 5))
    inside = [low <= np.exp(3) <= high for _, low, high in map(geometric_mean, draws)]
    assert 0.935 < np.mean(inside) < 0.965


def test_abba_cancels_a_drift_with_processes_that_are_doubles(monkeypatch):
    """Real clocks drift as they like: these processes slow down by 10% each, and B takes half the
    time of A.
    """
    order = []

    def process(model, runtime, how):
        order.append(model)
        ms = (20 if model == "A" else 10) * 1.1 ** len(order)
        return {"scores": {"latency_ms_p50": ms, "ttft_ms_p50": 3 * ms}}

    monkeypatch.setattr("compress.score.latency._fresh", process)
    found = compare_speed(("A", "torch"), ("B", "torch"), Timing(), blocks=3)
    assert "".join(order) == "ABBA" * 3
    assert found["latency_ms_p50"] == pytest.approx((2, 2, 2)) and found[
        "ttft_ms_p50"
    ] == pytest.approx((2, 2, 2))


def test_reading_is_measured_near_what_memory_gives():
    assert 5e8 < read_bytes_per_second(32_000_000, 1) < 1e12
