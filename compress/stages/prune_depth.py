"""Drop whole transformer blocks, and fold what they did into the block in front of them.

Which ones: by block influence, scored again after every removal (ShortGPT, arXiv 2403.03853;
`compress.prune.importance`). Folding is a least-squares fit of one projection
(`compress.prune.folding`), which adds no weights. A dropped block turns into latency one to one,
unlike a narrower one. Which blocks went, and into which they were folded, is written to
`pruning.json`. Left out: choosing blocks greedily by the KL without them, which took three times as
long and chose no better (results/prune/fold.md).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.blocks import Work, blocks_of, row_for
from compress.prune import shape
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_without_training

if TYPE_CHECKING:
    from compress.memory import Account, Given
    from compress.prune.folding import Fold

FOLD_SEQUENCES = 64


@dataclass
class PruneDepth:
    """Drop `blocks` blocks, never one of the first `keep_first` or the last `keep_last`, weighed on
    `calibration_sequences` by influence; `fold` them, fitted to `fold_sequences`.
    """

    blocks: int = 4
    fold: bool = True
    calibration_sequences: int = 8
    fold_sequences: int = FOLD_SEQUENCES
    keep_first: int = 1
    keep_last: int = 1
    family: ClassVar[Family] = Family.prune
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key, least in (
            ("blocks", 1),
            ("calibration_sequences", 1),
            ("fold_sequences", shape.HELD_OUT),
            ("keep_first", 0),
            ("keep_last", 0),
        ):
            if getattr(self, key) < least:
                raise ValueError(
                    f"prune_depth.{key} is {getattr(self, key)}: allowed is {least} or more"
                )
        if not self.fold and self.fold_sequences != FOLD_SEQUENCES:
            raise ValueError(
                f"prune_depth.fold_sequences is {self.fold_sequences}: nothing uses it with"
                " fold=false; leave it out"
            )

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result. Which blocks go is known after `run` only; their number
        decides every size.
        """
        shape.check_numbered(config, row_for(config, Work.depth))
        if self.fold:
            shape.check_foldable(config)

        # How many may go.
        present = config["num_hidden_layers"]
        most = min(present - 1, present - self.keep_first - self.keep_last)
        if self.blocks > most:
            raise ValueError(
                f"prune_depth.blocks is {self.blocks} and the model has {present} blocks: allowed"
                f" is at most {max(0, most)} with keep_first={self.keep_first} and"
                f" keep_last={self.keep_last}"
            )

        # Any of them give the same sizes.
        stand_in = set(range(self.keep_first, self.keep_first + self.blocks))
        return shape.without_blocks(config, stand_in)

    def calibration_rows(self) -> int:
        """Rows on which blocks are scored and folds are fitted."""
        return max(self.calibration_sequences, self.fold_sequences if self.fold else 0)

    def check_text(self, config: dict[str, Any], rows: int, seq_len: int) -> None:
        """ValueError when so many rows of text can't fit a projection of a config's FFNs."""
        if self.fold:
            columns = shape.width_of(config, row_for(config, Work.fold))
            shape.check_text("prune_depth.fold_sequences", (rows, seq_len), columns, None)

    def cost(self, sizes: Sizes) -> Cost:
        """Every block that goes costs a pass of the calibration text; folding costs two."""
        cost = cost_without_training(sizes, bytes_a_weight=2)
        cost = cost.with_calibration(sizes, self.calibration_sequences, self.blocks)
        return cost.with_calibration(sizes, self.fold_sequences, 2) if self.fold else cost

    def memory(self, given: Given) -> Account:
        """A block at a time; states in front of those that may go, and what folds are fitted to."""
        from compress.memory import folded

        account = given.walked(self.calibration_sequences, copies=self.blocks + 2)
        if self.fold:
            fold = folded(given.parent, self.fold_sequences, given.seq_len)
            folding = given.walked(self.fold_sequences, *fold, copies=2)
            account.phases["folding"] = folding.phases["blocks"]
        return account

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the shallower checkpoint. ValueError for a parent that is quantized, unsupported
        or too shallow, and for too little text.
        """
        from compress.models.checkpoint import load_stored, read_config
        from compress.models.walk import Walk
        from compress.prune.folding import fold_dropped
        from compress.prune.importance import drop_blocks
        from compress.quant.codes import check_parent

        check_parent(self, parent, "prune")
        row = row_for(read_config(parent), Work.depth)
        model = load_stored(parent)
        params = model.num_parameters()

        def walk_of(ids_BL: Any) -> Walk:
            return Walk(
                model,
                ids_BL,
                precision=ctx.precision,
                log=lambda line: ctx.log(f"{ctx.label}: {line}"),
            )

        # Text for both, before any work.
        ids_BL = ctx.calibration(self.calibration_rows())
        self.check_text(model.config.to_dict(), *ids_BL.shape)

        # Which blocks go, and what is folded into the others.
        walk = walk_of(ids_BL[: self.calibration_sequences])
        dropped = drop_blocks(walk, self.blocks, self.keep_first, self.keep_last)
        removed = {index for index, _ in dropped}
        folds = fold_dropped(walk_of(ids_BL), row, removed) if self.fold else []
        front = next(index for index in range(len(removed) + 1) if index not in removed)
        if self.fold and front:
            ctx.log(
                f"{ctx.label}: blocks 0 to {front - 1} are dropped with none in front of them to"
                " fold them into"
            )

        cut_blocks(model, removed)
        shape.save_checked(model, out, parent)
        (out / "pruning.json").write_text(json.dumps(self._note(dropped, folds), indent=2) + "\n")
        return {
            "blocks_removed_count": float(len(dropped)),
            "params_removed_fraction": 1 - model.num_parameters() / params,
            **self._metrics(dropped, folds),
        }

    def _note(self, dropped: list[tuple[int, float]], folds: list[Fold]) -> dict[str, Any]:
        """What pruning.json says."""
        removed = [{"block": index, "influence": influence} for index, influence in dropped]
        note: dict[str, Any] = {"blocks_removed_in_order": removed}
        if self.fold:
            note["folds"] = [fold._asdict() for fold in folds]
        return note

    def _metrics(self, dropped: list[tuple[int, float]], folds: list[Fold]) -> dict[str, float]:
        """What is known of the cut."""
        metrics = {"influence_removed_sum": sum(influence for _, influence in dropped)}
        if folds:
            before = sum(fold.error_before for fold in folds) / len(folds)
            metrics["fold_error_before_mean_fraction"] = before
            metrics["fold_error_mean_fraction"] = sum(fold.error for fold in folds) / len(folds)
        return metrics


def cut_blocks(model: Any, dropped: set[int]) -> None:
    """Remove the blocks in place; the config's per-block lists and the attention's KV cache slots
    follow.
    """
    blocks: Any = blocks_of(model)
    config = model.config.to_dict() | {"num_hidden_layers": len(blocks)}
    for key, value in shape.without_blocks(config, dropped).items():
        if key == "num_hidden_layers" or isinstance(value, list) and "layer" in key:
            setattr(model.config, key, value)
    for index in sorted(dropped, reverse=True):
        del blocks[index]
    for i, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
