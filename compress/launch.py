"""From a command line to a checked `Recipe`: Hydra composes, and nothing that Hydra could execute
gets that far.

Hydra runs `_target_` nodes below its own `hydra` key before the program's main (callbacks,
launchers, log handlers), and the resolver `oc.env` would copy secrets into records. So recipes,
their --config-dir and all overrides are first read as plain data and refused when they hold
`_target_`, `oc.env` or any `hydra` key outside ALLOWED_HYDRA; while composing, the resolver is
disabled and the composed `hydra` node, of every job of a sweep, is compared with the one a trusted
recipe gives.
"""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from compress.assets import configs_dir, recipes_dir
from compress.config import register, schema_named
from compress.errors import ConfigError, nearest, refuse_credentials
from compress.recipe_text import ALLOWED_HYDRA, check_override, own_folder, refuse

# of Hydra's; its argparse would take any abbreviation of these, and of those that choose another
# file
FLAGS = (
    "--help",
    "-h",
    "--hydra-help",
    "--version",
    "--cfg",
    "-c",
    "--resolve",
    "--package",
    "-p",
    "--run",
    "-r",
    "--multirun",
    "-m",
    "--config-dir",
    "-cd",
    "--info",
    "-i",
)
LONG_FLAGS = {
    "-cd": "--config-dir",
    "-c": "--cfg",
    "-p": "--package",
}  # of the flags that take a value
MOST_JOBS = 1_000  # of a sweep
COMPOSE_SECONDS = (
    30  # a recipe takes a tenth of one; defaults and interpolations can double at every step
)
HELP = {"--help", "-h", "--hydra-help", "--info", "-i", "--version"}
# Of the composed `hydra` node: what is allowed to differ, and what Hydra itself writes there.
VARYING = (
    *ALLOWED_HYDRA,
    "runtime",
    "overrides",
    "mode",
    "searchpath",
    "job.config_name",
    "job.override_dirname",
    "job.id",
    "job.num",
)


def recipe_names(folder: Path) -> list[str]:
    """Recipes of a folder, by name."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def check_arguments(recipe: str, arguments: list[str]) -> tuple[Path, Path | None]:
    """Refuse an unknown recipe, executable content and refused flags before Hydra starts.

    `arguments` as `flags_first` leaves them. Returns the recipe's folder, and the user's own if
    there is one.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("-") and flag not in FLAGS:
            raise ConfigError(
                f"{flag} is not available; name the recipe after `run`, and add your own folder"
                f" with --config-dir DIR; {nearest(flag, FLAGS)}"
            )
        if not argument.startswith("-"):
            check_override(argument)
    own = own_folder(arguments)
    folder = own if own and (own / f"{recipe}.yaml").is_file() else recipes_dir()
    if not re.fullmatch(r"[\w.-]+", recipe) or not (folder / f"{recipe}.yaml").is_file():
        names = recipe_names(recipes_dir()) + (recipe_names(own) if own else [])
        raise ConfigError(
            f"recipe {recipe!r} does not exist; {nearest(recipe, names)}. Your own:"
            " --config-dir DIR"
        )
    return folder, own


def flags_first(arguments: list[str]) -> list[str]:
    """Flags joined with their values, before all overrides: Hydra's argparse accepts overrides
    only in one piece.
    """
    joined, rest = [], iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        flag = LONG_FLAGS.get(flag, flag)
        if argument in ("--info", "-i"):  # it would take the next argument for its own
            argument = "--info=all"
        joined.append(
            f"{flag}={value if equals else next(rest, '')}"
            if flag in LONG_FLAGS.values()
            else argument
        )
    return sorted(
        joined, key=lambda argument: not argument.startswith("-")
    )  # keeps the order within both kinds


def quoted(value: str) -> str:
    """A text as the value of an override: Hydra and OmegaConf read back every character of it."""
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", value)  # no interpolation
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), plain) + "'"


def expand_teacher(arguments: list[str]) -> list[str]:
    """`teacher=PATH_OR_HUB_ID` becomes `teacher=custom teacher.source=...` unless it is an option
    of configs/teacher/.
    """
    options = recipe_names(configs_dir() / "teacher")
    expanded: list[str] = []
    for argument in arguments:
        value = argument.removeprefix("teacher=")
        if value == argument or value in options:
            expanded.append(argument)
        elif value and (os.sep in value or value.endswith(".gguf") or Path(value).exists()):
            expanded += ["teacher=custom", f"teacher.source={quoted(value)}"]
        else:
            raise ConfigError(
                f"teacher={value!r} is neither an option nor a path nor a hub id (owner/name);"
                f" {nearest(value, options)}"
            )
    return expanded


def trust_hydra() -> None:
    """Make configs/ findable, and disable the resolver that reads the environment."""

    class Vocabulary(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("compress", f"file://{configs_dir()}")

    def no_environment(*_: Any) -> str:
        raise ConfigError(
            "the resolver oc.env is not available: it would copy the environment into records"
        )

    register()
    Plugins.instance().register(Vocabulary)
    OmegaConf.register_new_resolver("oc.env", no_environment, replace=True)


def compose(name: str, folder: Path, overrides: list[str]) -> Any:
    """The composed config `name` of a folder, with Hydra's own part below `hydra`. Runs nothing."""
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(name, overrides, return_hydra_config=True)


@contextmanager
def _in_time(recipe: str) -> Iterator[None]:
    """ConfigError when composing takes COMPOSE_SECONDS, or goes round in a circle."""
    timed = threading.current_thread() is threading.main_thread()

    def late(*_: Any) -> None:
        raise ConfigError(
            f"recipe {recipe!r} is not composed after {COMPOSE_SECONDS} s; its defaults or"
            " interpolations multiply: write them plainly"
        )

    before = signal.signal(signal.SIGALRM, late) if timed else None
    if timed:
        signal.setitimer(signal.ITIMER_REAL, COMPOSE_SECONDS)
    try:
        yield
    except ConfigError as error:  # OmegaConf may have added where it happened
        raise ConfigError(str(error).partition("\n    full_key")[0]) from error
    except RecursionError as error:
        raise ConfigError(
            f"recipe {recipe!r} goes round in a circle, in its defaults or interpolations, or is"
            " nested too deep"
        ) from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _trusted(composed: Any) -> dict[str, Any]:
    """The composed `hydra` node without what a recipe may say and what Hydra writes there."""
    node: Any = OmegaConf.to_container(composed.hydra, resolve=False)
    for *path, last in (name.split(".") for name in VARYING):
        table = node
        for key in path:
            table = table.get(key) or {}
        table.pop(last, None)
    return node


@cache
def _ours() -> dict[str, Any]:
    """The same of configs/base.yaml."""
    return _trusted(compose("base", configs_dir(), []))


def _check_hydra(composed: Any, recipe: str, own: Path | None) -> None:
    """Refuse a composed config whose `hydra` node is not the one of configs/base.yaml."""
    searched = [f"file://{own}"] if own else []
    if _trusted(composed) != _ours() or list(composed.hydra.searchpath) not in ([], searched):
        refuse(
            "settings of Hydra's launcher, sweeper, callbacks, jobs or logging",
            f"recipe {recipe!r}",
        )


def _jobs(composed: Any, overrides: list[str], recipe: str) -> list[list[str]]:
    """The overrides of every job of a sweep, as Hydra's basic sweeper makes them. ConfigError:
    refused ones, or too many jobs.
    """
    sweeper: Any = OmegaConf.to_container(composed.hydra.sweeper, resolve=True)
    params = sweeper.get("params") or {}
    if not isinstance(params, dict):
        raise ConfigError(
            f"hydra.sweeper.params of recipe {recipe!r} must be a table of KEY: VALUES, got"
            f" {params!r}"
        )
    written = [f"{key}={value}" for key, value in params.items()] + overrides
    for text in written:
        check_override(text)
    choices: dict[str, list[str]] = {}
    jobs = 1
    for override in OverridesParser.create().parse_overrides(written):
        key, swept = override.get_key_element(), override.is_discrete_sweep()
        values = (
            list(islice(override.sweep_string_iterator(), MOST_JOBS + 1))
            if swept
            else [override.get_value_element_as_str()]
        )
        choices[key] = [f"{key}={value}" for value in values]
    for some in choices.values():
        jobs *= len(some)
    if jobs > MOST_JOBS:
        raise ConfigError(
            f"the sweep has more than {MOST_JOBS:,} jobs; sweep fewer values, or in several"
            " commands"
        )
    return [list(job) for job in product(*choices.values())]


def _check_composed(
    folder: Path, recipe: str, overrides: list[str], own: Path | None, flags: set[str]
) -> None:
    """Compose without running anything: what Hydra would instantiate must be its own, and the
    recipe, or every job of a sweep, must make sense.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = {path.name for path in configs_dir().iterdir() if path.is_dir()}
    for override in parsed:
        if (
            override.key_or_group in groups
            and not override.is_sweep_override()
            and isinstance(override.value(), bool | int | float | None)
        ):
            options = recipe_names(configs_dir() / override.key_or_group)
            raise ConfigError(
                f"{override.input_line} names no option of {override.key_or_group}; allowed:"
                f" {', '.join(options)}"
            )
    where = (
        [f"hydra.searchpath=[{quoted(f'file://{own}')}]"] if own else []
    )  # where --config-dir puts it
    swept = bool({"-m", "--multirun"} & flags)
    fixed = [
        text
        for text, override in zip(overrides, parsed, strict=True)
        if not (swept and override.is_sweep_override())
    ]
    with _in_time(recipe):
        program = compose(recipe, folder, fixed + where)
        _check_hydra(program, recipe, own)
    for job in _jobs(program, overrides, recipe) if swept else [fixed]:
        with _in_time(recipe):
            composed = compose(recipe, folder, job + where) if swept else program
            if swept:
                _check_hydra(composed, recipe, own)
            if HELP & flags:
                continue
            with open_dict(composed):
                composed.pop("hydra")
            try:
                OmegaConf.to_object(composed)
                refuse_credentials(OmegaConf.to_container(composed, resolve=True), "")
            except OmegaConfBaseException:
                raise
            except (
                ValueError
            ) as error:  # a dataclass's own check; OmegaConf appends where it happened
                raise ConfigError(str(error).partition("\n    full_key")[0]) from error


def explain(error: Exception) -> str:
    """A composition error of Hydra or OmegaConf as one sentence with the nearest valid name."""
    chain: list[BaseException] = [error]
    while link := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(link)
    if ours := [str(cause) for cause in chain if isinstance(cause, ConfigError)]:
        return ours[0].partition("\n    full_key")[0]
    text = " | ".join(dict.fromkeys(str(link) for link in chain))
    full = re.search(r"full_key: (\S+)", text)
    groups = [path.name for path in configs_dir().iterdir() if path.is_dir()]
    if key := re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)'?", text):
        if "To append to your config use" in text and "reference_type=Dict" in text:
            missing = text.partition("config use +")[2].splitlines()[0].partition(" | ")[0]
            return f"{key[1]!r} is not in this table yet; write +{missing} to add it"
        schema = schema_named(key[2])
        return (
            f"unknown key {full[1] if full else key[1]!r};"
            f" {nearest(key[1], getattr(schema, '__dataclass_fields__', {}))}"
        )
    if wrong := re.search(r"\w+ is not a subclass of (\w+)\. value: (.*)", text):
        fields = ", ".join(getattr(schema_named(wrong[1]), "__dataclass_fields__", {}))
        return (
            f"{full[1] if full else wrong[1]} can't be {wrong[2].partition(' | ')[0]}; it is a"
            f" table, allowed in it: {fields}"
        )
    if option := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        folder = configs_dir() / option[1]
        if folder.is_dir():
            return (
                f"{option[1]}={option[2]!r} is no option;"
                f" {nearest(option[2], recipe_names(folder))}"
            )
        return f"group {option[1]!r} does not exist; {nearest(option[1], groups)}"
    if group := re.search(r"Could not override '([^']+)'", text):
        return f"{group[1]!r} is no key or group of this recipe; {nearest(group[1], groups)}"
    telling = ("could not be converted", "Invalid value", "Cannot assign")
    lines = [line for line in re.split(r" \| |\n", text) if any(words in line for words in telling)]
    first = (lines or text.splitlines() or [type(error).__name__])[0].split(" | ")[0]
    return f"{full[1]}: {first}" if full and full[1] not in first else first


def without_recipe(overrides: list[str]) -> dict[str, Any]:
    """The defaults of configs/base.yaml with overrides, as dataclasses by key, and the store: all
    that a verb without a recipe needs.
    """
    for override in overrides:
        check_override(override)
    trust_hydra()
    try:
        with _in_time("base"):
            composed = compose(
                "base",
                configs_dir(),
                [*expand_teacher(overrides), "+stages.nothing={}", "pipeline=[]"],
            )
            parts: dict[str, Any] = {
                key: OmegaConf.to_object(composed[key])
                for key in ("teacher", "data", "eval", "budget", "trainer")
            }
        parts["eval"].check_data_dir()
        parts["budget"].check(parts["eval"], list(parts["data"].heldout_names()))
        if not composed.store.strip():
            raise ConfigError("store is empty; name a directory, as in store=runs/.store")
        return parts | {"store": composed.store}
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def launch(recipe: str, arguments: list[str], task: Callable[[Any, Path, list[str]], int]) -> int:
    """Run `task(recipe, run directory, command)` for the composed recipe; with -m once for every
    job of the sweep.

    `command` is the command line that composes the same recipe again. Returns the worst exit code.
    ConfigError for whatever can't be composed, before any work and with nothing left behind.
    """
    arguments = flags_first(arguments)
    folder, own = check_arguments(recipe, arguments)
    arguments = expand_teacher(arguments)
    codes = [0]
    failures: list[Exception] = []

    def job(composed: Any) -> None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            command = [
                "run",
                recipe,
                *([f"--config-dir={own}"] if own else []),
                *HydraConfig.get().overrides.task,
            ]
            codes.append(task(OmegaConf.to_object(composed), run_dir, command))
        except Exception as error:  # Hydra would print its own line about it
            if failures:
                print(f"compress: {run_dir.name}: {error}", file=sys.stderr)
            failures.append(error)
        finally:
            for folder in (
                run_dir,
                run_dir.parent,
                run_dir.parent.parent,
            ):  # Hydra made them; a refused run leaves nothing
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed
    ours = [
        "hydra/job_logging=none",
        "hydra/hydra_logging=none",
    ]  # no log files, and no library is set to talk
    ours += (
        []
        if any(a.startswith("hydra.job.name=") for a in arguments)
        else [f"hydra.job.name={recipe}"]
    )
    sys.argv = ["compress run " + recipe, *arguments, *ours]
    try:
        trust_hydra()
        overrides = [a for a in arguments if not a.startswith("-")]
        _check_composed(
            folder,
            recipe,
            overrides,
            own,
            {a.partition("=")[0] for a in arguments if a.startswith("-")},
        )
        hydra.main(version_base="1.3", config_path=str(folder), config_name=recipe)(job)()
        if failures:
            raise failures[0]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return max(codes)
