"""Every stage on a model of 0.5B parameters, as `gpu_check.py` runs them: the production's own
`run`, from a checkpoint on disk to another one.
"""

from __future__ import annotations

import math
import shutil
from typing import Any, NamedTuple

from gpu_models import Place

from compress.quant.settings import Balance, GridName, Method, Scales

ROWS, LENGTH = 64, 512  # of text; dry 64 x 32


class Run(NamedTuple):
    """A stage with its settings at 0.5B, and with those of a dry run."""

    technique: str
    settings: dict[str, Any]
    dry: dict[str, Any]
    shape: str = "0.5B"


TRAINED = {"tokens": 8 * 16 * LENGTH, "batch_sequences": 16, "micro_batch_sequences": 8}
TRAINED_DRY = {"tokens": 2 * 2 * 32, "batch_sequences": 2, "micro_batch_sequences": 1}
CALIBRATED = {"calibration_sequences": 16}
CALIBRATED_DRY = {"calibration_sequences": 8}
AWQ = {"grid": GridName.int4_g32, "balance": Balance.awq, "scales": Scales.search}
RUNS: dict[str, Run] = {
    "prune_vocab": Run("prune_vocab", {"ids": 98304}, {"ids": 448}),
    "prune_depth": Run("prune_depth", {"blocks": 4}, {"blocks": 1}),
    "prune_width": Run(
        "prune_width", {"ffn": 3648} | CALIBRATED, {"ffn": 128, "multiple": 32} | CALIBRATED_DRY
    ),
    "prune_heads": Run(
        "prune_heads", {"kv_groups": 1} | CALIBRATED, {"kv_groups": 1} | CALIBRATED_DRY
    ),
    "prune_experts": Run(
        "prune_experts",
        {"experts": 16} | CALIBRATED,
        {"experts": 3, "floor_tokens": 1} | CALIBRATED_DRY,
        "0.5B of experts",
    ),
    "sparsify": Run("sparsify", CALIBRATED, CALIBRATED_DRY),
    "distill": Run("distill", TRAINED, TRAINED_DRY),
    "lora": Run("lora", TRAINED | {"data": "text"}, TRAINED_DRY | {"data": "text", "rank": 2}),
    "ptq_nearest": Run("ptq", {"grid": GridName.q4_0}, {"grid": GridName.q4_0}),
    "ptq_awq": Run("ptq", AWQ | CALIBRATED, AWQ | CALIBRATED_DRY),
    "ptq_gptq": Run("ptq", {"method": Method.gptq} | CALIBRATED, {"method": Method.gptq}),
    "qat": Run("qat", TRAINED, TRAINED_DRY),
    "qat_adapters": Run("qat", TRAINED | {"rank": 16}, TRAINED_DRY | {"rank": 2}),
}


def stage(place: Place, name: str) -> dict[str, Any]:
    """One of RUNS; its metrics, all of which must be finite."""
    from gpu_models import random_text

    from compress.stages import STAGES
    from compress.stages.lora import LoraData

    run = RUNS[name]
    settings = dict(run.dry if place.dry else run.settings)
    if "data" in settings:
        settings["data"] = LoraData(settings["data"])
    parent = place.checkpoint(run.shape)
    teacher = place.checkpoint(run.shape, seed=1)
    rows = random_text(place.size(151936, 512), ROWS, place.size(LENGTH, 32))

    # Nothing of an earlier try, and nothing is left.
    work = f"stage-{name}"
    shutil.rmtree(place.folder / work, ignore_errors=True)
    context = place.context(teacher, rows, work)
    metrics = STAGES[run.technique](**settings).run(parent, place.folder / work / "out", context)
    assert (place.folder / work / "out" / "model.safetensors").is_file()
    shutil.rmtree(place.folder / work)

    wrong = [key for key, value in metrics.items() if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} of {name} is not finite")
    return {"shape": run.shape, "settings": settings, "metrics": metrics}
