"""The plan's numbers: parameters from a config alone, and costs that grow with the work."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_families import TINY, config_of

from compress import planning
from compress.budget import Budget
from compress.config import Recipe, Teacher
from compress.errors import ConfigError, ResourceError, amount
from compress.formats.settings import Export
from compress.models.checkpoint import load_model, read_config
from compress.pipeline import run
from compress.planning import estimate, matmul_flops_per_sec, params_of, step_flops_per_sec
from compress.quant.settings import Allocation, GridName
from compress.score.settings import Eval
from compress.stages import STAGES
from compress.text.settings import Data
from compress.train.settings import Trainer

BOTH = ["gguf:Q4_0", "compressed_tensors"]


def stages_on(grid):
    qat = STAGES["qat"](tokens=1000, grid=GridName(grid))
    return {
        "depth": STAGES["prune_depth"](blocks=1),
        "heal": STAGES["distill"](tokens=1000),
        "qat": qat,
    }


def recipe(**changes):
    stages = stages_on("q4_0")
    parts = {
        "teacher": Teacher(),
        "data": Data(["embedded:docstrings"], [], ["embedded:topics"], 64),
        "eval": Eval(),
        "budget": Budget(),
        "export": Export(BOTH),
        "trainer": Trainer(),
        "stages": stages,
        "pipeline": ["depth", "heal", "qat"],
    }
    return Recipe(**(parts | changes))


class Opened:
    precision = "fp32"

    def __init__(self, program):
        self.recipe = program


def costs(teacher, program):
    shapes = {"teacher": read_config(teacher)}
    for slot, parent in program.steps():
        shapes[slot] = program.stages[slot].check_shape(dict(shapes[parent]))
    return {cost.slot: cost for cost in estimate(Opened(program), shapes, rate=1e9)}


def test_parameters_are_counted_from_the_config_alone(tiny_teacher):
    assert params_of(read_config(tiny_teacher)) == load_model(tiny_teacher).num_parameters()


def test_more_tokens_cost_more_time_and_smaller_students_less_memory(tiny_teacher):
    few = costs(tiny_teacher, recipe())
    assert few.keys() == {"teacher", "depth", "heal", "qat", "gguf_q4_0", "compressed_tensors"}
    assert few["heal"].params < few["teacher"].params
    stages = recipe().stages | {"heal": STAGES["distill"](tokens=100_000)}
    assert costs(tiny_teacher, recipe(stages=stages))["heal"].seconds > 5 * few["heal"].seconds
    assert matmul_flops_per_sec(n=64, seconds=0.01) > 0


@pytest.mark.parametrize("technique", ["ptq", "qat"])
def test_a_mixture_costs_the_time_that_measuring_takes(tiny_teacher, technique):
    def seconds(**allocate):
        stage = STAGES[technique](allocate=Allocation(**allocate))
        export = Export(["gguf:MIXED" if allocate else "gguf:Q4_0"])
        program = recipe(pipeline=["qat"], stages={"qat": stage}, export=export)
        return costs(tiny_teacher, program)["qat"].seconds

    # Seven places of four blocks, on three grids, each through half of the model, at 1e9 a second.
    config = read_config(tiny_teacher)
    blocks, grids = config["num_hidden_layers"], [GridName.q4_0, GridName.q5_0, GridName.q8_0]
    a_pass = 2 * params_of(config) * recipe().data.seq_len / 1e9
    one_by_one = seconds(bits_per_weight=5, grids=grids) - seconds()
    together = seconds(bits_per_weight=5, grids=grids, blocks_together=blocks) - seconds()
    assert blocks == 4 and one_by_one == pytest.approx(42 * a_pass)
    assert together == pytest.approx(11 * a_pass)


@pytest.mark.parametrize("name", TINY)
def test_a_few_blocks_of_every_family_can_be_timed(name):
    config = config_of(name).to_dict()
    assert step_flops_per_sec(config, 16, "fp32") > 0


def test_what_can_not_be_timed_counts_by_square_products(tiny_teacher, monkeypatch):
    config, opened = read_config(tiny_teacher), Opened(recipe())
    monkeypatch.setattr(planning, "matmul_flops_per_sec", lambda **_: 7e9)
    assert planning.rate_of(opened, config) != 3.5e9
    assert planning.rate_of(opened, config | {"num_hidden_layers": 0}) == 3.5e9
    monkeypatch.setattr(planning, "room_here", lambda: planning.Room(None, 10**6))
    assert planning.rate_of(opened, config) == 3.5e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pipeline": ["depth", "heal", "heal"]}, "'heal' twice"),
        (
            {"pipeline": ["depth", "heal@qat"]},
            "pipeline: 'heal' branches off 'qat', which does not run before it",
        ),
        (
            {"pipeline": ["qat", "depth"]},
            "impossible order: 'depth' .prune_depth. comes after 'qat'",
        ),
        ({"ship": "hael"}, "did you mean 'heal'"),
        (
            {"export": Export(["gguf:Q8_0"])},
            (
                "re-round slot 'qat', which is on the grid q4_0, .* q8_0; export it as gguf:Q4_0,"
                " compressed_tensors"
            ),
        ),
        (
            {"stages": stages_on("q5_0"), "export": Export(["compressed_tensors"])},
            "is on the grid q5_0, .*int4_g32.*; export it as gguf:Q5_0$",
        ),
        (
            {"stages": stages_on("int4_g64")},
            (
                "gguf:Q4_0 would re-round slot 'qat', .* grid int4_g64, .*; export it as"
                " compressed_tensors$"
            ),
        ),
        (
            {"pipeline": ["depth", "heal"]},
            (
                "compressed_tensors writes codes, and slot 'heal' has none; ship a ptq or qat slot"
                " on q4_0, q8_0"
            ),
        ),
        ({"stages": {"depth": {}, "heal": 3, "qat": None}}, "is no stage; write it as"),
    ],
)
def test_impossible_programs_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**changes)


def test_a_branch_takes_the_named_parent():
    program = recipe(pipeline=["depth", "heal", "qat@depth"], ship="heal", export=Export())
    assert program.steps() == [("depth", "teacher"), ("heal", "depth"), ("qat", "depth")]
    assert program.shipped_slot() == "heal"


def lost_before_work(tmp_path, **changes):
    """Why a recipe is refused, of whose run nothing is left."""
    with pytest.raises(ValueError) as refusal:
        run(recipe(store=str(tmp_path / "store"), **changes), tmp_path / "run", [])
    assert not (tmp_path / "run").exists()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("slot", "stage", "columns"),
    [
        ("depth", STAGES["prune_depth"](blocks=1), "fold_sequences: 4 .* weigh 192 columns"),
        ("heads", STAGES["prune_heads"](kv_groups=1), "calibration_sequences: 4 .* 64 columns"),
        ("width", STAGES["prune_width"](ffn=128), "calibration_sequences: 4 .* 192 columns"),
    ],
)
def test_too_little_text_for_a_cut_behind_others_is_refused_before_any_of_them(
    tiny_teacher, tmp_path, slot, stage, columns
):
    """Of 32 tokens a row, of which every eighth is held out."""
    (tmp_path / "few.txt").write_text("Words that are read, and no more of them than these. " * 6)
    few = str(tmp_path / "few.txt")
    stages = recipe().stages | {"vocab": STAGES["prune_vocab"](ids=448), slot: stage}
    reason = lost_before_work(
        tmp_path,
        teacher=Teacher(str(tiny_teacher)),
        data=Data([few], [], ["embedded:topics"], 32),
        stages=stages,
        pipeline=["vocab", slot, "qat"],
    )
    assert re.search(f"slot '{slot}' after 'vocab': prune_{slot}.{columns}: needed are 8", reason)


def test_a_quantized_teacher_is_refused_before_work(tiny_teacher, tmp_path):
    teacher = tmp_path / "quantized"
    shutil.copytree(tiny_teacher, teacher)
    (teacher / "quant.safetensors").write_bytes(b"")
    reason = lost_before_work(tmp_path, teacher=Teacher(str(teacher)))
    assert f"slot 'depth' after 'teacher': {teacher} is quantized already" in reason
    assert "start from an unquantized checkpoint" in reason


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="there is no second disk",
)
def test_room_is_asked_of_both_disks_and_told_when_it_ends(tiny_teacher, tmp_path, monkeypatch):
    """Free bytes by folder; a run directory on the store's disk needs its room besides."""
    program = recipe()
    opened = Opened(program)
    opened.store = SimpleNamespace(root=tmp_path / "store")
    opened.store.root.mkdir()
    planned = [*costs(tiny_teacher, program).values()]
    in_store = sum(cost.disk_bytes for cost in planned)
    weights, files = planning._bundle_bytes(opened, planned)
    assert weights == 4 * next(cost.params for cost in planned if cost.slot == "qat") and files > 0

    # On one disk the files' second copy is among the costs.
    free = {"here": in_store + weights}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, free["here"]))
    planning.check_disk(opened, planned, tmp_path / "runs" / "new")
    free["here"] -= 1
    with pytest.raises(ResourceError, match="may need .* MB in .*store=DIR"):
        planning.check_disk(opened, planned, tmp_path / "runs" / "new")
    planning.check_disk(opened, planned)

    # A folder on another disk is asked by itself.
    free["here"] = in_store
    other = Path("/dev/shm/new")
    planning.check_disk(opened, planned, other)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: usage(0, 0, 0 if path == other.parent else in_store)
    )
    with pytest.raises(ResourceError, match="may need .* in /dev/shm, 0 bytes .*hydra.run.dir=DIR"):
        planning.check_disk(opened, planned, other)

    # What is done is not needed again.
    done = ["teacher", *program.pipeline]
    error = planning.told_needs(OSError(28, "No space left on device"), opened, planned, done)
    left = sum(cost.disk_bytes for cost in planned if cost.slot not in done)
    assert f"may need {amount(left)} in {opened.store.root}" in str(error)
