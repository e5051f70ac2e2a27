"""A recipe composed by Hydra, and refused before it runs where it can't be trusted or meant."""

import math
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from compress.assets import configs_dir
from compress.config import Recipe, register, schema_named
from compress.errors import ConfigError, nearest, refuse_credentials
from compress.recipe_text import ALLOWED_HYDRA, check_override, refuse

HELP = {"--help", "-h", "--hydra-help", "--info", "-i", "--version"}

MOST_JOBS = 1_000  # of a sweep
# A recipe takes a tenth of one; defaults and interpolations can double at every step.
COMPOSE_SECONDS = 30
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
            continue

        # A hub id has a separator too; a folder of one name is looked for.
        is_place = value and (os.sep in value or value.endswith(".gguf") or Path(value).exists())
        if not is_place:
            raise ConfigError(
                f"teacher={value!r} is neither an option nor a path nor a hub id (owner/name);"
                f" {nearest(value, options)}"
            )
        expanded += ["teacher=custom", f"teacher.source={quoted(value)}"]
    return expanded


def expand_sources(arguments: list[str]) -> list[str]:
    """`data.train=...` without `data.weights=...` takes all documents alike: weights in the recipe
    are those of its own sources.
    """
    keys = {argument.partition("=")[0].lstrip("+") for argument in arguments}
    if "data.train" in keys and "data.weights" not in keys:
        return [*arguments, "data.weights=[]"]
    return arguments


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
def in_time(recipe: str) -> Iterator[None]:
    """ConfigError when composing computes for COMPOSE_SECONDS, or goes round in a circle: a busy
    machine may take its time.
    """
    timed = threading.current_thread() is threading.main_thread()  # no other gets signals

    def late(*_: Any) -> None:
        raise ConfigError(
            f"recipe {recipe!r} is not composed after {COMPOSE_SECONDS} s of computing; its"
            " defaults or interpolations multiply: write them plainly"
        )

    before = signal.signal(signal.SIGPROF, late) if timed else None
    if timed:
        # Again each second: what is raised within a finalizer or a callback, Python passes over.
        signal.setitimer(signal.ITIMER_PROF, COMPOSE_SECONDS, 1)
    try:
        yield
    except ConfigError as error:  # OmegaConf may have added where it happened
        raise ConfigError(_placed(str(error))) from error
    except RecursionError as error:
        raise ConfigError(
            f"recipe {recipe!r} goes round in a circle, in its defaults or interpolations, or is"
            " nested too deep"
        ) from error
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, before)


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


def _check_base(composed: Any, recipe: str) -> None:
    """ConfigError for a recipe that does not begin with configs/base.yaml: its keys mean nothing
    then.
    """
    if OmegaConf.get_type(composed) is not Recipe:
        keys = ", ".join(str(key) for key in composed if key != "hydra")
        raise ConfigError(
            f"recipe {recipe!r} is not made on the base of all recipes; write 'defaults:' with"
            f" '- /base' as its first entry; got the keys {keys or 'none'}"
        )


def _check_hydra(composed: Any, recipe: str, user_dir: Path | None) -> None:
    """Refuse a composed config whose `hydra` node is not the one of configs/base.yaml."""
    searched = [f"file://{user_dir}"] if user_dir else []
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

    # A later override of the same key takes the place of an earlier one.
    choices: dict[str, list[str]] = {}
    for override in OverridesParser.create().parse_overrides(written):
        key = override.get_key_element()
        if override.is_discrete_sweep():
            values = list(islice(override.sweep_string_iterator(), MOST_JOBS + 1))
        else:
            values = [override.get_value_element_as_str()]
        choices[key] = [f"{key}={value}" for value in values]

    # Counted before they are made: a product can be larger than memory.
    if math.prod(map(len, choices.values())) > MOST_JOBS:
        raise ConfigError(
            f"the sweep has more than {MOST_JOBS:,} jobs; sweep fewer values, or in several"
            " commands"
        )
    return [list(job) for job in product(*choices.values())]


def check_composed(
    folder: Path, recipe: str, overrides: list[str], user_dir: Path | None, flags: set[str]
) -> None:
    """Compose without running anything: what Hydra would instantiate must be its own, and the
    recipe, or every job of a sweep, must make sense.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    for override in parsed:
        _check_option(override)

    # The recipe as it is, without what the jobs of a sweep choose; found as --config-dir finds it.
    searched = []
    if user_dir:
        searched = [f"hydra.searchpath=[{quoted(f'file://{user_dir}')}]"]
    swept = bool({"-m", "--multirun"} & flags)
    fixed = [
        text
        for text, override in zip(overrides, parsed, strict=True)
        if not (swept and override.is_sweep_override())
    ]
    with in_time(recipe):
        program = compose(recipe, folder, fixed + searched)
        _check_base(program, recipe)
        _check_hydra(program, recipe, user_dir)

    # Every job before the first one runs; help is given on a recipe that makes no sense, too.
    for job in _jobs(program, overrides, recipe) if swept else [fixed]:
        with in_time(recipe):
            composed = program
            if swept:
                composed = compose(recipe, folder, job + searched)
                _check_hydra(composed, recipe, user_dir)
            if not HELP & flags:
                _check_values(composed)


def _check_option(override: Override) -> None:
    """ConfigError where a number or nothing stands for an option of a group, as in `budget=3`."""
    group = override.key_or_group
    if group not in _groups() or override.is_sweep_override():
        return
    if isinstance(override.value(), bool | int | float | None):
        options = recipe_names(configs_dir() / group)
        raise ConfigError(
            f"{override.input_line} names no option of {group}; allowed: {', '.join(options)}"
        )


def _check_values(composed: Any) -> None:
    """ConfigError where a composed config can't be meant like this, or gives access in a URL.
    Takes Hydra's own node out of it.
    """
    with open_dict(composed):
        composed.pop("hydra")
    check_keys(composed)
    for slot, stage in composed.stages.items():
        _check_table(stage, f"stages.{slot}: ")
    _check_table(composed)
    refuse_credentials(OmegaConf.to_container(composed, resolve=True), "")


def _check_table(node: Any, place: str = "") -> None:
    """ConfigError where a table's own check refuses its values, behind its place."""
    try:
        OmegaConf.to_object(node)
    except OmegaConfBaseException:
        raise
    except ValueError as error:
        raise ConfigError(place + _placed(str(error))) from error


def check_keys(node: Any, path: str = "") -> None:
    """ConfigError for a key that the dataclass of its table does not have: `+table.key=value` puts
    it there, and nobody would read it.
    """
    kind = OmegaConf.get_type(node)
    if isinstance(node, DictConfig) and not OmegaConf.is_interpolation(node) and is_dataclass(kind):
        names = {field.name for field in fields(kind)}
        for key in map(str, node):
            if key not in names:
                raise ConfigError(f"unknown key {f'{path}{key}'!r}; {nearest(key, names)}")
    if isinstance(node, DictConfig) and not (node._is_none() or node._is_missing()):
        for key in map(str, node):
            if not (OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key)):
                check_keys(node[key], f"{path}{key}.")


def explain(error: Exception) -> str:
    """A composition error of Hydra or OmegaConf as one sentence with the nearest valid name."""
    chain: list[BaseException] = [error]
    while link := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(link)

    # What a check of ours said stands as it is.
    if ours := [str(cause) for cause in chain if isinstance(cause, ConfigError)]:
        return _placed(ours[0])

    # What Hydra's grammar can't read.
    if errors := [link for link in chain if isinstance(link, OverrideParseException)]:
        return (
            f"the override {errors[0].override!r} can't be read; write KEY=VALUE, a list as"
            " 'KEY=[A,B]' in quotes, and a value with other signs than letters, digits and ._/- in"
            " quotes of its own, as in \"KEY='A B'\""
        )

    text = " | ".join(dict.fromkeys(str(link) for link in chain))
    if "Cannot merge DictConfig with ListConfig" in text:
        return f"{text.partition(':')[0]}: a list stands where a table belongs, as in 'stages: [a]'"
    match = re.search(r"full_key: (\S+)", text)
    full_key = match[1] if match else ""
    if sentence := _unknown_key(text, full_key) or _no_table(text, full_key) or _no_option(text):
        return sentence

    # Some other complaint: its own first line that says what is wrong, behind the key.
    telling = ("could not be converted", "Invalid value", "Cannot assign")
    lines = [line for line in re.split(r" \| |\n", text) if any(words in line for words in telling)]
    first = (lines or text.splitlines() or [type(error).__name__])[0].split(" | ")[0]
    return f"{full_key}: {first}" if full_key and full_key not in first else first


def _placed(message: str) -> str:
    """What a check said, behind the key that OmegaConf appends, unless it names that itself."""
    said, _, rest = message.partition("\n    full_key: ")
    key = (rest.splitlines() or [""])[0].strip()
    return said if not key or key in said else f"{key}: {said}"


def _unknown_key(text: str, full_key: str) -> str:
    """Of a key that is not in its table: the nearest that is, or how to add it; else ''."""
    match = re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)'?", text)
    if not match:
        return ""
    key, table = match.groups()

    # A table of free names takes any, with a plus in front.
    if "To append to your config use" in text and "reference_type=Dict" in text:
        missing = text.partition("config use +")[2].splitlines()[0].partition(" | ")[0]
        return f"{key!r} is not in this table yet; write +{missing} to add it"

    fields = getattr(schema_named(table), "__dataclass_fields__", {})
    return f"unknown key {full_key or key!r}; {nearest(key, fields)}"


def _no_table(text: str, full_key: str) -> str:
    """Of a value where a table belongs: what may be in that table; else ''."""
    match = re.search(r"\w+ is not a subclass of (\w+)\. value: (.*)", text)
    if not match:
        return ""
    table, rest = match.groups()
    fields = ", ".join(getattr(schema_named(table), "__dataclass_fields__", {}))
    return (
        f"{full_key or table} can't be {rest.partition(' | ')[0]}; it is a table, allowed in it:"
        f" {fields}"
    )


def _no_option(text: str) -> str:
    """Of a group or an option of one that does not exist: the nearest that does; else ''."""
    if match := re.search(r"Could not (?:find|load) '([^']+)/([^'/]+)'", text):
        group, option = match.groups()
        folder = configs_dir() / group
        if folder.is_dir():
            return f"{group}={option!r} is no option; {nearest(option, recipe_names(folder))}"
        return f"group {group!r} does not exist; {nearest(group, _groups())}"

    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]!r} is no key or group of this recipe; {nearest(match[1], _groups())}"
    return ""


def _groups() -> list[str]:
    """The groups of options that configs/ has."""
    return [path.name for path in configs_dir().iterdir() if path.is_dir()]
