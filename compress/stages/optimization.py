"""What every training stage can say about its optimization; shared fields, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError
from compress.stages.context import Context

if TYPE_CHECKING:
    from compress.train.loop import Result


@dataclass
class Optimization:
    """Token budget and optimizer of a stage."""

    tokens: int = 200_000  # training tokens over all epochs, rounded up to whole steps
    epochs: int = 1  # times each sequence is read; a second one costs no teacher
    batch_sequences: int = 4  # sequences of data.seq_len tokens per optimizer step
    micro_batch_sequences: int = 4  # sequences held in memory at once; changes memory and speed, not the result's meaning
    lr: float = 5e-4
    warmup_fraction: float = 0.05
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tokens", "epochs", "batch_sequences", "micro_batch_sequences", "lr", "grad_clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")
        if not 0 <= self.warmup_fraction < 1:
            raise ConfigError(f"warmup_fraction={self.warmup_fraction} must be in [0, 1)")

    def steps(self, seq_len: int) -> int:
        """Optimizer steps that the token budget pays for."""
        return -(-self.tokens // (self.batch_sequences * seq_len))

    def sequences(self, seq_len: int) -> int:
        """Distinct sequences read: those of one epoch."""
        return -(-self.steps(seq_len) * self.batch_sequences // self.epochs)

    def loop_arguments(self, ctx: Context) -> dict[str, Any]:
        """What `compress.train.loop.train` takes besides model, loss and batches."""
        return {
            "steps": self.steps(ctx.seq_len), "lr": self.lr, "warmup_fraction": self.warmup_fraction, "grad_clip": self.grad_clip,
            "seed": ctx.seed, "precision": ctx.precision, "work": ctx.work, "label": ctx.label, "log": ctx.log,
        }  # fmt: skip

    def metrics(self, result: Result, ctx: Context) -> dict[str, float]:
        """Deterministic figures of a finished training; the whole curve, with its times, goes to the store's note."""
        losses = [row["loss"] for row in result.curve]
        tenth = max(1, len(losses) // 10)
        ctx.curve(result.curve)
        return {
            "steps_count": len(losses), "tokens_count": len(losses) * self.batch_sequences * ctx.seq_len,
            "loss_first_nats": sum(losses[:tenth]) / tenth, "loss_last_nats": sum(losses[-tenth:]) / tenth,
        }  # fmt: skip
