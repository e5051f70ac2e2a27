"""`compress solve` from the command line to a recipe that composes and runs, on the tiny random
teacher; kills, refusals and the recipe's text.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from compress.__main__ import main
from compress.budget import Limit
from compress.config import Recipe
from compress.doors import parse_yaml
from compress.errors import ConfigError
from compress.formats.settings import Export
from compress.launch import launch, without_recipe
from compress.models.checkpoint import load_model
from compress.models.reading import reading
from compress.quant.settings import GridName
from compress.search import cutting, explore, recipe, solution
from compress.search.explore import Clock, Damages, Effort
from compress.search.judge import Judge
from compress.search.limits import bounds_of
from compress.search.shapes import Shape, steps_of
from compress.session import Session
from compress.solving import GRIDS, solve
from compress.stages.qat import Qat
from compress.teacher import random_teacher

QUICK = Effort(first=2, parents=1, children=1, rounds=2, rungs=((64, 2), (128, 2)))
TEXT = ["data=python_docs", "data.seq_len=32"]
FEW = ["data.seq_len=8", "data.train=[few.txt]", "data.weights=[]"]
FULL = Shape(512, 4, 192, 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store that keeps teacher and text for all tests here."""
    return tmp_path_factory.mktemp("solve") / "store"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(explore, "Effort", lambda: QUICK)
    monkeypatch.setattr(cutting, "ROWS_PER_COLUMN", 2)
    monkeypatch.setattr(cutting, "JUDGED_ROWS", 4)
    monkeypatch.setattr(solution, "LEVELS_ALONE", 1)


def session(store):
    parts = without_recipe(["teacher=random", *TEXT, f"store={store}"])
    program = Recipe(
        **parts,
        export=Export(["gguf:IQ4_NL"]),
        stages={"qat": Qat(grid=GridName.iq4_nl)},
        pipeline=["qat"],
    )
    return Session(program)


def searched(store, lines, **limits):
    limits = limits or {"size_bytes": Limit(max=115e3)}
    return solution.solve(session(store), limits, QUICK, 10, with_speed=False, log=lines.append)


def test_the_verb_writes_a_recipe_that_composes_and_runs(store, capsys):
    arguments = ["random", "size_bytes=115e3", *TEXT, f"store={store}", "--no-speed"]
    assert main(["solve", *arguments, "--out", "mine/tiny.yaml"]) == 0
    out = capsys.readouterr().out
    assert "KL cut" in out and "choice: " in out and "reason: it loses" in out
    assert "limit: size_bytes at most 0.1 MB; 5% more room would give back about" in out
    assert "compress run tiny --config-dir=mine" in out

    # The file that the recipe makes has the bytes that were promised.
    recipes = []
    short = ["eval.tasks=[]", "eval.open_prompts=[]", "eval.processes=1", "eval.repeats=1"]
    short += ["eval.prompt_tokens=8", "eval.new_tokens=2"]
    short += ["stages.heal.tokens=64", "stages.qat.tokens=64"]
    short += ["stages.qat.calibration_sequences=8"]

    def run(program, run_dir, command):
        from compress import pipeline

        recipes.append(program)
        return pipeline.run(program, run_dir, command)

    written = Path("mine/tiny.yaml").read_text()
    used = [o for o in short if o.split(".")[0] != "stages" or f"\n  {o.split('.')[1]}:" in written]
    assert launch("tiny", ["--config-dir=mine", *used], run) == 0
    program = recipes[0]
    assert program.budget.limits["size_bytes"].max == 115e3
    assert program.pipeline[-1] == "qat" and len(program.pipeline) > 1
    (file,) = Path("runs").glob("tiny/*/bundle/model-IQ4_NL.gguf")
    promised = out.partition("figures: size_bytes ")[2].partition(" MB")[0]
    assert round(file.stat().st_size / 1e6, 1) == float(promised) and file.stat().st_size <= 115e3


def test_the_choice_is_the_best_of_what_was_healed_and_lies_within_the_limit(store):
    lines = []
    found = searched(store, lines)
    tokens, nats = found.healed[-1]
    assert all(nats[shape] <= found.cut[shape] for shape in nats), "harm is not taken"
    assert found.shape == min(nats, key=nats.__getitem__) and tokens == 128
    assert found.figures[found.shape]["size_bytes"] <= 115e3
    assert set(solution.frontier(found)) <= set(found.cut) and found.prices["size_bytes"] >= 0
    assert "shapes are within the limits" in lines[0] and "min left" in lines[0]
    work = [path.name for path in (store / "work").iterdir()]
    assert not any((store / "work" / name / "kept").exists() for name in work)


def test_a_killed_search_goes_on_and_ends_the_same(store, tmp_path, monkeypatch):
    limits = {"size_bytes": Limit(max=105e3)}
    lines, measured = [], []
    loss = Judge.loss

    def dies(self, checkpoint):
        measured.append(checkpoint)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return loss(self, checkpoint)

    monkeypatch.setattr(Judge, "loss", dies)
    with pytest.raises(KeyboardInterrupt):
        searched(store, lines, **limits)
    interrupted = len(measured)
    resumed = searched(store, lines, **limits)
    again = len(measured) - interrupted

    # The same from nothing, in another store.
    measured.clear()
    monkeypatch.setattr(Judge, "loss", loss)
    whole = searched(tmp_path / "other", lines, **limits)
    assert resumed.cut == whole.cut and resumed.healed == whole.healed
    assert resumed.shape == whole.shape and again >= 1
    before = len(lines)
    assert searched(store, lines, **limits).healed == whole.healed
    assert not any("nats, " in line for line in lines[before:]), "nothing is measured twice"


def test_shapes_that_begin_alike_share_their_cuts(store, monkeypatch):
    workshop = cutting.Workshop(session(store), FULL, lambda line: None)
    runs = []
    for kind in {type(s) for s in steps_of(Shape(448, 3, 128, 1), FULL).values()}:
        real = kind.run

        def counted(self, parent, out, ctx, real=real):
            runs.append(type(self).__name__)
            return real(self, parent, out, ctx)

        monkeypatch.setattr(kind, "run", counted)
    first = workshop.cut(Shape(512, 3, 128, 1))
    assert runs == ["PruneDepth", "PruneHeads", "PruneWidth"] and first.name == "narrow"
    assert workshop.cut(Shape(512, 3, 192, 1)).name == "heads" and len(runs) == 3
    workshop.cut(Shape(448, 3, 192, 2))
    assert runs[3:] == ["PruneVocab"] and not (workshop.folder / "heads").exists()
    assert workshop.cut(FULL) == workshop.teacher
    workshop.close()


def oracle(teacher, rows, fold):
    """Log-probabilities (N, S) in float64 of the teacher in a cut vocabulary, id by id, and the
    labels' nats in all.
    """
    model = load_model(teacher).double()
    logs, nats = [], 0.0
    for row in rows:
        with torch.no_grad():
            ids = row if fold is None else fold.kept_S[row]
            p_LV = model(ids[None, :-1]).logits[0].softmax(-1)
        p_LS = p_LV
        if fold is not None:
            p_LS = p_LV[:, fold.kept_S].clone()
            for dropped, piece in zip(fold.dropped_D, fold.pieces_D, strict=True):
                p_LS[:, piece] += p_LV[:, dropped]
        logs.append(p_LS.log())
        nats -= float(p_LS.log().gather(1, row[1:, None]).sum())
    return torch.cat(logs), nats


def test_a_smaller_vocabulary_costs_what_kl_a_token_does_not_see(store):
    workshop = cutting.Workshop(session(store), FULL, lambda line: None)
    judge, teacher = workshop.judge, workshop.teacher
    assert judge.loss(teacher) == pytest.approx(0, abs=1e-6)
    cut = workshop.cut(Shape(320, 4, 192, 2))
    text = judge._reading(cut)
    assert text.tokens > judge._plain.tokens, "the same text in more tokens"

    # Both terms by another path: probabilities folded id by id in float64.
    log_p, nats = oracle(teacher, text.rows, reading(cut, teacher))
    log_q, _ = oracle(cut, text.rows, None)
    _, plain_nats = oracle(teacher, judge._plain.rows, None)
    words = judge._plain.tokens
    assert nats > plain_nats
    kl = float((log_p.exp() * (log_p - log_q)).sum())
    expected = (kl + nats - plain_nats) / words
    assert judge.loss(cut) == pytest.approx(expected, rel=1e-4)
    workshop.close()


def test_no_cut_and_no_healing_sees_the_text_that_judges(store):
    workshop = cutting.Workshop(session(store), FULL, lambda line: None)
    judged = workshop.session.text(workshop.teacher).ids[-cutting.JUDGED_ROWS :]
    assert torch.equal(workshop._judged_SL, judged)
    text = workshop._context("vocab", workshop.teacher, workshop.folder).text()
    everything = workshop.session.text(workshop.teacher).ids
    assert torch.equal(torch.cat([text.ids, judged]), everything)
    assert len(text.mask) == len(text.ids)
    assert text.digest != workshop.session.text(workshop.teacher).digest

    # In the tokens of a cut, whose rows are more, its end goes back at least as far.
    cut = workshop.cut(Shape(320, 4, 192, 2))
    whole = workshop.session.text(cut).ids
    seen = len(workshop._context("heal", cut, workshop.folder).text().ids) / len(whole)
    assert seen <= len(text.ids) / len(everything) < 1
    workshop.close()


def test_the_rate_of_healing_follows_what_a_cut_lost():
    rates = [cutting.healing_rate(nats) for nats in (0.001, 0.02, 0.2, 1.1)]
    assert rates == pytest.approx([2e-5, 2e-5, 8e-5, 2e-4])


def test_a_search_whose_time_is_up_still_chooses(store):
    lines = []
    clock = Clock(0)
    workshop = cutting.Workshop(session(store), FULL, lines.append)
    shapes = [Shape(512, 2, 192, 1), Shape(384, 2, 192, 1)]
    losses = workshop.losses(shapes, clock, 1.0, "shape")
    assert len(losses) == 1 and "time is up, 1 shapes are left out" in lines[-1]
    workshop._seconds_a_token = 1.0
    assert workshop.healed(shapes, 64, clock) == {} and "left out" in lines[-1]
    workshop.close()


def test_the_most_promising_come_first_and_those_that_begin_like_them(store, monkeypatch):
    order = []
    workshop = cutting.Workshop(session(store), FULL, lambda line: None)
    monkeypatch.setattr(workshop, "_loss", lambda shape, keep_cut: float(order.append(shape) or 1))
    promising = [(512, 3, 192, 1), (512, 4, 64, 2), (512, 3, 192, 2), (352, 4, 192, 2)]
    shapes = [Shape(*numbers) for numbers in promising]
    workshop.losses(shapes, Clock(1e3), 1.0, "shape")
    assert order == [shapes[2], shapes[0], shapes[1], shapes[3]]
    workshop.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["random"], "limits none of size_bytes"),
        (["random", "size_bytes=1e3", *TEXT], "no shape of this teacher meets size_bytes"),
        (["random", "size_bytes=many"], "needed is a number above 0"),
        (["random", "open/kept=0.9"], "can't be told of a shape before it is trained"),
        (["random", "sise_bytes=3"], "did you mean 'size_bytes'"),
        (["random", "size_bytes"], "no LIMIT=VALUE or KEY=VALUE"),
        (["random", "--budget", "nana", "size_bytes=1e6"], "did you mean 'nano'"),
        (["nowhere", "size_bytes=1e6"], "neither an option nor a path"),
        (["random", "size_bytes=1e6", "--grid", "q5"], "is no grid"),
        (["random", "size_bytes=1e6", "--out", "recipe.yml"], "a recipe is a .yaml file"),
        (["random", "size_bytes=1e6", "--minutes", "-1"], "--minutes is -1.0"),
        (["random", "latency_ms_p50=3", "--no-speed", *TEXT], "leave --no-speed out"),
        (["random", "size_bytes=115e3", *FEW], "a search needs"),
    ],
)
def test_what_can_not_be_meant_is_refused_in_a_sentence(arguments, sentence, store):
    Path("few.txt").write_text("A few words about a search that needs more.")
    extra = ["--no-speed"] if "--no-speed" not in arguments else []
    with pytest.raises(ConfigError, match=sentence):
        solve([*arguments, *extra, f"store={store}"])
    assert not Path("solved").exists()


@pytest.mark.parametrize(
    ("kind", "rest"),
    [
        ("WordPiece", {"unk_token": "a", "continuing_subword_prefix": "##"}),
        ("Unigram", {"unk_id": 0, "byte_fallback": False}),
    ],
)
def test_a_tokenizer_that_no_file_can_hold_is_refused_by_name_before_a_search(kind, rest, store):
    random_teacher(Path("other"), 0)
    file = Path("other/tokenizer.json")
    state = json.loads(file.read_text())
    vocab = state["model"]["vocab"]
    pieces = [[token, -float(vocab[token])] for token in sorted(vocab, key=vocab.__getitem__)]
    model = {"type": kind, "vocab": vocab if kind == "WordPiece" else pieces, **rest}
    file.write_text(json.dumps(state | {"model": model | {"max_input_chars_per_word": 100}}))
    with pytest.raises(ValueError, match=f"the tokenizer's model is {kind}; allowed in a GGUF: BP"):
        solve(["other", "size_bytes=115e3", "--no-speed", *TEXT, f"store={store}"])


def program_of(shape, **changes):
    program = recipe.Program(
        shape,
        FULL,
        "iq4_nl",
        "nano60",
        {},
        {"teacher": "random"},
        {},
        "A title.",
        ["a reason"],
        {"depth": 0.1},
        {"narrow": {"calibration_sequences": 100}, "heads": {"calibration_sequences": 16}},
        3e-4,
    )
    return program._replace(**changes)


def composed(text, tmp_path):
    (tmp_path / "own").mkdir(exist_ok=True)
    (tmp_path / "own" / "it.yaml").write_text(text)
    programs = []

    def task(program, run_dir, command):
        programs.append(program)
        return 0

    launch("it", [f"--config-dir={tmp_path / 'own'}"], task)
    return programs[0]


def test_every_slot_has_a_reason_and_makes_the_shape(tmp_path):
    text = recipe.text_of(program_of(Shape(448, 3, 128, 1)))
    for slot in ("depth", "vocab", "heads", "narrow", "heal", "qat"):
        assert f"  {slot}:  # " in text
    assert "alone it loses 0.100 nats" in text and "# a reason" in text
    program = composed(text, tmp_path)
    wanted = steps_of(Shape(448, 3, 128, 1), FULL)
    wanted["narrow"].calibration_sequences = 100  # what it can't do without, where that is more
    assert {slot: program.stages[slot] for slot in wanted} == wanted
    assert program.pipeline[:4] == list(wanted) and program.teacher.source == "random:0"
    assert program.budget.limits["size_bytes"].max == 60e6
    assert program.export.files == ["gguf:IQ4_NL"] and program.stages["heal"].lr == 3e-4
    gentle = composed(recipe.text_of(program_of(Shape(448, 4, 192, 2), healing_rate=0)), tmp_path)
    assert gentle.pipeline == ["vocab", "qat"], "healing that does harm is left out"


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_has_a_recipe_that_composes(grid, tmp_path):
    program = composed(recipe.text_of(program_of(FULL, grid=grid)), tmp_path)
    assert program.export.files == [f"gguf:{grid.upper()}"] and program.stages["qat"].grid == grid


def test_room_in_the_file_becomes_a_mixture_of_finer_grids(tmp_path):
    room = recipe.allocation("iq4_nl", [576, 1536], 90_000)
    program = composed(recipe.text_of(program_of(FULL, allocation=room)), tmp_path)
    allocate = program.stages["qat"].allocate
    assert program.export.files == ["gguf:MIXED"] and allocate.file_bytes == 90_000
    assert allocate.grids == ["iq4_nl", "q4_k", "q5_0", "q8_0"]
    assert recipe.allocation("iq4_nl", [576, 1504], 90_000)["grids"] == ["iq4_nl", "q5_0", "q8_0"]
    assert [recipe.finer_grids(grid) for grid in ("q5_0", "q6_k", "q8_0")] == [
        ["q8_0"],
        ["q8_0"],
        [],
    ]
    held = recipe.finer_grids("iq4_nl", ["q4_0", "q4_1", "q8_0"])
    assert held == ["q4_1", "q5_0", "q8_0"], "by bits, each once, and none of as few as the grid's"


def test_without_room_rows_of_256_may_lie_on_another_grid_of_as_many_bits(tmp_path):
    alike = recipe.allocation("iq4_nl", [576, 1536], 0)
    assert alike == {"bits_per_weight": 4.5, "grids": ["iq4_nl", "q4_k"]}
    program = composed(recipe.text_of(program_of(FULL, allocation=alike)), tmp_path)
    assert program.stages["qat"].allocate.bits_per_weight == 4.5
    assert program.export.files == ["gguf:MIXED"]
    one = [("iq4_nl", [576, 1504]), ("q4_k", [768]), ("q8_0", [768]), ("mxfp4", [768])]
    assert [recipe.allocation(grid, lengths, 0) for grid, lengths in one] == [{}] * 4


@pytest.mark.parametrize(
    ("shape", "healed", "heals"),
    [
        (Shape(512, 3, 192, 2), [], True),
        (Shape(384, 4, 192, 2), [], False),  # only ids: nothing that training brings back
        (Shape(512, 3, 192, 2), [(4096, 0.3)], True),  # too few tokens to tell
        (Shape(512, 3, 192, 2), [(4096, 0.3), (16384, 0.3)], False),
        (Shape(512, 3, 192, 2), [(16384, 0.3), (65536, 0.2)], True),
    ],
)
def test_a_recipe_heals_unless_healing_was_seen_to_do_no_good(shape, healed, heals):
    rungs = [(tokens, {shape: nats}) for tokens, nats in healed]
    solved = solution.Solution(
        shape, FULL, [], {}, Damages(FULL, {}), {shape: 0.3}, rungs, {}, None, "", 0.0
    )
    assert solution.rate_of_healing(solved) == (pytest.approx(1.2e-4) if heals else 0)
    assert solution.keeps_blocks(solved) == (shape.ids < FULL.ids and not heals)


@pytest.mark.parametrize(
    ("limits", "size", "promised"),
    [
        ({"size_bytes": 9e7 + 0.5}, 8.7e7, 90_000_000),
        ({"size_bytes": 9e7}, 8.75e7, 0),  # no room worth measuring
        ({"size_bytes": 6e6}, 5.81e6, 0),  # less than records of tensors may take
        ({"size_bytes": 9e7, "params": 1e8}, 8e7, 90_000_000),
        ({"size_bytes": 9e7, "latency_ms_p50": 3.0}, 8e7, 90_000_000),
        ({"params": 1e8}, 8e7, 0),
    ],
)
def test_a_mixture_is_for_limits_on_bytes_with_room_alone(limits, size, promised):
    bounds = bounds_of({name: Limit(max=value) for name, value in limits.items()}, {})
    figures = {FULL: {"size_bytes": size}}
    solved = solution.Solution(
        FULL, FULL, bounds, figures, Damages(FULL, {}), {}, [], {}, None, "", 0.0
    )
    assert solution.mixture_bytes(solved) == promised
    assert solution.may_mix(solved) == ("latency_ms_p50" not in limits), "predicted for one grid"


def test_limits_paths_and_words_arrive_as_they_were_given(tmp_path):
    words = 'of "a: #1" ${oc}'
    text = recipe.text_of(
        program_of(
            FULL,
            limits={"tok_per_sec": Limit(min=200, why=words)},
            choices={"teacher": "custom"},
            values={"teacher.source": "some where/a: b", "data.seq_len": 64, "eval.limit": None},
        )
    )
    program = composed(text, tmp_path)
    assert program.pipeline == ["qat"] and program.data.seq_len == 64
    assert program.teacher.source == "some where/a: b"
    limit = program.budget.limits["tok_per_sec"]
    assert limit.min == 200 and limit.max is None and limit.why == words
    assert dataclasses.asdict(program.eval)["limit"] is None
    assert parse_yaml(text, "it")["pipeline"] == ["qat"]


def test_run_hands_the_recipe_on(store, monkeypatch):
    ran = []
    monkeypatch.setattr("compress.launch.launch", lambda *a: ran.append(a[:2]) or 4)
    arguments = ["random", "size_bytes=1e6", *TEXT, f"store={store}", "--no-speed", "--run"]
    assert solve(arguments) == 4
    assert ran == [("random_none", ["--config-dir=solved"])]
    assert "pipeline: [qat]" in Path("solved/random_none.yaml").read_text()
