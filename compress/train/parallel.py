"""Many processes, one training. Rank 0 is the pipeline; the others only train beside it.

    ddp     every rank holds the model; gradients are averaged (torch's `DistributedDataParallel`)
    fsdp2   every rank holds a shard of each parameter, gradient and moment; a block is gathered
            while it computes (torch's `fully_shard`)

`compress run ... trainer=ddp` starts its own followers on this machine; under torchrun, `accelerate
launch`, mpirun or srun, one node or many, nothing is started (`launchers.py`; the store must then
be on a file system that all nodes see). All ranks execute the same stage with the same batches, of
which each takes every world-th row; rank 0 alone writes checkpoints, scores and records.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils.other import get_free_port
from torch import nn

from compress.errors import ResourceError
from compress.models.blocks import blocks_of
from compress.models.empty import WHOLE, WeightPlace, read
from compress.train.launchers import launched

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
    variables = launched(os.environ)
    if processes == 1 or variables:
        with _named(variables), group() if variables else nullcontext():
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

    # A rank that dies closes its connections, which torch reports here.
    try:
        with _named(ranks[0]), group():
            yield
    except RuntimeError as error:
        if any(child.poll() not in (None, 0) for child in children):
            raise ResourceError(
                f"a training process died ({error}); the state is saved, repeat the command to"
                " go on"
            ) from error
        raise
    finally:
        failed = sys.exc_info()[0] is not None
        for child in children:
            if failed:
                child.terminate()
            child.wait()


@contextmanager
def _named(variables: dict[str, str]) -> Iterator[None]:
    """For the block, these variables in the environment."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def group() -> Iterator[None]:
    """For the block, the process group that RANK, WORLD_SIZE, MASTER_ADDR
    and MASTER_PORT describe.
    """
    if torch.cuda.is_available():
        # Launchers may show each process its GPU alone, which is then the first.
        here = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(here % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=WAIT
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


def shard(
    module: nn.Module, model: Any, precision: str, ignored: set[nn.Parameter] | None = None
) -> nn.Module:
    """`fully_shard` every block of `model`, then the whole `module` that holds it: parameters, but
    for those `ignored`, become DTensors.

    With bf16 they are gathered so; a batch keeps its types, for the teacher's probabilities in it
    would not add up to 1 in bf16.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    bf16 = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    policy = bf16 if precision == "bf16" else MixedPrecisionPolicy()
    for block in blocks_of(model):
        fully_shard(block, mp_policy=policy, ignored_params=ignored)
    sharded: Any = fully_shard(module, mp_policy=policy, ignored_params=ignored)
    return sharded


def to_device(module: nn.Module, device: torch.device) -> None:
    """Move what has memory; what has none stays without."""
    module._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))


@torch.no_grad()
def fill(module: nn.Module, places: dict[str, WeightPlace], device: torch.device) -> None:
    """Make room for the shards of an empty `module`, and read this rank's rows of each parameter
    from its place, by its name in `module`.
    """
    module._apply(
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
    for name, p in module.named_parameters():
        if name in places:
            part = local(p)
            at = rows(p) if hasattr(p, "full_tensor") else WHOLE
            if part.numel():
                part.copy_(read(places[name], at))


def unshard(module: nn.Module, folder: Path) -> None:
    """Put whole, plain parameters back into every submodule, on rank 0 alone: the others help, one
    parameter at a time, and keep their shards.

    They lie on the host, in files of `folder`, so that they take disk and not memory.
    """
    sharded: list[Any] = [p for p in module.parameters() if hasattr(p, "full_tensor")]
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    whole_parameters = {}
    for number, p in enumerate(sharded):
        gathered = p.detach().full_tensor()
        if rank() > 0:
            continue
        mapped = torch.from_file(
            str(folder / f"{number}.bin"), shared=True, size=gathered.numel(), dtype=gathered.dtype
        )
        mapped.copy_(gathered.flatten())
        whole_parameters[id(p)] = nn.Parameter(mapped.view(gathered.shape), p.requires_grad)
    for submodule in module.modules():
        submodule._parameters.update(
            {name: whole_parameters.get(id(p), p) for name, p in submodule._parameters.items()}
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, outside the autograd graph; a view, not a copy."""
    part: Any = tensor.detach()
    return part.to_local() if hasattr(part, "to_local") else part


def rows(sharded: Any) -> slice:
    """Which of a DTensor's first dimension this rank has, as `fully_shard` cuts it."""
    size = sharded.shape[0]
    each = -(-size // sharded.device_mesh.size())
    first = min(size, each * sharded.device_mesh.get_local_rank())
    return slice(first, min(size, first + each))


def like(part: torch.Tensor, sharded: Any) -> Any:
    """This rank's `part` of a tensor that is spread as `sharded` is: a DTensor, if that is one."""
    from torch.distributed.tensor import DTensor

    if not isinstance(sharded, DTensor):
        return part
    return DTensor.from_local(
        part,
        sharded.device_mesh,
        sharded.placements,
        run_check=False,
        shape=sharded.shape,
        stride=sharded.stride(),
    )


def spread(tensor: torch.Tensor, mesh: Any, rows: slice | None) -> Any:
    """A tensor that every rank has as a DTensor of which this one keeps `rows`; None: all."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    part = tensor if rows is None else tensor[rows].clone()
    placements = [Replicate() if rows is None else Shard(0)]
    return DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def add_up(tensor: torch.Tensor) -> None:
    """Make a tensor its sum over ranks."""
    if world() > 1:
        dist.all_reduce(tensor)


def offset(tensor: Any) -> list[int] | None:
    """Where this rank's part of a tensor begins in it; None where every rank has all of it."""
    from torch.distributed.tensor import DTensor, Replicate

    if not isinstance(tensor, DTensor) or isinstance(tensor.placements[0], Replicate):
        return None
    return [rows(tensor).start, *[0] * (tensor.dim() - 1)]
