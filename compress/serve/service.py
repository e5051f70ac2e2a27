"""From settings to a running door, and from SIGTERM to its end."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Awaitable
from typing import TypeVar

from aiohttp import web

from compress.errors import EXIT_OK, ConfigError, ResourceError
from compress.serve.backend import Backend
from compress.serve.cascade import Cascade
from compress.serve.door import Door
from compress.serve.log import Log
from compress.serve.metrics import Metrics
from compress.serve.settings import Settings, TeacherSettings, is_loopback
from compress.serve.student import Student
from compress.serve.target import Target
from compress.serve.teacher import Teacher

T = TypeVar("T")
IDLE_SECONDS = 75.0  # a connection may be silent


class Stopped(Exception):
    """A signal came before the door was open."""


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address, and does not listen yet. ConfigError: no such host;
    ResourceError: the port is in use or not ours.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise ConfigError(f"--host {host!r} is no address of this machine ({error})") from error

    server = socket.socket(family, kind)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind(address)
    except OSError as error:
        server.close()
        raise _refused(error, host, port) from error
    return server


def _refused(error: OSError, host: str, port: int) -> Exception:
    """Why an address can't be had, in a sentence."""
    if error.errno == errno.EADDRINUSE:
        return ResourceError(
            f"port {port} of {host} is in use; stop what listens there, or give another --port"
        )
    if error.errno == errno.EACCES:
        return ResourceError(f"port {port} needs rights that you lack; give --port 1024 or above")
    return ConfigError(f"--host {host} is no address of this machine ({error.strerror})")


async def _unless(stop: asyncio.Event, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when `stop` is set. Stopped."""
    task = asyncio.ensure_future(work)
    waiting = asyncio.ensure_future(stop.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
        raise Stopped
    return task.result()


def warnings_of(settings: Settings, teacher: TeacherSettings | None) -> list[str]:
    """What the user should know before anybody is served."""
    remarks = []
    if not is_loopback(settings.host):
        remarks.append(
            f"{settings.host} is reached over the network, and this door has no TLS: put a proxy"
            " that has in front of it, or key, prompts and answers can be read on the way"
        )
    if teacher and teacher.in_clear:
        remarks.append(
            f"--teacher {teacher.url} has no TLS: prompts, answers and the teacher's key can be"
            " read on the way; use https://"
        )
    return remarks


async def run(target: Target, settings: Settings, teacher: TeacherSettings | None) -> int:
    """Serves `target` until SIGTERM or Ctrl-C. Returns the exit code.

    What runs is finished then, within the settings' timeout; a second signal ends it at once.
    ValueError, ConfigError, ResourceError: it can't be served.
    """
    stop, now = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        (now if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)

    log = Log()
    server = bound(settings.host, settings.port)
    metrics = Metrics({"student": settings.price} | ({"teacher": teacher.price} if teacher else {}))

    def told(kind: str, **facts: object) -> None:
        """What the backend says of itself."""
        if kind == "backend_restarted":
            metrics.restarts.inc()
        log.event(kind, **facts)

    backend = Backend(target, settings, told)
    student = Student(backend)
    behind = Teacher(teacher) if teacher else None
    try:
        await _unless(stop, backend.start())
        door = Door(
            settings, student, metrics, log, Cascade(student, behind, metrics) if behind else None
        )
        await _served(door, server, log, stop, now)
    except Stopped:
        pass
    finally:
        server.close()
        await student.close()
        if behind:
            await behind.close()
        await backend.stop()
    return EXIT_OK


async def _served(
    door: Door, server: socket.socket, log: Log, stop: asyncio.Event, now: asyncio.Event
) -> None:
    """Opens the door, waits for a signal, and closes it when those inside have left."""
    settings, ready = door.settings, door.student.ready()
    runner = web.AppRunner(
        door.application(),
        access_log=None,
        handler_cancellation=True,
        keepalive_timeout=IDLE_SECONDS,
        shutdown_timeout=0.5,
    )
    await runner.setup()
    try:
        try:
            await web.SockSite(runner, server, backlog=1024).start()
        except OSError as error:
            raise _refused(error, settings.host, server.getsockname()[1]) from error

        # One line for a person or a script, the rest is the log.
        port = server.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        key = "no key" if settings.key is None else "key required"
        print(
            f"serving {door.terms.model} at http://{host}:{port}/v1 ({key}; {ready.parallel} at"
            f" once, {ready.context:,} tokens each)",
            flush=True,
        )
        log.event("serving", model=door.terms.model, port=port, pid=door.student.backend.pid)

        await stop.wait()
        log.event("stopping", running=door.inside)
        drained = asyncio.ensure_future(door.drained(settings.timeout))
        hurried = asyncio.ensure_future(now.wait())
        await asyncio.wait({drained, hurried}, return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        hurried.cancel()
        log.event("stopped", cut=door.inside)
    finally:
        await runner.cleanup()
