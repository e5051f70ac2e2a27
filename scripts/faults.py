"""Kill a recipe at three stages (Ctrl-C, SIGTERM, kill -9), repeat the command each time, and
compare with an uninterrupted run.

`python scripts/faults.py [RECIPE] [KEY=VALUE ...] [--whole RUN_DIRECTORY]` works in the current
directory; without --whole it also makes the uninterrupted run, in a store of its own. Prints a
table and ends with one line of JSON: `weights_differing` must be 0.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)


def command(recipe: str, overrides: list[str], store: str) -> list[str]:
    """The command line of one run."""
    return [sys.executable, "-m", "compress", "run", recipe, *overrides, f"store={store}"]


def newest_run(recipe: str) -> Path:
    """The latest run directory of a recipe."""
    return max(path.parent for path in Path("runs", recipe).glob("*/run.json"))


def digests(run: Path) -> dict[str, str]:
    """{slot: weights digest} of a finished run."""
    records = [json.loads(path.read_text()) for path in sorted(run.glob("*/record.json"))]
    return {record["slot"]: record["digest"] for record in records}


def interrupt(
    line: list[str], slot: str, how: signal.Signals, after_seconds: float
) -> tuple[int, float]:
    """Run until `slot` starts, wait, send the signal. Returns (exit code, seconds)."""
    start = time.monotonic()
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for message in process.stderr:
        if f"] {slot}: " in message and " from " in message:
            break
    time.sleep(after_seconds)
    process.send_signal(how)
    process.stderr.read()
    return process.wait(), time.monotonic() - start


def main() -> int:
    """Interrupt, resume, compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", nargs="?", default="smoke")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--slots", default="heal,chat,qat")
    parser.add_argument(
        "--after-seconds",
        default="3,3,3",
        help="how long after each slot's first line its signal comes",
    )
    parser.add_argument(
        "--whole", type=Path, help="an uninterrupted run of the same recipe to compare with"
    )
    options = parser.parse_args()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore Ctrl-C, and children inherit that
    cut = command(options.recipe, options.overrides, "runs/.store-faults")
    for slot, how, after in zip(
        options.slots.split(","), SIGNALS, options.after_seconds.split(","), strict=True
    ):
        code, seconds = interrupt(cut, slot, how, float(after))
        print(f"{slot:<10} {how.name:<8} exit {code:>4} after {seconds:6.1f} s", flush=True)
    subprocess.run(cut, check=True)
    resumed = digests(newest_run(options.recipe))
    if options.whole is None:
        time.sleep(1.1)  # run directories are named by the second
        subprocess.run(command(options.recipe, options.overrides, "runs/.store-whole"), check=True)
        options.whole = newest_run(options.recipe)
    whole = digests(options.whole)
    differing = [slot for slot in whole if resumed.get(slot) != whole[slot]]
    for slot, digest in whole.items():
        print(f"{slot:<14} {digest[:16]} {'same' if slot not in differing else 'DIFFERENT'}")
    print(
        json.dumps(
            {
                "recipe": options.recipe,
                "interrupts": 3,
                "slots_compared": len(whole),
                "weights_differing": len(differing),
            }
        )
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
