"""Where records go."""

from dataclasses import dataclass, field

from compress.bounds import check_values
from compress.errors import ConfigError, nearest
from compress.track import TRACKERS


@dataclass
class Track:
    """Where records go besides the run directory."""

    sinks: list[str] = field(default_factory=lambda: ["jsonl"])
    project: str = "compress"

    def __post_init__(self) -> None:
        for name in self.sinks:
            if name not in TRACKERS:
                raise ConfigError(f"track.sinks={name!r} is no tracker; {nearest(name, TRACKERS)}")
        if not self.project.strip():
            raise ConfigError("track.project is empty; give a name")
        check_values("track", self)
