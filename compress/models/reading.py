"""How a model of a larger vocabulary is read in the tokens of a smaller one, such as
`stages/prune_vocab.py` leaves: the ids of a text are the smaller's, the larger model is given its
own ids of the same tokens, and what it says of a token that the smaller lacks counts for the first
piece of that token's text. So a teacher and a student compare probabilities of the same events.

The smaller tokenizer must have been cut out of the larger: its tokens all among the larger's, its
merges those of the larger whose tokens it has. Nothing is stored for this: it follows from the two
tokenizers.

Legend: S the smaller vocabulary, V the larger, D what the smaller lacks of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compress.models.head import Fold, Head, head_of
from compress.models.tokenizer import tokenizer_digest
from compress.models.vocabulary import Vocabulary, difference, is_cut_of, vocabulary_of

BYTE_TOKEN = "<0x00>"  # of vocabularies that spell out as bytes what they have no token for


def reading(smaller: Path, larger: Path) -> Fold | None:
    """How the model in `larger` is read in the tokens of `smaller` (directories, or GGUFs); None
    where both have the same. ValueError when they have different tokens.
    """
    if (
        smaller.is_dir()
        and larger.is_dir()
        and tokenizer_digest(smaller) == tokenizer_digest(larger)
    ):
        return None
    small, large = vocabulary_of(smaller), vocabulary_of(larger)
    differing = difference(small, large)
    if not differing:
        return None
    if not is_cut_of(small, large):
        raise ValueError(
            f"{smaller} and {larger} have different tokenizers, and the first is not cut out of the"
            f" second: {differing}"
        )
    return fold_of(small, large)


def fold_of(small: Vocabulary, large: Vocabulary) -> Fold:
    """The fold of `large` to `small`, which was cut out of it."""
    from tokenizers import models

    ids = {token: index for index, token in small.tokens.items()}
    larger_ids = {token: index for index, token in large.tokens.items()}
    merges: Any = small.rules
    bpe = models.BPE(ids, merges, byte_fallback=BYTE_TOKEN in ids)

    dropped = [(large.tokens[i], i) for i in sorted(large.tokens) if large.tokens[i] not in ids]
    return Fold(
        torch.tensor([larger_ids[small.tokens[i]] for i in range(len(ids))]),
        torch.tensor([i for _, i in dropped], dtype=torch.long),
        torch.tensor([bpe.tokenize(token)[0].id for token, _ in dropped], dtype=torch.long),
    )


def read_in(model: Any, fold: Fold | None) -> Head:
    """Let a causal language model take the ids of a smaller vocabulary, in place; the head, not
    detached, that gives their logits. Without a fold model and head are as they were.
    """
    head = head_of(model)
    if fold is None:
        return head

    # A tied head keeps the whole matrix: the embedding gets one of its own.
    fold = fold.on(head.weight_VH.device)
    embedding = model.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(
        embedding.weight.detach()[fold.kept_S], requires_grad=embedding.weight.requires_grad
    )
    embedding.num_embeddings = len(fold.kept_S)
    embedding.padding_idx = None
    return Head(head.weight_VH, head.bias_V, head.scale, head.softcap, fold)
