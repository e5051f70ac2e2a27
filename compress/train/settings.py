"""What training runs on."""

import importlib.util
from dataclasses import dataclass

from compress.bounds import check_values
from compress.errors import ConfigError, nearest

PRECISIONS = ("auto", "bf16", "fp32", "bf16_stochastic")
PARALLEL = ("none", "ddp", "fsdp2")
MOMENTS = ("fp32", "int8", "host")


@dataclass
class Trainer:
    """What training runs on."""

    # Over fp32 master weights bf16 autocast, fp32, or auto: bf16 where this machine computes it
    # faster; bf16_stochastic: bf16 weights.
    precision: str = "auto"
    # CPU threads; 0 takes all this process may use. Part of the store's key: sums depend on it.
    threads: int = 0
    parallel: str = "none"  # or ddp, fsdp2
    # Processes that train together; 0: one a GPU. Where a launcher started them its number counts.
    processes: int = 0
    # Whether another number of processes may go on where some have stopped. Then neither that
    # number nor ddp or fsdp2 is part of the store's key, and who trained shows in last bits.
    elastic: bool = False
    # Recompute activations in the backward pass: less memory, about a third more time.
    activation_checkpointing: bool = False
    # AdamW's: fp32 on the device, int8 (2 bytes a weight instead of 8, by bitsandbytes), or in host
    # memory.
    moments: str = "fp32"

    def __post_init__(self) -> None:
        for key, allowed in (
            ("precision", PRECISIONS),
            ("parallel", PARALLEL),
            ("moments", MOMENTS),
        ):
            if getattr(self, key) not in allowed:
                raise ConfigError(
                    f"trainer.{key}={getattr(self, key)!r}; {nearest(getattr(self, key), allowed)}"
                )

        # Moments that are kept otherwise.
        if self.moments == "int8" and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "trainer.moments=int8 needs bitsandbytes, which is not installed: pip install"
                " 'compress-lm[qlora]'; or use trainer.moments=host"
            )
        if self.moments != "fp32" and self.parallel == "fsdp2":
            raise ConfigError(
                f"trainer.moments={self.moments} is for whole parameters, trainer=fsdp2 leaves each"
                " process its share of them; leave one of the two out"
            )

        # Processes and threads.
        if self.processes < 0 or (self.processes > 1 and self.parallel == "none"):
            raise ConfigError(
                f"trainer.processes={self.processes} must be 0 or above, and above 1 only with"
                " trainer=ddp or trainer=fsdp2"
            )
        if self.threads < 0:
            raise ConfigError(f"trainer.threads={self.threads} must be 0 (all) or above")
        check_values("trainer", self)

    def count(self) -> int:
        """Processes to train with."""
        if self.parallel == "none" or self.processes:
            return self.processes or 1
        import torch

        return max(1, torch.cuda.device_count())
