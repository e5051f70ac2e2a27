"""How close a student is to a reference, on held-out text: KL, top-1 agreement, bits per byte.

    kl(ref || student) = mean over tokens of sum_v p_v (log p_v - log q_v), in nats
    top1_agree         = share of positions where both put the same token first
    bits_per_byte      = -sum log2 q(label) / bytes of the labels' text     (comparable across tokenizers)

A model is kept as its final hidden states and its head weight, from which all logits follow: 2.3 kB a token at H = 576 instead of
197 kB of logits, and the same two tensors come out of transformers and of llama.cpp. Everything is fp32, the reference's too.

Legend: N tokens, H hidden, V vocabulary, C tokens a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.checkpoint import best_device, load_model, read_config
from compress.train.data import Packed
from compress.train.forward import Head, head_of, hidden_states, scale_and_softcap

CHUNK = 256


@dataclass(frozen=True)
class States:
    """Final hidden states (N, H) fp32 over the held-out tokens, and the fp32 head."""

    hidden_NH: Tensor
    head: Head

    def save(self, path: Path) -> None:
        """Write the hidden states; the head is in the model file."""
        beside = path.with_suffix(f".{id(self)}.part")
        save_file({"hidden": self.hidden_NH.contiguous()}, beside)
        beside.replace(path)


def saved_hidden(path: Path) -> Tensor | None:
    """Hidden states written by `States.save`, or None."""
    return load_file(path)["hidden"] if path.is_file() else None


@torch.inference_mode()
def checkpoint_hidden(model_dir: Path, data: Packed, sequences: int) -> Tensor:
    """Final hidden states (N, H) in fp32 of the first `sequences` held-out rows, computed one row at a time."""
    model: Any = load_model(model_dir)
    model.to(best_device())
    return torch.cat([hidden_states(model, row[None, :-1].long().to(model.device)).cpu() for row in data.ids[:sequences]])


def checkpoint_head(model_dir: Path) -> Head:
    """The fp32 head of a checkpoint, read without building the model unless its weights are packed."""
    from safetensors import safe_open

    from compress.checkpoint import weight_files

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
    if reference.head.weight_VH.shape[0] != student.head.weight_VH.shape[0] or len(reference.hidden_NH) != len(student.hidden_NH):
        raise ValueError(
            f"the models can't be compared: vocabularies {reference.head.weight_VH.shape[0]} and {student.head.weight_VH.shape[0]}, "
            f"{len(reference.hidden_NH)} and {len(student.hidden_NH)} held-out tokens; both must use the same tokenizer"
        )
    kl = agree = 0.0
    for start in range(0, len(reference.hidden_NH), CHUNK):
        part = slice(start, start + CHUNK)
        log_p = reference.head.logits(reference.hidden_NH[part]).log_softmax(-1)
        log_q = student.head.logits(student.hidden_NH[part]).log_softmax(-1)
        kl += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
        agree += float((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    count = len(reference.hidden_NH)
    return {"kl": kl / count, "top1": agree / count}


@torch.inference_mode()
def bits_per_byte(states: States, data: Packed, sequences: int, tokenizer: Any) -> float:
    """Cross-entropy of the held-out labels in bits over the bytes of their text."""
    labels = data.ids[:sequences, 1:].long()
    text_bytes = sum(len(tokenizer.decode(row, skip_special_tokens=True).encode()) for row in labels)
    flat, nats = labels.flatten(), 0.0
    for start in range(0, len(flat), CHUNK):
        part = slice(start, start + CHUNK)
        logits = states.head.logits(states.hidden_NH[part])
        nats += float(torch.nn.functional.cross_entropy(logits, flat[part], reduction="sum"))
    return nats / math.log(2) / max(1, text_bytes)
