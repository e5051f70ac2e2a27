"""How llama.cpp runs a file fastest on this machine, measured as it is served.

Every setting of `tuning.py` is tried in turn, each beside the best so far: the model's process is
started with one, the other, the other, the one (A B B A, which cancels what drifts linearly), and
each time answers the same prompts, a fixed number of tokens each. A setting stays when the ratio of
seconds, a geometric mean over blocks with Student's 95% interval of the logs, is above 1 on its
lower side, and of a quarter of the open prompts no fewer are answered rightly than with llama.cpp's
own settings. Who tries ten finds one by chance: so in the end what was chosen is set beside
llama.cpp's own settings once more, in new blocks, and those alone are the verdict.

    faster     its interval lies above 1
    not shown  it does not
    withheld   other processes used more than BUSY of the CPUs' time meanwhile

Context, which `compress serve --context` sets, costs memory and no time; fused projections would
save barriers, 7% of a token in all where that was measured (`results/speed/`), and are not tried.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from compress.doors import read_json
from compress.score.latency import geometric_mean
from compress.score.prompts import ANSWER_TOKENS, Prompt, embedded_file, read_prompts
from compress.serve.asked import Refusal
from compress.serve.backend import Backend
from compress.serve.settings import Settings
from compress.serve.student import Student
from compress.serve.target import Target
from compress.serve.tuning import Attention, CacheType, Tuning
from compress.store import write_json
from compress.threads import available_threads

BUSY = 0.05  # of the CPUs' time
TIMED = 9  # of so many prompts one is timed, and all of them as one long one where that fits
LONG_CONTEXT = 2048
PROMISE = 1.01  # a setting whose first block gives less is not tried further


class Load(NamedTuple):
    """Seconds of all CPUs since the machine started: any, busy; and of this process with those
    that it has started and seen end.
    """

    all: float
    busy: float
    ours: float


def load_now() -> Load | None:
    """None where the system does not say."""
    status = Path("/proc/stat")
    if not status.is_file():
        return None
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are counted in user.
    ticks = [int(word) for word in status.read_text().split("\n", 1)[0].split()[1:9]]
    second = os.sysconf("SC_CLK_TCK")
    times = os.times()
    ours = times.user + times.system + times.children_user + times.children_system
    return Load(sum(ticks) / second, (sum(ticks) - ticks[3] - ticks[4]) / second, ours)


def others_share(before: Load | None, after: Load | None) -> float | None:
    """Share of the CPUs' time that other processes, and other machines on the same processor,
    used in between.
    """
    if before is None or after is None:
        return None
    busy = (after.busy - before.busy) - (after.ours - before.ours)
    return max(0.0, busy / max(after.all - before.all, 1e-9))


def changes(cpus: int) -> list[dict[str, Any]]:
    """What is tried, one after the other, on a machine of so many CPUs."""
    return [
        *({"threads": count} for count in sorted({cpus // 2, cpus - 1} - {0, cpus})),
        *({"poll": poll} for poll in (0, 100)),
        {"repack": False},
        *({"attention": attention} for attention in (Attention.on, Attention.off)),
        *({"cache_type": kind} for kind in (CacheType.q8_0, CacheType.f32)),
        *({"batch": batch} for batch in (128, 2048)),
    ]


class Bench:
    """A model started again and again with other settings, and asked the same each time."""

    def __init__(self, target: Target, clients: int, tokens: int) -> None:
        self.target, self.clients, self.tokens = target, clients, tokens
        self.prompts = [prompt for prompt in read_prompts(embedded_file()) if prompt.in_quarter]

    async def seconds(self, tuning: Tuning) -> float:
        """Of all timed prompts, from the first one asked to the last one answered, the model loaded
        and warm. ValueError: llama.cpp can't run it so.
        """

        async def timed(student: Student) -> float:
            texts = [prompt.prompt for prompt in self.prompts]
            long_text = "\n".join(texts)
            texts = texts[::TIMED]
            if student.ready().context >= LONG_CONTEXT:
                texts.append(long_text)
            body = {"ignore_eos": True, "cache_prompt": False, "max_tokens": self.tokens}
            await self._ask(student, texts[0], body)
            start = time.perf_counter()
            await self._ask_all(student, texts, body)
            return time.perf_counter() - start

        return await self._with(tuning, timed)

    async def answers(self, tuning: Tuning) -> list[str]:
        """What it says to the fixed quarter of the open prompts, greedily."""

        async def answered(student: Student) -> list[str]:
            texts = [prompt.prompt for prompt in self.prompts]
            return await self._ask_all(student, texts, {"max_tokens": ANSWER_TOKENS})

        return await self._with(tuning, answered)

    def right(self, answers: Sequence[str]) -> int:
        """How many of them are right."""
        return sum(map(Prompt.is_right, self.prompts, answers))

    async def block(self, a: Tuning, b: Tuning) -> float:
        """How many times as fast `b` is, of one A B B A."""
        a1, b1, b2, a2 = [await self.seconds(tuning) for tuning in (a, b, b, a)]
        return math.sqrt(a1 * a2 / (b1 * b2))

    async def _with(self, tuning: Tuning, work: Any) -> Any:
        """What `work` returns of the model, started with these settings and ended behind it."""
        backend = Backend(self.target, Settings(key=None, parallel=self.clients, tuning=tuning))
        student = Student(backend)
        try:
            await backend.start()
            return await work(student)
        except Refusal as refusal:
            words = tuning.words()
            raise ValueError(f"{self.target.name} with {words}: {refusal}") from refusal
        finally:
            await student.close()
            await backend.stop()

    async def _ask_all(
        self, student: Student, texts: Sequence[str], body: dict[str, Any]
    ) -> list[str]:
        free = asyncio.Semaphore(self.clients)

        async def one(text: str) -> str:
            async with free:
                return await self._ask(student, text, body)

        return await asyncio.gather(*map(one, texts))

    async def _ask(self, student: Student, text: str, body: dict[str, Any]) -> str:
        """The answer to one prompt, as a chat where the file has a template."""
        body = body | {"temperature": 0}
        if student.ready().templated:
            turns = {"messages": [{"role": "user", "content": text}]}
            answer = await student.whole("/v1/chat/completions", body | turns)
            return answer["choices"][0]["message"]["content"] or ""
        answer = await student.whole("/v1/completions", body | {"prompt": text})
        return answer["choices"][0]["text"]


class Outcome(NamedTuple):
    """Of a setting: whether it stays, why in words, and how many times as fast it was, block by
    block.
    """

    stays: bool
    words: str
    ratios: list[float]


class Journal:
    """What was tried before an interruption, of the same model, machine and way of measuring, in a
    file that `close` removes; one of anything else is written over.
    """

    def __init__(self, path: Path, of: dict[str, Any]) -> None:
        self.path, self.of = path, of
        content = read_json(path) if path.is_file() else {}
        self.tried: list[dict[str, Any]] = content["tried"] if content.get("of") == of else []

    def outcome(self, candidate: Tuning) -> Outcome | None:
        """What is known of a candidate."""
        for row in self.tried:
            if row["settings"] == asdict(candidate):
                return Outcome(row["stays"], row["words"], row["ratios"])
        return None

    def add(self, candidate: Tuning, outcome: Outcome) -> None:
        self.tried.append({"settings": asdict(candidate)} | outcome._asdict())
        write_json(self.path, {"of": self.of, "tried": self.tried})

    def close(self) -> None:
        self.path.unlink(missing_ok=True)


async def tuned(
    target: Target,
    journal: Journal,
    clients: int,
    tokens: int,
    blocks: int,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """All of an entry of `tuning.py`'s file but which model and machine it is of; to `report` goes
    a line for each setting. What `journal` knows is not tried again. ValueError: llama.cpp can't
    run it.
    """
    before, began = load_now(), time.monotonic()
    bench, defaults = Bench(target, clients, tokens), Tuning()
    at_first = await bench.answers(defaults)

    # From one best to the next.
    best, measured = defaults, 0
    waiting = changes(available_threads())
    for number, change in enumerate(waiting):
        candidate = replace(best, **change)
        outcome = journal.outcome(candidate)
        if outcome is None:
            outcome = await _tried(bench, best, candidate, bench.right(at_first), blocks)
            journal.add(candidate, outcome)
            measured += 1
        minutes = (time.monotonic() - began) / (measured + 1) * (len(waiting) - number + 2) / 60
        report(f"{candidate.words()}: {outcome.words}; about {minutes:.0f} min left")
        best = candidate if outcome.stays else best

    # What was chosen on the way is not what the verdict is of: new blocks are.
    answers = await bench.answers(best)
    ratios = [await bench.block(defaults, best) for _ in range(blocks if best != defaults else 0)]
    share = others_share(before, load_now())
    return {
        "settings": asdict(best),
        "verdict": _verdict(ratios, share),
        "faster": list(geometric_mean(ratios)) if ratios else [1.0, 1.0, 1.0],
        "answers": {
            "asked": len(answers),
            "same": sum(map(str.__eq__, at_first, answers)),
            "right": bench.right(answers),
            "right_with_own_settings": bench.right(at_first),
        },
        "clients": clients,
        "tokens": tokens,
        "others_share": share,
        "tried": journal.tried,
    }


async def _tried(bench: Bench, best: Tuning, candidate: Tuning, right: int, blocks: int) -> Outcome:
    """A candidate beside the best so far; `right`: answers that it must reach."""
    ratios: list[float] = []
    try:
        for _ in range(blocks):
            ratios.append(await bench.block(best, candidate))
            if ratios[0] < PROMISE:
                return Outcome(False, f"{ratios[0]:.3f} times as fast", ratios)
        mean, low, high = geometric_mean(ratios)
        words = f"{mean:.3f} times as fast ({low:.3f} to {high:.3f})"
        if low <= 1:
            return Outcome(False, f"{words}, not shown to be faster", ratios)
        reached = bench.right(await bench.answers(candidate))
    except ValueError as error:
        return Outcome(False, f"does not run here ({error})", ratios)
    if reached < right:
        return Outcome(False, f"{words}, but {reached} answers are right, before {right}", ratios)
    return Outcome(True, f"{words}: stays", ratios)


def _verdict(ratios: Sequence[float], share: float | None) -> str:
    if share is not None and share > BUSY:
        return "withheld"
    return "faster" if ratios and geometric_mean(ratios)[1] > 1 else "not shown"


def sentence(entry: dict[str, Any]) -> str:
    """What was found, for a person."""
    mean, low, high = entry["faster"]
    share, answers = entry["others_share"], entry["answers"]
    busy = "load unknown" if share is None else f"others used {share:.1%} of the CPUs"
    words = Tuning(**entry["settings"]).words()
    if entry["verdict"] == "withheld":
        return (
            f"verdict withheld: other processes used {share:.1%} of the CPUs meanwhile, at most"
            f" {BUSY:.0%} is quiet; stop them and repeat (measured: {words}, {mean:.2f} times as"
            " fast)"
        )
    if words == Tuning().words():
        return f"not shown: nothing tried is faster here than {words}; {busy}"
    return (
        f"{entry['verdict']}: {words}: {mean:.2f} times as fast ({low:.2f} to {high:.2f}) as"
        f" llama.cpp's own settings; {answers['same']} of {answers['asked']} answers are the same,"
        f" {answers['right']} right (before {answers['right_with_own_settings']}); {busy}"
    )
