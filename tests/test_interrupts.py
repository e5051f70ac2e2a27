"""The smoke recipe refused and out of disk. Kills and signals: `tests/test_faults.py`."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from smoke_runs import FAST, compress, newest, records

from compress.__main__ import main

REFUSED = {
    "missing teacher": (
        ["teacher=./nowhere"],
        3,
        "teacher './nowhere' does not exist; give a checkpoint directory",
    ),
    "no tokenizer": (["teacher=./untokenized"], 3, "has no tokenizer"),
    "architecture": (["teacher=./strange"], 3, "strange"),
    "empty data": (["data.train=[empty.txt]"], 3, "empty.txt has no usable text"),
    "too many blocks": (["stages.depth.blocks=9"], 3, "slot 'depth' after 'vocab'"),
    "unknown task": (["eval.tasks=[gramar]"], 2, "grammar"),
    "format without package": (
        ["export.files=[compressed_tensors]"],
        2,
        "needs compressed_tensors, which is not installed: pip install 'compressed",
    ),
    "no key to sign with": (["export.sign_key=none.pem"], 2, "key none.pem: no such file"),
    "architecture of a file": (
        ["teacher=./scaled"],
        3,
        "rope_type 'linear' can't be written as a GGUF of llama",
    ),
    "read-only store": (["store=file/store"], 5, "can't be written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_before_any_stage(tmp_path, tiny_teacher, monkeypatch, capfd, case):
    monkeypatch.chdir(tmp_path)
    for name in ("untokenized", "strange", "scaled"):
        shutil.copytree(tiny_teacher, tmp_path / name)
    (tmp_path / "untokenized" / "tokenizer.json").unlink()
    config = json.loads((tmp_path / "strange" / "config.json").read_text())
    (tmp_path / "strange" / "config.json").write_text(
        json.dumps(config | {"model_type": "strange", "architectures": ["StrangeForCausalLM"]})
    )
    rope = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config | rope))
    if case == "format without package":
        monkeypatch.setattr("compress.formats.importlib.util.find_spec", lambda name: None)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "file").write_text("")
    arguments, code, message = REFUSED[case]
    assert main(["run", "smoke", *arguments]) == code
    assert message in capfd.readouterr().err
    assert not list(tmp_path.glob("runs/smoke/*"))


def test_a_full_disk_is_exit_5_and_keeps_what_was_made(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compress.models.checkpoint.write_tensors", full)
    assert main(["run", "smoke", *FAST]) == 5
    told = capfd.readouterr().err
    assert re.search(r"a run needs at least [\d.]+ MB, .* are free in", told)
    assert not list(tmp_path.glob("runs/.store/entries/[0-9a-f]*")) and not list(
        tmp_path.glob("runs/.store/entries/.*.part")
    )


def test_too_little_disk_is_refused_before_work(tmp_path, monkeypatch, capfd):
    import collections

    monkeypatch.chdir(tmp_path)
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 9, 1))
    assert main(["run", "smoke", *FAST]) == 5
    assert re.search(r"may need [\d.]+ MB in .*, 1 bytes are free", capfd.readouterr().err)
    assert not list(tmp_path.glob("runs/smoke/*"))


def test_a_stage_that_did_not_pay_is_passed_over_where_the_recipe_says_so(tmp_path):
    done = compress(
        tmp_path,
        "run",
        "smoke",
        "pipeline=[depth,heal,round]",
        "stages.heal.lr=1.0",
        "stages.heal.keep=better",
        "export=none",
        *FAST,
    )
    assert done.returncode == 0, done.stderr
    by = {record["slot"]: record for record in records(newest(tmp_path))}
    assert by["heal"]["payoff"]["paid"] is False and by["heal"]["payoff"]["kept"] == "depth"
    assert by["round"]["parent"] == "depth"
    assert "heal did not pay" in done.stderr and "depth goes on in its place" in done.stderr
