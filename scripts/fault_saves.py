"""What a kill, a second process and a full disk do to what is being saved: a recipe whose command
is repeated must end in the same bytes and leave nothing behind.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import fault_forks
from fault_forks import Figure, Fork, Outcome, Plan

from compress.report.records import load_run
from compress.ship.sums import verify_bundle
from compress.store import STAGE_JSON, file_table

# A cut, two trainings (one with a teacher's signal), a file: every kind of save in a few seconds.
ROOT = Path(__file__).resolve().parents[1]
# A teacher and text that are there already; `folder_for` links them into every folder.
SMALL = (
    "trainer.threads=1", "eval.open_limit=1", "eval.heldout_sequences=2", "eval.time_stages=false",
    "teacher=./given/teacher", "data.train=[given/train.txt]", "data.heldout=[given/heldout.txt]",
)  # fmt: skip
SHORT = (
    "run", "smoke", "store=store", *SMALL, "eval.tasks=[]", "pipeline=[depth,heal,qat]",
    "export=gguf_q4_0", "stages.heal.tokens=1024", "stages.heal.batch_sequences=8",
    "stages.qat.tokens=512", "stages.qat.batch_sequences=4",
)  # fmt: skip
SMOKE = ("run", "smoke", "store=store", "trainer.threads=1")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL, signal.SIGINT)
KINDS = ("stage", "signal", "state", "export", "run")
FULL = re.compile(r"needs? (?:up to |at least )?[\d.]+ (?:bytes|kB|MB|GB).* (?:is|are) free")
KEPT = re.compile(r"\.(part|old)$|^\..*\.\d+$")  # names of what is not finished
TMPFS_BYTES = 96 << 20


class Made(NamedTuple):
    """A run that nothing has disturbed."""

    outcome: Outcome
    digests: dict[str, str]  # of what its commands must end in again
    export_keys: set[str]


def give(work: Path) -> None:
    """Make the teacher and the text that are in `SMALL`, once."""
    given = work / "given"
    if given.is_dir():
        return
    given.mkdir(parents=True)
    pages = ("house.md", "quantizing.md", "distilling.md"), ("measuring.md",)
    for name, sources in zip(("train.txt", "heldout.txt"), pages, strict=True):
        text = "\n".join((ROOT / "docs" / page).read_text() for page in sources)
        (given / name).write_text(text)

    def teacher() -> None:
        from compress.teacher import random_teacher

        random_teacher(given / "teacher", 0)

    fault_forks.call(teacher)


def folder_for(folder: Path, work: Path) -> Path:
    """A new folder for a command, with what is given in it."""
    folder.mkdir(parents=True)
    (folder / "given").symlink_to(work / "given")
    return folder


def newest(folder: Path) -> Path:
    """The latest run directory below a folder."""
    found_in = folder.glob("**/run.json")
    return max((file.parent for file in found_in), key=lambda run: run.stat().st_mtime_ns)


def digests(folder: Path) -> dict[str, str]:
    """Weights of every slot of the latest run, and the sha256 of its bundle's weights."""
    run = newest(folder)
    records = [json.loads(file.read_text()) for file in sorted(run.glob("*/record.json"))]
    table = {record["slot"]: record["digest"] for record in records}
    for file in sorted((run / "bundle").rglob("*")):
        if file.suffix in (".gguf", ".safetensors"):
            name = str(file.relative_to(run))
            table[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return table


def made(folder: Path, command: Sequence[str], real: Sequence[str] = ()) -> Made:
    """Run the command undisturbed in a new folder, or say what was found when it ran there."""
    note = folder.with_name(f"{folder.name}.json")
    if note.is_file():
        about = json.loads(note.read_text())
        events = [(what, path) for what, path in about[0].pop("events")]
        return Made(Outcome(**about[0], events=events), about[1], set(about[2]))
    folder_for(folder, folder.parent)
    outcome = fault_forks.run(command, folder, real=real)
    if outcome.code:
        raise RuntimeError(f"the run to compare with ends with {outcome.code}: {outcome.told}")
    records = [json.loads(file.read_text()) for file in newest(folder).glob("*/record.json")]
    keys = {record["key"] for record in records if record.get("technique") == "export"}
    keys |= {record["key"] for record in records if record["slot"].startswith("gguf")}
    reference = Made(outcome, digests(folder), {key for key in keys if key})
    note.write_text(
        json.dumps([outcome._asdict(), reference.digests, sorted(reference.export_keys)])
    )
    return reference


def kind_of(path: str, export_keys: set[str]) -> str:
    """Which kind of save a file belongs to."""
    if any(key in path for key in export_keys):
        return "export"
    if path.startswith("runs/"):
        return "run"
    room = path.split("/")[1] if "/" in path else ""
    return {"signals": "signal", "work": "state", "entries": "stage", "notes": "stage"}.get(
        room, "store"
    )


def shape_of(event: tuple[str, str]) -> str:
    """An event without what differs between two runs: keys, times, process ids."""
    what, path = event
    return f"{what} {re.sub(r'[0-9a-f]{16,}|[0-9]+', '#', path)}"


def points(
    reference: Made, count: int, draw: random.Random, *, every_shape: bool
) -> list[tuple[int, str, str]]:
    """Numbers of file events to fail at, with kind and shape: every kind alike, every shape of
    each once where so many are wanted.
    """
    by_kind: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, event in enumerate(reference.outcome.events, 1):
        kind = kind_of(event[1], reference.export_keys)
        by_kind[kind][shape_of(event)].append(number)

    # One of each shape, then more of them, kind by kind.
    chosen: list[tuple[int, str, str]] = []
    kinds = [kind for kind in KINDS if kind in by_kind]
    for kind in kinds:
        shapes = [*by_kind[kind]]
        draw.shuffle(shapes)
        quota = len(shapes) if every_shape else -(-count // len(kinds))
        for shape in shapes[:quota]:
            chosen.append((draw.choice(by_kind[kind][shape]), kind, shape))
    while len(chosen) < count:
        kind = kinds[len(chosen) % len(kinds)]
        shape = draw.choice([*by_kind[kind]])
        chosen.append((draw.choice(by_kind[kind][shape]), kind, shape))
    return chosen if every_shape else draw.sample(chosen, count)


def remnants(folder: Path) -> list[str]:
    """What unfinished work has left where a finished run is."""
    names = [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if KEPT.search(path.name) and "weights/" not in str(path)
    ]
    finished = {path.parent.name for path in folder.glob("store/entries/*/stage.json")}
    names += [f"store/work/{key}" for key in finished if (folder / "store/work" / key).exists()]
    return sorted(names)


def damaged_entries(folder: Path) -> list[str]:
    """Finished entries of a store whose bytes are not those that they name."""
    bad = []
    for stage in folder.glob("store/entries/[0-9a-f]*/stage.json"):
        table = file_table(stage.parent)
        table.pop(STAGE_JSON)
        if table != json.loads(stage.read_text())["files"]:
            bad.append(stage.parent.name[:12])
    return bad


def problem_after(folder: Path, command: Sequence[str], reference: Made) -> str:
    """Repeat a disturbed command in its folder: what is wrong then; "" when all is well."""
    torn = damaged_entries(folder)
    if torn:
        return f"damaged entries {torn}"
    for file in folder.glob("runs/**/run.json"):
        try:
            load_run(file.parent)
        except ValueError as error:
            if not str(error).startswith("incomplete run"):  # it ended before its first record
                return f"the run directory can't be read: {error}"

    again = fault_forks.run(command, folder)
    if again.code:
        return f"repeated, it ends with {again.code}: {again.told}"
    if (got := digests(folder)) != reference.digests:
        differing = [k for k in reference.digests if got.get(k) != reference.digests[k]]
        return f"other bytes: {differing or sorted(got.keys() ^ reference.digests.keys())}"
    try:
        if (newest(folder) / "bundle").is_dir():
            verify_bundle(newest(folder) / "bundle")
    except ValueError as error:
        return f"the bundle does not verify: {error}"
    left = [*remnants(folder), *again.remnants]
    return f"left behind: {left}" if left else ""


def _clear(folder: Path) -> None:
    """Remove the folder of a trial and the one for its temporary files."""
    shutil.rmtree(folder)
    shutil.rmtree(folder.with_name(f"{folder.name}-tmp"), ignore_errors=True)


def kills(work: Path, draw: random.Random, count: int, *, reference: Made) -> Figure:
    """kill -9 at file events over every kind of save, half of them with a torn file left."""
    failures, reached = [], Counter[str]()
    whole = count >= 60
    for number, (at, _, _) in enumerate(points(reference, count, draw, every_shape=whole)):
        folder = folder_for(work / f"kill-{number}", work)
        died = fault_forks.run(SHORT, folder, Plan(die_at=at, torn=number % 2 == 1))
        if died.code == 0:  # threads: this time there were fewer events
            _clear(folder)
            continue
        last = died.events[-1] if died.events else ("none", "")
        place = f"event {at} ({shape_of(last)})"
        reached[kind_of(last[1], reference.export_keys)] += 1
        problem = "" if died.code == -9 else f"it ended with {died.code}: {died.told}"
        problem = problem or problem_after(folder, SHORT, reference)
        if problem:
            failures.append(f"{place}: {problem}")
        _clear(folder)
    tried = sum(reached.values())
    events = len(reference.outcome.events)
    about = f"kill -9 at file events of {events}, then repeated: same bytes, nothing left"
    return Figure(tried, tried - len(failures), 60, about, failures, {"kinds": dict(reached)})


def random_kills(
    work: Path,
    draw: random.Random,
    count: int,
    *,
    command: Sequence[str],
    reference: Made,
    signals: Sequence[signal.Signals] = SIGNALS,
) -> Figure:
    """kill -9, SIGTERM and Ctrl-C at random moments of a run, then the command again."""
    failures = []
    seconds: dict[str, list[float]] = defaultdict(list)  # from the signal to the end
    for number in range(count):
        folder = folder_for(work / f"random-{number}", work)
        how = signals[number % len(signals)]
        moment = draw.uniform(0, reference.outcome.seconds)
        ended = Fork(command, folder).wait(kill_after=moment, how=how)
        if ended.code:
            seconds[how.name].append(round(ended.seconds - moment, 2))
        problem = "" if ended.code in (0, -how, 128 + how) else f"it ended with {ended.code}"
        if ended.code == 128 + how and [*folder.glob("runs/**/run.json")]:
            code = json.loads((newest(folder) / "run.json").read_text())["exit"]
            problem = problem or ("" if code == ended.code else f"run.json says exit {code}")
        if problem := problem or problem_after(folder, command, reference):
            failures.append(f"{how.name} after {moment:.2f} s: {problem}: {ended.told}")
        _clear(folder)
    about = f"signals at random times of `{' '.join(command[:2])}`, then repeated: same bytes"
    more = {"seconds to the end": {name: max(times) for name, times in seconds.items()}}
    return Figure(count, count - len(failures), 50, about, failures, more)


def races(work: Path, draw: random.Random, count: int, *, reference: Made) -> Figure:
    """Two of the same command at once, in one run directory or in two; every fifth pair is a run
    and `compress gc`.
    """
    failures, ends = [], Counter[str]()
    for number in range(count):
        folder = folder_for(work / f"race-{number}", work)
        command = [*SHORT, "hydra.run.dir=runs/smoke/one"] if number % 2 else [*SHORT]
        with_gc = number % 5 == 4
        first = Fork(command, folder)
        time.sleep(draw.uniform(0, 0.5 * reference.outcome.seconds if with_gc else 1.0))
        other = ["gc", "--store", "store", "--yes", "--all"] if with_gc else command
        second = Fork(other, folder)
        codes = [second.wait().code, first.wait().code]
        ends[f"{'gc' if with_gc else 'run'} {codes[0]}, run {codes[1]}"] += 1

        # Whoever comes second may be told to wait; nobody may be damaged.
        problem = "" if set(codes) <= {0, 3 if with_gc else 0, 5} else f"exit codes {codes}"
        problem = problem or problem_after(folder, command, reference)
        if problem:
            failures.append(f"pair {number}: {problem}")
        _clear(folder)
    about = "pairs of processes on one run and store, then repeated: same bytes"
    return Figure(count, count - len(failures), 20, about, failures, {"exit codes": dict(ends)})


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own in a folder, None where none may be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    options = ["-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", *options], stderr=subprocess.DEVNULL
    )
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.call(["umount", "-l", str(folder)])


def full_disks(work: Path, draw: random.Random, count: int, *, reference: Made) -> Figure:
    """The disk is full from a file event on: exit 5 and a sentence with bytes, what was finished
    whole, and the same bytes when there is room again.
    """
    failures = []
    on_tmpfs = False
    places = points(reference, count, draw, every_shape=False)
    if count > 2:
        places[0] = 1, "run", "the very first event"
    with small_disk(work / "small") as disk:
        on_tmpfs = disk is not None
        for number, (at, _, shape) in enumerate(places):
            folder = folder_for((disk or work) / f"full-{number}", work)
            filler = (disk or work) / "filler"
            limited = number == count - 1 and count > 1
            plan = Plan(full_at=at, filler=str(filler) if disk else "")
            if limited:
                plan, shape = Plan(longest_bytes=400_000), "a file longer than it may be"
            ended = fault_forks.run(SHORT, folder, plan)
            filler.unlink(missing_ok=True)
            problem = full_problem(ended) or problem_after(folder, SHORT, reference)
            if problem:
                failures.append(f"event {at} ({shape}): {problem}")
            _clear(folder)
    about = f"disk full ({'tmpfs' if on_tmpfs else 'writes refused'}) at a file event, then room"
    return Figure(count, count - len(failures), 10, about, failures)


def full_problem(ended: Outcome) -> str:
    """What is wrong with how a run ended on a full disk."""
    if ended.code != 5:
        return f"it ended with {ended.code}: {ended.told}"
    return "" if FULL.search(ended.told) else f"it does not say how much it needs: {ended.told}"
