"""Trackers: what W&B's offline files really contain, and that no tracker can stop a run."""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from fake_records import ASKED, PROMPTS, ask, write_run

from compress.__main__ import main
from compress.report.records import load_run
from compress.track import TRACKERS, check, open_tracker
from compress.track.wandb import Wandb

SECRET = "planted-secret-4711-do-not-store"
STEPS = [{"step": s, "loss": 3.0 - s / 10, "tokens_per_sec": 700.0 + s} for s in (10, 20, 30)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run directory, a home of its own, and no W&B settings from outside."""
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = write_run(tmp_path / "runs")
    ask(path, judged="03-heal")
    for slot, rights in (("00-teacher", (1, 1, 0)), ("03-heal", (1, 0, 1))):
        items = [
            {
                "task": "grammar",
                "doc_id": i,
                "correct": bool(right),
                "choice": 1 - right,
                "logliks": [-5.0, -4.0],
            }
            for i, right in enumerate(rights)
        ]
        items[1]["logliks"] = [-8.0, -4.0]
        (path / slot / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    (path / "03-heal" / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STEPS))
    return load_run(path)


def offline_runs(run) -> dict[str, list]:
    """Slot -> W&B's records; a slot that was written twice fails."""
    found = {}
    for file in run.path.glob("wandb/offline-run-*/*.wandb"):
        records = read_offline(file)
        (one,) = of_kind(records, "run")
        assert found.setdefault(one.job_type, records) is records
    return found


def read_offline(file: Path) -> list:
    """W&B's records: 7 bytes, then LevelDB log framing (32 KiB blocks of crc32, uint16 length,
    type, data).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # full, or the last piece
            record = Record()
            record.ParseFromString(whole)
            records, whole = [*records, record], b""
    return records


def of_kind(records: list, kind: str) -> list:
    return [getattr(r, kind) for r in records if r.WhichOneof("record_type") == kind]


def items(updates) -> dict:
    return {u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in updates}


def test_wandb_offline_files_hold_the_record_and_no_secret(run, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(sys, "argv", ["compress", "run", "demo", f"teacher.token={SECRET}"])
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET.ljust(40, "x"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    tracker = open_tracker("wandb", run.path, mode="offline")
    heal, gguf = run.records[3], run.records[7]
    for record in (heal, gguf):
        tracker.record(record)
    tracker.finish(0)
    assert tracker.alive

    by_slot = offline_runs(run)
    info = {slot: of_kind(records, "run")[0] for slot, records in by_slot.items()}
    assert set(by_slot) == {"heal", "gguf"}
    assert {one.run_group for one in info.values()} == {run.name}
    assert items(info["heal"].config.update)["parent"] == "prune_width"

    history = [items(h.item) for h in of_kind(by_slot["heal"], "history")]
    curve = [(h["train/step"], h["train/loss"]) for h in history if "train/loss" in h]
    assert curve == [(row["step"], row["loss"]) for row in STEPS]
    scored = next(h for h in history if "score/kl_to_teacher" in h)
    assert {k: scored[f"score/{k}"] for k in heal["scores"]} == heal["scores"]
    assert (
        scored["stage/loss_nats"] == 2.5
        and scored["stage/stage_seconds"] == heal["seconds"]["stage"]
    )

    summary: dict = {}
    for update in of_kind(by_slot["gguf"], "summary"):
        summary |= items(update.update)
    assert summary["verdict"] == "INCONCLUSIVE"
    assert summary["verdict/size_bytes"] == "PASS: " + gguf["verdicts"][0]["sentence"]

    (artifact,) = of_kind(by_slot["gguf"], "artifact")
    (entry,) = artifact.manifest.contents
    assert (artifact.type, json.loads(artifact.metadata)["digest"]) == ("model", gguf["digest"])
    assert (
        json.loads(artifact.metadata)["parent_digest"] == run.records[6]["digest"]
        and gguf["digest"][:12] in artifact.aliases
    )
    table = next(h for h in history if "flips/path" in h)
    stored = json.loads(next(run.path.rglob(Path(table["flips/path"]).name)).read_text())
    assert stored["data"] == [
        ["grammar", 1, "worse", 4.0, "", "choice 0", "choice 1"],
        ["grammar", 2, "better", 1.0, "", "choice 0", "choice 1"],
    ]
    table = next(h for h in history if "open/path" in h)
    stored = json.loads(next(run.path.rglob(Path(table["open/path"]).name)).read_text())
    columns = "id kind prompt teacher student teacher_right right loops ended"
    assert stored["columns"] == columns.split() and len(stored["data"]) == len(PROMPTS)
    loop = ["facts-001", *ASKED[1][:2], *ASKED[1][3:]]
    assert stored["data"][0] == [*loop, True, False, True, False]
    gguf_history = [items(h.item) for h in of_kind(by_slot["gguf"], "history")]
    assert not [h for h in gguf_history if "open/path" in h], "it was not asked"
    assert (
        entry.ref == (run.path / "07-gguf/weights/model.safetensors").as_uri()
        and entry.digest
        and entry.size == 64
    )

    everything = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in everything if SECRET.encode() in p.read_bytes()]
    assert not [p for p in everything if "metadata" in p.name or p.name == "requirements.txt"]
    assert not list(elsewhere.iterdir()) and not [
        p for p in (tmp_path / "home").rglob("*") if p.is_file()
    ]


def test_wandb_is_offline_without_an_account_and_online_with_one(run, monkeypatch):
    assert Wandb(run.path).mode == "offline"
    (Path.home() / ".netrc").write_text("machine api.wandb.ai login user password " + "k" * 40)
    (Path.home() / ".netrc").chmod(0o600)
    assert Wandb(run.path).mode == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert Wandb(run.path).mode == "disabled"


def test_wandb_falls_back_to_offline_when_the_network_is_dead(run, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setattr("compress.track.wandb.SECONDS_TO_CONNECT", 2)
    tracker = open_tracker("wandb", run.path)
    tracker.record(run.records[3])
    tracker.record(run.records[4])
    tracker.finish(0)
    assert tracker.alive and len(list(run.path.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert capfd.readouterr().err.count("W&B cannot be reached") == 1


def test_missing_wandb_names_the_extra_before_work(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'compress-lm\[wandb\]'"):
        check("wandb")


def test_unknown_tracker_names_the_nearest():
    with pytest.raises(
        ValueError, match="unknown tracker 'wanbd'; did you mean 'wandb'. allowed: jsonl, wandb"
    ):
        check("wanbd")
    for name in TRACKERS:
        check(name)


def test_dead_tracker_warns_once_and_the_run_goes_on(run, monkeypatch, capsys):
    tracker = open_tracker("jsonl", run.path)
    calls = []

    def broken(record):
        calls.append(record)
        raise OSError("no space left")

    monkeypatch.setattr(tracker.sink, "record", broken)
    for record in run.records:
        tracker.record(record)
    tracker.finish(0)
    assert len(calls) == 1
    err = capsys.readouterr().err
    assert (
        err.count("tracker jsonl stopped (OSError: no space left)") == 1
        and f"compress sync {run.path} --to jsonl" in err
    )


def test_a_server_that_never_answers_costs_a_bounded_time_once(run, monkeypatch, capfd):
    pytest.importorskip("wandb")
    monkeypatch.setattr("compress.track.wandb.SECONDS_TO_CONNECT", 3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connections stay in its queue
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
        tracker, start = open_tracker("wandb", run.path), time.monotonic()
        for record in run.records[3:6]:
            tracker.record(record)
        tracker.finish(0)
        assert time.monotonic() - start < 40
    assert set(offline_runs(run)) == {"heal", "lora", "round"}
    assert capfd.readouterr().err.count("W&B cannot be reached") == 1


def test_jsonl_holds_every_record_once(run):
    tracker = open_tracker("jsonl", run.path)
    for record in [*run.records, *run.records]:
        tracker.record(record)
    lines = (run.path / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.records


def test_sync_replays_a_run_and_repeating_it_duplicates_nothing(run, monkeypatch, capfd):
    pytest.importorskip("wandb")
    for _ in range(2):
        assert main(["sync", str(run.path), "--to", "wandb"]) == 0
        assert "8 slots in wandb" in capfd.readouterr().out
        found = offline_runs(run)
        assert set(found) == {record["slot"] for record in run.records}
        steps = [items(h.item) for h in of_kind(found["heal"], "history")]
        assert [h["train/loss"] for h in steps if "train/loss" in h] == [
            row["loss"] for row in STEPS
        ]
    monkeypatch.setattr(Wandb, "record", lambda self, record: 1 / 0)
    assert main(["sync", str(run.path), "--to", "wandb"]) == 5
    assert "wandb did not take all of demo/2026-11-21T03-30-00; repeat" in capfd.readouterr().err
    assert main(["sync", str(run.path), "--to", "wanbd"]) == 2
    assert "did you mean 'wandb'" in capfd.readouterr().err


def test_online_lineage_names_the_parent_s_weights_on_a_double_because_no_server_runs_here(
    run, monkeypatch
):
    pytest.importorskip("wandb")
    online, sink = mock.MagicMock(), Wandb(run.path, mode="online")
    monkeypatch.setattr(sink, "_open", lambda record, about: online)
    sink.record(run.records[3])
    online.use_artifact.assert_called_once_with(f"demo-prune_width:{run.records[2]['digest'][:12]}")
    artifact, aliases = (
        online.log_artifact.call_args.args[0],
        online.log_artifact.call_args.kwargs["aliases"],
    )
    assert artifact.name == "demo-heal" and run.records[3]["digest"][:12] in aliases
