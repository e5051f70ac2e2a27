"""The head of a GGUF as numpy reads it: what turns llama.cpp's final hidden states into logits.

    z = (h W^T + bias) * scale, then softcap * tanh(z / softcap) where the file caps them

Legend: C tokens of a chunk, H hidden, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compress.models.gguf_header import read_fields

# Architectures whose logit_scale llama.cpp multiplies logits by, and those where it divides them.
SCALES_LOGITS = ("command-r", "cohere2")
DIVIDES_LOGITS = ("granite", "granitemoe")
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class GgufHead:
    """The fp32 head, as decoded from the file."""

    weight_VH: Floats
    bias_V: Floats | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_CH: Floats) -> Floats:
        """Logits (C, V) in fp32."""
        logits_CV: Floats = hidden_CH @ self.weight_VH.T
        if self.bias_V is not None:
            logits_CV += self.bias_V
        if self.scale != 1.0:
            logits_CV *= np.float32(self.scale)
        if self.softcap is not None:
            np.tanh(logits_CV / np.float32(self.softcap), out=logits_CV)
            logits_CV *= np.float32(self.softcap)
        return logits_CV


def gguf_head(gguf: Path) -> GgufHead:
    """`output.weight`, or the tied embedding, with its bias and what scales or caps the logits.
    ValueError for a scale whose meaning is not known.
    """
    from gguf.quants import dequantize

    fields, listed = read_fields(gguf)
    tensors = {tensor.name: tensor for tensor in listed}

    def decoded(name: str) -> Floats:
        tensor = tensors[name]
        return dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=True)

    # Tied embeddings are in a file once.
    names = [name for name in ("output.weight", "token_embd.weight") if name in tensors]
    if not names:
        raise ValueError(f"{gguf}: neither output.weight nor token_embd.weight is in it")

    # What is done with the logits behind it.
    family = fields["general.architecture"]
    scale = float(fields.get(f"{family}.logit_scale") or 1.0)
    if scale != 1.0 and family not in (*SCALES_LOGITS, *DIVIDES_LOGITS):
        raise ValueError(
            f"{gguf}: {family}.logit_scale can't be scored through llama.cpp yet; score the"
            " checkpoint it was made of"
        )
    return GgufHead(
        decoded(names[0]),
        decoded("output.bias") if "output.bias" in tensors else None,
        1.0 / scale if family in DIVIDES_LOGITS else scale,
        fields.get(f"{family}.final_logit_softcapping"),
    )
