"""Answers in batches that rows leave are those of transformers' loop, a prompt by itself."""

from __future__ import annotations

import pytest
import tiny_families as tiny
import torch

from compress.formats import torch_decoding
from compress.formats.torch_decoding import Prompts

# Of each kind of cache: plain, of windows, without told positions, of states.
FAST = ("llama", "gemma3_text", "gpt2", "bloom", "lfm2", "qwen3_moe")
FAMILIES = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in tiny.TINY
]
OPENING = [1, 5, 9, 13, 17, 3]
PROMPTS = [OPENING + [20 + 7 * i % 11] * (1 + i % 5) for i in range(11)]
N = 20


def model_of(name):
    """Without an end of its own."""
    model = tiny.model_of(name)
    model.generation_config.eos_token_id = None
    return model


def alone(model, ids):
    """By transformers' own loop."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, max_new_tokens=N, do_sample=False, pad_token_id=0)
    return out[0, len(ids) :].tolist()


def together(model, prompts):
    answers = {}
    for numbers, inputs in Prompts(model, prompts, pad=0, together=4).batches(N):
        length = inputs["input_ids"].shape[1]
        out = model.generate(**inputs, max_new_tokens=N, do_sample=False, pad_token_id=0)
        answers |= dict(zip(numbers, out[:, length:].tolist(), strict=True))
    return [answers[i] for i in range(len(prompts))]


def cut(row, ends):
    """Up to the first end token, with it."""
    end = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: end + 1]


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_of_a_batch_are_those_of_each_prompt_alone(name):
    model = model_of(name)
    endless = [alone(model, ids) for ids in PROMPTS]

    # Ends at different places: a token in the middle of some answers.
    ends = [endless[0][3], endless[4][9]]
    model.generation_config.eos_token_id = ends
    expected = [cut(row, ends) for row in endless]
    assert len({len(row) for row in expected}) > 1

    assert [cut(row, ends) for row in together(model, PROMPTS)] == expected


def test_a_penalty_sees_no_padding():
    model = model_of("llama")
    model.generation_config.repetition_penalty = 1.5
    endless = [alone(model, ids) for ids in PROMPTS]
    ends = [endless[0][3], endless[4][9]]
    model.generation_config.eos_token_id = ends
    expected = [cut(row, ends) for row in endless]
    assert [cut(row, ends) for row in together(model, PROMPTS)] == expected
    assert endless != [alone(model_of("llama"), ids) for ids in PROMPTS]


def test_work_is_left_out_only_where_the_cache_allows_it():
    kinds = {}
    for name in FAST:
        [(_, inputs), *others] = list(Prompts(model_of(name), PROMPTS, 0, 4).batches(N))
        kinds[name] = "past_key_values" in inputs, "custom_generate" in inputs, 1 + len(others)
    shared, whole, left_alone = (True, True, 1), (False, True, 1), (False, False, 3)
    assert kinds == {
        "llama": shared,
        "gemma3_text": whole,
        "gpt2": shared,
        "bloom": whole,
        "lfm2": left_alone,
        "qwen3_moe": shared,
    }


def test_a_row_that_has_ended_is_not_computed_any_more():
    model = model_of("llama")
    first = alone(model, PROMPTS[0])
    model.generation_config.eos_token_id = first[0]

    rows = []
    hook = model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(out.logits)), with_kwargs=True
    )
    answers = together(model, [PROMPTS[0], PROMPTS[3]])
    hook.remove()
    assert answers[0][0] == first[0]
    assert rows[:3] == [1, 2, 1]  # the opening, both prompts, the one that goes on


def test_a_batch_stays_within_its_cache(monkeypatch):
    model = model_of("llama")
    layers, heads, width, fp32 = 3, 2, 16, 4
    longest = max(map(len, PROMPTS)) + N
    monkeypatch.setattr(
        torch_decoding, "CACHE_BYTES", 5 * longest * layers * 2 * heads * width * fp32
    )
    sizes = [len(numbers) for numbers, _ in Prompts(model, PROMPTS, 0, 4).batches(N)]
    assert sizes == [5, 5, 1]


def test_one_prompt_has_a_token_left_to_compute():
    model = model_of("llama")
    assert together(model, PROMPTS[:1]) == [alone(model, PROMPTS[0])]
    assert together(model, [[7]]) == [alone(model, [7])]
