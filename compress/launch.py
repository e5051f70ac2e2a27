"""From a command line to a checked `Recipe`: Hydra composes, and nothing that Hydra could execute gets that far.

Hydra runs `_target_` nodes below its own `hydra` key before the program's main (callbacks, launchers, log handlers), and the resolver
`oc.env` would copy secrets into records. So recipes, their --config-dir and all overrides are first read as plain data and refused when
they hold `_target_`, `oc.env` or any `hydra` key outside ALLOWED_HYDRA; while composing, the resolver is disabled and the composed
`hydra` node is compared with the one a trusted recipe gives.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from compress.assets import configs_dir, recipes_dir
from compress.config import SCHEMAS, register
from compress.errors import ConfigError, nearest, refuse_credentials

ALLOWED_HYDRA = ("run.dir", "sweep.dir", "sweep.subdir", "job.name", "sweeper.params")
FLAGS = (  # of Hydra's; its argparse would take any abbreviation of these, and of those that choose another file
    "--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p", "--run", "-r", "--multirun", "-m",
    "--config-dir", "-cd", "--info", "-i",
)  # fmt: skip
LONG_FLAGS = {"-cd": "--config-dir", "-c": "--cfg", "-p": "--package"}  # of the flags that take a value
OVERRIDE = re.compile(r"^(~|\+\+|\+)?(?P<key>[^=@]+)(@[^=]*)?(=|$)", re.DOTALL)


def recipe_names(folder: Path) -> list[str]:
    """Recipes of a folder, by name."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every key of nested dicts and lists."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        here = f"{path}.{key}" if path else str(key)
        yield here, value
        yield from _walk(value, here)


def _refuse(what: str, where: object) -> None:
    raise ConfigError(
        f"{where} holds {what}; a recipe is data and can't name code, the environment or Hydra's internals. "
        f"Allowed below hydra: {', '.join(ALLOWED_HYDRA)}"
    )


def check_text(text: str, where: object) -> None:
    """Refuse what Hydra or OmegaConf could execute, in one YAML document. ConfigError naming the file and the key."""
    header = re.search(r"^\s*#\s*@package\s+(\S+)", text, re.MULTILINE)
    if header and header.group(1).split(".")[0] == "hydra":
        _refuse("the package hydra", where)
    if re.search(r"oc\s*\.\s*env", text):
        _refuse("the resolver oc.env", where)
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    for path, value in _walk(tree):
        refuse_credentials(value if isinstance(value, str) else "", f"{where}, key {path}")
        first, *rest = path.split(".")
        below = ".".join(rest)
        if "_target_" in (first, *rest):
            _refuse("_target_", f"{where}, key {path}")
        if first == "defaults" and rest:
            entry = value if isinstance(value, str) and rest[-1].isdigit() else below
            if re.search(r"(^|[\s/.@])hydra([/.@]|$)", entry):
                _refuse(f"the defaults entry {entry!r}", where)
        allowed = any(f"{rule}.".startswith(f"{below}.") or below.startswith(f"{rule}.") for rule in ALLOWED_HYDRA)
        if first == "hydra" and rest and not allowed:
            _refuse(f"the key {path}", where)


def check_override(override: str) -> None:
    """Refuse an override of the command line that Hydra could execute."""
    if "_target_" in override:
        _refuse("_target_", f"override {override!r}")
    if re.search(r"oc\s*\.\s*env", override):
        _refuse("the resolver oc.env", f"override {override!r}")
    match = OVERRIDE.match(override)
    key = match["key"].strip() if match else override
    refuse_credentials(override.replace("\\", ""), f"the override of {key}")
    hydra = re.split(r"[./@]", key)[0] == "hydra" or "@hydra" in override.split("=")[0]
    if hydra and key.removeprefix("hydra.") not in ALLOWED_HYDRA and not key.startswith("hydra.sweeper.params."):
        _refuse(f"the key {key}", f"override {override!r}")


def check_arguments(recipe: str, arguments: list[str]) -> tuple[Path, Path | None]:
    """Refuse an unknown recipe, executable content and refused flags before Hydra starts.

    `arguments` as `flags_first` leaves them. Returns the recipe's folder, and the user's own if there is one.
    """
    folders = [argument.removeprefix("--config-dir=") for argument in arguments if argument.startswith("--config-dir=")]
    if len(folders) > 1 or "" in folders or not all(Path(folder).is_dir() for folder in folders):
        raise ConfigError(f"--config-dir {', '.join(map(repr, folders))} is not one directory; give the one folder that holds your recipes")
    own = Path(folders[0]).resolve() if folders else None
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("-") and flag not in FLAGS:
            raise ConfigError(
                f"{flag} is not available; name the recipe after `run`, and add your own folder with --config-dir DIR; {nearest(flag, FLAGS)}"
            )
        if not argument.startswith("-"):
            check_override(argument)
    if own:
        if link := next((path for path in own.rglob("*") if path.is_symlink() and path.is_dir()), None):
            raise ConfigError(f"--config-dir {own} holds a link to another folder, {link.name}, which is not checked; put the files there")
        for file in sorted(own.rglob("*.y*ml")):
            if "hydra" in file.relative_to(own).parts[:-1]:
                _refuse("a folder named hydra", own)
            check_text(file.read_text(), file)
    folder = own if own and (own / f"{recipe}.yaml").is_file() else recipes_dir()
    if not re.fullmatch(r"[\w.-]+", recipe) or not (folder / f"{recipe}.yaml").is_file():
        names = recipe_names(recipes_dir()) + (recipe_names(own) if own else [])
        raise ConfigError(f"recipe {recipe!r} does not exist; {nearest(recipe, names)}. Your own: --config-dir DIR")
    return folder, own


def flags_first(arguments: list[str]) -> list[str]:
    """Flags joined with their values, before all overrides: Hydra's argparse accepts overrides only in one piece."""
    joined, rest = [], iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        flag = LONG_FLAGS.get(flag, flag)
        joined.append(f"{flag}={value if equals else next(rest, '')}" if flag in LONG_FLAGS.values() else argument)
    return sorted(joined, key=lambda argument: not argument.startswith("-"))  # keeps the order within both kinds


def expand_teacher(arguments: list[str]) -> list[str]:
    """`teacher=PATH_OR_HUB_ID` becomes `teacher=custom teacher.source=...` unless it is an option of configs/teacher/."""
    options = recipe_names(configs_dir() / "teacher")
    expanded: list[str] = []
    for argument in arguments:
        value = argument.removeprefix("teacher=")
        if value == argument or value in options:
            expanded.append(argument)
        elif os.sep in value or value.endswith(".gguf") or Path(value).exists():
            expanded += ["teacher=custom", f"teacher.source='{value}'"]
        else:
            raise ConfigError(f"teacher={value!r} is neither an option nor a path nor a hub id (owner/name); {nearest(value, options)}")
    return expanded


def trust_hydra() -> None:
    """Make configs/ findable, and disable the resolver that reads the environment."""

    class Vocabulary(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("compress", f"file://{configs_dir()}")

    def no_environment(*_: Any) -> str:
        raise ConfigError("the resolver oc.env is not available: it would copy the environment into records")

    register()
    Plugins.instance().register(Vocabulary)
    OmegaConf.register_new_resolver("oc.env", no_environment, replace=True)


def compose(name: str, folder: Path, overrides: list[str]) -> Any:
    """The composed config `name` of a folder, with Hydra's own part below `hydra`. Runs nothing."""
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return hydra.compose(name, overrides, return_hydra_config=True)


def _check_composed(folder: Path, recipe: str, overrides: list[str]) -> None:
    """Compose without running anything: what Hydra would instantiate must be its own defaults, and the recipe must make sense."""

    def instantiated(config: Any) -> Any:
        node: Any = OmegaConf.to_container(config.hydra, resolve=False)
        node["sweeper"].pop("params", None)
        job = {key: node["job"][key] for key in ("env_set", "env_copy", "chdir")}
        return job | {key: node[key] for key in ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging", "hydra_help", "help", "env")}

    program = compose(recipe, folder, overrides)
    if instantiated(program) != instantiated(compose("base", configs_dir(), [])):
        _refuse("settings of Hydra's launcher, sweeper, callbacks or logging", f"recipe {recipe!r}")
    with open_dict(program):
        program.pop("hydra")
    try:
        OmegaConf.to_object(program)
        refuse_credentials(OmegaConf.to_container(program, resolve=True), "")
    except OmegaConfBaseException:
        raise
    except ValueError as error:  # a dataclass's own check; OmegaConf appends where it happened
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
            return f"{key[1]!r} is not in this table yet; write +{text.partition('config use +')[2].splitlines()[0]} to add it"
        schema = next((s for s in SCHEMAS.values() if s.__name__ == key[2]), None)
        return f"unknown key {full[1] if full else key[1]!r}; {nearest(key[1], getattr(schema, '__dataclass_fields__', {}))}"
    if option := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        folder = configs_dir() / option[1]
        if folder.is_dir():
            return f"{option[1]}={option[2]!r} is no option; {nearest(option[2], recipe_names(folder))}"
        return f"group {option[1]!r} does not exist; {nearest(option[1], groups)}"
    if group := re.search(r"Could not override '([^']+)'", text):
        return f"{group[1]!r} is no key or group of this recipe; {nearest(group[1], groups)}"
    lines = [line for line in re.split(r" \| |\n", text) if "could not be converted" in line or "Invalid value" in line]
    first = (lines or text.splitlines() or [type(error).__name__])[0].split(" | ")[0]
    return f"{full[1]}: {first}" if full and full[1] not in first else first


def without_recipe(overrides: list[str]) -> dict[str, Any]:
    """The defaults of configs/base.yaml with overrides, as dataclasses by key, and the store: all that a verb without a recipe needs."""
    for override in overrides:
        check_override(override)
    trust_hydra()
    try:
        composed = compose("base", configs_dir(), [*expand_teacher(overrides), "+stages.nothing={}", "pipeline=[]"])
        parts: dict[str, Any] = {key: OmegaConf.to_object(composed[key]) for key in ("teacher", "data", "eval", "budget", "trainer")}
        parts["budget"].check(parts["eval"], list(parts["data"].heldout_names()))
        return parts | {"store": composed.store}
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error


def launch(recipe: str, arguments: list[str], task: Callable[[Any, Path, list[str]], int]) -> int:
    """Run `task(recipe, run directory, command)` for the composed recipe; with -m once for every job of the sweep.

    `command` is the command line that composes the same recipe again. Returns the worst exit code. ConfigError for whatever can't be
    composed, before any work and with nothing left behind.
    """
    arguments = flags_first(arguments)
    folder, own = check_arguments(recipe, arguments)
    arguments = expand_teacher(arguments)
    codes = [0]

    def job(composed: Any) -> None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        try:
            command = ["run", recipe, *([f"--config-dir={own}"] if own else []), *HydraConfig.get().overrides.task]
            codes.append(task(OmegaConf.to_object(composed), run_dir, command))
        finally:
            for folder in (run_dir, run_dir.parent, run_dir.parent.parent):  # Hydra made them; a refused run leaves nothing
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()

    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach us instead of being printed
    ours = ["hydra/job_logging=none", "hydra/hydra_logging=none"]  # no log files, and no library is set to talk
    ours += [] if any(a.startswith("hydra.job.name=") for a in arguments) else [f"hydra.job.name={recipe}"]
    sys.argv = ["compress run " + recipe, *arguments, *ours]
    plain = [a for a in arguments if not a.startswith("-") and "=" in a]
    plain += [f"hydra.searchpath=['file://{own}']"] if own else []  # where --config-dir puts it
    try:
        trust_hydra()
        if not {"-m", "--multirun", "--help", "-h", "--hydra-help", "--info", "-i"} & set(arguments):
            _check_composed(folder, recipe, plain)
        hydra.main(version_base="1.3", config_path=str(folder), config_name=recipe)(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return max(codes)
