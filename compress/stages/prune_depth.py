"""Drop whole transformer blocks by block influence (ShortGPT, arXiv 2403.03853), scored again
after every removal.

A dropped block turns into latency one to one, unlike a narrower one. Which blocks went is written
to `pruning.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from compress.prune import shape
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_without_training


@dataclass
class PruneDepth:
    """Drop `blocks` blocks, never one of the first `keep_first` or the last `keep_last`."""

    blocks: int = 4
    calibration_sequences: int = 8
    keep_first: int = 1
    keep_last: int = 1
    family: ClassVar[Family] = Family.prune
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key, least in (
            ("blocks", 1),
            ("calibration_sequences", 1),
            ("keep_first", 0),
            ("keep_last", 0),
        ):
            if getattr(self, key) < least:
                raise ValueError(
                    f"prune_depth.{key} is {getattr(self, key)}: allowed is {least} or more"
                )

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result. Which blocks go is known after `run` only; their number
        decides every size.
        """
        shape.check_architecture(config)

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
        """Rows on which blocks are scored."""
        return self.calibration_sequences

    def cost(self, sizes: Sizes) -> Cost:
        """Every block that goes costs a pass of the calibration text."""
        cost = cost_without_training(sizes, bytes_a_weight=2)
        return cost.with_calibration(sizes, self.calibration_sequences, passes=self.blocks)

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the shallower checkpoint. ValueError for a parent that is quantized, unsupported
        or too shallow.
        """
        import torch

        from compress.models.checkpoint import load_model
        from compress.models.walk import Walk
        from compress.prune.importance import drop_blocks
        from compress.quant.codes import check_parent

        check_parent(self, parent, "prune")
        model = load_model(parent)
        params = model.num_parameters()

        # Which blocks go, by what they do on calibration text.
        with torch.no_grad():
            walk = Walk(
                model,
                ctx.calibration(self.calibration_sequences),
                log=lambda line: ctx.log(f"{ctx.label}: {line}"),
            )
            dropped = drop_blocks(walk, self.blocks, self.keep_first, self.keep_last)

        # The model without them, and a note of which they were.
        _cut(model, {index for index, _ in dropped})
        shape.save_checked(model, out, parent)
        removed = [{"block": index, "influence": influence} for index, influence in dropped]
        (out / "pruning.json").write_text(
            json.dumps({"blocks_removed_in_order": removed}, indent=2) + "\n"
        )

        return {
            "blocks_removed_count": float(len(dropped)),
            "params_removed_fraction": 1 - model.num_parameters() / params,
            "influence_removed_sum": sum(influence for _, influence in dropped),
        }


def _cut(model: Any, dropped: set[int]) -> None:
    """Remove the blocks in place; the config's per-block lists and the attention's KV cache slots
    follow.
    """
    for key, value in shape.without_blocks(model.config.to_dict(), dropped).items():
        if key == "num_hidden_layers" or isinstance(value, list) and "layer" in key:
            setattr(model.config, key, value)
    for index in sorted(dropped, reverse=True):
        del model.model.layers[index]
    for i, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
