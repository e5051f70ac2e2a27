"""Grids, methods and mixtures by name, as recipes say them; no torch."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

# The grids of `compress.quant.grids.GRIDS`, named here because reading the configuration must not
# import torch.
GridName = StrEnum(
    "GridName",
    [
        "q4_0",
        "iq4_nl",
        "q4_1",
        "q5_0",
        "q8_0",
        "q4_k",
        "q6_k",
        "mxfp4",
        "nvfp4",
        "int4_g32",
        "int4_g64",
        "int4_g128",
        "int4_asym_g32",
        "int4_asym_g64",
        "int4_asym_g128",
        "int8_g32",
        "int8_g64",
        "int8_g128",
        "int8",
    ],
)
# How codes are chosen.
Method = StrEnum("Method", ["nearest", "gptq"])
# What is folded between layers before rounding.
Balance = StrEnum("Balance", ["none", "awq"])
# How a block's scale is chosen; learned: qat only, from the rule on, with the weights.
Scales = StrEnum("Scales", ["round", "search", "learned"])


class Properties(NamedTuple):
    """What a stage must know of a grid before torch is there."""

    block: int  # row lengths must be multiples
    searched: bool  # whether `scales: search` finds other scales than the grid's plain rounding
    learned: bool = True  # of these, whether they can be any number, and so be trained


# Searched are grids of one scale; Q4_K and Q6_K search in their plain rounding already.
PROPERTIES = {
    GridName.q4_0: Properties(32, True),
    GridName.iq4_nl: Properties(32, True),
    GridName.q4_1: Properties(32, False),
    GridName.q5_0: Properties(32, True),
    GridName.q8_0: Properties(32, True),
    GridName.q4_k: Properties(256, False),
    GridName.q6_k: Properties(256, False),
    GridName.mxfp4: Properties(32, True, False),
    GridName.nvfp4: Properties(64, True, False),
    GridName.int4_g32: Properties(32, True),
    GridName.int4_g64: Properties(64, True),
    GridName.int4_g128: Properties(128, True),
    GridName.int4_asym_g32: Properties(32, False),
    GridName.int4_asym_g64: Properties(64, False),
    GridName.int4_asym_g128: Properties(128, False),
    GridName.int8_g32: Properties(32, True),
    GridName.int8_g64: Properties(64, True),
    GridName.int8_g128: Properties(128, True),
    GridName.int8: Properties(1, True),
}
# Calibration tokens that an expert is to be rounded by, for each of its columns.
FLOOR_A_COLUMN = 4
BLOCK = {grid: properties.block for grid, properties in PROPERTIES.items()}
SEARCHED = tuple(grid for grid, properties in PROPERTIES.items() if properties.searched)
LEARNED = tuple(grid for grid in SEARCHED if PROPERTIES[grid].learned)


@dataclass
class Allocation:
    """A grid for every matrix (`compress/quant/allocate.py`), so that the GGUF, type MIXED, has at
    most `file_bytes`, or its matrices `bits_per_weight` on average; both 0: one grid for all.
    """

    file_bytes: int = 0
    bits_per_weight: float = 0.0
    grids: list[GridName] = field(
        default_factory=lambda: [
            GridName.q4_0,
            GridName.q4_1,
            GridName.q5_0,
            GridName.q6_k,
            GridName.q8_0,
        ]
    )
    # On which the damage of each matrix is measured: a second one doubles the time.
    calibration_sequences: int = 1
    # Neighbouring blocks whose matrices of the same place are measured at once: a pass for ten
    # tells the places apart, not the blocks.
    blocks_together: int = 1

    def __post_init__(self) -> None:
        wrong = [grid.value for grid in self.grids if grid.startswith("int")]
        counts = self.calibration_sequences, self.blocks_together
        least = min(self.file_bytes, self.bits_per_weight, min(counts) - 1)
        if least < 0 or not self.grids or wrong:
            raise ValueError(
                f"allocate.file_bytes={self.file_bytes}, bits_per_weight={self.bits_per_weight},"
                f" calibration_sequences={self.calibration_sequences},"
                f" blocks_together={self.blocks_together},"
                f" grids={[g.value for g in self.grids]}: bytes and bits from 0, sequences and"
                " blocks from 1, and at least one grid, each of llama.cpp's: a GGUF alone may mix"
                " them"
            )
        if self.file_bytes and self.bits_per_weight:
            raise ValueError(
                f"allocate.file_bytes={self.file_bytes} and"
                f" allocate.bits_per_weight={self.bits_per_weight} limit the same file; leave one"
                " of them at 0"
            )

    @property
    def mixes(self) -> bool:
        """Whether every matrix gets a grid of its own."""
        return bool(self.file_bytes or self.bits_per_weight)

    def matrix_bytes(self, weights: int, overhead_bytes: int) -> int:
        """What so many weights may take, in a file with so many bytes besides."""
        if self.bits_per_weight:
            return int(self.bits_per_weight * weights / 8)
        return self.file_bytes - overhead_bytes
