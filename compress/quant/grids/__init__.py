"""Every grid a shipped file can hold: a name and the arithmetic of its format, bit for bit."""

from compress.quant.grids.grid import Grid
from compress.quant.grids.integer import Int, Int4Asym
from compress.quant.grids.kquants import Q4_K, Q6_K
from compress.quant.grids.llamacpp import Q4_0, Q4_1, Q5_0, Q8_0
from compress.quant.grids.nonlinear import IQ4_NL, MXFP4, NVFP4

_LLAMACPP = (Q4_0(), IQ4_NL(), Q4_1(), Q5_0(), Q8_0(), Q4_K(), Q6_K(), MXFP4(), NVFP4())
_GROUPS = (32, 64, 128)
_INTEGER = (
    *(Int(Q4_0(), 4, n) for n in _GROUPS),
    *(Int4Asym(n) for n in _GROUPS),
    *(Int(Q8_0(), 8, n) for n in (*_GROUPS, 0)),
)
GRIDS: dict[str, Grid] = {grid.name: grid for grid in _LLAMACPP + _INTEGER}
