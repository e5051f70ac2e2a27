"""One lm-eval model over every runtime: torch checkpoints, llama.cpp, ONNX Runtime. What is asked
twice is computed once.

lm-eval asks for log p(y | x) = sum_i log p(y_i | x, y_<i) of pairs that begin alike: an item's
choices share examples, question and often their first words, items share a task's fixed prompt. So
sequences are laid out in rows of a trie (score/trie.py), of which a causal model needs every node
once. Rows of like length make a batch, and the head is applied to nodes with an answer behind them.
Where the model can't do this (state-space layers, a window shorter than the sequence, other
runtimes) rows have no branches: of sequences that begin alike the longest is run. Tokens,
truncation, windows and stop strings are those of lm-eval's own `hf` model, and so are the answers
(tests/score/test_lm.py).

Legend: B rows, L positions, N nodes or answer tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    configure_pad_token,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from more_itertools import chunked, constrained_batches, partition
from torch import Tensor
from tqdm import tqdm

from compress.models.checkpoint import best_device
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.head import Head, head_of
from compress.score.trie import Row, padded, rows_of, tree_inputs

# Of a batch on a CPU, so that its activations stay in the cache: at 2,048 all takes 1.4 times as
# long.
TOKENS = 512
NODES = 64  # whose logits are held at once


class Served:
    """A LlamaCpp or an OnnxRuntime, as a runtime for `LM`."""

    # No branches, and no bound of its own on a batch.
    reach = 0
    tokens = sys.maxsize

    def __init__(self, server: Any) -> None:
        self.server = server

    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        return self.server.hidden_states([row.ids for row in rows])

    def generate(self, prompts: Sequence[list[int]], n: int, stop: list[str]) -> list[str]:
        return [self.server.generate(ids, n, stop) for ids in prompts]


class Torch:
    """A causal transformers model where it is, in its own dtype, which from now on computes as
    `use_cpu_kernels` says. `tokenizer` can pad.

    `reach`: the longest sequence that may branch off another one; `tokens`: of a batch, at most,
    unless one row has more.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        use_cpu_kernels(model)
        self.model = model
        self.tokenizer = tokenizer
        self.tokens = TOKENS if model.device.type == "cpu" else 32 * TOKENS

        # A mask of our own would let a token look beyond its layer's window.
        config = model.config.get_text_config()
        windows = [
            getattr(config, name, None) or sys.maxsize
            for name in ("sliding_window", "attention_chunk_size")
        ]
        self.reach = min(windows) if self._branches() else 0

    def _branches(self) -> bool:
        """Whether two sequences in one row are computed as each by itself."""
        pair = [[1, 2, 3, 2], [1, 3, 2, 1]]
        try:
            [row] = rows_of(pair, 4)
            [together] = self.hidden([row])
        except (TypeError, ValueError, RuntimeError, IndexError):  # takes no such mask
            return False
        alone = torch.stack(self.hidden(rows_of(pair, 0)))
        joined = torch.stack([together[path] for _, path, _ in row.paths])
        return bool((joined - alone).norm() < 0.1 * alone.norm())

    @torch.inference_mode()
    def hidden(self, rows: Sequence[Row]) -> list[Tensor]:
        """States after the final norm, (N, H) for the N nodes of each row; all rows have branches
        or none has.
        """
        length = max(len(row.ids) for row in rows)
        inputs = {"input_ids": torch.tensor([padded(row.ids, length) for row in rows])}
        if rows[0].branches:
            inputs |= tree_inputs(rows)
        on_device = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        hidden_BLH = self.model.base_model(**on_device, use_cache=False).last_hidden_state
        return [hidden_LH[: len(row.ids)] for row, hidden_LH in zip(rows, hidden_BLH, strict=True)]

    def generate(self, prompts: Sequence[list[int]], n: int, stop: list[str]) -> list[str]:
        """Greedy continuations of at most `n` tokens; what stands behind a stop string may be
        there or not.
        """
        # Padded on the left, every continuation begins at the same place.
        padded_prompts = self.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        )
        batch = padded_prompts.to(self.model.device)
        length = batch["input_ids"].shape[1]

        ends = stop_sequences_criteria(self.tokenizer, stop, length, len(prompts))
        out = self.model.generate(
            **batch,
            max_new_tokens=n,
            do_sample=False,
            stopping_criteria=ends,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)


def torch_lm(model: Any, tokenizer: Any, batch_size: int, max_length: int | None = None) -> LM:
    """lm-eval's view of a transformers model, which sees as many tokens
    as it can or `max_length`.
    """
    tokenizer = configure_pad_token(tokenizer, model.config)
    length = min(max_length or sys.maxsize, resolve_max_length(model.config, tokenizer))
    return LM(Torch(model, tokenizer), head_of(model).detach(), tokenizer, batch_size, length)


def served_lm(
    server: Any, head: Head, tokenizer: Any, batch_size: int, max_length: int | None = None
) -> LM:
    """lm-eval's view of a LlamaCpp or an OnnxRuntime: `head` as decoded from the file, whose
    products are taken on the best device of this machine, and an HF `tokenizer`.
    """
    length = min(max_length or sys.maxsize, server.ctx_len)
    return LM(Served(server), head.on(best_device()), tokenizer, batch_size, length)


class LM(TemplateLM):
    """What lm-eval asks. At most `batch_size` rows, or texts to go on with, at once; the model
    sees at most `max_length` tokens.
    """

    def __init__(
        self, runtime: Torch | Served, head: Head, tokenizer: Any, batch_size: int, max_length: int
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.head = head
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length

        # An item's context comes with every choice.
        self._encode = lru_cache(maxsize=4)(tokenizer.encode)

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return int(
            self.tokenizer.eos_token_id
            if self.tokenizer.bos_token_id is None
            else self.tokenizer.bos_token_id
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        return list(self._encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood(
        self, requests: Any, disable_tqdm: bool | None = None
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)  # None: bars on terminals only

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        for _, _, answer in requests:
            if not 0 < len(answer) <= self.max_length:
                raise ValueError(
                    f"an answer of {len(answer)} tokens can't be scored; allowed: 1 to the model's"
                    f" {self.max_length}"
                )

        # A prompt is all but the answer's last token, and loses its beginning where it is too long.
        prompts = [(context + answer)[-self.max_length - 1 : -1] for _, context, answer in requests]
        rows = rows_of(prompts, self.runtime.reach)

        results = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for batch in self._batches(rows):
                owners = [i for row in batch for i, _, _ in row.paths]
                answers = [torch.tensor(requests[i][2]) for i in owners]
                lengths = [len(answer) for answer in answers]
                logprob_N, first_N = self._answers(
                    torch.cat(self.runtime.hidden(batch)),
                    _answer_nodes(batch, lengths),
                    torch.cat(answers),
                )

                # Each request's own tokens.
                parts = zip(owners, logprob_N.split(lengths), first_N.split(lengths), strict=True)
                for i, logprob, first in parts:
                    results[i] = float(logprob.sum()), bool(first.all())
                bar.update(len(owners))
        return results

    def _batches(self, rows: Sequence[Row]) -> Iterator[tuple[Row, ...]]:
        """Rows to compute together, the longest first: what needs too much memory fails at once."""
        longest_first = sorted(rows, key=lambda row: -len(row.ids))
        # Rows with branches bring a mask of our own, which would replace the window of the others.
        for alike in partition(lambda row: row.branches, longest_first):
            yield from constrained_batches(
                alike,
                max_size=self.runtime.tokens,
                max_count=self.batch_size,
                get_len=lambda row: len(row.ids),
                strict=False,
            )

    def _answers(
        self, hidden_NH: Tensor, spots_N: Tensor, answers_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p of each answer token behind the node at its spot, and whether it is the most
        probable one.
        """
        logprob_N, first_N = torch.zeros(len(spots_N)), torch.zeros(len(spots_N), dtype=torch.bool)
        nodes, where_N = spots_N.unique(return_inverse=True)
        for start, chunk in zip(range(0, len(nodes), NODES), nodes.split(NODES), strict=True):
            logits_NV = self.head.logits(hidden_NH[chunk].to(self.head.weight_VH.device))

            # The answer tokens that stand behind nodes of this chunk.
            inside = ((where_N >= start) & (where_N < start + NODES)).nonzero()[:, 0]
            at, tokens = where_N[inside] - start, answers_N[inside]
            logprob_N[inside] = (logits_NV[at, tokens] - logits_NV.logsumexp(1)[at]).cpu()
            first_N[inside] = logits_NV.argmax(1).cpu()[at] == tokens
        return logprob_N, first_N

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool | None = None) -> list[float]:
        # Each text in windows that score every token of it once.
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, 1
            ):
                windows.append((("", ""), *utils.make_disjoint_window(window)))
                owners.append(i)

        # A text's log-likelihood is the sum over its windows.
        totals = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for i, (logprob, _) in zip(owners, scored, strict=True):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool | None = None) -> list[str]:
        # Texts with the same options can be gone on with together.
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            context, options = request.args
            groups[json.dumps(options, sort_keys=True)].append((self.tok_encode(context), i))

        texts = [""] * len(requests)
        for options, group in groups.items():
            stop, count = self._generation(options)
            longest_first = sorted(group, key=lambda entry: -len(entry[0]))
            bar = tqdm(longest_first, desc="texts", disable=disable_tqdm)
            for batch in chunked(bar, self.batch_size):
                # What is read leaves room for what is written.
                contexts = [ids[count - self.max_length :] for ids, _ in batch]
                continuations = self.runtime.generate(contexts, count, stop)
                for (_, i), text in zip(batch, continuations, strict=True):
                    texts[i] = postprocess_generated_text(text, stop, None)
        return texts

    def _generation(self, options: str) -> tuple[list[str], int]:
        """Stop strings and the most tokens, of generation options as JSON. ValueError for options
        that ask for more than greedy decoding, or for more tokens than the model may see.
        """
        values = dict(normalize_gen_kwargs(json.loads(options)))
        eos = self.tokenizer.decode(self.eot_token_id)
        stop, count = handle_stop_sequences(values.pop("until"), eos), values.pop("max_gen_toks")
        if count >= self.max_length or any(values.values()):
            allowed = (
                f"until, greedy decoding, and max_gen_toks below the {self.max_length} tokens"
                " that the model may see at once"
            )
            raise ValueError(f"generation options {options} can't be followed; allowed: {allowed}")
        return stop, count


def _answer_nodes(batch: Sequence[Row], answer_lengths: Sequence[int]) -> Tensor:
    """The nodes behind which answer tokens stand, path by path, counted through a batch's rows."""
    lengths = iter(answer_lengths)
    spots = []
    start = 0
    for row in batch:
        for _, path, _ in row.paths:
            spots.append(start + path[-next(lengths) :])
        start += len(row.ids)
    return torch.from_numpy(np.concatenate(spots))
