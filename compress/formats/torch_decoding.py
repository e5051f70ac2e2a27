"""Many greedy answers of a transformers model at once, without work for nothing.

transformers' own loop computes every row of a batch up to the end of its longest answer, and each
prompt from its first token on. Here a row leaves the batch with its last token, and what all
prompts begin with, as a template's system turn, is computed once:

    [what all begin with] [padding] [the rest of a prompt] [its answer]

Padding in the middle is not looked at and counts as no position, so this is for models that are
told positions and whose cache keeps every token; a window slides over places, padding among them,
so there all prompts are computed whole. Transformers' loop itself, padded on the left, is for
caches that can't be cut by rows, as state-space layers have, and for generation configs that weigh
tokens by those before them. On the teacher of the demo, 240 open prompts: the same answers
to the last token in half the time (results/open/bench.md).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from more_itertools import chunked, longest_common_prefix
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

ROWS = 96  # a row of 32 takes 1.5 to 1.8 times as long as one of 64 or 128, on two cores
CACHE_BYTES = 1 << 30  # keys and values of a batch, at most
# Of a generation config, what does not change which token is the likeliest.
UNWEIGHTED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "_from_model_config", "transformers_version"),
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("max_length", "max_new_tokens", "use_cache", "cache_implementation"),
    *("output_attentions", "output_hidden_states"),
}


class Prompts:
    """Token ids of prompts, in batches for `model.generate`: the longest first.

    `together`: rows of a batch of transformers' own loop; otherwise ROWS, fewer where they would
    take more than CACHE_BYTES.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]], pad: int, together: int) -> None:
        self._prompts = prompts
        self._pad = pad
        self._together = together
        self._device = model.device

        # At least a token of each prompt is left to be computed.
        shared = len(list(longest_common_prefix(prompts)))
        self._shared = min([shared, *(len(ids) - 1 for ids in prompts)])
        self._cache = _cache_of(model, prompts[0][: max(1, self._shared)])
        if not _keeps_places(model, self._cache):
            self._shared = 0

    def batches(self, n: int) -> Iterator[tuple[list[int], dict[str, Any]]]:
        """Numbers of prompts, and what `generate` is given for up to `n` tokens behind them."""
        longest_first = sorted(range(len(self._prompts)), key=lambda i: -len(self._prompts[i]))
        rows = self._rows(len(self._prompts[longest_first[0]]) + n)
        for numbers in chunked(longest_first, rows):
            yield numbers, self._inputs([self._prompts[i] for i in numbers])

    def _rows(self, length: int) -> int:
        """Rows of a batch of so many tokens each."""
        if self._cache is None:
            return self._together
        bytes_a_token = sum(
            (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[-2]
            for layer in self._cache.layers
        )
        return max(1, min(ROWS, CACHE_BYTES // (bytes_a_token * length)))

    def _inputs(self, prompts: Sequence[list[int]]) -> dict[str, Any]:
        """One batch."""
        opening = prompts[0][: self._shared]
        rests = [ids[self._shared :] for ids in prompts]
        width = max(map(len, rests))
        padding = [[self._pad] * (width - len(rest)) for rest in rests]
        rows = [opening + pads + rest for pads, rest in zip(padding, rests, strict=True)]
        seen = [
            [1] * len(opening) + [0] * len(pads) + [1] * len(rest)
            for pads, rest in zip(padding, rests, strict=True)
        ]
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor(rows, device=self._device),
            "attention_mask": torch.tensor(seen, device=self._device),
        }

        # What was computed of the opening is the same for every row.
        if self._cache is not None:
            inputs["custom_generate"] = rows_that_go_on
        if self._shared:
            inputs["past_key_values"] = _repeated(self._cache, len(prompts))
        return inputs


@torch.inference_mode()
def _cache_of(model: Any, ids: list[int]) -> Any:
    """What a model keeps of token ids, None for transformers' own loop."""
    if set(model.generation_config.to_diff_dict()) - UNWEIGHTED:
        return None
    out = model(torch.tensor([ids], device=model.device), use_cache=True)
    cache = getattr(out, "past_key_values", None)
    layers = getattr(cache, "layers", ())
    by_rows = [isinstance(layer, DynamicLayer) and layer.is_initialized for layer in layers]
    return cache if isinstance(cache, DynamicCache) and by_rows and all(by_rows) else None


def _keeps_places(model: Any, cache: Any) -> bool:
    """Whether padding may stand between tokens: no layer forgets by place, positions are told."""
    if cache is None or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    return "position_ids" in inspect.signature(model.forward).parameters


def _repeated(cache: Any, rows: int) -> DynamicCache:
    """A copy for so many rows."""
    pairs = [
        (layer.keys.repeat(rows, 1, 1, 1), layer.values.repeat(rows, 1, 1, 1))
        for layer in cache.layers
    ]
    return DynamicCache(pairs)


def rows_that_go_on(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **kwargs: Any,
) -> Tensor:
    """A `custom_generate` of transformers: its greedy loop, which a row leaves when it has ended.
    (B, L) token ids, padded on the right.
    """
    ended: dict[int, Tensor] = {}
    numbers = torch.arange(len(input_ids), device=input_ids.device)
    out = model._prefill(input_ids, generation_config, kwargs)
    while True:
        kwargs = model._update_model_kwargs_for_generation(out, kwargs)
        scores_BV = logits_processor(input_ids, out.logits[:, -1].float())
        input_ids = torch.cat([input_ids, scores_BV.argmax(-1, keepdim=True)], dim=1)

        # Rows that are done leave, with what is kept of them.
        done = stopping_criteria(input_ids, None)
        ended |= dict(zip(numbers[done].tolist(), input_ids[done], strict=True))
        if done.all():
            break
        if done.any():
            go_on = (~done).nonzero()[:, 0]
            kwargs["past_key_values"].batch_select_indices(go_on)
            by_row = {
                name: value[go_on]
                for name, value in kwargs.items()
                if isinstance(value, Tensor) and value.shape[:1] == numbers.shape
            }
            kwargs = kwargs | by_row
            numbers, input_ids = numbers[go_on], input_ids[go_on]

        inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **kwargs)
        out = model(**inputs, return_dict=True)

    rows = [ended[number] for number in range(len(ended))]
    pad = int(generation_config._pad_token_tensor)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
