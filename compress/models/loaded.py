"""What only a loaded model can tell: whether every tensor found its place, and our head is its own.

Losses and scores take the hidden states after the final norm and a head (`models/head.py`).
Families scale, cap or divide logits under keys of their own, and a key that is not followed gives
another distribution without a word. So each checkpoint's head is compared once with the logits of
transformers on eight ids.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.models.head import head_of, hidden_states
from compress.models.model_config import is_of_input, one_line

IDS = 8  # ids of the comparison
# The largest difference allowed, of the largest number compared.
FP32_SHARE, BF16_SHARE = 1e-3, 0.05


def check_complete(path: Path, info: dict[str, Any]) -> None:
    """ValueError naming tensors that transformers missed, found too much, or of another shape.

    `info` is its own account of a load, without what a family is known to tie or to ignore.
    """
    misshapen = [
        f"{name} is {tuple(got)}, needed is {tuple(needed)}"
        for name, got, needed in info.get("mismatched_keys", ())
    ]

    # transformers would fill, drop or leave these without a word.
    for problem, names in (
        ("the weights lack", info["missing_keys"]),
        ("the weights hold tensors that the model has no place for:", info["unexpected_keys"]),
        ("tensors have another shape than config.json says:", misshapen),
    ):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            shown = ", ".join(listed[:3]) + more
            raise ValueError(f"{path}: {problem} {shown}; copy or merge the checkpoint again")


@torch.inference_mode()
def check_forward(path: Path, model: Any) -> None:
    """ValueError unless hidden states and head give the model's own logits.

    Nor may a position see what comes after it, or be no number.
    """
    family = model.config.model_type

    # Tables that the config makes, of rotary positions for the most part.
    for name, buffer in model.named_buffers():
        broken = buffer.isnan() if "freq" not in name else ~buffer.isfinite()
        if buffer.is_floating_point() and broken.any():
            raise ValueError(
                f"{path / 'config.json'} makes a table of no finite numbers ({name}); mend its "
                "positions (rope_theta, rope_parameters)"
            )

    # The same ids through the whole model and through ours, and with another second half: as many,
    # since in bf16 a badly damaged model turns another kernel's rounding into a tenth of a state.
    longest = getattr(model.config, "max_position_embeddings", None) or IDS
    ids_1L = (torch.arange(1, 1 + min(IDS, longest)) * 7919 % model.config.vocab_size)[None].to(
        model.device
    )
    half = max(1, ids_1L.shape[1] // 2)
    shifted_1L = (ids_1L + 1) % model.config.vocab_size
    others_1L = torch.cat([ids_1L[:, :half], shifted_1L[:, half:]], dim=1)
    try:
        logits_LV: Tensor = model(input_ids=ids_1L, use_cache=False).logits[0].float()
        hidden_LH = hidden_states(model, ids_1L)
        before_LH = hidden_states(model, others_1L)[:half]
        computed_LV = head_of(model).logits(hidden_LH).float()
    except Exception as error:
        if not is_of_input(error):
            raise
        raise ValueError(
            f"{path}: a {family} model can't be run as a decoder with one head "
            f"({one_line(error)}); use another family"
        ) from error

    # In the order in which one failure would explain the next.
    share = FP32_SHARE if model.dtype == torch.float32 else BF16_SHARE
    if not logits_LV.isfinite().all():
        raise ValueError(
            f"{path}: the model's logits are not finite on ordinary ids; its weights are damaged, "
            "copy it again"
        )
    if not _near(computed_LV, logits_LV, share):
        raise ValueError(
            f"{path}: hidden states times head are not the logits of a {family} model, which "
            "scales, caps or shifts them in a way that is not "
            "followed here; models of this family can't be scored or distilled"
        )
    if not _near(before_LH, hidden_LH[:half], share):
        raise ValueError(
            f"{path}: positions of this {family} model see what comes after them; only "
            "decoder-only models can be compressed or scored"
        )


def _near(mine: Tensor, theirs: Tensor, share: float) -> bool:
    return mine.shape == theirs.shape and float((mine - theirs).abs().max()) <= share * max(
        float(theirs.abs().max()), 1e-6
    )
