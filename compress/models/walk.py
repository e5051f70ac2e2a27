"""A text on its way through the blocks of a decoder: the one way in which stages calibrate.

    x_0 = embed(ids)    x_i+1 = block_i(x_i)    h = norm(x_n)

The model stays where it is, in host memory, its blocks in the type of their file
(`checkpoint.load_stored`); the present block alone is on the device, and in fp32. Besides it
there are the hidden states in front of that block, in groups of ROWS rows, each sent through by
itself: they lie beside the model too. Whoever changes a block does so in front of it and then
advances through it, so that every later block is measured on what the changed ones send it (the
"true sequential" order of GPTQ's code, arXiv 2210.17323).

What modules inside a block receive or give is handed over as it comes, group by group, to be
reduced at once (`Moments`): a second moment is an fp32 product within a group and a float64 sum
over groups. Left out: sending the next block while the present one computes.

Legend: B sequences, L tokens of one, N tokens, H hidden, C channels of a module's inputs.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.models.blocks import blocks_of, final_norm
from compress.models.checkpoint import best_device

SHORT = (torch.bfloat16, torch.float16)
ROWS = 4  # sequences sent through a block at a time
LINE_SECONDS = 20.0  # between two lines of progress, as in `train/progress.py`

Taker = Callable[[Tensor], None]  # what a module received or gave for one group of rows
Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, besides its states


class _Stop(Exception):
    """The text has reached what was asked for."""


class Moments:
    """Second moments of inputs: the sum of x x^T (C, C) in float64."""

    def __init__(self) -> None:
        self.gram_CC = torch.zeros((), dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count inputs (..., C)."""
        x_NC = x.detach().flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            self.gram_CC = self.gram_CC + (x_NC.T @ x_NC).double()


class Pace:
    """Lines of progress: how far, and how long still. At most one every LINE_SECONDS, and the
    last.

    `steps` are the blocks to pass, which may be corrected on the way.
    """

    def __init__(self, log: Callable[[str], None], steps: float) -> None:
        self.log = log
        self.steps = steps
        self.done = 0.0
        self.restart()

    def restart(self) -> None:
        """Steps up to here took no time that says anything of the next ones."""
        self.first = self.done
        self.started = self.printed = time.monotonic()

    def reach(self, done: float, text: str) -> None:
        """So many steps are done; perhaps say so."""
        self.done = done
        now = time.monotonic()
        if now - self.printed <= LINE_SECONDS and done != self.steps:
            return

        # Time left, if what is to come goes as fast as what is done.
        self.printed = now
        seconds_a_step = (now - self.started) / max(done - self.first, 1e-9)
        seconds_left = seconds_a_step * max(0.0, self.steps - done)
        self.log(f"{text}  {seconds_left:,.0f} s left")


class _Place:
    """Where the present block computes, and which one it is: shared by a walk and its branches.

    A block at home in 16 bits is fp32 while it is present. What is put into it is rounded as it
    leaves, as saving would.
    """

    def __init__(self, device: torch.device, home: torch.device) -> None:
        self.device = device
        self.home = home
        self.present: Any = None
        self.stored: dict[str, torch.dtype] = {}  # of its parameters that are not fp32 at home

    def bring(self, block: nn.Module) -> None:
        """Have this block on the device, and no other."""
        if self.present is block:
            return
        self.leave()
        self.present = block
        if self.device != self.home:
            block.to(self.device)
        for name, parameter in block.named_parameters():
            if parameter.dtype in SHORT:
                self.stored[name] = parameter.dtype
                parameter.data = parameter.data.float()

    def leave(self) -> None:
        """Send the present block home."""
        if self.present is None:
            return
        for name, parameter in self.present.named_parameters():
            if name in self.stored:
                parameter.data = parameter.data.to(self.stored[name])
        if self.device != self.home:
            self.present.to(self.home)
        self.present = None
        self.stored = {}


class Walk:
    """Ids (B, L) on their way through `model`: `states`, tensors (ROWS, L, H) of which the last
    may have fewer rows, stand in front of a block.

    `device`: where blocks compute, the best of this machine unless given; where the model is
    already, nothing moves. `precision`: products are bf16 unless it is "fp32", the states stay
    fp32. `log` receives lines of progress; `pace` says how far it is.
    """

    def __init__(
        self,
        model: Any,
        ids_BL: Tensor,
        *,
        precision: str = "fp32",
        device: torch.device | None = None,
        log: Callable[[str], None] = lambda line: None,
        advice: str = "repair the parent",
    ) -> None:
        self.model = model
        self.blocks = blocks_of(model)
        self.precision = precision
        self.advice = advice  # in the refusal of a text that is not finite

        # The model is at home; ids may come from anywhere.
        home = next(model.parameters()).device
        self.ids_BL = ids_BL.to(home)
        self._place = _Place(device or best_device(), home)
        self.arguments = self._arguments()

        self.pace = Pace(log, len(self.blocks))
        self.task = ""  # what is done at each block, for the lines of progress
        self.enter()

    @property
    def device(self) -> torch.device:
        """Where the present block computes."""
        return self._place.device

    @torch.no_grad()
    def enter(self) -> None:
        """Go to the first block, through the embeddings as they now are."""
        self.states: list[Tensor] = []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.states.append(args[0] if args else kwargs["hidden_states"])
            raise _Stop

        with self.blocks[0].register_forward_pre_hook(note, with_kwargs=True):
            for rows in self.ids_BL.split(ROWS):
                with suppress(_Stop):
                    self._embed(rows)

    def branch(self) -> Walk:
        """Another walk from here, over the same model and without lines of progress: this one
        stays where it is.
        """
        other = copy.copy(self)
        other.states = list(self.states)
        other.pace = Pace(lambda line: None, len(self.blocks))
        return other

    def bring(self, index: int) -> None:
        """Have a block on the device, in fp32, to be looked at or changed before it is called."""
        self._place.bring(self.blocks[index])

    def call(self, index: int, x_BLH: Tensor) -> Tensor:
        """What a block makes of up to ROWS rows, on the device; the block stays there until
        another is called or advanced through. Gradients are the caller's business.
        """
        self.bring(index)
        others, keywords = _on(self.device, self.arguments[index])
        with self.arithmetic():
            out = self.blocks[index](x_BLH.to(self.device), *others, **keywords)
        return out[0] if isinstance(out, tuple) else out

    def arithmetic(self) -> torch.autocast:
        """As blocks compute: products in bf16 unless the precision is fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision != "fp32")

    @torch.no_grad()
    def advance(self, index: int) -> None:
        """Go through a block, which then goes home. ValueError naming it when its output is not
        finite.
        """
        passed = self.pace.done
        for at, x_BLH in enumerate(self.states):
            out_BLH = self.call(index, x_BLH)
            if not torch.isfinite(out_BLH).all():
                where = f"the output of block {index} on the calibration text holds NaN or infinity"
                raise ValueError(f"{where}: {self.advice}")
            self.states[at] = out_BLH.to(self._place.home)

            # Large blocks take minutes, so each group counts.
            self.pace.reach(
                passed + (at + 1) / len(self.states),
                f"block {index + 1}/{len(self.blocks)} {self.task}".rstrip(),
            )
        self._place.leave()

    def inputs(self, index: int, takers: Mapping[str, Taker]) -> None:
        """Hand what modules of a block receive, by name below it, to their takers, group by group
        and on the device; text goes no further than to the last of them.
        """
        self._listen(index, takers, outputs=False)

    def outputs(self, index: int, takers: Mapping[str, Taker]) -> None:
        """As `inputs`, of what the modules give: the first tensor of several."""
        self._listen(index, takers, outputs=True)

    @torch.no_grad()
    def _listen(self, index: int, takers: Mapping[str, Taker], *, outputs: bool) -> None:
        heard: set[str] = set()

        def note(name: str, value: Any) -> None:
            takers[name](value[0] if isinstance(value, tuple) else value)
            heard.add(name)
            if len(heard) == len(takers):
                raise _Stop

        def of_inputs(name: str, _: Any, args: Any, kwargs: dict[str, Any]) -> None:
            note(name, args or kwargs["hidden_states"])

        def of_outputs(name: str, _: Any, args: Any, out: Any) -> None:
            note(name, out)

        # Hooks are taken away again, whatever happens meanwhile.
        with ExitStack() as hooks:
            for name in takers:
                module = self.blocks[index].get_submodule(name)
                hooks.enter_context(
                    module.register_forward_hook(partial(of_outputs, name))
                    if outputs
                    else module.register_forward_pre_hook(
                        partial(of_inputs, name), with_kwargs=True
                    )
                )
            for x_BLH in self.states:
                heard.clear()
                with suppress(_Stop):
                    self.call(index, x_BLH)

    @torch.no_grad()
    def final(self, taker: Taker) -> None:
        """Hand the states that have passed all blocks, after the final norm (ROWS, L, H), to the
        taker, group by group and on the device.
        """
        norm = final_norm(self.model, self.ids_BL[:1, :1])
        with self.lent(norm):
            for x_BLH in self.states:
                taker(norm(x_BLH.to(self.device)))

    def final_states(self) -> Tensor:
        """All of them (N, H), beside the model."""
        groups: list[Tensor] = []
        self.final(lambda h_BLH: groups.append(h_BLH.to(self._place.home)))
        return torch.cat(groups).flatten(0, 1)

    def lent(self, module: nn.Module) -> AbstractContextManager[None]:
        """For the block, a module that is none of the decoder's on the device."""
        return lent(module, self.device)

    def _embed(self, ids_BL: Tensor) -> None:
        self.model.get_decoder()(ids_BL, use_cache=False)

    @torch.no_grad()
    def _arguments(self) -> list[Arguments]:
        """What the model calls each block with besides its states: positions and masks of one row,
        which hold for any number of rows. ValueError where those of two rows are others.
        """
        others = self._others()
        one = self._noted(self.ids_BL[:1], others)
        two = self._noted(torch.cat([self.ids_BL[:1], self.ids_BL[-1:]]), others)
        if not _same(one, two):
            raise ValueError(
                f"blocks of {type(self.model).__name__} receive something of each row besides its"
                " states, which is not followed here; use stages that need no calibration"
            )
        return one

    def _others(self) -> tuple[Any, ...] | None:
        """What a block returns behind its states, by one token in the first; None where it returns
        no tuple.
        """
        others: tuple[Any, ...] | None = None

        def look(_: Any, args: Any, out: Any) -> None:
            nonlocal others
            others = out[1:] if isinstance(out, tuple) else None
            raise _Stop

        # Where the model is, for it is called from there.
        place = _Place(self._place.home, self._place.home)
        place.bring(self.blocks[0])
        with self.blocks[0].register_forward_hook(look), suppress(_Stop):
            self._embed(self.ids_BL[:1, :1])
        place.leave()
        return others

    def _noted(self, ids_BL: Tensor, others: tuple[Any, ...] | None) -> list[Arguments]:
        """Arguments of every block for such rows. Blocks only note what they are given: the model
        computes nothing else for it.
        """
        arguments: list[Arguments] = []

        def note(*args: Any, **given: Any) -> Any:
            x_BLH = args[0] if args else given.pop("hidden_states")
            arguments.append((args[1:], given))
            if len(arguments) == len(self.blocks):
                raise _Stop
            return x_BLH if others is None else (x_BLH, *others)

        with ExitStack() as kept:
            for block in self.blocks:
                kept.enter_context(_instead(block, note))
            with suppress(_Stop):
                self._embed(ids_BL)
        return arguments


@contextmanager
def lent(module: nn.Module, device: torch.device) -> Iterator[None]:
    """For the block, a module with all of its parameters on a device; then where it was."""
    home = next((p.device for p in module.parameters()), device)  # some norms have none
    moves = device != home
    try:
        if moves:
            module.to(device)
        yield
    finally:
        if moves:
            module.to(home)


@contextmanager
def _instead(block: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """For the block of code, another forward of a module."""
    present = vars(block).get("forward")
    block.forward = forward
    try:
        yield
    finally:
        del block.forward
        if present is not None:
            block.forward = present


def _same(one: Any, other: Any) -> bool:
    """Whether arguments of one row are those of each of several."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        rows = other.shape[:1] if one.shape[:1] == (1,) else one.shape[:1]
        return rows + one.shape[1:] == other.shape and bool((one == other).all())
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, Tensor) == isinstance(other, Tensor)


def _on(device: torch.device, value: Any) -> Any:
    """A keyword with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _on(device, part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_on(device, part) for part in value)
    return value
