"""The part of OpenAI's interface that the door asks for, for runtimes without a server of their
own. One request at a time; on the loopback alone, behind the door's key for it.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import web

from compress.errors import ConfigError
from compress.serve.engines import Engine, Sampling, open_engine
from compress.serve.keys import Lock
from compress.serve.reply import event
from compress.serve.settings import context_within

CHAT, CONTINUED = "/v1/chat/completions", "/v1/completions"


class Piece(NamedTuple):
    """Text that came with a token, the token's log-probability, and at the end why it ended."""

    text: str
    logprob: float | None
    finish: str | None = None


class TooLong(ValueError):
    """A prompt that leaves no room for an answer."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"the prompt has {tokens:,} tokens")
        self.tokens = tokens


def pieces(
    engine: Engine, ids: list[int], body: dict[str, Any], context: int, stop: threading.Event
) -> Generator[Piece]:
    """An answer token by token; text that may become a stop string is held back until it has not.

    The last piece has no token and says stop, or length where the answer was cut.
    """
    stops = body.get("stop", [])
    stops = [stops] if isinstance(stops, str) else stops
    sampling = Sampling(body["temperature"], body.get("top_p", 1.0), body.get("seed"))
    room = min(body["max_tokens"], context - len(ids))
    decode = engine.decoder()

    text, sent, finish = "", 0, "length"
    for token in engine.tokens(ids, room, sampling, stop):
        if token.id in engine.ends:
            finish = "stop"
            break
        text += decode(token.id)

        # Up to a stop string; else all but what may be the beginning of one.
        places = [place for stop_text in stops if (place := text.find(stop_text)) >= 0]
        if places:
            text, finish = text[: min(places)], "stop"
            yield Piece(text[sent:], token.logprob)
            sent = len(text)
            break
        certain = len(text) - max((overlap(text, stop_text) for stop_text in stops), default=0)
        yield Piece(text[sent:certain], token.logprob)
        sent = max(sent, certain)
    yield Piece(text[sent:], None, finish)


def overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


class Speaking:
    """Routes over one engine."""

    def __init__(self, engine: Engine, name: str, context: int, key: str) -> None:
        self.engine, self.name, self.context = engine, name, context
        self._lock, self._free = Lock(key), asyncio.Lock()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64_000_000)
        app.router.add_post(CHAT, self._answer)
        app.router.add_post(CONTINUED, self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if not self._lock.admits(request.headers.get("Authorization")):
            return _error(401, "wrong key")
        body = json.loads(await request.read())
        chat = request.path == CHAT
        async with self._free:
            try:
                ids = await asyncio.to_thread(self._ids, body, chat)
            except TooLong as error:
                facts = {"type": "exceed_context_size_error", "n_prompt_tokens": error.tokens}
                return _error(400, str(error), **facts)
            except ValueError as error:
                return _error(400, str(error))
            if body.get("stream"):
                return await self._stream(request, body, ids, chat)
            return await self._whole(body, ids, chat)

    def _ids(self, body: dict[str, Any], chat: bool) -> list[int]:
        """The prompt's ids. ValueError: the template fails; TooLong."""
        text = body.get("prompt", "")
        if chat:
            turns = [
                {"role": turn["role"], "content": _text(turn["content"])}
                for turn in body["messages"]
            ]
            text = self.engine.prompt(turns)
        ids = self.engine.ids(text)
        if not ids:
            raise ValueError("the prompt is empty")
        if len(ids) >= self.context:
            raise TooLong(len(ids))
        return ids

    async def _pieces(self, body: dict[str, Any], ids: list[int]) -> AsyncGenerator[Piece]:
        """As `pieces`, computed in a thread that stops with the request."""
        stop = threading.Event()
        run = pieces(self.engine, ids, body, self.context, stop)
        working: asyncio.Future[Piece | None] | None = None
        try:
            while True:
                working = asyncio.ensure_future(asyncio.to_thread(next, run, None))
                piece = await asyncio.shield(working)
                if piece is None:
                    return
                yield piece
        finally:
            # Nobody may compute beside the next request.
            stop.set()
            if working and not working.done():
                await asyncio.wait({working})
            await asyncio.to_thread(run.close)

    async def _whole(self, body: dict[str, Any], ids: list[int], chat: bool) -> web.Response:
        async with aclosing(self._pieces(body, ids)) as run:
            came = [piece async for piece in run]
        text = "".join(piece.text for piece in came)
        counted = [piece for piece in came if piece.logprob is not None]
        choice: dict[str, Any] = {"index": 0, "finish_reason": came[-1].finish}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if body.get("logprobs"):
            choice["logprobs"] = _logprobs(counted, chat)
        usage = _usage(len(ids), len(counted))
        answer = self._frame(chat, "") | {"choices": [choice], "usage": usage}
        return web.json_response(answer)

    async def _stream(
        self, request: web.Request, body: dict[str, Any], ids: list[int], chat: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        frame = self._frame(chat, ".chunk")
        count = 0
        async with aclosing(self._pieces(body, ids)) as run:
            async for piece in run:
                choice = _delta(piece, body, chat, first=count == 0)
                count += piece.logprob is not None

                # The last one has the counts, which the door reads.
                timings = {"prompt_n": len(ids), "cache_n": 0, "predicted_n": count}
                counts = {"timings": timings} if piece.finish else {}
                await response.write(event(frame | {"choices": [choice]} | counts))
        if body.get("stream_options", {}).get("include_usage"):
            await response.write(event(frame | {"choices": [], "usage": _usage(len(ids), count)}))
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    def _frame(self, chat: bool, part: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": f"chat.completion{part}" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.name,
        }


def _delta(piece: Piece, body: dict[str, Any], chat: bool, *, first: bool) -> dict[str, Any]:
    """A piece as one choice of an event."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": piece.finish}
    if chat:
        role = {"role": "assistant"} if first else {}
        choice["delta"] = role | ({"content": piece.text} if piece.text else {})
    else:
        choice["text"] = piece.text
    if body.get("logprobs") and piece.logprob is not None:
        choice["logprobs"] = _logprobs([piece], chat)
    return choice


def _text(content: Any) -> str:
    """A message's content, which may be a list of texts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _usage(prompt: int, answer: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
    }


def _logprobs(came: list[Piece], chat: bool) -> dict[str, Any]:
    """In OpenAI's form of chats, or of completions."""
    if chat:
        rows: list[dict[str, Any]] = [
            {"token": piece.text, "logprob": piece.logprob, "bytes": None, "top_logprobs": []}
            for piece in came
        ]
        return {"content": rows}
    return {
        "tokens": [piece.text for piece in came],
        "token_logprobs": [piece.logprob for piece in came],
    }


def _error(status: int, sentence: str, **facts: Any) -> web.Response:
    return web.json_response({"error": {"message": sentence} | facts}, status=status)


def start(order: dict[str, Any]) -> dict[str, Any]:
    """Opens the model of an order and serves it on a thread. ValueError: it can't be opened;
    ConfigError: not like this.
    """
    path = Path(order["path"])
    if (order["parallel"] or 1) > 1:
        raise ConfigError(
            f"--parallel {order['parallel']}: {order['runtime']} answers one request at a time;"
            " leave it out, or serve a GGUF"
        )
    engine = open_engine(order["runtime"], path, order["threads"])
    context = context_within(order["context"], engine.context, path.name)
    listening = threading.Event()
    address: list[str] = []

    async def serve() -> None:
        speaking = Speaking(engine, order["name"], context, order["key"])
        runner = web.AppRunner(speaking.application(), access_log=None, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
        listening.set()
        await asyncio.Event().wait()

    threading.Thread(target=asyncio.run, args=(serve(),), daemon=True).start()
    if not listening.wait(30):
        raise ValueError("there is no free port on the loopback; close what holds them")
    return {
        "address": address[0],
        "context": context,
        "parallel": 1,
        "templated": engine.templated,
    }
