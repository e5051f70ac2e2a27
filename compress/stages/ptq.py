"""`ptq`: post-training quantization of every matrix of a model, embeddings and head included, onto a grid that ships.

Scales by the format's own plain rounding (`round`: the codes are what llama.cpp's quantizer writes, bit for bit) or
by a search that minimises each block's squared error (`search`, on the grids of one scale); see `compress/quant/grids/`.
No data is needed. The result loads with plain transformers as fp32 weights equal to the decoded codes, which lie in
`quant.safetensors`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.stages.context import Context


class GridName(StrEnum):
    """The grids of `compress.quant.grids.GRIDS`, named here because reading the configuration must not import torch."""

    q4_0 = "q4_0"
    q4_1 = "q4_1"
    q5_0 = "q5_0"
    q8_0 = "q8_0"
    q4_k = "q4_k"
    q6_k = "q6_k"
    int4_g32 = "int4_g32"
    int4_g64 = "int4_g64"
    int4_g128 = "int4_g128"
    int4_asym_g32 = "int4_asym_g32"
    int4_asym_g64 = "int4_asym_g64"
    int4_asym_g128 = "int4_asym_g128"
    int8_g32 = "int8_g32"
    int8_g64 = "int8_g64"
    int8_g128 = "int8_g128"
    int8 = "int8"  # a scale for every row


class Scales(StrEnum):
    """How a block's scale is chosen."""

    round = "round"
    search = "search"
    learned = "learned"  # qat only: from the rule on, with the weights


# row lengths must be multiples
BLOCK = {grid: 256 if grid.endswith("_k") else int(grid.rpartition("_g")[2]) if "_g" in grid else 32 for grid in GridName} | {GridName.int8: 1}
# grids of one scale; Q4_K and Q6_K search in their plain rounding already
SEARCHED = tuple(grid for grid in GridName if grid in ("q4_0", "q5_0", "q8_0", "int8") or grid.startswith(("int4_g", "int8_g")))


def check_scales(key: str, grid: GridName, scales: Scales) -> None:
    """ValueError when the grid, or a stage without training, has no such scales."""
    if scales is not Scales.round and grid not in SEARCHED:
        raise ValueError(f"{key}.scales is {scales}: grid {grid} has none, only {', '.join(SEARCHED)}; use scales=round")
    if scales is Scales.learned and key != "qat":
        raise ValueError(f"{key}.scales is learned: nothing is trained there; use round or search, or the qat stage")


def check_rows(config: dict[str, Any], grid: GridName) -> None:
    """ValueError naming key and nearest legal value when an HF config has rows the grid can't cut into blocks."""
    block = BLOCK[grid]
    heads = config.get("num_attention_heads") or 0
    rows = {key: config[key] for key in ("hidden_size", "intermediate_size") if config.get(key)}
    if config.get("head_dim"):
        rows["num_attention_heads * head_dim"] = heads * config["head_dim"]
    for key, length in rows.items():
        if length % block:
            near = max(block, round(length / block) * block)
            raise ValueError(f"{key} is {length}: grid {grid} needs rows of a multiple of {block}; the nearest legal value is {near}")


@dataclass
class Ptq:
    """Quantize without training."""

    grid: GridName = GridName.q4_0
    scales: Scales = Scales.round

    def __post_init__(self) -> None:
        for key, kind in (("grid", GridName), ("scales", Scales)):
            value = getattr(self, key)
            if value not in list(kind):
                raise ValueError(f"ptq.{key} is {value!r}: choose one of {', '.join(kind)}")
            setattr(self, key, kind(value))
        check_scales("ptq", self.grid, self.scales)

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result: the parent's, unchanged. ValueError when its rows don't divide into blocks."""
        check_rows(config, self.grid)
        return config

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Quantize `parent` into `out`. ValueError when the parent is quantized already or does not fit the grid."""
        from compress import checkpoint
        from compress.quant.codes import refuse_quantized, save_quantized

        checkpoint.check(parent)
        refuse_quantized(parent, "ptq")
        self.check_shape(checkpoint.read_config(parent))
        model = checkpoint.load_model(parent)
        made, metrics = self._quantize(model)
        save_quantized(model, out, parent, made)
        return metrics

    def _quantize(self, model: Any) -> tuple[dict[str, Any], dict[str, float]]:
        """Bake the grid into the model's weights; what `save_quantized` takes, and the metrics."""
        from compress.quant.codes import Quantized, bake, quantizable
        from compress.quant.grids import GRIDS

        grid = GRIDS[self.grid]
        made: dict[str, Quantized] = {}
        error = power = 0.0
        quantized = count = 0
        for name, home, _ in quantizable(model):
            weight: Any = home.weight
            before = weight.detach().clone()
            if self.scales is Scales.round:
                codes, scales = grid.encode(before, name)
            else:
                scales = grid.search(before, name=name)
                codes = grid.codes(before, scales)
            made[name] = bake(weight, Quantized(self.grid.value, codes, scales))
            power += before.square().sum().item()
            error += before.sub_(weight.detach()).square_().sum().item()
            quantized, count = quantized + weight.numel(), count + 1
        total = sum(parameter.numel() for parameter in model.parameters())
        bits = (quantized * grid.bits_per_weight + (total - quantized) * 32) / total
        return made, {
            "bits_per_weight": bits,
            "weight_mse_relative": error / max(power, 1e-30),
            "tensors_quantized_count": float(count),
        }
