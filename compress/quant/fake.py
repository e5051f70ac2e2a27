"""The one fake-quant module: a model computes with decode(codes(w, s), s), the optimizer moves the
master weights w.

Straight-through estimator: with q = round(w / s) and the grid's range [low, high], forward is s *
clamp(q, low, high) and

    dL/dw = dL/dw_q where low <= q <= high, else 0        (q before clamping)

that is, rounding counts as the identity and clamping as itself: PACT (arXiv 1805.06085, section 3)
for the clamp, LSQ (arXiv 1902.08153, section 2) for weights. LSQ's inequality is strict; here the
end codes themselves pass gradient, because the largest weight of every Q4_0 block sits exactly on
one and would never move again. Grids with a minimum round (w - floor) / s instead (grids/grid.py).
`scales`, all numbers the file holds besides the codes, stay fixed.

Cost: the quantized weight and its place in the autograd graph are kept until w or s changes (tensor
version counters, and a hook on optimizer steps, since fused optimizers don't count), so a step of
many micro-batches quantizes once, a tied embedding and head share one result, and each backward
costs one masked copy. Nothing is saved for backward, so the kept node may be walked many times; w
must not change between a forward and its backward. Memory: 4 bytes per weight. Writing to
`weight.data` in place goes unseen; write under `torch.no_grad()`.

With adapters (LoRA, arXiv 2106.09685, section 4.1, under the grid) the master is W + B A with W
frozen, and of dL/dw only dL/dA = B^T dL/dw and dL/dB = dL/dw A^T are kept: what merges is on the
grid already, not rounded afterwards.

Master weights keep their names and identity: the class of each module is swapped for a
subclass whose `weight` attribute is the quantized tensor, whatever its forward does, while
`state_dict` and `parameters` still hold the master. Scales are buffers (`<module>.quant_scales`).
The subclass can't be pickled or deep-copied; call `finish` first.

With codes that stay nothing is rounded: a model computes with decode(codes, s), and of each block
only the log of its scale moves, dL/d(log s) = sum over the block of dL/dw_q * w_q. The values lie
where the master was.

bf16 masters (trainer.precision=bf16_stochastic) are rounded to the grid in fp32, and the values
that a model computes with to bf16, as autocast does with fp32 ones; what ships are codes of the
master and fp32 values. Scales, shift and adapters stay in their types. Under fsdp2 each process
rounds its rows (`shards.py`).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from compress.models.checkpoint import best_device
from compress.models.empty import read
from compress.quant.codes import Matrix, Quantized, bake, quantizable
from compress.quant.grids import GRIDS, Grid
from compress.quant.shards import Carried
from compress.train import parallel


class Snapped:
    """One master weight on its grid: the values, and the graph node
    that leads back to the master. Stacked matrices (E, R, C) count as one, (E R, C).
    """

    def __init__(
        self,
        matrix: Matrix,
        modules: list[nn.Module],
        grid: Grid,
        scales: Tensor,
        codes: Tensor | None = None,
    ) -> None:
        self.home = matrix.home
        self.attribute = matrix.attribute
        self.shape = matrix.weight.shape
        self.modules = modules
        self.grid = grid
        self.scales = scales  # those that `values` are made with
        self.codes = codes  # (R, C), where these stay
        self.rows = slice(None)  # of scales (R, any), where this process has some of them
        self.trained: nn.Parameter | None = None  # master, where the module's weight carries values
        self.key: tuple[int, ...] = ()
        self.values = torch.empty(0)
        self.linked: Tensor | None = None

    def name(self, part: str) -> str:
        """Of what is added to the module for this weight, which may hold two."""
        return f"quant_{part}" if self.attribute == "weight" else f"quant_{part}_{self.attribute}"

    def parts(self) -> list[Any]:
        """What may be trained: master, shift, adapters a and b; None where there is none."""
        names = [self.name("shift"), self.name("a"), self.name("b")]
        master = self.home._parameters[self.attribute] if self.trained is None else self.trained
        return [master, *(self.home._parameters.get(name) for name in names)]

    def local_parts(self) -> list[Any]:
        """Of all of them what this process has, as plain tensors outside of the graph."""
        return [None if part is None else parallel.local(part) for part in self.parts()]

    def restore_classes(self) -> None:
        """Let its modules compute with their weights as they are."""
        for module in self.modules:
            module.__class__ = getattr(type(module), "unquantized", type(module))

    @property
    def stored(self) -> Tensor:
        """The scales that the module holds."""
        scales: Tensor = getattr(self.home, self.name("scales"))
        return scales

    def add_parts(self, *, learned: bool, rank: int) -> None:
        """Give the module its scales, a shift of them that is learned, and adapters of a rank."""
        self.home.register_buffer(self.name("scales"), self.scales)
        if learned and self.grid.learns:
            shape = (*self.shape[:-1], self.scales.shape[1])
            shift = self.scales.new_zeros(shape, dtype=torch.float32)
            self.home.register_parameter(self.name("shift"), nn.Parameter(shift))
        if rank or self.codes is not None:
            self.parts()[0].requires_grad_(False)  # the master stays
        if not rank:
            return

        # What is added to it is trained.
        exact = partial(self.scales.new_zeros, dtype=torch.float32)
        a = nn.init.kaiming_uniform_(exact(rank, self.shape[-1]), a=5**0.5)
        b = exact(*self.shape[:-1], rank)
        self.home.register_parameter(self.name("a"), nn.Parameter(a))
        self.home.register_parameter(self.name("b"), nn.Parameter(b))

    @torch.no_grad()
    def master(self) -> Tensor:
        """fp32 (R, C), of this process's rows: W, or W + B A with adapters."""
        w, _, a, b = self.local_parts()
        w = w.flatten(0, -2).float()
        return w if a is None else torch.addmm(w, b.flatten(0, -2), a)

    @torch.no_grad()
    def learned(self) -> Tensor:
        """fp16 (R, C / block), of this process's rows: the scales as the shift has moved them."""
        scales = self.stored[self.rows].to(self.parts()[0].device)
        shift = self.local_parts()[1]
        return scales if shift is None else (scales.float() * shift.flatten(0, -2).exp()).half()

    def snap(self, values: Tensor) -> None:
        """decode(codes), of the master or those that stay, into `values` (R, C), whatever their
        type.
        """
        if self.codes is not None:
            values.copy_(self.grid.decode(self.codes, self.scales))
            return
        exact = values
        if values.dtype != torch.float32:
            exact = torch.empty_like(values, dtype=torch.float32)
        self.grid.snap(self.master(), self.scales, exact)
        if exact is not values:
            values.copy_(exact)

    @torch.no_grad()
    def gradients(
        self, grad: Tensor, values: Tensor, needed: Sequence[bool]
    ) -> list[Tensor | None]:
        """From d loss / d values (R, C) to those of the parts that are `needed`, of this process's
        rows: (R, C), (R, C / block), (r, C), (R, r).
        """
        grad = grad.float()
        length = self.grid.length(self.shape[-1])
        if self.codes is not None:
            blocks = (t.reshape(t.numel() // length, length) for t in (grad, values.float()))
            return [None, torch.linalg.vecdot(*blocks).view(len(grad), -1), None, None]

        _, _, a, b = self.local_parts()
        learned = values if needed[1] else None
        inside, shift = self.grid.gradients(self.master(), self.scales, grad, learned)
        low = (None, None) if a is None else (b.flatten(0, -2).T @ inside, inside @ a.T)
        return [inside if needed[0] else None, shift, *low]

    def tensor(self, _: nn.Module) -> Tensor:
        """fp32, in the weight's shape: the quantized weight, as a property of modules; recomputed
        only when the master or the scales have changed.
        """
        # What the values depend on, as identities and version counters.
        parts = self.parts()
        scales = self.stored
        key = (
            id(parts[0]),
            parts[0].data_ptr(),
            id(scales),
            scales._version,
            *(-1 if part is None else part._version for part in parts),
        )

        # Quantize anew, into the same memory where it fits.
        if key != self.key:
            self.scales = self.learned()
            with torch.inference_mode(False), torch.no_grad():
                # Where codes stay nothing reads the master: its memory is free, and `data` writes
                # there unseen by its version counter.
                w = parts[0].detach().flatten(0, -2)
                if self.codes is not None:
                    self.values = parts[0].data.flatten(0, -2)
                alike = (w.shape, w.device, w.dtype)
                if (self.values.shape, self.values.device, self.values.dtype) != alike:
                    self.values = torch.empty_like(
                        w, memory_format=torch.contiguous_format, requires_grad=False
                    )
                self.snap(self.values)
            self.key = key
            self.linked = None

        # The node that leads back to the parts, made once and only where something is trained.
        trained = any(part is not None and part.requires_grad for part in parts)
        if not (torch.is_grad_enabled() and trained):
            return self.values.view(self.shape)
        if self.linked is None:
            self.linked = cast(Tensor, _StraightThrough.apply(*parts, self))
        return self.linked


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        w: Tensor,
        shift: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        snapped: Snapped,
    ) -> Tensor:
        ctx.snapped = snapped
        return snapped.values.detach().view(snapped.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """From d loss / d values, in the weight's shape, to those of the parts that need it."""
        snapped = ctx.snapped
        gradients = snapped.gradients(grad.flatten(0, -2), snapped.values, ctx.needs_input_grad[:4])
        shaped = [
            None if gradient is None else gradient.view(part.shape).to(part.dtype)
            for part, gradient in zip(snapped.parts(), gradients, strict=True)
        ]
        return *shaped, None


class Attached:
    """What `attach` has put on a model: its matrices, by name, and the hook that tells them of an
    optimizer's step; under fsdp2 what carries them.
    """

    def __init__(self, snaps: dict[str, Snapped]) -> None:
        self.snaps = snaps
        self.hook = register_optimizer_step_post_hook(self._stepped)
        self.carried: Carried | None = None

    def _stepped(self, *_: Any) -> None:
        for snapped in self.snaps.values():
            snapped.key = ()
        if self.carried is not None:
            self.carried.fresh = False

    def prepare(self) -> set[nn.Parameter]:
        """Before the masters are cut: modules compute with their weights as they are. Returns
        the parameters besides, which are not to be cut.
        """
        for snapped in self.snaps.values():
            snapped.restore_classes()
        parts = (part for snapped in self.snaps.values() for part in snapped.parts()[1:])
        return {part for part in parts if part is not None}

    def spread(self) -> Carried:
        """Round in rows from now on: each master has become a shard."""
        self.carried = Carried(self.snaps.values())
        return self.carried


def _values(matrix: Matrix) -> Tensor:
    """fp32 (R, C): the values of a matrix, for the moment where it has no memory."""
    if not matrix.weight.is_meta:
        return matrix.rows
    return read(matrix.weight.place).float().flatten(0, -2)


def attach(
    model: nn.Module,
    grids: str | dict[str, str],
    scales: str = "round",
    rank: int = 0,
    start: dict[str, Quantized] | None = None,
    fixed: bool = False,
) -> None:
    """Make each matrix that a grid can hold (`quantizable`) compute on one, the same for all or one
    for each by its state-dict name.

    Scales are those of `start`, which holds all matrices or is None: then by llama.cpp's rule
    ("round") or, on grids of one scale, by "search" or "learned". Learned ones begin so and add a
    parameter `quant_shift` (R, C / block) to each module; grids of more numbers keep theirs. Master
    weights must be fp32; with a `rank` above 0 they are frozen, and adapters `quant_a` (rank, C),
    drawn from torch's generator, and `quant_b` (R, rank), 0, are trained. `fixed`: the codes of
    `start` stay, and of each matrix its learned scales alone are trained. ValueError when a weight
    does not fit its grid (naming it), or when attached already.
    """
    if hasattr(model, "fake_quant"):
        raise ValueError("the model is fake-quantized already: call finish before attaching again")

    # Every matrix with its first scales; nothing is changed before all fit.
    snaps: dict[str, Snapped] = {}
    for name, matrix in quantizable(model).items():
        weight = matrix.weight
        if weight.dtype != torch.float32:
            raise ValueError(
                f"{name} is {weight.dtype}: masters must be fp32; load the model as torch.float32"
            )
        grid = GRIDS[grids if isinstance(grids, str) else grids[name]]
        if start:
            first_scales = start[name].scales.to(weight.device)
        else:
            values = _values(matrix)
            rows = values.to(best_device())
            searched = scales == "search" and grid.searches
            first = grid.search(rows, name=name) if searched else grid.encode(rows, name)[1]
            first_scales = first.to(values.device)  # the weight's own may have no memory yet
        modules = [
            module
            for module in model.modules()
            if module._parameters.get(matrix.attribute) is weight
        ]
        codes = start[name].codes.to(weight.device) if start and fixed else None
        snaps[name] = Snapped(matrix, modules, grid, first_scales, codes)

    # What is trained besides, and the classes that compute with quantized weights.
    for snapped in snaps.values():
        snapped.add_parts(learned=scales == "learned", rank=rank)
        for module in snapped.modules:
            kind = type(module)
            module.__class__ = type(
                f"FakeQuant{kind.__name__}",
                (kind,),
                {snapped.attribute: property(snapped.tensor), "unquantized": kind},
            )

    model.fake_quant = Attached(snaps)  # type: ignore[assignment]


def finish(model: nn.Module) -> dict[str, Quantized]:
    """Bake decode(codes) into the weights, undo everything `attach` added, return what
    `save_quantized` takes.
    """
    attached: Any = model.fake_quant
    quantized: dict[str, Quantized] = {}
    for name, snapped in attached.snaps.items():
        # The last master and scales, while all parts are there.
        home = snapped.home
        grid = snapped.grid
        scales = snapped.learned()
        codes_RC = snapped.codes
        if codes_RC is None:
            codes_RC = grid.codes(snapped.master(), scales)

        # Classes, scales and parameters as they were.
        snapped.restore_classes()
        delattr(home, snapped.name("scales"))
        for part in ("shift", "a", "b"):
            home._parameters.pop(snapped.name(part), None)

        codes = Quantized(grid.name, codes_RC, scales)
        weight = home._parameters[snapped.attribute].requires_grad_(True)
        weight.data = weight.data.float()  # of bf16 masters too: their decoded values are not bf16
        quantized[name] = bake(weight, codes)

    attached.hook.remove()
    del model.fake_quant
    return quantized
