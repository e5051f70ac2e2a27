"""`compress solve`: from a teacher and a budget to a shape, and to a recipe that makes it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.budget import LIMIT_METRICS, Limit
from compress.command_line import Parser
from compress.errors import EXIT_OK, ConfigError, nearest
from compress.quant.settings import GridName
from compress.threads import give_way

if TYPE_CHECKING:
    from compress.search.solution import Solution
    from compress.session import Session

# Grids with an option of configs/export/ of their own.
GRIDS = [grid for grid in GridName if not grid.startswith("int")]
SOLVABLE = (
    *("size_bytes", "params", "latency_ms_p50"),
    *("tok_per_sec", "ttft_ms_p50", "peak_rss_bytes"),
)
AT_LEAST = ("tok_per_sec",)  # of these more is better
CHOICES = ("data", "eval", "trainer")  # groups that the command line may choose of
USAGE = (
    "compress solve TEACHER --budget NAME [LIMIT=VALUE ...] [KEY=VALUE ...] [--minutes N]"
    " [--grid NAME] [--out FILE] [--no-speed] [--run]"
)


def solve(arguments: list[str]) -> int:
    """Find the shape of a teacher that a budget allows, write its recipe, and with --run run it."""
    parser = Parser(prog="compress solve", usage=USAGE)
    parser.add_argument("teacher", help="an option as `embedded`, a path or a hub id")
    parser.add_argument("--budget", default="none", help="an option of configs/budget/")
    parser.add_argument("--minutes", type=float, default=20.0, help="that the search may take")
    parser.add_argument("--grid", default="iq4_nl", help="what the file is rounded to")
    parser.add_argument("--out", type=Path, help="the recipe; without it solved/NAME.yaml")
    parser.add_argument("--no-speed", action="store_true", help="time nothing")
    parser.add_argument("--run", action="store_true", help="run the recipe, down to the bundle")
    parser.add_argument("settings", nargs="*", metavar="LIMIT=VALUE|KEY=VALUE")
    options = parser.parse_intermixed_args(arguments)

    # A wrong command line is refused before anything heavy is imported.
    limits, overrides = _split(options.settings)
    file = _file(options)
    if not 0 < options.minutes < 1e6:
        parser.error(f"--minutes is {options.minutes}: allowed are minutes above 0")
    if options.grid not in GRIDS:
        raise ConfigError(f"--grid {options.grid!r} is no grid; {nearest(options.grid, GRIDS)}")

    _solved(options, limits, overrides, file)
    command = [file.stem, f"--config-dir={file.parent}"]
    print(f"recipe  {file}\nrun     compress run {' '.join(command)}")
    return _run(command) if options.run else EXIT_OK


def _split(settings: list[str]) -> tuple[dict[str, Limit], list[str]]:
    """Limits by metric, and overrides of base.yaml. ConfigError for a value that is no number, or a
    limit that tells nothing of a shape.
    """
    limits: dict[str, Limit] = {}
    overrides = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ConfigError(f"{setting!r} is no LIMIT=VALUE or KEY=VALUE; {USAGE}")

        # A limit that decides, one that can't, or what any verb takes.
        if name in SOLVABLE:
            limits[name] = _limit(name, value)
        elif name in LIMIT_METRICS:
            raise ConfigError(
                f"{name} can't be told of a shape before it is trained; limits for solve are"
                f" {', '.join(SOLVABLE)}. Put it into a budget of your own: the run judges it"
            )
        elif "." in name or name in (*CHOICES, "store"):
            overrides.append(setting)
        else:
            raise ConfigError(
                f"{name!r} is neither a limit nor a key; {nearest(name, [*SOLVABLE, *CHOICES])}"
            )
    return limits, overrides


def _limit(name: str, value: str) -> Limit:
    """A limit of the command line, at most or at least by what it is."""
    try:
        bound = float(value)
    except ValueError:
        bound = -1.0
    if not 0 < bound < 1e15:
        raise ConfigError(f"{name}={value}: needed is a number above 0, as in size_bytes=60e6")
    why = "given on the command line of solve"
    return Limit(min=bound, why=why) if name in AT_LEAST else Limit(max=bound, why=why)


def _file(options: Any) -> Path:
    """Where the recipe is written. ConfigError for a name that `compress run` would not take."""
    if options.out is None:
        teacher = re.sub(r"[^\w.-]+", "_", options.teacher.rstrip("/").rpartition("/")[2])
        return Path("solved") / f"{teacher or 'teacher'}_{options.budget}.yaml"
    file: Path = options.out
    if file.suffix != ".yaml" or not re.fullmatch(r"[\w.-]+", file.stem):
        raise ConfigError(
            f"--out {file}: a recipe is a .yaml file named by letters, digits and ._-, as in"
            " my_recipes/mine.yaml"
        )
    return file


def _solved(options: Any, limits: dict[str, Limit], overrides: list[str], file: Path) -> None:
    """Search, print and write the recipe."""
    give_way()  # before torch is imported
    from compress.config import Recipe
    from compress.formats.settings import Export
    from compress.launch import without_recipe
    from compress.search import recipe as recipes
    from compress.search.cutting import rows_of
    from compress.search.explore import Effort
    from compress.search.solution import (
        losses_alone,
        rate_of_healing,
        sentences,
        solve,
    )
    from compress.session import Session, log
    from compress.stages.qat import Qat

    parts = without_recipe([f"budget={options.budget}", f"teacher={options.teacher}", *overrides])
    budget = parts["budget"]
    budget.limits |= limits
    program = Recipe(
        **parts,
        export=Export([f"gguf:{options.grid.upper()}"]),
        stages={"qat": Qat(grid=GridName(options.grid))},
        pipeline=["qat"],
    )
    session = Session(program)
    solution = solve(
        session,
        budget.limits,
        Effort(),
        options.minutes,
        with_speed=not options.no_speed,
        log=log,
    )
    _print(solution)

    # The choice in words, and a grid for every matrix where that is worth measuring.
    lines = sentences(solution)
    allocation = _allocation(solution, options.grid, session)
    if allocation:
        (limit, most), grids = next(iter(allocation.items())), allocation["grids"]
        lines.append(f"grids: of {', '.join(grids)} one for every matrix, {limit} {most:,}")
        print(lines[-1])

    # What it was told, as a recipe says it.
    choices, values = _as_a_recipe(options.teacher, overrides, parts)
    asked = " and ".join(map(str, solution.bounds))
    title = f"{lines[0].partition(': ')[2]}: what `compress solve` chose for {asked}."
    recipes.write_recipe(
        file,
        recipes.Program(
            solution.shape,
            solution.full,
            options.grid,
            options.budget,
            limits,
            choices,
            values,
            title,
            lines[1:],
            losses_alone(solution),
            rows_of(solution.full, parts["data"].seq_len),
            rate_of_healing(solution),
            allocation,
        ),
    )


def _allocation(solution: Solution, grid: str, session: Session) -> dict[str, Any]:
    """What `allocate` of the recipe says: room within the limits is for more bits, and without room
    a matrix may lie on another grid of as many. Empty where there is one grid for all.
    """
    from compress.models.blocks import lengths_of
    from compress.models.checkpoint import load_stored, read_config
    from compress.quant.allocate import lies_on
    from compress.search.recipe import allocation
    from compress.search.solution import keeps_blocks, may_mix, mixture_bytes

    if not may_mix(solution):
        return {}
    teacher, most = session.teacher.path, mixture_bytes(solution)
    lengths = lengths_of(read_config(teacher)) | {"intermediate_size": solution.shape.ffn}
    held = lies_on(load_stored(teacher), GRIDS) if most and keeps_blocks(solution) else []
    return allocation(grid, lengths.values(), most, held)


def _as_a_recipe(
    teacher: str, overrides: list[str], parts: dict[str, Any]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Options of groups, and values of dotted keys, that the command line gave."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from compress.assets import configs_dir

    choices = {"teacher": teacher}
    values: dict[str, Any] = {}
    if not (configs_dir() / "teacher" / f"{teacher}.yaml").is_file():
        source = parts["teacher"].source
        place = Path(source).expanduser()
        choices = {"teacher": "custom"}
        values["teacher.source"] = os.path.abspath(place) if place.exists() else source

    # Values as the parser of overrides reads them.
    for override in OverridesParser.create().parse_overrides(overrides):
        name = override.get_key_element().lstrip("+")
        if name in CHOICES:
            choices[name] = str(override.value())
        else:
            values[name] = override.value()
    return choices, values


def _print(solution: Any) -> None:
    """The frontier as a table, then the choice."""
    from rich.console import Console
    from rich.table import Table

    from compress.search.solution import frontier, sentences

    rungs = [f"KL +{tokens:,}" for tokens, _ in solution.healed]
    table = Table("ids", "blocks", "FFN", "kv heads", "MB", "ms/token", "KL cut", *rungs)
    for shape in frontier(solution):
        figures = solution.figures[shape]
        speed = f"{figures['latency_ms_p50']:.2f}" if solution.speed else "-"
        healed = [f"{nats[shape]:.4f}" if shape in nats else "-" for _, nats in solution.healed]
        row = [f"{figures['size_bytes'] / 1e6:.1f}", speed, f"{solution.cut[shape]:.4f}", *healed]
        table.add_row(*(f"{value:,}" for value in shape), *row)
    Console().print(table)
    print("\n".join(sentences(solution)))


def _run(command: list[str]) -> int:
    """Run the recipe, as `compress run` does."""
    from compress.launch import launch

    def task(recipe: Any, run_dir: Path, line: list[str]) -> int:
        from compress import pipeline

        return pipeline.run(recipe, run_dir, line)

    return launch(command[0], command[1:], task)
