"""Sizes of a decoder by its config alone, as `compress/memory.py` counts with them."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from compress.models.blocks import blocks_of
from compress.models.checkpoint import config_object, head_dim
from compress.models.model_config import meta_model


def _size(shape: Iterable[int]) -> int:
    product = 1
    for length in shape:
        product *= length
    return product


class Shape:
    """Sizes of a decoder by its HF config: parameters in blocks and outside of them, the largest
    block and matrix, the widest columns.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        model = meta_model(config)
        about = config_object(config)
        self.params = model.num_parameters()
        self.hidden = int(about.hidden_size)
        self.vocabulary = int(about.vocab_size)
        try:
            blocks = list(blocks_of(model))
        except ValueError:
            blocks = [model]
        self.depth = len(blocks)
        self.blocks = [[tuple(p.shape) for p in block.parameters()] for block in blocks]

        # What attention and FFN hold of a token.
        heads = int(getattr(about, "num_attention_heads", None) or 1)
        kv_heads = int(getattr(about, "num_key_value_heads", None) or heads)
        width = head_dim(about) if heads > 1 else self.hidden
        self.queries = heads * width
        self.keys = kv_heads * width
        ffn = int(getattr(about, "intermediate_size", None) or 4 * self.hidden)
        self.ffn = min(ffn, max(max(shape) for shape in self.blocks[0]))
        self.head = self.vocabulary * self.hidden
        self.tied = bool(getattr(about, "tie_word_embeddings", False))

    @cached_property
    def matrices(self) -> float:
        """Weights of all matrices in blocks."""
        return sum(_size(shape) for block in self.blocks for shape in block if len(shape) > 1)

    @cached_property
    def block(self) -> float:
        """Weights of the largest block."""
        return max(sum(map(_size, block)) for block in self.blocks)

    @cached_property
    def largest(self) -> float:
        """Weights of the largest matrix of a block."""
        return max(_size(shape) for block in self.blocks for shape in block)

    @property
    def outside(self) -> float:
        """Weights outside of the blocks, and vectors in them: at home in fp32."""
        return self.params - self.matrices
