"""Attention and norms for training on a CPU against the textbook in float64, values and gradients,
and inside transformers models.
"""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from compress.models.cpu_kernels import BLOCK, NAME, ROWS, _Blocks, _norm, _RMSNorm, use_cpu_kernels


def textbook(q, k, v, keep, scale):
    """softmax(scale Q K^T, where kept) V, with every KV head repeated."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    scores = (q @ k.transpose(2, 3) * scale).masked_fill(~keep, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "dim"),
    [(4, 4, 7, 8), (6, 2, BLOCK, 16), (3, 1, 2 * BLOCK + 5, 4), (2, 2, 1, 8)],
)
@pytest.mark.parametrize("documents", [False, True])
def test_equals_textbook_attention_in_float64_with_all_gradients(
    heads, kv_heads, length, dim, documents
):
    torch.manual_seed(0)
    shapes = [(2, h, length, dim) for h in (heads, kv_heads, kv_heads)]
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    keep = torch.ones(length, length, dtype=torch.bool).tril()
    if documents:  # a second document from the middle on
        keep[length // 2 :, : length // 2] = False
    mask = keep[None, None].expand(2, 1, -1, -1) if documents else None
    grad = torch.randn(shapes[0], dtype=torch.float64)
    out, expected = _Blocks.apply(*ours, mask, 0.3), textbook(*theirs, keep, 0.3)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, ROWS - 1, 2 * ROWS + 3])
def test_norm_equals_the_textbook_in_float64_with_both_gradients(tokens):
    torch.manual_seed(0)
    ours = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((tokens, 12), (12,))
    ]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    grad = torch.randn(tokens, 12, dtype=torch.float64)
    out = _RMSNorm.apply(*ours, 1e-3, torch.float64)
    expected = theirs[0] / (theirs[0].pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * theirs[1]
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-11)


def test_under_autocast_a_norm_gives_what_the_next_layer_would_round_it_to():
    norm, x = LlamaRMSNorm(32), torch.randn(2, 5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        made = _norm(norm, x)
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(
        made, norm(x).bfloat16(), rtol=2**-7, atol=0
    )  # at most a step of bf16 where fp32 sums differ


def models():
    """Plain, grouped heads with a sliding window shorter than the text, and learned positions."""
    common = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return [
        LlamaConfig(**common, num_key_value_heads=2),
        MistralConfig(**common, num_key_value_heads=2, sliding_window=5),
        GPT2Config(
            vocab_size=50,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=160,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
        ),
    ]


@pytest.mark.parametrize("config", models(), ids=lambda config: config.model_type)
@pytest.mark.parametrize("packed", [False, True])
def test_a_model_computes_the_same_with_it(config, packed):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    (
        model.double() if config.model_type == "gpt2" else None
    )  # norms of the others are fp32 whatever the model is
    ids = torch.randint(0, 50, (2, 150))
    positions = torch.cat([torch.arange(60), torch.arange(90)]).expand(2, -1) if packed else None

    def run():
        model.zero_grad()
        out = model(ids, position_ids=positions, labels=ids, use_cache=False)
        out.loss.backward()
        return out.logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    before = run()
    use_cpu_kernels(model)
    assert model.config._attn_implementation == NAME
    assert any(isinstance(m.__dict__.get("forward"), MethodType) for m in model.modules()) == (
        config.model_type != "gpt2"
    )
    for mine, theirs in zip(run(), before, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < (
            1e-12 if config.model_type == "gpt2" else 1e-6
        )


def test_generation_with_a_cache_falls_back_and_gives_the_same_tokens(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models()[0]).eval()
    prompt = torch.randint(0, 50, (1, 9))
    before = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    use_cpu_kernels(model)
    torch.testing.assert_close(
        model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0), before
    )
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()


def test_a_model_with_eager_attention_keeps_it():
    model = AutoModelForCausalLM.from_config(models()[0], attn_implementation="eager")
    use_cpu_kernels(model)
    assert model.config._attn_implementation == "eager"
