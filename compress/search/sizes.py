"""Exact parameters and bytes of a shape's GGUF, without making it.

A GGUF is a header (24 bytes, metadata, tokenizer), a record of every tensor, and the tensors, each
of these padded to ALIGNMENT bytes (ggml's docs/gguf.md). A record is the name with its length (8
bytes), the number of dimensions (4) and each of them (8), the type (4) and the place (8). What the
tokenizer takes depends on the strings that are left of it, so for each number of ids the tokens
that the stage would keep are cut and written once (`Skeletons`); all else follows from the shapes
of tensors, which transformers itself gives for a model of one block without memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

from compress.formats import gguf
from compress.models.blocks import blocks_prefix
from compress.models.checkpoint import copy_beside, read_config
from compress.models.model_config import meta_model
from compress.prune import shape as cuts
from compress.prune.tokenizer_cut import read_bpe, write_cut
from compress.prune.vocabulary import Usage, kept_ids
from compress.quant.grids import GRIDS
from compress.search.shapes import Family, Shape

ALIGNMENT = 32
RECORD_BYTES = 8 + 4 + 4 + 8  # of a tensor, besides its name and dimensions


def padded(count: int) -> int:
    """Bytes up to the next multiple of ALIGNMENT."""
    return -(-count // ALIGNMENT) * ALIGNMENT


class Skeletons:
    """Directories with config.json and a tokenizer of fewer ids, without weights: what prune_vocab
    would keep of the tokenizer after the same text.
    """

    def __init__(self, teacher: Path, usage: Callable[[], Usage], folder: Path) -> None:
        """`usage`: what the stage decides by, asked once and only where something is to be cut."""
        self.teacher = teacher
        self._usage = cache(usage)
        self.folder = folder
        self._headers: dict[int, int] = {}

    def of(self, ids: int) -> Path:
        """The directory of so many ids."""
        config = read_config(self.teacher)
        out = self.folder / f"ids-{ids}"
        if (out / "config.json").is_file():
            return out

        # The teacher's own tokenizer, or what is kept of it.
        out.mkdir(parents=True, exist_ok=True)
        if ids == config["vocab_size"]:
            copy_beside(self.teacher, out)
        else:
            bpe = read_bpe(self.teacher)
            kept = kept_ids(bpe.ids, bpe.merges, self._usage(), ids, bpe.protected)
            config |= {"vocab_size": ids, "eos_token_id": write_cut(self.teacher, out, kept.ids)}
        (out / "config.json").write_text(json.dumps(config))
        return out

    def header_bytes(self, ids: int) -> int:
        """Bytes of metadata and tokenizer in the GGUF of so many ids."""
        if ids not in self._headers:
            self._headers[ids] = gguf.header_bytes(self.of(ids))
        return self._headers[ids]


class Part(NamedTuple):
    """Tensors of one block, or of all that is outside of blocks: how many, their parameters, bytes
    of weights, and of their records with block numbers of one digit.
    """

    tensors: int
    params: int
    weight_bytes: int
    record_bytes: int


class Sizes:
    """Parameters and bytes of the shapes of a family."""

    def __init__(self, family: Family, header_bytes: Callable[[int], int]) -> None:
        """`header_bytes`: ids -> bytes, as `Skeletons.header_bytes`."""
        self.family = family
        self._header_bytes = header_bytes
        self._bits = GRIDS[family.grid.grid.value].bits_per_weight
        self._parts = cache(self._parts_of)

    def _parts_of(self, shape: Shape) -> tuple[Part, Part]:
        """A block, and what is outside of blocks, as a model of one block has them."""
        config = self.family.config_of(shape)
        assert config is not None, f"{shape} can't be made"
        one = cuts.without_blocks(config, set(range(1, shape.blocks)))
        model = meta_model(one)
        tensors = {name: tuple(p.shape) for name, p in model.named_parameters()}
        prefix = blocks_prefix(model)
        inside = {name: dims for name, dims in tensors.items() if name.startswith(prefix)}
        outside = {name: dims for name, dims in tensors.items() if name not in inside}
        return self._part(inside), self._part(outside)

    def _part(self, tensors: dict[str, tuple[int, ...]]) -> Part:
        """The sums over some tensors: fp32 vectors, and matrices on the grid."""
        params = weights = records = 0
        for name, dims in tensors.items():
            bits = 32.0 if len(dims) == 1 else self._bits
            params += prod(dims)
            weights += padded(round(prod(dims) * bits / 8))
            records += RECORD_BYTES + len(gguf.gguf_name(name)) + 8 * len(dims)
        return Part(len(tensors), params, weights, records)

    def _of(self, shape: Shape) -> tuple[Part, Part]:
        """The same of any shape: blocks don't depend on ids, nor anything on how many there are."""
        full = self.family.full
        block, _ = self._parts(full._replace(ffn=shape.ffn, kv_heads=shape.kv_heads))
        _, outside = self._parts(full._replace(ids=shape.ids))
        return block, outside

    def params(self, shape: Shape) -> int:
        """Parameters, a tied matrix counted once."""
        block, outside = self._of(shape)
        return outside.params + shape.blocks * block.params

    def file_bytes(self, shape: Shape) -> int:
        """Bytes of the GGUF with every matrix on the family's grid."""
        block, outside = self._of(shape)
        longer_names = sum(len(str(number)) - 1 for number in range(shape.blocks)) * block.tensors
        records = outside.record_bytes + shape.blocks * block.record_bytes + longer_names
        weights = outside.weight_bytes + shape.blocks * block.weight_bytes
        return padded(self._header_bytes(shape.ids) + records) + weights
