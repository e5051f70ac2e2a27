"""Drop whole transformer blocks by block influence (ShortGPT, arXiv 2403.03853), scored again after every removal.

A dropped block turns into latency one to one, unlike a narrower one. Which blocks went is written to `pruning.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.prune import shape
from compress.stages.context import Context

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class PruneDepth:
    """Drop `blocks` blocks, never one of the first `keep_first` or the last `keep_last`."""

    blocks: int = 4
    calibration_sequences: int = 8
    keep_first: int = 1
    keep_last: int = 1

    def __post_init__(self) -> None:
        for key, least in (("blocks", 1), ("calibration_sequences", 1), ("keep_first", 0), ("keep_last", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"prune_depth.{key} is {getattr(self, key)}: allowed is {least} or more")

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result. Which blocks go is known after `run` only; their number decides every size."""
        shape.check_architecture(config)
        present = config["num_hidden_layers"]
        most = min(present - 1, present - self.keep_first - self.keep_last)
        if self.blocks > most:
            raise ValueError(
                f"prune_depth.blocks is {self.blocks} and the model has {present} blocks: allowed is at most"
                f" {max(0, most)} with keep_first={self.keep_first} and keep_last={self.keep_last}"
            )
        return shape.without_blocks(config, set(range(self.keep_first, self.keep_first + self.blocks)))

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the shallower checkpoint. ValueError for a parent that is quantized, unsupported or too shallow."""
        import torch

        from compress.checkpoint import load_model
        from compress.quant.codes import check_parent

        check_parent(self, parent, "prune")
        model = load_model(parent)
        params = model.num_parameters()
        with torch.no_grad():
            dropped = self._choose(model, ctx.calibration(self.calibration_sequences))
        _cut(model, {index for index, _ in dropped})
        shape.save_checked(model, out, parent)
        removed = [{"block": index, "influence": influence} for index, influence in dropped]
        (out / "pruning.json").write_text(json.dumps({"blocks_removed_in_order": removed}, indent=2) + "\n")
        return {
            "blocks_removed_count": float(len(dropped)),
            "params_removed_fraction": 1 - model.num_parameters() / params,
            "influence_removed_sum": sum(influence for _, influence in dropped),
        }

    def _choose(self, model: Any, ids_BL: Tensor) -> list[tuple[int, float]]:
        """Run the model once, noting what every block receives; then any block can be run again on other states."""
        from compress.prune.importance import drop_blocks

        entering: list[Any] = []
        keywords: list[dict[str, Any]] = []

        def note(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            keywords.append(dict(kwargs))
            entering.append(args[0] if args else keywords[-1].pop("hidden_states"))

        layers = model.model.layers
        hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        model.model(ids_BL, use_cache=False)
        for hook in hooks:
            hook.remove()
        blocks = [lambda h, b=layer, k=kwargs: b(h, **k) for layer, kwargs in zip(layers, keywords, strict=True)]
        return drop_blocks(blocks, entering, self.blocks, self.keep_first, self.keep_last)


def _cut(model: Any, dropped: set[int]) -> None:
    """Remove the blocks in place; the config's per-block lists and the attention's KV cache slots follow."""
    from torch.nn import ModuleList

    for key, value in shape.without_blocks(model.config.to_dict(), dropped).items():
        if key == "num_hidden_layers" or isinstance(value, list) and "layer" in key:
            setattr(model.config, key, value)
    model.model.layers = ModuleList(layer for i, layer in enumerate(model.model.layers) if i not in dropped)
    for i, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
