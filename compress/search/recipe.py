"""A shape as a recipe: plain YAML that anybody can read, run and change.

Written by hand and not by a YAML library, for the comments: each slot says why it is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.budget import Limit
from compress.quant.grids import GRIDS
from compress.quant.settings import LEARNED
from compress.search.cutting import BATCH_ROWS
from compress.search.shapes import Shape, steps_of
from compress.stages import STAGES
from compress.store import write_whole

HEALING_TOKENS = 61_440
# Training under the rounding of the file, as recipes/demo.yaml does it.
ROUNDING = {
    "method": "gptq",
    "learn_from": "teacher",
    "balance": "awq",
    "calibration_sequences": 32,
    "tokens": 30_720,
    "batch_sequences": 2,
    "micro_batch_sequences": 2,
    "lr": 0.00004,
    "warmup_fraction": 0.1,
}


def finer_grids(grid: str, held: Sequence[str] = ()) -> list[str]:
    """Grids of more bits than `grid`, as a mixture takes them for what rounding harms most: two,
    and those that the student lies on already, which lose nothing.
    """
    bits = {name: GRIDS[name].bits_per_weight for name in ("q5_0", "q8_0", *held)}
    finer = [name for name in bits if bits[name] > GRIDS[grid].bits_per_weight]
    return sorted(finer, key=lambda name: bits[name])


def allocation(
    grid: str, lengths: Iterable[int], most_bytes: int, held: Sequence[str] = ()
) -> dict[str, Any]:
    """What a mixture's `allocate` says: `grid`, finer ones where a file of `most_bytes` leaves room
    (0: none), and Q4_K where it takes as many bits and rows have such lengths. Empty when that is
    one grid.
    """
    alike, bits = GRIDS["q4_k"], GRIDS[grid].bits_per_weight
    grids = [grid]
    if grid != alike.name and bits == alike.bits_per_weight:
        grids += [alike.name] * any(length % alike.block == 0 for length in lengths)
    if most_bytes:
        grids += finer_grids(grid, held)
    if len(grids) == 1:
        return {}
    limit = {"file_bytes": most_bytes} if most_bytes else {"bits_per_weight": bits}
    return limit | {"grids": grids}


class Program(NamedTuple):
    """What a recipe is written of: shape, the teacher's, grid, budget, limits that the command line
    gave, the overrides of base.yaml's choices, and lines that say where it comes from.
    """

    shape: Shape
    full: Shape
    grid: str
    budget: str
    limits: Mapping[str, Limit]
    choices: Mapping[str, str]  # group -> option, as teacher: embedded
    values: Mapping[str, Any]  # dotted key -> value, as teacher.source: a path
    title: str
    reasons: Sequence[str]
    losses: Mapping[str, float]  # slot -> what its level loses alone, in nats
    rows: Mapping[str, Mapping[str, int]]  # slot -> rows of calibration that it can't do without
    healing_rate: float  # 0: healing does harm
    allocation: Mapping[str, Any] = {}  # limit and grids of a mixture; empty: one grid for all


def text_of(program: Program) -> str:
    """The recipe."""
    slots = _slots(program)
    defaults = [f"  - /stage/{stage}@stages.{slot}" for slot, (stage, _, _) in slots.items()]
    choices = dict(program.choices) | {"budget": program.budget}
    choices |= {"export": "gguf_mixed" if program.allocation else f"gguf_{program.grid}"}

    # Where it comes from, what it is made of, and in which order.
    lines = [
        f"# {program.title}",
        *(f"# {line}" for line in program.reasons),
        "defaults:",
        "  - /base",
        *defaults,
        *(f"  - override /{group}: {option}" for group, option in choices.items()),
        "  - _self_",
        "",
        f"pipeline: [{', '.join(slots)}]",
        *_tables(program.values),
        *_limits(program.limits),
        "",
        "stages:",
    ]

    # A slot each, with why it is there.
    for slot, (_, options, why) in slots.items():
        lines.append(f"  {slot}:{' {}' if not options else ''}  # {why}")
        lines += [f"    {key}: {_value(value)}" for key, value in options.items()]
    return "\n".join(lines) + "\n"


def _slots(program: Program) -> dict[str, tuple[str, dict[str, Any], str]]:
    """Slot -> its stage, options and reason, in order."""
    full, shape = program.full, program.shape
    whys = {
        "depth": f"of {full.blocks} blocks {shape.blocks} stay: first, since which go is the same"
        " for every vocabulary",
        "vocab": f"of {full.ids:,} ids {shape.ids:,} stay: any text can be written, only longer",
        "heads": f"of {full.kv_heads} key-value heads {shape.kv_heads} stay, with all that share"
        " them",
        "narrow": f"of {full.ffn:,} FFN channels {shape.ffn:,} stay, as many in each block",
    }
    slots: dict[str, tuple[str, dict[str, Any], str]] = {}
    for slot, stage in steps_of(shape, full).items():
        name = next(key for key, kind in STAGES.items() if type(stage) is kind)
        key = {"depth": "blocks", "vocab": "ids", "heads": "kv_groups", "narrow": "ffn"}[slot]
        why = whys[slot]
        if slot in program.losses:
            why += f"; alone it loses {program.losses[slot]:.3f} nats a token"
        options = {key: getattr(stage, key)}
        for option, rows in program.rows.get(slot, {}).items():
            if rows > getattr(stage, option):
                options[option] = rows
        slots[slot] = (name, options, why)

    # What gives back what cuts lose, then the grid of the file.
    if slots and program.healing_rate:
        healing = {
            "tokens": HEALING_TOKENS,
            "batch_sequences": BATCH_ROWS,
            "micro_batch_sequences": BATCH_ROWS,
            "lr": program.healing_rate,
            "train_embeddings": False,
        }
        why = "more tokens give more back; the rate is by what the cuts lost"
        slots["heal"] = ("distill", healing, why)
    scales = "learned" if program.grid in LEARNED else "round"
    rounding = {"grid": program.grid, "scales": scales, **ROUNDING}
    why = "trained on the very grid of the file that ships"
    if program.allocation:
        rounding["allocate"] = dict(program.allocation)
        why = "for every matrix the grid on which all together lose least, in as many bytes"
    slots["qat"] = ("qat", rounding, why)
    return slots


def _tables(values: Mapping[str, Any]) -> list[str]:
    """Values of dotted keys as nested tables, those of one table together."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *path, last = name.split(".")
        table = tree
        for key in path:
            table = table.setdefault(key, {})
        table[last] = value
    return ["", *_nested(tree, "")] if tree else []


def _nested(tree: Mapping[str, Any], indent: str) -> list[str]:
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            lines += [f"{indent}{key}:", *_nested(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {_value(value)}")
    return lines


def _limits(limits: Mapping[str, Limit]) -> list[str]:
    """Limits that the command line gave, over those of the budget."""
    if not limits:
        return []
    lines = ["", "budget:", "  limits:"]
    for name, limit in limits.items():
        side, bound = ("max", limit.max) if limit.max is not None else ("min", limit.min)
        lines.append(f"    {name}: {{{side}: {_value(bound)}, why: {_value(limit.why)}}}")
    return lines


def _value(value: Any) -> str:
    """A value as YAML: JSON is, but for the text ${, which OmegaConf would look up."""
    return json.dumps(value, ensure_ascii=False).replace("${", "\\\\${")


def write_recipe(file: Path, program: Program) -> None:
    """Write the recipe, in place of what is there."""
    write_whole(file, text_of(program).encode())
