"""What every training stage can say about its optimization; shared fields, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ConfigError
from compress.stages.context import Context

if TYPE_CHECKING:
    from compress.distill.steps import TeacherSource
    from compress.train.data import Packed
    from compress.train.loop import Result


class SchemeName(StrEnum):
    """How the teacher is seen: kept signals (`compress/distill/schemes.py`), or the teacher run at every step."""

    sampled = "sampled"
    topk = "topk"
    hidden = "hidden"
    full = "full"
    online = "online"


class TeacherLoad(StrEnum):
    """How the teacher's weights are held while it makes the signal."""

    plain = "plain"
    nf4 = "nf4"
    int8 = "int8"


@dataclass
class Signal:
    """The teacher's signal of a stage."""

    scheme: SchemeName = SchemeName.sampled
    threshold: float = 0.05  # sampled: probabilities above it are exact, ids a token are bounded by its inverse
    top: int = 64  # topk: ids a token
    path: str | None = None  # a folder or URL (s3://...) that keeps the shards; null is the store
    teacher: TeacherLoad = TeacherLoad.plain  # nf4 needs bitsandbytes, int8 torchao

    def __post_init__(self) -> None:
        if not 1 / 255 <= self.threshold < 1:
            raise ConfigError(f"signal.threshold={self.threshold} must be in [1/255, 1)")
        if self.top < 1:
            raise ConfigError(f"signal.top={self.top} must be at least 1")

    @property
    def dense(self) -> bool:
        """Whether all of the teacher's probabilities can be had from it."""
        return self.scheme in (SchemeName.hidden, SchemeName.full, SchemeName.online)

    def open(self, ctx: Context, teacher: Path, data: Packed, sequences: int, temperature: float = 1.0) -> TeacherSource:
        """The teacher for the first `sequences` rows of `data`; kept signals are made now where they are missing."""
        from compress.checkpoint import load_model
        from compress.distill.schemes import Scheme
        from compress.distill.signal import Signals
        from compress.distill.steps import OnlineTeacher

        if self.scheme is SchemeName.online:
            return OnlineTeacher(load_model(teacher, ctx.dtype, self.teacher.value), data)
        scheme = Scheme(self.scheme.value, self.threshold, self.top, temperature)
        signals = Signals(
            self.path or ctx.signals, teacher, data, scheme, seed=ctx.seed, precision=ctx.precision, log=ctx.log,
            own_folder=self.path is not None, load=self.teacher.value,
        )  # fmt: skip
        signals.make(min(sequences, len(data.ids)))
        return signals


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
