"""Which ids of a BPE vocabulary may go: leaves of the merge tree first, least used first.

A token is a leaf when no merge that is left builds on it. Without it, text is cut into the two
tokens that it was merged of, so its count moves there, and one of them may become a leaf itself.
What remains is closed: every token can still be built of others by merges that are all there, so no
id is unreachable, and any text can be written as before, only longer (leaf-based pruning, arXiv
2512.03989, section 4).

A text of some hundred thousand tokens uses a third of a vocabulary. Which of the other ids a model
would say is in its probabilities: summed over the positions of a text they are how often it expects
each id there, and count beside what is really used (`expected_counts`). By age alone, the youngest
first as merges were learned from the most frequent on, names of cities and of authors go, which the
teacher answers with (results/open/demo.md). Of leaves that are neither used nor expected the
youngest goes first.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from compress.models.head import Head

Merge = tuple[str, str]
CHUNK_TOKENS = 256  # whose probabilities are there at once


class Usage(NamedTuple):
    """How often tokenised text uses an id, and how often a model expects it besides."""

    counts: Counter[int]
    expected: Mapping[int, float]


class Kept(NamedTuple):
    """The ids that stay, ascending, and the tokens by which the counted text grows."""

    ids: list[int]
    tokens_added: float


def expected_counts(
    model: Any, head: Head, ids_BL: Tensor, precision: str, log: Callable[[str], None]
) -> dict[int, float]:
    """How often a model expects each id of its `head` behind the tokens of a text (B, L): the sum
    of its probabilities over all positions, B x L in all. Products of blocks are bf16 unless
    `precision` is "fp32".
    """
    import torch

    from compress.models.walk import Walk

    advice = "set prune_vocab.calibration_sequences=0, or repair the teacher"
    walk = Walk(model, ids_BL, precision=precision, log=log, advice=advice)
    for index in range(len(walk.blocks)):
        walk.advance(index)

    head = head.detach().on(walk.device)
    expected_V = torch.zeros(head.ids_count, dtype=torch.float64, device=walk.device)

    def add(h_BLH: Tensor) -> None:
        for h_CH in h_BLH.flatten(0, 1).split(CHUNK_TOKENS):
            expected_V.add_(head.logits(h_CH.to(head.weight_VH)).softmax(-1).sum(0))

    walk.final(add)
    return dict(enumerate(expected_V.tolist()))


def kept_ids(
    ids: Mapping[str, int],
    merges: Sequence[Merge],
    usage: Usage,
    keep: int,
    protected: Collection[int],
) -> Kept:
    """The `keep` tokens that stay, `protected` ones among them.

    `ids`: token -> id; `merges`: in the order in which they are applied. ValueError when so many
    can't go, naming the fewest possible.
    """
    made_by, builds_on = _tree(ids, merges)
    used: defaultdict[int, float] = defaultdict(float, usage.counts.items())
    weight = used.copy()
    for i, count in usage.expected.items():
        weight[i] += count
    token_of = {index: token for token, index in ids.items()}

    # Leaves wait by their weight, the youngest of equal ones first.
    waiting = [
        (weight[i], -i)
        for i, token in token_of.items()
        if not builds_on[token] and i not in protected
    ]
    heapq.heapify(waiting)
    kept = set(token_of)
    tokens_added = 0.0
    while len(kept) > keep:
        if not waiting:
            raise ValueError(
                f"{keep} tokens can't be kept alone: special tokens, bytes and what they are built"
                f" of are {len(kept)}; keep at least as many"
            )
        leaf = -heapq.heappop(waiting)[1]
        kept.remove(leaf)

        # Its text falls to the parts of its first merge; all its merges go.
        leaf_merges = made_by[token_of[leaf]]
        for part in leaf_merges[0] if leaf_merges else ():
            used[ids[part]] += used[leaf]
            weight[ids[part]] += weight[leaf]
        tokens_added += used[leaf]
        for part in chain.from_iterable(leaf_merges):
            builds_on[part] -= 1
            if not builds_on[part] and ids[part] not in protected:
                heapq.heappush(waiting, (weight[ids[part]], -ids[part]))
    return Kept(sorted(kept), tokens_added)


def _tree(
    ids: Mapping[str, int], merges: Sequence[Merge]
) -> tuple[dict[str, list[Merge]], dict[str, int]]:
    """Token -> the merges that make it, and how many merges build on it."""
    made_by: dict[str, list[Merge]] = defaultdict(list)
    builds_on: dict[str, int] = defaultdict(int)
    for left, right in merges:
        made_by[left + right].append((left, right))
        builds_on[left] += 1
        builds_on[right] += 1
    assert builds_on.keys() <= ids.keys(), "every part of a merge is a token"
    return made_by, builds_on
