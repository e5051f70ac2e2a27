"""Embedded tasks and compress/score/tasks.py: data as versioned, choices as a computation by hand
chooses them.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from compress.assets import configs_dir
from compress.errors import ConfigError
from compress.models.checkpoint import load_model
from compress.models.tokenizer import load_tokenizer
from compress.score import task_files, tasks
from compress.score.intervals import accuracy, perplexities
from compress.score.lm import torch_lm
from compress.ship.received import _item

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data" / "eval"
EMBEDDED = {"arithmetic": (120, 0.25), "facts": (196, 0.25), "grammar": (160, 0.5)}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A random Llama over bytes, as a checkpoint directory."""
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("tiny")
    vocab = {
        token: i
        for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(out)
    config = LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def lm(tiny):
    return torch_lm(load_model(tiny), load_tokenizer(tiny), 8)


def by_hand(tiny, contexts, options, delimiter):
    """log p(option | context) one option at a time, without batches, padding or lm-eval."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(tiny),
        AutoModelForCausalLM.from_pretrained(tiny).eval(),
    )
    scores = []
    for context, choices in zip(contexts, options, strict=True):
        row = []
        for choice in choices:
            head = tokenizer(context).input_ids or [tokenizer.bos_token_id]
            tail = tokenizer(delimiter + choice).input_ids
            with torch.no_grad():
                logp_LV = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
            row.append(
                sum(logp_LV[len(head) - 1 + i, token].item() for i, token in enumerate(tail))
            )
        scores.append(row)
    return scores


def test_making_the_tasks_again_gives_the_same_bytes(tmp_path):
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_tasks.py", tmp_path],
        check=True,
        capture_output=True,
    )
    for name in EMBEDDED:
        assert (tmp_path / name / "test.jsonl").read_bytes() == (
            configs_dir() / "tasks" / name / "test.jsonl"
        ).read_bytes(), name


@pytest.mark.parametrize("name", EMBEDDED)
def test_items_are_well_formed_and_the_right_place_is_no_clue(name):
    rows = task_files.read_jsonl(configs_dir() / "tasks" / name / "test.jsonl")
    n, chance = EMBEDDED[name]
    assert len(rows) == n and sum(1 / len(row["choices"]) for row in rows) / n == chance
    assert len({json.dumps([row["query"], sorted(row["choices"])]) for row in rows}) == n, (
        "an item appears twice"
    )
    for row in rows:
        assert len(set(row["choices"])) == 1 / chance and 0 <= row["answer"] < len(
            row["choices"]
        ), row
    for place in range(int(1 / chance)):
        assert abs(sum(row["answer"] == place for row in rows) / n - chance) < 0.12


def test_arithmetic_answers_are_right():
    for row in task_files.read_jsonl(configs_dir() / "tasks" / "arithmetic" / "test.jsonl"):
        answer, query = int(row["choices"][row["answer"]]), row["query"]
        if query.endswith("="):
            left, sign, right = query.split()[:3]
            assert answer == int(left) + int(right) * (1 if sign == "+" else -1), row
        else:
            numbers = [int(x) for x in query.split(",")[:-1]]
            assert answer - numbers[-1] == numbers[-1] - numbers[-2] == numbers[1] - numbers[0], row
        assert len({len(choice) for choice in row["choices"]}) == 1, row


@pytest.mark.parametrize(
    ("name", "prompt", "delimiter"),
    [("grammar", "", ""), ("facts", "", " "), ("arithmetic", "10 + 1 = 11, 10 - 1 = 9, ", " ")],
)
def test_choices_equal_a_computation_by_hand(name, prompt, delimiter, lm, tiny):
    result = tasks.evaluate(lm, [name], limit=6)
    rows = task_files.read_jsonl(configs_dir() / "tasks" / name / "test.jsonl")
    rows = [rows[i * len(rows) // 6] for i in range(6)]  # evenly spaced over the file
    expected = by_hand(
        tiny, [prompt + row["query"] for row in rows], [row["choices"] for row in rows], delimiter
    )
    for item, row, scores in zip(result.items, rows, expected, strict=True):
        assert item["logliks"] == pytest.approx(scores, abs=2e-3)
        assert item["choice"] == scores.index(max(scores))
        assert item["correct"] == (item["choice"] == row["answer"])
    acc = sum(item["correct"] for item in result.items) / 6
    assert result.scores == pytest.approx({f"acc/{name}": acc, f"n/{name}": 6})
    assert accuracy(result.items).scores == pytest.approx(
        result.scores | {f"acc_stderr/{name}": (acc * (1 - acc) / 5) ** 0.5, "acc": acc}
    )
    assert result.chance == {name: EMBEDDED[name][1]}


def test_several_tasks_in_one_call_equal_one_at_a_time_and_leave_the_seed_alone(lm):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    both = tasks.evaluate(lm, ["facts", "grammar"], limit=8)
    assert torch.equal(before, torch.get_rng_state())
    alone = [tasks.evaluate(lm, [name], limit=8) for name in ("facts", "grammar")]
    one_by_one = [item for result in alone for item in result.items]
    for field in ("task", "doc_id", "choice", "correct"):
        assert [item[field] for item in both.items] == [item[field] for item in one_by_one]


def test_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError,
        match=(
            r"unknown task 'gramar'; did you mean .*'grammar'.*embedded: arithmetic, facts, grammar"
        ),
    ):
        task_files.check_tasks(["facts", "gramar"])


def test_checking_embedded_and_harness_names_does_not_import_lm_eval():
    code = (
        "import sys; from compress.score.tasks import check_tasks; check_tasks(['facts',"
        " 'arc_easy'])"
    )
    code += "; print('lm_eval' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stderr


def test_a_task_file_that_names_code_is_refused(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("task: evil\nprocess_docs: !function os.getcwd\n")
    with pytest.raises(ValueError, match="names code or a custom tag"):
        task_files._embedded_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ("[1]\n", "line 1 is not a JSON object"),
        ("", "is empty"),
    ],
)
def test_a_bad_item_file_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "train.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"train\.jsonl.*{message}"):
        task_files.read_jsonl(path)


def arc_rows(n):
    choices = {"text": ["a", "bc", "d"], "label": ["A", "B", "C"]}
    return [
        {"question": f"What is {i}?", "choices": choices, "answerKey": "ABC"[i % 3]}
        for i in range(n)
    ]


def write(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_harness_task_reads_its_items_from_data_dir_with_its_own_prompt(tmp_path, lm, tiny):
    write(tmp_path / "arc_easy", "train", arc_rows(5))
    result = tasks.evaluate(lm, ["arc_easy"], data_dir=tmp_path)
    expected = by_hand(
        tiny, [f"Question: What is {i}?\nAnswer:" for i in range(5)], [["a", "bc", "d"]] * 5, " "
    )
    assert [i["logliks"] for i in result.items] == [
        pytest.approx(row, abs=2e-3) for row in expected
    ]
    assert [i["correct"] for i in result.items] == [
        row.index(max(row)) == i % 3 for i, row in enumerate(expected)
    ]
    assert result.chance == {"arc_easy": pytest.approx(1 / 3)}


def test_a_single_split_serves_test_and_few_shot_without_the_item_itself(tmp_path):
    write(tmp_path / "arc_easy", "train", arc_rows(4))
    task = task_files.load_task("arc_easy", tmp_path)["arc_easy"]
    task.set_fewshot_seed(0)
    for doc in task.eval_docs:
        assert task.fewshot_context(doc, num_fewshot=3).count(doc["question"]) == 1


def test_splits_that_are_present_keep_their_part(tmp_path):
    write(tmp_path / "arc_easy", "train", arc_rows(4))
    write(tmp_path / "arc_easy", "validation", arc_rows(2))
    task = task_files.load_task("arc_easy", tmp_path)["arc_easy"]
    assert len(task.eval_docs) == 2 and len(task.fewshot_docs()) == 4


@pytest.mark.skipif(
    not SHARED.is_dir(), reason="the local development data is not beside this checkout"
)
@pytest.mark.parametrize("name", ["arc_easy", "arc_challenge", "openbookqa"])
def test_real_benchmark_files_load_and_score(name, lm):
    result = tasks.evaluate(lm, [name], limit=3, data_dir=SHARED)
    assert result.scores[f"n/{name}"] == 3 and 0.2 <= result.chance[name] <= 0.34


ABC = {"text": ["sugar", "stone and sand", "air"], "label": ["A", "B", "C"]}
TRUE = {"choices": ["Nothing happens.", "You die.", "It is not known."], "labels": [1, 0, 0]}
ROWS = {  # of every task that may come from data_dir: split, a row by its number
    "arc_easy": (
        "test",
        lambda i: {
            "question": f"What do {i} plants make?",
            "choices": ABC,
            "answerKey": "ABC"[i % 3],
        },
    ),
    "arc_challenge": (
        "test",
        lambda i: {
            "question": f"What do {i} plants make?",
            "choices": ABC,
            "answerKey": "ABC"[i % 3],
        },
    ),
    "openbookqa": (
        "test",
        lambda i: {"question_stem": f"{i} plants make", "choices": ABC, "answerKey": "ABC"[i % 3]},
    ),
    "hellaswag": (
        "validation",
        lambda i: {
            "activity_label": "Cooking",
            "ctx_a": f"He cuts {i}.",
            "ctx_b": "he",
            "endings": ["cries", "sings [title]."],
            "label": str(i % 2),
        },
    ),
    "piqa": (
        "validation",
        lambda i: {
            "goal": f"Boil {i} eggs",
            "sol1": "use water",
            "sol2": "use sand",
            "label": i % 2,
        },
    ),
    "winogrande": (
        "validation",
        lambda i: {
            "sentence": f"Ann gave Bo {i} pens because _ had many.",
            "option1": "Ann",
            "option2": "Bo",
            "answer": str(1 + i % 2),
        },
    ),
    "boolq": (
        "validation",
        lambda i: {"passage": f"It was {i} degrees.", "question": "was it cold", "label": i % 2},
    ),
    "lambada_openai": ("test", lambda i: {"text": f"He took {i} apples and ate the last apple"}),
    "blimp": (
        "train",
        lambda i: {
            "sentence_good": f"The {i} cats sleep.",
            "sentence_bad": f"The {i} cats sleeps.",
            "UID": ("passive_1", "causative")[i % 2],
        },
    ),
    "mmlu": (
        "test",
        lambda i: {
            "question": f"What is {i}?",
            "choices": ["0", "1", "2", "3"],
            "answer": i % 4,
            "subject": ["astronomy", "virology"][i % 2],
        },
    ),
    "wikitext": (
        "test",
        lambda i: {"page": f" = Page {i} = \n\n It says @-@ very little . \n" * (i + 1)},
    ),
    "gsm8k": (
        "test",
        lambda i: {"question": f"What is {i} plus {i}?", "answer": f"It is twice. #### {2 * i}"},
    ),
    "truthfulqa_mc1": (
        "validation",
        lambda i: {"question": f"What if you eat {i} seeds?", "mc1_targets": TRUE},
    ),
    "truthfulqa_mc2": (
        "validation",
        lambda i: {
            "question": f"What if you eat {i} seeds?",
            "mc2_targets": TRUE | {"labels": [1, 0, 1]},
        },
    ),
    "crows_pairs_english": (
        "test",
        lambda i: {
            "sent_more": f"The {i} women drive badly.",
            "sent_less": f"The {i} men drive badly.",
        },
    ),
}
FIGURE = {"gsm8k": "exact_match,strict-match", "crows_pairs_english": "pct_stereotype,none"}


def local(folder, name, n=6):
    split, row = ROWS[name]
    write(folder / name, split, [row(i) for i in range(n)])


def test_every_task_with_known_fields_is_tested_here():
    assert ROWS.keys() == task_files.FIELDS.keys()
    for name, (_, row) in ROWS.items():
        assert set(task_files.FIELDS[name].split()) <= row(0).keys(), name


@pytest.mark.parametrize("name", ROWS)
def test_a_local_task_scores_as_lm_evals_own_model_and_evaluator_say_and_again_from_its_requests(
    name, tiny, lm, tmp_path
):
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    local(tmp_path, name)
    result = tasks.evaluate(lm, [name], data_dir=tmp_path, num_fewshot=1)
    assert len(json.loads(json.dumps(result.items))) == 6 and [
        item["doc_id"] for item in result.items
    ] == list(range(6))
    assert [
        _item(item, "here") for item in json.loads(json.dumps(result.items))
    ]  # as a receiver of a bundle reads them
    parts = task_files.load_task(name, tmp_path)
    for task in parts.values():
        task.set_config("num_fewshot", 0 if task.get_config("num_fewshot") == 0 else 1)
        task.set_fewshot_seed(1234)
    theirs = lm_eval.evaluate(
        HFLM(
            pretrained=load_model(tiny), tokenizer=load_tokenizer(tiny), batch_size=4, device="cpu"
        ),
        {"tasks": parts},
        bootstrap_iters=0,
    )
    figures = (
        ["word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none"]
        if name == "wikitext"
        else [FIGURE.get(name, "acc,none")]
    )
    for figure in figures:
        expected = sum(of[figure] for of in theirs["results"].values()) / len(theirs["results"])
        key = figure.partition(",")[0].replace("exact_match", "acc")
        assert (result.scores | perplexities(result.items).scores)[
            f"{key}/{name}"
        ] == pytest.approx(expected, rel=1e-4), figure
    samples = [
        sample
        for own in theirs["samples"].values()
        for sample in own
        if sample["filter"] in ("none", "strict-match")
    ]
    for item, sample in zip(result.items, samples, strict=True):
        if name == "gsm8k":
            assert item["text"] == sample["filtered_resps"][0] and "####" in item["gold"]
            continue
        answers = [a if name == "wikitext" else a[0] for a in sample["filtered_resps"]]
        assert item["logliks"] == pytest.approx(answers, abs=2e-3)
    again = tasks.rescore(lm, json.loads(json.dumps(result.items)))
    if name == "gsm8k":
        assert again.items == []  # its filter is the task's own code
    else:
        assert again.scores == pytest.approx(result.scores) and again.chance == pytest.approx(
            result.chance
        )


def test_few_shot_examples_come_before_every_item_unless_the_task_fixes_none(lm, tmp_path):
    for name in ("arc_easy", "blimp", "mmlu"):
        local(tmp_path, name)
    result = tasks.evaluate(lm, ["arc_easy", "blimp", "mmlu"], data_dir=tmp_path, num_fewshot=2)
    for item in result.items:
        expected = {"arc_easy": 3, "blimp": 0, "mmlu": 3}[item["task"]]
        assert item["context"].count("Answer:") == expected, item
    assert (
        "about astronomy" in result.items[12]["context"]
        and "about virology" in result.items[17]["context"]
    )


def test_a_limit_is_spread_over_all_paradigms_and_one_paradigm_can_be_had_by_itself(lm, tmp_path):
    local(tmp_path, "blimp", 20)
    assert [
        item["doc_id"] for item in tasks.evaluate(lm, ["blimp"], limit=4, data_dir=tmp_path).items
    ] == [0, 5, 10, 15]
    alone = tasks.evaluate(lm, ["blimp_causative"], data_dir=tmp_path)
    assert alone.scores["n/blimp_causative"] == 10 and [
        item["choices"][0] for item in alone.items[:2]
    ] == [
        " The 1 cats sleep.",
        " The 3 cats sleep.",
    ]
    write(
        tmp_path / "blimp", "train", [{"sentence_good": "a", "sentence_bad": "b", "UID": "new_1"}]
    )
    with pytest.raises(
        ValueError,
        match="'blimp_new_1' is no task of lm-eval with rows here; 'UID' gives blimp_new_1",
    ):
        tasks.evaluate(lm, ["blimp"], data_dir=tmp_path)


@pytest.mark.parametrize("name", ROWS)
def test_a_missing_file_is_named_with_the_fields_it_needs_and_a_row_with_the_field_it_lacks(
    name, lm, tmp_path
):
    fields = task_files.FIELDS[name].split()
    with pytest.raises(
        ValueError,
        match=(
            rf"{name} has no <split>.jsonl; the task needs one of .*\.jsonl with the hub's fields"
            rf" {', '.join(fields)}"
        ),
    ):
        tasks.evaluate(lm, [name], data_dir=tmp_path)
    split, row = ROWS[name]
    write(
        tmp_path / name,
        split,
        [row(0), {key: value for key, value in row(1).items() if key != fields[-1]}],
    )
    with pytest.raises(
        ValueError,
        match=(
            rf"{split}\.jsonl, line 2: the field '{fields[-1]}' is missing; task {name} needs"
            rf" {', '.join(fields)}"
        ),
    ):
        tasks.evaluate(lm, [name], data_dir=tmp_path)


def test_perturbed_contexts_are_scored_and_tasks_without_one_are_named(lm, tmp_path, caplog):
    for name in ("arc_easy", "blimp", "winogrande"):
        local(tmp_path, name, 12)
    result = tasks.evaluate(
        lm,
        ["arc_easy", "blimp", "winogrande"],
        data_dir=tmp_path,
        perturbations=["typos", "truncation"],
    )
    assert "for want of an accuracy or a context: blimp" in caplog.text
    for name in ("typos", "truncation"):
        for task in ("arc_easy", "winogrande"):
            lost = result.scores[f"acc/{task}"] - result.scores[f"acc/{task}@{name}"]
            assert result.scores[f"drop/{task}@{name}"] == pytest.approx(lost, abs=1e-12)
            low, high = result.intervals[f"drop/{task}@{name}"]
            assert -1 <= low <= result.scores[f"drop/{task}@{name}"] <= high <= 1 and low < high
            assert result.intervals[f"acc/{task}@{name}"][1] <= 1
        assert f"acc/blimp@{name}" not in result.scores
    assert (
        len(result.items) == 36
        and result.scores
        == tasks.evaluate(
            lm,
            ["arc_easy", "blimp", "winogrande"],
            data_dir=tmp_path,
            perturbations=["typos", "truncation"],
        ).scores
    )


def test_pairs_with_examples_before_them_have_no_accuracy_to_lose(lm, tmp_path, caplog):
    local(tmp_path, "crows_pairs_english", 6)
    result = tasks.evaluate(
        lm, ["crows_pairs_english"], data_dir=tmp_path, num_fewshot=1, perturbations=["typos"]
    )
    assert "or a context: crows_pairs_english" in caplog.text and result.items[0]["context"]
    assert set(result.scores) == {"n/crows_pairs_english", "pct_stereotype/crows_pairs_english"}


def test_drift_is_the_students_figure_less_the_teachers():
    student = {
        "pct_stereotype/crows_pairs_english": 0.5,
        "acc/truthfulqa_mc2": 0.25,
        "acc/arc_easy": 0.1,
    }
    teacher = {
        "pct_stereotype/crows_pairs_english": 0.625,
        "acc/truthfulqa_mc2": 0.125,
        "acc/truthfulqa_mc1": 0.3,
        "acc/arc_easy": 0.2,
    }
    assert tasks.drift(student, teacher) == {
        "drift/crows_pairs_english": -0.125,
        "drift/truthfulqa_mc2": 0.125,
    }
