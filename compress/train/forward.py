"""From token ids to final hidden states and the head's weight: the two things every loss and every closeness score needs.

Legend: R rows (sequences), L positions, N = R * L tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_head(config: dict[str, Any], where: object) -> None:
    """ValueError when logits are not plainly hidden @ head.T: scaled or soft-capped heads are not supported yet."""
    for key, plain in (("final_logit_softcapping", None), ("logits_scaling", 1.0), ("logit_scale", 1.0)):
        if config.get(key, plain) not in (None, plain):
            raise ValueError(f"{where}: config.json says {key}={config[key]}; supported are heads without scaling or soft-capping")


def hidden_and_head(model: Any, ids_RL: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden states after the final norm (N, H), head weight (V, H)) of a causal language model, peft-wrapped or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden_RLH = base.base_model(input_ids=ids_RL, use_cache=False).last_hidden_state
    return hidden_RLH.flatten(0, 1), base.get_output_embeddings().weight
