"""From token ids to final hidden states and the head: the two things every loss and every
closeness score needs.

Legend: R rows (sequences), L positions, N = R * L tokens, C tokens a chunk, H hidden, V vocabulary,
S a smaller one, D ids that it lacks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fold:
    """A vocabulary V seen in a smaller one, S, whose tokens it has too: `kept_S`, the larger's id
    of each of the smaller's; `dropped_D`, its other ids, and `pieces_D`, the smaller's ids with
    which their texts begin.
    """

    kept_S: Tensor
    dropped_D: Tensor
    pieces_D: Tensor

    def on(self, device: torch.device) -> Fold:
        """The same fold on a device."""
        return Fold(self.kept_S.to(device), self.dropped_D.to(device), self.pieces_D.to(device))

    def logits(self, logits_CV: Tensor) -> Tensor:
        """Logits (C, S) of the first piece of what comes next: softmax gives each of the smaller's
        ids its own probability and those of the dropped ids that begin with it.

        A probability below the smallest normal number of the type counts as that.
        """
        top_C1 = logits_CV.amax(-1, keepdim=True)
        mass_CV = (logits_CV - top_C1).exp_()
        mass_CS = mass_CV.index_select(1, self.kept_S)
        mass_CS.index_add_(1, self.pieces_D, mass_CV.index_select(1, self.dropped_D))
        return mass_CS.clamp_min_(torch.finfo(mass_CS.dtype).tiny).log_().add_(top_C1)


@dataclass(frozen=True)
class Head:
    """What turns final hidden states into logits: z = (h W^T + bias) * scale, then softcap *
    tanh(z / softcap) where the model caps them. With `fold` they are those of a smaller
    vocabulary.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    fold: Fold | None = None

    @property
    def ids_count(self) -> int:
        """Ids that it gives logits of."""
        return len(self.weight_VH if self.fold is None else self.fold.kept_S)

    def finish(self, product_CV: Tensor) -> Tensor:
        """Logits (C, V), or (C, S) behind a fold, in fp32 (fp64 for fp64) of h W^T; a new tensor
        unless the product has that type and nothing is to be done.
        """
        logits_CV = product_CV if product_CV.dtype == torch.float64 else product_CV.float()
        if self.bias_V is not None:
            logits_CV = logits_CV + self.bias_V
        if self.scale != 1.0:
            logits_CV = logits_CV * self.scale
        if self.softcap is not None:
            logits_CV = (logits_CV / self.softcap).tanh_().mul_(self.softcap)
        return logits_CV if self.fold is None else self.fold.logits(logits_CV)

    def back(self, grad_CV: Tensor, logits_CV: Tensor) -> Tensor:
        """d loss / d product from d loss / d logits; nobody learns through a fold."""
        assert self.fold is None, "a folded head is a teacher's"
        if self.softcap is not None:
            grad_CV = grad_CV * (1 - (logits_CV / self.softcap) ** 2)
        return grad_CV if self.scale == 1.0 else grad_CV * self.scale

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """Logits (C, V) of hidden states in the weight's type."""
        return self.finish(hidden_CH @ self.weight_VH.T)

    def first(self, rows: int) -> Head:
        """The head of the first `rows` ids: what is behind them is padding
        that no tokenizer gives. A folded one has no padding.
        """
        if rows == self.ids_count:
            return self
        assert self.fold is None, f"{rows} of {self.ids_count} ids of a folded head"
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
            fold=None if self.fold is None else self.fold.on(device),
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

    # RecurrentGemma has Gemma's cap under another key.
    softcap = config.get("final_logit_softcapping")
    if family == "recurrent_gemma":
        softcap = config.get("logits_soft_cap")
    return {"scale": scale, "softcap": softcap}


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
