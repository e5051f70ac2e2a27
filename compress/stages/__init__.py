"""One file per technique. `STAGES` is the only way from a name in a recipe to code.

A stage is its configuration: a dataclass with the members of `Stage` (stages/stage.py), which
checks itself, says what it costs and runs.
"""

from compress.stages.distill import Distill
from compress.stages.lora import Lora
from compress.stages.prune_depth import PruneDepth
from compress.stages.prune_experts import PruneExperts
from compress.stages.prune_heads import PruneHeads
from compress.stages.prune_vocab import PruneVocab
from compress.stages.prune_width import PruneWidth
from compress.stages.ptq import Ptq
from compress.stages.qat import Qat
from compress.stages.sparsify import Sparsify
from compress.stages.stage import Stage

STAGES: dict[str, type[Stage]] = {
    "prune_vocab": PruneVocab,
    "prune_depth": PruneDepth,
    "prune_width": PruneWidth,
    "prune_heads": PruneHeads,
    "prune_experts": PruneExperts,
    "sparsify": Sparsify,
    "distill": Distill,
    "lora": Lora,
    "ptq": Ptq,
    "qat": Qat,
}
