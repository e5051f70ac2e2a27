"""Closeness on held-out text against plain torch in float64, and the teacher's opening."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from scipy import stats

from compress.formats.torch_runtime import head as checkpoint_head
from compress.models.checkpoint import check, load_model, weight_files
from compress.models.head import Fold, Head, head_of, hidden_states
from compress.models.tokenizer import load_tokenizer
from compress.score.fidelity import (
    States,
    bits_and_bytes,
    closeness,
    hidden_of,
    logits_of,
)
from compress.score.intervals import perplexities
from compress.store import Store
from compress.teacher import open_teacher
from compress.text.packing import pack


@pytest.fixture
def heldout(tiny_teacher, tmp_path):
    return pack(["embedded:topics"], tiny_teacher, 48, tmp_path)


def noisy(teacher, folder):
    from compress.models.checkpoint import save_model

    torch.manual_seed(2)
    model = load_model(teacher)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    save_model(model, folder, tokenizer_from=teacher, dtype=torch.float32)
    return folder


def states(path, data, rows):
    return States(hidden_of(load_model(path), data.ids[:rows]), checkpoint_head(path))


def test_kl_and_agreement_equal_float64_logits(tiny_teacher, heldout, tmp_path):
    student = noisy(tiny_teacher, tmp_path / "student")
    near = closeness(states(tiny_teacher, heldout, 7), states(student, heldout, 7))
    ids = heldout.ids[:7, :-1].long()
    with torch.inference_mode():
        p, q = (
            load_model(path).double()(ids).logits.log_softmax(-1).flatten(0, 1)
            for path in (tiny_teacher, student)
        )
    assert near["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert near["top1"] == pytest.approx(
        float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=1e-9
    )
    rows = closeness(states(tiny_teacher, heldout, 7), states(student, heldout, 7), rows=7)
    torch.testing.assert_close(
        torch.tensor(rows["kl_rows"]).double(),
        (p.exp() * (p - q)).sum(-1).view(7, -1).mean(1),
        rtol=1e-4,
        atol=1e-6,
    )
    assert rows["kl"] == pytest.approx(near["kl"]) and np.mean(rows["top1_rows"]) == pytest.approx(
        rows["top1"]
    )
    same = closeness(states(student, heldout, 7), states(student, heldout, 7), rows=7)
    assert same == {"kl": 0.0, "top1": 1.0, "kl_rows": [0.0] * 7, "top1_rows": [1.0] * 7}


def test_heads_and_logits_are_on_a_device_that_has_only_a_name_here(monkeypatch):
    """ "meta" stands for a GPU: what is computed there has shape, type and place, and no values."""
    monkeypatch.setattr("compress.score.fidelity.best_device", lambda: torch.device("meta"))
    fold = Fold(torch.arange(5), torch.arange(5, 9), torch.zeros(4, dtype=torch.long))
    head = Head(torch.randn(9, 4), torch.randn(9), 0.5, 3.0, fold)
    chunks = list(logits_of(States(torch.randn(300, 4), head)))
    assert [tuple(chunk.shape) for chunk in chunks] == [(256, 5), (44, 5)]
    assert {chunk.device.type for chunk in chunks} == {"meta"}
    assert head.weight_VH.device.type == fold.kept_S.device.type == "cpu"


def test_perplexities_of_documents_have_intervals_over_documents():
    nats, words, count = [30.0, 50.0, 44.0], [10, 20, 14], [55, 101, 70]
    rows = zip(nats, words, count, strict=True)
    items = [
        {"task": "wikitext", "doc_id": i, "logliks": [-a], "words": w, "bytes": b}
        for i, (a, w, b) in enumerate(rows)
    ]
    alone = {"task": "page", "doc_id": 0, "logliks": [-3.0], "words": 1, "bytes": 4}
    scores, found, *_ = perplexities(
        [*items, alone, {"task": "facts", "doc_id": 0, "correct": True, "logliks": [-1.0]}]
    )
    assert scores["byte_perplexity/page"] == pytest.approx(math.exp(3 / 4)) and scores[
        "bits_per_byte/page"
    ] == pytest.approx(0.75 / math.log(2))
    assert set(found) == {
        "word_perplexity/wikitext",
        "byte_perplexity/wikitext",
        "bits_per_byte/wikitext",
    }, "of one document nothing is known"
    for name, value in (
        ("word_perplexity", math.exp(124 / 44)),
        ("byte_perplexity", math.exp(124 / 226)),
        ("bits_per_byte", 124 / 226 / math.log(2)),
    ):
        low, high = found[f"{name}/wikitext"]
        assert low < value < high and scores[f"{name}/wikitext"] == pytest.approx(value)
    assert found["bits_per_byte/wikitext"] == pytest.approx(
        [math.log2(x) for x in found["byte_perplexity/wikitext"]]
    )
    # linearised by hand: residuals a - r w, their standard error over the mean of w, times t of 2
    # degrees of freedom
    ratio, w = 124 / 44, np.array(words)
    error = np.std(np.array(nats) - ratio * w, ddof=1) / np.sqrt(3) / w.mean()
    reach = stats.t.ppf(0.975, 2) * error
    np.testing.assert_allclose(
        np.log(found["word_perplexity/wikitext"]), [ratio - reach, ratio + reach], rtol=0.05
    )


def test_bits_per_byte_is_cross_entropy_over_the_labels_text(tiny_teacher, heldout):
    tokenizer = load_tokenizer(tiny_teacher)
    bits, size = bits_and_bytes(states(tiny_teacher, heldout, 5), heldout.ids[:5], tokenizer)
    ids = heldout.ids[:5].long()
    with torch.inference_mode():
        logits = load_model(tiny_teacher)(ids[:, :-1]).logits
    for row, own in enumerate(ids[:, 1:]):
        nats = float(torch.nn.functional.cross_entropy(logits[row].double(), own, reduction="sum"))
        assert bits[row] == pytest.approx(nats / math.log(2), rel=1e-5)
        assert size[row] == len(tokenizer.decode(own, skip_special_tokens=True).encode())


def test_models_of_other_vocabularies_are_not_compared():
    with pytest.raises(ValueError, match="can't be compared: vocabularies 5 and 6"):
        closeness(
            States(torch.zeros(3, 2), Head(torch.zeros(5, 2))),
            States(torch.zeros(3, 2), Head(torch.zeros(6, 2))),
        )


def test_a_local_folder_is_used_in_place_and_a_gguf_is_imported_once(tiny_teacher, tmp_path):
    from compress.formats.gguf import export_gguf

    store = Store(tmp_path / "store")
    assert open_teacher(str(tiny_teacher), None, store, print).path == tiny_teacher
    export_gguf(tiny_teacher, tmp_path / "t.gguf", "F16")
    first, second = (open_teacher(str(tmp_path / "t.gguf"), None, store, print) for _ in range(2))
    assert first == second
    ids = torch.arange(12)[None]
    torch.testing.assert_close(
        load_model(first.path)(ids).logits, load_model(tiny_teacher)(ids).logits, rtol=0, atol=2e-2
    )


def test_a_hub_id_goes_through_snapshot_download_with_a_mocked_hub(
    tiny_teacher, tmp_path, monkeypatch
):
    asked = {}

    def local_hub(name, *, revision, allow_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        return str(tiny_teacher)

    monkeypatch.setattr("huggingface_hub.snapshot_download", local_hub)
    assert open_teacher("owner/model", "v1", Store(tmp_path), print).path == tiny_teacher
    assert asked["name"] == "owner/model"
    assert asked["revision"] == "v1"
    assert not any("bin" in pattern or "py" in pattern for pattern in asked["patterns"])


def test_an_unreachable_hub_says_what_to_do(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ValueError, match="hub teacher 'owner/model' can't be had .* or give a local directory"
    ):
        open_teacher("owner/model", None, Store(tmp_path), print)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json is missing"),
        (lambda d: (d / "config.json").write_text("{"), "is not JSON"),
        (
            lambda d: (d / "config.json").write_text('{"auto_map": {}}'),
            "needs remote code, which is never run",
        ),
        (lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer"),
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "is pickle and is not read",
        ),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tiny_teacher, tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher, folder)
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        check(folder)
    assert str(folder) in str(caught.value)


def test_a_shard_index_that_leaves_the_folder_is_refused(tiny_teacher, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_teacher, folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"x": "../../secret.safetensors"}})
    )
    with pytest.raises(ValueError, match="secret.safetensors', which is no file of that directory"):
        weight_files(folder)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8}),
        ("Granite", {"logits_scaling": 3.0}),
        ("Cohere", {"logit_scale": 0.25}),
        ("Phi", {}),
    ],
)
def test_scaled_capped_and_biased_heads_give_the_logits_of_transformers(tmp_path, kind, changes):
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        **changes,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    if kind == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    ids = torch.arange(12).view(2, 6)
    hidden_NH = hidden_states(model, ids)
    with torch.no_grad():
        expected = model(ids).logits.flatten(0, 1)
        torch.testing.assert_close(head_of(model).logits(hidden_NH), expected)
        torch.testing.assert_close(checkpoint_head(tmp_path).logits(hidden_NH), expected)
