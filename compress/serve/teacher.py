"""The larger model behind the student, over the network that the user named: timed, counted, and
left alone for a while when it keeps failing.

Its answer is taken whole before a client gets any of it: a stream that broke off in the middle
could not be taken back, and no request may fail because the teacher does.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from typing import Any, NamedTuple

import aiohttp

from compress.serve.asked import LLAMA, Asked
from compress.serve.reply import event
from compress.serve.settings import TeacherSettings
from compress.serve.student import DONE, TAIL_BYTES, Tokens, tokens_in

HOUR = 3600.0
FAILURES = 3  # one after another, and it is left alone
PAUSE_SECONDS = 30.0
ANSWER_BYTES = 16_000_000


class Unavailable(Exception):
    """No answer of the teacher, and why: budget, paused, slow, down, refused."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class Answer(NamedTuple):
    """A whole answer as a client gets it: JSON, or a stream of events."""

    body: bytes
    tokens: Tokens


class Teacher:
    """An OpenAI-compatible model at `settings.url`."""

    def __init__(self, settings: TeacherSettings) -> None:
        self.settings = settings
        self._model = settings.model
        self._calls: deque[float] = deque()
        self._failures = 0
        self._paused_until = 0.0
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    async def answer(self, asked: Asked) -> Answer:
        """The teacher's answer to a request, within its time. Unavailable, with the reason."""
        self._check()
        self._calls.append(time.monotonic())
        try:
            answer = await self._answer(asked)
        except TimeoutError as error:
            self._failed()
            raise Unavailable("slow") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            self._failed()
            raise Unavailable("down") from error
        except (ValueError, KeyError, IndexError, TypeError) as error:
            self._failed()
            raise Unavailable("refused") from error
        self._failures = 0
        return answer

    def _check(self) -> None:
        """Unavailable while it is left alone, or over its budget."""
        now = time.monotonic()
        if now < self._paused_until:
            raise Unavailable("paused")
        while self._calls and now - self._calls[0] > HOUR:
            self._calls.popleft()
        if self.settings.budget is not None and len(self._calls) >= self.settings.budget:
            raise Unavailable("budget")

    def _failed(self) -> None:
        self._failures += 1
        if self._failures >= FAILURES:
            self._paused_until = time.monotonic() + PAUSE_SECONDS

    async def _answer(self, asked: Asked) -> Answer:
        """ValueError: it refuses, or says what no such server says."""
        async with asyncio.timeout(self.settings.timeout):
            if self._model is None:
                listed = json.loads(await self._read("GET", "/models", None))
                self._model = str(listed["data"][0]["id"])
            data = await self._read("POST", asked.path.removeprefix("/v1"), self._body(asked))

        # The end of a stream, or a whole object.
        tokens = tokens_in(data[-TAIL_BYTES:])
        if not asked.stream:
            if not isinstance(json.loads(data), dict):
                raise ValueError("no JSON object")
            return Answer(data, tokens)
        if DONE not in data[-TAIL_BYTES:]:
            raise ValueError("the stream has no end")
        return Answer(data if asked.usage else _without_usage(data), tokens)

    def _body(self, asked: Asked) -> dict[str, Any]:
        """The request in keys that any such server knows."""
        body = {name: value for name, value in asked.body.items() if name not in LLAMA}
        body["model"] = self._model
        if asked.stream:
            body["stream_options"] = {"include_usage": True}
        return body

    async def _read(self, method: str, path: str, body: dict[str, Any] | None) -> bytes:
        """The bytes of a response. ValueError: an error, or too long."""
        key = self.settings.key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None))
        url = self.settings.url.rstrip("/") + path

        # A redirect would take prompt and key to where the user did not send them.
        async with self._session.request(
            method, url, json=body, headers=headers, allow_redirects=False
        ) as response:
            if response.status != 200:
                raise ValueError(f"status {response.status}")
            data = await response.content.read(ANSWER_BYTES)
            pieces = [data]
            length = len(data)
            while data:
                data = await response.content.read(ANSWER_BYTES)
                pieces.append(data)
                length += len(data)
                if length > ANSWER_BYTES:
                    raise ValueError(f"more than {ANSWER_BYTES:,} bytes")
        return b"".join(pieces)


def _without_usage(data: bytes) -> bytes:
    """A stream without the event of its usage, for which the client did not ask."""
    kept = []
    for line in data.split(b"\n"):
        text = line.removeprefix(b"data: ").strip()
        if not text.startswith(b"{"):
            if text == b"[DONE]":
                kept.append(b"data: [DONE]\n\n")
            continue
        chunk = json.loads(text)
        if chunk.get("choices") or "error" in chunk:
            chunk.pop("usage", None)
            kept.append(event(chunk))
    return b"".join(kept)
