"""`quant/allocate.py`: the knapsack against brute force, damage against a plain recomputation, and
what is refused.
"""

from __future__ import annotations

import itertools
import json
import random

import pytest
import torch
from conftest import make_context
from transformers import LlamaConfig, LlamaForCausalLM

from compress.quant.allocate import _Calibration, choose, lies_on, options
from compress.quant.codes import quantizable
from compress.quant.grids import GRIDS


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )


def _kl(model: LlamaForCausalLM, ids: torch.Tensor, full: torch.Tensor) -> float:
    with torch.no_grad():
        log_q = model(ids).logits.double().log_softmax(-1)
    return float((full.exp() * (full - log_q)).sum(-1).mean())


def test_the_cost_is_the_kl_of_one_matrix_on_one_grid_and_the_model_stays_as_it_was(tmp_path):
    model, ids = _model(), torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = options(
        model, ids, ["q4_0", "q8_0", "q6_k"], tmp_path / "kept.json", "label", lambda line: None
    )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    with torch.no_grad():
        full = model(ids).logits.double().log_softmax(-1)
        for name, home in quantizable(model).items():
            assert set(made[name]) == {"q4_0", "q8_0"} | (
                {"q6_k"} if home.weight.shape[1] == 256 else set()
            )
            for grid, (cost, size) in made[name].items():
                codes = GRIDS[grid].encode(before[name])
                home.weight.copy_(GRIDS[grid].decode(*codes))
                assert (
                    cost == pytest.approx(_kl(model, ids, full), rel=2e-3, abs=2e-7)
                    and size == GRIDS[grid].pack(*codes).numel()
                )
                home.weight.copy_(before[name])
            assert made[name]["q4_0"][0] > made[name]["q8_0"][0] > 0
    with pytest.raises(
        ValueError,
        match=r"embed_tokens\.weight has rows of 64: none of q4_k, q6_k takes them; add q8_0",
    ):
        options(model, ids, ["q4_k", "q6_k"], tmp_path / "kept.json", "label", lambda line: None)


def test_a_matrix_that_lies_on_a_grid_loses_nothing_there_and_is_not_measured(
    tmp_path, monkeypatch
):
    model, ids = _model(), torch.arange(24)[None]
    first, *others = quantizable(model)
    with torch.no_grad():
        held = model.get_parameter(first)
        held.copy_(GRIDS["q4_1"].decode(*GRIDS["q4_1"].encode(held.clone())))
    measured, divergence = [], _Calibration.divergence
    monkeypatch.setattr(
        _Calibration,
        "divergence",
        lambda self, name: measured.append(name) or divergence(self, name),
    )
    made = options(model, ids, ["q4_0", "q4_1"], tmp_path / "kept.json", "label", lambda line: None)
    assert made[first]["q4_1"][0] == 0 < made[first]["q4_0"][0]
    assert measured.count(first) == 1 and all(measured.count(name) == 2 for name in others)
    assert all(made[name]["q4_1"][0] > 0 for name in others)


def test_no_grid_of_as_many_bits_is_tried_beside_one_that_a_matrix_lies_on(tmp_path):
    model, ids, grids = _model(), torch.arange(24)[None], ["q4_0", "q4_1", "q5_0", "q8_0"]
    assert lies_on(model, grids) == []
    with torch.no_grad():
        for name, matrix in quantizable(model).items():
            if "layers.1." in name:
                matrix.weight.copy_(GRIDS["q4_1"].decode(*GRIDS["q4_1"].encode(matrix.rows)))
    assert lies_on(model, [*grids, "q4_k"]) == ["q4_1"]

    # The middle of two blocks is the second; the first is tried on all grids.
    made = options(model, ids, grids, tmp_path / "kept.json", "label", lambda line: None)
    for name, choices in made.items():
        assert list(choices) == (grids[:2] if "layers.1." in name else grids), name
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight").sin_()
    assert lies_on(model, grids) == []


def test_what_was_measured_before_a_kill_is_not_measured_again(tmp_path):
    kept = tmp_path / "kept.json"
    names = list(quantizable(_model()))
    kept.write_text(json.dumps(dict.fromkeys(names[:-1], {"q4_0": 7.0, "q8_0": 3.0})))
    ids = torch.zeros(1, 8, dtype=torch.long)
    made = options(_model(), ids, ["q4_0", "q8_0"], kept, "label", lambda line: None)
    assert [made[name]["q4_0"][0] for name in names[:-1]] == [7.0] * (len(names) - 1)
    assert made[names[-1]]["q4_0"][0] != 7.0 and made[names[-1]]["q8_0"][0] != 3.0
    damages = {
        name: {grid: damage for grid, (damage, _) in grids.items()} for name, grids in made.items()
    }
    assert damages == json.loads(kept.read_text())


def test_a_matrix_that_has_no_choice_is_not_measured(tmp_path):
    kept, ids = tmp_path / "kept.json", torch.arange(24)[None]
    made = options(_model(), ids, ["q4_0", "q4_k"], kept, "label", lambda line: None)
    downs = [f"model.layers.{i}.mlp.down_proj.weight" for i in (0, 1)]
    assert [name for name, grids in made.items() if len(grids) == 2] == downs
    assert list(json.loads(kept.read_text())) == downs
    assert all(min(cost for cost, _ in made[name].values()) > 0 for name in downs)
    others = [grids for name, grids in made.items() if name not in downs]
    assert all(list(grids) == ["q4_0"] and grids["q4_0"][0] == 0 for grids in others)

    # Nor is any where none has.
    made = options(_model(), ids, ["q4_0"], tmp_path / "none.json", "label", lambda line: None)
    assert choose(made, 10**6) == dict.fromkeys(made, "q4_0")


def test_a_grid_that_is_asked_for_later_is_measured_alone(tmp_path):
    kept, ids = tmp_path / "kept.json", torch.zeros(1, 8, dtype=torch.long)
    names = list(quantizable(_model()))
    kept.write_text(json.dumps(dict.fromkeys(names, {"q8_0": 7.0})))
    made = options(_model(), ids, ["q4_0", "q8_0"], kept, "label", lambda line: None)
    other = tmp_path / "other.json"
    alone = options(_model(), ids, ["q4_0", "q5_0"], other, "label", lambda line: None)
    assert all(made[name]["q8_0"][0] == 7.0 for name in names)
    assert all(made[name]["q4_0"] == alone[name]["q4_0"] for name in names)


def test_neighbours_measured_at_once_share_what_they_lose_by_their_weights(tmp_path):
    model, ids = _model(), torch.arange(24)[None]
    # Of one pair a matrix lies on q4_1: it is in no measurement of q5_0.
    held = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        held.copy_(GRIDS["q4_1"].decode(*GRIDS["q4_1"].encode(held.clone())))
        full = model(ids).logits.double().log_softmax(-1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = options(
        model,
        ids,
        ["q4_0", "q4_1", "q5_0"],
        tmp_path / "kept.json",
        "label",
        lambda line: None,
        blocks_together=2,
    )
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    for place in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"):
        names = [f"model.layers.{i}.{place}.weight" for i in (0, 1)]
        for grid in ("q4_0", "q4_1", "q5_0"):
            taking = [name for name in names if grid in made[name]]
            with torch.no_grad():
                for name in taking:
                    weight = model.get_parameter(name)
                    weight.copy_(GRIDS[grid].decode(*GRIDS[grid].encode(before[name])))
                lost = _kl(model, ids, full)
                for name in taking:
                    model.get_parameter(name).copy_(before[name])
            shares = [made[name][grid][0] for name in taking]
            assert len(taking) == (1 if (place, grid) == ("mlp.up_proj", "q5_0") else 2)
            assert shares == pytest.approx([lost / len(taking)] * len(taking), rel=2e-3, abs=2e-7)

    # Each matrix alone loses something else.
    other = tmp_path / "other.json"
    alone = options(model, ids, ["q4_0", "q8_0"], other, "label", lambda line: None)
    assert alone["model.layers.0.mlp.down_proj.weight"]["q4_0"][0] != pytest.approx(
        made["model.layers.0.mlp.down_proj.weight"]["q4_0"][0], rel=1e-3
    )
    embedding = "model.embed_tokens.weight"
    assert alone[embedding]["q4_0"] == made[embedding]["q4_0"]


def test_two_stages_of_one_parent_measure_once(tiny_teacher, tmp_path):
    from compress.models.checkpoint import load_model
    from compress.quant.settings import Allocation, GridName
    from compress.stages.ptq import Ptq
    from compress.stages.qat import Qat

    (notes := tmp_path / "notes").mkdir()
    allocate = Allocation(file_bytes=190_000, grids=[GridName.q4_0, GridName.q8_0])
    lines: list[str] = []
    layouts = []
    for label, stage in (("first", Ptq(allocate=allocate)), ("second", Qat(allocate=allocate))):
        context = make_context(tiny_teacher, tmp_path, notes=notes, log=lines.append, label=label)
        layouts.append(stage.layout(load_model(tiny_teacher), tiny_teacher, context))
    measured = [line for line in lines if "damage of each matrix" in line]
    assert measured and all(line.startswith("first") for line in measured)
    assert layouts[0] == layouts[1] and len(set(layouts[0].values())) == 2
    assert len(list(notes.iterdir())) == 1

    # Of another text they are others.
    other = make_context(tiny_teacher, tmp_path, notes=notes)
    more = Allocation(file_bytes=190_000, grids=allocate.grids, calibration_sequences=2)
    Ptq(allocate=more).layout(load_model(tiny_teacher), tiny_teacher, other)
    assert len(list(notes.iterdir())) == 2

    # So they are of matrices that are measured together.
    pairs = Allocation(file_bytes=190_000, grids=allocate.grids, blocks_together=2)
    Ptq(allocate=pairs).layout(load_model(tiny_teacher), tiny_teacher, other)
    assert len(list(notes.iterdir())) == 3


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_best_of_all(seed):
    rng = random.Random(seed)
    table = {
        f"m{i}": {
            grid: (rng.random() / (4**bits), rng.randint(5, 9) * bits)
            for grid, bits in (("a", 4), ("b", 5), ("c", 8))
        }
        for i in range(6)
    }
    least, most = (
        sum(pick(size for _, size in grids.values()) for grids in table.values())
        for pick in (min, max)
    )
    budget = (least + most) // 2

    def total(layout: dict[str, str], what: int) -> float:
        return sum(table[name][grid][what] for name, grid in layout.items())

    best = min(
        (dict(zip(table, grids, strict=True)) for grids in itertools.product("abc", repeat=6)),
        key=lambda layout: total(layout, 0) if total(layout, 1) <= budget else float("inf"),
    )
    chosen = choose(table, budget)
    assert total(chosen, 1) <= budget and total(chosen, 0) == pytest.approx(
        total(best, 0), rel=1e-9
    )


def test_a_budget_below_the_smallest_possible_file_is_refused():
    table = {"a": {"q4_0": (1.0, 100), "q8_0": (0.1, 190)}, "b": {"q4_0": (1.0, 50)}}
    assert choose(table, 150) == {"a": "q4_0", "b": "q4_0"}
    with pytest.raises(
        ValueError, match="take at least 150 bytes on the grids given, the budget leaves 149"
    ):
        choose(table, 149)


@pytest.mark.parametrize("technique", ["ptq", "qat"])
def test_a_stage_meets_the_byte_budget_with_a_mixture(tiny_teacher, tmp_path, technique):
    from compress.formats.gguf import export_gguf, overhead_bytes
    from compress.quant.codes import load_quantized
    from compress.quant.settings import Allocation, GridName
    from compress.stages.ptq import Ptq
    from compress.stages.qat import Qat

    whole = {}
    for grid in ("q4_0", "q8_0"):
        Ptq(GridName(grid)).run(tiny_teacher, tmp_path / grid, make_context(tiny_teacher, tmp_path))
        export_gguf(tmp_path / grid, tmp_path / f"{grid}.gguf", grid.upper())
        whole[grid] = (tmp_path / f"{grid}.gguf").stat().st_size
    budget = int(whole["q4_0"] + whole["q8_0"]) // 2
    allocate = Allocation(file_bytes=budget, grids=[GridName.q4_0, GridName.q8_0])
    stage = (
        Ptq(allocate=allocate) if technique == "ptq" else Qat(tokens=32 * 4 * 2, allocate=allocate)
    )
    assert stage.layout_name == "mixed"
    context = make_context(tiny_teacher, tmp_path, file_overhead=overhead_bytes)
    stage.run(tiny_teacher, tmp_path / "out", context)
    assert {q.grid for q in load_quantized(tmp_path / "out").values()} == {"q4_0", "q8_0"}
    export_gguf(tmp_path / "out", tmp_path / "mixed.gguf", "MIXED")
    made = (tmp_path / "mixed.gguf").stat().st_size
    assert whole["q4_0"] < made <= budget and overhead_bytes(tiny_teacher) < whole["q4_0"]
    with pytest.raises(ValueError, match=r"take at least .* bytes on the grids given"):
        Ptq(allocate=Allocation(file_bytes=overhead_bytes(tiny_teacher) + 10)).run(
            tiny_teacher, tmp_path / "none", context
        )


def test_a_mixture_meets_a_limit_in_bits_whatever_the_size_of_the_model(tiny_teacher, tmp_path):
    from compress.models.checkpoint import load_model
    from compress.quant.settings import Allocation, GridName
    from compress.stages.ptq import Ptq

    grids = [GridName.q4_0, GridName.q8_0]
    model = load_model(tiny_teacher)
    context = make_context(tiny_teacher, tmp_path)
    weights = {name: matrix.weight.numel() for name, matrix in quantizable(model).items()}
    bits = {}
    for limit in (4.5, 6.0, 8.5):
        allocate = Allocation(bits_per_weight=limit, grids=grids)
        layout = Ptq(allocate=allocate).layout(model, tiny_teacher, context)
        total = sum(weights[name] * GRIDS[grid].bits_per_weight for name, grid in layout.items())
        bits[limit] = total / sum(weights.values())
    assert bits[4.5] == 4.5 and 5.0 < bits[6.0] <= 6.0 and bits[8.5] == 8.5
    with pytest.raises(ValueError, match=r"take at least .* bytes on the grids given"):
        allocate = Allocation(bits_per_weight=4.4, grids=grids)
        Ptq(allocate=allocate).layout(model, tiny_teacher, context)
    with pytest.raises(ValueError, match="limit the same file; leave one of them at 0"):
        Allocation(file_bytes=10**6, bits_per_weight=5)


def test_a_mixture_is_of_llama_cpps_grids_and_ships_as_mixed_only():
    from compress.errors import ConfigError
    from compress.formats import check_grid
    from compress.quant.settings import Allocation, GridName

    for wrong in (
        {"file_bytes": -1},
        {"bits_per_weight": -1},
        {"grids": []},
        {"grids": [GridName.int8]},
        {"calibration_sequences": 0},
        {"blocks_together": 0},
    ):
        with pytest.raises(ValueError, match="a GGUF alone may mix them"):
            Allocation(**wrong)
    check_grid("gguf:MIXED", "slot", "mixed")
    with pytest.raises(ConfigError, match="export it as gguf:MIXED"):
        check_grid("gguf:Q4_0", "slot", "mixed")
