"""Temporary folders: gone with their object, and with the next one where a process was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from compress.collect import sweep
from compress.scratch import SCRATCH, Scratch
from compress.store import Store, sha256_json

HOLD = """
import sys
from compress.scratch import Scratch
held = Scratch()
(held.path / "file").write_text("x")
print(held.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    """No other test's folders are seen."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def held_by_another_process(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "TMPDIR": str(folder)},
        text=True,
    )
    return process, Path(process.stdout.readline().strip())


def test_a_folder_is_gone_with_its_block_and_with_its_object():
    with Scratch() as path:
        (path / "a").write_text("x")
    assert not path.exists()
    held = Scratch()
    path = held.path
    assert path.is_dir()
    del held
    assert not path.exists()


def test_the_next_one_removes_what_a_killed_process_left_and_nothing_else(folder_of_its_own):
    process, left = held_by_another_process(folder_of_its_own)
    (folder_of_its_own / "elsewhere").mkdir()
    (folder_of_its_own / f"{SCRATCH}link").symlink_to(folder_of_its_own / "elsewhere")
    try:
        with Scratch():
            assert (left / "file").is_file()
    finally:
        process.kill()
        process.wait()
    assert (left / "file").is_file()
    with Scratch():
        assert not left.exists()
    assert (folder_of_its_own / "elsewhere").is_dir()


# ---------------------------------------------------------- stores and runs


def torn(store, run):
    """What a process that was killed leaves; returns all of it."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    key = sha256_json("a")
    store.build(key, {}, lambda out, work: {})
    paths = [
        store.root / "entries" / f".{sha256_json('b')}.part" / "weights",
        store.root / "work" / key / "state",
        store.root / "notes" / f".{key}.json.{gone.pid}",
        store.root / "signals" / ("0" * 32) / f".meta.json.{gone.pid}",
        run / ".bundle.part" / "file",
        run / f".run.json.{gone.pid}",
        run / "00-teacher" / f".record.json.{gone.pid}",
        run.with_name("begun") / f".run.json.{gone.pid}",
        store.root / f".store.json.{gone.pid}",
    ]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (run / "run.json").write_text("{}")
    store.register(run)
    store.register(run.with_name("begun"))
    return paths


def test_what_kills_leave_goes_when_a_run_opens_the_store_alone(tmp_path):
    store = Store(tmp_path / "store")
    paths = torn(store, tmp_path / "run")
    kept = [
        store.root / "work" / sha256_json("b") / "state",
        store.root / "notes" / f".{sha256_json('b')}.json.{os.getpid()}",
        tmp_path / "run" / ".mine",
    ]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")

    # Not while somebody else works there: it may be theirs.
    other = Store(tmp_path / "store")
    assert sweep(store) == 0 and all(path.exists() for path in paths)
    del other
    assert sweep(store) == len(paths)
    assert not [path for path in paths if path.exists()]
    assert all(path.exists() for path in kept) and store.has(sha256_json("a"))
    assert sweep(store) == 0
