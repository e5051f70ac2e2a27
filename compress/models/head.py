"""From token ids to final hidden states and the head: the two things every loss and every
closeness score needs; and what each block of a decoder receives on the way.

Legend: R rows (sequences), L positions, N = R * L tokens, C tokens a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits: z = (h W^T + bias) * scale, then softcap *
    tanh(z / softcap) where the model caps them.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def finish(self, product_CV: Tensor) -> Tensor:
        """Logits (C, V) in fp32 (fp64 for fp64) of h W^T; a new tensor unless the product has that
        type and nothing is to be done.
        """
        logits_CV = product_CV if product_CV.dtype == torch.float64 else product_CV.float()
        if self.bias_V is not None:
            logits_CV = logits_CV + self.bias_V
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is None:
            return logits_CV
        return (logits_CV / self.softcap).tanh_().mul_(self.softcap)

    def back(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """d loss / d product from d loss / d logits."""
        if self.softcap is not None:
            grad_CV = grad_CV * (1 - (logits_CV / self.softcap) ** 2)
        return grad_CV if self.scale == 1.0 else grad_CV * self.scale

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Logits (C, V) of hidden states in the weight's type."""
        return self.finish(hidden_CH @ self.weight_VH.T)

    def first(self, rows: int) -> Head:
        """The head of the first `rows` ids: what is behind them is padding
        that no tokenizer gives.
        """
        if rows == len(self.weight_VH):
            return self
        return replace(
            self,
            weight_VH=self.weight_VH[:rows],
            bias_V=None if self.bias_V is None else self.bias_V[:rows],
        )

    def detach(self) -> Head:
        """The same head outside the autograd graph."""
        return replace(
            self,
            weight_VH=self.weight_VH.detach(),
            bias_V=None if self.bias_V is None else self.bias_V.detach(),
        )

    def to(self, dtype: torch.dtype) -> Head:
        """The same head with its weight in `dtype`."""
        return replace(self, weight_VH=self.weight_VH.to(dtype))

    def on(self, device: torch.device) -> Head:
        """The same head on a device."""
        return replace(
            self,
            weight_VH=self.weight_VH.to(device),
            bias_V=None if self.bias_V is None else self.bias_V.to(device),
        )


def scale_and_softcap(config: dict[str, Any]) -> dict[str, Any]:
    """What a transformers config, as a dict with its defaults, says of the logits besides the
    weight, as transformers 5's own families read it.

    Cohere and Falcon H1 multiply them, HyperCLOVA X too, under the key by which Granite divides
    them; MiniCPM 3 divides them by a ratio of widths; Gemma and NanoChat cap them. Keys of other
    families are not followed: `compress/models/loaded.py` compares each model with itself.
    """
    family = str(config.get("model_type", ""))
    scale = 1.0

    # What multiplies the logits.
    if family.startswith("cohere"):
        scale *= float(config.get("logit_scale") or 1.0)
    if family == "falcon_h1":
        scale *= float(config.get("lm_head_multiplier") or 1.0)

    # What divides them, and under the same key what multiplies HyperCLOVA X's.
    if family == "minicpm3":
        scale *= float(config["dim_model_base"]) / float(config["hidden_size"])
    elif scaling := config.get("logits_scaling"):
        scale *= float(scaling) if family == "hyperclovax" else 1.0 / float(scaling)
    return {"scale": scale, "softcap": config.get("final_logit_softcapping")}


def head_of(model: Any) -> Head:
    """The output head of a causal language model, peft-wrapped or not."""
    output = model.get_output_embeddings()
    return Head(
        output.weight, getattr(output, "bias", None), **scale_and_softcap(model.config.to_dict())
    )


def hidden_states(model: Any, inputs: Tensor, positions: Tensor | None = None) -> Tensor:
    """Hidden states after the final norm (N, H) of a causal language model, peft-wrapped or not,
    for ids (R, L).

    Where positions (R, L) start again a new document does: transformers then masks attention across
    documents.
    """
    hidden_RLH: Tensor = model.get_decoder()(
        input_ids=inputs, position_ids=positions, use_cache=False
    ).last_hidden_state
    return hidden_RLH.flatten(0, 1)
