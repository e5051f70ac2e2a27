"""What the rest of the program asks of a stage, and what it may know of one. `Stage` is the whole
contract: planning, the recipe's checks and the reports know no technique by name.

Costs are operation counts: 2 P flops a token forward and 6 P for a training step (P parameters;
Kaplan et al., arXiv 2001.08361, table 1).
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from compress.distill.settings import SchemeName, Signal
from compress.stages.context import Context

if TYPE_CHECKING:
    from compress.memory import Account, Given

Family = StrEnum("Family", ["prune", "recover", "quantize"])  # what a technique is for
STATE_BYTES = 12  # a weight in unfinished training: itself and two moments


class Sizes(NamedTuple):
    """What is known of a slot before it runs: parameters of its result, its parent and the teacher,
    the HF configs of result and teacher, and the tokens of a row.
    """

    params: int
    parent_params: int
    teacher_params: int
    config: dict[str, Any]
    teacher_config: dict[str, Any]
    seq_len: int


class Cost(NamedTuple):
    """What a stage needs: operations, and bytes it leaves in the store."""

    flops: float
    disk_bytes: float

    def with_calibration(self, sizes: Sizes, rows: int, passes: int = 1) -> Cost:
        """The same with so many rows of text put so often through the parent."""
        return self._replace(
            flops=self.flops + 2 * sizes.parent_params * rows * sizes.seq_len * passes
        )


class Stage(Protocol):
    """A technique with its settings, as `STAGES` holds them: a dataclass that checks itself.

    `family`: what it is for. `leaves_a_grid`: whether its weights are quantized, so that nothing
    but a file comes after it.
    """

    family: ClassVar[Family]
    leaves_a_grid: ClassVar[bool]

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The HF config after the stage; ValueError when it can't work on this shape."""
        ...

    def calibration_rows(self) -> int:
        """Rows of text that it is calibrated on, 0 where none."""
        ...

    def cost(self, sizes: Sizes) -> Cost:
        """What `--plan` tells of it."""
        ...

    def memory(self, given: Given) -> Account:
        """Bytes that it needs at once, item by item, by the formulas of `compress/memory.py`."""
        ...

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Reads one checkpoint directory and writes another; metric keys carry units."""
        ...


def cost_without_training(sizes: Sizes, *, bytes_a_weight: int) -> Cost:
    """Of a stage that changes weights once."""
    return Cost(0.0, bytes_a_weight * sizes.params)


def cost_of_training(
    sizes: Sizes,
    tokens: int,
    *,
    bytes_a_weight: int,
    signal: Signal | None = None,
    signal_params: int = 0,
) -> Cost:
    """Of a stage that trains on so many tokens, with the signal of a model of `signal_params`."""
    kept = _signal_bytes_per_token(signal, sizes.teacher_config) if signal else 0.0
    return Cost(
        6 * sizes.params * tokens + 2 * signal_params * tokens,
        (bytes_a_weight + STATE_BYTES) * sizes.params + kept * tokens,
    )


def _signal_bytes_per_token(signal: Signal, teacher: dict[str, Any]) -> float:
    """What the schemes in `distill/schemes.py` take; `sampled` depends on the text: 27 to 30
    measured at threshold 0.05. 0 without kept signals.
    """
    # A token id takes two bytes in a vocabulary of up to 2^16, three in a larger one.
    ids = 3 if teacher["vocab_size"] > 1 << 16 else 2
    return {
        SchemeName.sampled: 6 + (2 + ids) * 0.5 / signal.threshold,
        SchemeName.hidden: 1.04 * teacher["hidden_size"],
        SchemeName.online: 0.0,
    }[signal.scheme]
