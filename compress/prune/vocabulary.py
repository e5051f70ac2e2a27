"""Which ids of a BPE vocabulary may go: leaves of the merge tree first, least used first.

A token is a leaf when no merge that is left builds on it. Without it, text is cut into the two
tokens that it was merged of, so its count moves there, and one of them may become a leaf itself.
What remains is closed: every token can still be built of others by merges that are all there, so no
id is unreachable, and any text can be written as before, only longer (leaf-based pruning, arXiv
2512.03989, section 4). Of leaves that the text never uses the youngest goes first: merges were
learned from the most frequent on.

Left out: weighing a token by more than its count, such as what the model loses without it.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

Merge = tuple[str, str]


class Kept(NamedTuple):
    """The ids that stay, ascending, and the tokens by which the counted text grows."""

    ids: list[int]
    tokens_added: float


def kept_ids(
    ids: Mapping[str, int],
    merges: Sequence[Merge],
    counts: Mapping[int, float],
    keep: int,
    protected: Collection[int],
) -> Kept:
    """The `keep` tokens that stay, `protected` ones among them.

    `ids`: token -> id; `merges`: in the order in which they are applied; `counts`: how often
    tokenised text uses an id. ValueError when so many can't go, naming the fewest possible.
    """
    made_by, builds_on = _tree(ids, merges)
    usage = defaultdict(float, counts)
    token_of = {index: token for token, index in ids.items()}

    # Leaves wait by their usage, the youngest of equal ones first.
    waiting = [
        (usage[i], -i)
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
            usage[ids[part]] += usage[leaf]
        tokens_added += usage[leaf]
        for part in chain.from_iterable(leaf_merges):
            builds_on[part] -= 1
            if not builds_on[part] and ids[part] not in protected:
                heapq.heappush(waiting, (usage[ids[part]], -ids[part]))
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
