"""Memory at its peak at 7B, on the device and on the host, stage by stage.

A stage runs as it does in production, but for its files: 15 GB are not written and read again for
each of them. Instead of `load_model` stands a model of random numbers, instead of what writes
nothing (`without_files`). Stages that walk over blocks have one block on the device at a time, so
they see the first blocks alone, and the line says how many. Training stages see all 28.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from gpu_models import Place, random_model, random_text

from compress.quant.settings import Balance, GridName, Method, Scales

SHAPE, BLOCKS = "7B", 28


class Run(NamedTuple):
    """A stage at 7B: its settings, blocks of the model, text, and what the trainer is told."""

    technique: str
    settings: dict[str, Any]
    blocks: int
    rows: int
    length: int
    trainer: dict[str, Any] = {}


ONE_ROW = {"tokens": 2 * 1024, "batch_sequences": 1, "micro_batch_sequences": 1}
LEAN = {"activation_checkpointing": True}
AWQ = {"grid": GridName.int4_g128, "balance": Balance.awq, "scales": Scales.search}
GPTQ = {"grid": GridName.int4_g128, "method": Method.gptq}
FEW_ROWS = {"calibration_sequences": 8}
RUNS: dict[str, Run] = {
    "prune_width": Run("prune_width", {"ffn": 14208, "calibration_sequences": 16}, 1, 16, 2048),
    "ptq_awq": Run("ptq", AWQ | FEW_ROWS, 2, 8, 2048),
    "ptq_gptq": Run("ptq", GPTQ | FEW_ROWS, 2, 8, 2048),
    "lora": Run("lora", ONE_ROW, BLOCKS, 16, 1024, LEAN),
    "distill": Run("distill", ONE_ROW, BLOCKS, 16, 1024, LEAN | {"precision": "bf16_stochastic"}),
    "qat_adapters": Run("qat", ONE_ROW | {"rank": 16}, BLOCKS, 16, 1024, LEAN),
}
# Of a dry run: sizes that TINY allows.
DRY: dict[str, dict[str, Any]] = {
    "prune_width": {"ffn": 128, "multiple": 32, "calibration_sequences": 8},
    "ptq_awq": {"grid": GridName.int4_g32},
    "ptq_gptq": {"grid": GridName.int4_g32},
    **dict.fromkeys(("lora", "distill", "qat_adapters"), {"tokens": 64}),
}


class Peak:
    """Bytes allocated on the device at most. What random numbers are drawn in, and what a stage
    allocates beforehand to see whether there is room, does not count.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.skip()

    def note(self) -> None:
        """Count up to here."""
        if torch.cuda.is_available():
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated())

    def skip(self) -> None:
        """Don't count what was since the last note."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()


def nothing(*_: Any, **__: Any) -> None:
    """In the place of what writes, or looks at files that are not there."""


@contextmanager
def without_files(peak: Peak) -> Iterator[None]:
    """For the block, checkpoints are opened out of nothing and written nowhere."""
    from compress.models.blocks import blocks_of
    from compress.models.checkpoint import config_object, read_config
    from compress.stages.training import Optimization

    reserve = Optimization.reserve

    def reserved(*arguments: Any, **options: Any) -> None:
        peak.note()
        reserve(*arguments, **options)
        peak.skip()

    def opened(path: Path, dtype: torch.dtype = torch.float32, *_: Any, **__: Any) -> Any:
        peak.note()
        model = random_model(config_object(read_config(path)), 0, dtype)
        peak.skip()
        return model

    def stored(path: Path) -> Any:
        model = opened(path, torch.bfloat16)
        matrices = {id(p) for p in blocks_of(model).parameters() if p.dim() > 1}
        for parameter in model.parameters():
            if id(parameter) not in matrices:
                parameter.data = parameter.data.float()
        return model

    replaced: dict[str, Any] = {
        "compress.stages.training.Optimization.reserve": reserved,
        "compress.models.checkpoint.load_model": opened,
        "compress.models.checkpoint.load_stored": stored,
        "compress.distill.signals.load_model": opened,
        "compress.distill.signals.weights_digest": str,
        "compress.models.checkpoint.save_model": nothing,
        "compress.prune.shape.save_checked": nothing,
        "compress.quant.codes.save_quantized": nothing,
        "compress.quant.codes.check": nothing,
    }
    with ExitStack() as patches:
        for name, stand_in in replaced.items():
            patches.enter_context(patch(name, stand_in))
        yield


def predicted_bytes(name: str) -> int | None:
    """What the plan says of this run's peak on the device, to stand beside what was measured; None
    where it says nothing yet.
    """
    return None


def memory(place: Place, name: str) -> dict[str, Any]:
    """Peaks of one of RUNS."""
    from compress.score.latency import peak_rss_bytes
    from compress.stages import STAGES
    from compress.stages.lora import LoraData

    run = RUNS[name]
    settings = run.settings | (DRY[name] if place.dry else {})
    if run.technique == "lora":
        settings["data"] = LoraData.text
    blocks = place.size(run.blocks, 2)
    parent = place.hollow(SHAPE, num_hidden_layers=blocks)
    rows = random_text(place.size(152064, 512), run.rows, place.size(run.length, 32))

    work = f"memory-{name}"
    shutil.rmtree(place.folder / work, ignore_errors=True)
    context = place.context(parent, rows, work, **run.trainer)
    peak = Peak()
    with without_files(peak):
        STAGES[run.technique](**settings).run(parent, place.folder / work / "out", context)
    peak.note()
    shutil.rmtree(place.folder / work)

    whole_model = blocks == BLOCKS or "all blocks alike: one is on the device at a time"
    return {
        "shape": SHAPE,
        "blocks": blocks,
        "first_blocks_only": "" if whole_model is True else whole_model,
        "rows": run.rows,
        "length": rows.ids.shape[1] - 1,
        "trainer": run.trainer,
        "settings": settings,
        "stage_peak_bytes": peak.bytes or None,
        "predicted_bytes": predicted_bytes(name),
        "host_peak_bytes": peak_rss_bytes(),
    }
