"""Products of an ONNX directory that round their activations to 8 bits, and those that must not.

At accuracy level 4, MatMulNBits rounds each block of 32 activations to int8 before it multiplies,
as llama.cpp does, where at level 1 it computes in fp32: a token takes less than half the time. On
some models that turns first choices (onnxruntime, issue 29849), so it is measured: on rows of
training text, the model with all products rounded is compared with itself in fp32. Where its KL is
above a limit, the products whose outputs rounding changes most stay in fp32, as few as bring it
below.

    products_fp32_count         products that stay in fp32
    rounding_kl_nats            KL(fp32 || rounded) on those rows, mean over tokens
    rounding_turned_share       of first choices that are more than TOP1_GAP nats ahead, those that
                                rounding turns; told only: in 2,000 tokens it is a handful

Shapes: L length, K inputs, N outputs, V vocabulary.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.formats.onnx_folder import MODEL, wheel
from compress.formats.onnx_weights import BLOCK, matrix_of
from compress.formats.onnx_weights import FP32 as CAST
from compress.formats.onnxruntime import fetch, open_session
from compress.threads import available_threads

ROWS, ROW_TOKENS = 8, 256  # of training text, at most
# Below what parity allows on held-out text (5e-3), since these rows are others.
KL_LIMIT_NATS = 3e-3
TOP1_GAP = 0.2  # nats
ROUNDED, FP32 = 4, 1  # accuracy levels of MatMulNBits


def round_activations(
    folder: Path,
    rows: Tensor,
    kl_limit_nats: float = KL_LIMIT_NATS,
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, float]:
    """Sets the accuracy level of every product of a directory, by `rows` (R, L), token ids of
    training text. Gives the module's figures; each try is told, with the seconds left.
    """
    graph = _Graph(folder, rows[:ROWS, :ROW_TOKENS].tolist())
    start = time.monotonic()
    figures = graph.with_fp32([])
    seconds = time.monotonic() - start
    if figures["rounding_kl_nats"] <= kl_limit_nats:
        return figures

    # By bisection, the fewest of those with the largest errors that do: none is too few, all are
    # enough.
    order = graph.products_by_error()
    too_few, enough = 0, len(order)
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        nats = graph.with_fp32(order[:count])["rounding_kl_nats"]
        if nats <= kl_limit_nats:
            enough = count
        else:
            too_few = count
        seconds_left = seconds * (1 + log2(enough - too_few))
        log(
            f"KL of activations in 8 bits {nats:.4f} with {count} of {len(order)} products in fp32,"
            f" {seconds_left:.0f} s left"
        )
    return graph.with_fp32(order[:enough])


class _Graph:
    """A directory's graph, run on rows of ids as often as levels are tried."""

    def __init__(self, folder: Path, rows: Sequence[Sequence[int]]) -> None:
        self.folder, self.rows = folder, rows
        self.model = wheel("onnx").load(folder / MODEL, load_external_data=False)
        self.products = {n.name: n for n in self.model.graph.node if n.op_type == "MatMulNBits"}
        self._write(list(self.products))
        self.full_LV = list(_logits_of(folder, rows))

    def _write(self, kept: Sequence[str]) -> None:
        """The graph with the products `kept` in fp32."""
        for name, node in self.products.items():
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = FP32 if name in kept else ROUNDED
        wheel("onnx").save(self.model, self.folder / MODEL)

    def with_fp32(self, kept: Sequence[str]) -> dict[str, float]:
        """Writes the graph with the products `kept` in fp32; gives its figures."""
        self._write(kept)
        figures = _compared(self.full_LV, _logits_of(self.folder, self.rows))
        return {"products_fp32_count": float(len(kept))} | figures

    def products_by_error(self) -> list[str]:
        """Names of products, the one first whose output rounding its own input changes most:
        |(x - q(x)) W^T|^2 / |x W^T|^2 over the first row.
        """
        self._write(list(self.products))
        probe = type(self.model)()
        probe.CopyFrom(self.model)
        helper, onnx = wheel("onnx").helper, wheel("onnx")
        inputs = sorted({node.input[0] for node in self.products.values()})
        there = {output.name for output in probe.graph.output}
        probe.graph.output.extend(
            helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            for name in inputs
            if name not in there
        )
        onnx.save(probe, self.folder / MODEL)
        arrays = fetch(open_session(self.folder, available_threads()), self.rows[0], inputs)
        x_of = dict(zip(inputs, arrays, strict=True))

        # One matrix at a time is decoded.
        errors = {}
        tensors = {tensor.name: tensor for tensor in self.model.graph.initializer}
        for name, node in self.products.items():
            x_LK = x_of[node.input[0]].reshape(-1, x_of[node.input[0]].shape[-1])
            codes, scales = (self._value(tensors, node.input[i]) for i in (1, 2))
            w_NK = matrix_of(codes, scales, packed=True).numpy()
            change = ((x_LK - rounded(x_LK)) @ w_NK.T) ** 2
            errors[name] = float(change.sum() / max(float(((x_LK @ w_NK.T) ** 2).sum()), 1e-30))
        return sorted(errors, key=lambda name: -errors[name])

    def _value(self, tensors: Mapping[str, Any], name: str) -> np.ndarray:
        tensor = tensors[name.removesuffix(CAST)]
        value: np.ndarray = wheel("onnx").numpy_helper.to_array(tensor, str(self.folder))
        return value


def compared(plain: Path, other: Path, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """rounding_kl_nats and rounding_turned_share of a directory beside the one in fp32."""
    full_LV = _logits_of(plain, rows)
    return _compared(full_LV, _logits_of(other, rows))


def _compared(full_LV: Iterable[Tensor], others_LV: Iterable[Tensor]) -> dict[str, float]:
    """The same of logits, row by row, as vocabularies are large."""
    kl_sum = turned = sure = tokens = 0.0
    for full, other in zip(full_LV, others_LV, strict=True):
        full, other = full.double().log_softmax(-1), other.double().log_softmax(-1)
        kl_sum += float((full.exp() * (full - other)).sum())
        first, second = full.topk(2, dim=-1).values.unbind(-1)
        is_sure = first - second > TOP1_GAP
        turned += int((is_sure & (full.argmax(-1) != other.argmax(-1))).sum())
        sure += int(is_sure.sum())
        tokens += len(full)
    return {"rounding_kl_nats": kl_sum / tokens, "rounding_turned_share": turned / max(sure, 1.0)}


def _logits_of(folder: Path, rows: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """(L, V) of each row."""
    session = open_session(folder, available_threads())
    for row in rows:
        yield torch.from_numpy(fetch(session, row, ["logits"])[0][0])


def rounded(x_LK: np.ndarray) -> np.ndarray:
    """Activations as level 4 sees them: int8 by the largest of each block of 32."""
    blocks = x_LK.reshape(len(x_LK), -1, BLOCK)
    step = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.round(blocks / np.where(step == 0, 1, step)) * step).reshape(x_LK.shape)
