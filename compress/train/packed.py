"""Training text as rows of tokens: what every training stage, calibration and the held-out scores
read.

Legend: S sequences, L positions, R rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """A shuffle that reads files once an epoch: `rows` lie in each, those of `files` are mixed."""

    rows: int
    files: int


@dataclass(frozen=True)
class Packed:
    """ids (S, L+1) int32, mask (S, L+1) bool, the digest that names them; first (S, L+1) bool
    marks documents' first tokens.
    """

    ids: Tensor
    mask: Tensor
    digest: str
    first: Tensor | None = None  # None: rows are one text each

    def rows(
        self, seed: int, start: int, count: int, first: int, windows: Windows | None = None
    ) -> list[int]:
        """Sequence numbers of positions start..start+count of the endless shuffled stream over the
        `first` sequences; of those in files, in `windows` of them.
        """
        size = min(len(self.ids), first)
        order = _permutation if windows is None else partial(_in_windows, windows)
        return [
            order(seed, index // size, size)[index % size] for index in range(start, start + count)
        ]

    def inputs(self, rows: list[int]) -> dict[str, Tensor]:
        """inputs (R, L) int64 and, where documents are apart, positions (R, L) int64: what a model
        is given.
        """
        ids_RL = self.ids[rows, :-1].long()
        if self.first is None:
            return {"inputs": ids_RL}
        index_L = torch.arange(ids_RL.shape[1])
        start_RL = torch.where(self.first[rows, :-1], index_L, 0).cummax(-1).values
        return {"inputs": ids_RL, "positions": index_L - start_RL}

    def batch(self, rows: list[int]) -> dict[str, Tensor]:
        """`inputs`, and labels (R, L) int64 with their mask (R, L) bool."""
        return self.inputs(rows) | {
            "labels": self.ids[rows, 1:].long(),
            "mask": self.mask[rows, 1:].contiguous(),
        }


@cache
def _permutation(seed: int, epoch: int, size: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(size, generator=generator).tolist()


@cache
def _in_windows(windows: Windows, seed: int, epoch: int, size: int) -> list[int]:
    """Files in any order, then the rows of so many of them at a time."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = []
    rows, files = windows
    for chosen in torch.randperm(-(-size // rows), generator=generator).split(files):
        places = (chosen[:, None] * rows + torch.arange(rows)).flatten()
        places = places[places < size]
        order += places[torch.randperm(len(places), generator=generator)].tolist()
    return order
