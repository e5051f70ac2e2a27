"""What a stage may ask of the pipeline, besides its parent: the teacher, text, seeds and a place
for unfinished work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from compress.train.packed import Packed


@dataclass(frozen=True)
class Context:
    """Shapes: calibration(n) gives ids (n, seq_len) int64 of packed training text; the same n
    gives the same ids. All text is in the tokens of the stage's parent.
    """

    teacher: Path
    seed: int
    seq_len: int
    # unfinished state of this very stage; survives kills, removed when the stage is committed
    work: Path
    signals: Path  # teacher signals, shared by all stages and runs of one store
    calibration: Callable[[int], Tensor]
    text: Callable[[], Packed]  # all training text, packed to seq_len + 1 tokens a sequence
    chat: Callable[[], Packed]  # question-answer training data; the loss mask covers answers
    file_overhead: Callable[[Path], int]  # bytes of a checkpoint's GGUF besides its matrices
    # of training: "bf16" autocast over fp32 master weights, "bf16_stochastic" weights, or "fp32"
    precision: str
    label: str  # what progress lines call this stage
    log: Callable[[str], None]
    curve: Callable[[list[dict[str, float]]], None]  # receives the training curve
    # more text whose tokens a smaller vocabulary keeps, None for none
    vocabulary: Callable[[], Packed | None] = lambda: None
    parallel: str = "none"  # or ddp, fsdp2
    activation_checkpointing: bool = False
    moments: str = "fp32"  # of the optimizer: or int8, host
    # figures that any stage of one store may need again, by key; None: `work` has them
    notes: Path | None = None
