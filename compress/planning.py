"""`--plan`: what a recipe will cost in time, disk and memory, before anything starts; and the disk
check before every run.

Times come from operation counts, 2 P flops a token forward and 6 P for a training step (P
parameters; Kaplan et al., arXiv 2001.08361, table 1), over the matrix-product rate measured on this
machine just now. They are estimates: scoring dominates small runs.
"""

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Column, Table
from torch.utils.benchmark import Timer

from compress import formats
from compress.errors import ResourceError
from compress.models.model_config import meta_model
from compress.session import Session

# assumed share of the square matrix product's rate that a whole training step reaches; on the
# cautious side
EFFICIENCY = 0.5
TASK_TOKENS = 16_000  # about the tokens of the embedded tasks
# to ask a quarter of the open prompts, on two cores and 135M parameters: 14.5 in torch, 26 for all
# in llama.cpp
ANSWER_SECONDS = 15.0


class Cost(NamedTuple):
    """One slot's estimate."""

    slot: str
    technique: str
    params: int
    seconds: float
    disk_bytes: int
    memory_bytes: int


def params_of(config: dict[str, Any]) -> int:
    """Parameters of a HF config, counted on the meta device."""
    return meta_model(config).num_parameters()


def matmul_flops_per_sec(n: int = 1024, seconds: float = 0.5) -> float:
    """Measured bf16 rate of an n x n x n product."""
    timer = Timer(
        "a @ a", globals={"a": torch.randn(n, n).bfloat16()}, num_threads=torch.get_num_threads()
    )
    return 2 * n**3 / timer.blocked_autorange(min_run_time=seconds).mean


def estimate(session: Session, shapes: dict[str, dict[str, Any]], rate: float) -> list[Cost]:
    """A cost for every slot, in order."""
    recipe, rate = session.recipe, rate * EFFICIENCY
    e, seq_len = recipe.eval, recipe.data.seq_len
    sizes = {slot: params_of(config) for slot, config in shapes.items()}
    score_tokens = TASK_TOKENS * bool(e.tasks) + e.heldout_sequences * seq_len * len(
        recipe.data.heldout
    )
    whole = sizes["teacher"]
    costs = [
        Cost(
            "teacher",
            "teacher",
            whole,
            2 * whole * score_tokens * 3 / rate + 10,
            4 * whole,
            5 * whole,
        )
    ]
    for slot, parent in recipe.steps():
        stage, params = recipe.stages[slot], sizes[slot]
        tokens = getattr(stage, "tokens", 0)
        batch_tokens = getattr(stage, "micro_batch_sequences", 1) * seq_len
        teacher = {"distill": whole, "qat": sizes[parent]}.get(recipe.technique(slot), 0)
        calibration = (
            getattr(stage, "calibration_sequences", 0)
            * seq_len
            * max(1, getattr(stage, "blocks", 1))
            * getattr(stage, "passes", 1)
        )
        work = 6 * params * tokens + 2 * teacher * tokens + 2 * sizes[parent] * calibration
        scoring = (
            2 * params * score_tokens * 3 / rate
            + 10
            + ANSWER_SECONDS * bool(e.open_prompts) * params / 135e6
        )
        memory = (16 if tokens else 8) * params + batch_tokens * shapes[slot][
            "num_hidden_layers"
        ] * shapes[slot]["hidden_size"] * 34 * bool(tokens)
        weight_bytes = (4 if recipe.technique(slot) in ("ptq", "qat") else 2) + 12 * bool(tokens)
        disk = weight_bytes * params + _signal_bytes_per_token(stage, shapes["teacher"]) * tokens
        costs.append(
            Cost(
                slot, recipe.technique(slot), params, work / rate + scoring, int(disk), int(memory)
            )
        )
    shipped = sizes[recipe.shipped_slot()]
    for name in recipe.export.files:
        disk = int(
            formats.parse(name)[2].bits_per_weight / 4 * shipped
        )  # in the store and in the bundle
        costs.append(Cost(*formats.slot_of(name), shipped, 40.0, disk, 4 * shipped))
    return costs


def _signal_bytes_per_token(stage: Any, teacher: dict[str, Any]) -> float:
    """What the schemes in `distill/signals.py` take; `sampled` depends on the text: 27 to 30
    measured at threshold 0.05. 0 without kept signals.
    """
    signal = getattr(stage, "signal", None)
    if signal is None:
        return 0.0
    ids = 3 if teacher["vocab_size"] > 1 << 16 else 2
    return {
        "sampled": 6 + (2 + ids) * 0.5 / signal.threshold,
        "hidden": 1.04 * teacher["hidden_size"],
        "online": 0.0,
    }[signal.scheme.value]


def amount(size: int) -> str:
    """Bytes in the unit that leaves digits to compare."""
    unit, name = next(
        (one for one in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= one[0]), (1, "bytes")
    )
    return f"{size / unit:.1f} {name}" if unit > 1 else f"{size} {name}"


def check_disk(session: Session, costs: list[Cost]) -> None:
    """ResourceError when the store's disk has less free space than the recipe may need."""
    needed, free = (
        sum(cost.disk_bytes for cost in costs),
        shutil.disk_usage(session.store.root).free,
    )
    if needed > free:
        raise ResourceError(
            f"the recipe may need {amount(needed)} in {session.store.root}, {amount(free)} are"
            " free; free some (`compress gc`) or set store=DIR"
        )


def print_plan(costs: list[Cost], store: Path) -> None:
    """The plan as a table on stdout."""
    numbers = (
        Column(heading, justify="right")
        for heading in ("params (M)", "minutes", "disk (MB)", "memory (MB)")
    )
    table = Table(
        "slot", "technique", *numbers, title="estimates; finished stages are reused from the store"
    )
    total = Cost(
        "all",
        "",
        0,
        sum(c.seconds for c in costs),
        sum(c.disk_bytes for c in costs),
        max(c.memory_bytes for c in costs),
    )
    for c in [*costs, total]:
        params = f"{c.params / 1e6:.1f}" if c.params else ""
        table.add_row(
            c.slot,
            c.technique,
            params,
            f"{c.seconds / 60:.1f}",
            f"{c.disk_bytes / 1e6:.0f}",
            f"{c.memory_bytes / 1e6:.0f}",
        )
    table.rows[-2].end_section = True
    Console().print(table)
    print(f"store {store}: {shutil.disk_usage(store).free / 1e9:.1f} GB free")
