"""Figures for Prometheus, kept by prometheus-client."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from compress.serve.log import Entry
from compress.serve.settings import Price

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """What one door counts: requests, seconds, tokens, cost; slots and waiting as they are."""

    def __init__(self, prices: dict[str, Price]) -> None:
        self.registry = CollectorRegistry()
        self._prices = prices

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"compress_{name}", about, labels, registry=self.registry)

        def histogram(name: str, about: str) -> Histogram:
            name = f"compress_{name}"
            return Histogram(name, about, ["by"], buckets=SECONDS, registry=self.registry)

        # Labels have few values: none of them comes from a client.
        self._requests = counter("requests", "Requests that ended.", "path", "status", "end")
        self._answered = counter("answered", "Answers by model, and why it was.", "by", "why")
        self._tokens = counter("tokens", "Tokens read and written.", "by", "kind")
        self._cost = counter("cost", "Estimated cost by the prices given.", "by")
        self._seconds = histogram("request_seconds", "Seconds of an answered request.")
        self._first = histogram("first_byte_seconds", "Seconds to an answer's first byte.")
        self.restarts = counter("backend_restarts", "Times that the model's process was restarted.")
        self.teacher_failures = counter("teacher_failures", "Calls that failed, by reason.", "why")

    def watch(self, name: str, about: str, value: Callable[[], float]) -> None:
        """A figure that is read whenever it is asked for."""
        Gauge(f"compress_{name}", about, registry=self.registry).set_function(value)

    def request(self, entry: Entry) -> None:
        """Counts a request that has ended."""
        self._requests.labels(entry.path, str(entry.status), entry.end).inc()
        if not entry.by:
            return
        if entry.status == 200 and entry.end == "done":
            self._answered.labels(entry.by, entry.why or "only").inc()
            self._seconds.labels(entry.by).observe(entry.seconds)
            if entry.first is not None:
                self._first.labels(entry.by).observe(entry.first)
        self.used(entry.by, entry.prompt_tokens, entry.answer_tokens)

    def used(self, by: str, prompt_tokens: int, answer_tokens: int) -> None:
        """Counts tokens of a model and what they cost."""
        self._tokens.labels(by, "prompt").inc(prompt_tokens)
        self._tokens.labels(by, "answer").inc(answer_tokens)
        self._cost.labels(by).inc(self._prices[by].of(prompt_tokens, answer_tokens))

    def page(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
