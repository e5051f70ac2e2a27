"""Quantization-aware training on the exact grid of the file that ships: the student learns under
its own rounding.

Every step computes with decode(encode(W)) and lets gradients pass straight through to the fp32
or bf16 master weights (`quant/fake.py`), which under fsdp2 are rounded in rows, each where it lies
(`quant/shards.py`). The loss is KL(p || student) from a cached signal. With
`learn_from` parent, p is the model whose loss through rounding is to be won back (LLM-QAT, arXiv
2305.17888, section 3.1); with teacher, quantization-aware distillation, it is the recipe's teacher.
With `balance` training starts from folded weights, and searched or learned scales from what loses
least of each block's outputs, behind blocks that are rounded already (`quant/blockwise.py`): far
nearer than the format's own rule. With `method` gptq it starts from GPTQ's codes, each weight as
near to where it was as its code allows: in the middle of their cells weights have forgotten where
they came from, and are a worse start than no GPTQ (`results/quant/bench.md`, `scales.md`).

With `train` scales GPTQ's codes stay, and of the file's numbers the scales alone learn, beside
norms and biases, in a fraction of the memory (as MLX's DWQ does).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.distill.settings import SchemeName, Signal
from compress.errors import ConfigError
from compress.quant.settings import BLOCK, Balance, Method, Scales
from compress.stages.context import Context
from compress.stages.ptq import OnGrid, passes_of
from compress.stages.stage import Cost, Family, Sizes, cost_of_training
from compress.stages.training import Keep, Optimization, open_source, open_student

if TYPE_CHECKING:
    from torch import Tensor

    from compress.memory import Account, Given
    from compress.quant.codes import Quantized

# Whose distribution the quantized model learns.
LearnFrom = StrEnum("LearnFrom", ["parent", "teacher"])
# What learns: every weight, or of each matrix its scales alone, behind GPTQ's codes.
Trained = StrEnum("Trained", ["all", "scales"])


@dataclass
class Qat(Optimization, OnGrid):
    """Train the parent on a llama.cpp grid; ship exactly those codes."""

    lr: float = 3e-4
    tokens: int = 100_000
    learn_from: LearnFrom = LearnFrom.parent
    train: Trained = Trained.all
    # How the codes are chosen that training starts from; of train=scales always by gptq.
    method: Method = Method.nearest
    calibration_sequences: int = 16  # for balance and gptq
    # above 0 the parent is frozen on its grid, and adapters of that rank are trained and merged
    # there
    rank: int = 0
    # All of p: so near its target, sampled ids drown it (41k tokens on the embedded teacher: KL
    # 0.24 from sampled, 0.18 from exact).
    signal: Signal = field(default_factory=lambda: Signal(scheme=SchemeName.hidden))
    family: ClassVar[Family] = Family.quantize
    leaves_a_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_grid("qat")

        # What only other stages, or other settings, could do.
        if self.keep != Keep.always:
            raise ConfigError(
                f"qat.keep={self.keep}: its parent has no codes to ship; use keep=always"
            )
        if self.calibration_sequences < 1 or (
            not self.calibrated and self.calibration_sequences != 16
        ):
            raise ConfigError(
                f"qat.calibration_sequences={self.calibration_sequences} must be at least 1, and is"
                " used by balance, method=gptq and train=scales only"
            )
        if self.rank < 0:
            raise ConfigError(f"qat.rank={self.rank} must be 0 (every weight is trained) or above")
        if self.train is Trained.scales and (self.rank or self.scales != Scales.learned):
            raise ConfigError(
                f"qat.train=scales: rank={self.rank} and scales={self.scales} must be 0 and learned"
            )

    @property
    def rounding(self) -> Method:
        """How the codes are chosen that training starts from."""
        return Method.gptq if self.train is Trained.scales else self.method

    @property
    def calibrated(self) -> bool:
        """Whether text goes through the blocks before training."""
        return self.balance != Balance.none or self.rounding is Method.gptq

    def calibration_rows(self) -> int:
        """Rows that balance and allocation read."""
        balanced = self.calibration_sequences if self.calibrated else 0
        return max(balanced, self.allocation_rows())

    def cost(self, sizes: Sizes) -> Cost:
        """Training with the signal of whom it learns from, and the calibration of balance."""
        learns_from_teacher = self.learn_from is LearnFrom.teacher
        cost = cost_of_training(
            sizes,
            self.tokens,
            bytes_a_weight=4,
            signal=self.signal,
            signal_params=sizes.teacher_params if learns_from_teacher else sizes.parent_params,
        )
        passes = max(1, passes_of(self.rounding, self.balance))
        rows = self.calibration_sequences if self.calibrated else 0
        return self.with_allocation(cost.with_calibration(sizes, rows, passes), sizes)

    def memory(self, given: Given) -> Account:
        """Training every weight, or adapters, under rounding; before that, rounding it once."""
        from compress.memory import BASE, CODE_BYTES, Item, rounded_block, walk

        shape = given.parent
        teacher = given.teacher if self.learn_from is LearnFrom.teacher else shape
        adapters = self.rank * sum(
            sum(sizes) for block in shape.blocks for sizes in block if len(sizes) == 2
        ) + self.rank * (shape.vocabulary + shape.hidden) * (1 if shape.tied else 2)
        trained, frozen = (adapters, shape.params) if self.rank else (shape.params, 0)
        scales_alone = self.train is Trained.scales
        if scales_alone:
            # of a grid of a scale a row at most so many, too
            trained, frozen = shape.params / max(32, BLOCK[self.finest_grid]), shape.params
        account = self.training_memory(
            given,
            trained,
            frozen,
            values=True,
            alone=scales_alone,
            signal=self.signal,
            signal_of=teacher,
        )
        if scales_alone:
            stay = Item("codes that stay", device=CODE_BYTES * shape.params)
            for phase in ("step", "update"):
                account.phases[phase].append(stay)
        if self.calibrated:
            gptq = self.rounding is Method.gptq
            account.phases["start"] = [
                *BASE,
                Item("weights in fp32", host=4 * shape.params),
                Item("weights before rounding", host=0 if scales_alone else 4 * shape.params),
                Item("codes", host=CODE_BYTES * shape.params),
                *walk(shape, self.calibration_sequences, given.seq_len),
                *rounded_block(shape, balance=self.balance != Balance.none, gptq=gptq),
            ]
        return account

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """Rows must divide into the grid's blocks."""
        self.check_rows(config)
        self.check_family("qat", config, calibrated=self.calibrated)
        return config

    def check_trainer(self, parallel: str, precision: str, seq_len: int) -> None:
        """ConfigError for scales alone of matrices in shards."""
        if self.train is Trained.scales and parallel == "fsdp2":
            raise ConfigError("train=scales needs whole matrices: trainer=auto or ddp")

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the quantized student (fp32 values on the grid, codes in quant.safetensors).
        Metrics: as every training stage.
        """
        import torch

        from compress.distill.batches import common_vocabulary
        from compress.distill.losses import Mix
        from compress.models.checkpoint import load_model
        from compress.quant.codes import check_parent, save_quantized
        from compress.quant.fake import attach, finish

        check_parent(self, parent, "train")

        # Student, room for its training, and the model that it learns from.
        data = ctx.text()
        sequences = self.sequences(ctx.seq_len)
        learned_from = ctx.teacher if self.learn_from is LearnFrom.teacher else parent
        vocabulary = common_vocabulary(parent, learned_from)
        reads_weights = self.calibrated or self.allocate.mixes
        model = load_model(parent) if reads_weights else open_student(parent, ctx)
        scales_alone = self.train is Trained.scales
        frozen = self.rank > 0 or scales_alone
        self.reserve(model, ctx, copies=int(not scales_alone), frozen=frozen)
        source = open_source(self.signal, ctx, learned_from, data, sequences, parent)

        # Onto the grid, trained there, and written as codes.
        torch.manual_seed(ctx.seed)
        layout, start, tokens = self.start(model, parent, ctx)
        attach(model, layout, self.scales.value, self.rank, start, fixed=scales_alone)
        metrics = self.optimize(model, Mix(), data, source, ctx, vocabulary=vocabulary)
        save_quantized(model, out, parent, finish(model))
        return metrics | self.experts_reported(tokens, model, out, ctx)

    def start(
        self, model: Any, parent: Path, ctx: Context
    ) -> tuple[dict[str, str], dict[str, Quantized] | None, dict[int, Tensor]]:
        """Put an fp32 model where training starts: the grid of each matrix, where they were
        searched its scales, and how many tokens reached each expert, by block.
        """
        from compress.quant.blockwise import Blockwise

        layout = self.layout(model, parent, ctx)
        if not self.calibrated:
            return layout, None, {}

        # Folded and rounded block by block; scales stay, weights go back to before the rounding, as
        # far as GPTQ's codes let them, or codes stay too.
        codes_stay = self.train is Trained.scales
        work = Blockwise(
            model,
            layout,
            method=self.rounding.value,
            search=self.scales != Scales.round,
            balance=self.balance.value,
            keep=not codes_stay,
            floor_tokens=self.floor_tokens,
        )
        work.calibrated(
            ctx.calibration(self.calibration_sequences),
            ctx.work,
            ctx.precision,
            lambda line: ctx.log(f"{ctx.label}: {line}"),
        )
        if not codes_stay:
            work.restore()
        return layout, work.made, work.tokens
