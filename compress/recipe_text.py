"""Recipes, option files and overrides read as plain data, before Hydra sees them: what Hydra or
OmegaConf could execute is refused.

Hydra runs `_target_` nodes below its own `hydra` key, reads other folders by `hydra.searchpath` and
sets environment variables by `hydra.job`; the resolver `oc.env` would copy secrets. Nothing of that
has a place in a recipe, whatever package, group or sweep it comes in.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from compress.doors import parse_yaml, read_text
from compress.errors import ConfigError, refuse_credentials

ALLOWED_HYDRA = ("run.dir", "sweep.dir", "sweep.subdir", "job.name", "sweeper.params")
MOST_FILES = 10_000  # below --config-dir
MOST_BYTES = 1_000_000  # of a recipe: YAML of a hundred would be read for minutes
RULES = [rule.split(".") for rule in ALLOWED_HYDRA]


def _walk(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(names, value) of every key of nested dicts and lists;
    a key that holds dots is several names.
    """
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, list):
        items = enumerate(node)

    for key, value in items:
        here = (*path, *str(key).strip().split("."))
        yield here, value
        yield from _walk(value, here)


def refuse(thing: str, where: object) -> NoReturn:
    """ConfigError: `where` holds `thing`."""
    raise ConfigError(
        f"{where} holds {thing}; a recipe is data and can't name code, the environment or Hydra's"
        f" internals. Allowed below hydra: {', '.join(ALLOWED_HYDRA)}"
    )


def check_text(text: str, where: object) -> None:
    """Refuse what Hydra or OmegaConf could execute, in one YAML document. ConfigError naming the
    file and the key.
    """
    # What stands outside of the YAML tree, or anywhere in it.
    headers = [re.match(r"\s*#+\s*@package\s+(\S+)", line) for line in text.splitlines()]
    if any("hydra" in header[1].split(".") for header in headers if header):
        refuse("the package hydra", where)
    if re.search(r"oc\s*\.\s*env", text):
        refuse("the resolver oc.env", where)

    # What stands at one of its keys.
    try:
        tree = parse_yaml(text, where)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if tree is not None and not isinstance(tree, dict):
        raise ConfigError(
            f"{where} holds a {type(tree).__name__}, a recipe is a table: write KEY: VALUE lines"
        )
    for names, value in _walk(tree):
        first, *below = names
        refuse_credentials(
            value if isinstance(value, str) else "", f"{where}, key {'.'.join(names)}"
        )
        if "_target_" in names:
            refuse("_target_", f"{where}, key {'.'.join(names)}")

        # A list of defaults can name Hydra's own groups.
        if first == "defaults" and below:
            entry = value if isinstance(value, str) and below[-1].isdigit() else ".".join(below)
            if re.search(r"(^|[\s/.@:])hydra([/.@:]|$)", entry):
                refuse(f"the defaults entry {entry!r}", where)
        allowed = any(below[: len(rule)] == rule[: len(below)] for rule in RULES)
        if first == "hydra" and below and not allowed:
            refuse(f"the key {'.'.join(names)}", where)

        # A sweep is a list of overrides.
        if names == ("hydra", "sweeper", "params") and isinstance(value, dict):
            for key, values in value.items():
                check_override(f"{key}={values}", f"{where}, hydra.sweeper.params")


def check_override(override: str, where: str = "") -> None:
    """Refuse an override, of the command line or `where`, that Hydra could execute."""
    place = f"{where}{where and ': '}override {override!r}"
    if "_target_" in override:
        refuse("_target_", place)
    if re.search(r"oc\s*\.\s*env", override):
        refuse("the resolver oc.env", place)

    # The name of what is overridden, without Hydra's signs to add or delete.
    key = override.partition("=")[0].strip().lstrip("~+").strip()
    if not key and "=" in override:
        raise ConfigError(f"{place} names nothing; write KEY=VALUE")
    refuse_credentials(override.replace("\\", ""), f"{where}{where and ': '}the override of {key}")

    # Whatever has nothing to do with Hydra is for the recipe to judge.
    parts = [part.strip() for part in re.split(r"[./@:]", key)]
    if "hydra" not in (parts[0], *re.split(r"[./@:]", key.partition("@")[2])):
        return

    # A sweep names overrides in its turn.
    if key.startswith("hydra.sweeper.params.") and "@" not in key:
        check_override(
            f"{key.removeprefix('hydra.sweeper.params.')}={override.partition('=')[2]}", place
        )
    elif key.removeprefix("hydra.") not in ALLOWED_HYDRA or key == "hydra.sweeper.params":
        refuse(f"the key {key}", place)


def own_folder(arguments: list[str]) -> Path | None:
    """The folder that --config-dir names, all its files checked. ConfigError."""
    folders = [
        argument.removeprefix("--config-dir=")
        for argument in arguments
        if argument.startswith("--config-dir=")
    ]
    if len(folders) > 1 or "" in folders or not all(Path(name).is_dir() for name in folders):
        raise ConfigError(
            f"--config-dir {', '.join(map(repr, folders))} is not one directory; give the one"
            " folder that holds your recipes"
        )
    if not folders:
        return None

    # What Hydra could read below it: so few files that all are read here, and no links.
    folder = Path(folders[0]).resolve()
    paths = list(islice(folder.rglob("*"), MOST_FILES + 1))
    if len(paths) > MOST_FILES:
        raise ConfigError(
            f"--config-dir {folder} holds more than {MOST_FILES:,} files; give the folder that"
            " holds your recipes and nothing else"
        )
    if link := next((path for path in paths if path.is_symlink() and path.is_dir()), None):
        raise ConfigError(
            f"--config-dir {folder} holds a link to another folder, {link.name}, which is not"
            " checked; put the files there"
        )

    # Each file as a recipe.
    for file in sorted(path for path in paths if path.suffix.lower() in (".yaml", ".yml")):
        if "hydra" in file.relative_to(folder).parts[:-1]:
            refuse("a folder named hydra", folder)
        try:
            if (size := file.stat().st_size) > MOST_BYTES:
                raise ConfigError(
                    f"{file} has {size:,} bytes, a recipe at most {MOST_BYTES:,}; name texts and"
                    " prompts as files of their own"
                )
            check_text(read_text(file), file)
        except ConfigError:
            raise
        except (ValueError, OSError) as error:  # no file, or no text
            raise ConfigError(str(error)) from error
    return folder
