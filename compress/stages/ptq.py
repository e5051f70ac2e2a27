"""`ptq`: post-training quantization of every matrix of a model, embeddings and head included, onto
a grid that ships.

Codes to the nearest or by GPTQ; before that, weights may be balanced (AWQ): one file each in
`compress/quant/`. Scales by the format's own plain rounding (`round`: with `method:
nearest` the codes are what llama.cpp's quantizer writes, bit for bit) or by a search that minimises
each block's squared error, weighted by its inputs where they are known (`search`, on the grids of
one scale); see `compress/quant/grids/`. The result loads with plain transformers as fp32 weights
equal to the decoded codes, which lie in `quant.safetensors`.
Rounding and its search need no data.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.blocks import Work, lengths_of, row_for
from compress.prune.shape import DEPTH_KEYS
from compress.quant.settings import (
    BLOCK,
    FLOOR_A_COLUMN,
    LEARNED,
    SEARCHED,
    Allocation,
    Balance,
    GridName,
    Method,
    Scales,
)
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_without_training
from compress.store import sha256_json

if TYPE_CHECKING:
    from torch import Tensor

    from compress.memory import Account, Given

PLACES = 7  # of matrices in most families' blocks


@dataclass
class OnGrid:
    """What ptq and qat both say of the grid."""

    grid: GridName = GridName.q4_0
    # where qat starts too: on a distilled 98M parent, round gave KL 0.215 and search 0.322 before
    # training
    scales: Scales = Scales.round
    balance: Balance = Balance.none  # awq: fold between layers first (`compress/quant/balance.py`)
    allocate: Allocation = field(default_factory=Allocation)
    # an expert that fewer calibration tokens reach counts the block's mean token for those lacking;
    # null: four for each of its columns (`compress/quant/experts.py`)
    floor_tokens: int | None = None

    def check_grid(self, stage: str) -> None:
        """ValueError when the grid, or a stage without training, has no such scales; of a mixture
        one grid that has them is enough.
        """
        grids = set(self.allocate.grids) if self.allocate.mixes else {self.grid}
        having = LEARNED if self.scales == Scales.learned else SEARCHED
        if self.scales != Scales.round and not grids & set(having):
            raise ValueError(
                f"{stage}.scales is {self.scales}: grid {self.grid} has none, only"
                f" {', '.join(having)}; use scales=round"
            )
        if self.scales == Scales.learned and stage != "qat":
            raise ValueError(
                f"{stage}.scales is learned: nothing is trained there; use round or search, or the"
                " qat stage"
            )

    def check_family(self, stage: str, config: dict[str, Any], *, calibrated: bool) -> None:
        """ValueError for a config whose family no calibration text can round, where it is to, and
        for a floor that nothing uses.
        """
        if self.balance != Balance.none and config.get("clip_qkv"):
            raise ValueError(
                f"clip_qkv is {config['clip_qkv']}: attention clips its values, and no factor can"
                f" be folded through that; use {stage}.balance=none"
            )
        row = row_for(config, Work.calibrated) if calibrated else None
        used = row is not None and bool(row.router)
        if self.floor_tokens is not None and not used:
            why = "the model has no experts" if calibrated else "no text calibrates it"
            raise ValueError(
                f"{stage}.floor_tokens is {self.floor_tokens}: {why}; leave it at null"
            )
        if self.floor_tokens is not None and self.floor_tokens < 1:
            raise ValueError(f"{stage}.floor_tokens is {self.floor_tokens}: allowed is 1 or more")

    def experts_reported(
        self, tokens: dict[int, Tensor], model: Any, out: Path, ctx: Context
    ) -> dict[str, float]:
        """Name the experts that too few tokens reached, in the log and in `experts.json`, given
        how many reached each, by block; how many they are. Nothing for a model without experts.
        """
        from compress.models.experts import below, sentence_of

        if not tokens:
            return {}
        floor_tokens = self.floor_tokens or FLOOR_A_COLUMN * model.config.hidden_size
        note = []
        for index, tokens_E in sorted(tokens.items()):
            rare = below(tokens_E, floor_tokens)
            note.append({"block": index, "tokens": tokens_E.tolist(), "experts_below_floor": rare})
            if rare:
                ctx.log(f"{ctx.label}: {sentence_of(index, tokens_E, floor_tokens)}")
        (out / "experts.json").write_text(json.dumps({"blocks": note}, indent=2) + "\n")

        counts = [count for tokens_E in tokens.values() for count in tokens_E.tolist()]
        return {
            "experts_unseen_count": float(counts.count(0)),
            "experts_below_floor_count": float(sum(n < floor_tokens for n in counts)),
        }

    @property
    def layout_name(self) -> str:
        """What the stage's checkpoint is on: the grid, or "mixed"."""
        return "mixed" if self.allocate.mixes else self.grid.value

    def layout(self, model: Any, parent: Path, ctx: Context) -> dict[str, str]:
        """The grid of every matrix of an fp32 model. ValueError when `allocate` asks for less
        than the smallest possible file.
        """
        from compress.keys import sources_digest
        from compress.models.checkpoint import best_device, weights_digest
        from compress.quant.allocate import choose, options
        from compress.quant.codes import quantizable, unquantized

        # What no grid can hold stays, and is told by its names in a block.
        if stays := {re.sub(r"\.\d+\.", ".*.", name) for name in unquantized(model)}:
            ctx.log(f"{ctx.label}: stays in fp32: {', '.join(sorted(stays))}")
        if not self.allocate.mixes:
            return dict.fromkeys(quantizable(model), self.grid.value)

        # What each matrix would lose on each grid, then the best mixture that fits the bytes. It is
        # measured once for a parent and a text, whichever stage asks.
        ids_RL = ctx.calibration(self.allocate.calibration_sequences)
        device = str(best_device())
        settings: dict[str, Any] = {"damages": weights_digest(parent), "ids": ids_RL.tolist()}
        settings |= {"device": device, "blocks_together": self.allocate.blocks_together}
        settings["sources"] = sources_digest("compress.quant.allocate")
        damages = options(
            model,
            ids_RL,
            [grid.value for grid in self.allocate.grids],
            (ctx.notes or ctx.work) / f"{sha256_json(settings)}.json",
            f"{ctx.label}, damage of each matrix",
            ctx.log,
            self.allocate.blocks_together,
        )
        weights = sum(matrix.weight.numel() for matrix in quantizable(model).values())
        return choose(damages, self.allocate.matrix_bytes(weights, ctx.file_overhead(parent)))

    def with_allocation(self, cost: Cost, sizes: Sizes) -> Cost:
        """The cost with measuring what each matrix loses on each grid: the text goes on from its
        block, through half of the model on average.
        """
        if not self.allocate.mixes:
            return cost
        blocks = next((sizes.config[key] for key in DEPTH_KEYS if sizes.config.get(key)), 1)
        groups = PLACES * -(-blocks // self.allocate.blocks_together)
        passes = -(-groups * len(self.allocate.grids) // 2)
        return cost.with_calibration(sizes, self.allocation_rows(), passes)

    def allocation_rows(self) -> int:
        """Rows on which the damage of each matrix is measured."""
        return self.allocate.calibration_sequences if self.allocate.mixes else 0

    @property
    def finest_grid(self) -> GridName:
        """The grid, or of a mixture the one with the shortest blocks."""
        grids = self.allocate.grids if self.allocate.mixes else [self.grid]
        return min(grids, key=lambda name: BLOCK[name])

    def check_matrices(self, model: Any) -> None:
        """ValueError naming a matrix whose rows don't divide into blocks, where sizes of a family
        are not those that its config tells; the model may be without memory.
        """
        from compress.quant.codes import quantizable

        block = BLOCK[self.finest_grid]
        for name, matrix in quantizable(model).items():
            if matrix.weight.shape[-1] % block:
                raise ValueError(
                    f"{name} has rows of {matrix.weight.shape[-1]}: grid {self.finest_grid} needs"
                    f" a multiple of {block}; take another grid"
                )

    def check_rows(self, config: dict[str, Any]) -> None:
        """ValueError naming key and nearest legal value when an HF config has rows the grid, or
        every one of a mixture, can't cut into blocks.
        """
        grid = self.finest_grid
        block = BLOCK[grid]

        # Lengths of the rows of every matrix.
        rows = lengths_of(config)
        if config.get("head_dim"):
            heads = config.get("num_attention_heads") or 0
            rows["num_attention_heads * head_dim"] = heads * config["head_dim"]

        for key, length in rows.items():
            if length % block:
                nearest_length = max(block, round(length / block) * block)
                raise ValueError(
                    f"{key} is {length}: grid {grid} needs rows of a multiple of {block}; the"
                    f" nearest legal value is {nearest_length}"
                )


def passes_of(method: Method, balance: Balance) -> int:
    """How often rounding by a method, behind a balance, sends its text through a model."""
    return {Method.nearest: 0, Method.gptq: 6}[method] + 2 * (balance != Balance.none)


@dataclass
class Ptq(OnGrid):
    """Quantize without training."""

    method: Method = Method.nearest
    calibration_sequences: int = 64
    damping: float = 0.01  # gptq: relative to the mean of the second moments
    family: ClassVar[Family] = Family.quantize
    leaves_a_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.check_grid("ptq")

        # A setting that nothing uses would be believed.
        for key, used in (
            ("calibration_sequences", self.passes > 0),
            ("damping", self.method == Method.gptq),
        ):
            value, default = getattr(self, key), getattr(Ptq, key)
            if value != default and not used:
                raise ValueError(
                    f"ptq.{key} is {value}: nothing uses it with method={self.method},"
                    f" balance={self.balance}; leave it at {default}"
                )
            if key != "damping" and value < 1:
                raise ValueError(f"ptq.{key} is {value}: allowed is 1 or more")
        if not 0 < self.damping < 1:
            raise ValueError(
                f"ptq.damping is {self.damping}: allowed is between 0 and 1, for example 0.01"
            )

    def calibration_rows(self) -> int:
        """Rows that rounding, balance and allocation read."""
        rounded = self.calibration_sequences if self.passes else 0
        return max(rounded, self.allocation_rows())

    def cost(self, sizes: Sizes) -> Cost:
        """The calibration text goes through the parent `passes` times."""
        cost = cost_without_training(sizes, bytes_a_weight=4)
        cost = cost.with_calibration(sizes, self.calibration_sequences, self.passes)
        return self.with_allocation(cost, sizes)

    def memory(self, given: Given) -> Account:
        """A block at a time and its second moments; an fp32 model where grids are allocated."""
        from compress.memory import BASE, opened, rounded

        account = rounded(
            given.parent,
            self.calibration_sequences if self.passes else 0,
            given.seq_len,
            balance=self.balance != Balance.none,
            gptq=self.method == Method.gptq,
            stored_bytes=4 if self.allocate.mixes else given.stored_bytes,
        )
        if self.allocate.mixes:
            account.phases["open"] = [*BASE, *opened(given.parent, given.stored_bytes)]
        return account

    @property
    def passes(self) -> int:
        """How often the calibration text goes through the model: 0 where no data is needed."""
        return passes_of(self.method, self.balance)

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result: the parent's, unchanged. ValueError when its rows don't divide
        into blocks, or no calibration text can round its family.
        """
        self.check_rows(config)
        self.check_family("ptq", config, calibrated=self.passes > 0)
        return config

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Quantize `parent` into `out`. ValueError when the parent is quantized already or does
        not fit the grid or the method.
        """
        from compress.models.checkpoint import load_model, load_stored
        from compress.quant.blockwise import Blockwise
        from compress.quant.codes import check_parent, save_quantized
        from compress.quant.grids import GRIDS

        check_parent(self, parent, "round")
        # A mixture of grids is measured with one matrix of the whole model changed at a time.
        model = load_model(parent) if self.allocate.mixes else load_stored(parent)
        layout = self.layout(model, parent, ctx)

        # Round: by the calibration text, block by block, or each matrix by itself.
        work = Blockwise(
            model,
            layout,
            method=self.method,
            search=self.scales == Scales.search,
            balance=self.balance,
            damping=self.damping,
            floor_tokens=self.floor_tokens,
        )
        if self.passes:
            work.calibrated(
                ctx.calibration(self.calibration_sequences),
                ctx.work,
                ctx.precision,
                lambda line: ctx.log(f"{ctx.label}: {line}"),
            )
        else:
            work.plain()
        save_quantized(model, out, parent, work.made)

        # Bits a weight; what is on no grid stays fp32.
        total = model.num_parameters()
        numel = {name: quantized.codes.numel() for name, quantized in work.made.items()}
        bits = sum(count * GRIDS[layout[name]].bits_per_weight for name, count in numel.items())
        bits += (total - sum(numel.values())) * 32
        error, power = work.lost.tolist()
        return {
            "bits_per_weight": bits / total,
            "weight_mse_relative": error / max(power, 1e-30),
            "tensors_quantized_count": float(len(numel)),
            **self.experts_reported(work.tokens, model, out, ctx),
        }
