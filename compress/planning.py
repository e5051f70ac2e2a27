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
    costs = [Cost("teacher", "teacher", size, seconds, 4 * size, 5 * size)]

    for slot, parent in recipe.steps():
        stage, technique = recipe.stages[slot], recipe.technique(slot)
        work = _stage_flops(session, slot, sizes, parent)
        scoring = (
            2 * sizes[slot] * score_tokens * 3 / rate
            + 10
            + ANSWER_SECONDS * bool(recipe.eval.open_prompts) * sizes[slot] / 135e6
        )
        disk = _stage_disk_bytes(stage, technique, sizes[slot], shapes["teacher"])
        memory = _stage_memory_bytes(stage, sizes[slot], shapes[slot], recipe.data.seq_len)
        costs.append(
            Cost(slot, technique, sizes[slot], work / rate + scoring, int(disk), int(memory))
        )

    # A file that ships lies in the store and in the bundle.
    shipped = sizes[recipe.shipped_slot()]
    for name in recipe.export.files:
        disk = int(formats.parse(name)[2].bits_per_weight / 4 * shipped)
        costs.append(Cost(*formats.slot_of(name), shipped, 40.0, disk, 4 * shipped))
    return costs


def _score_tokens(recipe: Recipe) -> int:
    """Tokens that a model reads to be scored: of the tasks and of the held-out texts."""
    scoring, data = recipe.eval, recipe.data
    heldout = scoring.heldout_sequences * data.seq_len * len(data.heldout)
    return TASK_TOKENS * bool(scoring.tasks) + heldout


def _stage_flops(session: Session, slot: str, sizes: dict[str, int], parent: str) -> int:
    """Operations of a slot's stage: its training, its teacher's passes and its calibration.

    `sizes`: slot -> parameters.
    """
    recipe = session.recipe
    stage = recipe.stages[slot]
    tokens = getattr(stage, "tokens", 0)

    # Who teaches runs forward beside it: the recipe's teacher, or on a grid the slot's parent.
    teacher = {"distill": sizes["teacher"], "qat": sizes[parent]}.get(recipe.technique(slot), 0)
    calibration_tokens = (
        getattr(stage, "calibration_sequences", 0)
        * recipe.data.seq_len
        * max(1, getattr(stage, "blocks", 1))
        * getattr(stage, "passes", 1)
    )

    return 6 * sizes[slot] * tokens + 2 * teacher * tokens + 2 * sizes[parent] * calibration_tokens


def _stage_memory_bytes(stage: Any, params: int, config: dict[str, Any], seq_len: int) -> int:
    """What a stage holds at once: weights, and where it trains gradients, moments and activations
    (34 bytes a token, layer and hidden unit: Korthikanti et al., arXiv 2205.05198, without the
    attention map).
    """
    if not getattr(stage, "tokens", 0):
        return 8 * params
    batch_tokens = getattr(stage, "micro_batch_sequences", 1) * seq_len
    units = config["num_hidden_layers"] * config["hidden_size"]
    return 16 * params + batch_tokens * units * 34


def _stage_disk_bytes(stage: Any, technique: str, params: int, teacher: dict[str, Any]) -> float:
    """What a stage leaves in the store: weights (fp32 on a grid, else bf16), and where it trains
    its unfinished state and the teacher's signals; `teacher`: the teacher's HF config.
    """
    tokens = getattr(stage, "tokens", 0)
    weight_bytes = 4 if technique in ("ptq", "qat") else 2
    state_bytes = 12 * bool(tokens)
    return (weight_bytes + state_bytes) * params + _signal_bytes_per_token(stage, teacher) * tokens


def _signal_bytes_per_token(stage: Any, teacher: dict[str, Any]) -> float:
    """What the schemes in `distill/signals.py` take; `sampled` depends on the text: 27 to 30
    measured at threshold 0.05. 0 without kept signals.
    """
    signal = getattr(stage, "signal", None)
    if signal is None:
        return 0.0

    # A token id takes two bytes in a vocabulary of up to 2^16, three in a larger one.
    ids = 3 if teacher["vocab_size"] > 1 << 16 else 2
    return {
        "sampled": 6 + (2 + ids) * 0.5 / signal.threshold,
        "hidden": 1.04 * teacher["hidden_size"],
        "online": 0.0,
    }[signal.scheme.value]


def amount(size: int) -> str:
    """Bytes in the unit that leaves digits to compare."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def check_disk(session: Session, costs: list[Cost]) -> None:
    """ResourceError when the store's disk has less free space than the recipe may need."""
    needed = sum(cost.disk_bytes for cost in costs)
    free = shutil.disk_usage(session.store.root).free
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

    # Times and files add up; memory is given back before the next slot.
    total = Cost(
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
