"""Open prompts: their file, their checks, what is made of the answers,
and answers from every runtime.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.budget import OPEN, human
from compress.formats.llamacpp import Answer
from compress.formats.torch_runtime import TorchSpeaker
from compress.models.checkpoint import load_model, model_of
from compress.models.tokenizer import load_tokenizer
from compress.score.inputs import Heldout, Setup, check_context
from compress.score.open import (
    answered,
    beside_teacher,
    choice_gap,
    form_of,
    own_scores,
    plausible,
    same_form,
    worst_first,
)
from compress.score.prompts import (
    ANSWER_TOKENS,
    Prompt,
    embedded_file,
    prompts_of_eval,
    read_prompts,
)
from compress.score.quantiles import jeffreys_interval
from compress.score.settings import Eval
from compress.score.talk import (
    has_template,
    open_speaker,
    plain_answer,
    prompts_of,
    question_ids,
)


def row(name, *, right=True, loops=False, ended=True, answer="Paris.", prompt="Where?"):
    return {
        "id": name,
        "kind": "facts",
        "prompt": prompt,
        "form": "same",
        "answer": answer,
        "ids": [1],
        "ended": ended,
        "loops": loops,
        "right": right,
    }


# ---- the embedded set ----


def test_the_embedded_set_is_large_enough_unique_and_no_check_passes_by_repeating_the_question():
    prompts = read_prompts(embedded_file())
    assert len(prompts) >= 200 and len({p.prompt for p in prompts}) == len(prompts)
    assert len({p.kind for p in prompts}) == 7
    assert [p.id for p in prompts if p.is_right(p.prompt)] == []
    assert [p.id for p in prompts if p.choices and not p.is_right(p.answer)] == []
    assert [p.id for p in prompts if any(p.is_right(choice) for choice in p.choices)] == []


def test_a_fixed_quarter_is_what_stages_are_asked():
    prompts = read_prompts(embedded_file())
    quarter = [p for p in prompts if p.in_quarter]
    assert len(prompts) / 4 - 2 <= len(quarter) <= len(prompts) / 4
    assert {p.kind for p in quarter} == {p.kind for p in prompts}


# ---- checks ----


@pytest.mark.parametrize(
    ("checks", "answer", "right"),
    [
        ({"must_contain": ["paris"]}, "It is PARIS, of course.", True),
        ({"must_contain": ["paris"]}, "A comparison: parisian life.", False),
        ({"must_contain": [["4", "four"]]}, "There are four.", True),
        (
            {"must_contain": [["4", "four"]]},
            "There are 14 of them, or 4.5",
            True,
        ),  # a point ends a word
        ({"must_contain": [["4", "four"]]}, "There are 14.", False),
        ({"must_contain": ["red", "blue"]}, "red only", False),
        ({"must_contain": ["c++"]}, "I like C++ most", True),
        ({"must_contain": ["north"], "must_not_contain": ["west"]}, "north-west", False),
        ({"pattern": r"^\W*yes\b"}, "Yes, it is.", True),
        ({"pattern": r"^\W*yes\b"}, "No. Some say yes.", False),
        ({"exact": ["ready"]}, '  "Ready."\n', True),
        ({"exact": ["ready"]}, "I am ready", False),
    ],
)
def test_an_answer_is_right_when_every_check_holds(checks, answer, right):
    assert Prompt("a-1", "?", **checks).is_right(answer) is right


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is not JSON"),
        ('{"prompt": "Where \\ud83d?", "exact": ["x"]}', "line 1 holds half a character"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"prompt": ""}', "`prompt` must be a text"),
        ('{"prompt": "Where?"}', "nothing says which answer is right"),
        ('{"prompt": "Where?", "must_not_contain": ["x"]}', "nothing says which answer is right"),
        ('{"prompt": "Where?", "must_contian": ["x"]}', "unknown key 'must_contian'.*must_contain"),
        ('{"prompt": "Where?", "must_contain": [3]}', "texts or lists of texts"),
        ('{"prompt": "Where?", "must_contain": [[]]}', "texts or lists of texts"),
        ('{"prompt": "Where?", "pattern": "(a"}', "does not compile"),
        ('{"prompt": "Where?", "pattern": "(a+)+$!"}', "runs away"),
        (
            '{"id": 1, "prompt": "A?", "exact": "x"}\n{"id": 1, "prompt": "B?", "exact": "y"}',
            "the id '1' is there twice",
        ),
        ("\n", "holds no prompt"),
    ],
)
def test_bad_prompt_files_are_refused_with_file_line_and_next_step(tmp_path, line, message):
    file = tmp_path / "mine.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=message) as refusal:
        read_prompts(file)
    assert "mine.jsonl" in str(refusal.value)


def test_prompts_are_found_by_name_below_the_data_folder_and_limited(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / "mine.jsonl").write_text(
        '{"prompt": "A?", "exact": "x"}\n\n{"prompt": "B?", "exact": "y"}\n'
    )
    found = prompts_of_eval(["mine", "embedded"], str(tmp_path), 1)
    assert [p.prompt for p in found][0] == "A?" and len(found) == 2
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        prompts_of_eval(["none.jsonl"], None, None)
    (tmp_path / "again.jsonl").write_text('{"id": "1", "prompt": "A?", "exact": "x"}')
    with pytest.raises(ValueError, match="the id '1' is in another file"):
        prompts_of_eval(["mine", str(tmp_path / "again.jsonl")], str(tmp_path), None)


def test_a_pattern_that_runs_away_on_an_answer_makes_it_not_right(monkeypatch, tiny_teacher):
    def runs_away(self, answer):
        raise TimeoutError

    monkeypatch.setattr(Prompt, "is_right", runs_away)
    rows = answered(model_of(tiny_teacher), [Prompt("a-1", "Where?", exact=["x"])], 1)
    assert rows[0]["right"] is False and rows[0]["timed_out"] is True


# ---- figures ----


def test_shares_of_one_model_have_jeffreys_interval():
    scores, spread = own_scores(
        [row(str(i), right=i < 3, loops=i == 9, ended=i > 4) for i in range(10)]
    )
    assert (scores["open/right"], scores["open/loops"], scores["open/ended"], scores["n/open"]) == (
        0.3,
        0.1,
        0.5,
        10,
    )
    from scipy.stats import beta

    assert spread["open/right"] == pytest.approx(beta.ppf([0.025, 0.975], 3.5, 7.5))
    none, _ = own_scores([row("1", right=False)]), None
    assert none[1]["open/right"][0] == 0


def test_kept_is_of_what_the_teacher_gets_right_and_differences_are_paired():
    teacher = [row(str(i), right=i < 30, loops=False, ended=i % 2 == 0) for i in range(40)]
    student = [
        row(str(i), right=i < 24 or i > 37, loops=i < 4, ended=i % 4 == 0) for i in range(40)
    ]
    scores, spread = beside_teacher(student, teacher)
    assert scores["open/kept"] == 24 / 30 and scores["n/open_kept"] == 30
    assert scores["open/loops_gained"] == 0.1 and scores["open/ended_lost"] == 0.25
    for name, (low, high) in spread.items():
        assert low <= scores[name] <= high, name
    assert spread["open/loops_gained"][0] > 0
    same, _ = beside_teacher(teacher, teacher)
    assert same["open/kept"] == 1 and same["open/loops_gained"] == 0 == same["open/ended_lost"]


def test_a_teacher_that_knows_too_little_leaves_kept_undecided():
    teacher = [row(str(i), right=i < 19) for i in range(40)]
    scores, _ = beside_teacher(teacher, teacher)
    assert "open/kept" not in scores and scores["n/open_kept"] == 19


def test_prompts_put_to_one_model_only_are_refused():
    with pytest.raises(ValueError, match="were put to one of the models only"):
        beside_teacher([row("1"), row("2")], [row("1")])
    with pytest.raises(ValueError, match="were put to one of the models only"):
        beside_teacher([row("1", prompt="Who?")], [row("1")])


def test_prompts_that_reach_the_model_in_another_form_are_counted():
    teacher = [row(str(i)) for i in range(4)]
    student = [row("0") | {"form": "other"}, *teacher[1:]]
    assert beside_teacher(student, teacher)[0]["open/form_differing"] == 0.25
    assert beside_teacher(teacher, teacher)[0]["open/form_differing"] == 0


def test_the_choice_form_flatters_by_its_accuracy_minus_the_open_one():
    answers = [row(f"f-{i}", right=i < 10) for i in range(40)]
    scores, spread = choice_gap({f"f-{i}": i < 30 for i in range(40)}, answers)
    assert scores["open/choice_gap"] == pytest.approx(0.5)
    assert 0.3 < spread["open/choice_gap"][0] < 0.5 < spread["open/choice_gap"][1] < 0.7
    assert choice_gap({}, answers) == ({}, {})


def test_the_worst_answers_come_first():
    teacher = [row("a"), row("b"), row("c"), row("d", right=False)]
    student = [
        row("a"),
        row("b", right=False),
        row("c", right=False, loops=True),
        row("d", loops=True, right=False),
    ]
    assert [found["id"] for found in worst_first(student, teacher)] == ["c", "b", "d", "a"]


@pytest.mark.parametrize("name", OPEN)
def test_every_figure_can_be_said(name):
    assert human(name, 0.25) == (
        "0.25"
        if name == "open/plausible"
        else (
            "25.0 points"
            if name in ("open/loops_gained", "open/ended_lost", "open/choice_gap")
            else "25.0%"
        )
    )


def test_plausible_is_the_mean_difference_of_the_teachers_nats_a_token(tiny_teacher):
    from compress.score.lm import torch_lm

    tokenizer, model = load_tokenizer(tiny_teacher), load_model(tiny_teacher)
    words = ["the language", "of an object", "a class is", "return the"]
    teacher = [row(f"x-{4 * i}", answer=text, ended=True) for i, text in enumerate(words)]
    student = [
        row(f"x-{4 * i}", answer=text[::-1], ended=i % 2 == 0) for i, text in enumerate(words)
    ]
    found = plausible(student, teacher, torch_lm(model, tokenizer, 4, 256), tokenizer)

    def nats(answer):
        turns = [{"role": "user", "content": "Where?"}]
        context = tokenizer(
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        )["input_ids"]
        ids = tokenizer(answer["answer"])["input_ids"] + [tokenizer.eos_token_id] * answer["ended"]
        logits = model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
        return sum(float(logits[len(context) + i - 1, token]) for i, token in enumerate(ids)) / len(
            ids
        )

    wanted = np.mean([nats(its) - nats(mine) for its, mine in zip(teacher, student, strict=True)])
    assert found["value"] == pytest.approx(wanted, abs=1e-5)
    assert found["interval"][0] < wanted < found["interval"][1]
    assert plausible(teacher, teacher, torch_lm(model, tokenizer, 4, 256), tokenizer)["value"] == 0
    outside = [answer | {"id": "x-1"} for answer in student[:1]]
    assert plausible(outside, outside, None, tokenizer) == {}


def test_intervals_of_kept_hold_the_truth():
    """Of 1,000 simulated students that keep 80% of 60 answers the interval holds 0.8
    in about 95%.
    """
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        both = int(draw.binomial(60, 0.8))
        low, high = jeffreys_interval(both, 60)
        held += low <= 0.8 <= high
    assert 0.93 < held / 1000 < 0.975


# ---- runtimes ----


@pytest.fixture(scope="module")
def f16(tiny_teacher, tmp_path_factory):
    from compress.formats.gguf import export_gguf

    file = tmp_path_factory.mktemp("gguf") / "model-F16.gguf"
    export_gguf(tiny_teacher, file, "F16")
    return file


QUESTIONS = [
    Prompt(f"q-{i}", f"What is {word}?", exact=["x"])
    for i, word in enumerate(["an object", "a class", "len", "the lambda form"])
]


def test_torch_answers_alike_alone_and_in_a_padded_batch(tiny_teacher):
    together = answered(model_of(tiny_teacher), QUESTIONS, 1)
    alone = [answered(model_of(tiny_teacher), [question], 1)[0] for question in QUESTIONS]
    assert [answer["ids"] for answer in together] == [answer["ids"] for answer in alone]


def test_torch_answers_are_plain_greedy_decoding(tiny_teacher):
    tokenizer, model = load_tokenizer(tiny_teacher), load_model(tiny_teacher)
    turns = [{"role": "user", "content": QUESTIONS[1].prompt}]
    ids = tokenizer(
        tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    )["input_ids"]
    said = []
    while len(said) < ANSWER_TOKENS:
        said.append(int(model(torch.tensor([ids + said])).logits[0, -1].argmax()))
        if said[-1] == model.generation_config.eos_token_id:
            break
    found = answered(model_of(tiny_teacher), [QUESTIONS[1]], 1)[0]
    ended = said[-1] == model.generation_config.eos_token_id
    assert found["ended"] == ended and found["ids"] == (said[:-1] if ended else said)


def test_llama_cpp_answers_as_torch_does_and_the_same_again(tiny_teacher, f16):
    torch_rows, llama_rows = (
        answered(model_of(path), QUESTIONS, 1) for path in (tiny_teacher, f16)
    )
    same = sum(a["ids"][:8] == b["ids"][:8] for a, b in zip(torch_rows, llama_rows, strict=True))
    assert same >= 3  # a random model has ties that fp16 breaks otherwise
    assert answered(model_of(f16), QUESTIONS, 1) == llama_rows


def test_onnx_answers_as_torch_does(tiny_teacher, tmp_path):
    from compress.formats.onnx import export_onnx

    export_onnx(tiny_teacher, tmp_path / "onnx", "")
    torch_rows, onnx_rows = (
        answered(model_of(path), QUESTIONS, 1) for path in (tiny_teacher, tmp_path / "onnx")
    )
    assert [a["ids"][:8] for a in torch_rows] == [b["ids"][:8] for b in onnx_rows]


def changed(teacher, out, **parts):
    """A copy of a checkpoint with files rewritten by functions of their JSON."""
    import shutil

    shutil.copytree(teacher, out)
    for name, change in parts.items():
        file = out / f"{name}.json"
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return out


def test_a_model_without_an_end_never_ends(tiny_teacher, tmp_path):
    def endless(config):
        return {key: value for key, value in config.items() if key != "eos_token_id"}

    path = changed(tiny_teacher, tmp_path / "endless", generation_config=endless, config=endless)
    rows = answered(model_of(path), QUESTIONS, 1)
    assert all(len(answer["ids"]) == ANSWER_TOKENS and not answer["ended"] for answer in rows)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "chat template fails"),
        ("hello", "drops what the user says"),
        ("{% for", "chat template fails"),
    ],
)
def test_a_chat_template_that_fails_or_renders_nothing_is_refused(
    tiny_teacher, tmp_path, template, message
):
    import shutil

    path = tmp_path / "broken"
    shutil.copytree(tiny_teacher, path)
    (path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        answered(model_of(path), QUESTIONS, 1)


def test_a_model_without_a_chat_template_is_asked_in_plain_text(tiny_teacher, tmp_path):
    import shutil

    path = tmp_path / "base"
    shutil.copytree(tiny_teacher, path)
    (path / "chat_template.jinja").unlink()
    config = json.loads((path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (path / "tokenizer_config.json").write_text(json.dumps(config))

    assert has_template(model_of(tiny_teacher)) and not has_template(model_of(path))
    with open_speaker(model_of(path), 1) as speaker:
        assert prompts_of(speaker, ["Where?"], False) == ["Question: Where?\nAnswer:"]
    assert not math.isnan(own_scores(answered(model_of(path), QUESTIONS[:1], 1))[0]["open/right"])


def test_what_a_model_writes_behind_its_own_next_question_is_no_answer():
    answer = plain_answer(Answer([1, 2, 3], " Paris\nQuestion: Where is Rome?\nAnswer:", False))
    assert answer == ([1, 2, 3], " Paris", True)
    whole_text = Answer([1, 2], " Paris, in Question: form", False)
    assert plain_answer(whole_text) == whole_text


@pytest.mark.parametrize("templated", [True, False])
def test_the_ids_of_a_question_are_the_same_wherever_it_is_put(tiny_teacher, templated):
    tokenizer = load_tokenizer(tiny_teacher)
    if not templated:
        tokenizer.chat_template = None
    speaker = TorchSpeaker.__new__(TorchSpeaker)  # without its model
    speaker.tokenizer, speaker.path = tokenizer, tiny_teacher
    (prompt,) = prompts_of(speaker, ["What is 2 + 2?"], templated)
    assert speaker.prompt_ids(prompt) == question_ids(tokenizer, "What is 2 + 2?")


@pytest.mark.parametrize(
    ("longest", "settings", "told"),
    [
        (40, {}, "eval.prompt_tokens=128 and eval.new_tokens=32 are longer than .* of 40 tokens"),
        (
            70,
            {"prompt_tokens": 8, "new_tokens": 8},
            "the open prompt 'a' has .* answer up to 64, and the teacher's context 70; set",
        ),
    ],
)
def test_what_is_longer_than_the_context_is_refused_before_work(
    tiny_teacher, longest, settings, told
):
    setup = Setup(
        settings=Eval(**settings),
        heldout=Heldout(torch.zeros(2, 9, dtype=torch.int32), {"text": slice(0, 2)}),
        prompts=[Prompt("a", "How many legs has a spider, and how many has a cow?", exact=["8"])],
        requests=None,
        tokenizer_dir=tiny_teacher,
        threads=1,
        longest=longest,
    )
    with pytest.raises(ValueError, match=told):
        check_context(setup)
    check_context(replace(setup, longest=10_000))


def test_a_prompt_is_the_same_by_its_ids_or_of_fewer_tokens_by_its_text():
    whole, cut = {0: "<s>", 1: "a", 2: "b", 3: "ab"}, {0: "<s>", 1: "a", 2: "b"}
    asked = form_of([0, 3], whole)
    assert same_form(asked, form_of([0, 3], whole))
    assert not same_form(asked, form_of([0, 1, 2], whole))  # cut otherwise, in the same tokens
    assert same_form(asked, form_of([0, 1, 2], cut))
    assert not same_form(asked, form_of([0, 0, 1, 2], cut))  # BOS doubled
    assert same_form("abc", "abc") and not same_form("abc", "abd")  # of older bundles
