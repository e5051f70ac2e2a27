"""Every grid a shipped file can hold: a name and the arithmetic of its format, bit for bit."""

from __future__ import annotations

from compress.quant.grids.grid import Grid
from compress.quant.grids.integer import Int4, Int4Asym, Int8
from compress.quant.grids.kquants import Q4_K, Q6_K
from compress.quant.grids.llamacpp import Q4_0, Q4_1, Q5_0, Q8_0

_LLAMACPP = (Q4_0(), Q4_1(), Q5_0(), Q8_0(), Q4_K(), Q6_K())
_INTEGER = (Int4(32), Int4(64), Int4(128), Int4Asym(32), Int4Asym(64), Int4Asym(128), Int8(32), Int8(64), Int8(128), Int8(0))
GRIDS: dict[str, Grid] = {grid.name: grid for grid in _LLAMACPP + _INTEGER}
