"""Every stage of the registry, held to the same protocol."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
import torch
from conftest import make_context

from compress.checkpoint import digest, load_model, load_tokenizer
from compress.stages import STAGES
from compress.store import Store, file_table

SMALL = {
    "prune_depth": {"blocks": 1, "calibration_sequences": 2},
    "prune_width": {"ffn": 128, "multiple": 32, "calibration_sequences": 2},
    "distill": {"tokens": 128, "batch_sequences": 2, "micro_batch_sequences": 1},
    "lora": {"tokens": 128, "batch_sequences": 2, "micro_batch_sequences": 1, "rank": 2},
    "ptq": {},
    "qat": {"tokens": 128, "batch_sequences": 2, "micro_batch_sequences": 1},
}
UNITS = ("_count", "_nats", "_fraction", "_relative", "_sum", "bits_per_weight")


def run(name, teacher, folder, parent=None):
    folder.mkdir(exist_ok=True)
    out = folder / "out"
    out.mkdir()
    context = make_context(teacher, folder)
    metrics = STAGES[name](**SMALL[name]).run(parent or teacher, out, context)
    return out, metrics


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_writes_a_plain_checkpoint_and_leaves_its_parent_alone(name, tiny_teacher, tmp_path):
    before = file_table(tiny_teacher)
    out, metrics = run(name, tiny_teacher, tmp_path / "a")
    assert file_table(tiny_teacher) == before
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    logits = model(torch.arange(9)[None]).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(load_model(out)(torch.arange(9)[None]).logits, logits)
    ids = load_tokenizer(tiny_teacher)("Hello world 123")["input_ids"]
    assert load_tokenizer(out)("Hello world 123")["input_ids"] == ids
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (tiny_teacher / file).read_bytes()
    assert metrics
    for key, value in metrics.items():
        assert key.endswith(UNITS), f"{key} has no unit"
        assert isinstance(value, int | float)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_deterministic(name, tiny_teacher, tmp_path):
    first, metrics = run(name, tiny_teacher, tmp_path / "a")
    second, again = run(name, tiny_teacher, tmp_path / "b")
    assert file_table(first) == file_table(second)
    assert metrics == again


@pytest.mark.parametrize("name", STAGES)
def test_a_wrong_parent_is_refused_naming_directory_and_what_is_missing(name, tiny_teacher, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(tiny_teacher, parent)
    (parent / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape(str(parent)) + ".*model.safetensors"):
        run(name, tiny_teacher, tmp_path / "a", parent)


@pytest.mark.parametrize("name", STAGES)
def test_a_quantized_parent_is_refused(name, tiny_teacher, tmp_path):
    quantized, _ = run("ptq", tiny_teacher, tmp_path / "q")
    with pytest.raises(ValueError, match="quantized"):
        run(name, tiny_teacher, tmp_path / "a", quantized)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_dies_leaves_no_entry(name, tiny_teacher, tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    stage = STAGES[name](**SMALL[name])

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    monkeypatch.setattr("compress.checkpoint.save_file", fails)
    monkeypatch.setattr("compress.distill.signal.write_whole", fails)
    context = make_context(tiny_teacher, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        store.build("k" * 64, {}, lambda out, work: stage.run(tiny_teacher, out, dataclasses.replace(context, work=work)))
    assert not store.entry("k" * 64).exists()


def test_the_adapter_is_kept_beside_and_the_merge_equals_it(tiny_teacher, tmp_path):
    from peft import PeftModel

    out, _ = run("lora", tiny_teacher, tmp_path / "a")
    assert not (out / "adapter_config.json").exists()
    adapted = PeftModel.from_pretrained(load_model(tiny_teacher), out / "adapter")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(adapted(ids).logits, load_model(out)(ids).logits, rtol=0, atol=0.05)  # the merge is stored in bf16
    assert digest(out) != digest(tiny_teacher)


def test_qlora_trains_on_an_nf4_base(tiny_teacher, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the qlora extra is not installed")
    (tmp_path / "out").mkdir()
    metrics = STAGES["lora"](**SMALL["lora"], load_in_4bit=True).run(tiny_teacher, tmp_path / "out", make_context(tiny_teacher, tmp_path))
    assert metrics["steps_count"] == 2
    assert load_model(tmp_path / "out")(torch.arange(9)[None]).logits.isfinite().all()


def test_a_missing_optional_package_is_named_before_work(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else real(name, *a))
    with pytest.raises(ValueError, match=r"needs bitsandbytes, which is not installed: pip install 'compress-lm\[qlora\]'"):
        STAGES["lora"](load_in_4bit=True)


def test_frozen_embeddings_stay_the_parents(tiny_teacher, tmp_path):
    from compress.checkpoint import load_model

    for train in (True, False):
        out = tmp_path / str(train)
        out.mkdir()
        context = make_context(tiny_teacher, tmp_path, work=tmp_path / f"work-{train}")
        STAGES["distill"](**SMALL["distill"], lr=0.01, train_embeddings=train).run(tiny_teacher, out, context)
        before, after = (load_model(path).get_input_embeddings().weight for path in (tiny_teacher, out))
        assert torch.equal(before, after) is not train
