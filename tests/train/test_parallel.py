"""Two gloo processes on the CPU give the numbers of one; a killed rank leaves a run that goes on;
the command starts its own followers.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from smoke_runs import FAST
from warm import Forked

from compress.__main__ import main

HERE = Path(__file__).parents[1]


def start(line, world):
    """So many processes of a line, under torchrun's variables; their exit codes and outputs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} if world > 1 else {} for r in range(world)]
    processes = [Forked(line, HERE.parent, shared | own, together=True) for own in ranks]
    outputs = [process.communicate()[0] for process in processes]
    return [process.returncode for process in processes], outputs


def launch(kind, folder, teacher, steps=4, stop=-1, world=2):
    folder.mkdir(exist_ok=True)
    if not (folder / "teacher").exists():
        shutil.copytree(teacher, folder / "teacher")
    return start([str(HERE / "one_rank.py"), kind, str(folder), str(steps), str(stop)], world)


def result(folder):
    return json.loads((folder / "curve.json").read_text()), load_file(folder / "final.safetensors")


@pytest.fixture(scope="module")
def single(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    codes, outputs = launch("none", folder, tiny_teacher, world=1)
    assert codes == [0], outputs
    return result(folder)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_give_the_losses_of_one_and_resume_after_a_killed_rank(
    kind, single, tiny_teacher, tmp_path
):
    codes, outputs = launch(kind, tmp_path / "a", tiny_teacher)
    assert codes == [0, 0], outputs
    (about, weights), (expected, expected_weights) = result(tmp_path / "a"), single
    assert about["sharded"] == (about["parameters"] if kind == "fsdp2" else 0)
    for ours, theirs in zip(about["curve"], expected["curve"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    assert about["validation"]["validation_kl_best_nats"] == pytest.approx(
        expected["validation"]["validation_kl_best_nats"], rel=1e-4
    )
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)

    codes, outputs = launch(kind, tmp_path / "b", tiny_teacher, stop=2)
    assert codes[1] == -9 and codes[0] != 0, outputs
    assert len(list((tmp_path / "b" / "work").glob("state-*"))) == 1
    codes, outputs = launch(kind, tmp_path / "b", tiny_teacher)
    assert codes == [0, 0] and "resuming at step" in outputs[0], outputs
    assert all(
        torch.equal(tensor, weights[name]) for name, tensor in result(tmp_path / "b")[1].items()
    )


@pytest.mark.parametrize("precision", ["bf16", "bf16_stochastic"])
def test_shards_train_in_bf16_as_one_process_does(precision, tiny_teacher, tmp_path):
    made = []
    for kind, world in (("none", 1), ("fsdp2", 2)):
        codes, outputs = launch(
            f"{kind}-{precision}", tmp_path / kind, tiny_teacher, steps=3, world=world
        )
        assert set(codes) == {0}, outputs
        made.append(result(tmp_path / kind)[0])
    assert made[1]["sharded"] == made[1]["parameters"]
    assert (
        made[0]["types"] == made[1]["types"] == ["torch.float32"]
    )  # the teacher's probabilities, which add up to 1
    for ours, theirs in zip(made[1]["curve"], made[0]["curve"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=2e-2)


def test_ranks_that_write_text_of_their_own_round_alike(tiny_teacher, tmp_path):
    codes, outputs = launch("ddp-rollouts-bf16_stochastic", tmp_path, tiny_teacher, steps=2)
    assert codes == [0, 0], outputs
    first, second = result(tmp_path)[1], load_file(tmp_path / "rank1.safetensors")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_rank_waits_for_another_longer_than_any_stage_takes(monkeypatch):
    from compress.train import parallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }.items():
        monkeypatch.setenv(name, value)
    with parallel.group():
        group = torch.distributed.distributed_c10d._get_default_group()
        assert group._get_backend(torch.device("cpu")).options._timeout.days >= 7


def test_a_sharded_teacher_gives_the_losses_of_a_whole_one(tiny_teacher, tmp_path):
    curves = []
    for kind, world in (("none-online", 1), ("fsdp2-online", 2)):
        codes, outputs = launch(kind, tmp_path / kind, tiny_teacher, steps=2, world=world)
        assert codes == [0] * world, outputs
        curves.append([row["loss"] for row in result(tmp_path / kind)[0]["curve"]])
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize(
    "before, after",
    [
        (("fsdp2", 2), ("none", 1)),
        (("none", 1), ("fsdp2", 2)),
        pytest.param(("fsdp2", 2), ("fsdp2", 4), marks=pytest.mark.slow),
        pytest.param(("fsdp2-learned-sgd", 2), ("none-learned-sgd", 1), marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_goes_on_from_a_state(
    before, after, single, tiny_teacher, tmp_path
):
    (kind, world), (next_kind, next_world) = before, after
    codes, outputs = launch(kind, tmp_path / "a", tiny_teacher, stop=2, world=world)
    assert codes[-1] == -9, outputs
    codes, outputs = launch(next_kind, tmp_path / "a", tiny_teacher, world=next_world)
    assert codes == [0] * next_world and "resuming at step" in outputs[0], outputs
    expected, expected_weights = single
    if "sgd" in kind:
        launch(next_kind, tmp_path / "b", tiny_teacher, world=1)
        expected, expected_weights = result(tmp_path / "b")

    # The same rows in the same order, and the numbers of an unbroken run within rounding.
    about, weights = result(tmp_path / "a")
    assert [row["step"] for row in about["curve"]] == [0, 1, 2, 3]
    for ours, theirs in zip(about["curve"], expected["curve"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert about["validation"]["validation_kl_best_nats"] == pytest.approx(
        expected["validation"]["validation_kl_best_nats"], rel=1e-4
    )
    for name, tensor in expected_weights.items():
        if name.endswith(".codes"):
            assert (weights[name] != tensor).float().mean() < 1e-4, name
        else:
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_the_command_starts_its_own_followers(kind, tmp_path):
    line = [
        "-m",
        "compress",
        "run",
        "smoke",
        f"trainer={kind}",
        "trainer.processes=2",
        "trainer.threads=1",
        "pipeline=[depth,heal,chat]",
        "export=none",
        "eval.open_prompts=[]",
        *FAST,
    ]
    leader = Forked(line, tmp_path, os.environ | {"PYTHONPATH": str(HERE.parent)})
    _, said = leader.communicate()
    assert leader.returncode == 0, said
    records = [
        json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/smoke/*/*/record.json"))
    ]
    assert [record["slot"] for record in records] == ["teacher", "depth", "heal", "chat"]
    assert len(list(tmp_path.glob("runs/smoke/*"))) == 1


def test_a_batch_that_two_processes_cannot_share_is_refused(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    processes = ["trainer=ddp", "trainer.processes=2"]
    assert main(["run", "smoke", *processes, "stages.heal.batch_sequences=3"]) == 2
    assert (
        "stages.heal.batch_sequences=3 can't be shared by 2 processes; use a multiple of that"
        in capfd.readouterr().err
    )


def test_processes_without_a_way_to_train_together_are_refused(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "PYTHONPATH": str(HERE.parent),
    }
    line = ["-m", "compress", "run", "smoke"]
    ranks = [
        Forked(line, tmp_path, shared | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)
    ]
    said = [process.communicate()[1] for process in ranks]
    assert (
        ranks[0].returncode == 2
        and "2 processes were started, but trainer.parallel=none; use trainer=ddp" in said[0]
    )
    assert ranks[1].returncode != 0
