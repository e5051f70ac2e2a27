"""One lm-eval model over every runtime: torch checkpoints, llama.cpp, ONNX Runtime. What is asked
twice is computed once.

lm-eval asks for log p(y | x) = sum_i log p(y_i | x, y_<i) of pairs that begin alike: an item's
choices share examples, question and often their first words, items share a task's fixed prompt.
Taken in lexicographic order, a sequence of l tokens whose first c are those of the one before adds
l - c nodes to a trie, and a causal model needs every node once (tree attention: Miao et al. 2024,
arXiv 2305.09781, section 4.2):

    row = nodes of the trie, one behind the other    position = depth    mask_ij = node j is on the
    way from the root to node i

Joining a row of n nodes saves c tokens and makes l - c tokens look at n more keys; it is done while
(l - c) n <= KEYS c. Rows of like length make a batch, and the head is applied to nodes with an
answer behind them. Where the model can't do this (state-space layers, a window shorter than the
sequence, other runtimes) rows have no branches: of sequences that begin alike the longest is run.
Tokens, truncation, windows and stop strings are those of lm-eval's own `hf` model, and so are the
answers (tests/test_lm.py).

Legend: B rows, L positions, N nodes or answer tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
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
from more_itertools import chunked, constrained_batches, flatten, partition
from torch import Tensor
from tqdm import tqdm

from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.head import Head, head_of

KEYS = 500  # keys that cost about as much to look at as a token's matrix products
# of a batch on a CPU, so that its activations stay in the cache: at 2,048 all takes 1.4 times as
# long
TOKENS = 512
NODES = 64  # whose logits are held at once


@dataclass
class Row:
    """Part of the trie: token and depth of every node, and for each prompt in it (its index, its
    nodes, how many of these were there before).
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    paths: list[tuple[int, Any, int]] = field(default_factory=list)

    @property
    def branches(self) -> bool:
        """Whether it is more than one path."""
        return len(self.ids) > len(self.paths[-1][1])


def rows_of(prompts: Sequence[list[int]], reach: int) -> list[Row]:
    """Lay out prompts (token ids) in rows; a row with branches holds none of more
    than `reach` tokens.
    """
    rows: list[Row] = []
    last: list[int] = []
    path = np.arange(0)
    for i in sorted(range(len(prompts)), key=prompts.__getitem__):
        ids, n = prompts[i], len(rows[-1].ids) if rows else 0
        c = next(
            (k for k, (a, b) in enumerate(zip(last, ids, strict=False)) if a != b),
            min(len(last), len(ids)),
        )
        if (
            not rows
            or c < n
            and ((len(ids) - c) * n > KEYS * c or max(len(ids) - 1, *rows[-1].depths) >= reach)
        ):
            rows.append(Row())
            c = n = 0
        row, last, path = rows[-1], ids, np.concatenate([path[:c], np.arange(n, n + len(ids) - c)])
        row.ids += ids[c:]
        row.depths += range(c, len(ids))
        row.paths.append((i, path, c))
    return rows


class Served:
    """A LlamaCpp or an OnnxRuntime, as a runtime for `LM`."""

    reach, tokens = 0, sys.maxsize

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
        self.model, self.tokenizer, self.tokens = (
            model,
            tokenizer,
            TOKENS if model.device.type == "cpu" else 32 * TOKENS,
        )
        config = model.config.get_text_config()
        windows = [
            getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")
        ]
        self.reach = min(w or sys.maxsize for w in windows) if self._branches() else 0

    def _branches(self) -> bool:
        """Whether two sequences in one row are computed as each by itself."""
        pair = [[1, 2, 3, 2], [1, 3, 2, 1]]
        try:
            [row], [together] = (rows := rows_of(pair, 4)), self.hidden(rows)
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
        length, device = max(len(row.ids) for row in rows), self.model.device
        ids_BL = torch.tensor([row.ids + [0] * (length - len(row.ids)) for row in rows])
        tree = {}
        if rows[0].branches:
            depths_BL = torch.tensor([row.depths + [0] * (length - len(row.ids)) for row in rows])
            mask_B1LL = torch.eye(length, dtype=torch.bool).repeat(
                len(rows), 1, 1, 1
            )  # padding sees itself
            for mask_LL, row in zip(mask_B1LL[:, 0], rows, strict=True):
                for _, path, c in row.paths:
                    mask_LL[path[c:, None], path] = torch.from_numpy(path <= path[c:, None])
            tree = {"attention_mask": mask_B1LL.to(device), "position_ids": depths_BL.to(device)}
        hidden_BLH = self.model.base_model(
            input_ids=ids_BL.to(device), use_cache=False, **tree
        ).last_hidden_state
        return [hidden_LH[: len(row.ids)] for row, hidden_LH in zip(rows, hidden_BLH, strict=True)]

    def generate(self, prompts: Sequence[list[int]], n: int, stop: list[str]) -> list[str]:
        """Greedy continuations of at most `n` tokens; what stands behind a stop string may be
        there or not.
        """
        batch = self.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
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
    """lm-eval's view of a LlamaCpp or an OnnxRuntime: `head` as decoded from the file, an HF
    `tokenizer`.
    """
    return LM(
        Served(server), head, tokenizer, batch_size, min(max_length or sys.maxsize, server.ctx_len)
    )


class LM(TemplateLM):
    """What lm-eval asks. At most `batch_size` rows, or texts to go on with, at once; the model
    sees at most `max_length` tokens.
    """

    def __init__(
        self, runtime: Torch | Served, head: Head, tokenizer: Any, batch_size: int, max_length: int
    ) -> None:
        super().__init__()
        self.runtime, self.head, self.tokenizer, self.batch_size, self.max_length = (
            runtime,
            head,
            tokenizer,
            batch_size,
            max_length,
        )
        self._encode = lru_cache(maxsize=4)(
            tokenizer.encode
        )  # an item's context comes with every choice

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
        prompts = [(context + answer)[-self.max_length - 1 : -1] for _, context, answer in requests]
        rows = sorted(
            rows_of(prompts, self.runtime.reach), key=lambda row: -len(row.ids)
        )  # what needs too much memory fails at once
        alike = partition(
            lambda row: row.branches, rows
        )  # a mask of our own would replace a window's
        size = self.runtime.tokens
        batched = partial(
            constrained_batches,
            max_size=size,
            max_count=self.batch_size,
            get_len=lambda row: len(row.ids),
            strict=False,
        )
        results = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for batch in flatten(map(batched, alike)):
                starts = np.cumsum([0, *(len(row.ids) for row in batch)])
                owners = [i for row in batch for i, _, _ in row.paths]
                answers = [torch.tensor(requests[i][2]) for i in owners]
                spots = [
                    n + path[-len(requests[i][2]) :]
                    for n, row in zip(starts, batch, strict=False)
                    for i, path, _ in row.paths
                ]
                logprob_N, first_N = self._answers(
                    torch.cat(self.runtime.hidden(batch)),
                    torch.from_numpy(np.concatenate(spots)),
                    torch.cat(answers),
                )
                lengths = [len(answer) for answer in answers]
                for i, logprob, first in zip(
                    owners, logprob_N.split(lengths), first_N.split(lengths), strict=True
                ):
                    results[i] = float(logprob.sum()), bool(first.all())
                bar.update(len(owners))
        return results

    def _answers(
        self, hidden_NH: Tensor, spots_N: Tensor, answers_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """log p of each answer token behind the node at its spot, and whether it is the most
        probable one.
        """
        logprob_N, first_N = torch.zeros(len(spots_N)), torch.zeros(len(spots_N), dtype=torch.bool)
        nodes, where_N = spots_N.unique(return_inverse=True)
        for start, chunk in zip(range(0, len(nodes), NODES), nodes.split(NODES), strict=True):
            mine = ((where_N >= start) & (where_N < start + NODES)).nonzero()[:, 0]
            logits_NV, at, tokens = (
                self.head.logits(hidden_NH[chunk]),
                where_N[mine] - start,
                answers_N[mine],
            )
            logprob_N[mine] = (logits_NV[at, tokens] - logits_NV.logsumexp(1)[at]).cpu()
            first_N[mine] = logits_NV.argmax(1).cpu()[at] == tokens
        return logprob_N, first_N

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool | None = None) -> list[float]:
        windows, owners = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(
                ids, self.prefix_token_id, self.max_length, 1
            ):
                windows.append((("", ""), *utils.make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(
            owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True
        ):
            totals[i] += logprob
        return totals

    def generate_until(self, requests: Any, disable_tqdm: bool | None = None) -> list[str]:
        texts, alike = [""] * len(requests), defaultdict(list)
        for i, request in enumerate(requests):
            context, options = request.args
            alike[json.dumps(options, sort_keys=True)].append((self.tok_encode(context), i))
        eos = self.tokenizer.decode(self.eot_token_id)
        for options, group in alike.items():
            known = dict(normalize_gen_kwargs(json.loads(options)))
            until, n = handle_stop_sequences(known.pop("until"), eos), known.pop("max_gen_toks")
            if n >= self.max_length or {name for name, value in known.items() if value}:
                allowed = (
                    f"until, greedy decoding, and max_gen_toks below the {self.max_length} tokens"
                    " that the model may see at once"
                )
                raise ValueError(
                    f"generation options {options} can't be followed; allowed: {allowed}"
                )
            for batch in chunked(
                tqdm(
                    sorted(group, key=lambda entry: -len(entry[0])),
                    desc="texts",
                    disable=disable_tqdm,
                ),
                self.batch_size,
            ):
                found = self.runtime.generate(
                    [ids[n - self.max_length :] for ids, _ in batch], n, until
                )
                for (_, i), text in zip(batch, found, strict=True):
                    texts[i] = postprocess_generated_text(text, until, None)
        return texts
