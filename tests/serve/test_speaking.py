"""torch and ONNX Runtime behind the door: the tokens that they give elsewhere, with their
log-probabilities, and OpenAI's forms.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from threading import Event

import pytest
import torch
from served import KEY

from compress.errors import ConfigError
from compress.formats.onnx import export_onnx
from compress.formats.runtimes import runtime_of
from compress.models.checkpoint import load_model
from compress.serve.engines import Sampling, Token, open_engine
from compress.serve.speaking import Piece, overlap, pieces, start
from compress.serve.student import logprobs_of, put_together, tokens_in

TURNS = [{"role": "user", "content": "Hello there"}]
CHAT, CONTINUED = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def models(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speaking") / "onnx"
    export_onnx(tiny_teacher, folder)
    return {"torch": tiny_teacher, "onnxruntime": folder}


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def engine(request, models):
    return (
        request.param,
        models[request.param],
        open_engine(request.param, models[request.param], 1),
    )


def test_tokens_are_those_that_the_runtime_gives_elsewhere(engine, models):
    name, path, opened = engine
    prompt = opened.prompt(TURNS)
    ids = opened.ids(prompt)
    drawn = list(opened.tokens(ids, 12, Sampling(), Event()))
    speaker = runtime_of(name).speaker(path, 1, 128, 1, "cpu")
    answer = speaker.answers([prompt], 12)[0]
    assert [token.id for token in drawn if token.id not in opened.ends] == answer.ids
    decode = opened.decoder()
    assert "".join(decode(i) for i in answer.ids).startswith(answer.text.rstrip("\ufffd")[:10])

    # Log-probabilities by the checkpoint itself, all positions at once.
    whole_1L = torch.tensor([[*ids, *(token.id for token in drawn)]])
    with torch.no_grad():
        logits_LV = load_model(models["torch"])(whole_1L).logits[0]
    for place, token in enumerate(drawn, len(ids)):
        expected = float(logits_LV[place - 1].log_softmax(-1)[token.id])
        assert token.logprob == pytest.approx(expected, abs=2e-3)


def test_a_seed_repeats_what_is_drawn_and_a_stop_ends_it(engine):
    _, _, opened = engine
    ids = opened.ids("Once upon a time")
    hot = Sampling(1.5, 0.99, 7)
    drawn = [[token.id for token in opened.tokens(ids, 8, hot, Event())] for _ in range(2)]
    assert drawn[0] == drawn[1] != [t.id for t in opened.tokens(ids, 8, Sampling(), Event())]
    stop = Event()
    given = []
    for token in opened.tokens(ids, 400, Sampling(), stop):
        given.append(token)
        if len(given) == 3:
            stop.set()
    assert len(given) <= 5


# -------------------------------------------------------------------- stop strings


class Spelling:
    """An engine that says a text, a token a letter."""

    ends = {0}

    def __init__(self, text):
        self.text = text

    def tokens(self, ids, n, sampling, stop):
        for letter in self.text[:n]:
            yield Token(ord(letter), -1.0)
        if n > len(self.text):
            yield Token(0, -1.0)

    def decoder(self):
        return chr


@pytest.mark.parametrize(
    ("text", "stop", "tokens", "said", "finish"),
    [
        ("one two", [], 99, "one two", "stop"),
        ("one two", [], 3, "one", "length"),
        ("one two", " two", 99, "one", "stop"),
        ("one twin", " two", 99, "one twin", "stop"),
        ("a\nb\n\nc", ["\n\n"], 99, "a\nb", "stop"),
        ("a b", ["b", "a"], 99, "", "stop"),
        ("end of th", ["the"], 9, "end of th", "length"),
    ],
)
def test_a_stop_string_is_never_sent_nor_half_of_it(text, stop, tokens, said, finish):
    body = {"max_tokens": tokens, "temperature": 0, "stop": stop}
    came = list(pieces(Spelling(text), [1], body, 1000, Event()))
    assert "".join(piece.text for piece in came) == said
    assert came[-1].finish == finish and all(piece.finish is None for piece in came[:-1])
    assert isinstance(came[0], Piece)


def test_what_may_become_a_stop_string_is_measured_from_its_beginning():
    assert [overlap("ab\n", "\n\n"), overlap("ab", "b"), overlap("xab", "abc")] == [1, 0, 2]


# ------------------------------------------------------------------------ HTTP


def ask(address, path, body, key=KEY):
    headers = {"Authorization": f"Bearer {key}"}
    request = urllib.request.Request(address + path, json.dumps(body).encode(), headers)
    try:
        return 200, urllib.request.urlopen(request, timeout=60).read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_answers_have_the_forms_that_the_door_reads(models, runtime):
    order = {"path": str(models[runtime]), "runtime": runtime, "name": "tiny", "key": KEY}
    order |= {"parallel": None, "context": 64, "threads": 1}
    ready = start(order)
    assert (ready["parallel"], ready["context"], ready["templated"]) == (1, 64, True)
    address = ready["address"]

    # Whole and in pieces, chats and prompts.
    for path, asked in ((CHAT, {"messages": TURNS}), (CONTINUED, {"prompt": "Once"})):
        body = asked | {"max_tokens": 6, "temperature": 0}
        status, data = ask(address, path, body | {"logprobs": True})
        answer = json.loads(data)
        assert status == 200 and answer["model"] == "tiny"
        counted = answer["usage"]["completion_tokens"]
        assert len(logprobs_of(answer["choices"][0])) == counted <= 6
        status, stream = ask(address, path, body | {"stream": True})
        choice = put_together(stream)["choices"][0]
        assert stream.endswith(b"data: [DONE]\n\n") and tokens_in(stream).answer == counted
        for part in ("message", "text", "finish_reason"):
            assert choice.get(part) == answer["choices"][0].get(part)

    # Beyond the context, to its edge, and without the key.
    status, data = ask(address, CONTINUED, {"prompt": "a b c " * 99, "max_tokens": 1})
    assert status == 400 and json.loads(data)["error"]["type"] == "exceed_context_size_error"
    status, data = ask(address, CONTINUED, {"prompt": "Why?", "max_tokens": 500, "temperature": 0})
    usage = json.loads(data)["usage"]
    assert usage["total_tokens"] <= 64 and usage["completion_tokens"] > 0
    assert ask(address, CHAT, {"messages": TURNS}, "another")[0] == 401


def test_what_such_a_model_cannot_is_refused_before_it_is_opened(models):
    order = {"path": str(models["torch"]), "runtime": "torch", "name": "x", "key": KEY}
    with pytest.raises(ConfigError, match="--parallel 2: torch answers one request at a time"):
        start(order | {"parallel": 2, "context": None, "threads": 1})
