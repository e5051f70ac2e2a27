"""The harness of faults in its quick form: a few of each part, seeded, in forks of one process.

The full form is slow: `make test-slow`, or `python scripts/faults.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from smoke_runs import ENV, ROOT

PARTS = (
    "kills", "random", "races", "flips", "disk", "hostile", "recipes", "fuzz", "sockets",
    "canaries",
)  # fmt: skip


def harness(*arguments):
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "faults.py"), *arguments],
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return done, json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return harness("--quick", "--work", str(tmp_path_factory.mktemp("faults")))


@pytest.mark.parametrize("part", PARTS)
def test_a_few_of_each_kind_do_no_harm(quick, part):
    done, figures = quick
    told = [line for line in done.stdout.splitlines() if not line.startswith("{")]
    assert figures[part]["passed"] == figures[part]["tried"] > 0, "\n".join(told)
    assert done.returncode == 0 or not figures["holds"]


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_as_many_as_each_part_promises_do_no_harm(part):
    done, figures = harness("--parts", part)
    assert done.returncode == 0 and figures[part]["reached"], done.stdout
