"""The command line in forks of one process that has imported everything: a second each instead of
a dozen.

In the fork an audit hook counts what happens to the files below its folder, notes whom it connects
to and what it starts, and, where a `Plan` says so, ends the process at the N-th file event as the
kernel would, fills the disk there, or limits the length of files. A training writes its state as
often as it can. Times of models are not taken (constants stand for them) and programs of templates
answer in the fork; a `real` fork starts its processes, which have the same ears by
`fault_probe/sitecustomize.py`.
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from fault_probe import sitecustomize as probe

ROOT = Path(__file__).resolve().parents[1]
PROBE = ROOT / "scripts" / "fault_probe"
# What a run imports in the end; a fork that imports it itself takes seconds.
WARM = (
    "compress.__main__",
    "compress.launch",
    "compress.pipeline",
    "compress.accept",
    "compress.ask",
    "compress.report.compare",
    "compress.score.parity",
    "compress.formats.gguf",
    "compress.formats.gguf_import",
    "compress.formats.llamacpp",
    "transformers.models.llama.modeling_llama",
    "torch.distributed.checkpoint",
    "xllamacpp",
    "peft",
    "torch_pruning",
    "datasets",
    "lm_eval.api.task",
    "matplotlib.pyplot",
    "scipy.stats",
)
LATENCY = {
    "scores": {
        "peak_rss_bytes": 1e8, "ttft_ms_p50": 1.0, "latency_ms_p50": 1.0, "latency_ms_p90": 1.0,
        "latency_ms_p99": 1.0, "tok_per_sec": 1000.0, "bandwidth_share": 0.5,
    },
    "latency": {"device": "cpu", "pinned_cpus": [0], "weight_bytes": 1, "read_bytes_per_sec": 1.0},
}  # fmt: skip
# In the environment of every fork: nothing that one writes may hold it.
CANARY = "planted-canary-4711"
SECRETS = (
    "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY",
    "COMPRESS_SERVE_KEY", "GITHUB_TOKEN",
)  # fmt: skip
MOST_SECONDS = 3600.0  # that a fork may live
MOST_BYTES = 4 << 30  # that a fork and its children may hold
TRACEBACK = re.compile(r"^Traceback \(most recent|this is a bug of compress", re.MULTILINE)


class Plan(NamedTuple):
    """What happens to a fork."""

    die_at: int = 0  # the number of the file event that it does not live to see; 0: none
    torn: bool = False  # half of the file that is being written stays
    full_at: int = 0  # from this event on the disk is full
    filler: str = ""  # the file that takes all room there; without one, writing raises
    longest_bytes: int = 0  # that a file may have
    compose_only: bool = False  # a recipe that is accepted is not run


class Outcome(NamedTuple):
    """How a fork ended."""

    code: int  # negative: by a signal
    seconds: float  # of its life
    computed: float  # seconds that it computed
    text: str  # stdout and stderr
    events: list[tuple[str, str]]  # (what, path below the folder) of files, in order
    outside: list[str]  # whom it or its children connected to outside loopback
    started: list[str]  # programs that it or its children started
    limit: str  # "time" or "memory" where it was ended for that
    remnants: list[str]  # in the folder for temporary files, which is its folder's

    @property
    def told(self) -> str:
        """The last line that it said."""
        return (self.text.strip().splitlines() or [""])[-1]

    @property
    def has_traceback(self) -> bool:
        """Whether what came up was ours to turn into a sentence."""
        return TRACEBACK.search(self.text) is not None or self.code == 1


class Fork:
    """A command line that runs in a fork."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        plan: Plan = Plan(),  # noqa: B008 (it is never changed)
        *,
        real: Sequence[str] = (),
    ) -> None:
        """`real`: "times", "programs": with the processes that a run starts for these, which are
        otherwise constants and answers in the fork.
        """
        self.logs = Path(tempfile.mkdtemp(prefix="faults-"))
        self.folder = folder.resolve()
        self.temporary = self.folder.with_name(f"{self.folder.name}-tmp")
        (self.logs / "told").touch()
        self.start = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os._exit(self._live(arguments, plan, real))
        finally:
            os._exit(99)

    def _live(self, arguments: Sequence[str], plan: Plan, real: Sequence[str]) -> int:
        """The child's life. Returns the exit code."""
        os.setsid()
        os.chdir(self.folder)
        told = os.open(self.logs / "told", os.O_WRONLY | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(told, 1)
        os.dup2(told, 2)
        self.temporary.mkdir(exist_ok=True)
        tempfile.tempdir = str(self.temporary)
        path = os.pathsep.join([str(PROBE), str(ROOT)])
        os.environ.update(
            {probe.LOG: str(self.logs / "events"), "PYTHONPATH": path, "TQDM_DISABLE": "1"}
            | {"TMPDIR": tempfile.tempdir, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
            | dict.fromkeys(SECRETS, f"{CANARY}-0123456789")
        )

        # What takes long and says nothing here.
        from compress import pipeline
        from compress.models import chats
        from compress.models import probe as patterns
        from compress.score import latency
        from compress.train import state

        if "times" not in real:
            vars(latency)["_fresh"] = lambda *_: LATENCY
        if "programs" not in real:
            vars(chats)["ask"] = vars(patterns)["ask"] = _answer_here
        state.SAVE_SECONDS, state.SAVE_SHARE = 0.0, 1e9
        signal.signal(signal.SIGINT, signal.default_int_handler)
        probe.listen(str(self.folder), plan)
        if plan.compose_only:
            vars(pipeline)["run"] = lambda *_: 0
        if plan.longest_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (plan.longest_bytes, plan.longest_bytes))

        # As the console script does it.
        from compress.__main__ import main

        try:
            code = main(list(arguments))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        atexit._run_exitfuncs()
        return code

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Send it a signal, and to nobody else."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, how)

    def wait(
        self,
        seconds: float = MOST_SECONDS,
        *,
        computing: float = MOST_SECONDS,
        kill_after: float | None = None,
        how: signal.Signals = signal.SIGKILL,
    ) -> Outcome:
        """Until it has ended, by itself, at a limit (of its life, or of what it computes), or by a
        signal sent at that age.
        """
        limit = ""
        process = psutil.Process(self.pid)
        looked = 0.0
        while not (ended := os.wait4(self.pid, os.WNOHANG))[0]:
            age = time.monotonic() - self.start
            if kill_after is not None and age > kill_after:
                self.kill(how)
                kill_after = None
            elif age > seconds:
                limit = "time"
                self.kill()
            elif age - looked > 1.0:  # looking costs as much as some runs do
                looked = age
                taken, computed = _taken(process)
                if taken > MOST_BYTES or computed > computing:
                    limit = "memory" if taken > MOST_BYTES else "time"
                    self.kill()
            time.sleep(0.02)
        lived = time.monotonic() - self.start
        own_seconds = ended[2].ru_utime + ended[2].ru_stime

        # What it left running in its group goes too.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._outcome(os.waitstatus_to_exitcode(ended[1]), lived, own_seconds, limit)

    def _outcome(self, code: int, seconds: float, computed: float, limit: str) -> Outcome:
        text = (self.logs / "told").read_text(errors="replace")
        file = self.logs / "events"
        lines = file.read_text(errors="replace").splitlines() if file.exists() else []
        rows = [line.split("\t", 2) for line in lines]
        rows = [row for row in rows if len(row) == 3]
        of = {sort: [(what, where) for kind, what, where in rows if kind == sort] for sort in "FNX"}
        remnants = sorted(path.name for path in self.temporary.glob("*"))
        shutil.rmtree(self.logs, ignore_errors=True)
        outside = [f"{what} {where}" for what, where in of["N"] if not probe.is_loopback(where)]
        started = [words for _, words in of["X"]]
        return Outcome(code, seconds, computed, text, of["F"], outside, started, limit, remnants)


def _answer_here(task: str, items: Sequence[Any], limits: Any, **given: Any) -> list[Any]:
    """`confined.ask` without a process of its own: what is asked here is known to be harmless."""
    from compress import confined, confined_child

    request = {"task": task, "items": [*items], "limits": asdict(limits), "given": given}
    module = importlib.import_module(confined_child.MODULES[task])
    return [
        confined.Failure(answer["error"]) if "error" in answer else answer["value"]
        for answer in confined_child.answers(module, request)
    ]


def _taken(process: psutil.Process) -> tuple[int, float]:
    """Bytes that a process and its children hold, and seconds that they have computed; 0 where
    they are gone.
    """
    try:
        all_of_it = [process, *_children(process)]
        times = [p.cpu_times() for p in all_of_it]
        return sum(p.memory_info().rss for p in all_of_it), sum(t.user + t.system for t in times)
    except psutil.Error:
        return 0, 0.0


def _children(process: psutil.Process) -> list[psutil.Process]:
    """Its children, as the kernel lists them: psutil would read every process of the machine."""
    try:
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    except OSError:
        return process.children()
    return [psutil.Process(int(pid)) for pid in text.split()]


def run(
    arguments: Sequence[str],
    folder: Path,
    plan: Plan = Plan(),  # noqa: B008 (it is never changed)
    *,
    seconds: float = MOST_SECONDS,
    computing: float = MOST_SECONDS,
    real: Sequence[str] = (),
) -> Outcome:
    """A command line in a fork, to its end."""
    return Fork(arguments, folder, plan, real=real).wait(seconds, computing=computing)


def call(function: Callable[[], object]) -> None:
    """Call something that uses torch, in a fork. RuntimeError where it fails."""
    if not (pid := os.fork()):
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise RuntimeError(f"{function} ends with {code}")


def warm() -> None:
    """Import what a run needs and read the embedded texts: no tensor is made and no thread started,
    or forks would hang.
    """
    for name in WARM:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    from compress.text.embedded import EMBEDDED

    for read in EMBEDDED.values():
        read()  # kept from then on


class Figure(NamedTuple):
    """What a part of the harness found."""

    tried: int
    passed: int
    goal: int  # how many are to be tried, at least, in the full form
    what: str
    failures: list[str]
    more: dict[str, Any] = {}

    @property
    def holds(self) -> bool:
        """Whether nothing failed, and something was tried."""
        return self.tried > 0 and self.passed == self.tried
