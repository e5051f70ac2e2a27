"""The smoke recipe from the command line: every verb on a real run."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from smoke_runs import FAST, compress, newest, records

from compress.__main__ import main
from compress.store import sha256_file


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    key = ec.generate_private_key(ec.SECP256R1())
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(private)
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    (folder / "sender.pub").write_bytes(key.public_key().public_bytes(pem, form))
    signed = "export.sign_key=key.pem"
    done = compress(folder, "run", "smoke", "track=wandb", signed, *FAST)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_every_slot_has_a_record_with_scores_and_weights(smoke):
    folder, done = smoke
    run = newest(folder)
    found = records(run)
    assert [r["slot"] for r in found] == [
        "teacher",
        "vocab",
        "depth",
        "heads",
        "width",
        "heal",
        "chat",
        "thin",
        "round",
        "qat",
        "gguf_q4_0",
        "compressed_tensors",
        "onnx",
    ]
    for record in found:
        measured = {
            "params",
            "size_bytes",
            "bits_per_byte/heldout",
        }
        timed = {"latency_ms_p50", "ttft_ms_p50", "peak_rss_bytes"}
        answered = {
            "acc/grammar",
            "open/right",
            "open/loops",
            "open/ended",
        }  # a second file holds the first one's numbers: it is not asked
        again = record["slot"] in ("compressed_tensors", "onnx")
        assert measured <= record["scores"].keys()
        has_times = record["slot"] in ("teacher", "gguf_q4_0", "compressed_tensors", "onnx")
        assert timed & record["scores"].keys() == (timed if has_times else set())
        assert answered & record["scores"].keys() == (set() if again else answered)
        assert record["slot"] == "teacher" or record["scores"]["kl_to_teacher"] > 0
        assert (run / f"{record['index']:02d}-{record['slot']}" / "weights").exists()
    assert [r["parent"] for r in found] == [
        None,
        "teacher",
        "vocab",
        "depth",
        "heads",
        "width",
        "heal",
        "width",
        "chat",
        "chat",
        "qat",
        "qat",
        "qat",
    ]
    about = json.loads((run / "run.json").read_text())
    assert about["exit"] == 0
    assert about["finished"]
    assert "qat" in done.stdout
    assert "heal" in done.stdout


def test_the_bundle_is_signed_by_the_key_that_the_recipe_names(smoke, capfd):
    folder, _ = smoke
    bundle = str(newest_full(folder) / "bundle")
    assert main(["verify", bundle, "--key", str(folder / "sender.pub")]) == 0
    told = capfd.readouterr().out
    assert "unchanged since it was signed by the owner of" in told
    private = (folder / "key.pem").read_text()
    assert not any(
        private in file.read_text(errors="replace")
        for file in newest_full(folder).rglob("*")
        if file.is_file()
    )


def test_the_gguf_holds_the_qat_codes_bit_for_bit(smoke):
    import torch

    from compress.formats.gguf import decode_gguf
    from compress.models.checkpoint import load_model
    from compress.models.gguf_header import read_fields

    run = newest(smoke[0])
    decoded = decode_gguf(*read_fields(run / "bundle" / "model-Q4_0.gguf"))
    state = load_model(run / "bundle" / "hf").state_dict()
    assert len(decoded) == len(state) - 1  # the tied head is stored once
    for name, tensor in decoded.items():
        assert torch.equal(tensor, state[name]), name


def test_all_files_are_proven_to_be_the_checkpoint_and_the_packed_one_opens_plainly(smoke):
    import torch
    from transformers import AutoModelForCausalLM

    run = newest(smoke[0])
    shipped = [record for record in records(run) if record["technique"].startswith("export_")]
    assert [(r["slot"], r["runtime"]) for r in shipped] == [
        ("gguf_q4_0", "llama.cpp"),
        ("compressed_tensors", "torch"),
        ("onnx", "onnxruntime"),
    ]
    assert all(
        r["metrics"]["parity_values_differing"] == r["metrics"]["parity_strings_differing"] == 0
        for r in shipped
    )
    packed = AutoModelForCausalLM.from_pretrained(
        run / "bundle" / "compressed_tensors"
    ).state_dict()
    plain = AutoModelForCausalLM.from_pretrained(run / "bundle" / "hf").state_dict()
    assert packed.keys() == plain.keys() and all(
        torch.equal(packed[name], plain[name]) for name in plain
    )
    assert shipped[1]["scores"]["size_bytes"] == sum(
        file.stat().st_size for file in (run / "bundle" / "compressed_tensors").iterdir()
    )
    assert (
        shipped[1]["scores"]["kl_to_teacher"] == records(run)[-4]["scores"]["kl_to_teacher"]
    )  # qat's: the same tensors
    onnx = shipped[2]
    assert (
        abs(onnx["metrics"]["parity_kl_nats"]) < 1e-6
        and onnx["metrics"]["parity_top1_beyond_gap"] == 1
    )
    assert onnx["scores"]["size_bytes"] == sum(
        file.stat().st_size for file in (run / "bundle" / "onnx").iterdir()
    )
    card = (run / "bundle" / "README.md").read_text()
    assert "`model-Q4_0.gguf` is the file that was judged" in card
    assert (
        "- `model-Q4_0.gguf`: one file for llama.cpp" in card
        and "- `compressed_tensors`: a packed directory for transformers" in card
    )


def test_what_ships_is_asked_everything_and_a_stage_a_quarter(smoke):
    asked = {r["slot"]: r["scores"].get("n/open") for r in records(newest(smoke[0]))}
    assert asked["teacher"] == asked["gguf_q4_0"] == 8 and asked["heal"] == asked["qat"] == 2
    run = newest(smoke[0])
    prompts = (run / "bundle" / "open_prompts.jsonl").read_text().splitlines()
    answers = [
        json.loads(line)
        for line in (run / "bundle" / "open_answers.jsonl").read_text().splitlines()
    ]
    assert len(prompts) == len(answers) == 8 and {"teacher", "student"} <= answers[0].keys()


def test_a_stage_that_buys_only_quality_says_whether_it_paid(smoke):
    told = {r["slot"]: r.get("payoff") for r in records(newest(smoke[0]))}
    assert {slot for slot, found in told.items() if found} == {"heal", "chat"}
    words = ("paid: ", "did not pay: ")
    assert all(
        found["kept"] == slot and found["sentence"].startswith(words)
        for slot, found in told.items()
        if found
    )
    assert "heal did not pay" in smoke[1].stderr or "heal paid" in smoke[1].stderr


def test_every_cut_really_shrinks(smoke):
    by = {r["slot"]: r["scores"]["params"] for r in records(newest(smoke[0]))}
    assert (
        by["teacher"]
        > by["vocab"]
        > by["depth"]
        > by["heads"]
        > by["width"]
        == by["thin"]
        == by["heal"]
        == by["chat"]
        == by["qat"]
        == by["gguf_q4_0"]
        == by["compressed_tensors"]
        == by["onnx"]
    )


def test_repeating_the_command_reuses_every_stage_and_ends_in_the_same_weights(smoke):
    folder, _ = smoke
    first = records(newest(folder))
    done = compress(folder, "run", "smoke", *FAST)
    assert done.returncode == 0, done.stderr
    again = records(newest(folder))
    assert [r["digest"] for r in again] == [r["digest"] for r in first]
    assert all(r["reused"] for r in again if r["stage_config"])
    assert [r["scores"] for r in again] == [r["scores"] for r in first]


def test_changing_the_evaluation_keeps_the_weights(smoke):
    folder, _ = smoke
    done = compress(
        folder, "run", "smoke", *FAST, "eval.limit=3", "pipeline=[vocab,depth]", "export=none"
    )
    assert done.returncode == 0, done.stderr
    assert [r["reused"] for r in records(newest(folder))] == [False, True, True]


def test_verify_passes_and_names_every_kind_of_damage(smoke, tmp_path, capfd):
    bundle = tmp_path / "bundle"
    shutil.copytree(newest_full(smoke[0]) / "bundle", bundle)
    assert main(["verify", str(bundle)]) == 0
    assert "files verified" in capfd.readouterr().out
    weights = bundle / "hf" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    (bundle / "extra.txt").write_text("x")
    (bundle / "README.md").unlink()
    assert main(["verify", str(bundle)]) == 3
    err = capfd.readouterr().err
    assert "README.md is missing" in err
    assert "extra.txt is not in SHA256SUMS" in err
    assert "hf/model.safetensors was changed" in err


def newest_full(folder):
    return max(
        path.parent
        for path in (folder / "runs" / "smoke").glob("*/bundle")
        if (path / "model-Q4_0.gguf").is_file()
    )


def test_a_checksum_file_that_leaves_the_bundle_is_refused(smoke, tmp_path, capfd):
    bundle = tmp_path / "bundle"
    shutil.copytree(newest_full(smoke[0]) / "bundle", bundle)
    with (bundle / "SHA256SUMS").open("a") as sums:
        sums.write("0" * 64 + "  ../../etc/passwd\n")
    assert main(["verify", str(bundle)]) == 3
    assert "made to mislead" in capfd.readouterr().err


def test_a_bundle_without_limits_can_not_be_accepted(smoke):
    folder, _ = smoke
    done = compress(folder, "accept", str(newest_full(folder) / "bundle"))
    assert done.returncode == 2, done.stderr
    assert "has no limits: its recipe set none, so there is nothing to accept" in done.stderr


def test_accept_scores_the_requests_in_the_bundle_without_their_tasks(smoke, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(newest_full(smoke[0]) / "bundle", bundle)
    rows = [json.loads(line) for line in (bundle / "requests.jsonl").read_text().splitlines()]
    assert {row["task"] for row in rows} == {"grammar"}
    assert all(
        row["context"] == ""
        and len(row["logliks"]) == len(row["choices"]) == 2
        and row["gold"] in (0, 1)
        for row in rows
    )
    manifest = json.loads((bundle / "manifest.json").read_text())
    answers = [json.loads(line) for line in (bundle / "answers.jsonl").read_text().splitlines()]
    assert [row["doc_id"] for row in answers] == [row["doc_id"] for row in rows] and manifest[
        "rows"
    ]["kl_to_teacher"]
    assert (
        sum(row["correct"] for row in answers) / len(answers) == manifest["scores"]["acc/grammar"]
    )
    manifest["config"]["eval"]["tasks"] = ["known_nowhere"]
    manifest["config"]["budget"]["limits"] = {
        "acc/grammar": {"min": 0.0, "max": None, "why": ""},
        "flips/grammar": {"min": None, "max": 1.0, "why": ""},
    }
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    sums = bundle / "SHA256SUMS"
    old = next(line for line in sums.read_text().splitlines() if line.endswith("  manifest.json"))
    sums.write_text(
        sums.read_text().replace(old, f"{sha256_file(bundle / 'manifest.json')}  manifest.json")
    )
    done = compress(smoke[0], "accept", str(bundle))
    assert done.returncode == 0, done.stderr
    assert "PASS         acc/grammar" in done.stdout and "PASS         flips/grammar" in done.stdout
    record = json.loads(next((newest_full(smoke[0])).glob("*gguf_q4_0/record.json")).read_text())
    assert f"acc/grammar {100 * record['scores']['acc/grammar']:.1f}%" in done.stdout


def test_the_model_card_and_the_page_hold_the_measured_numbers(smoke):
    run = newest_full(smoke[0])
    card, page = (run / "bundle" / "README.md").read_text(), (run / "report.html").read_text()
    for slot in ("teacher", "heal", "qat", "gguf_q4_0"):
        assert slot in card
        assert slot in page
    assert "embedded:docstrings" in card
    assert not re.search(r"https?://[^\"' ]+\.(js|css)", page)


def test_compare_prints_runs_side_by_side_and_writes_a_page(smoke, tmp_path):
    folder, _ = smoke
    full, page = newest_full(folder), ["--html", str(tmp_path / "c.html")]
    done = compress(
        folder,
        "compare",
        str(full),
        f"{full}/gguf_q4_0",
        str(full / "bundle"),
        "--speed",
        "2",
        *page,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "c.html").stat().st_size > 5000
    assert (
        "acc/grammar              the same" in done.stdout
        or "acc/grammar              +0.0 points" in done.stdout
    )
    assert re.search(
        r"a further token: .*/gguf_q4_0 is [\d.]+ times as fast \(95% interval [\d.e+]+ to"
        r" [\d.e+]+\) as smoke/",
        done.stdout,
    )


def test_runs_of_other_settings_are_not_compared(smoke, tmp_path):
    folder, _ = smoke
    run = tmp_path / "other"
    shutil.copytree(newest_full(folder), run, symlinks=True)
    about = json.loads((run / "run.json").read_text())
    about["config"]["eval"]["limit"] = 3
    (run / "run.json").write_text(json.dumps(about))
    done = compress(
        folder, "compare", str(newest_full(folder)), str(run), "--html", str(tmp_path / "c.html")
    )
    assert done.returncode == 3 and "eval.limit is 4 in smoke/" in done.stderr


def test_sync_replays_the_run_that_was_tracked_live(smoke):
    folder, _ = smoke
    run = min(path for path in (folder / "runs" / "smoke").iterdir() if (path / "wandb").is_dir())
    live = sorted(path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*"))
    done = compress(folder, "sync", str(run), "--to", "wandb")
    assert done.returncode == 0, done.stderr
    assert (
        sorted(path.name.rpartition("-")[2] for path in run.glob("wandb/offline-run-*")) == live
        and len(live) == 13
    )
    assert (run / "05-heal" / "steps.jsonl").stat().st_size and len(
        (run / "records.jsonl").read_text().splitlines()
    ) == 13


def test_score_judges_a_checkpoint_and_a_gguf_it_did_not_make(smoke, tmp_path):
    folder, _ = smoke
    run = newest_full(folder)
    model = tmp_path / "foreign"
    shutil.copytree(run / "bundle" / "hf", model)
    for target in (
        model,
        run / "bundle" / "model-Q4_0.gguf",
        run / "bundle" / "compressed_tensors",
        run / "bundle" / "onnx",
    ):
        done = compress(
            folder,
            "score",
            str(target),
            "--teacher",
            "random",
            "eval=smoke",
            "data.seq_len=64",
            "+budget.limits={size_bytes:{max:1000}}",
            *FAST,
        )
        assert done.returncode == 4, done.stderr
        assert "kl_to_teacher" in done.stdout
        assert "FAIL" in done.stdout


def test_score_refuses_a_draft_beside_a_teacher_that_is_no_file(smoke):
    folder, _ = smoke
    gguf = newest_full(folder) / "bundle" / "model-Q4_0.gguf"
    settings = ("--teacher", "random", "eval=smoke", "data.seq_len=64", *FAST)
    done = compress(folder, "score", str(gguf), "--draft", *settings)
    assert done.returncode == 2
    assert "this teacher is a checkpoint; give --teacher FILE.gguf" in done.stderr


def test_gc_keeps_what_runs_name(smoke, tmp_path):
    folder, _ = smoke
    copy = tmp_path / "copy"
    shutil.copytree(folder / "runs", copy / "runs", symlinks=True)
    entries = set((copy / "runs" / ".store" / "entries").iterdir())
    done = compress(copy, "gc", "--yes")
    assert done.returncode == 0, done.stderr
    left = set((copy / "runs" / ".store" / "entries").iterdir())
    assert len(left) >= 7
    shutil.rmtree(copy / "runs" / "smoke")
    assert compress(copy, "gc", "--yes").returncode == 0
    assert set((copy / "runs" / ".store" / "entries").iterdir()) == left, (
        "the store lists the run directories that were copied"
    )
    shutil.rmtree(copy / "runs" / ".store" / "runs")
    refused = compress(copy, "gc", "--yes")
    assert refused.returncode == 2 and "--all" in refused.stderr
    assert compress(copy, "gc", "--yes", "--all").returncode == 0
    assert not list((copy / "runs" / ".store" / "entries").iterdir())
    assert len(entries) >= len(left)


def test_a_violated_budget_exits_4_and_marks_the_bundle(smoke):
    folder, _ = smoke
    done = compress(folder, "run", "smoke", *FAST, "+budget.limits={size_bytes:{max:1000}}")
    assert done.returncode == 4, done.stderr
    bundle = newest(folder) / "bundle"
    assert json.loads((bundle / "manifest.json").read_text())["budget"] == "FAIL"
    assert "violates its budget" in (bundle / "README.md").read_text()
    assert compress(folder, "verify", str(bundle)).returncode == 0
    assert compress(folder, "accept", str(bundle)).returncode == 4


def test_the_plan_runs_nothing(smoke, tmp_path):
    done = compress(tmp_path, "run", "smoke", "--plan")
    assert done.returncode == 0, done.stderr
    assert "heal" in done.stdout
    assert "GB free" in done.stdout
    assert not (tmp_path / "runs" / "smoke").exists()
