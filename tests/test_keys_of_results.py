"""Every input changes the key of signals, scores, exports and text, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_keys import COPIED, OTHER, TEXT, append, other_version
from test_keys import teacher as teacher

from compress import keys
from compress.distill.schemes import Scheme
from compress.distill.signals import Signals
from compress.models.checkpoint import model_of
from compress.pipeline import export_inputs
from compress.score.scorer import Scorer
from compress.score.settings import Eval
from compress.store import Store, sha256_json
from compress.text.packing import pack
from compress.text.written import generated

# ---- signals ----


def signals_of(
    teacher, folder, data=TEXT, scheme=None, log=lambda line: None, **changes
) -> Signals:
    how = {"seed": 0, "precision": "fp32", "load": "plain"} | changes
    return Signals(folder, teacher, data, scheme or Scheme(), log=log, **how)


SIGNAL_CHANGES = {
    "scheme": {"scheme": Scheme("hidden")},
    "threshold": {"scheme": Scheme(threshold=0.3)},
    "temperature": {"scheme": Scheme(temperature=2.0)},
    "seed": {"seed": 1},
    "precision": {"precision": "bf16"},
    "load": {"load": "nf4"},
}
MADE_WITH = ["sources", "threads", "device", *keys.SIGNALS]


@pytest.mark.parametrize(
    "change", [*SIGNAL_CHANGES, "data", "config.json", "tokenizer.json", *MADE_WITH]
)
def test_each_input_changes_the_key_of_a_signal(teacher, tmp_path, monkeypatch, change):
    before = signals_of(teacher, tmp_path).folder
    assert signals_of(teacher, tmp_path).folder == before
    changes = SIGNAL_CHANGES.get(change, {})
    if change == "data":
        changes = {"data": OTHER}
    elif change.endswith(".json"):
        append(teacher / change)
    elif change == "sources":
        monkeypatch.setattr("compress.distill.signals.sources_digest", lambda *roots: "another")
    elif change == "threads":
        monkeypatch.setattr("torch.get_num_threads", lambda: 77)
    elif change == "device":
        monkeypatch.setattr(
            "compress.distill.signals.best_device", lambda: SimpleNamespace(type="cuda")
        )
    elif change in keys.SIGNALS:
        other_version(monkeypatch, change)
    assert signals_of(teacher, tmp_path, **changes).folder != before


def test_ends_are_no_input_of_a_signal_and_a_folder_of_its_own_tells_who_made_it(
    teacher, tmp_path, monkeypatch
):
    before, told = signals_of(teacher, tmp_path).folder, []
    append(teacher / "generation_config.json")
    assert signals_of(teacher, tmp_path).folder == before
    for _ in range(2):
        signals_of(teacher, tmp_path / "mine", log=told.append, own_folder=True)
    assert told == []
    other_version(monkeypatch, "transformers")
    signals_of(teacher, tmp_path / "mine", log=told.append, own_folder=True)
    assert len(told) == 1 and "was made with other versions than here" in told[0]


# ---- scores ----


def score_key(teacher, folder, runtime="torch", text=TEXT, **settings) -> str:
    scorer = Scorer(
        Store(folder / "store"),
        Eval(**{"tasks": ["grammar"], "open_limit": 1} | settings),
        lambda tokens: {"text": text},
        teacher,
        1,
    )
    return sha256_json(scorer.depends(runtime).key_parts())


SETTINGS = {
    "tasks": ["facts"],
    "limit": 3,
    "num_fewshot": 1,
    "perturbations": ["typos"],
    "stop_early": True,
    "batch_size": 4,
    "context_tokens": 64,
    "heldout_sequences": 3,
    "open_prompts": [],
    "open_limit": 2,
    "prompt_tokens": 4,
    "new_tokens": 4,
    "repeats": 2,
    "processes": 2,
    "time_stages": True,
    "prompt_lengths": [8],
    "context_lengths": [64],
    "price_per_hour": 1.0,
    "batch_sizes": [2],
}


@pytest.mark.parametrize(
    "change", [*SETTINGS, "text", "tokenizer.json", "context", "machine", "sources", *keys.SCORES]
)
def test_each_input_changes_the_key_of_scores(teacher, tmp_path, monkeypatch, change):
    before = score_key(teacher, tmp_path)
    assert score_key(teacher, tmp_path) == before
    changes = {change: SETTINGS[change]} if change in SETTINGS else {}
    if change == "text":
        changes = {"text": OTHER}
    elif change == "tokenizer.json":
        append(teacher / change)
    elif change == "context":
        config = json.loads((teacher / "config.json").read_text())
        (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 400}))
    elif change == "machine":
        monkeypatch.setattr("compress.machine.describe", lambda threads: {"cpu": "another"})
    elif change == "sources":
        monkeypatch.setattr("compress.score.inputs.sources_digest", lambda *roots: "another")
    elif change in keys.SCORES:
        other_version(monkeypatch, change)
    assert score_key(teacher, tmp_path, **changes) != before


@pytest.mark.parametrize("runtime", keys.OF_RUNTIME)
def test_a_runtimes_packages_change_its_scores_alone(teacher, tmp_path, monkeypatch, runtime):
    before = {name: score_key(teacher, tmp_path, name) for name in keys.OF_RUNTIME}
    assert len(set(before.values())) == 3
    for package in keys.OF_RUNTIME[runtime]:
        with monkeypatch.context() as patch:
            other_version(patch, package)
            changed = {
                name for name in before if score_key(teacher, tmp_path, name) != before[name]
            }
        assert changed == {runtime}


def test_where_the_tasks_lie_is_no_input_of_scores(teacher, tmp_path):
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    first, second = (score_key(teacher, tmp_path, data_dir=str(folder)) for folder in folders)
    assert first == second


# ---- exports ----


@pytest.mark.parametrize(
    "change",
    ["name", *COPIED, "config.json", "model.safetensors", "sources", *keys.EXPORTS, "gguf"],
)
def test_each_input_changes_the_key_of_an_export(teacher, monkeypatch, change):
    before, name = sha256_json(export_inputs("gguf:Q4_0", model_of(teacher))), "gguf:Q4_0"
    if change == "name":
        name = "gguf:Q8_0"
    elif (teacher / change).is_file():
        append(teacher / change)
    elif change == "sources":
        monkeypatch.setattr("compress.pipeline.sources_digest", lambda *roots: "another")
    else:
        other_version(monkeypatch, change)
    assert sha256_json(export_inputs(name, model_of(teacher))) != before


# ---- text ----


def short_texts(folder: Path) -> list[str]:
    """Two small files to pack."""
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(f"The {name} river was wide. " * 40)
    return [str(folder / f"{name}.txt") for name in ("a", "b")]


@pytest.mark.parametrize(
    "change",
    [
        "seq_len",
        "chat_labels",
        "weights",
        "texts",
        "tokenizer.json",
        "chat_template.jinja",
        *keys.TEXT,
    ],
)
def test_each_input_packs_text_again(teacher, tmp_path, monkeypatch, change):
    sources = short_texts(tmp_path)
    before = {"seq_len": 32, "weights": [1.0, 1.0], "chat_labels": "all"}
    pack(sources, teacher, cache_dir=tmp_path / "data", **before)
    pack(sources, teacher, cache_dir=tmp_path / "data", **before)
    assert len(list((tmp_path / "data").iterdir())) == 1
    if (teacher / change).is_file():
        append(teacher / change)
    elif change in keys.TEXT:
        other_version(monkeypatch, change)
    else:
        before |= {
            "seq_len": {"seq_len": 33},
            "chat_labels": {"chat_labels": "answers"},
            "weights": {"weights": [1.0, 2.0]},
        }.get(change, {})
        sources = sources[::-1] if change == "texts" else sources
    pack(sources, teacher, cache_dir=tmp_path / "data", **before)
    assert len(list((tmp_path / "data").iterdir())) == 2


def test_a_texts_digest_is_of_what_came_out(teacher, tmp_path, monkeypatch):
    sources = short_texts(tmp_path)
    first = pack(sources, teacher, 32, tmp_path / "data")
    other_version(monkeypatch, "transformers")
    assert pack(sources, teacher, 32, tmp_path / "data").digest == first.digest
    assert pack(sources, teacher, 32, tmp_path / "data", packing="documents").digest != first.digest
    assert pack(sources, teacher, 16, tmp_path / "data").digest != first.digest


@pytest.mark.parametrize(
    "change",
    ["count", "tokens", "model.safetensors", "tokenizer.json", "chat_template.jinja", *keys.TEXT],
)
def test_each_input_lets_the_teacher_write_again(teacher, tmp_path, monkeypatch, change):
    monkeypatch.setattr(
        "compress.text.written._continue_all",
        lambda part, prompts, *_: part.write_text('"text"\n' * len(prompts)),
    )

    def write(source="generated:2x8:given"):
        generated(
            source,
            teacher,
            tmp_path / "data",
            lambda line: None,
            lambda name: ["one text", "another"],
        )
        return len(list((tmp_path / "data").glob("generated-*.jsonl")))

    (tmp_path / "data").mkdir()
    assert write() == write() == 1
    if (teacher / change).is_file():
        append(teacher / change)
    elif change in keys.TEXT:
        other_version(monkeypatch, change)
    assert (
        write(
            {"count": "generated:1x8:given", "tokens": "generated:2x9:given"}.get(
                change, "generated:2x8:given"
            )
        )
        == 2
    )
