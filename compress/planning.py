"""`--plan`: what a recipe will cost in time, disk and memory, before anything starts; and the disk check before every run.

Times come from operation counts, 2 P flops a token forward and 6 P for a training step (P parameters; Kaplan et al.,
arXiv 2001.08361, table 1), over the matrix-product rate measured on this machine just now. They are estimates: scoring dominates small runs.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.errors import ResourceError

if TYPE_CHECKING:
    from compress.session import Session

EFFICIENCY = 0.5  # assumed share of the square matrix product's rate that a whole training step reaches; on the cautious side
TASK_TOKENS = 16_000  # about the tokens of the embedded tasks
SHIPPING_BITS = {"F16": 16, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_0": 5.5, "Q4_1": 5, "Q4_0": 4.5, "Q4_K": 4.5}


@dataclass(frozen=True)
class Cost:
    """One slot's estimate."""

    slot: str
    technique: str
    params: int
    seconds: float
    disk_bytes: int
    memory_bytes: int


def params_of(config: dict[str, Any]) -> int:
    """Parameters of a HF config, counted on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in config.items() if k not in ("model_type", "architectures", "dtype", "transformers_version")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **options))
    return sum(p.numel() for p in model.parameters())


def matmul_flops_per_sec(n: int = 1024, seconds: float = 0.5) -> float:
    """Measured bf16 rate of an n x n x n product."""
    import torch

    a = torch.randn(n, n).bfloat16()
    a @ a
    count, start = 0, time.monotonic()
    while time.monotonic() - start < seconds:
        a @ a
        count += 1
    return 2 * n**3 * count / (time.monotonic() - start)


def estimate(session: Session, shapes: dict[str, dict[str, Any]], rate: float) -> list[Cost]:
    """A cost for every slot, in order."""
    recipe, rate = session.recipe, rate * EFFICIENCY
    e, seq_len = recipe.eval, recipe.data.seq_len
    sizes = {slot: params_of(config) for slot, config in shapes.items()}
    score_tokens = TASK_TOKENS * bool(e.tasks) + e.heldout_sequences * seq_len
    whole = sizes["teacher"]
    costs = [Cost("teacher", "teacher", whole, 2 * whole * score_tokens * 3 / rate + 10, 4 * whole, 5 * whole)]
    for slot, parent in recipe.steps():
        stage, params = recipe.stages[slot], sizes[slot]
        tokens = getattr(stage, "tokens", 0)
        batch_tokens = getattr(stage, "micro_batch_sequences", 1) * seq_len
        teacher = {"distill": whole, "qat": sizes[parent]}.get(recipe.technique(slot), 0)
        quantized = recipe.technique(slot) in ("ptq", "qat")
        calibration = getattr(stage, "calibration_sequences", 0) * seq_len * max(1, getattr(stage, "blocks", 1)) * getattr(stage, "passes", 1)
        work = 6 * params * tokens + 2 * teacher * tokens + 2 * sizes[parent] * calibration
        scoring = 2 * params * score_tokens * 3 / rate + 10
        memory = (16 if tokens else 8) * params + batch_tokens * shapes[slot]["num_hidden_layers"] * shapes[slot]["hidden_size"] * 34 * bool(tokens)
        disk = (4 if quantized else 2) * params + 12 * params * bool(tokens) + _signal_bytes_per_token(stage, shapes["teacher"]) * tokens
        costs.append(Cost(slot, recipe.technique(slot), params, work / rate + scoring, int(disk), int(memory)))
    shipped = sizes[recipe.shipped_slot()]
    for kind in recipe.export.gguf:
        costs.append(Cost(f"gguf_{kind.lower()}", "export_gguf", shipped, 40.0, int(SHIPPING_BITS[kind] / 4 * shipped), 4 * shipped))
    return costs


def _signal_bytes_per_token(stage: Any, teacher: dict[str, Any]) -> float:
    """What the schemes in `distill/schemes.py` take; `sampled` depends on the text: 32 measured at threshold 0.05. 0 without kept signals."""
    signal = getattr(stage, "signal", None)
    if signal is None:
        return 0.0
    ids = 3 if teacher["vocab_size"] > 1 << 16 else 2
    return {
        "sampled": 4 + (2 + ids) * 0.5 / signal.threshold, "topk": (2 + ids) * signal.top, "hidden": 1.04 * teacher["hidden_size"],
        "full": 2.0 * teacher["vocab_size"], "online": 0.0,
    }[signal.scheme.value]  # fmt: skip


def check_disk(session: Session, costs: list[Cost]) -> None:
    """ResourceError when the store's disk has less free space than the recipe may need."""
    needed, free = sum(cost.disk_bytes for cost in costs), shutil.disk_usage(session.store.root).free
    if needed > free:
        raise ResourceError(
            f"the recipe may need {needed / 1e9:.1f} GB in {session.store.root}, {free / 1e9:.1f} GB are free; "
            "free some (`compress gc`) or set store=DIR"
        )


def print_plan(session: Session, costs: list[Cost], store: Path) -> None:
    """The plan as a table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("slot", "technique", title="estimates; finished stages are reused from the store")
    for heading in ("params (M)", "minutes", "disk (MB)", "memory (MB)"):
        table.add_column(heading, justify="right")
    total = Cost("all", "", 0, sum(c.seconds for c in costs), sum(c.disk_bytes for c in costs), max(c.memory_bytes for c in costs))
    for c in [*costs, total]:
        params = f"{c.params / 1e6:.1f}" if c.params else ""
        table.add_row(c.slot, c.technique, params, f"{c.seconds / 60:.1f}", f"{c.disk_bytes / 1e6:.0f}", f"{c.memory_bytes / 1e6:.0f}")
    table.rows[-2].end_section = True
    Console().print(table)
    print(f"store {store}: {shutil.disk_usage(store).free / 1e9:.1f} GB free")
