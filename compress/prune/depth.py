"""Blocks that go because the model's distribution misses them least: greedy by KL. (By what a block
does to its input: `compress.prune.importance`.)

    cost_i = KL(p_parent || p_without i)     on calibration text, in nats a token

The block with the least cost goes, all others are weighed again without it, and so on: SLEB (arXiv
2402.09025) with KL to the parent in place of perplexity. States in front of a block are common to
all candidates behind it, so that a candidate costs the blocks behind it alone, and the head. Left
out: weighing pairs; candidates that do much to their input, of which only the least influential
are tried.
"""

from collections.abc import Callable

import torch

from compress.models.walk import Walk
from compress.prune.importance import influence_of


@torch.no_grad()
def drop_by_kl(
    walk: Walk,
    divergence: Callable[[Walk], float],
    count: int,
    keep_first: int,
    keep_last: int,
    candidates: int,
) -> list[tuple[int, float]]:
    """The `count` blocks to drop as (index in the model, KL without it and those before it), in the
    order they go; none of the first `keep_first` or the last `keep_last`.

    `divergence` gives the KL of a walk that has passed all blocks that are left; `candidates` are
    tried each time.
    """
    kept = list(range(len(walk.blocks)))
    dropped: list[tuple[int, float]] = []
    while len(dropped) < count:
        walk.task = f"weighed, {len(dropped)} of {count} gone"
        free = kept[keep_first : len(kept) - keep_last]
        tried = _least_influential(walk, kept, free, candidates, rounds=count - len(dropped))

        # Each is left out of a branch of the walk, which then meets all blocks behind it.
        costs: dict[int, float] = {}
        walk.enter()
        for at, index in enumerate(kept[: kept.index(tried[-1]) + 1]):
            if index in tried:
                branch = walk.branch()
                branch.pace = walk.pace
                for later in kept[at + 1 :]:
                    branch.advance(later)
                costs[index] = divergence(branch)
            if index != tried[-1]:
                walk.advance(index)

        index = min(costs, key=costs.__getitem__)
        dropped.append((index, costs[index]))
        kept.remove(index)
    return dropped


def _least_influential(
    walk: Walk, kept: list[int], free: list[int], count: int, rounds: int
) -> list[int]:
    """Of the blocks that may go the `count` least influential, in the order of the model; the pace
    then knows how far it is through so many rounds.
    """
    walk.enter()
    influences: dict[int, float] = {}
    for index in kept[: kept.index(free[-1]) + 1]:
        entering = list(walk.states)
        walk.advance(index)
        influences[index] = influence_of(entering, walk.states)
    tried = sorted(sorted(free, key=influences.__getitem__)[:count])

    # Blocks to pass: in front of the last that is tried, and behind each.
    places = [kept.index(index) for index in tried]
    passes = places[-1] + sum(len(kept) - at - 1 for at in places)
    walk.pace.steps = walk.pace.done + passes + (rounds - 1) * (len(influences) + passes)
    return tried
