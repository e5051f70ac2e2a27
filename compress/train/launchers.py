"""Who started this process beside others, read from the environment: torchrun, `accelerate launch`,
mpirun or Slurm's srun. The command is the same under all of them; their names are in LAUNCHERS.

`accelerate launch` sets torchrun's names, or starts mpirun on CPUs. All ranks meet at MASTER_ADDR
and MASTER_PORT; where nobody has set them, on this machine if all are here, and under Slurm on the
first node of the step's list, which has rank 0, at a port that follows from the job's number.

Inside of a batch script SLURM_PROCID is 0 and SLURM_NTASKS the whole job's, though nothing but the
script has been started; what srun started has a step (SLURM_STEP_ID) besides. So the variables
count with a step, or with MASTER_ADDR, which nobody sets for a process that is alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from compress.errors import ConfigError

Environment = Mapping[str, str]
LOWEST_PORT, PORTS = 15_000, 15_000  # ports that Slurm's jobs are spread over
PORT = "29500"  # torch's own


class Names(NamedTuple):
    """What a launcher calls the four numbers: this process's among all, how many these are, and
    both again of this machine.
    """

    launcher: str
    rank: str
    world: str
    local_rank: str
    local_world: str


# The first whose rank and local rank are there counts: mpirun may itself have been started by srun.
LAUNCHERS = (
    Names("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    Names(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Names("Intel MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    Names("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
)


def launched(environment: Environment) -> dict[str, str]:
    """torchrun's variables for this process, whoever started it: RANK, WORLD_SIZE, LOCAL_RANK,
    LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT; {} where it was started alone.

    ConfigError naming the variable that lacks, or is no such number.
    """
    names = next((row for row in LAUNCHERS if _counts(row, environment)), None)
    if names is None:
        return {}

    # The four numbers; of a step with fewer tasks than the job, the step's.
    rank = _number(environment, names.rank, names)
    world_name = names.world
    if names.launcher == "Slurm" and "SLURM_STEP_NUM_TASKS" in environment:
        world_name = "SLURM_STEP_NUM_TASKS"
    world = _number(environment, world_name, names)
    if rank >= world:
        raise ConfigError(
            f"{names.rank}={rank} is not below {world_name}={world}: ranks are counted from 0;"
            f" start all processes by one call of {names.launcher}, or unset {names.rank}"
        )

    # One task of Slurm's is a process alone, which may start others itself.
    if names.launcher == "Slurm" and world == 1:
        return {}

    # Those of this machine; the local rank of one machine is the rank.
    local_world = _local_world(environment, names, world)
    local_rank = rank
    if names.local_rank in environment:
        local_rank = _number(environment, names.local_rank, names)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world),
        "MASTER_ADDR": _address(environment, names, local_world == world),
        "MASTER_PORT": _port(environment, names),
    }


def _counts(names: Names, environment: Environment) -> bool:
    """Whether this launcher has started the process."""
    if names.rank not in environment:
        return False
    if names.launcher == "Slurm":
        return "SLURM_STEP_ID" in environment or "MASTER_ADDR" in environment
    return names.launcher == "torchrun" or names.local_rank in environment


def _number(environment: Environment, name: str, names: Names) -> int:
    text = environment.get(name)
    if text is None or not re.fullmatch(r"\d{1,9}", text):
        raise ConfigError(
            f"{names.rank} is set and {name} is {text!r}: {names.launcher} gives each process both,"
            f" as whole numbers; start by it, or unset {names.rank}"
        )
    return int(text)


def _local_world(environment: Environment, names: Names, world: int) -> int:
    """Processes on this machine; all of them where nothing says otherwise."""
    if names.launcher != "Slurm":
        named = names.local_world in environment
        return _number(environment, names.local_world, names) if named else world

    # As "2(x3),1": two on each of three nodes, one on the next.
    text = environment.get(names.local_world) or environment.get("SLURM_TASKS_PER_NODE", "")
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    node = int(environment.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else world


def _address(environment: Environment, names: Names, one_machine: bool) -> str:
    """Where rank 0 waits for the others."""
    if address := environment.get("MASTER_ADDR"):
        return address
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    if names.launcher == "Slurm" and nodes:
        return first_node(nodes)
    if one_machine:
        return "127.0.0.1"
    raise ConfigError(
        f"{names.launcher} started processes on several machines, and MASTER_ADDR is not set: set"
        " it to the address of the machine with rank 0"
    )


def _port(environment: Environment, names: Names) -> str:
    """The port there; jobs of Slurm that share a machine get several."""
    if port := environment.get("MASTER_PORT"):
        return port
    if names.launcher == "Slurm":
        job, step = (environment.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        return str(LOWEST_PORT + (int(job) * 8 + int(step)) % PORTS)
    return PORT


def first_node(nodes: str) -> str:
    """The first name of a list as Slurm writes it: "gpu[007-009,12],login1" begins with gpu007."""
    pattern = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in pattern.groups()) if pattern else nodes
