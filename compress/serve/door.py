"""The door: HTTP routes, who may come in, and what each request ends with.

    POST /v1/chat/completions, /v1/completions    OpenAI's, whole or as server-sent events
    GET  /v1/models                               the one model that is served
    GET  /healthz                                 200 while it answers, 503 otherwise; needs no key
    GET  /metrics                                 for Prometheus

A request ends with its answer, or with an error in OpenAI's form: 400 what can't be answered, 401
without the key, 404, 429 when the queue is full, 502 when the model's process ends meanwhile, 503
while it is started again or the door closes, 504 when time is out. A client that hangs up cancels
its request wherever it is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from compress.serve.asked import BODY_BYTES, Asked, Refusal, Terms, read_asked
from compress.serve.cascade import Cascade
from compress.serve.keys import Lock
from compress.serve.log import Entry, Log
from compress.serve.metrics import Metrics
from compress.serve.reply import Reply
from compress.serve.settings import Settings, is_loopback
from compress.serve.slots import Full, Slot, Slots
from compress.serve.student import Student

CHAT, CONTINUED, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
HEALTH, METRICS = "/healthz", "/metrics"
PATHS = (CHAT, CONTINUED, MODELS, HEALTH, METRICS)
REPLY = "reply"
HUNG_UP = 499  # no status of HTTP: nobody is there to read one
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Door:
    """HTTP in front of a student, and of a teacher behind it where there is a cascade."""

    def __init__(
        self,
        settings: Settings,
        student: Student,
        metrics: Metrics,
        log: Log,
        cascade: Cascade | None = None,
    ) -> None:
        ready = student.ready()
        target = student.backend.target
        self.settings, self.student, self.cascade = settings, student, cascade
        self.metrics, self.log = metrics, log
        self.slots = Slots(ready.parallel, settings.queue)
        self.terms = Terms(target.name, target.runtime, ready.templated, settings.max_tokens)
        self.closing = False
        self.inside = 0  # requests that have not ended
        self._lock = Lock(settings.key)
        self._made = int(time.time())

        metrics.watch("running", "Requests that are answered now.", lambda: self.slots.running)
        metrics.watch("waiting", "Requests that wait for a slot.", lambda: self.slots.waiting)
        metrics.watch("ready", "Whether the model is there.", lambda: float(self._status() == "ok"))

    def application(self) -> web.Application:
        """The routes, for aiohttp's runner."""
        app = web.Application(middlewares=[self._guard()], client_max_size=BODY_BYTES)
        app.router.add_post(CHAT, self._completion)
        app.router.add_post(CONTINUED, self._completion)
        app.router.add_get(MODELS, self._models)
        app.router.add_get(HEALTH, self._health)
        app.router.add_get(METRICS, self._figures)
        return app

    async def drained(self, seconds: float) -> None:
        """Takes nothing new from now on, and waits up to `seconds` for what runs."""
        self.closing = True
        end = time.monotonic() + seconds
        while self.inside and time.monotonic() < end:
            await asyncio.sleep(0.05)

    # ------------------------------------------------------------ every request

    def _guard(self) -> Any:
        """Around every handler: the key, time, errors, and the line of the log."""

        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            entry = Entry(request.path if request.path in PATHS else "other")
            request[REPLY] = reply = Reply(request, entry)
            self.inside += 1
            try:
                return await self._ended(request, handler, reply)
            except (asyncio.CancelledError, ConnectionError):
                entry.status, entry.end = HUNG_UP, "hung_up"
                raise
            finally:
                self.inside -= 1
                entry.seconds = entry.elapsed()
                if entry.path not in (HEALTH, METRICS) or entry.status != 200:
                    self.metrics.request(entry)
                    self.log.request(entry)

        return guarded

    async def _ended(
        self, request: web.Request, handler: Handler, reply: Reply
    ) -> web.StreamResponse:
        """The handler's response, or its error as one."""
        try:
            self._check_guest(request)
            async with asyncio.timeout(self.settings.timeout):
                return await handler(request)
        except Refusal as refusal:
            return await reply.fail(refusal)
        except TimeoutError:
            limit = f"{self.settings.timeout:g} s"
            sentence = f"there was no answer within {limit}; ask for fewer tokens"
            return await reply.fail(Refusal(504, "timeout", sentence))
        except web.HTTPException as error:
            sentence = {
                404: f"there is nothing at {request.path[:200]}; see {MODELS}",
                405: f"{request.method[:20]} is not for {request.path[:200]}",
                413: f"the body is longer than {BODY_BYTES:,} bytes; shorten it",
            }.get(error.status, error.reason)
            return await reply.fail(Refusal(error.status, f"http_{error.status}", sentence))
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            # Its text may quote what was asked.
            frame = error.__traceback__
            while frame and frame.tb_next:
                frame = frame.tb_next
            place = frame and f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
            self.log.event("bug", error=type(error).__name__, place=place, id=reply.entry.id)
            return await reply.fail(Refusal(500, "bug", "this is a bug of compress serve"))

    def _check_guest(self, request: web.Request) -> None:
        """Refusal: 401 without the key; 403 where, without one, a web page asks."""
        if request.path == HEALTH:
            return
        if not self._lock.admits(request.headers.get("Authorization")):
            raise Refusal(
                401,
                "wrong_key",
                "the key is missing or wrong; send it as 'Authorization: Bearer KEY'",
            )

        # Every page that this machine's browser shows can reach its loopback.
        host = request.url.host or ""
        if self._lock.open and ("Origin" in request.headers or not is_loopback(host)):
            raise Refusal(
                403,
                "web_page",
                "without a key web pages are not answered; start the server with --key-file",
            )

    # ------------------------------------------------------------------ routes

    async def _completion(self, request: web.Request) -> web.StreamResponse:
        """A slot for the request, and in it its answer."""
        reply: Reply = request[REPLY]
        self._check_open()
        asked = read_asked(request.path, await request.read(), self.terms)
        reply.entry.stream = asked.stream
        try:
            slot = await self.slots.take()
        except Full as error:
            raise Refusal(
                429,
                "queue_full",
                f"{self.slots.running} requests are answered and {self.slots.waiting} wait, more"
                " are not taken; try again in a moment",
                seconds=1,
            ) from error

        try:
            reply.entry.waited = reply.entry.elapsed()
            self._check_open()
            await self._answer(asked, reply, slot)
        finally:
            slot.give_back()
        assert reply.response is not None
        return reply.response

    async def _answer(self, asked: Asked, reply: Reply, slot: Slot) -> None:
        """By the student alone, or by whom the cascade chooses."""
        if self.cascade is None:
            reply.entry.by = "student"
            await self.student.answer(asked, reply)
        else:
            await self.cascade.answer(asked, reply, slot)

    def _check_open(self) -> None:
        if self.closing:
            raise Refusal(503, "stopping", "the server is stopping; ask another one", seconds=5)

    async def _models(self, request: web.Request) -> web.StreamResponse:
        reply: Reply = request[REPLY]
        model = {
            "id": self.terms.model,
            "object": "model",
            "created": self._made,
            "owned_by": "compress",
        }
        return reply.whole(json.dumps({"object": "list", "data": [model]}).encode())

    async def _health(self, request: web.Request) -> web.StreamResponse:
        status = self._status()
        request[REPLY].entry.status = 200 if status == "ok" else 503
        return web.json_response({"status": status}, status=request[REPLY].entry.status)

    async def _figures(self, request: web.Request) -> web.StreamResponse:
        reply: Reply = request[REPLY]
        return reply.whole(self.metrics.page(), "text/plain")

    def _status(self) -> str:
        if self.closing:
            return "stopping"
        return "ok" if self.student.backend.ready else "starting"
