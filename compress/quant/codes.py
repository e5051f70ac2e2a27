"""`quant.safetensors`: of every matrix its grid, codes and scales. Whatever ships is packed from
these and never rounded again.

A quantized checkpoint is a plain fp32 one whose matrices equal what these codes decode to, with
this file beside it. Tensors `NAME.codes` (R, C) and `NAME.scales`, and the metadata `grids`, a JSON
object that names each matrix's grid. What is no matrix of a linear layer, an embedding or experts
stays fp32 (`unquantized`).
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compress.models.checkpoint import check, read_config, save_model
from compress.quant.grids import GRIDS

FILE = "quant.safetensors"
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose kernels are no stacked matrices


class Quantized(NamedTuple):
    """One matrix on its grid: codes (R, C), those of stacked experts one behind the other, scales
    as `compress/quant/grids/grid.py` stores them.
    """

    grid: str
    codes: Tensor
    scales: Tensor

    def decode(self) -> Tensor:
        """fp32 (R, C): what every reader of a file with these codes computes."""
        return GRIDS[self.grid].decode(self.codes, self.scales)


class Matrix(NamedTuple):
    """A matrix that a grid can hold, and the module that it belongs to: the weight of a linear
    layer or an embedding, or the stacked matrices (E, R, C) of experts.
    """

    home: Any
    attribute: str = "weight"

    @property
    def weight(self) -> Any:
        """As the module has it."""
        return getattr(self.home, self.attribute)

    @property
    def rows(self) -> Tensor:
        """(R, C), of all experts one behind the other; the same memory."""
        return self.weight.detach().flatten(0, -2)


def quantizable(model: nn.Module) -> dict[str, Matrix]:
    """Each matrix that a grid can hold, by its state-dict name; a tied one once, under its first
    name. GPT-2's lie transposed, and so do their rows.
    """
    return _sorted(model)[0]


def unquantized(model: nn.Module) -> list[str]:
    """Names of what has two or more dimensions and stays as it is: kernels of convolutions,
    routers of experts, tables of state spaces.
    """
    return _sorted(model)[1]


def _sorted(model: nn.Module) -> tuple[dict[str, Matrix], list[str]]:
    matrices: dict[str, Matrix] = {}
    others: list[str] = []
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        home = model.get_submodule(path)

        # Vectors (norms, biases) stay too, and nobody has to be told.
        if kind == "weight" and isinstance(home, nn.Linear | nn.Embedding | Conv1D):
            matrices[name] = Matrix(home)
        elif parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(home, CONV):
            matrices[name] = Matrix(home, kind)
        elif parameter.dim() > 1:
            others.append(name)
    return matrices, others


def check_packable(model: nn.Module) -> None:
    """ValueError naming a tensor that files of Linear and Embedding matrices have no place for."""
    stacked = [
        name
        for name, matrix in quantizable(model).items()
        if not isinstance(matrix.home, nn.Linear | nn.Embedding)
    ]
    for name in stacked + unquantized(model):
        raise ValueError(
            f"{name} with shape {tuple(model.get_parameter(name).shape)} belongs to no Linear or"
            " Embedding: only those can be packed; export nothing, or use another architecture"
        )


def verified(name: str, w: Tensor, made: dict[str, Quantized]) -> Quantized:
    """The codes of a checkpoint's matrix `w` (R, C). ValueError when absent or not what `w` is."""
    if name not in made:
        raise ValueError(
            f"{FILE} has no codes for {name}; quantize all matrices, the embedding too"
        )
    q = made[name]
    if q.codes.shape != w.shape or not torch.equal(q.decode(), w):
        raise ValueError(
            f"{name}: model.safetensors differs from what {FILE} decodes to; quantize it again"
        )
    return q


def bake(weight: Tensor, made: Quantized) -> Quantized:
    """Overwrite a matrix by its decoded codes; returns them on the CPU."""
    with torch.no_grad():
        weight.copy_(made.decode().view(weight.shape))
    return Quantized(made.grid, made.codes.cpu(), made.scales.cpu())


def save_quantized(
    model: PreTrainedModel, out: Path, tokenizer_from: Path, made: dict[str, Quantized]
) -> None:
    """Write a baked model as a plain fp32 checkpoint, with `quant.safetensors` beside it. Matrices
    are decoded again from their codes: the model need not hold their values any more.
    """
    shapes = {name: model.get_parameter(name).shape for name in made}
    decoded = {name: partial(_values, q, shapes[name]) for name, q in made.items()}
    save_model(model, out, tokenizer_from, torch.float32, decoded)

    # The codes that the weights decode from, and the grid of each matrix.
    tensors = {}
    for name, q in made.items():
        tensors[f"{name}.codes"] = q.codes
        tensors[f"{name}.scales"] = q.scales
    grids = {name: q.grid for name, q in made.items()}
    save_file(tensors, out / FILE, metadata={"grids": json.dumps(grids, sort_keys=True)})


def _values(made: Quantized, shape: tuple[int, ...]) -> Tensor:
    return made.decode().view(shape)


def is_quantized(path: Path) -> bool:
    """Whether a checkpoint directory carries codes and scales."""
    return (path / FILE).is_file()


def check_unquantized(parent: Path, work: str = "start from") -> None:
    """ValueError for a checkpoint on a grid."""
    if is_quantized(parent):
        raise ValueError(
            f"{parent} is quantized already (it has {FILE}): {work} an unquantized checkpoint"
        )


def check_parent(stage: Any, parent: Path, work: str) -> None:
    """ValueError naming the directory when `stage` can't work on it: damaged, of a wrong shape, or
    on a grid, which any `work` would leave.
    """
    check(parent)
    check_unquantized(parent, work)
    try:
        stage.check_shape(read_config(parent))
    except ValueError as error:
        raise ValueError(f"{parent}: {error}") from error


def load_quantized(path: Path) -> dict[str, Quantized]:
    """Every matrix's grid, codes and scales. ValueError when the file is missing, damaged or names
    an unknown grid.
    """
    if not is_quantized(path):
        raise ValueError(f"{path} has no {FILE}: it is not quantized; run ptq or qat on it first")

    # The tensors, and the grids that the metadata names.
    try:
        with safe_open(path / FILE, framework="pt") as file:
            grids = json.loads((file.metadata() or {}).get("grids", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path / FILE} can't be read ({error}); make the checkpoint again"
        ) from error

    # Nothing more and nothing less than a known grid, codes and scales of each matrix.
    codes = {f"{name}.codes" for name in grids}
    scales = {f"{name}.scales" for name in grids}
    if codes | scales != set(tensors):
        raise ValueError(
            f"{path / FILE} does not hold a grid, codes and scales of each matrix; make the"
            " checkpoint again"
        )
    for name, grid in grids.items():
        if grid not in GRIDS:
            raise ValueError(
                f"{path / FILE}: {name} says grid {grid!r}: known grids are {', '.join(GRIDS)};"
                " make it again"
            )

    return {
        name: Quantized(grid, tensors[f"{name}.codes"], tensors[f"{name}.scales"])
        for name, grid in grids.items()
    }
