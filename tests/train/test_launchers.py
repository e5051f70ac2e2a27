"""The same command under torchrun, accelerate and Slurm: what they say in the environment, and that
two processes of theirs train the same.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from warm import Forked

from compress.errors import ConfigError
from compress.train.launchers import first_node, launched

HERE = Path(__file__).parents[1]
RUN = (
    *("run", "smoke", "trainer=ddp", "trainer.threads=1"),
    *("pipeline=[depth,heal]", "export=none", "stages.heal.tokens=1024"),
    *("eval.time_stages=false", "eval.open_prompts=[]"),
)
SLURM = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def torchrun(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    start = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    return [(["-m", *start, "-m", "compress", *RUN], {})]


def accelerate(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    start = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    start.append(f"--main_process_port={free_port()}")
    return [(["-m", *start, "-m", "compress", *RUN], {"HF_HOME": str(folder)})]


def slurm(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    common = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    line = ["-m", "compress", *RUN]
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    return [(line, common | rank) for rank in ranks]


def weights(folder: Path, start) -> str:
    """The digest of the slot `heal` that these two processes train."""
    folder.mkdir()
    shared = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    processes = [Forked(line, folder, shared | variables) for line, variables in start(folder)]
    said = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    made = [
        json.loads(path.read_text()) for path in folder.glob("runs/.store/entries/*/stage.json")
    ]
    (healed,) = [stage for stage in made if stage["inputs"].get("technique") == "distill"]
    assert healed["inputs"]["world"] == 2
    return str(healed["files"]["model.safetensors"]["sha256"])


@pytest.fixture(scope="module")
def digests() -> set[str]:
    return set()


@pytest.mark.parametrize(
    "start",
    [torchrun, *(pytest.param(other, marks=pytest.mark.slow) for other in (slurm, accelerate))],
)
def test_two_processes_train_the_same_whoever_started_them(start, digests, tmp_path):
    digests.add(weights(tmp_path / "run", start))
    assert len(digests) == 1


@pytest.mark.parametrize(
    "environment, variables",
    [
        ({}, {}),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, {}),  # a batch script
        (SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, {}),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "a", "MASTER_PORT": "7"}
            | SLURM,
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "a", "MASTER_PORT": "7"},
        ),
        (
            SLURM
            | {"SLURM_PROCID": "6", "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "7"}
            | {"SLURM_LOCALID": "0", "SLURM_NODEID": "3", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1"}
            | {"SLURM_STEP_NODELIST": "gpu[007-009,12],x", "SLURM_JOB_ID": "1001"},
            {"RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            | {"MASTER_ADDR": "gpu007", "MASTER_PORT": "23008"},
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
            | {"OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
            {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"},
        ),
    ],
)
def test_variables_of_every_launcher_become_those_of_torchrun(environment, variables):
    assert launched(environment) == variables


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"RANK": "1"}, "RANK is set and WORLD_SIZE is None: torchrun gives each process both"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK is 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 is not below WORLD_SIZE=2"),
        (
            {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},
            "several machines, and MASTER_ADDR is not set",
        ),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1"}, "SLURM_PROCID=1 is not below SLURM_STEP_NUM_TASKS"),
    ],
)
def test_half_an_environment_is_refused(environment, message):
    with pytest.raises(ConfigError, match=message):
        launched(environment)


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[03-07]", "n03"),
        ("n[3,5]-ib,x", "n3-ib"),
        ("n12,n[1-2]", "n12"),
    ],
)
def test_the_first_node_of_a_list_is_where_ranks_meet(nodes, first):
    assert first_node(nodes) == first
