"""One process of a distributed training on the tiny teacher, for `train/test_parallel.py`: `python
one_rank.py KIND FOLDER STEPS STOP`.

KIND is none, ddp or fsdp2, and behind it "-online", "-rollouts", "-bf16" or "-bf16_stochastic";
"-midsave", to be killed while the second state gets its name;
"-round", "-learned" or "-lowrank" for training on the grid q4_0, by SGD where "-sgd" is said too.
Rank 0 writes curve.json and final.safetensors, with codes behind a grid, into FOLDER; without
shards the others leave their own rank<i>.safetensors. With STOP >= 0, the last rank kills itself
there, by SIGKILL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from conftest import make_context
from safetensors.torch import save_file

from compress.distill.batches import make_batches, make_loss
from compress.distill.losses import Mix
from compress.distill.online import OnlineTeacher, with_rollouts
from compress.distill.schemes import Scheme
from compress.distill.signals import Signals
from compress.models.checkpoint import load_model
from compress.quant.fake import attach, finish
from compress.train import parallel, state
from compress.train.loop import train
from compress.train.plan import Plan
from compress.train.state import Saver


def killed_at_the_second(commit):
    """`commit`, in whose second call the process dies."""
    calls = []

    def dying(*arguments):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(*arguments)

    return dying


def main(kind: str, folder: Path, steps: int, stop: int) -> None:
    if "midsave" in kind:
        state.commit = killed_at_the_second(state.commit)
    if stop >= 0:  # with a kill ahead, save after every step
        Saver.due = property(lambda saver: True)
    own = folder / str(parallel.rank())
    own.mkdir(parents=True, exist_ok=True)
    context = make_context(folder / "teacher", own)
    data = context.text()
    kind, *options = kind.split("-")
    signals = Signals(
        folder / "signals", context.teacher, data, Scheme(), seed=0, precision="fp32", log=print
    )
    signals.make(64)
    parallel.wait()
    source = (
        OnlineTeacher(load_model(context.teacher), data, sharded=kind == "fsdp2")
        if {"online", "rollouts"} & set(options)
        else signals
    )
    model = load_model(context.teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    on_grid = {"round", "learned", "lowrank"} & set(options)
    if on_grid:
        scales = "learned" if "learned" in options else "round"
        attach(model, "q4_0", scales, rank=4 if "lowrank" in options else 0)
    if "sgd" in options:
        torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=300 * lr)
    batches = make_batches(data, source, seed=5, sequences=64, batch=8)
    if "rollouts" in options:
        batches = with_rollouts(
            batches, model, source, share=1.0, prompt_tokens=8, ends=[0], seed=0
        )
    sharded, types = [], set()
    plain_loss = make_loss(Mix(1.0, 0.1), source.teacher_head)

    def loss(model, batch):
        types.update(
            str(batch[name].dtype)
            for name in ("probs", "entropy", "teacher_hidden")
            if name in batch
        )
        return plain_loss(model, batch)

    def watched(step, micro):
        if step == stop and parallel.rank() == parallel.world() - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        sharded.append(sum(type(p).__name__ == "DTensor" for p in model.parameters()))
        return batches(step, micro)

    precision = next((option for option in options if option.startswith("bf16")), "fp32")
    plan = Plan(steps, lr=1e-3, micro=2, parallel=kind, precision=precision, validations=2)
    held = (make_loss(Mix()), [data.batch([60]) | signals.read([60])])
    try:
        result = train(
            model,
            loss,
            watched,
            plan,
            work=folder / "work",
            label="test",
            log=print,
            validation=held,
        )
    except parallel.Followed:
        if kind == "ddp":
            mine = {name: p.detach().contiguous() for name, p in model.named_parameters()}
            save_file(mine, folder / f"rank{parallel.rank()}.safetensors")
        return
    made = finish(model) if on_grid else {}
    codes = {f"{name}.codes": q.codes for name, q in made.items()}
    scales = {f"{name}.scales": q.scales for name, q in made.items()}
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights | codes | scales, folder / "final.safetensors")
    about = {
        "curve": result.curve,
        "types": sorted(types),
        "sharded": sharded[0],
        "parameters": len(list(model.parameters())),
        "validation": result.outcome,
    }
    (folder / "curve.json").write_text(json.dumps(about))


if __name__ == "__main__":
    with (
        parallel.group() if "RANK" in os.environ else nullcontext()
    ):  # left as compress leaves it: a group still open may abort the exit
        main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
