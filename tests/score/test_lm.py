"""compress/score/lm.py against lm-eval's own `hf` model on tiny random models, and the rows that
it lays sequences out in.
"""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from compress.models.checkpoint import load_model
from compress.models.tokenizer import load_tokenizer
from compress.score.lm import torch_lm
from compress.score.trie import KEYS, rows_of

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
ARCHITECTURES = {  # config, longest sequence that may branch off another one
    "llama": (LlamaConfig(**SIZES, **HEADS), 2**63 - 1),
    "window": (MistralConfig(**SIZES, **HEADS, sliding_window=24), 24),
    "gemma3": (Gemma3TextConfig(**SIZES, **HEADS, sliding_window=24, query_pre_attn_scalar=16), 24),
    "gpt2": (
        GPT2Config(
            vocab_size=512, n_embd=64, n_layer=3, n_head=4, n_positions=128, initializer_range=0.2
        ),
        2**63 - 1,
    ),
    "mamba": (MambaConfig(**SIZES, state_size=8), 0),
}
LONG = "one two three four five six seven eight nine ten, " * 30
STEM = (
    "Question: Which of these do plants make out of water, air and the light of the sun?\nAnswer:"
)
PAIRS = [
    *[
        (STEM, choice)
        for choice in (
            " sugar",
            " sugar and oxygen",
            " sugar and stone",
            " a",
            " b",
            " the light of the sun itself",
            " sugar",
        )
    ],
    *[("Example: yes\n\n" * 6 + STEM, choice) for choice in (" sugar", " stone", " air")],
    ("", "The keys is here."),
    ("", "The keys are here."),
    ("", "x"),
    ("<|im_start|>The", " keys"),
    ("It ends in spaces  ", "word"),
    ("It ends in a line\n", "word"),
    ("Je me", "me souviens"),
    (LONG + STEM, " sugar"),
    (LONG + STEM, " stone and sand"),
    (LONG, "b"),
    (LONG, "c"),
]


def asked(*pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


@pytest.fixture(scope="module")
def pair(tiny_teacher):
    """Ours and theirs over a config, one model each of the same weights."""

    def make(config, batch_size=8):
        torch.manual_seed(0)
        first, second = (
            AutoModelForCausalLM.from_config(config).eval(),
            AutoModelForCausalLM.from_config(config).eval(),
        )
        second.load_state_dict(first.state_dict())
        theirs = HFLM(
            pretrained=second,
            tokenizer=load_tokenizer(tiny_teacher),
            batch_size=4,
            max_length=128,
            device="cpu",
        )
        # 128: GPT-2 and Mamba name theirs otherwise or not at all.
        return torch_lm(first, load_tokenizer(tiny_teacher), batch_size, 128), theirs

    return make


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_likelihoods_are_those_of_hf(name, pair):
    config, reach = ARCHITECTURES[name]
    ours, theirs = pair(config)
    assert ours.runtime.reach == reach
    expected = theirs.loglikelihood(asked(*PAIRS), disable_tqdm=True)
    for (mine, greedy), (other, other_greedy), what in zip(
        ours.loglikelihood(asked(*PAIRS)), expected, PAIRS, strict=True
    ):
        assert mine == pytest.approx(other, abs=1e-3) and greedy == other_greedy, what
    assert len({round(loglik, 3) for loglik, _ in expected}) > len(PAIRS) - 3, (
        "requests that differ must differ in value"
    )


def test_a_greedy_continuation_is_known_as_one(pair):
    ours, theirs = pair(ARCHITECTURES["llama"][0])
    [text] = theirs.generate_until(
        asked((STEM, {"until": [], "max_gen_toks": 1})), disable_tqdm=True
    )
    requests = asked((STEM, text), (STEM, " sugar"))
    assert (
        [g for _, g in ours.loglikelihood(requests)]
        == [g for _, g in theirs.loglikelihood(requests, disable_tqdm=True)]
        == [True, False]
    )


def test_windows_over_long_documents_are_those_of_hf(pair):
    ours, theirs = pair(ARCHITECTURES["llama"][0])
    documents = asked((LONG,), ("Short.",), (LONG[:-7] + "!",), (STEM,))
    assert ours.loglikelihood_rolling(documents) == pytest.approx(
        theirs.loglikelihood_rolling(documents, disable_tqdm=True), abs=1e-3
    )


def test_written_answers_are_those_of_hf(pair):
    ours, theirs = pair(ARCHITECTURES["llama"][0])
    options = [
        {"until": ["."], "max_gen_toks": 12},
        {"until": ["e", "\n"], "max_gen_toks": 20, "do_sample": False},
        {"max_gen_toks": 5},
    ]
    requests = asked(
        *[
            (context, dict(options[i % 3]))
            for i, context in enumerate(
                [STEM, "a", LONG, "b c d", "Example:", LONG + "x", "The", "q", "zz"]
            )
        ]
    )
    got, expected = (
        ours.generate_until(requests),
        theirs.generate_until(requests, disable_tqdm=True),
    )
    assert got == expected and len(set(got)) > 4
    stop = got[2][2:4]
    assert ours.generate_until(asked((LONG, {"until": stop, "max_gen_toks": 5}))) == [
        got[2][: got[2].index(stop)]
    ]


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "temperature": 0.7}, {"num_beams": 4}, {"max_gen_toks": 500}]
)
def test_options_that_would_be_ignored_are_refused(options, pair):
    ours, _ = pair(ARCHITECTURES["llama"][0])
    with pytest.raises(
        ValueError, match="allowed: until, greedy decoding, and max_gen_toks below the 128 tokens"
    ):
        ours.generate_until(asked(("a", options)))


def test_an_answer_that_does_not_fit_is_refused(pair):
    ours, _ = pair(ARCHITECTURES["llama"][0])
    with pytest.raises(
        ValueError, match=r"an answer of \d+ tokens can't be scored; allowed: 1 to the model's 128"
    ):
        ours.loglikelihood(asked(("Say:", LONG)))


def test_answers_do_not_depend_on_the_batch_and_come_out_the_same_again(tiny_teacher):
    lms = [torch_lm(load_model(tiny_teacher), load_tokenizer(tiny_teacher), n) for n in (1, 8, 8)]
    one, eight, again = (lm.loglikelihood(asked(*PAIRS)) for lm in lms)
    assert eight == again
    assert [a for a, _ in one] == pytest.approx([a for a, _ in eight], abs=1e-4) and [
        g for _, g in one
    ] == [g for _, g in eight]


def test_the_models_own_type_is_kept(tiny_teacher):
    lm = torch_lm(load_model(tiny_teacher, torch.bfloat16), load_tokenizer(tiny_teacher), 8)
    full = torch_lm(load_model(tiny_teacher), load_tokenizer(tiny_teacher), 8)
    assert (
        lm.likelihoods.readout.head.weight_VH.dtype == torch.bfloat16
        and lm.runtime.reach == full.runtime.reach > 0
    )
    for (rounded, _), (exact, _) in zip(
        lm.loglikelihood(asked(*PAIRS)), full.loglikelihood(asked(*PAIRS)), strict=True
    ):
        assert rounded == pytest.approx(exact, rel=0.05, abs=0.5)


@pytest.mark.parametrize("reach", [0, 9, 10**9])
def test_rows_hold_every_prompt_behind_its_own_ancestors(reach):
    rng = random.Random(0)
    trunks = [[rng.randrange(5) for _ in range(rng.randrange(1, 30))] for _ in range(12)]
    prompts = [
        trunk + [rng.randrange(5) for _ in range(rng.randrange(1, 7))]
        for trunk in trunks
        for _ in range(4)
    ] + [trunks[0], trunks[0]]
    rows = rows_of(prompts, reach)
    found = {}
    for row in rows:
        for i, path, c in row.paths:
            assert [row.ids[node] for node in path] == prompts[i] and [
                row.depths[node] for node in path
            ] == list(range(len(prompts[i])))
            assert (
                all(a < b for a, b in zip(path, path[1:], strict=False))
                and (path[c:] == range(path[-1] + 1 - len(path[c:]), path[-1] + 1)).all()
            )
            found[i] = row
        if len(row.ids) > len(row.paths[-1][1]):
            assert max(row.depths) < reach, "a sequence above the reach shares a row with branches"
    assert found.keys() == set(range(len(prompts)))
    assert sum(len(row.ids) for row in rows) < sum(map(len, prompts))


def test_an_item_costs_its_stem_once_and_unlike_prompts_stay_apart():
    stem = list(range(100, 300))
    [row] = rows_of([stem + [1, 2, 3], stem + [1, 4], stem + [5], stem + [5]], 10**9)
    assert len(row.ids) == 200 + 3 + 1 + 1
    apart = [[i] + [7] * KEYS for i in range(3)]
    assert [len(row.ids) for row in rows_of(apart, 10**9)] == [KEYS + 1] * 3
    assert [len(row.ids) for row in rows_of([[1, 2], [1, 2, 3], [1, 2, 4]], 0)] == [3, 3]
