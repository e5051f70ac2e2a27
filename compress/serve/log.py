"""A line of JSON a request, without a word of what was asked or answered, and without keys.

time       when it ended, UTC
id         in the header x-request-id too
path       of the endpoint; "other" for none of ours
status     of HTTP
end        done, hung_up, timeout, or the code of what went wrong
by         student or teacher; why (with a teacher): sure, unsure, or what kept it from answering
stream     whether it was asked for piece by piece
prompt_tokens, answer_tokens
waited, first, seconds   in the queue, to the first byte, altogether
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO


@dataclass
class Entry:
    """What is known of a request, filled in while it is answered. Seconds."""

    path: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    status: int = 500
    end: str = "done"
    by: str = ""
    why: str = ""
    stream: bool = False
    prompt_tokens: int = 0
    answer_tokens: int = 0
    waited: float = 0.0
    first: float | None = None
    seconds: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Seconds since it came."""
        return time.perf_counter() - self.start

    def began(self) -> None:
        """Marks the first byte of the answer."""
        if self.first is None:
            self.first = self.elapsed()


class Log:
    """Writes to standard error, or wherever a service's supervisor sends that."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def request(self, entry: Entry) -> None:
        """One line on a request that has ended."""
        row = asdict(entry)
        del row["start"]
        for name in ("waited", "first", "seconds"):
            row[name] = None if row[name] is None else round(row[name], 4)
        self.event("request", **{name: value for name, value in row.items() if value != ""})

    def event(self, kind: str, **facts: Any) -> None:
        """One line on anything else: started, restarted, stopping."""
        row = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": kind} | facts
        print(json.dumps(row), file=self._stream, flush=True)
