"""Fake quantization under fsdp2: each process rounds the rows that it holds, and rounded rows are
what travels.

`fully_shard` cuts a matrix W (R, C) by rows, and a grid acts on blocks of a row, so that with
q(W) = decode(codes(W)) and the rows r of a rank

    q(W)[r] = q(W[r])        dL/dW[r] = (dL/dq)[r] where no code was clamped, else 0

and neither needs what another rank has. What torch gathers for a block is therefore q(W), in
parameters that `carry` it; the master rows, with gradient, moments and shift, stay where they are
and are rounded once a step. Behind a backward pass each rank has (dL/dq)[r], and makes of it the
gradients of its rows: those of shift and B lie in rows too. A (rank, C) of adapters W + B A is on
every rank, and

    dL/dA = sum over ranks of B[r]^T dL/dW[r]

Stacked experts (E, R, C) are cut between experts. Scales as the file holds them are whole on every
rank: 1/16 of a byte a weight. Left out: rounding behind the gather, which needs no carriers but
would keep q of the whole model, and make it anew, on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from compress.train import parallel


class Rows:
    """This rank's rows of one matrix: the parameter that carries their rounded values to the
    others, and what is trained in its place.
    """

    def __init__(self, snapped: Any) -> None:
        """`snapped`: the matrix, as `fake.py` knows it, its weight a shard."""
        self.snapped = snapped
        self.carrier: Any = snapped.parts()[0]
        learns = self.carrier.requires_grad
        self.master = nn.Parameter(self.carrier.detach().clone(), requires_grad=learns)
        self.carrier.requires_grad_(True)

        # Scales, shift and B of these rows, of which an expert has many; A as it is.
        first_dim = parallel.rows(self.carrier)
        height = snapped.shape[:-1].numel() // snapped.shape[0]
        snapped.rows = slice(first_dim.start * height, first_dim.stop * height)
        snapped.trained = self.master
        for part in ("shift", "b"):
            self._spread(part, first_dim)
        self._spread("a", None)
        self.carrier.register_post_accumulate_grad_hook(self.take)

    def _spread(self, part: str, rows: slice | None) -> None:
        """Cut a part that fake quantization has added to these rows; None: all ranks have it."""
        home, name = self.snapped.home, self.snapped.name(part)
        plain = home._parameters.get(name)
        if plain is not None:
            home._parameters[name] = nn.Parameter(parallel.spread(plain.detach(), self.mesh, rows))

    @property
    def mesh(self) -> Any:
        """The processes that share the matrix."""
        return self.carrier.device_mesh

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the master anew, for the next gather."""
        values = parallel.local(self.carrier).flatten(0, -2)
        self.snapped.scales = self.snapped.learned()
        if values.numel():
            self.snapped.snap(values)

    @torch.no_grad()
    def take(self, carrier: Any) -> None:
        """Turn the gradient of the carried values, which has just been reduced over ranks, into
        gradients of what is trained.
        """
        grad = parallel.local(carrier.grad).flatten(0, -2)
        carrier.grad = None
        parts = self.snapped.parts()
        needed = [part is not None and part.requires_grad for part in parts]
        gradients = self.snapped.gradients(grad, parallel.local(carrier).flatten(0, -2), needed)

        # Each rank has its rows' share of what belongs to A.
        for part, gradient in zip(parts, gradients, strict=True):
            if gradient is None:
                continue
            if part is parts[2]:
                parallel.add_up(gradient)
            shard = parallel.like(gradient.view(parallel.local(part).shape), part)
            part.grad = shard if part.grad is None else part.grad + shard

    def gather(self) -> None:
        """Put the master back in the carrier's place, and end the work of this object."""
        for module in self.snapped.modules:
            module._parameters[self.snapped.attribute] = self.master
        self.snapped.rows = slice(None)
        self.snapped.trained = None


class Carried:
    """All matrices of a model that are rounded in rows."""

    def __init__(self, snaps: Iterable[Any]) -> None:
        self.matrices = [Rows(snapped) for snapped in snaps]
        self.fresh = False

    @property
    def masters(self) -> dict[Tensor, nn.Parameter]:
        """What is trained, by what carries it."""
        return {rows.carrier: rows.master for rows in self.matrices}

    def refresh(self, *_: Any) -> None:
        """Round all of them, once after each step of an optimizer."""
        if not self.fresh:
            for rows in self.matrices:
                rows.refresh()
        self.fresh = True

    def gather(self) -> None:
        """Put all masters back where they were."""
        for rows in self.matrices:
            rows.gather()
