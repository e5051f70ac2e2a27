"""The smoke recipe interrupted, refused and out of disk."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from smoke_runs import ENV, FAST, compress, newest, records

from compress.__main__ import main
from compress.store import file_table

LONG = ["stages.heal.tokens=19200", "pipeline=[depth,heal]", "export=none", *FAST]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The records of a run that nothing interrupts, and its healed weights."""
    folder = tmp_path_factory.mktemp("whole")
    done = compress(folder, "run", "smoke", *LONG)
    assert done.returncode == 0, done.stderr
    run = newest(folder)
    return records(run), file_table((run / "02-heal" / "weights").resolve())


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_resumes_to_the_same_bytes(whole, tmp_path, how):
    process = subprocess.Popen(
        [sys.executable, "-m", "compress", "run", "smoke", *LONG, "store=cut"],
        cwd=tmp_path,
        env=ENV,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background shell job lets its children ignore it
    )
    for line in process.stderr:
        if "teacher signal" in line and "2/" in line:  # training begins a moment later
            break
    time.sleep(0.5)
    process.send_signal(how)
    process.communicate()
    assert (
        process.returncode
        in {signal.SIGINT: (130,), signal.SIGTERM: (143,), signal.SIGKILL: (-9,)}[how]
    )
    if how is not signal.SIGKILL:
        assert json.loads((newest(tmp_path) / "run.json").read_text())["exit"] == process.returncode
    done = compress(tmp_path, "run", "smoke", *LONG, "store=cut")
    assert done.returncode == 0, done.stderr
    run, (expected, weights) = newest(tmp_path), whole
    assert [r["digest"] for r in records(run)] == [r["digest"] for r in expected]
    assert file_table((run / "02-heal" / "weights").resolve()) == weights


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
    assert re.search(r"what is left of the recipe may need [\d.]+ MB in .*, .* are free", told)
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
