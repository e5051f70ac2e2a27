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
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    configure_pad_token,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from more_itertools import chunked
from torch import Tensor
from tqdm import tqdm

from compress.formats.gguf_head import GgufHead
from compress.models.checkpoint import best_device
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.head import Head, head_of
from compress.score.likelihood import ArrayReadout, Likelihoods, Readout, chunks
from compress.score.trie import Row, padded, rows_of, tree_inputs

# Of a batch on a CPU, so that its activations stay in the cache: at 2,048 all takes 1.4 times as
# long.
TOKENS = 512


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
    readout = TorchReadout(head_of(model).detach())
    return LM(Torch(model, tokenizer), readout, tokenizer, batch_size, length)


def served_lm(
    server: Any, head: Head, tokenizer: Any, batch_size: int, max_length: int | None = None
) -> LM:
    """lm-eval's view of a LlamaCpp or an OnnxRuntime: `head` as decoded from the file, whose
    products are taken on the best device of this machine, and an HF `tokenizer`.
    """
    length = min(max_length or sys.maxsize, server.ctx_len)
    return LM(Served(server), _readout(head), tokenizer, batch_size, length)


def _readout(head: Head) -> Readout:
    """A file's head on the best device; where that is the CPU, with the arithmetic of
    `score/file.py`: a file is scored the same there and here.
    """
    device = best_device()
    if device.type != "cpu":
        return TorchReadout(head.on(device))
    bias_V = None if head.bias_V is None else head.bias_V.numpy()
    return ArrayReadout(GgufHead(head.weight_VH.numpy(), bias_V, head.scale, head.softcap).logits)


class TorchReadout:
    """A head whose products torch takes, where its weight is."""

    def __init__(self, head: Head) -> None:
        self.head = head

    @torch.inference_mode()
    def answers(self, hidden: Any, spots_N: Any, answers_N: Any) -> tuple[Any, Any]:
        """As `score.likelihood.Readout.answers`."""
        hidden_NH = torch.cat(list(hidden))
        logprob_N = torch.zeros(len(spots_N))
        first_N = torch.zeros(len(spots_N), dtype=torch.bool)
        for nodes, inside, at in chunks(spots_N):
            logits_CV = self.head.logits(hidden_NH[nodes].to(self.head.weight_VH.device))
            tokens = torch.from_numpy(answers_N[inside])
            logprob_N[inside] = (logits_CV[at, tokens] - logits_CV.logsumexp(1)[at]).cpu()
            first_N[inside] = logits_CV.argmax(1).cpu()[at] == tokens
        return logprob_N.numpy(), first_N.numpy()


class LM(TemplateLM):
    """What lm-eval asks. At most `batch_size` rows, or texts to go on with, at once; the model
    sees at most `max_length` tokens.
    """

    def __init__(
        self,
        runtime: Torch | Served,
        readout: Readout,
        tokenizer: Any,
        batch_size: int,
        max_length: int,
    ) -> None:
        super().__init__()
        self.runtime = runtime
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length

        # An item's context comes with every choice.
        self._encode = lru_cache(maxsize=4)(tokenizer.encode)
        opening = self.prefix_token_id, tokenizer.decode(self.prefix_token_id)
        self.likelihoods = Likelihoods(
            runtime, readout, self.tok_encode, opening, batch_size, max_length
        )

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
            return self.likelihoods.text_ids(string)
        return list(self._encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood(
        self, requests: Any, disable_tqdm: bool | None = None
    ) -> list[tuple[float, bool]]:
        return self.likelihoods.loglikelihood(requests)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool | None = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self.likelihoods.of_ids(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool | None = None) -> list[float]:
        return self.likelihoods.loglikelihood_rolling(requests)

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
