"""Milliseconds a token, time to the first one and memory of a shape in the runtime that ships,
predicted from files of a few shapes that were timed there.

    figure = a + blocks (b + c kv_heads + d ffn) + e ids

Each term is what a part of the network costs: a the call itself, b what every block has (norms,
barriers between threads), c its attention, whose query heads go with their key-value heads, d its
FFN, e the head. The coefficients are those that no part of a machine can have below zero: least
squares of relative errors with non-negative coefficients (Lawson and Hanson's NNLS). Weights are
random, since dense kernels take the same time for any; all files are opened and timed one after the
other, half a second each, round by round in alternating order (`score/latency.py`). A machine that
is 20% slower for a minute is so for whole rounds: each is divided by its own geometric mean, and
the median over rounds counts. Shapes that were not fitted say how far off it is. Left out: a model
that fits the cache is faster than is said here, by a fifth on a machine with 32 MB of it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from compress import machine
from compress.errors import ResourceError
from compress.keys import OF_RUNTIME, versions_of
from compress.score.latency import Timing, measure, measure_in_turn
from compress.search.kept import Kept
from compress.search.shapes import Family, Levels, Shape
from compress.search.sizes import Skeletons
from compress.store import sha256_json

Figures = dict[str, float]
# What a timing gives and a line of five terms can say; tok_per_sec is 1000 / token_ms.
TIMES = ("latency_ms_p50", "token_ms", "ttft_ms_p50")
PREDICTED = (*TIMES, "peak_rss_bytes")
TERMS = ("call", "block", "attention", "ffn", "head")
USABLE_ERROR = 0.5  # beyond it times tell nothing of shapes
TILE_ROWS = 64  # of random weights, over and over: nobody computes with more than a look at them
RUNTIME = "llama.cpp"
LEAST_ROUNDS, LONGEST_SECONDS = 3, 180.0  # of timing


def terms(shape: Shape) -> np.ndarray:
    """What each coefficient of TERMS is multiplied with."""
    blocks = shape.blocks
    return np.array([1, blocks, blocks * shape.kv_heads, blocks * shape.ffn, shape.ids], float)


@dataclass(frozen=True)
class SpeedModel:
    """Coefficients of TERMS by figure, and the relative errors on shapes that were not fitted."""

    coefficients: dict[str, list[float]]
    errors: dict[str, list[float]]

    def predict(self, shape: Shape) -> Figures:
        """latency_ms_p50, ttft_ms_p50, tok_per_sec and peak_rss_bytes of a shape."""
        row = terms(shape)
        figures = {
            name: float(row @ np.array(values)) for name, values in self.coefficients.items()
        }
        figures["tok_per_sec"] = 1000 / figures.pop("token_ms")
        return figures

    def error_p95(self, figure: str = "latency_ms_p50") -> float:
        """The relative error that 95% of unfitted shapes stay below."""
        name = "token_ms" if figure == "tok_per_sec" else figure
        return float(np.quantile(self.errors[name], 0.95))


def fitted(times: Mapping[Shape, Figures], checks: Mapping[Shape, Figures]) -> SpeedModel:
    """The model of measured `times`, and its errors on `checks`. ValueError for fewer shapes than
    terms that differ, or times that are none; ResourceError for an error beyond USABLE_ERROR.
    """
    from scipy.optimize import nnls

    rows = np.array([terms(shape) for shape in times])
    needed = np.linalg.matrix_rank(rows / rows.max(0)) if len(rows) else 1
    records = [*times.values(), *checks.values()]
    values = [figures[name] for figures in records for name in PREDICTED]
    if len(times) <= needed or not all(np.isfinite(value) and value > 0 for value in values):
        raise ValueError(
            f"{len(times)} shapes with times {values[:4]} ... can't tell {needed} coefficients:"
            f" needed are finite times above 0 of at least {needed + 1} different shapes"
        )

    # Each row divided by its time: relative errors count. Columns of one size, for the solver.
    coefficients = {}
    scale = rows.max(0)
    for name in PREDICTED:
        measured = np.array([figures[name] for figures in times.values()])
        solution, _ = nnls(rows / scale / measured[:, None], np.ones(len(rows)))
        coefficients[name] = (solution / scale).tolist()

    errors = {
        name: [
            abs(float(terms(shape) @ np.array(coefficients[name])) / figures[name] - 1)
            for shape, figures in checks.items()
        ]
        for name in PREDICTED
    }
    model = SpeedModel(coefficients, errors)
    worst = model.error_p95()
    if worst > USABLE_ERROR:
        raise ResourceError(
            f"times of unfitted shapes are {100 * worst:.0f}% off what was predicted: this machine"
            " is too busy, or its clock too unsteady, to time anything; repeat when it is quiet, or"
            " leave times out with --no-speed"
        )
    return model


def design(levels: Levels, checks: int, seed: int = 0) -> tuple[list[Shape], list[Shape]]:
    """Shapes to fit, half of the corners of the levels (a fractional factorial: every structure is
    low as often as high beside each other one) with their middle, and random ones to check. The
    corner where all is low is left out: its weights may lie in the cache.
    """
    corners = [
        Shape(*(row[0] if high else row[-1] for row, high in zip(levels, signs, strict=True)))
        for signs in product((True, False), repeat=len(levels))
        if sum(signs) % 2 == 0 and any(signs)
    ]
    middle = Shape(*(row[len(row) // 2] for row in levels))
    fit = list(dict.fromkeys([levels.full, *corners, middle]))

    # Corners alone are too few where a structure has one level.
    others = [shape for shape in levels.shapes() if shape not in set(fit)]
    Random(seed).shuffle(others)
    lacking = max(0, len(TERMS) + 2 - len(fit))
    return fit + others[:lacking], others[lacking : lacking + checks]


class Bench:
    """Files of random weights in the shapes of a family, and their times."""

    def __init__(self, family: Family, skeletons: Skeletons, kept: Kept, folder: Path) -> None:
        """`kept`: times by shape and round; `folder`: where files are written and removed again."""
        self.family = family
        self.skeletons = skeletons
        self.kept = kept
        self.folder = folder

    def times(
        self, shapes: Sequence[Shape], timing: Timing, rounds: int, log: Callable[[str], None]
    ) -> dict[Shape, Figures]:
        """The figures of PREDICTED of each shape: memory of a fresh process, times over `rounds`.

        Of slow models these are as many as LONGEST_SECONDS hold, but LEAST_ROUNDS. What is kept is
        not measured again.
        """
        once = replace(timing, processes=1, prompt_lengths=(), batch_sizes=(), context_lengths=())
        for done, shape in enumerate(shapes, 1):
            if _memory(shape) not in self.kept:
                memory = partial(_peak_bytes, self._file(shape), replace(once, repeats=1))
                self.kept.get(_memory(shape), memory)
                log(f"memory of shapes {done}/{len(shapes)}")

        # Every second round backwards, so that nobody is always the first.
        seconds = 0.0
        records: list[list[Figures]] = []
        for number in range(rounds):
            if number >= LEAST_ROUNDS and seconds * (1 + 1 / number) > LONGEST_SECONDS:
                break
            turn = [*shapes] if number % 2 == 0 else [*reversed(shapes)]
            record = self.kept.get(_round(turn, number), partial(self._round, turn, once))
            records.append(record["times"] if number % 2 == 0 else record["times"][::-1])
            seconds += record["seconds"]
            seconds_left = seconds / (number + 1) * (rounds - number - 1)
            log(f"timing shapes, round {number + 1}/{rounds}, {seconds_left:.0f} s left")

        # By shape, with what drifts taken out.
        shutil.rmtree(self.folder, ignore_errors=True)
        times = steady(records)
        return {
            shape: figures | {"peak_rss_bytes": self.kept[_memory(shape)]}
            for shape, figures in zip(shapes, times, strict=True)
        }

    def _round(self, shapes: Sequence[Shape], timing: Timing) -> dict[str, Any]:
        """Times of all shapes, one after the other, and the seconds that this took."""
        files = [self._file(shape) for shape in shapes]
        start = time.monotonic()
        times = [
            {"token_ms": 1000 / s["tok_per_sec"]} | {name: s[name] for name in TIMES if name in s}
            for s in measure_in_turn(files, RUNTIME, timing)
        ]
        return {"seconds": time.monotonic() - start, "times": times}

    def _file(self, shape: Shape) -> Path:
        """A GGUF of random weights in a shape."""
        from compress.formats.gguf import export_gguf

        grid = self.family.grid.grid.value.upper()
        file = self.folder / f"{'-'.join(map(str, shape))}.gguf"
        if not file.is_file():
            checkpoint = self.folder / "checkpoint"
            config = self.family.config_of(shape)
            assert config is not None, f"{shape} can't be made"
            random_checkpoint(config, self.skeletons.of(shape.ids), checkpoint)
            export_gguf(checkpoint, file, grid)
            shutil.rmtree(checkpoint)
        return file


def steady(rounds: Sequence[Sequence[Figures]]) -> list[Figures]:
    """The times of each shape, from rounds of times of all shapes: the median over rounds of its
    share of the round's geometric mean, times the median of these means.
    """
    figures: list[Figures] = [{} for _ in rounds[0]]
    for name in TIMES:
        logs_RS = np.log([[record[name] for record in shapes] for shapes in rounds])
        means_R1 = logs_RS.mean(1, keepdims=True)
        times_S = np.exp(np.median(logs_RS - means_R1, 0) + np.median(means_R1))
        for record, value in zip(figures, times_S, strict=True):
            record[name] = float(value)
    return figures


def _memory(shape: Shape) -> str:
    """The name under which a shape's memory is kept."""
    return f"{'-'.join(map(str, shape))} memory"


def _round(shapes: Iterable[Shape], number: int) -> str:
    """The name under which a round of shapes is kept."""
    return f"round {number} of {sha256_json([*shapes])[:16]}"


def _peak_bytes(file: Path, timing: Timing) -> float:
    return float(measure(file, RUNTIME, timing)["scores"]["peak_rss_bytes"])


def random_checkpoint(config: dict[str, Any], skeleton: Path, out: Path) -> None:
    """Write a checkpoint of an HF config with random weights and the tokenizer of a skeleton."""
    import torch
    from safetensors.torch import save_file

    from compress.models.checkpoint import WEIGHTS, copy_beside
    from compress.models.model_config import meta_model

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, parameter in meta_model(config).named_parameters():
        rows, *rest = parameter.shape
        tile = 0.05 * torch.randn(min(rows, TILE_ROWS), *rest, generator=generator)
        copies = -(-rows // len(tile))
        tensors[name] = tile.repeat(copies, *(1 for _ in rest))[:rows].bfloat16().contiguous()

    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    copy_beside(skeleton, out)
    (out / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))


def settings_of(family: Family, timing: Timing) -> dict[str, Any]:
    """What times depend on besides the shape: machine, runtime, family of models, grid, how they
    are taken.
    """
    sizes = ("vocab_size", "num_hidden_layers", "intermediate_size")
    heads = ("num_attention_heads", "num_key_value_heads")
    config = {
        key: value
        for key, value in family.config.items()
        if key not in (*sizes, *heads) and not key.endswith("token_id") and "layer" not in key
    }

    return {
        "kind": "speed",
        "machine": machine.describe(timing.threads),
        "versions": versions_of(*OF_RUNTIME[RUNTIME]),
        "config": config,
        "heads_a_group": family.config[heads[0]] // family.config[heads[1]],
        "grid": family.grid.grid.value,
        "timing": asdict(timing),
        "schema": 2,
    }
