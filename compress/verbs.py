"""The verbs besides `run` and `list`: score, compare, verify, accept, gc."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from compress import budget
from compress.errors import EXIT_BUDGET, EXIT_OK, ConfigError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}; `compress --help` shows every verb")


def _compose(overrides: list[str]) -> Any:
    """The smallest recipe around the defaults of configs/base.yaml, as dataclasses; for verbs that have no recipe."""
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from compress.assets import configs_dir
    from compress.launch import check_override, compose, expand_teacher, explain, trust_hydra

    for override in overrides:
        check_override(override)
    trust_hydra()
    try:
        composed = compose("base", configs_dir(), [*expand_teacher(overrides), "+stages.nothing={}", "pipeline=[]"])
        parts = {key: OmegaConf.to_object(composed[key]) for key in ("teacher", "data", "eval", "budget", "trainer")}
        return parts | {"store": composed.store}
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def _judge(scores: dict[str, float], intervals: dict[str, Any], limits: Any, unlimited: str = "") -> int:
    """Print one sentence a limit, or `unlimited` when there is none. Returns the exit code."""
    verdicts = budget.judge(scores, intervals, limits.limits, enforced=True)
    print("\n".join(f"{v['verdict']:<12} {v['sentence']}" for v in verdicts) or unlimited)
    return EXIT_BUDGET if budget.failed(verdicts, strict=limits.strict) else EXIT_OK


def score(arguments: list[str]) -> int:
    """Score any checkpoint directory or GGUF beside a teacher, and judge it against a budget."""
    from rich.console import Console
    from rich.table import Table

    from compress import session
    from compress.checkpoint import check
    from compress.score.scorer import Model

    parser = _Parser(prog="compress score")
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="none")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)
    parts = _compose([f"budget={options.budget}", f"teacher={options.teacher}", *options.overrides])
    if options.model.suffix != ".gguf":
        check(options.model)
    elif not options.model.is_file():
        raise ValueError(f"{options.model} does not exist; give a checkpoint directory or a .gguf file")
    limits = parts.pop("budget")
    scorer, teacher = session.open_scorer(**parts)
    reference = scorer.measure(Model(teacher.path, teacher.digest))
    measured = scorer.measure(Model.open(options.model))
    relative, intervals, excluded = scorer.beside(measured, reference, None)
    scores = measured.scores | relative
    table = Table("metric", "value", "teacher")
    for name in sorted(scores):
        mine, other = scores[name], reference.scores.get(name)
        table.add_row(name, budget.human(name, mine), "" if other is None else budget.human(name, other))
    Console().print(table)
    if excluded:
        print(f"left out of kept, because the teacher is not above chance there: {', '.join(excluded)}")
    return _judge(scores, intervals, limits)


def compare(arguments: list[str]) -> int:
    """Print the stages of one run, or several runs side by side, and write one HTML page."""
    from compress.report.html import write_html
    from compress.report.records import load_run, resolve
    from compress.report.table import compare_table, print_table, stage_table, verdict_lines

    parser = _Parser(prog="compress compare")
    parser.add_argument("runs", nargs="+", help="a run directory, RECIPE/TIME, or RECIPE for its newest run")
    parser.add_argument("--html", type=Path, default=Path("compare.html"))
    parser.add_argument("--stages", action="store_true", help="all stages of every run, not only what ships")
    options = parser.parse_args(arguments)
    runs = [load_run(resolve(name)) for name in options.runs]
    print_table(stage_table(runs[0].records) if len(runs) == 1 else compare_table(runs, stages=options.stages))
    for run in runs:
        print("\n".join(verdict_lines(run.records)))
    write_html(runs, options.html)
    print(f"report  {options.html}")
    return EXIT_OK


def verify(arguments: list[str]) -> int:
    """Check every byte of a bundle."""
    from compress.export.bundle import verify_bundle

    parser = _Parser(prog="compress verify")
    parser.add_argument("bundle", type=Path)
    options = parser.parse_args(arguments)
    manifest = verify_bundle(options.bundle)
    print(f"{options.bundle}: {len(manifest['files']) + 2} files verified; run {manifest['run']}, budget {manifest['budget']}")
    return EXIT_OK


def accept(arguments: list[str]) -> int:
    """Measure a bundle's budget again on this machine. The teacher is used when it can be had, for the KL."""
    from compress import session
    from compress.config import Budget, Data, Eval, Limit, Teacher, Trainer
    from compress.export.bundle import verify_bundle
    from compress.score.paired import paired_scores
    from compress.score.scorer import Model

    parser = _Parser(prog="compress accept")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--store", default="runs/.store")
    options = parser.parse_args(arguments)
    manifest = verify_bundle(options.bundle)
    config = manifest["config"]
    limits = Budget({name: Limit(**limit) for name, limit in config["budget"]["limits"].items()}, {}, config["budget"]["strict"])
    model = Model.open(options.bundle / manifest["judged"])
    print(f"verified; measuring {manifest['judged']} on this machine", file=sys.stderr)
    how, reference = (Data(**config["data"]), Eval(**config["eval"]), Trainer(), options.store), None
    try:
        scorer, teacher = session.open_scorer(Teacher(**config["teacher"]), *how)
        if teacher.digest == manifest["teacher"]["digest"]:
            reference = scorer.measure(Model(teacher.path, teacher.digest))
    except ValueError as error:
        print(f"the teacher can't be had here ({error}); limits on KL stay undecided", file=sys.stderr)
        scorer, _ = session.open_scorer(Teacher(str(options.bundle.absolute() / "hf")), *how)  # for its tokenizer
    measured = scorer.measure(model)
    scores, intervals = measured.scores, {}
    items = [json.loads(line) for line in (options.bundle / "teacher_items.jsonl").read_text().splitlines()]
    if items:
        paired = paired_scores(measured.items, items, measured.chance)
        scores, intervals = scores | paired.scores, paired.intervals
    if reference is not None:
        near = scorer.compare(measured, reference)
        scores = scores | {"kl_to_teacher": near["kl"], "top1_agree": near["top1"]}
    return _judge(scores, intervals, limits, "the bundle's recipe set no limits; nothing to accept")


def gc(arguments: list[str]) -> int:
    """Remove from the store what no run directory names."""
    from compress.store import Store

    parser = _Parser(prog="compress gc")
    parser.add_argument("--store", type=Path, default=Path("runs/.store"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--yes", action="store_true", help="really remove; without it only the count is printed")
    options = parser.parse_args(arguments)
    if not options.store.is_dir():
        raise ValueError(f"there is no store at {options.store}; name it with --store DIR")
    runs = list(options.runs.glob("*/*/run.json"))
    keep = {key for file in runs for key in json.loads(file.read_text())["keys"]}
    digests = {json.loads(record.read_text())["digest"] for file in runs for record in file.parent.glob("*/record.json")}
    things, size = Store(options.store).gc(keep, digests, dry_run=not options.yes)
    print(f"{things} things, {size / 1e6:,.1f} MB {'removed' if options.yes else 'can go; repeat with --yes to remove them'}")
    return EXIT_OK
