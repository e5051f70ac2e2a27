"""Quantization: grids that ship (`grids/`) and training on them (`fake`)."""
