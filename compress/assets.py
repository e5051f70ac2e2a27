"""Where `configs/` and `recipes/` are: beside the package in a checkout or an editable install,
inside it in a wheel.
"""

from functools import partial
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    """The folder called `name`. ValueError when it is in neither place."""
    for candidate in (PACKAGE / "assets" / name, PACKAGE.parent / name):
        if candidate.is_dir():
            return candidate
    raise ValueError(
        f"the folder {name}/ is neither in {PACKAGE / 'assets'} nor in {PACKAGE.parent}; reinstall"
        " the package"
    )


configs_dir = partial(_folder, "configs")  # the vocabulary: one folder per choice
recipes_dir = partial(_folder, "recipes")  # the programs: one YAML per recipe
