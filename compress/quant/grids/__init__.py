"""Every grid a shipped file can hold: a name and the arithmetic of its format, bit for bit."""

from __future__ import annotations

from compress.quant.grids.grid import Grid
from compress.quant.grids.kquants import Q4_K, Q6_K
from compress.quant.grids.llamacpp import Q4_0, Q4_1, Q5_0, Q8_0

GRIDS: dict[str, Grid] = {grid.name: grid for grid in (Q4_0(), Q4_1(), Q5_0(), Q8_0(), Q4_K(), Q6_K())}
