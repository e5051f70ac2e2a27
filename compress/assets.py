"""Where `configs/` and `recipes/` are: beside the package in a checkout or an editable install, inside it in a wheel."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    for candidate in (PACKAGE / "assets" / name, PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise ValueError(f"the folder {name}/ is neither in {PACKAGE / 'assets'} nor in {PACKAGE.parent}; reinstall the package")


def configs_dir() -> Path:
    """The vocabulary: one folder per choice."""
    return _folder("configs")


def recipes_dir() -> Path:
    """The programs: one YAML per recipe."""
    return _folder("recipes")
