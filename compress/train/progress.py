"""Progress of long work on stderr: a live bar on a terminal, a line now and then elsewhere; loss, tokens/s and time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINE_SECONDS = 20.0


class Progress:
    """`update(done, loss, tokens_per_sec)` after each step."""

    def __init__(self, label: str, total: int, done: int, log: Callable[[str], None]) -> None:
        self.label, self.total, self.first, self.log = label, total, done, log
        self.started = self.printed = time.monotonic()
        columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[info]}"),
                   TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
        self.bar = RichProgress(*columns, console=Console(stderr=True), transient=True) if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.task = self.bar.add_task(self.label, total=self.total, completed=self.first, info="")
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, loss: float, tokens_per_sec: float) -> None:
        """Show the state after `done` of `total` steps."""
        info = f"loss {loss:.4f}  {tokens_per_sec:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, info=info)
        elif time.monotonic() - self.printed > LINE_SECONDS or done == self.total:
            self.printed = time.monotonic()
            left = (self.printed - self.started) / max(1, done - self.first) * (self.total - done)
            self.log(f"{self.label}: step {done}/{self.total}  {info}  {left:,.0f} s left")
