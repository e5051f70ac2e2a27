"""Quantizing block by block: each is calibrated with what the already quantized ones before it
produce, and kept when finished.

What lies in memory besides the model are the hidden states of the calibration text in front of the
present block. A finished block is one file in the work folder: a killed run finds it there and
only sends the text through it again. Inside a block the groups go in order of use, each behind the
rounded ones before it (GPTQ's "true sequential" order). A tied embedding goes first, measured as a
head by the unquantized model's final states.

Legend: B sequences, L tokens of one, H hidden, C channels.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.models.head import block_inputs
from compress.quant.balance import Group, Inputs, awq_scales, fold, groups_of
from compress.quant.codes import Quantized, bake, quantizable
from compress.quant.gptq import gptq
from compress.quant.grids import GRIDS
from compress.store import write_whole

ROWS = 4  # sequences sent through a block at a time


class _Stop(Exception):
    """The text has reached what was asked for."""


class Stream:
    """The calibration text in front of a block: `states`, tensors (ROWS, L, H), and the keywords
    each block is called with.
    """

    def __init__(self, model: Any, ids_BL: Tensor, precision: str) -> None:
        self.model = model
        self.ids_BL = ids_BL
        self.precision = precision
        self.blocks = model.model.layers
        self.keywords = block_inputs(model, ids_BL[:1])[1]
        self.enter()

    def enter(self) -> None:
        """Go back to the first block, through the embeddings as they now are."""
        self.states: list[Tensor] = []

        def note(_: Any, args: tuple[Tensor]) -> None:
            self.states.append(args[0])
            raise _Stop

        with self.blocks[0].register_forward_pre_hook(note):
            for rows in self.ids_BL.split(ROWS):
                with suppress(_Stop):
                    self.model.model(rows, use_cache=False)

    def cast(self) -> torch.autocast:
        """Products in bf16 unless the precision is fp32; the stream itself stays fp32."""
        return torch.autocast(
            self.ids_BL.device.type, torch.bfloat16, enabled=self.precision != "fp32"
        )

    def call(self, index: int, x_BLH: Tensor) -> Tensor:
        """What a block makes of its input."""
        with self.cast():
            return self.blocks[index](x_BLH, **self.keywords[index])

    def advance(self, index: int) -> None:
        """Go through a block. ValueError naming it when its output is not finite."""
        for at, x_BLH in enumerate(self.states):
            self.states[at] = self.call(index, x_BLH)
            if not torch.isfinite(self.states[at]).all():
                where = f"the output of block {index} on the calibration text holds NaN or infinity"
                raise ValueError(f"{where}: repair the parent, or use method=nearest, balance=none")

    def inputs(self, index: int, groups: list[Group]) -> list[Inputs]:
        """What each group of a block receives; text goes no further than to the last."""
        received = [Inputs() for _ in groups]

        def note(i: int, _: Any, args: tuple[Tensor]) -> None:
            received[i].add(args[0])
            if i == len(groups) - 1:
                raise _Stop

        # Readers of a group receive the same: one of them is listened to.
        with ExitStack() as hooks:
            for i, group in enumerate(groups):
                hooks.enter_context(
                    next(iter(group.readers.values())).register_forward_pre_hook(partial(note, i))
                )
            for x_BLH in self.states:
                with suppress(_Stop):
                    self.call(index, x_BLH)
        return received

    def final_gram(self) -> Tensor:
        """(H, H): the sum of h h^T over final hidden states, when all blocks are behind."""
        total = Inputs()
        for x_BLH in self.states:
            total.add(self.model.model.norm(x_BLH))
        return total.gram_CC


class Blockwise:
    """One model on its way to the grids of `layout` (grid by state-dict name); the options are
    those of `stages/ptq.py`.

    With `keep`, `restore` puts back the weights as they were before rounding, balanced: from there
    training goes on.
    """

    def __init__(
        self,
        model: Any,
        layout: dict[str, str],
        *,
        method: str = "nearest",
        search: bool = False,
        balance: str = "none",
        damping: float = 0.01,
        keep: bool = False,
    ) -> None:
        self.model = model
        self.layout = layout
        self.method = method
        self.search = search
        self.balance = balance
        self.damping = damping
        self.keep = keep

        # What comes of it: matrices before rounding (with `keep`), codes, and the squared error of
        # all rounded matrices beside their squares.
        self.whole: dict[str, Tensor] = {}
        self.made: dict[str, Quantized] = {}
        self.lost = torch.zeros(2, dtype=torch.float64)

    def put(self, name: str, weight: Tensor, codes: Tensor, scales: Tensor) -> None:
        """One matrix is done: its codes are kept, the model goes on with their values."""
        before = weight.detach().clone()
        self.made[name] = bake(weight, Quantized(self.layout[name], codes, scales))
        if self.keep:
            self.whole[name] = before.cpu()
        self.lost += torch.stack(
            [w.square().sum(dtype=torch.float64) for w in (before - weight, before)]
        ).cpu()

    def round(self, name: str, weight: Any, gram_CC: Tensor | None = None) -> None:
        """Round one matrix by the method, given its inputs' second moments where they are known."""
        grid = GRIDS[self.layout[name]]
        if gram_CC is not None and self.method == "gptq":
            search = self.search and grid.searches
            codes, scales = gptq(weight, gram_CC, grid, self.damping, search, name)
        elif self.search and grid.searches:
            scales = grid.search(weight, None if gram_CC is None else gram_CC.diagonal(), name)
            codes = grid.codes(weight, scales)
        else:
            codes, scales = grid.encode(weight, name)
        self.put(name, weight, codes, scales)

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the rounding; norms and biases stay balanced."""
        for name, before in self.whole.items():
            self.model.get_parameter(name).copy_(before)

    @torch.no_grad()
    def plain(self) -> None:
        """Every matrix by itself, without data."""
        for name, home in quantizable(self.model).items():
            self.round(name, home.weight)

    @torch.no_grad()
    def calibrated(
        self, ids_BL: Tensor, work: Path, precision: str, log: Callable[[str], None]
    ) -> None:
        """Every matrix behind what is quantized before it, on ids (B, L) in the run's precision;
        finished pieces lie in `work`.
        """
        # Embeddings first; where they are the head too, by the unquantized model's final states.
        outside = [
            pair
            for pair in quantizable(self.model).items()
            if not pair[0].startswith("model.layers.")
        ]
        (first, embedding), *heads = outside
        stream = Stream(self.model, ids_BL, precision)
        started = time.monotonic()
        self._kept(
            work / "embeddings.safetensors",
            embedding,
            partial(self._embedding, first, embedding, stream, tied=not heads),
        )

        # Block by block, each behind those that are rounded.
        fresh = 0
        stream.enter()
        for index, block in enumerate(stream.blocks):
            fresh += self._kept(
                work / f"block-{index:04d}.safetensors",
                block,
                partial(self._block, index, stream),
            )
            stream.advance(index)
            seconds = time.monotonic() - started
            seconds_left = seconds / max(1, fresh) * (len(stream.blocks) - index - 1)
            log(f"block {index + 1}/{len(stream.blocks)} quantized  {seconds_left:,.0f} s left")

        # A head of its own, by what now reaches it.
        for name, head in heads:
            self.round(name, head.weight, stream.final_gram())

    def _embedding(self, name: str, embedding: Any, stream: Stream, *, tied: bool) -> None:
        """Round the embedding, a tied one as the head that it also is."""
        for index in range(len(stream.blocks) if tied else 0):
            stream.advance(index)
        self.round(name, embedding.weight, stream.final_gram() if tied else None)

    def _block(self, index: int, stream: Stream) -> None:
        """Balance and round one block."""
        prefix = f"model.layers.{index}."
        groups = groups_of(stream.blocks[index])

        # All groups are balanced, each measured on the weights as they are.
        if self.balance != "none":
            for group, inputs in zip(groups, stream.inputs(index, groups), strict=True):
                name = f"{prefix}{next(iter(group.readers))}.weight"
                fold(group, awq_scales(group, inputs, GRIDS[self.layout[name]], name))

        # Then rounded one after the other, each behind those before it.
        for group in groups:
            gram_CC = None
            if self.method == "gptq" or self.search:
                gram_CC = stream.inputs(index, [group])[0].gram_CC
            for name, reader in group.readers.items():
                self.round(f"{prefix}{name}.weight", reader.weight, gram_CC)

    def _kept(self, file: Path, home: nn.Module, make: Callable[[], None]) -> bool:
        """Make a piece and keep it with `home`'s vectors (norms, biases), or find it in `file`:
        whether it was made now.
        """
        vectors = {
            f"vector:{name}": parameter
            for name, parameter in home.named_parameters()
            if parameter.dim() == 1
        }
        if file.is_file():
            self._take_back(load_file(file), vectors)
            return False

        # What the piece itself adds is what its file has to hold.
        names_before = set(self.made)
        lost_before = self.lost
        self.lost = torch.zeros_like(lost_before)
        make()
        tensors = {}
        for name in self.made.keys() - names_before:
            tensors[f"codes:{name}"] = self.made[name].codes
            tensors[f"scales:{name}"] = self.made[name].scales
        for name in self.whole.keys() - names_before:
            tensors[f"whole:{name}"] = self.whole[name]
        for key, parameter in vectors.items():
            tensors[key] = parameter.detach()
        tensors["lost"] = self.lost
        write_whole(file, save(tensors))

        self.lost = lost_before + self.lost
        return True

    def _take_back(self, kept: dict[str, Tensor], vectors: dict[str, nn.Parameter]) -> None:
        """Put a kept piece into the model: its vectors, and its matrices' codes."""
        self.lost = self.lost + kept.pop("lost")
        for key, parameter in vectors.items():
            parameter.copy_(kept.pop(key))

        # All that remains are matrices, each in two or three parts.
        for name in sorted({key.rpartition(":")[2] for key in kept}):
            codes = Quantized(self.layout[name], kept[f"codes:{name}"], kept[f"scales:{name}"])
            if self.keep:
                self.whole[name] = kept[f"whole:{name}"]
            self.made[name] = bake(self.model.get_parameter(name), codes)
