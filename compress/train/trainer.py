"""One step of training: its gradients, summed over micro-batches and processes, its update, and
what is measured between steps (`loop.py` says in which order).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from compress.errors import ResourceError, is_memory
from compress.models.checkpoint import best_device
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.empty import places_of
from compress.train import parallel
from compress.train.optimizer import BETAS, StochasticAdamW, learning_rate, to_bf16
from compress.train.plan import Batch, LossFunction, Plan
from compress.train.state import Saver, parts_of, restore_state

NO_ROOM = (
    "weights, gradients and AdamW's moments have no room; what takes less is"
    " trainer.precision=bf16_stochastic (12 bytes a weight instead of 16), trainer=fsdp2 (each GPU"
    " its share), a lora stage or qat with rank=N (most weights frozen), or a smaller student"
)


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


class Trainer:
    """The model wrapped for its devices, its optimizer, and the state that a resumed run needs."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, plan: Plan, work: Path) -> None:
        self.plan, self.model, self.work = plan, model, work
        self.device = best_device()
        self.sharded = plan.parallel == "fsdp2"
        self.carried: Any = None  # what carries rounded rows (`quant/shards.py`)

        # The model as it computes here.
        if plan.precision == "bf16_stochastic":
            to_bf16(model)
        use_cpu_kernels(model)
        if plan.activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]

        # With its loss, by itself and as the devices share it.
        autocast = plan.precision == "bf16" and not self.sharded
        self.plain = LossModule(model, loss_fn, autocast)
        parallel.to_device(self.plain, self.device)
        names = {name for name, p in self.plain.named_parameters() if p.requires_grad}
        self.module: Any = self.plain
        if self.sharded:
            self._shard()
        elif plan.parallel == "ddp":
            # Gradients are views of what ranks exchange, not copies.
            self.module = DistributedDataParallel(self.plain, gradient_as_bucket_view=True)

        # What is trained, and by which optimizer; bf16 weights take fp32 gradients.
        masters: dict[Tensor, nn.Parameter] = self.carried.masters if self.carried else {}
        parameters_by_name = self.plain.named_parameters()
        self.trained = {name: masters.get(p, p) for name, p in parameters_by_name if name in names}
        parameters = list(self.trained.values())
        self.sums_fp32 = any(p.dtype == torch.bfloat16 for p in parameters)
        if self.sums_fp32:
            for p in parameters:
                p.grad_dtype = None
        self.optimizer = self._optimizer(parameters)

        # Without shards every rank's state is the same, and one saves it.
        self.saver = Saver(work, parallel.world() if self.sharded else 1)
        self.state: dict[str, Any] = {
            "step": 0,
            "curve": [],
            "measured": [],
            "micro": plan.micro,
            "best_step": -1,
            "best_kl": math.inf,
        }
        self.best: dict[str, Tensor] = {}  # on the host: nothing computes with them
        restored = restore_state(work, self.trained, self.optimizer)
        if restored is not None:
            self.state, best = restored
            self.best = {name: p.cpu() for name, p in best.items()}

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Ours where weights are bf16 or moments are kept otherwise than in fp32 beside them."""
        plan = self.plan
        if self.sums_fp32 or plan.moments != "fp32":
            return StochasticAdamW(parameters, plan.lr, plan.moments)
        return torch.optim.AdamW(parameters, lr=plan.lr, betas=BETAS, weight_decay=0.0, fused=True)

    def _shard(self) -> None:
        """Spread the model over the processes; an empty one is read in shards, and what is
        fake-quantized rounds in rows.
        """
        attached = getattr(self.model, "fake_quant", None)
        ignored = attached.prepare() if attached else None
        places = places_of(self.plain)
        self.module = parallel.shard(self.plain, self.model, self.plan.precision, ignored)
        parallel.fill(self.plain, places, self.device)
        if attached:
            self.carried = attached.spread()
            self.module.register_forward_pre_hook(self.carried.refresh, prepend=True)

    def save(self) -> None:
        """Begin to write the state. All ranks call it."""
        self.saver.begin(self.state, parts_of(self.best, self.trained, self.optimizer))

    def step(
        self, batches: Callable[[int, int], list[Batch]], where: str, log: Callable[[str], None]
    ) -> dict[str, float]:
        """One optimizer step; its row of the curve."""
        plan, step = self.plan, self.state["step"]
        begun = time.monotonic()

        # Random numbers and the learning rate are functions of the step alone.
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

        # The one division, from sums to means, with the clipping in the same factor.
        loss, count, norm = self._gradients_that_fit(batches, where, log)
        grads = [p.grad for p in self.trained.values() if p.grad is not None]
        clip = min(1.0, plan.grad_clip / (norm + 1e-6))
        torch._foreach_mul_(grads, clip * parallel.world() / count)

        self._update(where)
        seconds = time.monotonic() - begun
        return {
            "step": step,
            "loss": loss / count,
            "lr": rate,
            "grad_norm": norm,
            "tokens_per_sec": count / seconds,
            "seconds": seconds,
        }

    def _gradients_that_fit(
        self, batches: Callable[[int, int], list[Batch]], where: str, log: Callable[[str], None]
    ) -> tuple[float, float, float]:
        """`_gradients`, the micro-batch halved until memory is enough, and so for all steps behind.
        Of several ranks one alone must not do another number of passes: there the error stands.
        """
        while True:
            try:
                return self._gradients(batches(self.state["step"], self.state["micro"]), where)
            except (RuntimeError, MemoryError) as error:
                if not is_memory(error) or self.state["micro"] == 1 or parallel.world() > 1:
                    raise
                self.state["micro"] = max(1, self.state["micro"] // 2)

            # Behind the error, which holds on to the tensors of the pass that failed.
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()  # does nothing where no GPU is in use
            log(
                f"{where}: out of memory; going on with micro-batches of {self.state['micro']}"
                " sequences"
            )

    def _update(self, where: str) -> None:
        """The optimizer's step on the gradients that are there, and no gradients behind it.
        ResourceError when the moments, made at the first one, have no room.
        """
        try:
            self.optimizer.step()
        except (RuntimeError, MemoryError) as error:
            if is_memory(error):
                raise ResourceError(f"{where}: {NO_ROOM}") from error
            raise
        self.optimizer.zero_grad(set_to_none=True)

    def _gradients(self, batches: list[Batch], where: str) -> tuple[float, float, float]:
        """(loss sum, labels, norm of the mean gradient) over all ranks; leaves gradients of the
        sum, divided by the ranks. ValueError without a label; FloatingPointError when the loss or
        a gradient is not finite.
        """
        loss, count = parallel.total(*self._backward(batches))
        if count == 0:
            raise ValueError(
                f"{where}: the batch has no label to learn from; the answers are longer than"
                " data.seq_len or the data is empty"
            )

        # Of shards the norm is a tensor that is spread itself.
        norm_tensor = torch.nn.utils.get_total_norm(
            [p.grad for p in self.trained.values() if p.grad is not None]
        )
        norm = (
            float(norm_tensor.full_tensor() if hasattr(norm_tensor, "full_tensor") else norm_tensor)
            * parallel.world()
            / count
        )

        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(
                f"{where}: {self._not_finite()} is not finite (loss {loss / count}); lower the"
                " learning rate or use trainer.precision=fp32"
            )
        return loss, count, norm

    def _backward(self, batches: list[Batch]) -> tuple[float, float]:
        """Loss sum and labels of this rank's micro-batches; their gradients' sum is left in the
        parameters.
        """
        # In bf16, of 8 significant bits, autograd would lose small gradients as it adds them up:
        # here they are added in fp32.
        apart = self.sums_fp32 and len(batches) > 1
        sums: dict[nn.Parameter, Tensor] = {}
        loss, count = 0.0, 0.0
        for number, batch in enumerate(batches, 1):
            # Ranks exchange gradients in the last pass only, unless each pass is added up apart.
            last = apart or number == len(batches)
            if self.sharded:
                self.module.set_requires_gradient_sync(last)
            with (
                self.module.no_sync() if self.plan.parallel == "ddp" and not last else nullcontext()
            ):
                loss_sum, labels = self.module(send_to_device(batch, self.device))
                loss_sum.backward()

            if apart:
                self._add_up(sums)
            loss += float(loss_sum.detach())
            count += int(labels)

        for p, gradient in sums.items():
            p.grad = gradient
        return loss, count

    def _add_up(self, sums: dict[nn.Parameter, Tensor]) -> None:
        """Move the gradients of the last pass to `sums`, in fp32: they may lie in buckets."""
        for p in self.trained.values():
            if p.grad is None:
                continue
            if p in sums:
                sums[p].add_(p.grad)
            else:
                sums[p] = p.grad.to(torch.float32, copy=True)
            p.grad = None

    def _not_finite(self) -> str:
        """Name of the first tensor whose gradient is not finite, else "the loss"."""
        for name, p in self.trained.items():
            if p.grad is not None and not parallel.local(p.grad).isfinite().all():
                return name
        return "the loss"

    @torch.no_grad()
    def validate(self, loss_fn: LossFunction, batches: list[Batch]) -> float:
        """Measure the KL of the weights as they are; the best weights so far are kept."""
        self.module.eval()
        sums = [self.module(send_to_device(batch, self.device), loss_fn) for batch in batches]
        self.module.train()
        if self.sharded:
            # The outermost group stays gathered after a forward without a backward.
            self.module.reshard()
        kl = parallel.share(
            sum(float(loss) for loss, _ in sums) / sum(int(count) for _, count in sums)
        )

        # What it took to get here: time and tokens of all steps before.
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
            self.best = {
                name: parallel.local(p).to("cpu", copy=True) for name, p in self.trained.items()
            }
        return kl

    def measured_since_best(self) -> int:
        """Measurements after the best one."""
        return sum(row["step"] > self.state["best_step"] for row in self.state["measured"])

    def finish(self) -> None:
        """Leave the best weights in the model, whole on the first rank, where the others end."""
        for name, p in self.best.items():
            parallel.local(self.trained[name]).copy_(p)
        if self.carried:
            self.carried.gather()
        if self.sharded:
            parallel.unshard(self.plain, self.work / "whole")
        self.model.eval()
        if self.plan.activation_checkpointing:
            self.model.gradient_checkpointing_disable()  # type: ignore[operator]
        if parallel.rank() > 0:
            raise parallel.Followed
