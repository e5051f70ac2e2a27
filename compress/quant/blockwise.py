"""Quantizing block by block: each is calibrated with what the already quantized ones before it
produce, and kept when finished.

The text goes as `models/walk.py` says: what lies in memory besides the model are its hidden states
in front of the present block. A finished block is one file in the work folder: a killed run finds
it there and only sends the text through it again. Inside a block the groups go in order of use,
each behind the rounded ones before it (GPTQ's "true sequential" order). A tied embedding goes
first, measured as a head by the unquantized model's final states.

Legend: B sequences, L tokens of one, H hidden, C channels.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from compress.models.blocks import Row, blocks_prefix, row_of, row_of_block
from compress.models.checkpoint import best_device, head_dim, let_go
from compress.models.experts import mixture_of
from compress.models.walk import Walk, lent
from compress.quant.balance import Group, Inputs, awq_scales, fold, groups_of
from compress.quant.codes import Quantized, bake, quantizable
from compress.quant.experts import Stacks
from compress.quant.gptq import gptq
from compress.quant.grids import GRIDS
from compress.store import write_whole

ROUNDED_WEIGHTS = 1 << 24  # rounded at once where no column waits for another: 64 MB
# What to do where the calibration text does not come through a block.
ADVICE = "repair the parent, or use method=nearest, balance=none"


class Blockwise:
    """One model on its way to the grids of `layout` (grid by state-dict name); the options are
    those of `stages/ptq.py`.

    With `keep`, `restore` puts back the weights as they were before rounding, balanced, as far as
    the codes let them: from there training goes on. A matrix that is bf16 in the model
    (`checkpoint.load_stored`) can't hold its decoded values: it is let go of, and its codes are
    what there is of it.
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
        floor_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.layout = layout
        self.method = method
        self.search = search
        self.balance = balance
        self.damping = damping
        self.keep = keep
        self.floor_tokens = floor_tokens

        # What comes of it: matrices before rounding (with `keep`), codes, and the squared error of
        # all rounded matrices beside their squares.
        self.whole: dict[str, Tensor] = {}
        self.made: dict[str, Quantized] = {}
        self.lost = torch.zeros(2, dtype=torch.float64)

        # Of a mixture, by block, how many tokens reached each expert (E,).
        self.tokens: dict[int, Tensor] = {}

    def put(self, name: str, weight: Tensor, codes: Tensor, scales: Tensor) -> None:
        """One matrix is done: its codes are kept, the model goes on with their values."""
        if self.keep:
            self.whole[name] = weight.detach().cpu().clone()
        rows = _rows_at_once(weight)
        for part, *made in zip(
            weight.split(rows), codes.split(rows), scales.split(rows), strict=True
        ):
            before = part.detach().clone()
            bake(part, Quantized(self.layout[name], *made))
            self.lost += torch.stack(
                [w.square().sum(dtype=torch.float64) for w in (before - part, before)]
            ).cpu()
        self.made[name] = Quantized(self.layout[name], codes.cpu(), scales.cpu())

    def round(self, name: str, weight: Any, gram_CC: Tensor | None = None) -> None:
        """Round one matrix by the method, given its inputs' second moments where they are known."""
        self.put(name, weight, *self.codes_of(name, weight, gram_CC))

    def codes_of(self, name: str, weight: Any, gram_CC: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes and scales of one matrix (R, C) by the method."""
        grid = GRIDS[self.layout[name]]
        if gram_CC is not None and self.method == "gptq":
            search = self.search and grid.searches
            return gptq(weight, gram_CC, grid, self.damping, search, name)
        if self.search and grid.searches:
            scales = grid.search(weight, None if gram_CC is None else gram_CC.diagonal(), name)
            return grid.codes(weight, scales), scales
        parts = [grid.encode(part, name) for part in weight.split(_rows_at_once(weight))]
        codes, scales = map(torch.cat, zip(*parts, strict=True))
        return codes, scales

    @torch.no_grad()
    def restore(self) -> None:
        """Undo the rounding; norms and biases stay balanced. Where GPTQ took another code than the
        nearest, a weight comes back as far as that code reaches.
        """
        for name, before in self.whole.items():
            if self.method == "gptq":
                made = self.made[name]
                rows = before.flatten(0, -2).float()
                before = GRIDS[made.grid].within(rows, made.codes, made.scales).view(before.shape)
            self.model.get_parameter(name).copy_(before)

    @torch.no_grad()
    def plain(self) -> None:
        """Every matrix by itself, without data, on the best device of this machine."""
        for name, matrix in quantizable(self.model).items():
            with lent(matrix.home, best_device()):
                self.round(name, matrix.rows.float())
            self._let_go([name])

    @torch.no_grad()
    def calibrated(
        self, ids_BL: Tensor, work: Path, precision: str, log: Callable[[str], None]
    ) -> None:
        """Every matrix behind what is quantized before it, on ids (B, L) in the run's precision;
        finished pieces lie in `work`.
        """
        # Embeddings first; where they are the head too, by the unquantized model's final states.
        prefix = blocks_prefix(self.model)
        outside = [
            pair for pair in quantizable(self.model).items() if not pair[0].startswith(prefix)
        ]
        (first, embedding), *heads = [(name, matrix.home) for name, matrix in outside]
        walk = Walk(self.model, ids_BL, precision=precision, log=log, advice=ADVICE)
        self._kept(
            work / "embeddings.safetensors",
            embedding,
            partial(self._embedding, first, embedding, walk, tied=not heads),
        )

        # Block by block, each behind those that are rounded; kept ones say nothing of the time.
        walk.enter()
        walk.pace.steps = walk.pace.done + len(walk.blocks)
        walk.pace.restart()
        walk.task = "quantized"
        for index, block in enumerate(walk.blocks):
            walk.bring(index)
            names_before = set(self.made)
            fresh = self._kept(
                work / f"block-{index:04d}.safetensors",
                block,
                partial(self._block, index, walk),
            )
            walk.advance(index)
            self._let_go(self.made.keys() - names_before)
            if not fresh:
                walk.pace.restart()

        # A head of its own, by what now reaches it.
        for name, head in heads:
            self._head(name, head, walk)

    def _let_go(self, names: Iterable[str]) -> None:
        """Let go of rounded matrices whose values their type can't hold."""
        for name in names:
            parameter = self.model.get_parameter(name)
            if parameter.dtype != torch.float32:
                let_go(parameter)

    def _embedding(self, name: str, embedding: Any, walk: Walk, *, tied: bool) -> None:
        """Round the embedding, a tied one as the head that it also is."""
        if not tied:
            with walk.lent(embedding):
                self.round(name, embedding.weight)
            return
        walk.pace.steps = 2 * len(walk.blocks)
        walk.task = "passed on the way to the head"
        for index in range(len(walk.blocks)):
            walk.advance(index)
        self._head(name, embedding, walk)

    def _head(self, name: str, head: Any, walk: Walk) -> None:
        """Round what reads the final states, by their second moments."""
        received = Inputs()
        walk.final(received.add)
        with walk.lent(head):
            self.round(name, head.weight, received.gram_CC)

    def _block(self, index: int, walk: Walk) -> None:
        """Balance and round one block."""
        row = row_of(self.model)
        assert row is not None, "a stage asks for a row before it comes here"
        prefix = f"{blocks_prefix(self.model)}{index}."
        block = walk.blocks[index]
        row = row_of_block(row, block)
        groups = groups_of(row, block, head_dim(self.model.config))
        held = [self._held(prefix, group) for group in groups]

        # All groups are balanced, each measured on the weights as they are; one of which a matrix
        # lies on its grid would leave it.
        if self.balance != "none":
            foldable = [
                group
                for group, stays in zip(groups, held, strict=True)
                if group.maker is not None and not any(stays)
            ]
            for group, received in zip(foldable, _received(walk, index, foldable), strict=True):
                name = f"{prefix}{next(iter(group.readers))}.weight"
                fold(group, awq_scales(group, received, GRIDS[self.layout[name]], name))

        # Then rounded one after the other, each behind those before it; where all lie on their
        # grids no text is needed.
        for group, stays in zip(groups, held, strict=True):
            gram_CC = None
            if (self.method == "gptq" or self.search) and not all(stays):
                gram_CC = _received(walk, index, [group])[0].gram_CC
            for name, reader in group.readers.items():
                self.round(f"{prefix}{name}.weight", reader.weight, gram_CC)

        mixture = mixture_of(row, block)
        if mixture is not None:
            stacks = Stacks(walk, index, row, mixture, self.floor_tokens)
            self.tokens[index] = stacks.tokens_E
            self._experts(prefix, row, block, stacks)

    def _held(self, prefix: str, group: Group) -> list[bool]:
        """Of each matrix of a group whether it lies on its grid already, as those of a 4-bit
        teacher may.
        """
        names = {f"{prefix}{name}.weight": reader for name, reader in group.readers.items()}
        return [
            GRIDS[self.layout[name]].holds(reader.weight, name) for name, reader in names.items()
        ]

    def _experts(self, prefix: str, row: Row, block: Any, stacks: Stacks) -> None:
        """Balance and round the experts of one block: gates and ups, then what they send down."""
        mixture = stacks.mixture
        makers, downs = f"{prefix}{row.gate_up[0]}", f"{prefix}{row.down}"
        if self.balance != "none":
            norm = block.get_submodule(row.ffn_norm) if row.ffn_norm else None
            grids = GRIDS[self.layout[makers]], GRIDS[self.layout[downs]]
            stacks.balance(norm, grids, (makers, downs))

        # By the moments of each expert, where anything asks for them.
        weighed = self.method == "gptq" or self.search
        for name, weight, inner in ((makers, mixture.makers, False), (downs, mixture.downs, True)):
            if not weighed:
                codes, scales = self.codes_of(name, weight.detach().flatten(0, -2), None)
            else:
                grams_ECC = stacks.inputs(inner=inner).gram_ECC
                pairs = [
                    self.codes_of(name, w, gram)
                    for w, gram in zip(weight.detach(), grams_ECC, strict=True)
                ]
                codes, scales = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            self.put(name, weight, codes, scales)

    def _kept(self, file: Path, home: nn.Module, make: Callable[[], None]) -> bool:
        """Make a piece and keep it with what `home` has besides codes (norms, biases, a router), or
        find it in `file`: whether it was made now.
        """
        matrices = {id(matrix.weight) for matrix in quantizable(home).values()}
        vectors = {
            f"vector:{name}": parameter
            for name, parameter in home.named_parameters()
            if id(parameter) not in matrices
        }
        if file.is_file():
            self._take_back(load_file(file), vectors)
            return False

        # What the piece itself adds is what its file has to hold.
        names_before = set(self.made)
        blocks_before = set(self.tokens)
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
        for index in self.tokens.keys() - blocks_before:
            tensors[f"tokens:{index}"] = self.tokens[index]
        tensors["lost"] = self.lost
        write_whole(file, save(tensors))

        self.lost = lost_before + self.lost
        return True

    def _take_back(self, kept: dict[str, Tensor], vectors: dict[str, nn.Parameter]) -> None:
        """Put a kept piece into the model: its vectors, and its matrices' codes."""
        self.lost = self.lost + kept.pop("lost")
        for key, parameter in vectors.items():
            parameter.copy_(kept.pop(key))
        for key in [key for key in kept if key.startswith("tokens:")]:
            self.tokens[int(key.removeprefix("tokens:"))] = kept.pop(key)

        # All that remains are matrices, each in two or three parts.
        for name in sorted({key.rpartition(":")[2] for key in kept}):
            codes = Quantized(self.layout[name], kept[f"codes:{name}"], kept[f"scales:{name}"])
            if self.keep:
                self.whole[name] = kept[f"whole:{name}"]
            self.made[name] = bake(self.model.get_parameter(name), codes)


def _rows_at_once(weight: Tensor) -> int:
    return max(1, ROUNDED_WEIGHTS // weight.shape[1])


def _received(walk: Walk, index: int, groups: list[Group]) -> list[Inputs]:
    """What each group of a block receives. Readers of a group receive the same: one of them is
    listened to.
    """
    if not groups:
        return []
    received = [Inputs() for _ in groups]
    readers = [next(iter(group.readers)) for group in groups]
    takers = [inputs.add for inputs in received]
    walk.inputs(index, dict(zip(readers, takers, strict=True)))
    return received
