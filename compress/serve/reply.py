"""An answer on its way to a client: whole, or piece by piece; or why there is none."""

from __future__ import annotations

import json
from typing import Any

from aiohttp import web

from compress.serve.asked import Refusal
from compress.serve.log import Entry

BY = "x-compress-answered-by"
REQUEST_ID = "x-request-id"


class HungUp(ConnectionError):
    """The client is gone."""


def event(value: Any) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class Reply:
    """What is sent for one request; `response` is None until something is."""

    def __init__(self, request: web.Request, entry: Entry) -> None:
        self.request, self.entry = request, entry
        self.response: web.StreamResponse | None = None

    def whole(self, body: bytes, content_type: str = "application/json") -> web.StreamResponse:
        """An answer in one piece."""
        self.entry.began()
        self.entry.status = 200
        self.response = web.Response(
            body=body, content_type=content_type, charset="utf-8", headers=self._headers()
        )
        return self.response

    async def piece(self, data: bytes) -> None:
        """Bytes of a stream of events; the first ones begin it. HungUp: nobody reads."""
        if self.response is None:
            self.entry.began()
            self.entry.status = 200
            headers = self._headers() | {
                "Content-Type": "text/event-stream; charset=utf-8",
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            }
            self.response = web.StreamResponse(headers=headers)

        # aiohttp's own error is one of its client's too, which here means the backend.
        try:
            if not self.response.prepared:
                await self.response.prepare(self.request)
            await self.response.write(data)
        except ConnectionError as error:
            raise HungUp from error

    async def end(self) -> web.StreamResponse:
        """The end of a stream."""
        assert self.response is not None
        try:
            await self.response.write_eof()
        except ConnectionError as error:
            raise HungUp from error
        return self.response

    async def fail(self, refusal: Refusal) -> web.StreamResponse:
        """An error; within a stream, which has its status already, as its last event."""
        self.entry.end = refusal.code
        if self.response is not None and self.response.prepared:
            await self.piece(event(refusal.body()))
            return await self.end()

        # Nothing was sent: the error can be the answer.
        self.entry.status = refusal.status
        headers = self._headers()
        if refusal.seconds is not None:
            headers["Retry-After"] = str(refusal.seconds)
        if refusal.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        self.response = web.json_response(refusal.body(), status=refusal.status, headers=headers)
        return self.response

    def _headers(self) -> dict[str, str]:
        headers = {REQUEST_ID: self.entry.id, "Server": "compress"}
        return headers | {BY: self.entry.by} if self.entry.by else headers
