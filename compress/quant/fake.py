"""The one fake-quant module: a model computes with decode(codes(w, s), s), the optimizer moves the master weights w.

Straight-through estimator: with q = round(w / s) and the grid's range [low, high], forward is s * clamp(q, low, high)
and

    dL/dw = dL/dw_q where low <= q <= high, else 0        (q before clamping)

that is, rounding counts as the identity and clamping as itself: PACT (arXiv 1805.06085, section 3) for the clamp, LSQ
(arXiv 1902.08153, section 2) for weights. LSQ's inequality is strict; here the end codes themselves pass gradient,
because the largest weight of every Q4_0 block sits exactly on one and would never move again. Grids with a minimum
round (w - floor) / s instead (grids/grid.py). `scales`, all numbers the file holds besides the codes, stay fixed.

Cost: the quantized weight and its place in the autograd graph are kept until w or s changes (tensor version counters,
and a hook on optimizer steps, since fused optimizers don't count), so a step of many micro-batches quantizes once, a
tied embedding and head share one result, and each backward costs one masked copy. Nothing is saved for backward, so
the kept node may be walked many times; w must not change between a forward and its backward. Memory: 4 bytes per
weight. Writing to `weight.data` in place goes unseen; write under `torch.no_grad()`.

Master weights keep their names and identity: the class of each Linear / Embedding is swapped for a subclass whose
`weight` attribute is the quantized tensor, whatever its forward does, while `state_dict` and `parameters` still hold
the master. Scales are buffers (`<module>.quant_scales`). The subclass can't be pickled or deep-copied; call `finish`
first.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from compress.quant.codes import Quantized, bake, quantizable
from compress.quant.grids import GRIDS, Grid


class _Snapped:
    """One master weight on its grid: the values, and the graph node that leads back to the master."""

    def __init__(self, home: nn.Module, grid: Grid, steps: list[int]) -> None:
        self.home, self.grid, self.steps = home, grid, steps
        self.key: tuple[int, ...] = ()
        self.values = torch.empty(0)
        self.scales = torch.empty(0)  # as `values` were made with
        self.linked: Tensor | None = None

    def tensor(self) -> Tensor:
        """fp32 (R, C): the quantized weight, recomputed only when the master or the scales have changed."""
        w = cast(nn.Parameter, self.home._parameters["weight"])
        scales, shift = cast(Tensor, self.home._buffers["quant_scales"]), self.home._parameters.get("quant_shift")
        key = (id(w), w._version, w.data_ptr(), id(scales), scales._version, self.steps[0], -1 if shift is None else shift._version)
        if key != self.key:
            self.scales = learned(scales, shift)
            self._refresh(w, self.scales)
            self.key, self.linked = key, None
        if not (torch.is_grad_enabled() and w.requires_grad):
            return self.values
        if self.linked is None:
            self.linked = cast(Tensor, _StraightThrough.apply(w, shift, self))
        return self.linked

    def _refresh(self, w: Tensor, scales: Tensor) -> None:
        with torch.inference_mode(False), torch.no_grad():
            if self.values.shape != w.shape or self.values.device != w.device:
                self.values = torch.empty_like(w, memory_format=torch.contiguous_format, requires_grad=False)
            self.grid.snap(w, scales, self.values)

    def to_master(self, grad: Tensor, shift: bool) -> tuple[Tensor, Tensor | None]:
        """(R, C) -> (R, C), (R, C / block): the straight-through gradients of the master and, if it is there, of the scales' shift."""
        w = cast(Tensor, self.home._parameters["weight"]).detach()
        inside = self.grid.unclipped(w, self.scales, grad)
        if not shift:
            return inside, None
        blocks = [t.reshape(-1, self.grid.length(t.shape[1])) for t in (grad, self.values, inside, w)]
        return inside, (torch.linalg.vecdot(blocks[0], blocks[1]) - torch.linalg.vecdot(blocks[2], blocks[3])).view(self.scales.shape)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor, shift: Tensor | None, snapped: _Snapped) -> Tensor:
        ctx.snapped = snapped
        return snapped.values.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *ctx.snapped.to_master(grad, ctx.needs_input_grad[1]), None


@torch.no_grad()
def learned(scales: Tensor, shift: Tensor | None) -> Tensor:
    """fp16 (R, C / block): the scales as the shift has moved them."""
    return scales if shift is None else (scales.float() * shift.exp()).half()


def attach(model: nn.Module, grids: str | dict[str, str], scales: str = "round") -> None:
    """Make each Linear and Embedding compute on a grid, the same for all or one for each matrix by its state-dict name.

    Scales by llama.cpp's rule ("round") or, on grids of one scale, by "search" or "learned". Learned ones start from the rule and add a
    parameter `quant_shift` (R, C / block) to each module; grids of more numbers keep theirs. Master weights must be fp32.
    ValueError when a weight does not fit its grid (naming it), or when attached already.
    """
    if hasattr(model, "fake_quant"):
        raise ValueError("the model is fake-quantized already: call finish before attaching again")
    layout: dict[str, str] = {}
    chosen, places = [], []
    for name, home, modules in quantizable(model):
        weight = cast(Tensor, home.weight)
        if weight.dtype != torch.float32:
            raise ValueError(f"{name} is {weight.dtype}: masters must be fp32; load the model as torch.float32")
        layout[name] = grids if isinstance(grids, str) else grids[name]
        grid = GRIDS[layout[name]]
        found = grid.search(weight, name=name) if scales == "search" and grid.searches else grid.encode(weight, name)[1]
        chosen.append((grid, home, modules, found))
        places.append((name, home, modules))
    steps = [0]
    for grid, home, modules, found in chosen:
        home.register_buffer("quant_scales", found)
        if scales == "learned" and grid.searches:
            home.register_parameter("quant_shift", nn.Parameter(torch.zeros_like(found, dtype=torch.float32)))
        snapped = _Snapped(home, grid, steps)
        for module in modules:
            _swap(module, snapped)
    model.fake_quant = _Attached(layout, places, _count(steps))  # type: ignore[assignment]


class _Attached:
    def __init__(self, layout: dict[str, str], places: list[tuple[str, nn.Module, list[nn.Module]]], hook: RemovableHandle) -> None:
        self.layout, self.places, self.hook = layout, places, hook


def _count(steps: list[int]) -> RemovableHandle:
    def hook(*_: Any) -> None:
        steps[0] += 1

    return register_optimizer_step_post_hook(hook)


def _swap(module: nn.Module, snapped: _Snapped) -> None:
    """Give one instance a subclass of its own class whose `weight` is the quantized tensor."""
    kind = type(module)
    members = {"weight": property(lambda _: snapped.tensor()), "unquantized": kind}
    module.__class__ = type(f"FakeQuant{kind.__name__}", (kind,), members)


def finish(model: nn.Module) -> dict[str, Quantized]:
    """Bake decode(codes) into the weights, undo everything `attach` added, return what `save_quantized` takes."""
    attached = cast(_Attached, model.fake_quant)
    made: dict[str, Quantized] = {}
    for name, home, modules in attached.places:
        scales = learned(cast(Tensor, home._buffers.pop("quant_scales")), home._parameters.pop("quant_shift", None))
        for module in modules:
            module.__class__ = type(module).unquantized  # type: ignore[attr-defined]
        weight, grid = cast(Tensor, home.weight), attached.layout[name]
        made[name] = bake(weight, Quantized(grid, GRIDS[grid].codes(weight, scales), scales))
    attached.hook.remove()
    del model.fake_quant
    return made
