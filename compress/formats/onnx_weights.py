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
    except Exception as error:  # protobuf, checker and operating system raise unrelated classes
        raise ValueError(
            f"{folder} is no readable ONNX model ({error}); export it again"
        ) from error
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    decoded = {
        name: torch.from_numpy(value.astype("float32"))
        for name, value in held.items()
        if name.endswith((".weight", ".bias"))
    }
    for node in graph.node:
        codes = next((i for i in node.input if ".codes" in i), None)
        if codes is None or node.op_type == "Cast":
            continue
        q, d = (
            held[i.removesuffix(FP32)]
            for i in (codes, next(i for i in node.input if ".scales" in i))
        )
        q = (
            q.astype("float32")
            if node.op_type == "Mul"
            else np.stack([q & 15, q >> 4], axis=-1).astype("float32") - 8
        )
        value = torch.from_numpy(
            q.reshape(len(d), -1, BLOCK) * d.reshape(len(d), -1, 1).astype("float32")
        ).flatten(1)
        name = codes.partition(".codes")[0]
        decoded[
            name if name not in decoded or torch.equal(decoded[name], value) else f"{name} (other)"
        ] = value
    return decoded
