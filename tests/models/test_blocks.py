"""The table of decoders is true of transformers' own models, and nobody else names their parts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_families as tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from compress.distill.taps import tapped
from compress.models.blocks import (
    ROWS,
    Quirk,
    Row,
    Work,
    blocks_of,
    blocks_prefix,
    final_norm,
    inputs_of,
    named,
    outputs_of,
    qkv_of,
    row_for,
    row_of,
)
from compress.models.checkpoint import head_dim
from compress.models.walk import Walk

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(3, 15)[None]


def _row(architecture: str) -> Row:
    return next(row for row in ROWS if row.architecture == architecture)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.architecture)
def test_parts_are_where_a_row_says(row):
    model = tiny.model_of(row.architecture)
    assert row_of(model) is row
    assert model.get_submodule(row.embedding) is model.get_input_embeddings()
    assert model.get_submodule(row.head) is model.get_output_embeddings()
    assert model.get_submodule(row.blocks) is blocks_of(model)
    assert blocks_prefix(model) == f"{row.blocks}."
    with torch.no_grad():
        last = model.get_decoder()(IDS).last_hidden_state
        norm, given = final_norm(model, IDS), []
        norm.register_forward_hook(lambda _, args, out: given.append(out))
        model(IDS)
    assert norm is model.get_submodule(row.norm)
    torch.testing.assert_close(given[0], last)

    # Attention: every output of q, k and v once, as many as heads need.
    block = blocks_of(model)[0]
    config, width = model.config, head_dim(model.config)
    parts = qkv_of(row, block, width)
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    kv_heads = config.num_attention_heads if row.by_head or row.transposed else kv_heads
    heads = (config.num_attention_heads, kv_heads, kv_heads)
    assert [len(part.rows_K) for part in parts] == [width * count for count in heads]
    assert inputs_of(block.get_submodule(row.o)) == len(parts[0].rows_K)
    rows = sorted((id(part.linear), int(one)) for part in parts for one in part.rows_K)
    outputs = {id(part.linear): outputs_of(part.linear) for part in parts}
    assert rows == sorted((key, one) for key, count in outputs.items() for one in range(count))
    assert isinstance(parts[0].linear, Conv1D if row.transposed else nn.Linear)

    # Norms: all that a block has, and no other.
    norms = {name for name, module in block.named_children() if "Norm" in type(module).__name__}
    assert norms == {name for name in (row.attention_norm, row.ffn_norm) if name} | {
        *row.norms_behind
    }
    over = {name: len(module.weight) for name, module in block.named_modules() if "q_norm" in name}
    sizes = {"": set(), "head": {width}, "all": {len(parts[0].rows_K)}}
    assert set(over.values()) == sizes[row.qk_norm]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.architecture)
def test_ffns_are_as_a_row_says(row):
    model = tiny.model_of(row.architecture)
    block = blocks_of(model)[1]
    if row.router:
        experts, name = row.down.rsplit(".", 1)
        assert getattr(block.get_submodule(experts), name).dim() == 3
        assert block.get_submodule(row.router).weight.shape == (4, 64)
        assert all(row.reason(work) for work in (Work.width, Work.fold))
        config = model.config.to_dict()
        assert {config[key] for key in row.experts_keys if key in config} == {4}
        assert config[row.top_k_key] == 2 and not row.reason(Work.experts)
        return
    assert row.reason(Work.experts) and not row.experts_keys
    makers = [block.get_submodule(name) for name in row.gate_up]
    down = block.get_submodule(row.down)
    assert (
        sum(map(outputs_of, makers))
        == (2 if row.gated else 1) * inputs_of(down)
        == (256 if row.gated else 128)
    )

    # Up is the half that no activation bends: twice the ups are twice the FFN's inputs.
    if row.gated:
        given = []
        down.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        with torch.no_grad():
            model(IDS)
            up = makers[-1].weight
            up[-inputs_of(down) :] *= 2
            model(IDS)
        torch.testing.assert_close(given[1], 2 * given[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.architecture)
def test_quirks_are_those_of_the_family(row):
    model, default = tiny.model_of(row.architecture), type(tiny.config_of(row.architecture))()
    walk = Walk(model, IDS, device=torch.device("cpu"))
    q = qkv_of(row, walk.blocks[0], head_dim(model.config))[0].linear
    plain = model.get_input_embeddings().weight[IDS]
    positions = "wpe" in dict(model.get_decoder().named_children())
    quirks = {
        Quirk.tied: default.tie_word_embeddings,
        Quirk.windows: hasattr(default, "sliding_window"),
        Quirk.softcaps: hasattr(default, "final_logit_softcapping"),
        Quirk.biases: q.bias is not None,
        Quirk.embedding_scale: not positions and not torch.equal(walk.states[0], plain),
        Quirk.no_rope: hasattr(default, "no_rope_layers"),
        Quirk.parallel: getattr(default, "use_parallel_residual", False),
    }
    assert {quirk for quirk, there in quirks.items() if there} == set(row.quirks) - {
        Quirk.rope_scaling
    }
    if row.residual_key:
        assert getattr(model.config, row.residual_key) == 0.5
    assert all(hasattr(default, key) for key in (row.width_key, *row.numbered_keys))


def test_the_names_of_parts_are_in_one_file():
    """Formats keep the names of their own."""
    parts = {"self_attn", "mlp"}
    for row in ROWS:
        paths = (*row.qkv, row.o, *row.gate_up, row.down, row.norm, row.embedding)
        parts |= {path.rsplit(".", 1)[-1] for path in paths} - {"norm", "experts"}
        parts.add(row.architecture)
    word = re.compile(rf"[\"'.]({'|'.join(map(re.escape, parts))})\b|model\.layers\b")
    readers = {}
    for file in sorted((ROOT / "compress").rglob("*.py")):
        place = str(file.relative_to(ROOT / "compress"))
        if place == "models/blocks.py" or place.startswith("formats/"):
            continue
        if hits := set(word.findall(file.read_text())):
            readers[place] = hits

    # What a message gives as an example.
    assert readers == {"models/model_config.py": {"LlamaForCausalLM"}}


def test_a_config_without_a_row_is_refused_with_those_that_can():
    message = "architecture BloomForCausalLM can't be pruned of heads: needed is a row .*; allowed"
    with pytest.raises(ValueError, match=message) as refusal:
        row_for({"architectures": ["BloomForCausalLM"]}, Work.heads)
    allowed = str(refusal.value).rsplit("allowed are ", 1)[1].split(", ")
    assert allowed == [row.architecture for row in ROWS if not row.no_heads]
    assert named({"model_type": "bloom"}) is None
    assert row_for({"architectures": ["Olmo2ForCausalLM"]}, Work.width) is _row("Olmo2ForCausalLM")


@pytest.mark.parametrize("architecture", ["Phi3ForCausalLM", "GPTNeoXForCausalLM"])
def test_q_k_and_v_out_of_a_fused_projection_are_those_of_attention(architecture, monkeypatch):
    """As attention itself receives them, before positions turn q and k."""
    model, seen_by_attention = tiny.model_of(architecture), []
    module = __import__(type(model).__module__, fromlist=["apply_rotary_pos_emb"])
    turn = module.apply_rotary_pos_emb

    def noted(q, k, *rest, **given):
        seen_by_attention.append((q, k))
        return turn(q, k, *rest, **given)

    monkeypatch.setattr(module, "apply_rotary_pos_emb", noted)
    with torch.no_grad(), tapped(model, [], [1]) as seen:
        model(IDS)
    for name, heads in zip("qk", seen_by_attention[1], strict=True):
        torch.testing.assert_close(seen[f"{name}1"], heads.transpose(1, 2).flatten(2))
    fused = blocks_of(model)[1].get_submodule(_row(architecture).qkv[0])
    assert sum(seen[f"{name}1"].shape[-1] for name in "qkv") == fused.out_features


WALKED = [*tiny.OTHERS, "GPT2LMHeadModel", "OlmoeForCausalLM"]
WALKED.remove("BloomForCausalLM")


@pytest.mark.parametrize("architecture", WALKED)
def test_text_walks_through_blocks_that_get_positional_arguments_or_give_tuples(architecture):
    model = tiny.model_of(architecture)
    if architecture == "GPT2LMHeadModel":
        model.set_attn_implementation("eager")  # with a mask, behind the states
    ids = torch.randint(3, 500, (5, 12), generator=torch.Generator().manual_seed(0))
    walk = Walk(model, ids, device=torch.device("cpu"))
    for index in range(len(walk.blocks)):
        walk.advance(index)
    with torch.no_grad():
        expected = model.get_decoder()(ids, use_cache=False).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(walk.final_states(), expected, rtol=1e-4, atol=1e-4)


def test_blocks_that_receive_something_of_each_row_are_refused():
    model = tiny.model_of("BloomForCausalLM")
    with pytest.raises(ValueError, match="BloomForCausalLM receive something of each row besides"):
        Walk(model, IDS.expand(3, -1), device=torch.device("cpu"))
