"""The `compress` command in a process of its own, and what its runs leave."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from warm import Forked

ROOT = Path(__file__).resolve().parents[1]
ENV = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
FAST = ["eval.tasks=[grammar]", "eval.limit=4", "eval.time_stages=false", "trainer.threads=1"]


def compress(folder, *arguments):
    process = Forked(["-m", "compress", *arguments], folder, ENV)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.poll(), out, err)


def newest(folder, recipe="smoke"):
    return max(
        path for path in (folder / "runs" / recipe).iterdir() if (path / "run.json").is_file()
    )


def records(run):
    return [json.loads(path.read_text()) for path in sorted(run.glob("*/record.json"))]
