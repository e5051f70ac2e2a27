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
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from compress.assets import configs_dir, recipes_dir
from compress.composing import (
    check_composed,
    check_keys,
    compose,
    expand_sources,
    expand_teacher,
    explain,
    in_time,
    recipe_names,
    trust_hydra,
)
from compress.errors import ConfigError, nearest
from compress.recipe_text import check_override, own_folder

# Of Hydra's; its argparse would take any abbreviation of these, and of those that choose another
# file.
FLAGS = (
    *("--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--package", "-p"),
    *("--run", "-r", "--multirun", "-m", "--config-dir", "-cd", "--info", "-i"),
)
# Of the flags that take a value.
LONG_FLAGS = {"-cd": "--config-dir", "-c": "--cfg", "-p": "--package"}


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

    # The user's own recipe goes before ours of the same name.
    user_dir = own_folder(arguments)
    folder = user_dir if user_dir and (user_dir / f"{recipe}.yaml").is_file() else recipes_dir()
    if not re.fullmatch(r"[\w.-]+", recipe) or not (folder / f"{recipe}.yaml").is_file():
        names = recipe_names(recipes_dir()) + (recipe_names(user_dir) if user_dir else [])
        raise ConfigError(
            f"recipe {recipe!r} does not exist; {nearest(recipe, names)}. Your own:"
            " --config-dir DIR"
        )
    return folder, user_dir


def flags_first(arguments: list[str]) -> list[str]:
    """Flags joined with their values, before all overrides: Hydra's argparse accepts overrides
    only in one piece.
    """
    joined = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        flag = LONG_FLAGS.get(flag, flag)
        if argument in ("--info", "-i"):  # it would take the next argument for its own
            argument = "--info=all"
        if flag in LONG_FLAGS.values():
            argument = f"{flag}={value if equals else next(rest, '')}"
        joined.append(argument)

    # Sorting keeps the order within both kinds.
    return sorted(joined, key=lambda argument: not argument.startswith("-"))


def without_recipe(overrides: list[str]) -> dict[str, Any]:
    """The defaults of configs/base.yaml with overrides, as dataclasses by key, and the store: all
    that a verb without a recipe needs.
    """
    for override in overrides:
        check_override(override)
    trust_hydra()
    try:
        # A recipe has stages; this one's is never run.
        with in_time("base"):
            composed = compose(
                "base",
                configs_dir(),
                [*expand_sources(expand_teacher(overrides)), "+stages.nothing={}", "pipeline=[]"],
            )
            with open_dict(composed):
                composed.pop("hydra", None)
            check_keys(composed)
            parts: dict[str, Any] = {
                key: OmegaConf.to_object(composed[key])
                for key in ("teacher", "data", "eval", "budget", "trainer")
            }

        # What `Recipe` would check of these parts together.
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
    folder, user_dir = check_arguments(recipe, arguments)
    arguments = expand_sources(expand_teacher(arguments))
    codes = [0]
    failures: list[Exception] = []

    def job(composed: Any) -> None:
        run_dir = Path(HydraConfig.get().runtime.output_dir)
        config_flag = [f"--config-dir={user_dir}"] if user_dir else []

        try:
            command = ["run", recipe, *config_flag, *HydraConfig.get().overrides.task]
            codes.append(task(OmegaConf.to_object(composed), run_dir, command))
        except Exception as error:  # Hydra would print its own line about it
            if failures:
                print(f"compress: {run_dir.name}: {error}", file=sys.stderr)
            failures.append(error)
        finally:
            _remove_empty(run_dir)

    # Exceptions reach us instead of being printed.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    sys.argv = [f"compress run {recipe}", *arguments, *_hydra_settings(recipe, arguments)]
    try:
        trust_hydra()
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        flags = {argument.partition("=")[0] for argument in arguments if argument.startswith("-")}
        check_composed(folder, recipe, overrides, user_dir, flags)

        # Only now does Hydra run what it composes.
        hydra.main(version_base="1.3", config_path=str(folder), config_name=recipe)(job)()
        if failures:
            raise failures[0]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
    return max(codes)


def _hydra_settings(recipe: str, arguments: list[str]) -> list[str]:
    """Overrides of Hydra's own: no log files, no library set to talk, the recipe's name unless
    `arguments` give another.
    """
    settings = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    if not any(argument.startswith("hydra.job.name=") for argument in arguments):
        settings.append(f"hydra.job.name={recipe}")
    return settings


def _remove_empty(run_dir: Path) -> None:
    """Remove what Hydra made for a run that left nothing there: its folder and the two above."""
    for folder in (run_dir, run_dir.parent, run_dir.parent.parent):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
