"""Homogeneous shapes of a teacher: ids of its vocabulary, blocks, FFN channels, key-value heads
with their query heads; the same in every block, so that any runtime serves them.

A shape is what stages make of the teacher, in this order: blocks go first, because what goes is the
same for every vocabulary behind, and choosing blocks takes longest; then ids, heads and channels.
Levels are the values that a search may choose of, the teacher's own first. Left out: hidden size,
which no closed form cuts well, query heads inside a group, and shapes that differ by block, which
Hugging Face's Llama can't say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from compress.models.blocks import Work, row_for
from compress.prune.shape import snap, width_of
from compress.quant.settings import GridName
from compress.stages.prune_depth import PruneDepth
from compress.stages.prune_heads import PruneHeads
from compress.stages.prune_vocab import PruneVocab
from compress.stages.prune_width import PruneWidth
from compress.stages.ptq import OnGrid
from compress.stages.stage import Stage

MULTIPLE = 64  # of ids and FFN channels: the blocks of every grid and eight rows of a kernel
# Of the vocabulary.
IDS_SHARES = tuple(
    Fraction(share) for share in ("7/8", "13/16", "3/4", "2/3", "5/8", "9/16", "1/2", "7/16", "3/8")
)
FFN_LEVELS = 16  # at most


class Shape(NamedTuple):
    """Ids of the vocabulary, blocks, FFN channels of each, key-value heads of each."""

    ids: int
    blocks: int
    ffn: int
    kv_heads: int

    def __str__(self) -> str:
        return (
            f"{self.ids:,} ids, {self.blocks} blocks, FFN {self.ffn:,},"
            f" {self.kv_heads} key-value heads"
        )


STRUCTURES = Shape._fields


class Levels(NamedTuple):
    """What each structure may have, the teacher's own first, descending."""

    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    ffn: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @property
    def full(self) -> Shape:
        """The teacher's shape."""
        return Shape(*(levels[0] for levels in self))

    def shapes(self) -> Iterator[Shape]:
        """Every combination."""
        return (Shape(*values) for values in product(*self))

    def stepped(self, shape: Shape, structure: str, steps: int) -> Shape | None:
        """The shape with one structure so many levels lower, or higher for a negative number; None
        where there is no such level.
        """
        levels = getattr(self, structure)
        place = levels.index(getattr(shape, structure)) + steps
        if not 0 <= place < len(levels):
            return None
        return shape._replace(**{structure: levels[place]})


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape that an HF config describes."""
    keys = ("vocab_size", "num_hidden_layers", "num_key_value_heads")
    ids, blocks, kv_heads = (config[key] for key in keys)
    return Shape(ids, blocks, width_of(config, row_for(config, Work.width)), kv_heads)


def steps_of(
    shape: Shape, full: Shape, given: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Stage]:
    """The stages that make a shape of the full one, by slot, in order; none for the full one.

    `given`: slot -> options in place of the stage's own, such as rows of text.
    """
    makers: dict[str, tuple[bool, Any, dict[str, int]]] = {
        "depth": (shape.blocks < full.blocks, PruneDepth, {"blocks": full.blocks - shape.blocks}),
        "vocab": (shape.ids < full.ids, PruneVocab, {"ids": shape.ids}),
        "heads": (shape.kv_heads < full.kv_heads, PruneHeads, {"kv_groups": shape.kv_heads}),
        "narrow": (shape.ffn < full.ffn, PruneWidth, {"ffn": shape.ffn}),
    }

    # Those that cut something.
    return {
        slot: stage(**options, **(given or {}).get(slot, {}))
        for slot, (cuts, stage, options) in makers.items()
        if cuts
    }


class Family:
    """The shapes of one teacher: their levels and HF configs."""

    def __init__(self, config: dict[str, Any], grid: str, least_ids: int | None) -> None:
        """`config`: the teacher's; `grid`: what its students are rounded to; `least_ids`: ids that
        must stay, None for a tokenizer that can't be cut.

        ValueError for an architecture that can't be cut, or rows that the grid can't hold.
        """
        for work in (Work.depth, Work.heads, Work.width):
            row_for(config, work)
        self.config = config
        self.grid = OnGrid(grid=GridName(grid))
        self.grid.check_rows(config)
        self.full = shape_of(config)
        self._least_ids = least_ids
        self._configs: dict[Shape, dict[str, Any] | None] = {}

    @cached_property
    def levels(self) -> Levels:
        """Levels that can be made and opened, each by itself."""
        full = self.full
        ids = sorted({snap(int(full.ids * share), MULTIPLE) for share in IDS_SHARES}, reverse=True)
        least_ids = full.ids if self._least_ids is None else self._least_ids

        # Few enough channels' levels that all combinations can be counted.
        multiple = MULTIPLE * -(-full.ffn // (2 * MULTIPLE * FFN_LEVELS))
        channels = range(full.ffn // multiple * multiple, full.ffn // 2 - 1, -multiple)
        blocks = range(full.blocks - 1, -(-full.blocks // 2) - 1, -1)

        lower = {
            "ids": [level for level in ids if least_ids <= level < full.ids],
            "blocks": blocks,
            "ffn": [level for level in channels if MULTIPLE <= level < full.ffn],
            "kv_heads": range(full.kv_heads - 1, 0, -1),
        }
        return Levels(
            *(
                (getattr(full, name), *(level for level in levels if self._opens(name, level)))
                for name, levels in lower.items()
            )
        )

    def _opens(self, structure: str, level: int) -> bool:
        return self.config_of(self.full._replace(**{structure: level})) is not None

    def config_of(self, shape: Shape) -> dict[str, Any] | None:
        """The HF config of a shape; None where a stage or the grid refuses it."""
        if shape in self._configs:
            return self._configs[shape]

        # As the stages say it, one behind the other.
        config: dict[str, Any] | None = dict(self.config)
        try:
            for stage in steps_of(shape, self.full).values():
                config = stage.check_shape(dict(config or {}))
            self.grid.check_rows(config or {})
        except ValueError:
            config = None
        self._configs[shape] = config
        return config
