"""What every training stage can say about its optimization; shared fields, validated once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.distill.settings import SchemeName, Signal
from compress.errors import ConfigError
from compress.stages.context import Context

if TYPE_CHECKING:
    from compress.distill.losses import Mix
    from compress.distill.online import TeacherSource
    from compress.memory import Account, Given
    from compress.train.packed import Packed
    from compress.train.plan import Plan


# Which weights go on: the stage's, or its parent's where it did not pay.
Keep = StrEnum("Keep", ["always", "better"])
# How the learning rate falls (`compress/train/optimizer.py`).
Schedule = StrEnum("Schedule", ["cosine", "wsd"])


def open_student(parent: Path, ctx: Context) -> Any:
    """The fp32 model that is to be trained. Under fsdp2 it is empty where that can be, and its
    weights are read in shards when it has been cut (`compress/models/empty.py`).
    """
    from compress.models.checkpoint import load_model
    from compress.models.empty import empty_model

    empty = empty_model(parent) if ctx.parallel == "fsdp2" else None
    return load_model(parent) if empty is None else empty


def open_source(
    signal: Signal,
    ctx: Context,
    teacher: Path,
    data: Packed,
    sequences: int,
    tokens_of: Path,
    temperature: float = 1.0,
) -> TeacherSource:
    """The teacher for the first `sequences` rows of `data`, in the tokens of the checkpoint
    `tokens_of`; kept signals are made now where they are missing.
    """
    import torch

    from compress.distill.online import OnlineTeacher
    from compress.distill.schemes import Scheme
    from compress.distill.signals import Signals
    from compress.models.checkpoint import load_model
    from compress.models.empty import empty_model
    from compress.models.reading import reading
    from compress.train import parallel

    # The teacher itself, run at every step.
    if signal.scheme is SchemeName.online:
        dtype = torch.float32 if ctx.precision == "fp32" else torch.bfloat16
        fold = reading(tokens_of, teacher)
        sharded = ctx.parallel == "fsdp2"
        model = None
        if sharded and fold is None and signal.teacher.value == "plain":
            model = empty_model(teacher, dtype)
        if model is None:
            model = load_model(teacher, dtype, signal.teacher.value)
        return OnlineTeacher(model, data, sharded=sharded, fold=fold)

    # Or its kept signals, all of them there before training begins.
    scheme = Scheme(signal.scheme.value, signal.threshold, temperature)
    signals = Signals(
        signal.path or ctx.signals,
        teacher,
        data,
        scheme,
        seed=ctx.seed,
        precision=ctx.precision,
        log=ctx.log,
        own_folder=bool(signal.path),
        load=signal.teacher.value,
        tokens_of=tokens_of,
    )
    signals.make(min(sequences, len(data.ids)))
    parallel.wait()
    signals.refresh()
    return signals


@dataclass
class Optimization:
    """Token budget and optimizer of a stage."""

    tokens: int = 200_000  # training tokens over all epochs, rounded up to whole steps
    epochs: int = 1  # times each sequence is read; a second one costs no teacher
    # sequences of data.seq_len tokens per optimizer step, over all processes
    batch_sequences: int = 4
    # sequences held in memory at once; changes memory and speed, not the result's meaning
    micro_batch_sequences: int = 4
    lr: float = 5e-4
    schedule: Schedule = Schedule.cosine
    decay_fraction: float = 0.2  # wsd: share of the steps, at the end, in which the rate falls
    warmup_fraction: float = 0.05
    grad_clip: float = 1.0
    # measurements of the loss on the last rows of the text, which are then not trained on; the best
    # weights ship
    validations: int = 0
    validation_sequences: int = 8
    patience: int = 0  # measurements without a better one that end the stage; 0: never
    # better: where the stage did not pay (`compress/score/payoff.py`), later slots and what ships
    # take its parent
    keep: Keep = Keep.always
    leaves_a_grid: ClassVar[bool] = False  # a stage that buys bytes need not be better

    def __post_init__(self) -> None:
        for name in (
            "tokens",
            "epochs",
            "batch_sequences",
            "micro_batch_sequences",
            "lr",
            "grad_clip",
            "validation_sequences",
        ):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0")

        # Shares of the steps.
        if not 0 <= self.warmup_fraction < 1 or not 0 < self.decay_fraction <= 1:
            raise ConfigError(
                f"warmup_fraction={self.warmup_fraction} must be in [0, 1) and"
                f" decay_fraction={self.decay_fraction} in (0, 1]"
            )

        # Measurements, and an end that hangs on them.
        if self.validations < 0 or self.patience < 0 or (self.patience and not self.validations):
            raise ConfigError(
                f"validations={self.validations}, patience={self.patience}: neither below 0, and"
                " patience needs validations"
            )

    @property
    def reads_chat(self) -> bool:
        """Whether it trains on the recipe's chat data, not on its text."""
        return False

    def calibration_rows(self) -> int:
        """None: what is trained needs no calibration."""
        return 0

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """Training keeps the shape."""
        return config

    def check_trainer(self, parallel: str, precision: str, seq_len: int) -> None:
        """ConfigError for options that this way of training has no place for: `parallel` is that of
        several processes, none for one. Here nothing is.
        """

    def steps(self, seq_len: int) -> int:
        """Optimizer steps that the token budget pays for."""
        return -(-self.tokens // (self.batch_sequences * seq_len))

    def sequences(self, seq_len: int) -> int:
        """Distinct sequences read: those of one epoch."""
        return -(-self.steps(seq_len) * self.batch_sequences // self.epochs)

    def readings(self, seq_len: int, sequences: int) -> float:
        """How often each sequence is read where the text has so many: `epochs`, or more where it
        has too few.
        """
        there = max(1, sequences - self.validation_sequences * bool(self.validations))
        return self.steps(seq_len) * self.batch_sequences / min(self.sequences(seq_len), there)

    def told_readings(self, seq_len: int, sequences: int) -> str:
        """What is wrong where the text is too short for `epochs` readings; empty where it is long
        enough.
        """
        there = sequences - self.validation_sequences * bool(self.validations)
        if self.sequences(seq_len) <= max(1, there):
            return ""
        most = max(1, there) * self.epochs * seq_len
        return (
            f"tokens={self.tokens} read each of {max(1, there)} sequences of text"
            f" {self.readings(seq_len, sequences):.1f} times, epochs={self.epochs} asks for"
            f" {self.epochs}: add text to the data, or set tokens to at most {most}"
        )

    def training_memory(
        self,
        given: Given,
        trained: float,
        frozen: float = 0,
        *,
        frozen_bytes: float = 4.0,
        values: bool = False,
        alone: bool = False,
        signal: Signal | None = None,
        signal_of: Any = None,
    ) -> Account:
        """Bytes of training so many weights beside frozen ones, and of the signal of a model of the
        shape `signal_of`. `values`: it computes with rounded ones; `alone`: which lie in place of
        the frozen ones.
        """
        from compress import memory

        # What one process computes at once.
        setup = given.setup
        rows = max(1, self.batch_sequences // setup.processes)
        micro = min(self.micro_batch_sequences, rows)
        size = 4 if setup.precision == "fp32" else 2
        online = signal is not None and signal.scheme is SchemeName.online
        hidden = signal is not None and signal.scheme is SchemeName.hidden
        if values:
            frozen_bytes = (1 if alone else 2) * memory.weight_bytes(setup, trained=False)[
                "weights"
            ]

        account = memory.trained(
            given,
            memory.Training(
                trained,
                frozen,
                micro * given.seq_len,
                micro_batches=-(-rows // micro),
                frozen_bytes=frozen_bytes,
                values=values,
                validations=bool(self.validations),
                teacher_head=size * signal_of.head if hidden else 0.0,
                teacher=size * signal_of.params if online else 0.0,
            ),
        )
        if signal is not None and not online:
            account.phases["signal"] = memory.signal_made(given, signal_of)
        return account

    def reserve(self, model: Any, ctx: Context, copies: int = 0, frozen: bool = False) -> None:
        """Allocate what training holds besides activations, and let go of it: a teacher's signal
        may take hours and comes behind.

        Of each trained weight: itself, its gradient, two moments, and with `copies` what is
        computed with instead (`compress/memory.py`); `frozen` weights are held alone. ResourceError
        when there is no such room.
        """
        import psutil
        import torch

        from compress.errors import ResourceError, is_memory
        from compress.memory import Setup, weight_bytes
        from compress.models.checkpoint import best_device
        from compress.train import parallel
        from compress.train.trainer import NO_ROOM

        # Bytes of a weight on the device; on a CPU that is where the best ones lie too.
        setup = Setup(ctx.precision, moments=ctx.moments)
        micro_batches = -(-self.batch_sequences // self.micro_batch_sequences)
        stays, learns = (
            weight_bytes(setup, trained=trained, micro_batches=micro_batches, values=bool(copies))
            for trained in (False, True)
        )
        size = sum(learns.values())
        if best_device().type == "cpu":
            size += learns["weights"] * bool(self.validations) + 8 * (ctx.moments == "host")

        # Bytes of all, of which fsdp2 leaves each process its share.
        counts = [(p.numel(), p.requires_grad and not frozen) for p in model.parameters()]
        needed = round(sum(n * (size if one else sum(stays.values())) for n, one in counts))
        needed = needed // parallel.world() if ctx.parallel == "fsdp2" else needed

        # a host promises more than it has, a GPU does not
        free = psutil.virtual_memory().available + psutil.swap_memory().free
        try:
            if best_device().type == "cpu" and needed > free:
                raise MemoryError(f"{free / 1e9:.1f} GB are free")
            torch.empty(needed, dtype=torch.uint8, device=best_device())
        except (RuntimeError, MemoryError) as error:
            if not is_memory(error):
                raise
            raise ResourceError(
                f"{ctx.label}: training needs {needed / 1e6:,.0f} MB on {best_device()} ({error}):"
                f" {NO_ROOM}"
            ) from error
        torch.cuda.empty_cache()  # does nothing where no GPU is in use

    def plan(self, ctx: Context) -> Plan:
        """The loop's settings in a run's context."""
        from compress.train.plan import Plan

        return Plan(
            steps=self.steps(ctx.seq_len),
            micro=self.micro_batch_sequences,
            lr=self.lr,
            schedule=self.schedule.value,
            decay_fraction=self.decay_fraction,
            warmup_fraction=self.warmup_fraction,
            grad_clip=self.grad_clip,
            seed=ctx.seed,
            precision=ctx.precision,
            activation_checkpointing=ctx.activation_checkpointing,
            moments=ctx.moments,
            parallel=ctx.parallel,
            validations=self.validations,
            patience=self.patience,
        )

    def validation_rows(self, data: Packed, ctx: Context) -> list[int]:
        """The last rows of the text, where the loss is measured; none without validations.
        ValueError when no other row is there to train on.
        """
        if not self.validations:
            return []
        rows = list(range(len(data.ids) - self.validation_sequences, len(data.ids)))
        if rows[0] < 1:
            raise ValueError(
                f"{ctx.label}: {len(data.ids)} sequences of text leave none to train on besides"
                f" {len(rows)} for validation"
            )
        return rows

    def optimize(
        self,
        model: Any,
        mix: Mix,
        data: Packed,
        source: TeacherSource | None,
        ctx: Context,
        *,
        vocabulary: int | None = None,
        wrap_batches: Callable[[Any], Any] = lambda batches: batches,
        wrap_loss: Callable[[Any], Any] = lambda loss: loss,
    ) -> dict[str, float]:
        """Train `model` on `data` with a loss mix. Deterministic figures; the whole curve, with
        its times, goes to the store's note.
        """
        from compress.distill.batches import make_batches, make_loss, one_batch
        from compress.train.loop import train

        # The loss; wrapped, it may ask more of the teacher, which every batch behind it then has.
        head = source.teacher_head if source else None
        loss = wrap_loss(make_loss(mix, head, vocabulary))

        # Validation: the divergence alone, else plain cross-entropy, on rows never trained on.
        rows = self.sequences(ctx.seq_len)
        validation = None
        if validation_rows := self.validation_rows(data, ctx):
            rows = min(rows, validation_rows[0])
            alone = replace(
                mix,
                kl_weight=float(source is not None),
                ce_weight=float(source is None),
                hidden_weight=0.0,
            )
            validation = (
                make_loss(alone, head, vocabulary),
                [one_batch(data, source, [row]) for row in validation_rows],
            )

        batches = wrap_batches(
            make_batches(data, source, seed=ctx.seed, sequences=rows, batch=self.batch_sequences)
        )
        result = train(
            model,
            loss,
            batches,
            self.plan(ctx),
            work=ctx.work,
            label=ctx.label,
            log=ctx.log,
            validation=validation,
        )
        ctx.curve(sorted([*result.curve, *result.measured], key=lambda row: row["step"]))

        # Deterministic figures: means over the first and the last tenth of the steps.
        losses = [row["loss"] for row in result.curve]
        tenth = max(1, len(losses) // 10)
        return {
            "steps_count": len(losses),
            "tokens_count": len(losses) * self.batch_sequences * ctx.seq_len,
            "readings_count": round(self.readings(ctx.seq_len, len(data.ids)), 2),
            "loss_first_nats": sum(losses[:tenth]) / tenth,
            "loss_last_nats": sum(losses[-tenth:]) / tenth,
        } | result.outcome
