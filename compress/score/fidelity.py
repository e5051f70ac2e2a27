"""How close a student is to a reference, on held-out text: KL, top-1 agreement, bits per byte.

    kl(ref || student) = mean over tokens of sum_v p_v (log p_v - log q_v), in nats
    top1_agree         = share of positions where both put the same token first
    bits_per_byte      = -sum log2 q(label) / bytes of the labels' text
                         (comparable across tokenizers)

All are ratios r = sum_s a_s / sum_s b_s over the rows of packed held-out text, and so are those of
a task that scores documents of s nats, w words and b bytes in all, over documents,

    word_perplexity = exp(s / w)    byte_perplexity = exp(s / b)    bits_per_byte = s / (b ln 2)

They come with a 95% interval over rows or documents (score/intervals.py, ratio_interval,
perplexities). A row is
not quite a document: one cut in two lies in neighbouring rows.

A model is kept as its final hidden states and its head weight, from which all logits follow: 2.3 kB
a token at H = 576 instead of 197 kB of logits, and the same two tensors come out of transformers
and of llama.cpp. Everything is fp32, the reference's too. States lie in host memory; heads and the
logits of a chunk are on the best device of the machine (`logits_of`).

Legend: N tokens, H hidden, V vocabulary, C tokens a chunk.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.models.checkpoint import best_device
from compress.models.head import Head, hidden_states
from compress.models.tokens import opening

CHUNK = 256


@dataclass(frozen=True)
class States:
    """Final hidden states (N, H) fp32 over the held-out tokens, and the fp32 head."""

    hidden_NH: Tensor
    head: Head


@torch.inference_mode()
def hidden_of(model: Any, ids_SL: Tensor) -> Tensor:
    """Final hidden states (N, H), in the model's type but on the CPU, of rows of ids whose last is
    only a label; one row at a time.
    """
    return torch.cat(
        [hidden_states(model, row[None, :-1].long().to(model.device)).cpu() for row in ids_SL]
    )


def logits_of(states: States) -> Iterator[Tensor]:
    """Logits (C, V) in fp32 of CHUNK tokens at a time, which all at once would not fit, on the best
    device of this machine.
    """
    device = best_device()
    head = states.head.on(device)
    for hidden_CH in states.hidden_NH.split(CHUNK):
        yield head.logits(hidden_CH.to(device))


@torch.inference_mode()
def closeness(reference: States, student: States, rows: int = 1) -> dict[str, Any]:
    """{"kl", "top1"} of the student to the reference, and "kl_rows", "top1_rows": the means of
    each of `rows` rows of equal length. ValueError when vocabularies or lengths differ.
    """
    words, other_words = reference.head.ids_count, student.head.ids_count
    tokens, other_tokens = len(reference.hidden_NH), len(student.hidden_NH)
    if (words, tokens) != (other_words, other_tokens):
        got = f"vocabularies {words} and {other_words}, {tokens} and {other_tokens} held-out tokens"
        raise ValueError(f"the models can't be compared: {got}; both must use the same tokenizer")

    # Both figures of every token, chunk by chunk.
    parts = []
    for reference_CV, student_CV in zip(logits_of(reference), logits_of(student), strict=True):
        log_p = reference_CV.log_softmax(-1)
        log_q = student_CV.log_softmax(-1)
        kl_C = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
        parts.append(torch.stack([kl_C, (log_p.argmax(-1) == log_q.argmax(-1)).double()]))

    kl_S, top1_S = torch.cat(parts, 1).cpu().view(2, rows, -1).mean(-1)
    return {
        "kl": float(kl_S.mean()),
        "top1": float(top1_S.mean()),
        "kl_rows": kl_S.tolist(),
        "top1_rows": top1_S.tolist(),
    }


@torch.inference_mode()
def bits_and_bytes(states: States, ids_SL: Tensor, tokenizer: Any) -> tuple[list[float], list[int]]:
    """Cross-entropy of the held-out labels in bits, and the bytes of their text, of each row."""
    labels_SL = ids_SL[:, 1:].long()
    bytes_S = [
        max(1, len(tokenizer.decode(row, skip_special_tokens=True).encode())) for row in labels_SL
    ]

    # A BOS between documents is given, not written: nothing is lost on it.
    begins = torch.tensor(opening(tokenizer), dtype=torch.long)
    nats = []
    for logits_CV, labels_C in zip(
        logits_of(states), labels_SL.flatten().split(CHUNK), strict=True
    ):
        targets_C = labels_C.to(logits_CV.device)
        lost_C = torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="none")
        nats.append(lost_C.double().cpu().masked_fill(torch.isin(labels_C, begins), 0.0))

    bits_S = torch.cat(nats).view(len(bytes_S), -1).sum(1) / math.log(2)
    return bits_S.tolist(), bytes_S
