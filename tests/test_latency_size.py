"""compress/score/latency.py and size.py on tiny checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.score.latency import measure
from compress.score.size import size

ROOT = Path(__file__).resolve().parents[1]


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
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(out)
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
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        size(tmp_path)


def test_latency_numbers_are_consistent_and_memory_is_the_child_s_own(tmp_path):
    checkpoint(tmp_path)
    ballast = np.ones(125_000_000)  # 1 GB here: ru_maxrss of a child would begin with it
    result = measure(tmp_path, prompt_tokens=8, new_tokens=6, repeats=3, threads=1)
    assert set(result) == {"ttft_ms_p50", "latency_ms_p50", "latency_ms_p95", "tok_per_sec", "peak_rss_bytes"}
    assert 0 < result["latency_ms_p50"] <= result["latency_ms_p95"]
    assert result["tok_per_sec"] <= 1000 / (0.3 * result["latency_ms_p50"])
    assert 50e6 < result["peak_rss_bytes"] < ballast.nbytes


def test_the_process_prints_one_json_line(tmp_path):
    checkpoint(tmp_path)
    command = [
        sys.executable,
        "-m",
        "compress.score.latency",
        tmp_path,
        "--new-tokens=3",
        "--repeats=1",
        "--threads=1",
        "--dtype=float32",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1 and json.loads(done.stdout)["ttft_ms_p50"] > 0


def test_settings_and_directories_that_can_t_be_measured_are_refused(tmp_path):
    with pytest.raises(ValueError, match="repeats=0.*allowed: counts from 1"):
        measure(tmp_path, repeats=0)
    with pytest.raises(ValueError, match=r"dtype='int8'.*bfloat16"):
        measure(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match=r"measuring .* failed with exit 1: .*config\.json is missing"):
        measure(tmp_path)
