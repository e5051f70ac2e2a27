"""The progress line of long work: how far, how fast, how long still."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 20.0  # between two progress lines


@contextmanager
def progress(
    label: str, total: int, first: int, log: Callable[[str], None]
) -> Iterator[Callable[[int, float, float], None]]:
    """`update(done, loss, tokens_per_sec)` after each step: a live bar on a terminal, a line now
    and then elsewhere.
    """
    started = printed = time.monotonic()
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[info]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(label, total=total, completed=first, info="")

        def update(done: int, loss: float, tokens_per_sec: float) -> None:
            nonlocal printed
            info = f"loss {loss:.4f}  {tokens_per_sec:,.0f} tokens/s"
            bar.update(task, completed=done, info=info)

            # Where no bar is shown.
            if bar.disable and (time.monotonic() - printed > LINE_SECONDS or done == total):
                printed = time.monotonic()
                seconds_left = (printed - started) / max(1, done - first) * (total - done)
                log(f"{label}: step {done}/{total}  {info}  {seconds_left:,.0f} s left")

        yield update
