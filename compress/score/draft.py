"""A student as the draft of its teacher: speculative decoding in llama.cpp, measured.

The draft proposes a few tokens, the target computes all of them at once and keeps those that it
would have said itself (Leviathan et al. 2022, arXiv 2211.17192, section 2; greedy here): the
answers are the target's. How much faster that is depends on how often it is right and on how much
faster it is, and below some ratio it is slower than no draft. So it is timed, as it is used:

    draft_speedup/N     milliseconds of plain answers over those with N drafted tokens at once,
                        sums over the fixed quarter of the open prompts, prompts included, both
                        servers in turn on each prompt; the ratio's interval over prompts
    draft_accepted/N    share of the drafted tokens that the target kept
    draft_same/N        share of the answers that are the plain ones to the last token: sums of
                        several tokens at once are rounded otherwise than those of one

llama.cpp drafts only where both files have one vocabulary, and says nothing where they don't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from compress.errors import ConfigError
from compress.formats.llamacpp import LlamaCpp
from compress.models.model import Model
from compress.models.vocabulary import of_gguf
from compress.score.intervals import ratio_interval
from compress.score.prompts import ANSWER_TOKENS, Prompt
from compress.score.talk import CONTEXT_TOKENS, has_template, prompts_of

LENGTHS = (2, 4, 8)  # drafted tokens at once
Figures = tuple[dict[str, float], dict[str, tuple[float, float]]]


class Timed(NamedTuple):
    """Token ids of an answer, milliseconds that it took with its prompt, tokens that a draft
    proposed and those of them that were kept.
    """

    ids: list[int]
    ms: float
    drafted: int
    accepted: int


def check_draft(target: Path | None, draft: Model, prompts: Sequence[Prompt]) -> Path:
    """The target's file. ValueError where llama.cpp can't use a model as its draft, ConfigError
    where there is no file to be a draft of, or nothing is asked.
    """
    if draft.runtime != "llama.cpp":
        raise ValueError(
            f"{draft.path} can't be a draft: llama.cpp drafts by .gguf files; export gguf:Q4_0"
        )
    if target is None:
        raise ConfigError(
            "a draft is timed beside its teacher's .gguf, and this teacher is a checkpoint; give"
            " --teacher FILE.gguf"
        )
    if not any(prompt.in_quarter for prompt in prompts):
        raise ConfigError(
            "a draft is timed on the open prompts whose number is divisible by 4, and there is none"
            " of them; set eval.open_prompts=[embedded] or raise eval.open_limit"
        )

    # The same token by every id, which the file may fill up to a rounder number.
    mine, its = of_gguf(draft.path).tokens, of_gguf(target).tokens
    differing = sum(its.get(i) != token for i, token in mine.items()) + len(its.keys() - mine)
    if differing:
        raise ValueError(
            f"{draft.path} has {len(mine):,} tokens, {target} {len(its):,}, and they differ at"
            f" {differing:,} ids: a draft speaks in its target's ids; take a student whose"
            " vocabulary was not cut"
        )
    return target


def drafted(
    target: Path,
    draft: Path,
    prompts: Sequence[Prompt],
    threads: int,
    log: Callable[[str], None],
) -> Figures:
    """Scores and intervals of a draft beside its target, both .gguf. ValueError where llama.cpp
    can't run them.
    """
    asked = [prompt.prompt for prompt in prompts if prompt.in_quarter]
    templated = has_template(Model(target, "", "llama.cpp"))
    scores: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    with closing(LlamaCpp(target, threads, CONTEXT_TOKENS, 1, embedding=False)) as plain:
        texts = prompts_of(plain, asked, templated)
        for length in LENGTHS:
            log(f"drafting {length} tokens at once: {len(texts)} prompts, with and without")
            server = LlamaCpp(
                target, threads, CONTEXT_TOKENS, 1, embedding=False, draft=(draft, length)
            )
            with closing(server):
                pairs = _in_turn(plain, server, texts)
            for name, value, interval in _figures(pairs):
                scores[f"draft_{name}/{length}"] = value
                if interval is not None:
                    intervals[f"draft_{name}/{length}"] = interval
    return scores, intervals


def _in_turn(
    plain: LlamaCpp, with_draft: LlamaCpp, texts: Sequence[str]
) -> list[tuple[Timed, Timed]]:
    """(without, with) for each prompt; whoever was second goes first at the next one."""
    for server in (plain, with_draft):
        _timed(server, texts[0])
    pairs = []
    for number, text in enumerate(texts):
        order = (plain, with_draft) if number % 2 else (with_draft, plain)
        timed = {server: _timed(server, text) for server in order}
        pairs.append((timed[plain], timed[with_draft]))
    return pairs


def _timed(server: LlamaCpp, text: str) -> Timed:
    """By the server's own clock."""
    entry = server.completion(text, ANSWER_TOKENS)
    times = entry["timings"]
    ms = times["prompt_ms"] + times["predicted_ms"]
    return Timed(entry["tokens"], ms, times.get("draft_n", 0), times.get("draft_n_accepted", 0))


def _figures(
    pairs: Sequence[tuple[Timed, Timed]],
) -> list[tuple[str, float, tuple[float, float] | None]]:
    """Name, value and interval."""
    before = [plain.ms for plain, _ in pairs]
    after = [with_draft.ms for _, with_draft in pairs]
    speedup = sum(before) / sum(after)
    proposed = sum(with_draft.drafted for _, with_draft in pairs)
    accepted = sum(with_draft.accepted for _, with_draft in pairs)
    same = sum(plain.ids == with_draft.ids for plain, with_draft in pairs)
    return [
        ("speedup", speedup, ratio_interval(before, after) if len(pairs) > 1 else None),
        ("accepted", accepted / max(1, proposed), None),
        ("same", same / len(pairs), None),
    ]
