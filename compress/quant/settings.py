"""Grids, methods and mixtures by name, as recipes say them; no torch."""

from dataclasses import dataclass, field
from enum import StrEnum

# the grids of `compress.quant.grids.GRIDS`, named here because reading the configuration must not
# import torch
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
Method = StrEnum("Method", ["nearest", "gptq"])  # how codes are chosen
Balance = StrEnum("Balance", ["none", "awq"])  # what is folded between layers before rounding
Scales = StrEnum(
    "Scales", ["round", "search", "learned"]
)  # how a block's scale is chosen; learned: qat only, from the rule on, with the weights
# row lengths must be multiples
BLOCK = {
    grid: 256 if grid.endswith("_k") else int(grid.rpartition("_g")[2]) if "_g" in grid else 32
    for grid in GridName
} | {GridName.int8: 1}
# grids of one scale; Q4_K and Q6_K search in their plain rounding already
SEARCHED = tuple(
    grid
    for grid in GridName
    if grid in ("q4_0", "iq4_nl", "q5_0", "q8_0", "int8") or grid.startswith(("int4_g", "int8_g"))
)


@dataclass
class Allocation:
    """A grid for every matrix (`compress/quant/allocate.py`), so that the GGUF, type MIXED, has at
    most `file_bytes`; 0: one grid for all.
    """

    file_bytes: int = 0
    grids: list[GridName] = field(
        default_factory=lambda: [
            GridName.q4_0,
            GridName.q4_1,
            GridName.q5_0,
            GridName.q6_k,
            GridName.q8_0,
        ]
    )
    calibration_sequences: int = (
        1  # on which the damage of each matrix is measured: a second one doubles the time
    )

    def __post_init__(self) -> None:
        wrong = [grid.value for grid in self.grids if grid.startswith("int")]
        if self.file_bytes < 0 or self.calibration_sequences < 1 or not self.grids or wrong:
            raise ValueError(
                f"allocate.file_bytes={self.file_bytes},"
                f" calibration_sequences={self.calibration_sequences},"
                f" grids={[g.value for g in self.grids]}: bytes from 0, sequences from 1, and at"
                " least one grid, each of llama.cpp's: a GGUF alone may mix them"
            )
