"""The model behind the door: asked over the loopback, its answers passed through as bytes.

A stream is not parsed token by token: that would cost more than llama.cpp's own server takes for
it. Tokens are read from the last piece, where llama.cpp writes its timings.

A whole answer is asked for as a stream too, and put together when it has ended: of a stream
llama.cpp's server notices with the next token that nobody listens any more, else it looks once a
second. Answers whose parts are more than text (log-probabilities, calls of tools, forms) are left
to it whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import aiohttp

from compress.serve.asked import Asked, Refusal
from compress.serve.backend import Backend, Ready
from compress.serve.log import Entry
from compress.serve.reply import Reply

DONE = b"data: [DONE]"
MORE_THAN_TEXT = ("logprobs", "tools", "response_format")
TAIL_BYTES = 8192
# In JSON a quote within a text is written \": these can't be words of an answer.
COUNTS = {
    name: re.compile(rb'"' + name.encode() + rb'":\s*(\d+)')
    for name in ("prompt_tokens", "completion_tokens", "prompt_n", "cache_n", "predicted_n")
}


class Tokens(NamedTuple):
    """Of a prompt, and of its answer."""

    prompt: int
    answer: int


class Probe(NamedTuple):
    """The first tokens of an answer: their log-probabilities in nats, and all of the answer's body
    if it ended within them.
    """

    logprobs: list[float]
    tokens: Tokens
    body: dict[str, Any] | None


def tokens_in(tail: bytes) -> Tokens:
    """Tokens as the end of an answer states them: in its usage, else in llama.cpp's timings."""
    counts = {name: int(hits[-1]) for name, form in COUNTS.items() if (hits := form.findall(tail))}
    prompt = counts.get("prompt_n", 0) + counts.get("cache_n", 0)
    return Tokens(
        counts.get("prompt_tokens", prompt),
        counts.get("completion_tokens", counts.get("predicted_n", 0)),
    )


class Student:
    """A backend, asked over one `session`, a connection for each request: its server drops idle
    ones.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(force_close=True, limit=0),
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
            )
        return self._session

    def ready(self) -> Ready:
        """The backend, if it is there. Refusal: 503."""
        if self.backend.ready is None:
            raise Refusal(
                503,
                "model_not_ready",
                "the model's process ended and is being started again; try again in a moment",
                seconds=2,
            )
        return self.backend.ready

    @asynccontextmanager
    async def _asked(
        self, path: str, body: dict[str, Any]
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """The backend's response. Refusal: it is not there, ends meanwhile, or refuses."""
        ready = self.ready()
        headers = {"Authorization": f"Bearer {self.backend.key}"}
        url = ready.address + path
        try:
            async with self.session.post(url, json=body, headers=headers) as response:
                if response.status != 200:
                    raise _refusal(response.status, await response.read(), self.backend)
                yield response
        except aiohttp.ClientError as error:
            raise Refusal(
                502,
                "backend_ended",
                "the model's process ended while it answered; it is being started again: ask again"
                " in a moment",
                seconds=2,
            ) from error

    async def answer(self, asked: Asked, reply: Reply) -> None:
        """Passes the student's answer to the client. Refusal as `_asked`."""
        body = asked.body
        in_text = not asked.stream and not any(body.get(name) for name in MORE_THAN_TEXT)
        if in_text:
            body = body | {"stream": True, "stream_options": {"include_usage": True}}
        async with self._asked(asked.path, body) as response:
            if asked.stream:
                await self._stream(response, reply)
                return
            data = await response.read()
            if in_text and DONE not in data[-TAIL_BYTES:]:
                raise aiohttp.ClientPayloadError("the stream has no end")
        _count(reply.entry, tokens_in(data[-TAIL_BYTES:]))
        reply.whole(json.dumps(put_together(data)).encode() if in_text else data)

    async def _stream(self, response: aiohttp.ClientResponse, reply: Reply) -> None:
        """Bytes as they come."""
        previous = last = b""
        async for data in response.content.iter_any():
            await reply.piece(data)
            previous, last = last, data

        # A server that is killed can close a connection in order.
        tail = (previous + last)[-TAIL_BYTES:]
        _count(reply.entry, tokens_in(tail))
        if DONE not in tail:
            raise aiohttp.ClientPayloadError("the stream has no end")
        await reply.end()

    async def whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a body for the backend itself. Refusal as `_asked`."""
        async with self._asked(path, body) as response:
            answer: dict[str, Any] = json.loads(await response.read())
        return answer

    async def probe(self, asked: Asked, count: int) -> Probe:
        """The first `count` tokens of the answer, not sent to anybody. Refusal as `_asked`."""
        body = {k: v for k, v in asked.body.items() if k not in ("stream", "stream_options")}
        chat = asked.path.endswith("/chat/completions")
        body["max_tokens"] = min(count, asked.body["max_tokens"])
        body["logprobs"] = True if chat else 1
        if chat and self.backend.target.runtime == "llama.cpp":
            body["top_logprobs"] = asked.body.get("top_logprobs") or 1
        async with self._asked(asked.path, body) as response:
            data = await response.read()

        # An answer of so few tokens is the answer, without what the client did not ask for.
        answer = json.loads(data)
        choice = answer["choices"][0]
        logprobs = logprobs_of(choice)
        complete = choice.get("finish_reason") != "length" or count >= asked.body["max_tokens"]
        if complete and not asked.logprobs:
            choice.pop("logprobs", None)
        return Probe(logprobs, tokens_in(data[-TAIL_BYTES:]), answer if complete else None)


def put_together(data: bytes) -> dict[str, Any]:
    """The answer whose stream of events is `data`, as if it had been asked for whole."""
    answer: dict[str, Any] = {}
    message: dict[str, Any] = {}
    choice: dict[str, Any] = {"index": 0, "finish_reason": None}
    for line in data.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[len(b"data: ") :])
        answer |= {name: value for name, value in chunk.items() if name != "choices"}
        for part in chunk.get("choices", []):
            choice["finish_reason"] = part.get("finish_reason") or choice["finish_reason"]

            # Texts grow; a role is said once. llama.cpp says null where it has no text yet.
            texts = part["delta"] if "delta" in part else {"text": part.get("text")}
            for name, value in texts.items():
                if name == "role":
                    message["role"] = value
                else:
                    message[name] = message.get(name, "") + (value or "")

    # A chat's answer has a message, a completion's its text.
    if answer.get("object", "").startswith("chat.completion"):
        answer["object"] = "chat.completion"
        choice["message"] = {"role": "assistant", "content": ""} | message
    else:
        choice |= {"text": message.get("text", ""), "logprobs": None}
    return answer | {"choices": [choice]}


def logprobs_of(choice: dict[str, Any]) -> list[float]:
    """Nats of each token of an answer, in OpenAI's form of chats or of completions; [] without."""
    logprobs = choice.get("logprobs") or {}
    if "content" in logprobs:
        return [float(token["logprob"]) for token in logprobs["content"] or []]
    return [float(value) for value in logprobs.get("token_logprobs") or []]


def _count(entry: Entry, tokens: Tokens) -> None:
    entry.prompt_tokens, entry.answer_tokens = tokens


def _refusal(status: int, data: bytes, backend: Backend) -> Refusal:
    """What the backend's error means to a client."""
    try:
        error = json.loads(data)["error"]
        sentence = str(error["message"])
    except (ValueError, KeyError, TypeError):
        error, sentence = {}, f"the model's server answered with status {status}"
    if error.get("type") == "exceed_context_size_error":
        room = backend.ready.context if backend.ready else error.get("n_ctx", 0)
        return Refusal(
            400,
            "context_exceeded",
            f"the prompt has {error.get('n_prompt_tokens', 0):,} tokens,"
            f" {backend.target.name} has room for {room:,} with the answer; shorten it",
        )
    if 400 <= status < 500 and status not in (401, 403):
        return Refusal(400, "not_understood", sentence)
    return Refusal(502, "backend_failed", sentence)
