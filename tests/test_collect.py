"""What `compress gc` may remove: nothing of a folder that is no store, nothing that a run needs or
uses, nothing of the user's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.__main__ import main
from compress.collect import collect
from compress.errors import ConfigError
from compress.store import FIRST_ROOMS, STORE_JSON, Store, sha256_json

ROOT = Path(__file__).resolve().parents[1]
KEYS = [sha256_json(n) for n in range(4)]
DEAD = 2**22 + 1  # no process has a number above 2^22


def write(out, work):
    (out / "weights").write_bytes(b"1234")
    (work / "state").write_text("step 3")
    return {}


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


def planted(folder: Path, *names: str) -> dict[Path, bytes]:
    """Files of a user, by path."""
    files = {folder / name: f"canary {name}".encode() for name in names}
    for path, data in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return files


def run_at(path: Path, *keys: str, digest: str = "") -> Path:
    """A run directory that names keys and, in a record, weights."""
    (path / "00-teacher").mkdir(parents=True)
    about = {"schema": 1, "recipe": "r", "name": "r/t", "slots": ["teacher"], "keys": list(keys)}
    (path / "run.json").write_text(json.dumps(about))
    (path / "00-teacher" / "record.json").write_text(
        json.dumps({"schema": 1, "slot": "teacher", "digest": digest})
    )
    return path


def filled(root: Path) -> Store:
    """A store with a finished entry, its note and scores for each of KEYS,
    and a signal and a text.
    """
    store = Store(root)
    for number, key in enumerate(KEYS):
        store.build(key, {}, write)
        store.note(key, {"seconds": 1})
        (root / "scores" / f"{str(number) * 16}-{'a' * 32}.json").write_text("{}")
    (root / "signals" / ("5" * 32)).mkdir()
    (root / "signals" / ("5" * 32) / "meta.json").write_text("{}")
    (root / "data" / ("d" * 64 + ".safetensors")).write_text("x")
    return store


def entries(root: Path) -> set[str]:
    return {path.name for path in (root / "entries").iterdir()}


USERS = {
    "rooms like ours": ["data/mine.csv", "notes/todo.md", "scores/best.json"],
    "all rooms and a file": [*(f"{room}/mine.txt" for room in FIRST_ROOMS), "thesis.tex"],
    "one file": ["thesis.tex"],
    "a mark of something else": ["data/mine.csv", STORE_JSON],
}


@pytest.mark.parametrize("case", USERS)
def test_a_folder_that_is_no_store_is_refused_and_left_as_it_is(tmp_path, monkeypatch, capfd, case):
    monkeypatch.chdir(tmp_path)
    planted(tmp_path / "folder", *USERS[case])
    if STORE_JSON in USERS[case]:
        (tmp_path / "folder" / STORE_JSON).write_text('{"shop": "flowers"}')
    before = tree(tmp_path / "folder")
    assert main(["gc", "--store", "folder", "--yes", "--all"]) == 3
    err = capfd.readouterr().err
    assert "is not a store: it holds" in err or "is not the mark of a store" in err
    with pytest.raises(ValueError, match="is not"):
        Store("folder")
    assert tree(tmp_path / "folder") == before


def test_an_empty_name_an_empty_folder_a_missing_one_and_a_url_are_no_stores(
    tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name, code in (("", 2), ("s3://bucket/store", 2), ("nowhere", 3), ("empty", 3)):
        assert main(["gc", "--store", name, "--yes"]) == code
    assert "it has no store.json" in capfd.readouterr().err
    assert tree(tmp_path) == {"empty": b""}, "gc makes no store"
    for name in ("", "s3://bucket/store"):
        with pytest.raises(ConfigError, match="no folder of this machine"):
            Store(name)
    Store("empty"), Store("new/one")
    assert (tmp_path / "new" / "one" / STORE_JSON).is_file() and (
        tmp_path / "empty" / STORE_JSON
    ).is_file()


def test_an_older_store_gets_its_mark_and_gc_says_what_it_can_t_know(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "store")
    (tmp_path / "store" / STORE_JSON).unlink()
    shutil.rmtree(tmp_path / "store" / "runs")
    run_at(tmp_path / "runs" / "r" / "t", KEYS[0])
    assert main(["gc", "--store", "store", "--yes"]) == 0
    assert (
        "is older than its list of runs: of the runs made before, those below runs alone are known"
        in capfd.readouterr().err
    )
    assert (tmp_path / "store" / STORE_JSON).is_file() and entries(tmp_path / "store") == {KEYS[0]}


def test_a_store_whose_making_was_killed_is_made_again(tmp_path):
    planted(tmp_path / "store", f".{STORE_JSON}.{DEAD}")
    Store(tmp_path / "store")
    (tmp_path / "marked").mkdir()
    shutil.copy(
        tmp_path / "store" / STORE_JSON, tmp_path / "marked"
    )  # killed before the rooms were made
    assert Store(tmp_path / "marked").build(KEYS[0], {}, write).is_dir()


def test_files_that_are_not_named_as_ours_stay_and_are_named(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    store = filled(tmp_path / "store")
    mine = planted(
        store.root,
        "thesis.tex",
        "data/mine.csv",
        "notes/todo.md",
        "scores/best.json",
        "signals/mine/a.txt",
        "work/plan.txt",
        "runs/list.txt",
        "entries/old.tar",
        "locks/door",
        "notes/.todo.md.4194305",
        f"entries/{KEYS[1]}/remarks.txt",
        f"signals/{'5' * 32}/remarks.txt",
    )
    (store.root / "entries" / ("f" * 64)).symlink_to(tmp_path, target_is_directory=True)
    del store
    assert main(["gc", "--store", "store", "--yes", "--all"]) == 0
    err = capfd.readouterr().err
    assert {path: path.read_bytes() for path in mine} == mine
    assert "left where they are" in err and "thesis.tex" in err and "and 3 more" in err
    assert (tmp_path / "store" / "entries" / ("f" * 64)).is_symlink() and tmp_path.is_dir()
    assert entries(tmp_path / "store") == {"old.tar", "f" * 64, KEYS[1]}


def test_gc_keeps_what_runs_name_wherever_they_are_and_forgets_those_that_are_gone(
    tmp_path, monkeypatch, capfd
):
    work, far, near = (
        tmp_path / "work",
        tmp_path / "far" / "out" / "mine",
        tmp_path / "work" / "runs" / "r" / "t",
    )
    work.mkdir()
    monkeypatch.chdir(work)
    store = filled(tmp_path / "store")
    store.register(run_at(far, KEYS[0], digest="0" * 64))
    run_at(near, KEYS[1], digest="1" * 64)
    store.register(run_at(tmp_path / "gone", KEYS[2]))
    shutil.rmtree(tmp_path / "gone")
    del store
    arguments = ["gc", "--store", str(tmp_path / "store")]
    before = tree(tmp_path)
    assert main(arguments) == 0
    assert "8 things" in capfd.readouterr().out and tree(tmp_path) == before, (
        "without --yes nothing changes"
    )
    assert main([*arguments, "--yes"]) == 0
    assert entries(tmp_path / "store") == {KEYS[0], KEYS[1]}
    assert {path.name[0] for path in (tmp_path / "store" / "scores").iterdir()} == {"0", "1"}
    assert len(list((tmp_path / "store" / "runs").iterdir())) == 1
    monkeypatch.chdir(tmp_path)  # from where no run is below ./runs
    assert main([*arguments, "--yes", "--runs", str(work / "runs")]) == 0
    assert entries(tmp_path / "store") == {KEYS[0], KEYS[1]}
    assert main([*arguments, "--yes"]) == 0
    assert entries(tmp_path / "store") == {KEYS[0]}
    assert main([*arguments, "--runs", "nowhere"]) == 2


def test_a_store_and_its_runs_may_be_moved_together(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "old" / "store").register(run_at(tmp_path / "old" / "out" / "mine", KEYS[0]))
    (tmp_path / "old").rename(tmp_path / "new")
    assert main(["gc", "--store", "new/store", "--yes"]) == 0 and entries(
        tmp_path / "new" / "store"
    ) == {KEYS[0]}
    assert len(list((tmp_path / "new" / "store" / "runs").iterdir())) == 1


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 1}', '{"run": 5}'])
def test_a_torn_list_of_runs_keeps_everything(tmp_path, capfd, text):
    store = filled(tmp_path / "store")
    store.register(run_at(tmp_path / "far", KEYS[0]))
    (note,) = (store.root / "runs").iterdir()
    note.write_text(text)
    del store
    before = tree(tmp_path)
    assert main(["gc", "--store", str(tmp_path / "store"), "--yes"]) == 3
    assert str(note) in capfd.readouterr().err and tree(tmp_path) == before


def test_gc_does_not_empty_a_store_of_which_no_run_is_known(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "store")
    arguments = ["gc", "--store", "store", "--yes"]
    assert main(arguments) == 2
    assert (
        "all 4 finished entries of" in (err := capfd.readouterr().err)
        and "--runs DIR, or repeat with --all" in err
    )
    run_at(tmp_path / "runs" / "r" / "t", "0" * 64)  # of another store
    assert main(arguments) == 2 and entries(tmp_path / "store") == set(KEYS)
    assert main([*arguments, "--all"]) == 0 and entries(tmp_path / "store") == set()
    assert main(arguments) == 0, "where nothing is finished there is nothing to lose"


@pytest.mark.parametrize(
    "text", ["", '{"schema": 1, "keys": [', "[]", '{"schema": 2}', '{"schema": 1}']
)
def test_a_torn_or_foreign_run_json_keeps_everything(tmp_path, monkeypatch, capfd, text):
    monkeypatch.chdir(tmp_path)
    store = filled(tmp_path / "store")
    store.register(run_at(tmp_path / "far", KEYS[0]))
    (tmp_path / "far" / "run.json").write_text(text)
    del store
    before = tree(tmp_path)
    assert main(["gc", "--store", "store", "--yes", "--all"]) == 3
    assert str(tmp_path / "far" / "run.json") in capfd.readouterr().err and tree(tmp_path) == before


def other(code: str, *arguments: object) -> subprocess.Popen:
    """Another process that prints a line when it is ready and ends with its input."""
    code = (
        f"import sys\nfrom compress.store import Store\n{code}\n    print('ready', flush=True)\n   "
        " sys.stdin.read()\n"
    )
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(
        line,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_store_at_work_keeps_gc_out_until_its_process_is_gone(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    filled(tmp_path / "store")
    before = tree(tmp_path)
    worker = other("store = Store(sys.argv[1])\nif store:", tmp_path / "store")
    try:
        assert worker.stdout.readline() == "ready\n"
        assert main(["gc", "--store", "store", "--yes", "--all"]) == 5
        assert "another process works in the store" in capfd.readouterr().err
        assert tree(tmp_path) == before
        Store("store").build(sha256_json("another run at the same time"), {}, write)
    finally:
        worker.kill()
        worker.communicate()
    assert (
        main(["gc", "--store", "store", "--yes", "--all"]) == 0
        and entries(tmp_path / "store") == set()
    )


def test_what_starts_while_gc_is_at_work_waits_for_it(tmp_path, capfd):
    Store(tmp_path)
    cleaner = other("with Store(sys.argv[1]).alone():", tmp_path)
    assert cleaner.stdout.readline() == "ready\n"
    starter = other("store = Store(sys.argv[1])\nif store:", tmp_path)
    assert "waiting for another command" in starter.stderr.readline()
    time.sleep(0.1)
    assert starter.poll() is None
    assert (
        main(["gc", "--store", str(tmp_path)]) == 5
        and "another `compress gc` is emptying" in capfd.readouterr().err
    )
    cleaner.communicate("")
    assert starter.stdout.readline() == "ready\n"
    starter.communicate("")


def test_work_that_a_killed_process_left_beside_its_entry_goes(tmp_path):
    store = Store(tmp_path)
    store.build(KEYS[0], {}, write)
    for remove in (
        store.has,
        lambda key: store.build(key, {}, write),
        lambda key: collect(store, {key}, set(), dry_run=False),
    ):
        planted(store.root / "work" / KEYS[0], "state-00000003/tensors.safetensors")
        remove(KEYS[0])
        assert not (store.root / "work" / KEYS[0]).exists() and store.has(KEYS[0])


def test_unfinished_work_of_a_known_run_stays_with_signals_and_text(tmp_path):
    store = filled(tmp_path)
    planted(store.root / "work" / ("9" * 64), "state-00000003/tensors.safetensors")
    before = tree(tmp_path)
    keep, digests = {*KEYS, "9" * 64}, {str(n) * 64 for n in range(4)}
    assert collect(store, keep, digests, dry_run=False) == (0, 0, [])
    assert tree(tmp_path) == before
    assert collect(store, set(KEYS), digests, dry_run=False).things == 3
    assert not any(
        path for room in ("work", "signals", "data") for path in (store.root / room).iterdir()
    )


def test_what_dead_processes_were_writing_goes_and_what_live_ones_write_stays(tmp_path):
    store = filled(tmp_path)
    names = {
        "notes": f"{KEYS[0]}.json",
        "scores": f"{'0' * 16}-{'a' * 32}.states.safetensors",
        "data": f"{'e' * 64}.safetensors",
        "runs": f"{'b' * 32}.json",
        "entries": f"{KEYS[0]}",
    }
    dead = planted(store.root, *(f"{room}/.{name}.{DEAD}" for room, name in names.items()))
    live = planted(store.root, *(f"{room}/.{name}.{os.getpid()}" for room, name in names.items()))
    planted(store.root, f"entries/.{KEYS[1]}.part/half")
    collected = collect(store, {*KEYS, "9" * 64}, {str(n) * 64 for n in range(4)}, dry_run=False)
    assert not any(path.exists() for path in dead) and all(path.exists() for path in live)
    assert (
        set(collected.strangers) == set(live)
        and not (store.root / "entries" / f".{KEYS[1]}.part").exists()
    )
    assert all(store.has(key) for key in KEYS)


def test_run_directories_lose_what_killed_processes_were_writing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = filled(tmp_path / "store")
    run = run_at(tmp_path / "far", KEYS[0])
    store.register(run)
    del store
    torn = planted(
        run,
        f".run.json.{DEAD}",
        f".report.html.{DEAD}",
        f"00-teacher/.record.json.{DEAD}",
        f"bundle/.model.sig.{DEAD}",
        ".bundle.part/hf/weights",
    )
    mine = planted(run, "todo.md", f".todo.md.{DEAD}", "bundle/manifest.json")
    assert main(["gc", "--store", "store", "--yes"]) == 0
    assert (
        not any(path.exists() for path in torn)
        and {path: path.read_bytes() for path in mine} == mine
    )


def test_a_gc_that_is_killed_leaves_no_half_entry(tmp_path, monkeypatch):
    store = filled(tmp_path)

    def killed(path, **_):
        (path / "weights").unlink(missing_ok=True)
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("compress.collect.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        collect(store, {KEYS[0]}, set(), dry_run=False)
    monkeypatch.undo()
    assert sum(store.has(key) for key in KEYS) == 3
    assert all(store.build(key, {}, write).is_dir() and store.has(key) for key in KEYS)


def test_a_stage_that_fails_gives_its_disk_space_back(tmp_path):
    store = Store(tmp_path)

    def fails(out, work):
        (out / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.build(KEYS[0], {}, fails)
    assert entries(tmp_path) == set()
