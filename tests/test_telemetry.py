"""Every dependency's reports are off, before it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from compress.telemetry import SWITCHES, off

ROOT = Path(__file__).resolve().parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Extras that run what a user's data passes through; dev's own tools see none of it.
NAMED = {
    Requirement(line).name.lower()
    for extra, lines in EXTRAS.items()
    if extra != "dev"
    for line in lines
} - {"compress-lm"}


def test_every_dependency_has_its_entry():
    known = {name.lower().replace("_", "-") for name in SWITCHES}
    assert {name.replace("_", "-") for name in NAMED} <= known


@pytest.mark.parametrize("package", sorted(name for name, on in SWITCHES.items() if on))
def test_a_switch_is_one_that_the_package_reads(package):
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    named = [
        Path(file.locate())
        for file in files
        if file.suffix in (".py", ".so", ".dylib") or ".so." in file.name
    ]
    left = set(SWITCHES[package])
    for path in named:
        if left and path.is_file():
            content = path.read_bytes()
            left = {name for name in left if name.encode() not in content}
    assert not left


def test_off_wins_over_the_environment_and_comes_first(monkeypatch):
    wanted = {name: value for switches in SWITCHES.values() for name, value in switches.items()}
    for name in wanted:
        monkeypatch.setenv(name, "on")
    off()
    assert {name: os.environ[name] for name in wanted} == wanted

    # In a fresh process, whatever of ours is imported first.
    script = (
        "import os, sys, compress.errors;"
        "assert not {'huggingface_hub', 'wandb', 'onnxruntime', 'datasets'} & set(sys.modules);"
        "import json; print(json.dumps(dict(os.environ)))"
    )
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert wanted.items() <= json.loads(done.stdout).items()
