"""Entries are whole or absent, changed bytes are noticed, a held key is refused, gc leaves what
runs name.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress.collect import collect
from compress.errors import ResourceError
from compress.store import Store, file_table, sha256_json

KEY = sha256_json("a stage")


def write(out, work):
    (out / "weights").write_bytes(b"1234")
    return {"steps_count": 3}


def test_an_entry_holds_inputs_metrics_and_every_file(tmp_path):
    store = Store(tmp_path / "store")
    path = store.build(KEY, {"seed": 1}, write)
    about = store.stage_json(KEY)
    assert about["inputs"] == {"seed": 1}
    assert about["metrics"] == {"steps_count": 3}
    assert about["files"] == {"weights": file_table(path)["weights"]}
    assert not (store.root / "work" / KEY).exists()


def test_an_identical_stage_is_not_made_twice(tmp_path):
    store = Store(tmp_path)
    store.build(KEY, {}, write)

    def never(out, work):
        raise AssertionError("made again")

    store.build(KEY, {}, never)


def test_a_failing_stage_leaves_no_entry_but_keeps_its_work(tmp_path):
    store = Store(tmp_path)

    def fails(out, work):
        (out / "half").write_text("x")
        (work / "state").write_text("step 3")
        raise OSError("disk gone")

    with pytest.raises(OSError):
        store.build(KEY, {}, fails)
    assert not store.has(KEY)
    assert not store.entry(KEY).exists()

    def goes_on(out, work):
        assert (work / "state").read_text() == "step 3"
        assert list(out.iterdir()) == []
        return write(out, work)

    store.build(KEY, {}, goes_on)
    assert store.has(KEY)


def test_an_entry_finished_by_another_process_before_the_lock_is_had_is_taken(
    tmp_path, monkeypatch
):
    store, other = Store(tmp_path), Store(tmp_path)

    def late(key):
        monkeypatch.undo()
        other.build(key, {}, write)
        return store.lock(key)

    def never(out, work):
        raise AssertionError("made again")

    monkeypatch.setattr(store, "lock", late)
    assert store.build(KEY, {}, never) == other.entry(KEY)


@pytest.mark.parametrize("damage", ["changed", "missing", "unknown"])
def test_a_damaged_entry_is_refused_by_file_name(tmp_path, damage):
    store = Store(tmp_path)
    path = store.build(KEY, {}, write)
    if damage == "changed":
        (path / "weights").write_bytes(b"1235")
    elif damage == "missing":
        (path / "weights").unlink()
    else:
        (path / "extra").write_text("x")
    with pytest.raises(
        ValueError, match=f"is {damage} since it was written; delete .* and run again"
    ):
        store.has(KEY)


HOLD = """
import sys
from pathlib import Path
from compress.store import Store
with Store(Path(sys.argv[1])).lock(sys.argv[2]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_on_the_same_key_is_refused_at_once_and_a_killed_one_frees_it(tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path), KEY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ResourceError, match=f"process {holder.pid} is building the same stage"):
            Store(tmp_path).build(KEY, {}, write)
        with pytest.raises(ResourceError, match="wait for it"):
            Store(tmp_path).build(KEY, {}, write)
    finally:
        holder.kill()
        holder.wait()
    Store(tmp_path).build(KEY, {}, write)


def test_gc_removes_only_what_no_run_names_and_what_nobody_holds(tmp_path):
    store = Store(tmp_path)
    keys = [sha256_json(n) for n in range(3)]
    for key in keys:
        store.build(key, {}, write)
        store.note(key, {"seconds": 1})
    for digest in ("a", "b"):
        (store.root / "scores" / f"{digest * 16}-score.json").write_text("{}")
    with store.lock(keys[2]):
        things, size, _ = collect(store, {keys[0]}, {"a" * 64}, dry_run=True)
        assert things == 3
        assert size > 4
        assert all(store.has(key) for key in keys)
        collect(store, {keys[0]}, {"a" * 64}, dry_run=False)
    assert [store.has(key) for key in keys] == [True, False, True]
    assert store.note(keys[1]) == {}
    assert [path.name[0] for path in (store.root / "scores").iterdir()] == ["a"]


def test_a_store_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="can't be written .*store=DIR"):
        Store(tmp_path / "file" / "store")


# Who writes files by itself: below the folder that it is given, which `commit` names when it is
# whole. Everybody else calls `write_whole`, `write_json`, `Store.build` or `commit`.
BELOW_A_FOLDER = {
    "formats": ["compressed_tensors", "converter", "gguf", "gguf_import", "gguf_tokenizer", "onnx"],
    "models": ["checkpoint", "tensor_file"],
    "prune": ["tokenizer_cut"],
    "search": ["sizes", "speed"],
    "ship": ["bundle"],
    "stages": ["lora", "prune_depth", "prune_experts", "ptq"],
    "train": ["state"],
    "": ["teacher"],
}
# Removing by renaming; the exit code's own place; lines appended, of which torn ones are written
# again.
OTHERWISE = {"collect", "rundir", "store", "text.conversations", "text.written"}
WRITING = {"write_text", "write_bytes", "rename"}


def _writes(call):
    """Whether a call names or fills a file without `compress.store`."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    name, first = call.func.attr, call.args[0] if call.args else None
    if name == "replace":
        is_os = isinstance(call.func.value, ast.Name) and call.func.value.id == "os"
        return is_os or (len(call.args) == 1 and not call.keywords)
    mode = first.value if isinstance(first, ast.Constant) else ""
    return name in WRITING or (name == "open" and bool({*str(mode)} & {*"wax+"}))


def test_all_that_is_kept_is_written_by_one_mechanism():
    package = Path(compress.__file__).parent
    writers = set()
    for file in package.rglob("*.py"):
        if any(map(_writes, ast.walk(ast.parse(file.read_text())))):
            writers.add(".".join(file.relative_to(package).with_suffix("").parts))
    below = {
        f"{room}.{name}".strip(".") for room, names in BELOW_A_FOLDER.items() for name in names
    }
    assert writers == below | OTHERWISE
