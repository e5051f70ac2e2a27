"""No password, token or signature of a URL gets into a record, a message, a tracker or a bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from fake_records import write_run

from compress.__main__ import main
from compress.errors import (
    ConfigError,
    refuse_credentials,
    tree_without_credentials,
    without_credentials,
)
from compress.report.html import write_html
from compress.report.records import load_run
from compress.session import log, plain
from compress.track import Guarded, Tracker, open_tracker

CANARY = "planted-canary-4711"
URLS = [
    f"memory://user:{CANARY}@host/x",
    f"s3://KEY:{CANARY}@bucket/p",
    f"s3://KEY:{CANARY}/{CANARY}@bucket/p",
    f"https://u:{CANARY}@h/x?y=1",
    f"https://{CANARY}@host",
    f"https://:{CANARY}@host/x",
    f"HTTPS://u:{CANARY}@h:8080/x",
    f"simplecache::s3://k:{CANARY}@b/x",
    f"https:/u:{CANARY}@h/x",
    f"https://u:a@{CANARY}@h/x",
    f"https://u:it's{CANARY}@h/x",
    f"ssh://{CANARY}@host/x",
    f"https://h/x?X-Amz-Signature={CANARY}&X-Amz-Credential={CANARY}&n=5",
    f"https://h/x?n=5&token={CANARY}",
    f"https://h/x?sig={CANARY}#a",
    f"https://h/x#access_token={CANARY}",
    f"https://h/x?X-Goog-Signature={CANARY}",
    f"s3://b/x?aws_secret_access_key={CANARY}",
    f"abfs://container:{CANARY}@account/x",
    f"hf://user:{CANARY}@host/x",
]
HARMLESS = [
    "s3://bucket/a@b",
    "https://host:8080/a@b",
    "abfs://container@account.dfs.core.windows.net/x",
    "hf://datasets/user/name@main/x",
    "hf://gpt2@main/x",
    "file:///home/a@b/x",
    "C:/me@x",
    "gs://b/x",
    "https://h/?max_tokens=5&design=1",
    "12:30 me@x.org",
    "see https://h.org: write to me@x.org",
    "hub:Salesforce/wikitext@wikitext-2-raw-v1:test:text",
    "generated:5x6:nothing",
]


@pytest.mark.parametrize("url", URLS)
def test_credentials_are_taken_out_of_text_and_refused_in_settings(url):
    for text in (url, f"the file {url!r} does not exist", f"[{url}, next]"):
        shown = without_credentials(text)
        assert CANARY not in shown and "***" in shown and without_credentials(shown) == shown
    for value in ({"a": [{"b": url}]}, {url: 1}):
        with pytest.raises(ConfigError, match="has a user, password or token in a URL") as refused:
            refuse_credentials(value, "where")
        assert CANARY not in str(refused.value)
        assert CANARY not in json.dumps(tree_without_credentials(value))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_gives_no_access_stays_as_it_is(text):
    assert without_credentials(text) == text and plain({"path": [text]}) == {"path": [text]}
    refuse_credentials({"path": [text]}, "where")


@dataclass
class Settings:
    path: Path | str
    more: tuple[str, ...] = ()


def test_plain_and_the_log_hold_none(capfd):
    assert CANARY not in json.dumps(
        plain({"a": Settings(Path(URLS[3]), (URLS[0],)).__dict__, URLS[0]: 1})
    )
    log(f"reading {URLS[1]}")
    assert "reading s3://***@bucket/p" in capfd.readouterr().err


COMMANDS = {
    "a signal's folder": ["run", "smoke", f"stages.heal.signal.path={URLS[0]}"],
    "text": ["run", "smoke", f"data.train=['{URLS[3]}']"],
    "a quoted key of a secret": ["run", "smoke", f"stages.heal.signal.path='{URLS[2]}'"],
    "an escaped one": [
        "run",
        "smoke",
        URLS[0].join(["stages.heal.signal.path=", ""]).replace(":", "\\:"),
    ],
    "a new key": ["run", "smoke", f"+budget.limits.size_bytes={{max: 5, why: '{URLS[0]}'}}"],
    "a teacher": ["run", "smoke", f"teacher={URLS[1]}"],
    "a store": ["run", "smoke", f"store={URLS[1]}"],
    "a run directory": ["run", "smoke", f"hydra.run.dir='{URLS[1]}'"],
    "a project": ["run", "smoke", f"track.project={URLS[3]}", "--plan"],
    "a sweep": ["run", "smoke", "-m", f"stages.heal.signal.path={URLS[0]},{URLS[1]}"],
    "a recipe": ["run", "mine", "--config-dir", "recipes"],
    "a recipe, swept": ["run", "mine", "--config-dir", "recipes", "-m", "seed=1,2"],
    "score's settings": ["score", "model", f"data.heldout=[{URLS[3]}]"],
    "score's model": ["score", URLS[3], "--teacher", "random"],
    "compare": ["compare", URLS[3]],
    "gc": ["gc", "--store", URLS[1]],
    "an unknown verb": [URLS[3]],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_no_command_repeats_or_keeps_one(tmp_path, monkeypatch, capfd, case):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mine.yaml").write_text(
        "defaults: [/base, _self_]\nteacher: {source: 'PLACE'}\n".replace("PLACE", URLS[1])
    )
    before = sorted(tmp_path.rglob("*"))
    assert main(COMMANDS[case]) in (2, 3)
    out, err = capfd.readouterr()
    assert CANARY not in out + err and err.startswith("compress: ")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_recipe_that_came_past_the_command_line_is_refused_before_any_work(tmp_path):
    from test_planning import recipe

    from compress.config import Teacher
    from compress.distill.settings import Signal
    from compress.score.settings import Eval
    from compress.session import Session, open_scorer
    from compress.stages import STAGES
    from compress.text.settings import Data
    from compress.train.settings import Trainer

    stages = recipe().stages | {"heal": STAGES["distill"](tokens=1000, signal=Signal(path=URLS[0]))}
    with pytest.raises(ConfigError, match="stages.heal.signal.path has a user"):
        Session(recipe(stages=stages, store=str(tmp_path / "store")))
    with pytest.raises(ConfigError, match="teacher.source has a user"):
        open_scorer(
            Teacher(URLS[1]),
            Data(["embedded:docstrings"], [], ["embedded:topics"], 64),
            Eval(),
            Trainer(),
            str(tmp_path / "store"),
        )
    assert not list(tmp_path.iterdir())


def test_records_of_before_are_shown_and_copied_without_them(tmp_path, monkeypatch, capfd):
    run = write_run(tmp_path / "runs")
    for file in (run / "run.json", run / "03-heal" / "record.json"):
        about = json.loads(file.read_text()) | {
            "stage_config": {"signal": {"path": URLS[0]}},
            "config": {"data": {"train": [URLS[3]]}},
        }
        file.write_text(json.dumps(about))
    whole = load_run(run)
    (tmp_path / "copies").mkdir()
    write_html([whole], tmp_path / "copies" / "page.html")
    open_tracker("jsonl", run).record(whole.records[3])
    (run / "records.jsonl").rename(tmp_path / "copies" / "records.jsonl")
    pytest.importorskip("wandb")
    for name in ("CACHE", "DATA", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "copies" / "wandb"))
    tracker = open_tracker("wandb", run, mode="offline")
    tracker.record(whole.records[3])
    tracker.finish(0)
    assert tracker.alive and list(run.glob("wandb/offline-run-*/*.wandb"))
    files = [
        file
        for folder in (tmp_path / "copies", run / "wandb")
        for file in folder.rglob("*")
        if file.is_file()
    ]
    assert len(files) > 3 and not [file for file in files if CANARY.encode() in file.read_bytes()]


def test_a_tracker_that_stops_does_not_repeat_one(tmp_path, capfd):
    class Broken(Tracker):
        def record(self, record):
            raise OSError(f"{URLS[3]} can't be reached")

    Guarded("broken", Broken(tmp_path)).record({})
    err = capfd.readouterr().err
    assert "https://***@h/x?y=1 can't be reached" in err and CANARY not in err


# ----------------------------------------------------- keys, and secrets of the environment


@pytest.mark.parametrize(
    "key",
    [
        "hf_" + "a1B2" * 9,
        "sk-proj-" + "x9" * 20,
        "ghp_" + "k" * 36,
        "AKIA" + "ABCDEFGH12345678",
        f"-----BEGIN EC PRIVATE KEY-----\n{CANARY}\n-----END EC PRIVATE KEY-----",
        f"-----BEGIN PRIVATE KEY-----\n{CANARY}",
    ],
)
def test_a_key_is_known_by_its_shape(key, capfd):
    for text in (f"401 with {key} refused", f"Authorization: Bearer {CANARY}.x"):
        assert "***" in without_credentials(text)
    told = without_credentials(f"a {key} b")
    assert key not in told and CANARY not in told and told.startswith("a ***")
    log(f"the hub refuses {key}")
    assert key not in capfd.readouterr().err
    assert key not in json.dumps(plain({"why": [key]}))


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"),
        *("AWS_SESSION_TOKEN", "COMPRESS_KEY", "COMPRESS_TEACHER_KEY", "COMPRESS_SIGN_PASSWORD"),
        *("OPENAI_API_KEY", "MY_DB_PASSWD", "AZURE_CREDENTIAL", "some_secret"),
    ],
)
def test_a_secret_of_the_environment_is_known_by_its_value(name, monkeypatch, capfd):
    monkeypatch.setenv(name, CANARY)
    assert without_credentials(f"x{CANARY}y") == "x***y"
    log(f"tried {CANARY}")
    assert CANARY not in capfd.readouterr().err
    assert main(["verify", f"/nowhere/{CANARY}"]) == 3
    assert CANARY not in capfd.readouterr().err


def test_paths_short_words_and_other_variables_are_no_secrets(monkeypatch):
    for name, value in (
        ("SSH_KEY", "/home/me/.ssh/id"),
        ("API_KEY", "short"),
        ("TOKENIZERS_PARALLELISM", "something long"),
        ("KEYBOARD", "something else"),
    ):
        monkeypatch.setenv(name, value)
        assert without_credentials(f"it is {value}") == f"it is {value}"
