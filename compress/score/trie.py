"""Sequences that begin alike, laid out so that a causal model computes what they share once.

Taken in lexicographic order, a sequence of l tokens whose first c are those of the one before adds
l - c nodes to a trie, and a causal model needs every node once (tree attention: Miao et al. 2024,
arXiv 2305.09781, section 4.2):

    row = nodes of the trie, one behind the other    position = depth    mask_ij = node j is on the
    way from the root to node i

Joining a row of n nodes saves c tokens and makes l - c tokens look at n more keys; it is done while
(l - c) n <= KEYS c.

Legend: B rows, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

KEYS = 500  # keys that cost about as much to look at as a token's matrix products


@dataclass
class Row:
    """Part of the trie: token and depth of every node, and for each prompt in it (its index, its
    nodes, how many of these were there before).
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[tuple[int, Any, int]] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether it is more than one path."""
        return len(self.ids) > len(self.paths[-1][1])


def rows_of(prompts: Sequence[list[int]], reach: int) -> list[Row]:
    """Lay out prompts (token ids) in rows; a row with branches holds none of more
    than `reach` tokens.
    """
    rows: list[Row] = []
    last_ids: list[int] = []
    path = np.arange(0)
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        ids = prompts[i]
        shared = _shared_length(last_ids, ids)
        if not rows or not _may_join(rows[-1], ids, shared, reach):
            rows.append(Row())
            shared = 0

        # The shared nodes are there; the others come behind the row's last one.
        row = rows[-1]
        nodes, added = len(row.ids), len(ids) - shared
        path = np.concatenate([path[:shared], np.arange(nodes, nodes + added)])
        row.ids += ids[shared:]
        row.depths += range(shared, len(ids))
        row.paths.append((i, path, shared))
        last_ids = ids
    return rows


def _shared_length(first: list[int], second: list[int]) -> int:
    """How many tokens two sequences have in common before they differ."""
    for place, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return place
    return min(len(first), len(second))


def _may_join(row: Row, ids: list[int], shared: int, reach: int) -> bool:
    """Whether a sequence goes into a row, with whose last one it has `shared` tokens in common."""
    # One that goes on where the row ends makes no branch.
    nodes = len(row.ids)
    if shared >= nodes:
        return True
    if (len(ids) - shared) * nodes > KEYS * shared:
        return False
    return max(len(ids) - 1, *row.depths) < reach


def padded(values: list[int], length: int) -> list[int]:
    """`values`, and zeros up to `length`."""
    return values + [0] * (length - len(values))


def tree_inputs(rows: Sequence[Row]) -> dict[str, Tensor]:
    """What a model needs besides the ids to compute rows with branches: `attention_mask`
    (B, 1, L, L), true where a node looks, and `position_ids` (B, L).
    """
    import torch

    length = max(len(row.ids) for row in rows)
    depths_BL = torch.tensor([padded(row.depths, length) for row in rows])

    # Padding sees itself: a row of the mask without any key gives no number.
    mask_B1LL = torch.eye(length, dtype=torch.bool).repeat(len(rows), 1, 1, 1)
    for mask_LL, row in zip(mask_B1LL[:, 0], rows, strict=True):
        for _, path, shared in row.paths:
            new_nodes = path[shared:, None]
            mask_LL[new_nodes, path] = torch.from_numpy(path <= new_nodes)
    return {"attention_mask": mask_B1LL, "position_ids": depths_BL}
