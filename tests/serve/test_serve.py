"""The door before a GGUF, by the `openai` client and by hand: answers, refusals, hang-ups, a killed
backend, metrics, the log, and the end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from served import FOREVER, KEY, Served, entries, tiny_gguf

CANARY = "canary-7f3a"
CHAT = "/v1/chat/completions"
# On a machine with nothing else to do a tenth of it is taken (scripts/bench_serve.py times it).
SECOND = 1.0 if os.getloadavg()[0] < (os.cpu_count() or 1) else 5.0


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def served(gguf):
    """Two at once, one that waits, answers of at most 20,000 tokens in 24,000 of context."""
    limits = ("--parallel", 2, "--queue", 1, "--max-tokens", 20_000, "--context", 24_000)
    server = Served(gguf, *limits)
    yield server
    server.end()


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, max_retries=0, timeout=60)


def turns(text="Hello"):
    return [{"role": "user", "content": text}]


def stream(client, tokens, **more):
    return client.chat.completions.create(
        model="tiny.gguf",
        messages=turns(),
        max_tokens=tokens,
        stream=True,
        extra_body=FOREVER,
        **more,
    )


# ------------------------------------------------------------------ answers


def test_a_chat_is_answered_whole_and_in_pieces_alike(served, client):
    whole = client.chat.completions.create(
        model=served.model, messages=turns(), max_tokens=12, extra_body=FOREVER
    )
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    events = list(stream(client, 12, stream_options={"include_usage": True}))
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert text == whole.choices[0].message.content and text
    assert events[-1].usage.completion_tokens == 12


def test_a_prompt_is_continued_whole_and_in_pieces_alike(served, client):
    asked = {"model": served.model, "prompt": "Once", "max_tokens": 9, "extra_body": FOREVER}
    whole = client.completions.create(**asked)
    pieces = client.completions.create(**asked, stream=True)
    assert "".join(e.choices[0].text for e in pieces if e.choices) == whole.choices[0].text
    assert whole.usage.completion_tokens == 9


def test_the_model_is_listed_by_the_name_that_it_is_asked_by(served, client):
    assert [model.id for model in client.models.list()] == [served.model] == ["tiny.gguf"]


def test_who_answered_and_a_name_for_the_request_are_in_the_headers(served):
    answer = served.post(CHAT, {"messages": turns(), "max_tokens": 2})
    assert answer["headers"]["x-compress-answered-by"] == "student"
    assert len(answer["headers"]["x-request-id"]) == 32


def test_an_answer_is_greedy_unless_a_temperature_is_given(served):
    body = {"messages": turns(), "max_tokens": 30} | FOREVER
    texts = {served.post(CHAT, body)["choices"][0]["message"]["content"] for _ in range(2)}
    drawn = served.post(CHAT, body | {"temperature": 1.5, "seed": 3})
    assert len(texts) == 1 and drawn["choices"][0]["message"]["content"] not in texts


# ----------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ({"messages": turns(), "max_tokens": 20_001}, 400, "answers in at most 20,000"),
        ({"messages": turns("a " * 30_000)}, 400, "has room for 24,"),
        ({"messages": turns(), "n": 2}, 400, "one answer a request"),
        ({"messages": turns(), "id_slot": 0}, 400, "'id_slot' is not known here"),
        ({"messages": turns(), "temperature": -1}, 400, "a number in [0, 2]"),
        ({"messages": []}, 400, "at least one message"),
        ({"messages": [{"role": "king", "content": "x"}]}, 400, "needs a 'role' of"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "only parts of the type 'text'",
        ),
        ({"messages": turns(), "model": "gpt-5"}, 404, "name 'tiny.gguf'"),
        ({"messages": turns("\ud83d")}, 400, "half a character"),
        (b"{", 400, "is not JSON"),
        (b"[" * 9000, 400, "nested too deep"),
        (b'{"messages": "\xff"}', 400, "not UTF-8"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(served, body, status, sentence):
    answer = served.post(CHAT, body)
    assert answer["status"] == status, answer
    assert sentence in answer["error"]["message"]


@pytest.mark.parametrize("key", [None, KEY[:-1], KEY + "x", ""])
def test_without_the_key_nobody_comes_in(served, key):
    for answer in (served.post(CHAT, {"messages": turns()}, key), served.post("/v1/x", {}, key)):
        assert answer["status"] == 401 and "Authorization: Bearer KEY" in answer["error"]["message"]
    assert json.loads(served.get("/healthz", None)) == {"status": "ok"}


def test_unknown_paths_methods_and_bodies_without_end_get_openai_errors(served):
    assert served.post("/v1/embeddings", {})["status"] == 404
    assert served.post("/v1/models", {})["status"] == 405
    assert served.post(CHAT, b" " * 5_000_000)["status"] == 413


def test_a_full_queue_is_429_and_says_when_to_come_again(served, client):
    streams = [stream(client, 15_000) for _ in range(2)]
    [next(iter(one)) for one in streams]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(served.post, CHAT, {"messages": turns(), "max_tokens": 1})
        served.until(lambda: served.figure("compress_waiting") == 1)
        refused = served.post(CHAT, {"messages": turns()})
        assert refused["status"] == 429 and refused["headers"]["Retry-After"] == "1"
        for one in streams:
            one.close()
        assert "choices" in waiting.result()


# --------------------------------------------------------- hang-ups and kills


@pytest.mark.parametrize("streams", [True, False])
def test_whoever_hangs_up_frees_its_slot_within_a_second(served, streams):
    """Both slots; then an answer is had at once, from llama.cpp's own slots too."""
    host, _, port = served.url.removeprefix("http://").partition(":")
    body = {"messages": turns(), "max_tokens": 20_000, "stream": streams} | FOREVER
    data = json.dumps(body)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    callers = []
    for _ in range(2):
        caller = socket.create_connection((host, int(port)))
        caller.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n{data}".encode())
        callers.append(caller)
    served.until(lambda: served.figure("compress_running") == 2)
    for caller in callers:
        caller.close()

    # llama.cpp's own two slots are free too, or the answer would wait for 20,000 tokens.
    start = time.perf_counter()
    served.until(lambda: served.figure("compress_running") == 0)
    assert "choices" in served.post(CHAT, {"messages": turns(), "max_tokens": 1})
    assert time.perf_counter() - start < SECOND


def test_a_killed_backend_is_told_of_answered_by_errors_and_started_again(gguf):
    server = Served(gguf, "--context", 16_000, "--max-tokens", 15_000)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    pieces = iter(stream(client, 15_000))
    next(pieces)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(server.post, CHAT, {"messages": turns(), "max_tokens": 9000} | FOREVER)
        server.until(lambda: server.figure("compress_running") == 2)
        os.kill(int(_child_of(server.process.pid)), signal.SIGKILL)
        with pytest.raises(openai.APIError, match="the model's process ended"):
            list(pieces)
        assert whole.result()["status"] == 502

    # Until it is there again, requests and health say so.
    answer = server.post(CHAT, {"messages": turns(), "max_tokens": 1})
    assert answer["status"] in (502, 503) and answer["headers"]["Retry-After"] == "2"
    server.until(lambda: server.figure("compress_ready") == 1, 30)
    assert "choices" in server.post(CHAT, {"messages": turns(), "max_tokens": 1})
    assert server.figure("compress_backend_restarts_total") == 1
    code, _, log = server.end()
    assert code == 0
    assert [row["status"] for row in entries(log, "backend_ended")] == [-9]
    assert sorted(row["end"] for row in entries(log) if row["end"] != "done")[0] == "backend_ended"


def _child_of(pid: int) -> str:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(children) == 1
    return children[0]


# ------------------------------------------------------------- figures and log


def test_figures_count_requests_tokens_and_seconds(gguf):
    server = Served(gguf, "--price", "1:2")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    list(stream(client, 10))
    server.post(CHAT, {"messages": turns(CANARY), "max_tokens": 5} | FOREVER)
    server.post(CHAT, {"messages": turns(), "key-" + CANARY: 1})
    server.post("/" + CANARY, {}, "wrong-key-" + CANARY)
    with pytest.raises(OSError):
        server.get("/metrics", None)

    page = server.get("/metrics")
    wrote = 'compress_tokens_total{by="student",kind="answer"}'
    read = server.figure('compress_tokens_total{by="student",kind="prompt"}')
    assert server.figure(wrote) == 15 and read > 20
    cost = server.figure('compress_cost_total{by="student"}')
    assert cost == pytest.approx((read + 2 * 15) / 1e6)
    assert server.figure('compress_first_byte_seconds_count{by="student"}') == 2
    assert server.figure("compress_running") == 0

    # The log has the same, and nothing of what was said.
    code, out, log = server.end()
    rows = entries(log)
    assert [(row["status"], row["end"]) for row in rows] == [
        (200, "done"),
        (200, "done"),
        (400, "not_understood"),
        (401, "wrong_key"),
        (401, "wrong_key"),
    ]
    assert [row["answer_tokens"] for row in rows[:2]] == [10, 5]
    assert rows[0]["stream"] and 0 < rows[0]["first"] < rows[0]["seconds"]
    assert code == 0
    for text in (page, out, log):
        assert CANARY not in text and KEY not in text


# ------------------------------------------------------------------- the end


def test_sigterm_finishes_what_runs_and_takes_nothing_new(gguf):
    server = Served(gguf, "--context", 9000, "--max-tokens", 8000)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    pieces = iter(stream(client, 1500))
    next(pieces)
    os.killpg(os.getpgid(_child(server)), signal.SIGTERM)  # as a supervisor that signals all
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: _health(server) == 503)
    assert server.post(CHAT, {"messages": turns()})["status"] == 503
    finish = [e.choices[0].finish_reason for e in pieces if e.choices][-1]
    assert finish == "length"
    code, _, log = server.end()
    assert code == 0 and entries(log, "stopped")[0]["cut"] == 0


def _child(server):
    return int(_child_of(server.process.pid))


def _health(server):
    try:
        server.get("/healthz", None)
    except OSError as error:
        return getattr(error, "code", 0)
    return 200


@pytest.mark.slow
def test_a_second_signal_does_not_wait(gguf):
    server = Served(gguf, "--context", 30_000, "--max-tokens", 29_000)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    next(iter(stream(client, 29_000)))
    server.process.send_signal(signal.SIGTERM)
    server.until(lambda: _health(server) == 503)
    child = _child(server)
    start = time.perf_counter()
    code, _, log = server.end(signal.SIGINT)
    assert code == 0 and time.perf_counter() - start < 8
    assert entries(log, "stopped")[0]["cut"] == 1
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


@pytest.mark.slow
def test_a_door_that_is_killed_takes_the_model_with_it(gguf):
    server = Served(gguf)
    child = _child(server)
    server.end(signal.SIGKILL)

    def gone():
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{child}/stat").read_text().split()[2] == "Z"

    server.until(gone)


def test_time_that_is_out_is_504_and_frees_the_slot(gguf):
    limits = ("--timeout", 0.7, "--context", 30_000, "--max-tokens", 29_000, "--parallel", 1)
    server = Served(gguf, *limits)
    answer = server.post(CHAT, {"messages": turns()} | FOREVER)
    assert answer["status"] == 504 and "within 0.7 s" in answer["error"]["message"]
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    with pytest.raises(openai.APIError, match="no answer within"):
        list(stream(client, 29_000))
    assert server.figure("compress_running") == 0
    server.end()


def test_without_a_key_web_pages_are_not_answered(gguf):
    server = Served(gguf, "--no-key", key=None)
    body = {"messages": turns(), "max_tokens": 1}
    assert "choices" in server.post(CHAT, body, None)
    assert server.post(CHAT, body, None, Origin="http://evil.example")["status"] == 403
    assert server.post(CHAT, body, None, Host="evil.example")["status"] == 403
    server.end()
    assert "no key" in server.about


def test_many_at_once_are_each_answered_as_alone(served):
    alone = served.post(CHAT, {"messages": turns("Why?"), "max_tokens": 8} | FOREVER)
    results = []

    def ask():
        answer = {}
        while "choices" not in answer:
            answer = served.post(CHAT, {"messages": turns("Why?"), "max_tokens": 8} | FOREVER)
        results.append(answer["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(results) == 6 and alone["choices"][0]["message"]["content"] in results
