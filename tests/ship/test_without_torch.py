"""A GGUF's bundle is verified and accepted where the extra `accept` alone is installed, and says
the same there as beside torch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_bundle_open import made
from test_received_bundle import forged, sealed

from compress import packages
from compress.__main__ import main
from compress.teacher import random_teacher

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PYPROJECT["optional-dependencies"]
LIMITS = {
    "kept": {"min": 0.0},
    "acc": {"min": 0.0},
    "open/right": {"min": 0.5},
    "open/kept": {"min": 0.3},
    "open/choice_gap": {"max": 2.0},
    "size_bytes": {"max": 10_000_000},
    "params": {"max": 10_000_000},
    "kl_to_teacher": {"max": 9.0},
}


def closure(names):
    """Distributions with all that they require, by their installed metadata."""
    reached, waiting = {}, list(names)
    while waiting:
        name = Requirement(waiting.pop()).name
        if name.lower() in reached:
            continue
        try:
            reached[name.lower()] = found = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        for line in found.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(line)
    return reached.values()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with what `pip install 'compress-lm[accept]'` brings, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    for one in closure(EXTRAS["accept"]):
        for file in one.files or []:
            top = file.parts[0]
            place = Path(one.locate_file(top))
            if top not in ("..", "__pycache__") and place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
    return folder


def alone(site, *arguments, cwd):
    """A verb in an interpreter that sees `site` and our package."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    env |= {"OMP_NUM_THREADS": "1", "HOME": str(cwd)}
    command = [sys._base_executable, "-m", "compress", *map(str, arguments)]
    one = min(os.sched_getaffinity(0))  # threads that wait for each other are slow beside others
    return subprocess.run(
        command, capture_output=True, text=True, env=env, cwd=cwd,
        preexec_fn=lambda: os.sched_setaffinity(0, [one]),
    )  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """With items of three rules; times are short."""
    out = made(tmp_path_factory.mktemp("made"))
    random_teacher(out / "hf", 0)
    rows = [
        {
            "task": "grammar",
            "doc_id": i,
            "rule": "argmax",
            "context": "The language" if i % 2 else "",
            "choices": [" is", " are one", " of the words"],
            "gold": i % 3,
            "logliks": [-1.0, -2.0, -3.0],
            "choice": 0,
            "correct": i % 3 != 1,
        }
        for i in range(24)
    ]
    rows.append(
        {
            "task": "a_text",
            "doc_id": 0,
            "rule": "rolling",
            "context": "",
            "choices": ["A class is an object. " * 40],
            "logliks": [-900.0],
            "words": 200,
            "bytes": 880,
        }
    )
    (out / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # Facts that can be picked from four.
    prompts = [json.loads(line) for line in (out / "open_prompts.jsonl").read_text().splitlines()]
    for prompt in prompts:
        prompt |= {"choices": ["nothing", "a red car", "Rome"], "answer": "people"}
    (out / "open_prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts))
    manifest = json.loads((out / "manifest.json").read_text())
    times = {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1, "processes": 1}
    manifest["config"]["eval"] |= times | {"context_tokens": 128}
    manifest["config"]["budget"]["limits"] = LIMITS
    manifest["budget"] = "FAIL"  # of the made-up scores
    return sealed(out, manifest)


def test_verify_needs_python_alone(bundle, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    done = alone(empty, "verify", bundle, cwd=tmp_path)
    assert done.returncode == 0 and "files verified" in done.stdout and done.stderr == ""


def test_a_verb_that_misses_a_package_says_which_extra_brings_it(bundle, site, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder, verb, extra in (
        (empty, ("accept", bundle), "accept"),
        (site, ("run", "demo"), "train"),
        (site, ("score", bundle / "model-Q4_0.gguf"), "train"),
        (site, ("compare", bundle), "train"),
    ):
        done = alone(folder, *verb, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"pip install 'compress-lm[{extra}]'" in done.stderr


def test_accept_says_the_same_without_torch_as_beside_it(
    bundle, site, tmp_path, capfd, monkeypatch
):
    """Down to the last digit: items, answers, size; only closeness to the teacher is undecided."""
    light = alone(site, "accept", bundle, cwd=tmp_path)
    monkeypatch.setattr("compress.accept.available_threads", lambda: 1)
    code = main(["accept", str(bundle), "--store", str(tmp_path / "store")])
    out, err = capfd.readouterr()
    assert light.returncode == code, light.stderr + err
    assert "torch is not installed (pip install 'compress-lm[train]'" in light.stderr
    ours, theirs = light.stdout.splitlines(), out.splitlines()
    assert len(ours) == len(LIMITS) and ours[:-1] == theirs[:-1]
    assert all(re.match(r"(PASS|FAIL|INCONCLUSIVE) +\S+ -?\d", line) for line in ours[:-1]), ours
    assert "kl_to_teacher was not measured" in ours[-1]


def test_a_run_scores_a_file_as_accept_does(bundle, tmp_path):
    """Items and picked answers through lm-eval's classes and an HF tokenizer, and without."""
    from compress.formats.llamacpp import LlamaCpp, head
    from compress.models.model import gguf_model
    from compress.models.tokenizer import load_tokenizer
    from compress.score.file import file_scores
    from compress.score.lm import served_lm
    from compress.score.settings import Eval
    from compress.score.tasks import rescore

    rows = [json.loads(line) for line in (bundle / "requests.jsonl").read_text().splitlines()]
    settings = Eval(
        tasks=[], open_prompts=[], batch_size=8, context_tokens=128, processes=1, repeats=1,
        prompt_tokens=8, new_tokens=2,
    )  # fmt: skip
    file = bundle / "model-Q4_0.gguf"
    light = file_scores(gguf_model(file), settings, rows, [], 1)
    server = LlamaCpp(file, 1, 128)
    lm = served_lm(server, head(file), load_tokenizer(bundle / "hf"), 8, 128)
    full = rescore(lm, rows)
    server.close()
    assert light["items"] == full.items and light["chance"] == full.chance


def test_the_table_of_packages_is_that_of_pyproject():
    assert PYPROJECT["dependencies"] == []
    for extra, modules in packages.EXTRAS.items():
        named = {Requirement(line).name.lower() for line in EXTRAS[extra]} - {"compress-lm"}
        ours = {name.lower() for name in modules.values()}
        # Of what an extra's packages bring themselves some is named too, for their modules.
        assert named <= ours, extra
        brought = {name.metadata["Name"].lower() for name in closure(EXTRAS[extra])}
        assert ours <= brought | named, extra


def test_forged_settings_are_bounded_there_too(bundle, site, tmp_path):
    import shutil

    shutil.copytree(bundle, tmp_path / "bundle")
    forged(tmp_path / "bundle", "config", "eval", "repeats", value=10**9)
    done = alone(site, "accept", tmp_path / "bundle", cwd=tmp_path)
    assert done.returncode == 3 and "'repeats' is 1000000000" in done.stderr
