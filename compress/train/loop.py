"""The one training loop: distillation, LoRA and quantization-aware training
all run through `train`.

Each step accumulates the gradient of a loss *sum* over its micro-batches (and, with several
processes, over their rows), then divides once by the number of labels, clips to a global norm and
takes one optimizer step. When memory runs out, the micro-batch is halved and the step taken again.

Ctrl-C and SIGTERM finish the step, save the state and stop; after kill -9 at most SAVE_SECONDS of
work is lost. Either way the same command goes on from there and, on a CPU, ends in the same bytes:
batches and random numbers are pure functions of the step, tensors lie in safetensors and the rest
in JSON. (GPUs add up gradients of embeddings and attention in any order: there last bits may
differ.) With sharded parameters each rank writes its own shards, and a resumed run needs as many
ranks.

With validation, the KL on rows that are never trained on is measured at regular steps, the first
one before any; training returns the best weights, and `patience` measurements without a better one
end it. A stage whose best step is 0 did not pay.

The optimizer is AdamW (arXiv 1711.05101) under a schedule, over fp32 masters (bf16: under bf16
autocast) or bf16 weights (bf16_stochastic):

    cosine   lr(t) = peak * warm(t) * (floor + (1 - floor) * (1 + cos(pi t / steps)) / 2)
    (arXiv 1608.03983) wsd      warm-up, then the peak, then over the last `decay_fraction` of the
    steps linearly to the floor    (arXiv 2404.06395, section 4)

with warm(t) = min(1, (t + 1) / warmup). bf16 has 8 significant bits: an update below 1/512 of a
weight would vanish under rounding to nearest. Rounding up with probability (x - down) / (up - down)
keeps it in expectation (arXiv 2010.06192, section 3), so that weights need 2 bytes instead of a
master copy's 4; the moments stay fp32, and so do the sums of gradients over several micro-batches.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compress.errors import Interrupted, ResourceError, is_memory
from compress.models.checkpoint import best_device
from compress.models.cpu_kernels import use_cpu_kernels
from compress.store import commit
from compress.train import parallel
from compress.train.optimizer import BETAS, MOMENTS, StochasticAdamW, learning_rate, to_bf16
from compress.train.progress import progress

SAVE_SECONDS = 60.0  # between two states
Batch = dict[str, Tensor]
LossFunction = Callable[[Any, Batch], tuple[Tensor, Tensor]]
NO_ROOM = (
    "weights, gradients and AdamW's moments have no room; what takes less is"
    " trainer.precision=bf16_stochastic (12 bytes a weight instead of 16), trainer=fsdp2 (each GPU"
    " its share), a lora stage or qat with rank=N (most weights frozen), or a smaller student"
)


class Plan(NamedTuple):
    """How `train` optimizes; fields as in `stages/training.py` and `config.Trainer`."""

    steps: int
    lr: float
    micro: int = 4
    warmup_fraction: float = 0.0
    schedule: str = "cosine"
    decay_fraction: float = 0.2
    grad_clip: float = 1.0
    seed: int = 0
    precision: str = "fp32"  # or bf16, bf16_stochastic
    activation_checkpointing: bool = False
    parallel: str = "none"  # or ddp, fsdp2
    validations: int = 0  # measurements over the stage, besides the first
    patience: int = 0  # measurements without a better one that end training; 0: never


class Result(NamedTuple):
    """What training says of itself."""

    # A row {"step", "loss", "lr", "grad_norm", "tokens_per_sec", "seconds"} a step.
    curve: list[dict[str, float]]
    # A row {"step", "tokens", "seconds", "validation_kl"} a measurement; all of the steps before
    # it.
    measured: list[dict[str, float]]
    outcome: dict[str, float]  # the best step and what it brought


class LossModule(nn.Module):
    """A model and its loss as one module, so that autocast and data parallelism wrap the whole
    computation.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction, autocast: bool) -> None:
        super().__init__()
        self.model, self.loss_fn, self.autocast = model, loss_fn, autocast

    def forward(self, batch: Batch, loss_fn: LossFunction | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(batch["inputs"].device.type, torch.bfloat16, enabled=self.autocast):
            return (loss_fn or self.loss_fn)(self.model, batch)


@contextmanager
def _delayed_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of dying of it; a second one kills at once."""
    caught: list[int] = []
    with ExitStack() as old_handlers:

        def catch(signum: int, frame: Any) -> None:
            caught.append(signum)
            old_handlers.close()

        if (
            threading.current_thread() is threading.main_thread()
        ):  # it alone may set handlers; elsewhere signals end the process as usual
            for number in (signal.SIGINT, signal.SIGTERM):
                old_handlers.callback(signal.signal, number, signal.signal(number, catch))
        yield caught


class Trainer:
    """The model wrapped for its devices, its optimizer, and the state that a resumed run needs."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, plan: Plan, work: Path) -> None:
        self.plan, self.model, self.work = plan, model, work
        if plan.precision == "bf16_stochastic":
            to_bf16(model)
        use_cpu_kernels(model)
        if plan.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        self.device, self.sharded = best_device(), plan.parallel == "fsdp2"
        self.plain = LossModule(
            model, loss_fn, autocast=plan.precision == "bf16" and not self.sharded
        ).to(self.device)
        self.module: Any = self.plain  # as the devices share it
        if self.sharded:
            self.module = parallel.shard(self.plain, model, plan.precision)
        elif plan.parallel == "ddp":
            self.module = DistributedDataParallel(self.plain)
        self.trained = {name: p for name, p in self.plain.named_parameters() if p.requires_grad}
        parameters = list(self.trained.values())
        self.sums_fp32 = parameters[0].dtype == torch.bfloat16
        if self.sums_fp32:
            for p in parameters:
                p.grad_dtype = None  # takes an fp32 gradient
            self.optimizer: torch.optim.Optimizer = StochasticAdamW(parameters, plan.lr)
        else:
            self.optimizer = torch.optim.AdamW(
                parameters, lr=plan.lr, betas=BETAS, weight_decay=0.0, fused=True
            )
        self.ranks = (
            parallel.world() if self.sharded else 1
        )  # that save: elsewhere every rank's state is the same
        self.state: dict[str, Any] = {
            "step": 0,
            "curve": [],
            "measured": [],
            "micro": plan.micro,
            "best_step": -1,
            "best_kl": math.inf,
        }
        self.best: dict[str, Tensor] = {}
        self._load()

    def save(self) -> None:
        """Make the state durable as `<work>/state-<step>/`, the older one going last: a kill at
        any moment leaves one whole. All ranks call it.
        """
        beside, final = self.work / ".state.part", self.work / f"state-{self.state['step']:08d}"
        if parallel.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        parallel.wait()
        if parallel.rank() < self.ranks:
            tensors = {f"best/{name}": p for name, p in self.best.items()}
            for name, p in self.trained.items():
                tensors[f"param/{name}"] = parallel.local(p).contiguous()
                if p in self.optimizer.state:
                    tensors |= {
                        f"{moment}/{name}": (
                            parallel.local(self.optimizer.state[p][moment]).contiguous()
                        )
                        for moment in MOMENTS
                    }
            save_file(tensors, beside / f"tensors-{parallel.rank()}.safetensors")
        parallel.wait()
        if parallel.rank() == 0:
            (beside / "state.json").write_text(json.dumps(self.state | {"ranks": self.ranks}))
            commit(beside, final)
            for older in set(self.work.glob("state-*")) - {final}:
                shutil.rmtree(older)

    def _load(self) -> None:
        """Restore the newest whole state if there is one. ValueError when it was sharded over
        another number of processes.
        """
        parallel.wait()  # nobody reads before everybody has stopped writing
        newest = max(self.work.glob("state-*"), default=None)
        if newest is None:
            return
        self.state = json.loads((newest / "state.json").read_text())
        if (ranks := self.state.pop("ranks")) != self.ranks:
            now = parallel.world()
            raise ValueError(
                f"{newest} was saved by {ranks} sharded processes, this run has {now}; use as many,"
                " or delete it to start anew"
            )
        tensors = load_file(newest / f"tensors-{min(parallel.rank(), self.ranks - 1)}.safetensors")
        for name, p in self.trained.items():
            parallel.local(p).copy_(tensors[f"param/{name}"])
            if f"{MOMENTS[0]}/{name}" in tensors:
                moments = {
                    m: torch.zeros_like(p, dtype=torch.float32) for m in MOMENTS
                }  # placed, and sharded, like the parameter
                for m in MOMENTS:
                    parallel.local(moments[m]).copy_(tensors[f"{m}/{name}"])
                step = float(self.state["step"])
                on_device = not isinstance(
                    self.optimizer, StochasticAdamW
                )  # where torch's fused AdamW reads it
                self.optimizer.state[p] = {
                    **moments,
                    "step": torch.tensor(step, device=p.device) if on_device else step,
                }
            if f"best/{name}" in tensors:
                self.best[name] = tensors[f"best/{name}"].to(p.device)

    def step(
        self, batches: Callable[[int, int], list[Batch]], where: str, log: Callable[[str], None]
    ) -> dict[str, float]:
        """One optimizer step; its row of the curve."""
        plan, step, start = self.plan, self.state["step"], time.monotonic()
        torch.manual_seed(plan.seed * 1_000_003 + step)
        rate = learning_rate(
            step,
            plan.steps,
            plan.lr,
            round(plan.warmup_fraction * plan.steps),
            plan.schedule,
            plan.decay_fraction,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        while True:
            try:
                loss, count, norm = self._gradients(batches(step, self.state["micro"]), where)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error) or self.state["micro"] == 1 or parallel.world() > 1:
                    raise
                self.state["micro"] = max(1, self.state["micro"] // 2)
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # does nothing where no GPU is in use
            log(
                f"{where}: out of memory; going on with micro-batches of {self.state['micro']}"
                " sequences"
            )
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        clip = min(1.0, plan.grad_clip / (norm + 1e-6))
        torch._foreach_mul_(
            grads, clip * parallel.world() / count
        )  # the one division: from sums to means
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            raise (ResourceError(f"{where}: {NO_ROOM}") if is_memory(error) else error) from error
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - start
        return {
            "step": step,
            "loss": loss / count,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_sec": count / seconds,
            "seconds": seconds,
        }

    def _gradients(self, batches: list[Batch], where: str) -> tuple[float, float, float]:
        """(loss sum, labels, norm of the mean gradient) over all ranks; leaves gradients of the
        sum, divided by the ranks.
        """
        loss, count = 0.0, 0.0
        sums: dict[nn.Parameter, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            apart = (
                self.sums_fp32 and len(batches) > 1
            )  # added up here: in bf16, of 8 significant bits, autograd would lose small ones
            last = apart or number == len(batches)  # ranks exchange gradients in the last one only
            if self.sharded:
                self.module.set_requires_gradient_sync(last)
            with (
                self.module.no_sync() if self.plan.parallel == "ddp" and not last else nullcontext()
            ):
                loss_sum, labels = self.module(send_to_device(batch, self.device))
                loss_sum.backward()
            for p in self.trained.values() if apart else ():
                if p.grad is not None:
                    sums[p] = sums[p].add_(p.grad) if p in sums else p.grad.float()
                    p.grad = None
            loss += float(loss_sum.detach())
            count += int(labels)
        for p, gradient in sums.items():
            p.grad = gradient
        loss, count = parallel.total(loss, count)
        if count == 0:
            raise ValueError(
                f"{where}: the batch has no label to learn from; the answers are longer than"
                " data.seq_len or the data is empty"
            )
        norm_tensor = torch.nn.utils.get_total_norm(
            [p.grad for p in self.trained.values() if p.grad is not None]
        )
        norm = (
            float(norm_tensor.full_tensor() if hasattr(norm_tensor, "full_tensor") else norm_tensor)
            * parallel.world()
            / count
        )
        if not math.isfinite(loss) or not math.isfinite(norm):
            named = ((name, p.grad) for name, p in self.trained.items() if p.grad is not None)
            bad = next(
                (name for name, grad in named if not parallel.local(grad).isfinite().all()),
                "the loss",
            )
            raise FloatingPointError(
                f"{where}: {bad} is not finite (loss {loss / count}); lower the learning rate or"
                " use trainer.precision=fp32"
            )
        return loss, count, norm

    @torch.no_grad()
    def validate(self, loss_fn: LossFunction, batches: list[Batch]) -> float:
        """Measure the KL of the weights as they are; the best weights so far are kept."""
        self.module.eval()
        sums = [self.module(send_to_device(batch, self.device), loss_fn) for batch in batches]
        self.module.train()
        if self.sharded:
            # the outermost group stays gathered after a forward without a backward
            self.module.reshard()
        kl = parallel.share(
            sum(float(loss) for loss, _ in sums) / sum(int(count) for _, count in sums)
        )
        seconds = sum(row["seconds"] for row in self.state["curve"])
        tokens = sum(row["seconds"] * row["tokens_per_sec"] for row in self.state["curve"])
        self.state["measured"].append(
            {
                "step": self.state["step"],
                "tokens": round(tokens),
                "seconds": seconds,
                "validation_kl": kl,
            }
        )
        if kl < self.state["best_kl"]:
            self.state |= {"best_kl": kl, "best_step": self.state["step"]}
            self.best = {name: parallel.local(p).clone() for name, p in self.trained.items()}
        return kl

    def finish(self) -> None:
        """Leave the best weights, whole, in the model. Ranks but the first end here."""
        for name, p in self.best.items():
            parallel.local(self.trained[name]).copy_(p)
        if self.sharded:
            parallel.unshard(self.plain)
        self.model.eval()
        if self.plan.activation_checkpointing:
            self.model.gradient_checkpointing_disable()  # type: ignore[operator]
        if parallel.rank() > 0:
            raise parallel.Followed


def train(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Callable[[int, int], list[Batch]],
    plan: Plan,
    *,
    work: Path,
    label: str,
    log: Callable[[str], None],
    validation: tuple[LossFunction, list[Batch]] | None = None,
) -> Result:
    """Train the parameters of `model` that require gradients, in place, resuming from `work` if it
    holds a state.

    `batches(step, micro)` gives this rank's micro-batches; `loss_fn(model, batch)` a loss sum and
    its label count; `validation` the loss and batches that `plan.validations` measure.
    FloatingPointError, naming step and tensor, when the loss or a gradient is not finite.
    Interrupted after a signal. parallel.Followed on every rank but the first.
    """
    trainer = Trainer(model, loss_fn, plan, work)
    state, saved_at = trainer.state, time.monotonic()
    if state["step"]:
        log(f"{label}: resuming at step {state['step']} of {plan.steps}")
    trainer.module.train()
    due = (
        {round(i * plan.steps / plan.validations) for i in range(plan.validations + 1)}
        if plan.validations and validation
        else set()
    )
    with _delayed_signals() as caught, progress(label, plan.steps, state["step"], log) as shown:
        while True:
            step = state["step"]
            if (
                step in due
                and validation
                and step not in [row["step"] for row in state["measured"]]
            ):
                log(f"{label}: step {step}, validation KL {trainer.validate(*validation):.4f}")
            since_best = sum(row["step"] > state["best_step"] for row in state["measured"])
            if step == plan.steps or 0 < plan.patience <= since_best:
                break
            row = trainer.step(batches, f"{label}, step {step}", log)
            state["step"] = step + 1
            state["curve"].append(row)
            shown(step + 1, row["loss"], row["tokens_per_sec"])
            stop, late = parallel.total(
                caught[0] if caught else 0,
                parallel.rank() == 0 and time.monotonic() - saved_at > SAVE_SECONDS,
            )
            if stop or (late and step + 1 < plan.steps):
                trainer.save()
                saved_at = time.monotonic()
            if stop:
                log(
                    f"{label}: state saved after step {step + 1} of {plan.steps}; repeat the"
                    " command to go on"
                )
                raise Interrupted(caught[0] if caught else signal.SIGTERM)
    if caught:  # behind the last step
        raise Interrupted(caught[0])
    trainer.finish()
    outcome = (
        {
            "validation_kl_first_nats": state["measured"][0]["validation_kl"],
            "validation_kl_best_nats": state["best_kl"],
            "best_step_index": state["best_step"],
            "paid_flag": float(state["best_step"] > 0),
        }
        if state["measured"]
        else {}
    )
    return Result(state["curve"], state["measured"], outcome)
