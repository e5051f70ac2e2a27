"""The one training loop: distillation, LoRA and quantization-aware training
all run through `train`.

Each step accumulates the gradient of a loss *sum* over its micro-batches (and, with several
processes, over their rows), then divides once by the number of labels, clips to a global norm and
takes one optimizer step. When memory runs out, the micro-batch is halved and the step taken again.

Ctrl-C and SIGTERM finish the step, save the state and stop; besides it is saved by a thread, as
often as that takes a twentieth of the time (`state.py`). So the same command goes on and, on a CPU,
ends in the same bytes: batches and random numbers are pure functions of the step, tensors lie in
safetensors and the rest in JSON. (GPUs add up gradients of embeddings and attention in any order:
there last bits may differ.) Another number of processes goes on from the same state, with the same
rows in the same order: its sums differ by rounding.

With validation, the KL on rows that are never trained on is measured at regular steps, the first
one before any; training returns the best weights, and `patience` measurements without a better one
end it. A stage whose best step is 0 did not pay.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from compress.errors import Interrupted
from compress.train import parallel
from compress.train.plan import Batch, LossFunction, Plan, Result
from compress.train.progress import progress
from compress.train.trainer import Trainer


@contextmanager
def _delayed_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM instead of dying of it; a second one kills at once."""
    caught: list[int] = []
    with ExitStack() as old_handlers:

        def catch(signum: int, frame: Any) -> None:
            caught.append(signum)
            old_handlers.close()

        # The main thread alone may set handlers; elsewhere signals end the process as usual.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                old_handlers.callback(signal.signal, number, signal.signal(number, catch))
        yield caught


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
    state = trainer.state
    if state["step"]:
        log(f"{label}: resuming at step {state['step']} of {plan.steps}")
    trainer.module.train()
    due = _steps_to_measure(plan) if validation else set()

    with (
        _delayed_signals() as caught,
        closing(trainer.saver),
        progress(label, plan.steps, state["step"], log) as shown,
    ):
        while True:
            # The validation KL, never twice at one step.
            step = state["step"]
            measured_steps = [row["step"] for row in state["measured"]]
            if validation and step in due and step not in measured_steps:
                log(f"{label}: step {step}, validation KL {trainer.validate(*validation):.4f}")

            # The end: all steps, or no better weights for too long.
            since_best = trainer.measured_since_best()
            if step == plan.steps or 0 < plan.patience <= since_best:
                break

            row = trainer.step(batches, f"{label}, step {step}", log)
            state["step"] = step + 1
            state["curve"].append(row)
            shown(step + 1, row["loss"], row["tokens_per_sec"])

            # Ranks stop and save together, whichever was signalled.
            stop, late = parallel.total(
                caught[0] if caught else 0,
                parallel.rank() == 0 and trainer.saver.due,
            )
            trainer.saver.check()
            if stop or (late and step + 1 < plan.steps):
                trainer.save()
            if stop:
                trainer.saver.wait()
                log(
                    f"{label}: state saved after step {step + 1} of {plan.steps}; repeat the"
                    " command to go on"
                )
                raise Interrupted(caught[0] if caught else signal.SIGTERM)

    # A signal behind the last step.
    if caught:
        raise Interrupted(caught[0])
    trainer.finish()
    return Result(state["curve"], state["measured"], _outcome(state))


def _steps_to_measure(plan: Plan) -> set[int]:
    """Steps before which the validation KL is measured: the first, the last, and evenly between."""
    if not plan.validations:
        return set()
    return {round(i * plan.steps / plan.validations) for i in range(plan.validations + 1)}


def _outcome(state: dict[str, Any]) -> dict[str, float]:
    """The figures of the best step; none where nothing was measured."""
    if not state["measured"]:
        return {}
    return {
        "validation_kl_first_nats": state["measured"][0]["validation_kl"],
        "validation_kl_best_nats": state["best_kl"],
        "best_step_index": state["best_step"],
        "paid_flag": float(state["best_step"] > 0),
    }
