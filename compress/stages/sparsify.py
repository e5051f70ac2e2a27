"""Set weights to zero by Wanda (`compress/prune/wanda.py`), unstructured or n:m: a baseline.

Neither the file nor its speed gains anything: GGUF, ONNX and safetensors hold a zero like any other
weight, and no runtime here skips it. What the same share of parameters costs when it is cut out
instead is to be compared with this, not traded for it (`docs/pruning.md`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.blocks import lengths_of
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_without_training

if TYPE_CHECKING:
    from compress.memory import Account, Given


@dataclass
class Sparsify:
    """Zero `zeros_fraction` of each row of every linear layer in the blocks, or, with a `pattern`
    such as "2:4", keep so many of so many neighbours.
    """

    zeros_fraction: float = 0.5
    pattern: str = ""
    calibration_sequences: int = 64
    family: ClassVar[Family] = Family.prune
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.zeros_fraction < 1:
            raise ValueError(
                f"sparsify.zeros_fraction is {self.zeros_fraction}: allowed is between 0 and 1"
            )
        if self.calibration_sequences < 1:
            raise ValueError(
                f"sparsify.calibration_sequences is {self.calibration_sequences}: allowed is 1 or"
                " more"
            )
        n, m = self.kept_of()
        if self.pattern and not 0 < n < m:
            raise ValueError(
                f"sparsify.pattern is {self.pattern!r}: allowed is KEPT:OF, as in 2:4, or nothing"
            )
        if self.pattern and self.zeros_fraction != 0.5:
            raise ValueError(
                f"sparsify.zeros_fraction is {self.zeros_fraction}: the pattern {self.pattern}"
                " decides it; leave it out"
            )

    def kept_of(self) -> tuple[int, int]:
        """The two numbers of the pattern; 0, 0 for none or for another text."""
        numbers = re.fullmatch(r"(\d{1,3}):(\d{1,3})", self.pattern)
        return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The parent's config. ValueError when its rows don't divide by the pattern."""
        m = self.kept_of()[1]
        for key, length in lengths_of(config).items():
            if m and length % m:
                raise ValueError(
                    f"{key} is {length}: sparsify.pattern={self.pattern} needs a multiple of {m}"
                )
        return config

    def calibration_rows(self) -> int:
        """Rows on which inputs are measured."""
        return self.calibration_sequences

    def cost(self, sizes: Sizes) -> Cost:
        """Two passes of the calibration text: through a block's layers, then through the block."""
        cost = cost_without_training(sizes, bytes_a_weight=2)
        return cost.with_calibration(sizes, self.calibration_sequences, passes=2)

    def memory(self, given: Given) -> Account:
        """A block at a time, and the order of a matrix's weights."""
        from compress.memory import Item

        order = Item("worth and order of a matrix", device=24 * given.parent.largest)
        return given.walked(self.calibration_sequences, order)

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the checkpoint with zeros. ValueError for a parent that is quantized."""
        from compress.models.checkpoint import load_stored
        from compress.models.walk import Walk
        from compress.prune import shape
        from compress.prune.wanda import kept_weights, thin_blocks
        from compress.quant.codes import check_parent

        check_parent(self, parent, "prune")
        model = load_stored(parent)
        walk = Walk(
            model,
            ctx.calibration(self.calibration_sequences),
            precision=ctx.precision,
            log=lambda line: ctx.log(f"{ctx.label}: {line}"),
        )

        # Block by block, as the calibration text comes there.
        n, m = self.kept_of()
        keep = partial(kept_weights, zeros_fraction=self.zeros_fraction, n=n, m=m)
        zeros, weights = thin_blocks(walk, keep)
        shape.save_checked(model, out, parent)
        return {"zeros_count": float(zeros), "zeros_in_blocks_fraction": zeros / weights}
