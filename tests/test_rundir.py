"""Run directories: taken only when they are new, empty or ours; rewritten without a user's file
being lost; readable after any kill.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_collect import DEAD, planted, tree
from test_planning import recipe

from compress.errors import EXIT_RESOURCES, ConfigError, ResourceError, exit_code, is_disk
from compress.models.checkpoint import Model
from compress.planning import amount
from compress.report.records import folder_of, load_run
from compress.rundir import RunDir, reserved
from compress.score.measured import Measured
from compress.store import Store, write_json

SLOTS = ("teacher", "depth", "heal")


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Asking git and the machine takes most of the time, and so does the disk."""
    monkeypatch.setattr("compress.store.fsync", lambda path: None)
    monkeypatch.setattr(
        "compress.rundir.machine",
        SimpleNamespace(git_sha=str, versions=dict, describe=lambda threads: {}),
    )


def opened(path: Path, store: Path) -> RunDir:
    """A run directory of a session that has done nothing."""
    scorer = SimpleNamespace(digests={})
    return RunDir(
        path, SimpleNamespace(recipe=recipe(), store=Store(store), scorer=scorer, threads=1)
    )


def add(folder: RunDir, slot: str, weights: Path, key: str = "") -> None:
    if key:
        folder.name_key(key)
    measured = Measured(
        Model(weights, "d" * 64), "k", {"size_bytes": 1.0}, [{"doc_id": 0}], {}, {}, {}, {}
    )
    record = {
        "slot": slot,
        "technique": slot,
        "parent": None,
        "digest": "d" * 64,
        "scores": {"size_bytes": 1.0},
        "verdicts": [],
    }
    folder.add(record, measured, [])


def whole(path: Path, store: Path, slots: tuple[str, ...] = SLOTS) -> RunDir:
    """A finished run."""
    (store / "weights").mkdir(parents=True, exist_ok=True) if store.is_dir() else Store(store)
    folder = opened(path, store)
    for number, slot in enumerate(slots):
        add(folder, slot, store / "entries", key=str(number) * 64)
    folder.finish(0)
    return folder


def bundle(path: Path) -> None:
    planted(path / "bundle", "manifest.json", "hf/config.json")
    (path / "bundle" / "SHA256SUMS").write_text(
        f"{'0' * 64}  manifest.json\n{'0' * 64}  hf/config.json\n"
    )


OURS = '{"schema": 1, "recipe": "r", "name": "r/t", "slots": [], "keys": []}'
REFUSED = {
    "a user's folder": ({"thesis.tex": "mine"}, "holds thesis.tex and no run.json"),
    "a folder with a bundle alone": ({"bundle/thesis.tex": "mine"}, "holds bundle and no run.json"),
    "another program's run.json": ({"run.json": '{"speed": 5}'}, "is not of a run of this version"),
    "a torn run.json": ({"run.json": '{"schema": 1,'}, "is not JSON"),
    "a list": ({"run.json": "[]"}, "holds a JSON list"),
    "a newer run": ({"run.json": OURS.replace("1", "2", 1)}, r"\(schema 2\)"),
    "a bundle of the user's": (
        {"run.json": OURS, "bundle/thesis.tex": "mine"},
        "bundle was not written with a bundle",
    ),
    "a file in our bundle": (
        {
            "run.json": OURS,
            "bundle/SHA256SUMS": f"{'0' * 64}  manifest.json\n",
            "bundle/manifest.json": "{}",
            "bundle/thesis.tex": "mine",
        },
        "thesis.tex was not written with a bundle",
    ),
    "copied weights": (
        {
            "run.json": OURS,
            "00-teacher/record.json": '{"schema": 1, "slot": "teacher", "index": 0}',
            "00-teacher/weights/a": "1",
        },
        "holds weights themselves",
    ),
    "a page that is a folder": (
        {"run.json": OURS, "report.html/thesis.tex": "mine"},
        "report.html is in the way",
    ),
    "a store": ({"store.json": "{}", "entries/a": "1"}, "and no run.json"),
    "a hidden file": ({".profile": "mine"}, "holds .profile and no run.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_directory_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path, case):
    files, message = REFUSED[case]
    for name, text in files.items():
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message), reserved(tmp_path / "out"):
        raise AssertionError("work began")
    assert tree(tmp_path) == before


def test_a_link_in_the_place_of_a_slot_is_refused(tmp_path):
    out = whole(tmp_path / "out", tmp_path / "store").path
    (out / "00-teacher").rename(tmp_path / "elsewhere")
    (out / "00-teacher").symlink_to(tmp_path / "elsewhere")
    before = tree(tmp_path)
    with pytest.raises(ValueError, match="00-teacher is in the way"), reserved(out):
        raise AssertionError("work began")
    assert tree(tmp_path) == before


def test_the_current_folder_is_refused_also_when_it_is_empty(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("", ".", str(tmp_path), "link"):
        with pytest.raises(ConfigError, match="is the current folder"), reserved(Path(name)):
            raise AssertionError("work began")


def test_new_empty_and_interrupted_directories_are_taken_and_a_refused_run_leaves_none(tmp_path):
    (tmp_path / "empty").mkdir()
    planted(tmp_path / "killed", f".run.json.{DEAD}")
    for name in ("new", "empty", "killed"):
        with reserved(tmp_path / name) as path:
            opened(path, tmp_path / "store")
        assert json.loads((tmp_path / name / "run.json").read_text())["exit"] is None
        assert not list((tmp_path / name).glob(".*"))
    with pytest.raises(ZeroDivisionError), reserved(tmp_path / "refused" / "later"):
        raise ZeroDivisionError
    assert not (tmp_path / "refused" / "later").exists()


def test_a_repeated_command_rewrites_its_run_and_nothing_of_the_user_s(tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    whole(out, store)
    bundle(out)
    mine = planted(
        out,
        "todo.md",
        "plots/a.png",
        "01-depth/remarks.txt",
        "02-heal/remarks.txt",
        "2024-notes/record.json",
        ".todo.md.4194305",
    )
    planted(out, f".records.jsonl.{DEAD}", ".bundle.part/half", "report.html")
    with reserved(out) as path:
        folder = opened(path, store)
        assert json.loads((out / "run.json").read_text())["keys"] == [
            str(n) * 64 for n in range(3)
        ], "gc keeps them until the end"
        with pytest.raises(ValueError, match="incomplete run"):
            load_run(out)
        assert (out / "bundle" / "manifest.json").is_file(), "it stays until there is another"
        for slot in ("teacher", "heal"):
            add(folder, slot, store / "entries", key="7" * 64)
        assert [record["slot"] for record in load_run(out).records] == ["teacher", "heal"]
        assert not folder.place_for_bundle().exists()
        folder.finish(0)
    assert {path: path.read_bytes() for path in mine} == mine
    assert load_run(out).info["keys"] == ["7" * 64]
    names = {path.name for path in out.iterdir()}
    assert names == {
        "00-teacher",
        "01-depth",
        "01-heal",
        "02-heal",
        "2024-notes",
        "plots",
        "records.jsonl",
        "run.json",
        "todo.md",
        ".todo.md.4194305",
    }
    assert [path.name for path in (out / "02-heal").iterdir()] == ["remarks.txt"]


def test_the_store_knows_where_its_runs_are(tmp_path):
    whole(tmp_path / "far" / "out", tmp_path / "store")
    (note,) = (tmp_path / "store" / "runs").iterdir()
    assert json.loads(note.read_text())["run"] == str((tmp_path / "far" / "out").resolve())


def test_two_runs_of_one_second_get_two_directories(tmp_path):
    stamp = time.strftime("%Y-%m-%dT%H-%M-%S")
    for name in (stamp, f"{stamp}-0"):
        path = tmp_path / "smoke" / name
        with reserved(path) as first, reserved(path) as second, reserved(path) as third:
            assert [one.name for one in (first, second, third)] == [name, f"{name}-2", f"{name}-3"]
        with reserved(path) as first:
            opened(first, tmp_path / "store")
        with reserved(path) as later:
            assert later.name == f"{name}-2", "also when the first has ended"


def test_a_directory_that_was_named_belongs_to_one_run_at_a_time(tmp_path):
    for name in ("mine", "2020-01-01T00-00-00"):
        with reserved(tmp_path / name) as path:
            opened(path, tmp_path / "store")
            with (
                pytest.raises(ResourceError, match="another run is writing"),
                reserved(tmp_path / name),
            ):
                raise AssertionError("work began")
        with reserved(tmp_path / name) as again:
            assert again == path, "an earlier run is taken up where it is"


@pytest.mark.parametrize("slot", ["a/b", "../../../evil", "..", "a b\n", "x" * 300, ""])
def test_a_slot_is_one_folder_whatever_it_is_called(tmp_path, slot):
    folder = whole(tmp_path / "out", tmp_path / "store", ("teacher", slot))
    assert folder_of(folder.path, folder.records[1]).parent == folder.path
    run = load_run(folder.path)
    assert [record["slot"] for record in run.records] == ["teacher", slot]
    assert run.rows(run.records[1], "items") == [{"doc_id": 0}]
    assert {path.name for path in tmp_path.iterdir()} == {"out", "store"}


def killed_at(event: int, path: Path, store: Path) -> bool:
    """Write a run in a child that dies at its n-th write or rename; whether it was through before
    that.
    """
    child = os.fork()
    if child == 0:
        events = 0

        def counted(real):
            def call(*arguments, **options):
                nonlocal events
                events += 1
                if events > event:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        Path.write_bytes, Path.replace, Path.symlink_to, Path.mkdir = map(
            counted, (Path.write_bytes, Path.replace, Path.symlink_to, Path.mkdir)
        )
        with reserved(path):
            whole(path, store, SLOTS[:2])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_run_that_was_killed_anywhere_is_readable_and_taken_up(tmp_path):
    Store(tmp_path / "store")
    (tmp_path / "store" / "weights").mkdir()
    seen = set()
    for event in range(200):
        out = tmp_path / str(event)
        through = killed_at(event, out, tmp_path / "store")
        try:
            records = [record["slot"] for record in load_run(out).records]
        except ValueError as error:
            assert any(
                said in str(error) for said in ("it has no run.json", "no record.json for any slot")
            ), error
            records = []
        assert records == list(SLOTS[: len(records)])
        seen.add(len(records))
        if through:
            break
        with reserved(out) as path:
            whole(path, tmp_path / "store", SLOTS[:2])
        assert [record["slot"] for record in load_run(out).records] == list(SLOTS[:2])
        assert not list(out.rglob(".*")), "nothing torn is left"
    assert seen == {0, 1, 2} and event > 20


def test_a_record_that_no_finished_run_names_is_still_refused(tmp_path):
    folder = whole(tmp_path / "out", tmp_path / "store")
    write_json(folder.path / "run.json", folder.about | {"slots": ["teacher", "depth"]})
    with pytest.raises(ValueError, match="slot 'heal' is not in run.json's slots"):
        load_run(folder.path)


@pytest.mark.parametrize("before", [None, 0])
def test_a_run_that_ends_by_a_full_disk_says_so_where_it_can(tmp_path, monkeypatch, before):
    folder = opened(tmp_path / "out", tmp_path / "store")
    folder.about["exit"] = before  # 0 while the bundle is being written
    add(folder, "teacher", tmp_path / "store" / "entries")
    size = (tmp_path / "out" / "run.json").stat().st_size

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("compress.rundir.write_json", full)
    folder.finish(EXIT_RESOURCES)
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (
        about["exit"] == 5
        and about["slots"] == ["teacher"]
        and (tmp_path / "out" / "run.json").stat().st_size == size
    )


def test_a_file_size_limit_is_a_matter_of_the_disk(tmp_path):
    import torch
    from safetensors.torch import save_file

    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        codes = []
        for write in (
            lambda: save_file({"a": torch.zeros(9999)}, tmp_path / "a"),
            lambda: (tmp_path / "b").write_bytes(b"x" * 9999),
        ):
            try:
                write()
            except Exception as error:
                codes.append(exit_code(error))
        os._exit(0 if codes == [EXIT_RESOURCES] * 2 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for code in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        assert is_disk(OSError(code, "x")) and is_disk(
            RuntimeError(f"I/O error: x (os error {code})")
        )
    assert not is_disk(OSError(errno.ENOENT, "x")) and not is_disk(ValueError("(os error 2)"))


def test_small_amounts_of_disk_are_told_apart():
    said = [amount(size) for size in (0, 999, 400_000, 12_345_678, 2_500_000_000)]
    assert said == ["0 bytes", "999 bytes", "400.0 kB", "12.3 MB", "2.5 GB"]


def test_a_file_where_the_run_directory_should_be_is_input(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError) as error, reserved(tmp_path / "file"):
        raise AssertionError("work began")
    assert exit_code(error.value) == 3 and (tmp_path / "file").read_text() == "mine"


def test_a_curve_and_its_time_outlive_a_kill_after_the_weights_are_there(tmp_path, monkeypatch):
    from compress import pipeline

    store = Store(tmp_path)

    class Stage:
        def run(self, parent, out, context):
            (out / "weights").write_bytes(b"1")
            context["curve"].append({"step": 1})
            return {}

    session = SimpleNamespace(
        recipe=SimpleNamespace(stages={"heal": Stage()}),
        store=store,
        context=lambda slot, parent, work, curve: {"curve": curve},
    )
    parent = SimpleNamespace(model=SimpleNamespace(path=tmp_path))

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)  # what comes after the rename
    with pytest.raises(KeyboardInterrupt):
        pipeline.build(session, "heal", parent, "a" * 64, {})
    monkeypatch.undo()
    (tmp_path / "work" / ("a" * 64)).mkdir(exist_ok=True)
    assert pipeline.build(session, "heal", parent, "a" * 64, {}) == store.entry("a" * 64)
    note = store.note("a" * 64)
    assert (
        note["curve"] == [{"step": 1}]
        and note["seconds"] > 0
        and not (tmp_path / "work" / ("a" * 64)).exists()
    )
