"""Shared fixtures: a tiny random teacher made by the production code, and a context for running
one stage by itself.
"""

from __future__ import annotations

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # two workers on two cores; sums must not depend on the machine

import dataclasses
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

# A file goes to one worker as a whole: the longest ones first, or the last one is waited for.
LONGEST_FILES = (
    "test_pipeline.py",
    "test_faults.py",
    "test_interrupts.py",
    "search/test_solve.py",
    "train/test_parallel.py",
    "formats/test_onnx.py",
    "stages/test_contract.py",
    "test_ask.py",
    "serve/test_serve.py",
    "score/test_lm.py",
    "ship/test_received_bundle.py",
    "ship/test_bundle_open.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of LONGEST_FILES first, all others in their order."""
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 0.4M-parameter random Llama with a 512-token tokenizer, as `teacher=random` makes it."""
    from compress.teacher import random_teacher

    out = tmp_path_factory.mktemp("teacher")
    random_teacher(out, 0)
    return out


@pytest.fixture
def context(tiny_teacher: Path, tmp_path: Path):
    """A stage's Context on the tiny teacher, sequences of 32 tokens, fp32."""
    return make_context(tiny_teacher, tmp_path)


def make_context(teacher: Path, folder: Path, **changes):
    from compress.stages.context import Context
    from compress.text.packing import pack

    data, work = folder / "data", folder / "work"
    data.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    text = pack(["embedded:topics"], teacher, 32, data)
    context = Context(
        teacher=teacher,
        seed=0,
        seq_len=32,
        work=work,
        signals=folder / "signals",
        calibration=lambda n: text.ids[:n, :-1].long(),
        text=lambda: text,
        chat=lambda: pack(["embedded:docstring_chat"], teacher, 32, data),
        precision="fp32",
        label="test",
        file_overhead=lambda checkpoint: 1000,
        log=lambda message: None,
        curve=lambda rows: None,
    )
    return dataclasses.replace(context, **changes)
