"""What a checkpoint directory is refused for before anything is built from it, and what a loaded
model is compared with.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.formats import gguf
from compress.formats.torch_runtime import head as checkpoint_head
from compress.models import checkpoint
from compress.models.checkpoint import check, copy_beside, load_model, read_config
from compress.models.head import hidden_states
from compress.models.loaded import check_forward
from compress.models.loading import head_place
from compress.models.model_config import meta_model
from compress.models.tokenizer import check_tokens, load_tokenizer, token_count
from compress.quant.settings import GridName
from compress.score.size import size
from compress.session import check_shapes
from compress.stages.ptq import Ptq

COMMON = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FEW = {
    key: value
    for key, value in COMMON.items()
    if key not in ("num_key_value_heads", "intermediate_size")
}


@pytest.fixture
def copied(tiny_teacher, tmp_path) -> Path:
    """The tiny teacher, to be damaged."""
    return Path(shutil.copytree(tiny_teacher, tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    """Other values in a JSON object; ... takes a key away."""
    data = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def rewrite(folder: Path, change) -> None:
    """The weights as `change` gives them back."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def family(folder: Path, teacher: Path, name: str, **config) -> Path:
    """A tiny random model of a family, with the tiny teacher's tokenizer."""
    kind = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(kind(**config))
    model.save_pretrained(folder)
    copy_beside(teacher, folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": ...}, 'has no model_type .*add "model_type": "llama"'),
        ({"model_type": ["llama"]}, "has no model_type that can be used"),
        ({"model_type": "madeup"}, "model_type 'madeup' is no text model"),
        ({"model_type": "t5"}, "model_type 't5' is no text model"),
        ({"architectures": "LlamaForCausalLM"}, "needed is a list of class names"),
        ({"text_config": {"hidden_size": 64}}, "is a model of several parts"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "needs remote code, which is never run"),
        ({"rope_parameters": {"auto_map": {}}}, "needs remote code"),
        ({"attn_implementation": "owner/kernel"}, "names a kernel to be fetched"),
        ({"_attn_implementation": {"": "owner/kernel"}}, "names a kernel to be fetched"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; needed is a whole number above 0"),
        ({"hidden_size": -64}, "hidden_size is -64"),
        ({"vocab_size": "512"}, "vocab_size is 512; needed is a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": 10**30}, "hidden_size is beyond 64 bits"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, at most 1,000 is read"),
        ({"num_labels": 10**6}, "num_labels is 1000000, at most 10,000 is read"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, which is no finite number"),
        (
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [float("nan")] * 8}},
            "short_factor is nan, which is no finite number",
        ),
        ({"id2label": {str(i): "x" for i in range(100_000)}}, "more than 100,000 values"),
        ({"return_dict": False}, "return_dict is false, so the model would give bare tuples"),
        ({"torchscript": True}, "torchscript is true"),
        ({"hidden_act": "warp"}, "config.json is of no llama model that can be built"),
        ({"num_hidden_layers": 900}, "config.json says 900 blocks, its weights hold 38 tensors"),
        (
            {"num_hidden_layers": 5},
            r"the weights lack model.layers.4.self_attn.q_proj.weight, .* and 6 more",
        ),
        (
            {"hidden_size": 128},
            (
                r"the weights lack model.embed_tokens.weight of shape \(512, 128\) \(it is \(512,"
                r" 64\)\)"
            ),
        ),
        (
            {"intermediate_size": 9_000_000},
            "the weights lack model.layers.0.mlp.gate_proj.weight of shape",
        ),
        (
            {"num_hidden_layers": 3},
            "the weights hold tensors that the model has no place for: model.layers.3",
        ),
        (
            {"intermediate_size": 100},
            r"model.layers.0.mlp.down_proj.weight is \(64, 192\), needed is \(64, 100\)",
        ),
        (
            {"tie_word_embeddings": False},
            (
                "the weights lack lm_head.weight; if the head is the embedding, set"
                " tie_word_embeddings to true"
            ),
        ),
        ({"hidden_act": "madeup"}, "is of no llama model that can be built"),
    ],
)
def test_a_config_that_is_not_of_these_weights_is_refused_by_key(copied, changes, message):
    edit(copied / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as caught:
        check(copied)
    assert "\n" not in str(caught.value)


def test_a_config_of_no_object_or_too_long_or_deep_is_refused(copied, monkeypatch):
    for text, message in (
        ("[1, 2]", "holds a JSON list"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "can't be read"),
    ):
        (copied / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_config(copied)
    monkeypatch.setattr("compress.models.model_config.JSON_BYTES", 100)
    with pytest.raises(ValueError, match="bytes, at most 100 are read"):
        read_config(copied)


@pytest.mark.parametrize(
    ("kind", "key"),
    [("GPT2", "n_layer"), ("Mixtral", "num_local_experts"), ("Qwen2Moe", "num_experts")],
)
def test_counts_that_would_fill_the_memory_are_refused_at_once(tiny_teacher, tmp_path, kind, key):
    sizes = {
        "GPT2": {"vocab_size": 512, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
    }.get(kind, COMMON | {key: 2})
    folder = family(tmp_path / kind, tiny_teacher, kind, **sizes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for count in (900, 5_000_000, 10**9):
        edit(folder / "config.json", **{key: count})
        start = time.process_time()
        with pytest.raises(ValueError):
            check(folder)
        assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "fp8", "bitsandbytes", "mxfp4", "compressed-tensors", "madeup", None]
)
def test_weights_that_are_quantized_already_are_refused_by_method(copied, method):
    edit(
        copied / "config.json",
        quantization_config={"bits": 4} | ({"quant_method": method} if method else {}),
    )
    with pytest.raises(
        ValueError,
        match=(
            rf"quantized already \({method or 'unknown method'}\); give the unquantized checkpoint"
        ),
    ):
        check(copied)


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.qweight", "model.layers.0.mlp.up_proj.weight"]
)
def test_packed_weights_without_a_word_in_the_config_are_refused(copied, name):
    rewrite(copied, lambda w: w | {name: torch.zeros(192, 64, dtype=torch.int8)})
    with pytest.raises(ValueError, match=f"quantized already .they hold {name}."):
        check(copied)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "adapter_config.json").write_text("{}"),
            "adapter_config.json beside config.json",
        ),
        (lambda d: (d / "custom_generate").mkdir(), "its code is never run"),
        (
            lambda d: edit(d / "generation_config.json", num_beams=10**6),
            "generation_config.json: num_beams is 1000000, and answers here are one greedy",
        ),
        (
            lambda d: edit(d / "generation_config.json", return_dict_in_generate=True),
            "return_dict_in_generate is True",
        ),
        (lambda d: edit(d / "generation_config.json", max_time=0), "max_time is 0"),
        (lambda d: edit(d / "generation_config.json", min_new_tokens=9), "min_new_tokens is 9"),
        (lambda d: edit(d / "generation_config.json", stop_strings=["x"]), "stop_strings is"),
        (
            lambda d: (
                (d / "generation_config.json").unlink(),
                edit(d / "config.json", num_beams=4),
            ),
            "config.json: num_beams is 4",
        ),
        (
            lambda d: (
                (d / "config.json").unlink(),
                (d / "config.json").symlink_to(d / "config.json"),
            ),
            "config.json is no plain file, or a link to none",
        ),
        (
            lambda d: (d / "tokenizer.json").write_bytes(
                b"\xef\xbb\xbf" + (d / "tokenizer.json").read_bytes()
            ),
            "tokenizer.json begins with a byte order mark",
        ),
        (
            lambda d: (
                (d / "model.safetensors").unlink(),
                (d / "model.safetensors").symlink_to(d / "gone"),
            ),
            "has no model.safetensors, or a link to a file that is gone",
        ),
        (
            lambda d: rewrite(
                d, lambda t: {name: value.to(torch.complex64) for name, value in t.items()}
            ),
            "is of type C64; give the checkpoint in fp32, bf16 or fp16",
        ),
        (
            lambda d: (d / "generation_config.json").write_text("[]"),
            "generation_config.json holds a JSON list",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"\x80\x04pickle"),
            "is no whole safetensors file",
        ),
        (
            lambda d: (d / "model.safetensors").write_bytes(
                (d / "model.safetensors").read_bytes()[:-9]
            ),
            "bytes of tensors where its header claims",
        ),
        (
            lambda d: rewrite(d, lambda w: {k: v for k, v in w.items() if "2.mlp.up" not in k}),
            "lack model.layers.2.mlp.up_proj.weight; copy",
        ),
        (
            lambda d: rewrite(d, lambda w: w | {"extra.weight": torch.ones(2)}),
            "no place for: extra.weight",
        ),
        (
            lambda d: rewrite(d, lambda w: w | {"lm_head.weight": torch.ones(512, 64)}),
            "model.embed_tokens.weight and lm_head.weight differ",
        ),
        (
            lambda d: rewrite(d, lambda w: w | {"model.norm.weight": torch.full((64,), torch.nan)}),
            "tensor model.norm.weight in .* holds NaN",
        ),
        (
            lambda d: rewrite(d, lambda w: w | {"model.norm.weight": torch.full((64,), torch.inf)}),
            "tensor model.norm.weight in .* holds NaN",
        ),
    ],
)
def test_what_lies_in_the_directory_is_refused_by_name(copied, damage, message):
    damage(copied)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(copied)
    assert str(copied) in str(caught.value)


def shards(folder: Path, **index) -> None:
    """The weights in two files, and an index."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    parts = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, some in parts.items():
        save_file({name: weights[name] for name in some}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    table = {name: file for file, some in parts.items() for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table} | index))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": ...}, "has no weight_map"),
        ({"weight_map": ["a.safetensors"]}, "has no weight_map"),
        ({"weight_map": {"x": 3}}, "has no weight_map"),
        ({"weight_map": {"x": "../a.safetensors"}}, "which is no file of that directory"),
        ({"weight_map": {"x": "a" * 5000}}, "which is no file of that directory; copy all shards"),
        (
            {"weight_map": {"x": "a.safetensors"}},
            "has tensor x in a.safetensors, which does not hold it",
        ),
    ],
)
def test_an_index_that_does_not_fit_its_shards_is_refused(copied, index, message):
    shards(copied)
    check(copied)
    edit(copied / "model.safetensors.index.json", **index)
    with pytest.raises(ValueError, match=message):
        check(copied)


def test_a_tensor_in_two_shards_is_refused(copied):
    shards(copied)
    both = load_file(copied / "b.safetensors") | {"model.embed_tokens.weight": torch.zeros(512, 64)}
    save_file(both, copied / "b.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match="tensor model.embed_tokens.weight is in a.safetensors and in b.safetensors",
    ):
        check(copied)


def test_odd_but_whole_checkpoints_are_opened_as_ever(copied):
    expected = load_model(copied)(torch.arange(9)[None]).logits
    edit(
        copied / "config.json",
        architectures=...,
        _attn_implementation="flash_attention_2",
        quantization_config=None,
    )
    rewrite(
        copied,
        lambda w: (
            {k.removeprefix("model."): v for k, v in w.items()}
            | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
        ),
    )
    assert read_config(copied)["architectures"] == ["LlamaForCausalLM"]
    torch.testing.assert_close(
        load_model(copied)(torch.arange(9)[None]).logits, expected, rtol=0, atol=0
    )
    assert checkpoint_head(copied).weight_VH.shape == (512, 64) and head_place(copied) == [
        "embed_tokens.weight"
    ]


def test_a_path_that_is_no_utf8_is_named_as_what_it_is(tiny_teacher, tmp_path):
    folder = os.fsencode(tmp_path) + b"/m\xff"
    shutil.copytree(os.fsencode(tiny_teacher), folder)
    with pytest.raises(ValueError, match="its path is not UTF-8.* other names"):
        check(Path(os.fsdecode(folder)))


def test_positions_that_are_no_numbers_are_refused_when_it_is_loaded(copied):
    edit(copied / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 0.0})
    with pytest.raises(
        ValueError, match=r"config.json makes a table of no finite .*inv_freq.*rope"
    ):
        load_model(copied)


def test_a_header_that_another_reader_refuses_is_refused_by_file(copied):
    file = copied / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for changed, told in (
        (header | {"__metadata__": {"format": 5}}, "__metadata__ is no table of texts"),
        (header | {"\ud83d": header["model.norm.weight"]}, "entry for .* makes no sense"),
    ):
        text = json.dumps(changed).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        with pytest.raises(ValueError, match=f"model.safetensors: the header's {told}"):
            check(copied)


def test_an_equal_head_beside_tied_embeddings_is_no_other_head(copied):
    rewrite(copied, lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()})
    rewrite(copied, lambda w: w | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    params = size(copied)["params"]
    assert params == load_model(copied).num_parameters()


FAMILIES = [
    ("GPT2", {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    ("GPTNeoX", {k: v for k, v in COMMON.items() if k != "num_key_value_heads"}),
    ("Falcon", {k: v for k, v in FEW.items() if k != "max_position_embeddings"}),
    ("Gemma2", COMMON | {"head_dim": 16, "sliding_window": 24, "final_logit_softcapping": 5.0}),
    ("Granite", COMMON | {"logits_scaling": 8.0}),
    ("HyperCLOVAX", COMMON | {"logits_scaling": 0.125}),
    ("Cohere", COMMON | {"logit_scale": 0.0625}),
    ("NanoChat", COMMON),
    ("Olmoe", COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    ("Phi", COMMON),
    (
        "RecurrentGemma",
        COMMON | {"logits_soft_cap": 0.5, "block_types": ["recurrent", "attention"]},
    ),
    (
        "MiniCPM3",
        COMMON
        | {
            "dim_model_base": 8,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
        },
    ),
]


@pytest.mark.parametrize(("name", "config"), FAMILIES, ids=[name for name, _ in FAMILIES])
def test_every_family_is_scored_by_its_own_logits(tiny_teacher, tmp_path, name, config):
    folder = family(tmp_path, tiny_teacher, name, **config)
    model = load_model(folder)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(ids).logits[0]
        got = checkpoint_head(folder).logits(hidden_states(model, ids))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    about = read_config(folder)
    assert (about["hidden_size"], about["num_hidden_layers"]) == (32, 2)
    assert meta_model(about).num_parameters() == model.num_parameters() == size(folder)["params"]


def test_a_cap_that_config_json_leaves_to_its_familys_default_is_followed(tiny_teacher, tmp_path):
    folder = family(tmp_path, tiny_teacher, "Gemma2", **COMMON, head_dim=16)
    edit(folder / "config.json", final_logit_softcapping=...)
    assert (
        checkpoint_head(folder).softcap == load_model(folder).config.final_logit_softcapping == 30.0
    )


def test_a_family_that_scales_logits_by_a_key_of_its_own_is_refused_not_scored_wrong(
    copied, monkeypatch
):
    forward = transformers.LlamaForCausalLM.forward

    def scaled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = out.logits * self.config.logits_factor
        return out

    edit(copied / "config.json", logits_factor=3.0)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", scaled)
    with pytest.raises(
        ValueError, match="hidden states times head are not the logits of a llama model"
    ):
        check(copied)  # the key says that it must be loaded to see


def test_a_model_that_sees_what_comes_after_is_refused(tiny_teacher, tmp_path):
    few = {
        key: value
        for key, value in COMMON.items()
        if key not in ("num_key_value_heads", "initializer_range")
    }
    folder = family(tmp_path, tiny_teacher, "Bert", **few)
    with pytest.raises(
        ValueError,
        match=(
            "see what comes after them|are not the logits of a bert model|can't be run as a decoder"
        ),
    ):
        load_model(folder)


@pytest.mark.parametrize("sees_ahead", [True, False])
def test_a_model_may_round_by_length_but_not_see_ahead(tiny_teacher, monkeypatch, sees_ahead):
    forward = transformers.LlamaModel.forward

    def scaled(self, input_ids, *args, **kwargs):
        out = forward(self, input_ids, *args, **kwargs)
        tail = int(input_ids[0, -1]) if sees_ahead else input_ids.shape[1]
        out.last_hidden_state = out.last_hidden_state * (1 + 0.1 * (tail % 7))
        return out

    model = load_model(tiny_teacher)
    monkeypatch.setattr(transformers.LlamaModel, "forward", scaled)
    if sees_ahead:
        with pytest.raises(ValueError, match="see what comes after them"):
            check_forward(tiny_teacher, model)
    else:
        check_forward(tiny_teacher, model)


def test_a_directory_is_looked_at_again_when_its_files_change(copied, monkeypatch):
    looks = []
    monkeypatch.setattr(checkpoint, "check_weights", lambda path: looks.append(path) or True)
    check(copied)
    check(copied)
    assert len(looks) == 1
    rewrite(copied, lambda w: w)
    check(copied)
    assert len(looks) == 2


def test_ids_with_gaps_are_counted_by_the_highest(copied):
    state = json.loads((copied / "tokenizer.json").read_text())
    added = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    state["added_tokens"].append({"id": 601, "content": "<|end|>"} | added)
    state["model"]["vocab"]["<|end|>"] = 601
    (copied / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = load_tokenizer(copied)
    assert (len(tokenizer), token_count(tokenizer)) == (513, 602)
    with pytest.raises(
        ValueError, match="the tokenizer has ids up to 601, the model embeds 512 tokens"
    ):
        check_tokens(copied, tokenizer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        '{"version": "1.0"}',
        "[]",
        '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}',
    ],
)
def test_a_damaged_tokenizer_is_refused_by_its_folder(copied, text):
    (copied / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=str(copied)) as caught:
        load_tokenizer(copied)
    assert "\n" not in str(caught.value)


def test_additional_chat_templates_travel_with_the_tokenizer(copied, tmp_path):
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "out").mkdir()
    copy_beside(copied, tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template.keys() == {"default", "tool_use"}


@pytest.mark.parametrize(
    ("name", "config"),
    [("GPT2", FAMILIES[0][1]), ("Olmoe", COMMON | {"num_experts": 4, "num_experts_per_tok": 2})],
)
def test_matrices_that_no_file_can_hold_are_refused_before_work(
    tiny_teacher, tmp_path, name, config
):
    folder = family(tmp_path, tiny_teacher, name, **config)
    export = SimpleNamespace(files=["compressed_tensors"])
    recipe = SimpleNamespace(
        steps=lambda: [("round", "teacher")],
        stages={"round": Ptq(grid=GridName.int8)},
        export=export,
        shipped_slot=lambda: "round",
    )
    session: Any = SimpleNamespace(recipe=recipe, teacher=SimpleNamespace(path=folder))
    with pytest.raises(
        ValueError, match="compressed_tensors: .* belongs to no Linear or Embedding"
    ):
        check_shapes(session)
    export.files = []
    assert check_shapes(session)["round"]["hidden_size"] == 32


def test_what_no_student_could_bring_into_a_gguf_is_refused_of_the_teacher(tiny_teacher, tmp_path):
    gguf.check_teacher(tiny_teacher)
    folder = family(
        tmp_path, tiny_teacher, "Llama", **COMMON, mlp_bias=True, tie_word_embeddings=True
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    export = SimpleNamespace(files=["gguf:Q4_0"])
    recipe = SimpleNamespace(steps=list, stages={}, export=export, shipped_slot=lambda: "teacher")
    session: Any = SimpleNamespace(recipe=recipe, teacher=SimpleNamespace(path=folder))
    with pytest.raises(ValueError, match="hidden_act 'gelu' can't be written as a GGUF of llama"):
        check_shapes(session)
    (folder / "config.json").write_text(json.dumps(config))
    check_shapes(session)
    state = json.loads((folder / "tokenizer.json").read_text()) | {
        "pre_tokenizer": {"type": "Whitespace"}
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match="pre-tokenizer .*Whitespace.* is not known to be one of llama.cpp's"
    ):
        check_shapes(session)
