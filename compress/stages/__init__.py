"""One file per technique. `STAGES` is the only way from a name in a recipe to code.

A stage is its configuration: a dataclass with

    check_shape(config) -> config      the HF config after the stage; ValueError when it can't work
                                       on this shape
    run(parent, out, ctx) -> metrics   reads one checkpoint directory, writes another; metric keys
                                       carry units
"""

from compress.stages.distill import Distill
from compress.stages.lora import Lora
from compress.stages.prune_depth import PruneDepth
from compress.stages.prune_width import PruneWidth
from compress.stages.ptq import Ptq
from compress.stages.qat import Qat

STAGES: dict[str, type] = {
    "prune_depth": PruneDepth,
    "prune_width": PruneWidth,
    "distill": Distill,
    "lora": Lora,
    "ptq": Ptq,
    "qat": Qat,
}
