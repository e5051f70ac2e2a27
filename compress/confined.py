"""Programs that a checkpoint brings along, its chat template and its tokenizer's patterns, run in
a child process under limits.

A template is a program in Jinja2's sandbox, which keeps it from files and the network but neither
from looping for ever nor from asking for memory without end; a pattern can backtrack for hours. The
child (`confined_child.py`) is given so many seconds and bytes for a request, after which the
operating system ends it, and this process says so in a sentence. It is started once and serves
until the end.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("confined_child.py")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Limits:
    """What one request may take."""

    seconds: float = 10.0  # of computing
    memory_bytes: int = 1 << 29  # besides what the child takes before
    characters: int = 20_000_000  # of one answer


@dataclass(frozen=True)
class Failure:
    """Why an item of a request has no answer."""

    why: str
    ended: bool = False  # a limit ended the child: what came behind this item was not tried


class _Child:
    """A running child of this very process."""

    def __init__(self) -> None:
        # A fork of this process shares the pipes, and must not read from them.
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | ONE_THREAD,
        )

    def close(self) -> int:
        """End it; the exit status."""
        if self.owner != os.getpid():
            return 0
        assert self.process.stdin and self.process.stdout
        self.process.kill()
        with suppress(OSError):  # what was never read
            self.process.stdin.close()
        self.process.stdout.close()
        atexit.unregister(self.close)
        return self.process.wait()


_child: _Child | None = None
_turn = threading.Lock()  # one request at a time


def ask(task: str, items: Sequence[Any], limits: Limits, **given: Any) -> list[Any]:
    """The answer or `Failure` of each item, in order; shorter than `items` where a limit ended the
    child, which its last Failure says.
    """
    global _child
    with _turn:
        if _child is None or _child.owner != os.getpid() or _child.process.poll() is not None:
            _child = _Child()
            atexit.register(_child.close)

        # A child that is interrupted may still answer this request: it serves no other.
        child = _child
        _child = None
        request = {"task": task, "items": list(items), "limits": asdict(limits), "given": given}
        try:
            answers = _answers(child, json.dumps(request), len(items))
        except BaseException:
            child.close()
            raise

        # It serves on where no limit ended it.
        if len(answers) < len(items):
            return [*answers, Failure(_why(child, limits), ended=True)]
        _child = child
        return answers


def _answers(child: _Child, request: str, count: int) -> list[Any]:
    """What the child says of the first items, up to where it ended."""
    assert child.process.stdin and child.process.stdout
    answers: list[Any] = []
    try:
        child.process.stdin.write(request.encode() + b"\n")
        child.process.stdin.flush()
    except BrokenPipeError:
        return answers

    # The last line of a child that was ended may be cut short.
    while len(answers) < count and (line := child.process.stdout.readline()).endswith(b"\n"):
        answer = json.loads(line)
        answers.append(Failure(answer["error"]) if "error" in answer else answer["value"])
    return answers


def _why(child: _Child, limits: Limits) -> str:
    """Why the child is no more."""
    # It has closed its end: the status is on its way.
    try:
        status = child.process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        status = 0

    # The timer of what it computes ends it by this signal.
    child.close()
    if status == -signal.SIGPROF:
        return f"it has not ended after computing for {limits.seconds:g} s"
    return (
        f"it ended the process it ran in (status {status}), which may use"
        f" {limits.memory_bytes / 1e9:.1f} GB"
    )
