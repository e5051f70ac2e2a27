"""Hostile inputs of every kind: nothing of them runs, none hangs or fills the memory, and each is
refused in one sentence or does no harm.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fault_forks
from fault_forks import Figure, Outcome
from fault_models import CHECKPOINTS, GGUFS, MARK, TEMPLATES, TOKENIZERS, code_for
from fault_saves import SMALL, folder_for

SECONDS = 600  # of life, on a machine that does other things too
COMPUTING = 60
# The shortest whole run that opens a teacher, text, or a chat.
OPEN = ("run", "smoke", *SMALL, "pipeline=[depth]", "export=none")
CHAT = ("run", "smoke", *SMALL, "pipeline=[chat]", "export=none", "stages.chat.tokens=256")
SCORE = ("--teacher", "random", "eval=smoke", "data.seq_len=64", "data.heldout=[given/heldout.txt]")
NO_TASKS = "eval.tasks=[]"
# What a run starts by itself.
OWN_PROGRAMS = re.compile(r"(git|lscpu|ldconfig|gcc|cc|uname|nvidia-smi|ninja)\b")


class Given(NamedTuple):
    """What hostile inputs are made of."""

    checkpoint: Path
    gguf: Path
    bundle: Path
    store: Path  # in which the runs work


# Leaves the input in the folder; the command line that gets it.
Case = Callable[[Path, Given], list[str]]


def opening(line: tuple[str, ...], make: Callable[[Path, Path], str]) -> Case:
    """A run whose teacher is what `make` makes of a checkpoint."""

    def case(folder: Path, given: Given) -> list[str]:
        return [*line, NO_TASKS, f"teacher=./{make(folder, given.checkpoint)}"]

    return case


def reading(make: Callable[[Path, Path], str], *, scored: bool) -> Case:
    """A GGUF that `make` makes of another, scored or opened as a teacher."""

    def case(folder: Path, given: Given) -> list[str]:
        file = make(folder, given.gguf)
        if scored:
            return ["score", file, *SCORE, NO_TASKS]
        return [*OPEN, NO_TASKS, f"teacher=./{file}"]

    return case


def _model_cases() -> dict[str, Case]:
    """Runs on hostile checkpoints, tokenizers, templates and GGUF files."""
    cases: dict[str, Case] = {}
    for sort, makers in (("checkpoint", CHECKPOINTS), ("tokenizer", TOKENIZERS)):
        cases |= {f"{sort}: {name}": opening(OPEN, make) for name, make in makers.items()}
    cases |= {f"template: {name}": opening(CHAT, make) for name, make in TEMPLATES.items()}
    for number, (name, make) in enumerate(GGUFS.items()):
        cases[f"gguf: {name}"] = reading(make, scored=bool(number % 2))
    return cases


def text(name: str, data: bytes) -> Case:
    """A run that trains on a file."""

    def make(folder: Path, given: Given) -> list[str]:
        (folder / name).write_bytes(data)
        return [*OPEN, NO_TASKS, f"data.train=[{name}]"]

    return make


def source(name: str, put: Callable[[Path], object] = lambda path: None) -> Case:
    """A run that trains on a source, with something of that name in the folder."""

    def make(folder: Path, given: Given) -> list[str]:
        put(folder / name)
        return [*OPEN, NO_TASKS, f"data.train=['{name}']"]

    return make


TEXTS: dict[str, Case] = {
    "text: a line of 30 MB": text("a.jsonl", b'{"text": "' + b"a b " * 7_500_000 + b'"}\n'),
    "text: rows that are lists": text("a.jsonl", b"[1, 2]\n" * 9),
    "text: nested too deep": text("a.jsonl", b"[" * 100_000),
    "text: a number of 5,000 digits": text("a.jsonl", b'{"text": ' + b"7" * 5000 + b"}"),
    "text: half a character": text("a.jsonl", b'{"text": "cut \\ud83d"}\n' * 9),
    "text: a pickle called parquet": text("a.parquet", pickle.dumps({"a": 1})),
    "text: a script": text("a.py", b"raise SystemExit\n"),
    "text: a bomb": text("a.jsonl.gz", gzip.compress(bytes(200_000_000), 1)),
    "text: a pipe": source("a.txt", os.mkfifo),
    "text: without end": source("a.txt", lambda path: path.symlink_to("/dev/zero")),
    "text: a folder": source("a.txt", lambda path: path.mkdir()),
    "text: 500 times generated": source("generated:9x9:" * 500 + "nothing"),
    "text: words of an open turn": text(
        "a.jsonl", b'{"messages": [{"role": ["user"], "content": 5}]}\n'
    ),
}


def rows(name: str, data: bytes) -> Case:
    """A run judged on local rows of a task."""

    def make(folder: Path, given: Given) -> list[str]:
        (folder / "rows").mkdir()
        (folder / "rows" / name).write_bytes(data.replace(b"CODE", code_for(folder).encode()))
        return [*OPEN, "eval.tasks=[arc_easy]", "eval.data_dir=rows"]

    return make


def prompts(row: dict[str, object]) -> Case:
    """A run that puts open prompts of a file."""

    def make(folder: Path, given: Given) -> list[str]:
        (folder / "p.jsonl").write_text(json.dumps(row) + "\n")
        return [*OPEN, NO_TASKS, "eval.open_prompts=[p.jsonl]"]

    return make


TASKS: dict[str, Case] = {
    "task: rows of other types": rows("arc_easy.jsonl", b'{"question": 5, "choices": "a"}\n'),
    "task: rows nested too deep": rows("arc_easy.jsonl", b"[" * 100_000),
    "task: code": rows("arc_easy.yaml", b"task: arc_easy\ndoc_to_text: !function evil.f\n"),
    "task: nothing": rows("arc_easy.jsonl", b""),
    "task: a pattern that backtracks": prompts(
        {"id": "a", "prompt": "a" * 50, "pattern": "(a+)+$", "kind": "x", "answer": "a"}
    ),
}
RECIPE = "# Mine.\ndefaults:\n  - /base\n  - /stage/ptq@stages.a\n  - _self_\npipeline: [a]\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


def recipe(body: str, *flags: str, name: str = "r.yaml") -> Case:
    """A run of somebody's recipe, or with another file beside it."""

    def make(folder: Path, given: Given) -> list[str]:
        file = folder / "own" / name
        file.parent.mkdir(parents=True)
        file.write_text(body.replace("MARK", str(folder / MARK)).replace("DIR", str(folder)))
        if name != "r.yaml":
            (folder / "own" / "r.yaml").write_text(RECIPE)
        package = folder / "evilpkg"
        package.mkdir()
        (package / "__init__.py").write_text(code_for(folder))
        (package / "sub.py").write_text(code_for(folder))
        return ["run", "r", "--config-dir=own", *flags]

    return make


RECIPES: dict[str, Case] = {
    "recipe: _target_": recipe(RECIPE + "x: {_target_: os.system, command: touch MARK}\n"),
    "recipe: an escaped _target_": recipe(RECIPE + 'x: {"_t\\u0061rget_": os.system}\n'),
    "recipe: a callback": recipe(
        RECIPE + "hydra: {callbacks: {a: {_target_: os.system, command: touch MARK}}}\n"
    ),
    "recipe: the environment": recipe(RECIPE + "store: ${oc.env:HOME}\n"),
    "recipe: the environment of a sweep": recipe(
        RECIPE + "hydra: {sweeper: {params: {+hydra.job.env_set.PYTHONPATH: DIR, seed: '0,1'}}}\n",
        "-m",
    ),
    "recipe: a launcher": recipe(RECIPE.replace("/base", "/base\n  - override /hydra/launcher: x")),
    "recipe: a python tag": recipe("a: !!python/object/apply:os.system ['touch MARK']\n"),
    "recipe: aliases that multiply": recipe(BOMB),
    "recipe: aliases beside it": recipe(BOMB, name="x.yaml"),
    "recipe: itself": recipe("a: &a [*a]\n"),
    "recipe: its own default": recipe("defaults: [r]\n"),
    "recipe: 20,000 brackets": recipe("[" * 20_000),
    "recipe: a package as teacher": recipe(RECIPE, "teacher.source=packaged:evilpkg"),
    "recipe: a module as teacher": recipe(RECIPE, "teacher.source=packaged:evilpkg.sub"),
    "recipe: hydra's own folder": recipe("x: 1\n", name="hydra/e.yaml"),
    "recipe: a job of another package": recipe("# @package hydra.callbacks\nx: 1\n", name="e.yaml"),
}


def _folder_of_user(folder: Path, given: Given) -> list[str]:
    (folder / "mine" / "bundle").mkdir(parents=True)
    (folder / "mine" / "bundle" / "kept.txt").write_text("mine")
    return [*OPEN, NO_TASKS, "hydra.run.dir=mine"]


def _gc_of_user(folder: Path, given: Given) -> list[str]:
    for name in ("data", "notes", "entries"):
        (folder / "mine" / name).mkdir(parents=True)
        (folder / "mine" / name / "kept.txt").write_text("mine")
    return ["gc", "--store", "mine", "--yes", "--all"]


def bundle(change: Callable[[Path], object], verb: str = "accept") -> Case:
    """A bundle that a forger has changed and sealed again."""

    def make(folder: Path, given: Given) -> list[str]:
        from test_received_bundle import sealed

        shutil.copytree(given.bundle, folder / "b")
        change(folder / "b")
        if verb != "verify":
            sealed(folder / "b")
        return [verb, "b", *(["hi", "--tokens", "2"] if verb == "ask" else [])]

    return make


def _with(key: str, value: object) -> Callable[[Path], object]:
    """A change of the manifest; `key` may be a path of keys with dots."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        table = manifest
        *above, last = key.split(".")
        for name in above:
            table = table[name]
        table[last] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def _custom_ops(folder: Path) -> None:
    """A directory of ONNX Runtime that names a library."""
    (folder / "onnx").mkdir()
    (folder / "onnx" / "ops.so").write_bytes(b"\x7fELF")
    options = {"custom_ops_library": "ops.so"}
    config = {"model": {"decoder": {"session_options": options}}, "search": {}}
    (folder / "onnx" / "genai_config.json").write_text(json.dumps(config))
    _with("judged", "onnx")(folder)


def _sums(old: str, new: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        sums = folder / "SHA256SUMS"
        sums.write_text(sums.read_text().replace(old, new))

    return change


BUNDLES: dict[str, Case] = {
    "bundle: a library": bundle(_custom_ops),
    "bundle: judged above it": bundle(_with("judged", "../outside")),
    "bundle: judged anywhere": bundle(_with("judged", "/etc")),
    "bundle: a newer schema": bundle(_with("schema", 99)),
    "bundle: a package as teacher": bundle(_with("config.teacher.source", "packaged:evilpkg.sub")),
    "bundle: a file of the machine as text": bundle(_with("config.data.heldout", ["/etc/passwd"])),
    "bundle: rows without end": bundle(_with("config.eval.heldout_sequences", 10**9)),
    "bundle: a manifest of nothing": bundle(
        lambda b: (b / "manifest.json").write_text("{}"), "verify"
    ),
    "bundle: sums of files above": bundle(_sums("  hf/", "  ../hf/"), "verify"),
    "bundle: sums of files anywhere": bundle(_sums("  hf/", "  /etc/"), "verify"),
    "bundle: a link": bundle(lambda b: (b / "l").symlink_to("/etc/passwd"), "verify"),
    "bundle: a pipe": bundle(lambda b: os.mkfifo(b / "p"), "verify"),
    "bundle: requests nested too deep": bundle(
        lambda b: (b / "requests.jsonl").write_text("[" * 50_000)
    ),
    "bundle: a model cut short": bundle(
        lambda b: os.truncate(next(b.glob("*.gguf")), 5000)
    ),
    "bundle: a pickle of weights": bundle(
        lambda b: (b / "hf" / "model.safetensors").write_bytes(pickle.dumps({})), "ask"
    ),
    "folder: a run directory of the user's": _folder_of_user,
    "folder: a store of the user's": _gc_of_user,
}  # fmt: skip
CASES = {**_model_cases(), **TEXTS, **TASKS, **RECIPES, **BUNDLES}
# A few of each kind that take little time.
FEW = (
    "checkpoint: a pickle called safetensors", "checkpoint: auto_map of a tokenizer",
    "gguf: an array of 2^60", "recipe: _target_", "recipe: a module as teacher",
    "bundle: a library", "bundle: judged above it", "text: a pickle called parquet",
)  # fmt: skip


def _problem(folder: Path, ended: Outcome) -> str:
    """What is wrong with how a command on a hostile input ended."""
    if [*folder.rglob(MARK)]:
        return "EXECUTED"
    strange = [
        words
        for words in ended.started
        if (program := words.partition(" ")[0]) != sys.executable
        and not OWN_PROGRAMS.match(program.split("/")[-1])
    ]
    if strange:
        return f"it started {strange}"
    if ended.outside:
        return f"it connected to {ended.outside}"
    if ended.limit:
        return f"ended after {ended.seconds:.0f} s for its {ended.limit}"
    if ended.has_traceback or ended.code not in (0, 2, 3, 5):
        return f"exit {ended.code}: {ended.told}"
    if [path for path in folder.glob("mine") if not [*path.rglob("kept.txt")]]:
        return "a file of the user's is gone"
    return ""


def hostile(work: Path, run_dir: Path, draw: random.Random, count: int) -> Figure:
    """Each case in a fork of its own, under limits of time and memory; `run_dir`: a whole run
    whose files the inputs are made of.
    """
    given = Given(
        work.parent / "given" / "teacher",
        next((run_dir / "bundle").glob("*.gguf")),
        run_dir / "bundle",
        work / "store",
    )
    names = [*CASES]
    if count < len(names):
        names = [
            *FEW[:count],
            *draw.sample(sorted(CASES.keys() - {*FEW}), max(0, count - len(FEW))),
        ]
    failures, ends = [], Counter[str]()
    slowest = ("", 0.0)
    for number, name in enumerate(names):
        folder = folder_for(work / f"case-{number}", work.parent)
        arguments = CASES[name](folder, given)
        if arguments[0] in ("run", "score"):
            arguments.append(f"store={given.store}")
        ended = fault_forks.run(
            arguments, folder, seconds=SECONDS, computing=COMPUTING, real=["programs"]
        )
        ends["harmless" if ended.code == 0 else f"exit {ended.code}"] += 1
        slowest = max(slowest, (name, ended.seconds), key=lambda pair: pair[1])
        if problem := _problem(folder, ended):
            failures.append(f"{name}: {problem}")
        shutil.rmtree(folder, ignore_errors=True)
    executed = sum("EXECUTED" in failure for failure in failures)
    about = "hostile inputs: nothing ran, no traceback, no hang, a sentence or no harm"
    more = {"executed": executed, "ends": dict(ends), "slowest": [slowest[0], round(slowest[1], 1)]}
    return Figure(len(names), len(names) - len(failures), 60, about, failures, more)
