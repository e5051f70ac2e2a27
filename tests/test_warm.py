"""Forks of the warm process end as processes of their own would."""

from __future__ import annotations

import os
from pathlib import Path

from warm import Forked

PARENT = """
import os, sys
from compress.score import latency

done = latency.subprocess.run([sys.executable, sys.argv[1]], env=dict(os.environ))
print(done.returncode, done.stdout.strip())
"""


def run(folder: Path, child: str) -> str:
    (folder / "child.py").write_text(child)
    (folder / "parent.py").write_text(PARENT)
    command = [str(folder / "parent.py"), str(folder / "child.py")]
    out, err = Forked(command, folder, os.environ).communicate(timeout=60)
    assert not err, err
    return out.strip()


def test_a_fork_of_a_fork_gives_its_output_and_exit_code(tmp_path):
    assert run(tmp_path, "print('there')") == "0 there"
    assert run(tmp_path, "import sys\nprint('there')\nsys.exit(3)") == "3 there"


def test_a_fork_that_a_signal_ends_is_told_to_whoever_waits_for_it(tmp_path):
    assert run(tmp_path, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)") == "-9"
