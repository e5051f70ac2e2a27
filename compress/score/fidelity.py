"""How close a student is to a reference, on held-out text: KL, top-1 agreement, bits per byte.

    kl(ref || student) = mean over tokens of sum_v p_v (log p_v - log q_v), in nats
    top1_agree         = share of positions where both put the same token first
    bits_per_byte      = -sum log2 q(label) / bytes of the labels' text     (comparable across tokenizers)

A model is kept as its final hidden states and its head weight, from which all logits follow: 2.3 kB a token at H = 576 instead of
197 kB of logits, and the same two tensors come out of transformers and of llama.cpp. Everything is fp32, the reference's too.

Legend: N tokens, H hidden, V vocabulary, C tokens a chunk.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from compress.checkpoint import best_device, load_model, read_config, weight_files
from compress.train.data import Packed
from compress.train.forward import Head, head_of, hidden_states, scale_and_softcap

CHUNK = 256


@dataclass(frozen=True)
class States:
    """Final hidden states (N, H) fp32 over the held-out tokens, and the fp32 head."""

    hidden_NH: Tensor
    head: Head


@torch.inference_mode()
def checkpoint_hidden(model_dir: Path, data: Packed, sequences: int) -> Tensor:
    """Final hidden states (N, H) in fp32 of the first `sequences` held-out rows, computed one row at a time."""
    model: Any = load_model(model_dir)
    model.to(best_device())
    return torch.cat([hidden_states(model, row[None, :-1].long().to(model.device)).cpu() for row in data.ids[:sequences]])


def checkpoint_head(model_dir: Path) -> Head:
    """The fp32 head of a checkpoint, read without building the model unless its weights are packed."""
    if "quantization_config" in read_config(model_dir):
        return head_of(load_model(model_dir)).detach()
    found: dict[str, Tensor] = {}
    for file in weight_files(model_dir):
        with safe_open(file, "pt") as tensors:
            wanted = {"lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"} & set(tensors.keys())
            found |= {name: tensors.get_tensor(name).float() for name in wanted}
    weight_VH = found.get("lm_head.weight", found.get("model.embed_tokens.weight"))
    if weight_VH is None:
        raise ValueError(f"{model_dir} has neither lm_head.weight nor model.embed_tokens.weight; only decoder-only models can be scored")
    return Head(weight_VH, found.get("lm_head.bias"), **scale_and_softcap(read_config(model_dir)))


@torch.inference_mode()
def closeness(reference: States, student: States) -> dict[str, float]:
    """{"kl", "top1"} of the student to the reference. ValueError when vocabularies or lengths differ."""
    vocabularies, tokens = zip(*((len(s.head.weight_VH), len(s.hidden_NH)) for s in (reference, student)), strict=True)
    if len(set(vocabularies)) > 1 or len(set(tokens)) > 1:
        raise ValueError(
            f"the models can't be compared: vocabularies {vocabularies[0]} and {vocabularies[1]}, "
            f"{tokens[0]} and {tokens[1]} held-out tokens; both must use the same tokenizer"
        )
    kl = agree = 0.0
    for reference_CH, student_CH in zip(reference.hidden_NH.split(CHUNK), student.hidden_NH.split(CHUNK), strict=True):
        log_p, log_q = reference.head.logits(reference_CH).log_softmax(-1), student.head.logits(student_CH).log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    return {"kl": kl / tokens[0], "top1": agree / tokens[0]}


@torch.inference_mode()
def bits_per_byte(states: States, data: Packed, sequences: int, tokenizer: Any) -> float:
    """Cross-entropy of the held-out labels in bits over the bytes of their text."""
    labels = data.ids[:sequences, 1:].long()
    text_bytes = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in labels)
    nats = 0.0
    for hidden_CH, labels_C in zip(states.hidden_NH.split(CHUNK), labels.flatten().split(CHUNK), strict=True):
        nats += float(torch.nn.functional.cross_entropy(states.head.logits(hidden_CH), labels_C, reduction="sum"))
    return nats / math.log(2) / max(1, text_bytes)
