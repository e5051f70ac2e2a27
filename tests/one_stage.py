"""One process of a stage on the tiny teacher: `python one_stage.py STAGE FOLDER`, for
`train/test_shards.py`.

STAGE is distill, online or qat; under torchrun's variables it runs under fsdp2. Rank 0 leaves the
checkpoint in FOLDER/out; every rank leaves FOLDER/rank<i>.json: its metrics, the bytes of tensors
that were alive at once while training was prepared beside those of the model in fp32, how many
models were opened whole, and how many parameters were shards at the end.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
from conftest import make_context
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compress.distill.settings import SchemeName, Signal
from compress.models import checkpoint
from compress.models.empty import is_empty
from compress.quant.settings import Scales
from compress.stages.distill import Distill
from compress.stages.qat import Qat
from compress.stages.training import Optimization
from compress.train import parallel, trainer

SAMPLED, ONLINE = (Signal(scheme=name) for name in (SchemeName.sampled, SchemeName.online))
SIZES = {"tokens": 32 * 8 * 3, "batch_sequences": 8}
STAGES = {
    "distill": Distill(**SIZES, validations=1, signal=SAMPLED),
    "online": Distill(**SIZES, ce_weight=0.5, signal=ONLINE),
    "qat": Qat(**SIZES, scales=Scales.learned, signal=SAMPLED),
}


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive; the most at once."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(getattr(tensor, "_local_tensor", tensor))
        return out

    def note(self, tensor):
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.live:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None)
            self.peak = max(self.peak, sum(self.live.values()))


def main(name: str, folder: Path) -> None:
    own = folder / str(parallel.rank())
    own.mkdir(parents=True, exist_ok=True)
    kind = "fsdp2" if parallel.world() > 1 else "none"
    work = folder / "work"
    work.mkdir(exist_ok=True)
    signals = folder.parent / "signals"
    context = make_context(folder / "teacher", own, parallel=kind, work=work, signals=signals)
    about, live, models, opened = {}, Live(), [], []

    def preparing(self, model, *arguments):
        about["empty"] = is_empty(model)
        live.peak = before = sum(live.live.values())
        prepare(self, model, *arguments)
        about["peak"] = live.peak - before
        models.append(model)

    def opening(*arguments):
        opened.append(1)
        return open_whole(*arguments)

    prepare, trainer.Trainer.__init__ = trainer.Trainer.__init__, preparing
    open_whole, checkpoint._opened = checkpoint._opened, opening
    Optimization.reserve = lambda *_, **__: None  # memory that is asked for and let go
    try:
        with live:
            about |= STAGES[name].run(folder / "teacher", folder / "out", context)
    except parallel.Followed:
        pass
    parameters = list(models[0].parameters())
    about["opened"] = len(opened)
    about["whole"] = 4 * sum(p.numel() for p in parameters)
    about["shards"] = sum(hasattr(p, "full_tensor") for p in parameters)
    about["parameters"] = len(parameters)
    (folder / f"rank{parallel.rank()}.json").write_text(json.dumps(about))


if __name__ == "__main__":
    with parallel.group() if "RANK" in os.environ else nullcontext():
        main(sys.argv[1], Path(sys.argv[2]))
