"""Every grid a shipped file can hold: a name and the arithmetic of its format, bit for bit."""

from __future__ import annotations

from compress.quant.grids.llamacpp import Q4_0, Q8_0, Grid

GRIDS: dict[str, Grid] = {"q4_0": Q4_0(), "q8_0": Q8_0()}
