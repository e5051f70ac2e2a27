"""Tokens and windows are lm-eval's; numpy's arithmetic is torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from compress.formats.gguf_head import GgufHead
from compress.models.checkpoint import load_model
from compress.models.head import Head
from compress.models.tokenizer import load_tokenizer
from compress.score.likelihood import ArrayReadout, windows
from compress.score.lm import TorchReadout, torch_lm


@pytest.mark.parametrize("count", [0, 1, 6, 7, 8, 14, 15, 40])
def test_windows_are_those_of_lm_eval(count):
    ids = list(range(100, 100 + count))
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 9, 7, 1))
    assert list(windows(ids, 9, 7)) == [(list(context), list(part)) for context, part in theirs]


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("the language", " is"),
        ("the language ", "is"),
        ("a line\n\n", "another"),
        ("  ", "after spaces"),
        ("", "nothing before"),
        ("", "<|im_start|>user"),
        ("<|im_start|>user\nHi", " there"),
    ],
)
def test_pairs_are_cut_as_lm_eval_cuts_them(tiny_teacher, context, answer):
    lm = torch_lm(load_model(tiny_teacher), load_tokenizer(tiny_teacher), 4, 64)
    asked = []

    class Theirs(TemplateLM):
        """Their own way from text to ids."""

        tokenizer, eot_token_id, prefix_token_id = lm.tokenizer, lm.eot_token_id, 1
        tok_encode = staticmethod(lm.tok_encode)

        def __init__(self):
            super().__init__()

        def _loglikelihood_tokens(self, requests, **_):
            asked.extend(requests)
            return []

        def loglikelihood_rolling(self, requests, **_): ...

        def generate_until(self, requests, **_): ...

    class Request:
        args = (context, answer)

    Theirs().loglikelihood([Request])
    [(_, context_ids, answer_ids)] = asked
    assert lm.likelihoods.pair_ids(context, answer) == (context_ids, answer_ids)


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0)])
def test_both_readouts_say_the_same(scale, softcap):
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(301, 16)).astype("float32")
    bias = generator.normal(size=301).astype("float32")
    hidden = [generator.normal(size=(n, 16)).astype("float32") for n in (70, 5, 130)]
    spots = generator.integers(0, 205, 300)
    answers = generator.integers(0, 301, 300)

    ours = ArrayReadout(GgufHead(weight, bias, scale, softcap).logits)
    head = Head(torch.from_numpy(weight), torch.from_numpy(bias), scale, softcap)
    logprob, first = ours.answers(hidden, spots, answers)
    other, other_first = TorchReadout(head).answers(
        list(map(torch.from_numpy, hidden)), spots, answers
    )
    assert np.allclose(logprob, other, rtol=1e-5, atol=1e-5) and (first == other_first).all()

    # An oracle in float64.
    z = (np.concatenate(hidden).astype(float) @ weight.T + bias) * scale
    z = softcap * np.tanh(z / softcap) if softcap else z
    truth = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert np.allclose(logprob, truth[spots, answers], atol=1e-4)
