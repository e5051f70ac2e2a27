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
from compress.config import Recipe
from compress.errors import ResourceError
from compress.models.model_config import meta_model
from compress.session import Session
from compress.stages.stage import Sizes

# assumed share of the square matrix product's rate that a whole training step reaches; on the
# cautious side
EFFICIENCY = 0.5
TASK_TOKENS = 16_000  # about the tokens of the embedded tasks
# to ask a quarter of the open prompts, on two cores and 135M parameters: 14.5 in torch, 26 for all
# in llama.cpp
ANSWER_SECONDS = 15.0


class SlotCost(NamedTuple):
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


def estimate(session: Session, shapes: dict[str, dict[str, Any]], rate: float) -> list[SlotCost]:
    """A cost for every slot, in order.

    `shapes`: slot -> HF config after it, as `check_shapes` gives them; `rate`: flops a second of a
    square matrix product.
    """
    recipe = session.recipe
    rate = rate * EFFICIENCY
    sizes = {slot: params_of(config) for slot, config in shapes.items()}
    score_tokens = _score_tokens(recipe)

    # The teacher is imported and scored, nothing else.
    size = sizes["teacher"]
    seconds = 2 * size * score_tokens * 3 / rate + 10
    costs = [SlotCost("teacher", "teacher", size, seconds, 4 * size, 5 * size)]

    for slot, parent in recipe.steps():
        needed = recipe.stages[slot].cost(
            Sizes(
                params=sizes[slot],
                parent_params=sizes[parent],
                teacher_params=sizes["teacher"],
                config=shapes[slot],
                teacher_config=shapes["teacher"],
                seq_len=recipe.data.seq_len,
            )
        )
        scoring = (
            2 * sizes[slot] * score_tokens * 3 / rate
            + 10
            + ANSWER_SECONDS * bool(recipe.eval.open_prompts) * sizes[slot] / 135e6
        )
        costs.append(
            SlotCost(
                slot,
                recipe.technique(slot),
                sizes[slot],
                needed.flops / rate + scoring,
                int(needed.disk_bytes),
                int(needed.memory_bytes),
            )
        )

    # A file that ships lies in the store and in the bundle.
    shipped = sizes[recipe.shipped_slot()]
    for name in recipe.export.files:
        disk = int(formats.parse(name)[2].bits_per_weight / 4 * shipped)
        costs.append(SlotCost(*formats.slot_of(name), shipped, 40.0, disk, 4 * shipped))
    return costs


def _score_tokens(recipe: Recipe) -> int:
    """Tokens that a model reads to be scored: of the tasks and of the held-out texts."""
    scoring, data = recipe.eval, recipe.data
    heldout = scoring.heldout_sequences * data.seq_len * len(data.heldout)
    return TASK_TOKENS * bool(scoring.tasks) + heldout


def amount(size: int) -> str:
    """Bytes in the unit that leaves digits to compare."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def check_disk(session: Session, costs: list[SlotCost]) -> None:
    """ResourceError when the store's disk has less free space than the recipe may need."""
    needed = sum(cost.disk_bytes for cost in costs)
    free = shutil.disk_usage(session.store.root).free
    if needed > free:
        raise ResourceError(
            f"the recipe may need {amount(needed)} in {session.store.root}, {amount(free)} are"
            " free; free some (`compress gc`) or set store=DIR"
        )


def print_plan(costs: list[SlotCost], store: Path) -> None:
    """The plan as a table on stdout."""
    numbers = (
        Column(heading, justify="right")
        for heading in ("params (M)", "minutes", "disk (MB)", "memory (MB)")
    )
    table = Table(
        "slot", "technique", *numbers, title="estimates; finished stages are reused from the store"
    )

    # Times and files add up; memory is given back before the next slot.
    total = SlotCost(
        "all",
        "",
        0,
        sum(cost.seconds for cost in costs),
        sum(cost.disk_bytes for cost in costs),
        max(cost.memory_bytes for cost in costs),
    )
    for cost in [*costs, total]:
        params = f"{cost.params / 1e6:.1f}" if cost.params else ""
        table.add_row(
            cost.slot,
            cost.technique,
            params,
            f"{cost.seconds / 60:.1f}",
            f"{cost.disk_bytes / 1e6:.0f}",
            f"{cost.memory_bytes / 1e6:.0f}",
        )
    table.rows[-2].end_section = True

    Console().print(table)
    print(f"store {store}: {shutil.disk_usage(store).free / 1e9:.1f} GB free")
