"""Keep fewer attention heads: key-value heads with all of their query heads, or query heads inside
each group, by group OBS on the output projection (`compress.prune.compensation`), which is then
fitted again.

The calibration text goes from block to block, so every attention is cut and fitted on what the
blocks already cut send it. A key-value head less also makes the cache smaller, in every runtime.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.blocks import Work, row_for
from compress.prune import shape
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_without_training

if TYPE_CHECKING:
    from compress.memory import Account, Given


@dataclass
class PruneHeads:
    """Keep `kv_groups` key-value heads of every attention, and `heads_per_group` of the query heads
    that share one; null keeps all. `damping` is relative to mean(diag G); auto is by held-out rows.
    """

    kv_groups: int | None = None
    heads_per_group: int | None = None
    calibration_sequences: int = 64
    damping: float | str = "auto"
    family: ClassVar[Family] = Family.prune
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key in ("kv_groups", "heads_per_group"):
            count = getattr(self, key)
            if count is not None and count < 1:
                raise ValueError(
                    f"prune_heads.{key} is {count}, which leaves no head: allowed is 1 or more, or"
                    " null for all"
                )
        if self.calibration_sequences < 1:
            raise ValueError(
                f"prune_heads.calibration_sequences is {self.calibration_sequences}: allowed is 1"
                " or more"
            )
        shape.damping_of("prune_heads", self.damping)

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result, which says the width of a head.

        ValueError when nothing would be cut, or the architecture can't be.
        """
        row_for(config, Work.heads)
        present, keep = self._heads(config)
        for key, count, most in zip(("kv_groups", "heads_per_group"), keep, present, strict=True):
            if count > most:
                raise ValueError(f"prune_heads.{key} is {count} and the model has {most}")
        if keep == present:
            raise ValueError(
                f"prune_heads.kv_groups={self.kv_groups}, heads_per_group={self.heads_per_group}"
                f" cuts nothing: the model has {present[0]} key-value heads with {present[1]} query"
                " heads each; give less of one of them"
            )
        return shape.with_heads(config, *keep)

    def _heads(self, config: dict[str, Any]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Key-value heads and query heads of each, now and afterwards. ValueError."""
        query_heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        if query_heads % kv_heads:
            raise ValueError(
                f"{query_heads} query heads can't be shared evenly by {kv_heads} key-value heads;"
                " repair config.json"
            )
        present = (kv_heads, query_heads // kv_heads)
        keep = (self.kv_groups or present[0], self.heads_per_group or present[1])
        return present, keep

    def calibration_rows(self) -> int:
        """Rows on which heads are weighed."""
        return self.calibration_sequences

    def check_text(self, config: dict[str, Any], rows: int, seq_len: int) -> None:
        """ValueError when so many rows of text can't weigh the heads of a config."""
        from compress.models.checkpoint import config_object, head_dim

        columns = config["num_attention_heads"] * head_dim(config_object(config))
        damping = shape.damping_of("prune_heads", self.damping)
        shape.check_text("prune_heads.calibration_sequences", (rows, seq_len), columns, damping)

    def cost(self, sizes: Sizes) -> Cost:
        """Two passes of the calibration text: up to a block's attention, then through it."""
        cost = cost_without_training(sizes, bytes_a_weight=2)
        return cost.with_calibration(sizes, self.calibration_sequences, passes=2)

    def memory(self, given: Given) -> Account:
        """A block at a time, and the second moments of its heads."""
        from compress.memory import columns_cut

        shape = given.parent
        cut = columns_cut(shape.hidden, shape.queries)
        return given.walked(self.calibration_sequences, *cut)

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the checkpoint with fewer heads. ValueError for a parent that is quantized or
        unsupported, and for too little text.
        """
        from compress.models.checkpoint import load_stored, read_config
        from compress.models.walk import Walk
        from compress.prune.heads import Heads, cut_heads
        from compress.quant.codes import check_parent

        check_parent(self, parent, "prune")
        config = read_config(parent)
        row = row_for(config, Work.heads)
        present, keep = (Heads(*heads) for heads in self._heads(config))
        model: Any = load_stored(parent)
        params = model.num_parameters()
        ids_BL = ctx.calibration(self.calibration_sequences)
        self.check_text(config, *ids_BL.shape)

        # Cut and fitted block by block, as the calibration text comes there.
        damping = shape.damping_of("prune_heads", self.damping)
        walk = Walk(
            model,
            ids_BL,
            precision=ctx.precision,
            log=lambda line: ctx.log(f"{ctx.label}: {line}"),
        )
        cuts = cut_heads(walk, row, present, keep, damping)
        for key, value in self.check_shape(config).items():
            if key in shape.HEAD_KEYS:
                setattr(model.config, key, value)
        shape.save_checked(model, out, parent)

        errors = [cut.error for cut in cuts]
        return {
            "kv_heads_removed_count": float(present.kv_heads - keep.kv_heads),
            "query_heads_removed_count": float(
                present.kv_heads * present.share - keep.kv_heads * keep.share
            ),
            "params_removed_fraction": 1 - model.num_parameters() / params,
            "attention_error_mean_fraction": sum(errors) / len(errors),
            "attention_error_max_fraction": max(errors),
            "damping_mean_relative": sum(cut.damping for cut in cuts) / len(cuts),
        }
