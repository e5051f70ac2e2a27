"""What each verb of the command line does: parse, call, print."""

import sys
from pathlib import Path
from typing import Any

from compress import budget
from compress.assets import configs_dir, recipes_dir
from compress.command_line import Parser
from compress.errors import EXIT_BUDGET, EXIT_OK, ConfigError, ResourceError
from compress.threads import give_way

HELP = """\
compress: turn a teacher language model into a student that fits a budget,
and prove it on the files that ship.

  compress run RECIPE [KEY=VALUE ...]   run a recipe; repeat the command to resume. --plan shows
                                        time, disk and memory first
                                        Hydra's flags work: --cfg job, -m (sweep), --help,
                                        --config-dir DIR (your own recipes)
  compress solve TEACHER --budget NAME [LIMIT=VALUE ...]
                                        find the shape that meets a budget, by measuring; writes a
                                        recipe of it, --run runs that
  compress list                         recipes, stages and every option, with one line each
  compress score MODEL [--budget NAME] [--teacher T] [KEY=VALUE ...]
                                        score any checkpoint directory or GGUF file, also one made
                                        elsewhere
  compress ask RUN|BUNDLE|MODEL [QUESTION] [--alone] [--json] [--tokens N]
                                        talk to what was made, its teacher beside it; without
                                        QUESTION, a conversation
  compress compare RUN [RUN ...] [--html FILE] [--speed]
                                        stages of one run, or runs, stages (RUN/SLOT) and bundles
                                        side by side; writes one HTML page
  compress sync RUN --to wandb          copy a finished run's records into a tracker
  compress verify BUNDLE [--sha256 HEX] [--key PUBLIC_PEM]
                                        check every byte of a bundle: that it is unchanged, and with
                                        --key who signed it
  compress accept BUNDLE [--hub] [--local]
                                        measure the bundle's budget again, on this machine; --hub
                                        may ask the hub for teacher and text that it names, --local
                                        may open files outside the bundle
  compress serve BUNDLE|MODEL [--key-file FILE] [--teacher URL]
                                        one OpenAI-compatible door before the judged file; --teacher
                                        asks a larger model where it is unsure; `serve --help`
  compress tune BUNDLE|FILE.gguf [--out FILE] [--clients N]
                                        how llama.cpp runs it fastest on this machine, for
                                        `serve --tuning`
  compress sign BUNDLE --key PEM        sign a bundle, for `verify --key`
  compress doctor [--json]              what is installed, what works here, what lacks
  compress gc [--store DIR] [--runs DIR] [--yes] [--all]
                                        empty the store of what no run names; --all where no run
                                        that is known needs anything

--debug with any verb shows where in the program an error came from
exit codes: 0 ok, 2 configuration, 3 input or integrity, 4 budget violated,
            5 memory, disk, lock or a busy machine, 130/143 signals
"""


def run(arguments: list[str]) -> int:
    """Run a recipe, or with `--plan` say what it would cost."""
    if arguments[:1] in (["--help"], ["-h"]):
        print(HELP + "\n" + listing())
        return EXIT_OK
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError("run needs a recipe: compress run RECIPE; `compress list` names them")

    # Hydra composes the recipe; torch is imported only when that has gone well.
    from compress.launch import launch

    def task(recipe: Any, run_dir: Path, command: list[str]) -> int:
        give_way()  # before torch is imported
        from compress import pipeline

        if "--plan" in arguments:
            return pipeline.plan(recipe)
        return pipeline.run(recipe, run_dir, command)

    return launch(arguments[0], [a for a in arguments[1:] if a != "--plan"], task)


def listing() -> str:
    """Recipes, stages and every option, with the line that its file opens with."""
    titled_folders = [("recipes", recipes_dir())]
    for group in sorted({path.parent for path in configs_dir().glob("*/*.yaml")}):
        usage = f"{group.name}=NAME"
        if group.name == "stage":
            usage = "- /stage/NAME@stages.SLOT in a recipe"
        titled_folders.append((f"{group.name}  ({usage})", group))

    # A paragraph a folder: its title, then a line a file.
    paragraphs = []
    for title, folder in titled_folders:
        options = [
            f"  {path.stem:<22} {path.read_text().splitlines()[0].removeprefix('#').strip()}"
            for path in sorted(folder.glob("*.yaml"))
        ]
        paragraphs.append("\n".join([title, *options]))
    return "\n\n".join(paragraphs)


def list_all(arguments: list[str]) -> int:
    """Print the listing."""
    if arguments:
        raise ConfigError(f"list takes no arguments, got {' '.join(arguments)}")
    print(listing())
    return EXIT_OK


def _judge(
    scores: dict[str, float], intervals: dict[str, Any], limits: Any, unlimited: str = ""
) -> int:
    """Print one sentence a limit, or `unlimited` when there is none. Returns the exit code."""
    verdicts = budget.judge(scores, intervals, limits.limits, enforced=True)
    print("\n".join(f"{v['verdict']:<12} {v['sentence']}" for v in verdicts) or unlimited)
    return EXIT_BUDGET if budget.failed(verdicts, strict=limits.strict) else EXIT_OK


def score(arguments: list[str]) -> int:
    """Score any checkpoint directory or GGUF beside a teacher, and judge it against a budget."""
    from compress import session
    from compress.launch import without_recipe
    from compress.models.checkpoint import model_of
    from compress.report.answers import in_pairs, printed
    from compress.score.draft import check_draft, drafted

    parser = Parser(prog="compress score")
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", default="none")
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument(
        "--draft", action="store_true", help="time it as the draft of its teacher's .gguf, as well"
    )
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_intermixed_args(arguments)

    # What can't be scored is refused before the teacher is.
    parts = without_recipe(
        [f"budget={options.budget}", f"teacher={options.teacher}", *options.overrides]
    )
    model = model_of(options.model)
    if model.runtime == "onnxruntime":
        from compress.formats.onnx_folder import check_folder

        check_folder(model.path)
    limits = parts.pop("budget")
    scorer, teacher = session.open_scorer(**parts)
    for remark in scorer.check_tokenizer(model):
        print(remark, file=sys.stderr)
    target = check_draft(teacher.gguf, model, scorer.prompts) if options.draft else None

    # The teacher first: what the model is measured against.
    reference = scorer.measure(teacher)
    measured = scorer.measure(model, against=reference, limits=[limits.limits])
    beside = scorer.beside(measured, reference, None)
    scores = measured.scores | beside.scores
    intervals = measured.intervals | beside.intervals
    if target is not None:
        setup = scorer.setup
        more, spread = drafted(target, model.path, setup.prompts, setup.threads, session.log)
        scores, intervals = scores | more, intervals | spread

    _print_scores(scores, reference.scores)
    if beside.excluded:
        print(
            "left out of kept, because the teacher is not above chance there:"
            f" {', '.join(beside.excluded)}"
        )
    if worst := in_pairs(reference.answers, measured.answers)[:5]:
        print("\n".join(["the worst answers:", *map(printed, worst), ""]))
    return _judge(scores, intervals, limits)


def _print_scores(scores: dict[str, float], reference: dict[str, float]) -> None:
    """A table of scores by name, each beside the teacher's where it has one."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value", "teacher")
    for name in sorted(scores):
        value = reference.get(name)
        beside = "" if value is None else budget.human(name, value)
        table.add_row(name, budget.human(name, scores[name]), beside)
    Console().print(table)


def ask(arguments: list[str]) -> int:
    """Talk to a run, a bundle or any model, its teacher beside it."""
    usage = "compress ask RUN|BUNDLE|MODEL [QUESTION] [--tokens N] [--alone] [--json] [--store DIR]"
    parser = Parser(prog="compress ask", usage=usage)
    names = (
        "a run, a stage of it as RUN/SLOT, a bundle; or a checkpoint or ONNX directory, a GGUF file"
    )
    question = "without a QUESTION: a conversation, or from a pipe a question a line"
    parser.add_argument(
        "target", nargs="+", help=f"{names}; {question}", metavar="RUN|BUNDLE|MODEL"
    )
    parser.add_argument("--tokens", type=int, default=256, help="at most so many an answer")
    parser.add_argument("--alone", action="store_true", help="leave the teacher out")
    parser.add_argument("--json", action="store_true", help="a line of JSON a question")
    store = "where a bundle's teacher is imported to"
    parser.add_argument("--store", type=Path, default=Path("runs/.store"), help=store)
    options = parser.parse_intermixed_args(arguments)

    # A wrong command line is refused before the runtimes are imported.
    from compress import ask as conversation

    target, *words = options.target
    conversation.ask(
        target,
        " ".join(words) if words else None,
        options.tokens,
        options.alone,
        options.json,
        options.store,
    )
    return EXIT_OK


def compare(arguments: list[str]) -> int:
    """Print the stages of one run, or several candidates beside the first,
    and write one HTML page.
    """
    from compress.report.compare import check_same_settings, differences
    from compress.report.html import write_html
    from compress.report.records import open_run
    from compress.report.table import compare_table, print_table, stage_table, verdict_lines

    parser = Parser(prog="compress compare")
    parser.add_argument(
        "runs",
        nargs="+",
        help=(
            "a run directory, RECIPE/TIME, RECIPE for its newest run; one slot of it as RUN/SLOT; a"
            " bundle"
        ),
    )
    parser.add_argument("--html", type=Path, default=Path("compare.html"))
    parser.add_argument(
        "--speed",
        type=int,
        nargs="?",
        const=5,
        default=0,
        metavar="BLOCKS",
        help="time them again, interleaved A B B A so often",
    )
    options = parser.parse_intermixed_args(arguments)

    # What can't be compared is refused before anything is timed.
    first, *others = runs = [open_run(name) for name in options.runs]
    if options.speed and not others:
        parser.error("--speed compares with the first; name a second run, stage or bundle")
    check_same_settings(runs)
    speeds = _speed_sentences(runs, options.speed) if options.speed else []

    print_table(compare_table(runs) if others or first.chosen else stage_table(first.records))
    for run in others:
        print(f"{run.name} from {first.name}")
        for difference in differences(first, run):
            print(f"  {difference.metric:<24} {difference}")
        print()

    # Of a stage that was asked for, the verdicts on it alone.
    sentences = list(speeds)
    for run in runs:
        sentences += verdict_lines([run.final] if run.chosen else run.records)
    print("\n".join(sentences))
    write_html(runs, options.html, speeds)
    print(f"report  {options.html}")
    return EXIT_OK


def _speed_sentences(runs: list[Any], blocks: int) -> list[str]:
    """How many times as fast as the first of `runs` each other is, timed again in `blocks` of
    A B B A.
    """
    from compress.machine import available_threads
    from compress.report.compare import speed_sentence
    from compress.score.latency import Timing, compare_speed

    models = [run.model() for run in runs]  # all of them are looked for before one is timed
    timing = Timing(threads=available_threads())
    sentences = []
    for run, model in zip(runs[1:], models[1:], strict=True):
        ratios = compare_speed(models[0], model, timing, blocks)
        sentences += [speed_sentence(runs[0], run, metric, ratios[metric]) for metric in ratios]
    return sentences


def sync(arguments: list[str]) -> int:
    """Copy a run's records into a tracker, in place of what was copied of them before."""
    from compress.report.records import open_run
    from compress.track import check, open_tracker

    parser = Parser(prog="compress sync")
    parser.add_argument("run", help="a run directory, RECIPE/TIME, or RECIPE for its newest run")
    parser.add_argument("--to", required=True, help="wandb or jsonl")
    options = parser.parse_args(arguments)
    check(options.to)

    # The same calls as a run makes while it goes on.
    run = open_run(options.run)
    project = run.info.get("config", {}).get("track", {}).get("project", "compress")
    tracker = open_tracker(options.to, run.path, project)
    for record in run.records:
        tracker.record(record)
    tracker.finish(run.info.get("exit") or 0)

    if not tracker.alive:
        raise ResourceError(
            f"{options.to} did not take all of {run.name}; repeat the command when it can"
        )
    print(f"{run.name}: {len(run.records)} slots in {options.to}")
    return EXIT_OK


def gc(arguments: list[str]) -> int:
    """Remove from the store what no run directory names."""
    from compress.collect import empty

    parser = Parser(prog="compress gc")
    parser.add_argument("--store", default="runs/.store")
    parser.add_argument(
        "--runs",
        metavar="DIR",
        help="holds run directories besides those that the store lists; without it ./runs",
    )
    parser.add_argument(
        "--yes", action="store_true", help="really remove; without it only the count is printed"
    )
    parser.add_argument(
        "--all", action="store_true", help="even when no run that is known needs anything finished"
    )
    options = parser.parse_args(arguments)

    collected, remarks = empty(
        options.store, options.runs, everything=options.all, dry_run=not options.yes
    )
    for remark in remarks:
        print(remark, file=sys.stderr)
    outcome = "removed" if options.yes else "can go; repeat with --yes to remove them"
    print(f"{collected.things} things, {collected.bytes / 1e6:,.1f} MB {outcome}")
    return EXIT_OK
