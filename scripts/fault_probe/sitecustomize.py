"""Ears of the harness (`scripts/faults.py`): an audit hook that writes down what a process does to
files, sockets and other processes.

Python imports a module of this name by itself when its folder is on PYTHONPATH: so the hook is in
every Python process that a run starts. It only listens there; what a `Plan` says happens in the
fork alone, which calls `listen`.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from typing import Any

LOG = "COMPRESS_FAULTS_LOG"
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# Audit event -> how many paths it names first, and the place of its dir_fd.
FILE_EVENTS = {
    "os.mkdir": (1, 2),
    "os.remove": (1, 1),
    "os.rmdir": (1, 1),
    "os.rename": (2, 2),
    "os.symlink": (2, 2),
    "os.link": (2, 2),
    "os.truncate": (1, 9),
}
NETWORK_EVENTS = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
PROGRAM_EVENTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "pty.spawn")
LOOPBACK = re.compile(r"127\.\d+\.\d+\.\d+|::1|localhost|0\.0\.0\.0|::|/.*|@.*|\\x00.*|None|")


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine alone."""
    return LOOPBACK.fullmatch(address.partition(" ")[0]) is not None


class Ear:
    """The hook: file events below `root` are counted, and `plan` happens at one of them."""

    def __init__(self, log: str, root: str = "", plan: Any = None) -> None:
        self.log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.root = root
        self.plan = plan
        self.count = 0
        self.thread = threading.local()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if getattr(self.thread, "busy", False):
            return
        if event != "open" and event not in KNOWN:
            return
        self.thread.busy = True
        try:
            self.hear(event, arguments)
        finally:
            self.thread.busy = False

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        """One event, of a kind that is listened for."""
        if event == "open":
            if arguments[2] & WRITES and isinstance(arguments[0], (str, bytes, os.PathLike)):
                self.file("open", os.fsdecode(arguments[0]))
        elif event in FILE_EVENTS:
            count, place = FILE_EVENTS[event]
            paths = [_named(path, arguments[place:]) for path in arguments[:count]]
            self.file(event.removeprefix("os."), paths[-1], first=paths[0])
        elif event in NETWORK_EVENTS:
            self.write("N", event, _address(event, arguments))
        else:
            command = arguments[1] if event == "subprocess.Popen" else arguments[0]
            words = [command] if isinstance(command, (str, bytes)) else list(command or [])
            self.write("X", event, " ".join(map(_plain, words)))

    def file(self, what: str, path: str, first: str = "") -> None:
        """A file event; it is written down before it happens, and may not happen."""
        path = os.path.abspath(path)
        if not self.root or not path.startswith(self.root + os.sep):
            return
        if what == "mkdir" and os.path.isdir(path):  # it is asked for, and there already
            return
        self.count += 1
        self.write("F", what, os.path.relpath(path, self.root))
        plan = self.plan
        if plan is None:
            return
        if self.count == plan.die_at:
            if plan.torn:
                _tear(what, first or path)
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.full_at and self.count >= plan.full_at:
            self.fill(what, path)

    def fill(self, what: str, path: str) -> None:
        """Take all room of the disk once; where there is no filler, refuse whatever needs some."""
        if self.plan.filler:
            if self.count == self.plan.full_at:
                _fill(self.plan.filler)
        elif what in ("open", "mkdir", "symlink", "fsync"):
            raise OSError(28, "No space left on device", path)

    def write(self, sort: str, what: str, where: str) -> None:
        """A line of the log; in one piece, for several processes write it."""
        line = f"{sort}\t{what}\t{where}".replace("\n", " ") + "\n"
        os.write(self.log, line.encode(errors="replace"))

    def fsync(self, handle: int) -> None:
        """In place of `os.fsync`, which has no audit event."""
        self.thread.busy = True
        try:
            path = os.readlink(f"/proc/self/fd/{handle}")
            self.file("fsync", path)
        finally:
            self.thread.busy = False
        real_fsync(handle)


KNOWN = {*FILE_EVENTS, *NETWORK_EVENTS, *PROGRAM_EVENTS}
real_fsync = os.fsync


def _plain(word: Any) -> str:
    return word if isinstance(word, str) else os.fsdecode(word) if word is not None else ""


def _named(path: Any, rest: tuple[Any, ...]) -> str:
    """A path, below the open directory that it is relative to where there is one."""
    name = os.fsdecode(path) if not isinstance(path, int) else f"/proc/self/fd/{path}"
    if rest and isinstance(rest[0], int) and rest[0] >= 0 and not os.path.isabs(name):
        return os.path.join(os.readlink(f"/proc/self/fd/{rest[0]}"), name)
    return name


def _address(event: str, arguments: tuple[Any, ...]) -> str:
    """Whom a socket event is about."""
    address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
    if isinstance(address, (tuple, list)):
        return " ".join(map(str, address))
    return _plain(address) if isinstance(address, (str, bytes)) else str(address)


def _tear(what: str, path: str) -> None:
    """Leave half of a file that is being made durable or named; an empty one that is opened."""
    if what in ("fsync", "rename") and os.path.isfile(path):
        os.truncate(path, os.path.getsize(path) // 2)
    elif what == "open" and not os.path.exists(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))


def _fill(filler: str) -> None:
    """Write a file until nothing more has room."""
    handle = os.open(filler, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 20, 4096, 1):
        try:
            while True:
                os.write(handle, bytes(size))
        except OSError:
            continue
    os.close(handle)


def listen(root: str = "", plan: Any = None) -> None:
    """Begin to listen in this process, if the environment says where to."""
    if not (log := os.environ.get(LOG)):
        return
    ear = Ear(log, root, plan)
    if root:
        vars(os)["fsync"] = ear.fsync
    sys.addaudithook(ear)


if "fault_probe" not in __name__:
    listen()
