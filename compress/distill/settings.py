"""How the teacher is seen and what is learned of it, as recipes say it; no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from compress.errors import ConfigError

# D of the loss; all but forward_kl need a signal with all of the teacher's probabilities
Divergence = StrEnum("Divergence", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
# how the teacher is seen: kept signals (`compress/distill/signals.py`), or the teacher run at every
# step
SchemeName = StrEnum("SchemeName", ["sampled", "hidden", "online"])
TeacherLoad = StrEnum("TeacherLoad", ["plain", "nf4", "int8"])  # how its weights are held meanwhile


@dataclass
class Signal:
    """The teacher's signal of a stage."""

    scheme: SchemeName = SchemeName.sampled
    # sampled: probabilities above it are exact, ids a token are bounded by its inverse
    threshold: float = 0.05
    path: str | None = None  # a folder or URL (s3://...) that keeps the shards; null is the store
    teacher: TeacherLoad = TeacherLoad.plain  # nf4 needs bitsandbytes, int8 torchao

    def __post_init__(self) -> None:
        if not 1 / 255 <= self.threshold < 1:
            raise ConfigError(
                f"signal.threshold={self.threshold} must be in [1/255, 1): it bounds the ids a"
                " token at 1 / threshold"
            )
        if self.path and "://" in self.path:
            import fsspec

            try:
                fsspec.get_filesystem_class(self.path.partition("://")[0])
            except (ImportError, ValueError) as error:
                raise ConfigError(f"signal.path={self.path} can't be opened: {error}") from error


@dataclass
class Features:
    """Weights of the teacher's inner states (`compress/distill/features.py`); above 0 they need
    signal.scheme=online.
    """

    layers: float = 0.0
    relations: float = 0.0
    # [student block, teacher block]; empty: 4, evenly spaced
    pairs: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if min(self.layers, self.relations) < 0:
            raise ConfigError(
                f"features of weights {self.layers}, {self.relations}: none may be negative"
            )

    @property
    def used(self) -> bool:
        """Whether any term is asked for."""
        return bool(self.layers or self.relations)
