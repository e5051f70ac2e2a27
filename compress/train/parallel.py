"""Many processes, one training. Rank 0 is the pipeline; the others only train beside it.

    ddp     every rank holds the model; gradients are averaged (torch's `DistributedDataParallel`)
    fsdp2   every rank holds a shard of each parameter, gradient and moment; a block is gathered
            while it computes (torch's `fully_shard`)

`compress run ... trainer=ddp` starts its own followers on this machine; under torchrun, one node or
many, RANK and WORLD_SIZE are set already and nothing is started (the store must then be on a file
system that all nodes see). All ranks execute the same stage with the same batches, of which each
takes every world-th row; rank 0 alone writes checkpoints, scores and records.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.other import get_free_port
from torch import nn

from compress.errors import ResourceError
from compress.models.blocks import blocks_of

# The others wait while rank 0 prunes, rounds and scores, which with full tasks and a large model
# takes days; torch's own limit is 30 minutes.
# A rank that dies is noticed at once all the same: its connection closes.
WAIT = timedelta(days=30)


class Followed(BaseException):
    """Raised by `train` on every rank but 0 when training is over: what comes next is rank 0's
    business.
    """


def rank() -> int:
    """This process's number; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def share(value: Any = None) -> Any:
    """Rank 0's value, on every rank."""
    box = [value]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def total(*numbers: float) -> list[float]:
    """Sums over ranks, in float64."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if world() > 1:
        dist.all_reduce(sums)
    return sums.tolist()


def wait() -> None:
    """Until every rank is here."""
    if world() > 1:
        dist.barrier()


@contextmanager
def followers(processes: int, command: list[str]) -> Iterator[None]:
    """Run the block as rank 0 of `processes`; the others run `compress COMMAND`, are started here
    and end with the block.

    ResourceError when one of them dies first: the training state is on disk, so the command can be
    repeated.
    """
    if processes == 1 or "RANK" in os.environ:
        with group() if "RANK" in os.environ else nullcontext():
            yield
        return

    # What tells torch who is who, on this machine.
    count = str(processes)
    common = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
    }
    ranks = [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]

    # The others run the same command, and say nothing of it; this process is rank 0.
    line = [sys.executable, "-m", "compress", *command]
    children = [
        subprocess.Popen(line, env=os.environ | variables, stdout=subprocess.DEVNULL)
        for variables in ranks[1:]
    ]
    os.environ |= ranks[0]

    # A rank that dies closes its connections, which torch reports here.
    try:
        with group():
            yield
    except RuntimeError as error:
        if any(child.poll() not in (None, 0) for child in children):
            raise ResourceError(
                f"a training process died ({error}); the state is saved, repeat the command to"
                " go on"
            ) from error
        raise
    finally:
        for name in ranks[0]:
            os.environ.pop(name, None)
        failed = sys.exc_info()[0] is not None
        for child in children:
            if failed:
                child.terminate()
            child.wait()


@contextmanager
def group() -> Iterator[None]:
    """For the block, the process group that RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT describe.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(module: nn.Module, model: Any, precision: str) -> nn.Module:
    """`fully_shard` every block of `model`, then the whole `module` that holds it: parameters
    become DTensors.

    With bf16 they are gathered so; a batch keeps its types, for the teacher's probabilities in it
    would not add up to 1 in bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bf16 = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = bf16 if precision == "bf16" else MixedPrecisionPolicy()
    for block in blocks_of(model):
        fully_shard(block, mp_policy=policy)
    return fully_shard(module, mp_policy=policy)  # type: ignore[return-value]


def unshard(module: nn.Module) -> None:
    """Put whole, plain parameters back into every submodule; each rank ends up with all of them."""
    sharded: list[Any] = [p for p in module.parameters() if hasattr(p, "full_tensor")]
    whole_parameters = {
        id(p): nn.Parameter(p.full_tensor().detach(), requires_grad=p.requires_grad)
        for p in sharded
    }
    for submodule in module.modules():
        submodule._parameters.update(
            {name: whole_parameters.get(id(p), p) for name, p in submodule._parameters.items()}
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, outside the autograd graph; a view, not a copy."""
    part: Any = tensor.detach()
    return part.to_local() if hasattr(part, "to_local") else part
