"""Command lines in forks of one process that has imported what they import, and read the embedded
texts: a tenth of a second each, where an interpreter of their own takes six, and twelve with these.

    Forked(["-m", "compress", "list"], cwd=folder, env=environment).communicate()

runs what `python -m compress list` would, in a process of its own with its own folder, environment,
output and exit code; only what is read while packages are imported is the first fork's. The process
that forks starts with the first line and ends with the tests. The processes that a run times models
in are forks of it too, at the run's request: their memory is not a fresh process's
(tests/score/test_latency_size.py measures those).
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WARM = (
    "compress.launch",
    "compress.pipeline",
    "compress.accept",
    "compress.report.compare",
    "compress.score.parity",
    "compress.formats.gguf",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "peft",
    "torch_pruning",
    "datasets",
    "lm_eval.api.task",
    "matplotlib.pyplot",
)


# ------------------------------------------------------------------ the process that forks


def serve() -> None:
    """Forks for each line of stdin {arguments, cwd, env, out, err} and writes its pid; when one
    has ended, [pid, code].
    """
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    from compress.text.embedded import EMBEDDED

    for read in EMBEDDED.values():
        read()  # kept from then on

    # Lines, deaths of forks and what forks ask for, as they come.
    ended, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes)
    lines = os.fdopen(os.dup(0), "rb", buffering=0)
    asked, asking = os.pipe()
    _asking.append(asking)
    requests = os.fdopen(asked, "rb", buffering=0)
    while True:
        ready = select.select([lines, ended, requests], [], [])[0]
        if ended in ready:
            os.read(ended, 4096)
            _reap()
        if requests in ready:
            _fork(json.loads(Path(requests.readline().decode().strip()).read_text()))
        if lines in ready:
            line = lines.readline()
            if not line:
                return
            _tell(_fork(json.loads(line)))


_asking: list[int] = []  # where a fork writes the name of a file with a line for another one
_code_files: dict[int, str] = {}  # where such a one's exit code is awaited


def _run_in_a_fork(
    command: list[str], env: Mapping[str, str], **_: Any
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run(command, capture_output=True, text=True)` of this interpreter, for a fork."""
    folder = Path(tempfile.mkdtemp(prefix="forked-"))
    out, err, code = (folder / name for name in ("out", "err", "code"))
    out.touch()
    err.touch()
    line = {"arguments": command[1:], "cwd": os.getcwd(), "env": dict(env)}
    line |= {"out": str(out), "err": str(err), "code": str(code)}
    (folder / "line").write_text(json.dumps(line))
    os.write(_asking[0], f"{folder / 'line'}\n".encode())
    while not code.is_file():
        time.sleep(0.01)
    done = subprocess.CompletedProcess(
        command, int(code.read_text()), out.read_text(), err.read_text()
    )
    shutil.rmtree(folder)
    return done


def _tell(value: Any) -> None:
    os.write(1, json.dumps(value).encode() + b"\n")


def _reap() -> None:
    """Tell of every fork that has ended: who asked for it reads that in a file, or in a line."""
    with suppress(ChildProcessError):
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, code = found[0], os.waitstatus_to_exitcode(found[1])
            if file := _code_files.pop(pid, None):
                Path(f"{file}.part").write_text(str(code))
                os.replace(f"{file}.part", file)
            else:
                _tell([pid, code])


def _fork(line: dict[str, Any]) -> int:
    if pid := os.fork():
        if "code" in line:
            _code_files[pid] = line["code"]
        return pid
    try:
        code = _live(line)
    except BaseException:  # the interpreter's own rule: what nobody caught is 1
        import traceback

        traceback.print_exc()
        code = 1
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()
    os._exit(code)


def _live(line: dict[str, Any]) -> int:
    """A fork's life, as an interpreter's that begins. Returns the exit code."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(line[name], os.O_WRONLY | os.O_APPEND), number)
    os.chdir(line["cwd"])
    os.environ.clear()
    os.environ.update(line["env"])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [path for path in paths if path and path not in sys.path]
    tempfile.tempdir = None
    latency: Any = importlib.import_module("compress.score.latency")
    latency.subprocess = SimpleNamespace(run=_run_in_a_fork)

    # A module or a file, as `python` takes them.
    arguments = line["arguments"]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


# ------------------------------------------------------------------------------ the tests


class _Server:
    """The process that forks, and the exit codes that it has told of."""

    def __init__(self) -> None:
        self.lock = Lock()
        self.codes: dict[int, int] = {}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what packages say when they are imported
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self.lines, self.answers = self.process.stdin, self.process.stdout
        atexit.register(self.process.kill)

    def fork(self, line: dict[str, Any]) -> int:
        """Its pid."""
        with self.lock:
            self.lines.write(json.dumps(line).encode() + b"\n")
            while isinstance(answer := self._answer(), list):
                self.codes[answer[0]] = answer[1]
            return int(answer)

    def code(self, pid: int) -> int | None:
        """The exit code of a fork, negative by a signal; None while it runs."""
        with self.lock:
            while pid not in self.codes and select.select([self.answers], [], [], 0.02)[0]:
                ended, code = self._answer()
                self.codes[ended] = code
            return self.codes.get(pid)

    def _answer(self) -> Any:
        line = self.answers.readline()
        assert line, "the process that forks has ended"
        return json.loads(line)


_server: list[_Server] = []


class Forked:
    """`python ARGUMENTS...` in a fork, with the part of `subprocess.Popen` that tests use."""

    def __init__(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], *, together: bool = False
    ) -> None:
        """`together`: stderr is written where stdout is."""
        if not _server:
            _server.append(_Server())
        self.args = [str(argument) for argument in arguments]
        self.returncode: int | None = None
        folder = Path(tempfile.mkdtemp(prefix="forked-"))
        self._out, self._err = folder / "out", folder / "err"
        self._out.touch()
        self._err.touch()
        err = self._out if together else self._err
        line = {"arguments": self.args, "cwd": str(cwd), "env": dict(env)}
        self.pid = _server[0].fork(line | {"out": str(self._out), "err": str(err)})

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        if self.returncode is None:
            self.returncode = _server[0].code(self.pid)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it wrote to stdout and stderr, once it has ended. subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(self.args, timeout)
        texts = [file.read_text(errors="replace") for file in (self._out, self._err)]
        shutil.rmtree(self._out.parent)
        return texts[0], texts[1]


if __name__ == "__main__":
    serve()
