"""The weights of an ONNX directory, decoded by the formulas of its operators."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compress.formats.onnx_folder import MODEL, wheel

BLOCK = 32
FP32 = "/fp32"  # what a Cast adds to a tensor's name


def decode_onnx(folder: Path) -> dict[str, Tensor]:
    """HF state-dict name -> fp32 tensor: the file's own numbers by the formulas of its operators.
    ValueError when it can't be read.

    A tied matrix comes once, under the embedding's name; where embedding and head differ, under a
    second name that no checkpoint has.
    """
    onnx = wheel("onnx")
    try:
        graph = onnx.load(folder / MODEL).graph
    # Protobuf, checker and operating system raise unrelated classes.
    except Exception as error:
        raise ValueError(
            f"{folder} is no readable ONNX model ({error}); export it again"
        ) from error

    # Unquantized tensors have the checkpoint's names.
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    decoded = {
        name: torch.from_numpy(value.astype("float32"))
        for name, value in tensors.items()
        if name.endswith((".weight", ".bias"))
    }

    # Of the others a node says how its codes are read.
    for node in graph.node:
        codes = next((i for i in node.input if ".codes" in i), None)
        if codes is None or node.op_type == "Cast":
            continue
        scales = next(i for i in node.input if ".scales" in i)
        matrix = matrix_of(
            tensors[codes.removesuffix(FP32)],
            tensors[scales.removesuffix(FP32)],
            packed=node.op_type != "Mul",
        )
        name = codes.partition(".codes")[0]
        if name in decoded and not torch.equal(decoded[name], matrix):
            name = f"{name} (other)"
        decoded[name] = matrix
    return decoded


def matrix_of(codes: np.ndarray, scales: np.ndarray, packed: bool) -> Tensor:
    """(R, C) fp32 = codes * scales over blocks of BLOCK: int8 codes, or `packed`, two unsigned
    codes a byte with 8 as zero.
    """
    if packed:
        numbers = np.stack([codes & 15, codes >> 4], axis=-1).astype("float32") - 8
    else:
        numbers = codes.astype("float32")
    rows = len(scales)
    values = numbers.reshape(rows, -1, BLOCK) * scales.reshape(rows, -1, 1).astype("float32")
    return torch.from_numpy(values).flatten(1)
