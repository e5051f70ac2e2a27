"""`compress tune`: what stays, what the verdict is of, and the file that `serve --tuning` reads."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, replace

import pytest
from served import FOREVER, KEY, Served, tiny_gguf
from ship.test_bundle_open import made

from compress.__main__ import main
from compress.errors import ConfigError
from compress.serve import backend, trials, tuning
from compress.serve.settings import Settings
from compress.serve.target import target_of
from compress.serve.trials import Load
from compress.serve.tuning import Attention, CacheType, Tuning, machine_here

OWN = Tuning()


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("tune"), context=512)


class PacedBench:
    """Stands in for a model: seconds by the settings, with noise that two blocks don't average
    out.
    """

    def __init__(self, target, clients, tokens):
        self.turn = self.unsteady = 0

    async def seconds(self, settings):
        self.turn += 1
        if settings.cache_type is CacheType.q8_0:
            raise ValueError("no such kernel")
        faster = 1.0
        faster *= {0: 0.9, 50: 1.0, 100: 1.2}[settings.poll]
        faster *= {CacheType.f16: 1.0, CacheType.f32: 1.5}[settings.cache_type]
        if settings.batch == 128:  # two of every four times in a row
            faster *= 1.06 if self.unsteady % 4 < 2 else 0.98
            self.unsteady += 1
        return (1 + 0.001 * (self.turn % 3)) / faster

    async def answers(self, settings):
        return ["wrong" if settings.cache_type is CacheType.f32 else "right"] * 10

    def right(self, answers):
        return answers.count("right")

    block = trials.Bench.block


def entry_of(monkeypatch, folder, share=0.01, bench=PacedBench, blocks=4):
    monkeypatch.setattr(trials, "Bench", bench)
    monkeypatch.setattr(trials, "others_share", lambda before, after: share)
    lines = []
    target = type("Target", (), {"path": type("Path", (), {"name": "tiny.gguf"})})
    journal = trials.Journal(folder / "part", {"model": "digest"})
    work = trials.tuned(target, journal, 1, 8, blocks, lines.append)
    return asyncio.run(work), lines


def test_what_is_surely_faster_and_answers_alike_stays_with_paced_times(monkeypatch, tmp_path):
    entry, lines = entry_of(monkeypatch, tmp_path)
    assert Tuning(**entry["settings"]) == replace(OWN, poll=100)
    mean, low, high = entry["faster"]
    assert low <= mean <= high and mean == pytest.approx(1.2, rel=0.01)
    assert entry["verdict"] == "faster"
    assert entry["answers"] == {
        "asked": 10,
        "same": 10,
        "right": 10,
        "right_with_own_settings": 10,
    }
    stays = {json.dumps(one["settings"]): one["stays"] for one in entry["tried"]}
    assert sum(stays.values()) == 1

    # Faster but wrong; faster by less than its blocks differ; not to be run.
    told = "\n".join(lines)
    assert "poll 100, cache_type f32: " in told and "but 0 answers are right, before 10" in told
    assert "batch 128: 1.0" in told and "not shown to be faster" in told
    assert "does not run here (no such kernel)" in told
    assert "poll 0: 0.9" in told


def test_a_busy_machine_gets_no_verdict_with_paced_times(monkeypatch, tmp_path):
    entry, _ = entry_of(monkeypatch, tmp_path, share=0.06)
    assert entry["verdict"] == "withheld" and entry["others_share"] == 0.06
    sentence = trials.sentence(entry)
    assert sentence.startswith("verdict withheld: other processes used 6.0% of the CPUs")
    assert "stop them and repeat" in sentence


def test_where_nothing_is_faster_own_settings_stay_with_paced_times(monkeypatch, tmp_path):
    class Even(PacedBench):
        async def seconds(self, settings):
            return 1.0 if settings == OWN else 1.01

    entry, _ = entry_of(monkeypatch, tmp_path, share=None, bench=Even)
    assert Tuning(**entry["settings"]) == OWN and entry["verdict"] == "not shown"
    assert "load unknown" in trials.sentence(entry)


def test_the_last_blocks_alone_decide_with_paced_times(monkeypatch, tmp_path):
    class Fading(PacedBench):
        """Faster while it is chosen, as chance is, and not behind that."""

        def __init__(self, *given):
            super().__init__(*given)
            self.asked = 0

        async def answers(self, settings):
            self.asked += settings == replace(OWN, poll=100)
            return await super().answers(settings)

        async def seconds(self, settings):
            self.turn += 1
            early = settings.poll == 100 and self.asked < 2
            return (1 + 0.001 * (self.turn % 3)) / (1.2 if early else 1.0)

    entry, _ = entry_of(monkeypatch, tmp_path, bench=Fading)
    assert Tuning(**entry["settings"]) == replace(OWN, poll=100)
    assert entry["verdict"] == "not shown" and entry["faster"][0] == pytest.approx(1, abs=0.01)


def test_an_interrupted_search_goes_on_with_paced_times(monkeypatch, tmp_path):
    whole, lines = entry_of(monkeypatch, tmp_path)
    (tmp_path / "part").unlink()

    class Stopped(PacedBench):
        async def seconds(self, settings):
            if settings.attention is Attention.on:
                raise KeyboardInterrupt
            return await super().seconds(settings)

    class Counted(PacedBench):
        async def seconds(self, settings):
            asked.append(settings)
            return await super().seconds(settings)

    with pytest.raises(KeyboardInterrupt):
        entry_of(monkeypatch, tmp_path, bench=Stopped)
    asked = []
    resumed, again = entry_of(monkeypatch, tmp_path, bench=Counted)
    assert [line.partition(";")[0] for line in again][:4] == [
        line.partition(";")[0] for line in lines
    ][:4]
    assert resumed["settings"] == whole["settings"] and len(resumed["tried"]) == len(lines)
    assert not any(settings.poll == 0 or settings.threads == 1 for settings in asked)

    # Of another model or way of measuring nothing is known.
    assert trials.Journal(tmp_path / "part", {"model": "another"}).tried == []


def test_load_of_others_is_what_this_process_and_its_children_did_not_use():
    before = Load(all=100.0, busy=40.0, ours=10.0)
    after = Load(all=120.0, busy=55.0, ours=22.0)
    assert trials.others_share(before, after) == pytest.approx((15 - 12) / 20)
    assert trials.others_share(None, after) is None
    now = trials.load_now()
    assert now is None or 0 < now.ours <= now.busy <= now.all


def test_a_file_is_tuned_in_llama_cpp_and_served_as_found(gguf, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trials, "changes", lambda cpus: [{"repack": False}])
    monkeypatch.setattr(trials, "PROMISE", 0.0)  # all blocks are run
    # Threads that wait for each other take a hundred times as long where other tests run.
    monkeypatch.setattr(backend, "available_threads", lambda: 1)
    monkeypatch.setattr(trials, "others_share", lambda before, after: 0.0)
    out = tmp_path / "tuning.json"
    assert main(["tune", str(gguf), "--out", str(out), "--blocks", "2", "--tokens", "2"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("tuning tiny.gguf on ") and "repack False: " in said

    assert not list(tmp_path.glob(".*"))
    (entry,) = tuning.read_entries(out)
    assert entry["machine"] == machine_here() and entry["answers"]["asked"] == 59
    (tried,) = entry["tried"]
    assert len(tried["ratios"]) == 2 and all(ratio > 0 for ratio in tried["ratios"])

    # Whatever these noisy seconds said, settings in the file are what serve takes.
    found = Tuning(threads=1, poll=0, attention=Attention.off, cache_type=CacheType.f32, batch=64)
    tuning.written(out, entry | {"settings": asdict(found), "verdict": "faster"})
    assert tuning.tuning_in(out, entry["model"]) == found

    door = Served(gguf, "--tuning", out)
    answer = door.post("/v1/completions", {"prompt": "a", "max_tokens": 2} | FOREVER)
    door.end()
    assert answer["usage"]["completion_tokens"] == 2

    # And no others: the process that holds the model is told of them.
    order = backend.Backend(target_of(gguf), Settings(key=KEY, tuning=found))._order()
    assert (order["threads"], order["tuning"]) == (1, asdict(found))


def test_settings_reach_llama_cpp():
    import xllamacpp

    params = xllamacpp.CommonParams()
    tuning.apply(asdict(OWN), params)
    fresh = xllamacpp.CommonParams()
    for name in ("flash_attn_type", "cache_type_k", "cache_type_v", "no_extra_bufts"):
        assert getattr(params, name) == getattr(fresh, name), name
    assert params.cpuparams.poll == fresh.cpuparams.poll

    other = Tuning(poll=7, repack=False, attention=Attention.on, cache_type=CacheType.q8_0)
    tuning.apply(asdict(other), params)
    assert (params.flash_attn_type, params.cache_type_k, params.cache_type_v) == (1, 8, 8)
    assert params.no_extra_bufts is True
    assert (params.cpuparams.poll, params.cpuparams_batch.poll) == (7, 7)


def plain_entry(**changes):
    entry = {
        "model": "a" * 64,
        "file": "tiny.gguf",
        "machine": machine_here(),
        "settings": asdict(replace(OWN, poll=100)),
        "verdict": "faster",
        "faster": [1.2, 1.1, 1.3],
        "answers": {},
        "clients": 1,
        "tokens": 48,
        "others_share": None,
        "tried": [],
    }
    return entry | changes


def test_a_file_has_an_entry_a_model_and_machine_and_loses_none(tmp_path):
    out = tmp_path / "tuning.json"
    elsewhere = machine_here() | {"cpu": "Another"}
    assert tuning.written(out, plain_entry())
    assert tuning.written(out, plain_entry(machine=elsewhere, settings=asdict(OWN)))
    assert tuning.written(out, plain_entry(settings=asdict(replace(OWN, poll=0))))
    assert tuning.tuning_in(out, "a" * 64).poll == 0
    assert len(tuning.read_entries(out)) == 2

    # A busy hour takes nothing away.
    assert not tuning.written(out, plain_entry(verdict="withheld"))
    assert tuning.tuning_in(out, "a" * 64).poll == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "b" * 64}, "nothing of this model on this machine"),
        ({"machine": {"cpu": "Another"}}, "it has: Another; write it here with: compress tune"),
        ({"verdict": "not shown"}, "the verdict is 'not shown'; serve without it"),
        ({"verdict": "withheld"}, "tune again while nothing else runs"),
    ],
)
def test_settings_of_another_model_or_machine_or_without_proof_are_refused(
    tmp_path, changes, sentence
):
    tuning.written(tmp_path / "t.json", plain_entry(**changes))
    with pytest.raises(ConfigError, match=sentence):
        tuning.tuning_in(tmp_path / "t.json", "a" * 64)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"poll": 101}, "'poll' is 101, needed: a whole number from 0 to 100"),
        ({"poll": True}, "'poll' is true, needed"),
        ({"threads": 0}, "'threads' is 0, needed: null or a whole number"),
        ({"cache_type": "q1"}, "needed: one of f16, q8_0, f32"),
        ({"polls": 1}, "the key 'polls' is not known here"),
    ],
)
def test_a_malformed_file_is_refused_by_the_key(tmp_path, settings, sentence):
    content = {"schema": 1, "entries": [plain_entry(settings=asdict(OWN) | settings)]}
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=sentence):
        tuning.tuning_in(tmp_path / "t.json", "a" * 64)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--blocks", "1"], "--blocks 1: allowed is 2 or more"),
        (["--clients", "0"], "--clients 0: allowed is 1 or more"),
        (["--tokens", "1"], "--tokens 1: allowed is 2 or more"),
        (["--out", "/no/such/folder/t.json"], "name a file in a folder that exists"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_timed(
    gguf, capsys, arguments, sentence
):
    assert main(["tune", str(gguf), *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out and sentence in error


def test_what_llama_cpp_does_not_run_is_not_tuned(gguf, capsys):
    assert main(["tune", str(gguf.parent / "checkpoint")]) == 2
    assert "tune measures GGUF files in llama.cpp; checkpoint runs in torch" in (
        capsys.readouterr().err
    )


def test_a_bundle_is_not_written_into(tmp_path, capsys):
    bundle = made(tmp_path)
    out = bundle / "tuning.json"
    assert main(["tune", str(bundle), "--out", str(out)]) == 2
    assert "outside the bundle, whose sums it would break" in capsys.readouterr().err
    assert not out.exists()
