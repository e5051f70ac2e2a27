"""Limits of the door, and of the cascade behind it."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from compress.errors import ConfigError, refuse_credentials, without_credentials
from compress.serve.tuning import Tuning

CONTEXT_TOKENS = 4096  # of a prompt with its answer, where the model was made for more
PORTS = 65_535


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone: localhost, or an address of its loopback."""
    bare = host.strip("[]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback
    except ValueError:
        return False


def context_within(asked: int | None, made_for: int | None, name: str) -> int:
    """Tokens of a prompt with its answer: as asked, within what the model `name` was made for.
    ConfigError where that is less.
    """
    if asked is None:
        return min(made_for or CONTEXT_TOKENS, CONTEXT_TOKENS)
    if made_for is not None and asked > made_for:
        raise ConfigError(
            f"--context {asked:,}: {name} was made for {made_for:,} tokens; give at most that"
        )
    return asked


@dataclass(frozen=True)
class Price:
    """What tokens cost: money for a million of a prompt, and of an answer."""

    prompt: float = 0.0
    answer: float = 0.0

    def of(self, prompt_tokens: int, answer_tokens: int) -> float:
        """What a request costs."""
        return (self.prompt * prompt_tokens + self.answer * answer_tokens) / 1e6


@dataclass(frozen=True)
class Settings:
    """Limits of the door. ConfigError for what no door can be.

    `context`: tokens of a prompt with its answer, None for what the model was made for, at most
    CONTEXT_TOKENS; `parallel`: requests that are answered at once, None for what the runtime can;
    `queue`: requests that wait besides; `timeout`: seconds of a request, waiting included;
    `max_tokens`: of an answer; `threads`: to compute on, None for the CPUs of this process;
    `tuning`: how llama.cpp is run, whose `threads` hold where `threads` is None.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    parallel: int | None = None
    context: int | None = None
    queue: int = 16
    timeout: float = 120.0
    max_tokens: int = 1024
    threads: int | None = None
    price: Price = Price()
    tuning: Tuning = Tuning()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= PORTS:
            raise ConfigError(
                f"--port {self.port}: allowed are 1 to {PORTS:,}, and 0 for any that is free"
            )
        for name, value, least in (
            ("parallel", self.parallel, 1),
            ("context", self.context, 16),
            ("queue", self.queue, 0),
            ("max-tokens", self.max_tokens, 1),
            ("threads", self.threads, 1),
        ):
            if value is not None and value < least:
                raise ConfigError(f"--{name} {value}: allowed is {least} or more")
        if not 0 < self.timeout < 1e6:
            raise ConfigError(f"--timeout {self.timeout}: allowed are seconds above 0")

        # Without a key everybody who reaches the door is let in.
        if self.key is None and not is_loopback(self.host):
            raise ConfigError(
                f"--no-key with --host {self.host}: without a key only this machine may be served;"
                " give --key-file FILE or COMPRESS_KEY, or --host 127.0.0.1"
            )


@dataclass(frozen=True)
class Rule:
    """From which certainty on the student is believed.

    Certainty, in nats a token: the mean log-probability of its first `tokens` tokens, and the
    lowest one with a share of `weight`.
    """

    threshold: float
    tokens: int = 16
    weight: float = 0.5

    def certainty(self, logprobs: Sequence[float]) -> float:
        """Of an answer's first log-probabilities; an answer without a token is certain."""
        if not logprobs:
            return 0.0
        mean = sum(logprobs) / len(logprobs)
        return (1 - self.weight) * mean + self.weight * min(logprobs)

    def believes(self, logprobs: Sequence[float]) -> bool:
        """Whether the student's answer stands."""
        return self.certainty(logprobs) >= self.threshold


@dataclass(frozen=True)
class TeacherSettings:
    """A larger model behind the student, asked where `rule` does not believe the student.

    `url`: up to and with /v1; `timeout`: seconds for a whole answer; `budget`: calls within any
    hour, None for no limit.
    """

    url: str
    rule: Rule
    key: str | None = None
    model: str | None = None
    timeout: float = 30.0
    budget: int | None = None
    price: Price = Price()

    def __post_init__(self) -> None:
        if not 0 < self.timeout < 1e6:
            raise ConfigError(f"--teacher-timeout {self.timeout}: allowed are seconds above 0")
        if self.budget is not None and self.budget < 0:
            raise ConfigError(f"--teacher-budget {self.budget}: allowed is 0 or more calls an hour")
        address = urlsplit(self.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(
                f"--teacher {without_credentials(self.url)!r} is no URL; write it as in"
                " https://teacher.example/v1"
            )
        refuse_credentials(self.url, "--teacher")

    @property
    def in_clear(self) -> bool:
        """Whether prompts, answers and the key cross a network without TLS."""
        address = urlsplit(self.url)
        return address.scheme == "http" and not is_loopback(address.hostname or "")
