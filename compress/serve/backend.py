"""The process that holds the model, seen from the door: started, watched, started again.

Whoever kills it, llama.cpp itself with a failed assertion included, takes the answers that it was
giving (they end with 502, or an error event) and nothing else: the door says 503 until the model is
loaded again.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import ConfigError
from compress.serve.settings import Settings
from compress.serve.target import Target
from compress.threads import available_threads

LOAD_SECONDS = 600  # a model takes at most so long to be there
STOP_SECONDS = 5
PAUSES = (0.2, 1.0, 5.0, 30.0)  # before it is started again, the longer the oftener it died
STABLE_SECONDS = 60  # after so long a death is the first one
SECRETS = ("COMPRESS_KEY", "COMPRESS_TEACHER_KEY")  # the child has no use for


class Ready(NamedTuple):
    """A backend that listens: `address` as http://host:port, tokens of `context` for each of
    `parallel` requests, whether it has a chat template.
    """

    address: str
    context: int
    parallel: int
    templated: bool


class Backend:
    """One model in a process of its own. `ready` is None while it is not there."""

    def __init__(
        self, target: Target, settings: Settings, event: Callable[..., None] = lambda *_, **__: None
    ) -> None:
        self.target, self.settings = target, settings
        self.ready: Ready | None = None
        self.restarts = 0
        self.key = secrets.token_hex(32)
        self._event = event
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that holds the model."""
        return self._process.pid if self._process else None

    async def start(self) -> Ready:
        """The model loaded and listening, and watched from then on. ValueError or ConfigError in a
        sentence where it can't be.
        """
        self.ready = ready = await self._load()
        self._watch = asyncio.create_task(self._keep())
        return ready

    async def stop(self) -> None:
        """Ends the process, and whatever it still answers."""
        if self._watch:
            self._watch.cancel()
        self.ready = None
        await self._end()

    async def _load(self) -> Ready:
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "compress.serve.child"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the door, which ends it in its time
            env=environment | {"PYTHONPATH": _import_path()},
        )
        assert process.stdin and process.stdout

        # Its order, and its answer; a death ends the line.
        try:
            process.stdin.write(json.dumps(self._order()).encode() + b"\n")
            await process.stdin.drain()
            line = await asyncio.wait_for(process.stdout.readline(), LOAD_SECONDS)
        except (TimeoutError, ConnectionError):
            line = b""
        except asyncio.CancelledError:
            await self._end()
            raise
        if not line:
            await self._end()
            raise ValueError(
                f"{self.target.path}: {self.target.runtime} ended while it loaded it (status"
                f" {process.returncode}); the file may be damaged, or memory too small: lower"
                " --context or --parallel"
            )

        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = ConfigError if answer["kind"] == "ConfigError" else ValueError
            raise kind(answer["error"])
        return Ready(**answer)

    def _order(self) -> dict[str, Any]:
        tuning = self.settings.tuning
        return {
            "path": str(self.target.path),
            "runtime": self.target.runtime,
            "context": self.settings.context,
            "parallel": self.settings.parallel,
            "threads": self.settings.threads or tuning.threads or available_threads(),
            "tuning": asdict(tuning),
            "name": self.target.name,
            "key": self.key,
        }

    async def _keep(self) -> None:
        """Starts the model again whenever its process has ended."""
        deaths = 0
        while True:
            assert self._process
            started = time.monotonic()
            status = await self._process.wait()
            self.ready = None
            deaths = 1 if time.monotonic() - started > STABLE_SECONDS else deaths + 1
            self._event("backend_ended", status=status)

            # A model that can't be loaded any more is tried again too: its disk may come back.
            await asyncio.sleep(PAUSES[min(deaths, len(PAUSES)) - 1])
            try:
                self.ready = await self._load()
            except ValueError as error:
                self._event("backend_not_started", error=str(error)[:300])
            else:
                self.restarts += 1
                self._event("backend_restarted", pid=self.pid)

    async def _end(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        if process.stdin:
            process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()


def _import_path() -> str:
    """Where the child finds this very package."""
    root = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
