"""log p(y | x) of pairs of texts, over any runtime: how they are cut into tokens, what is computed
once, and what the head says of an answer's tokens.

    log p(y | x) = sum_i log p(y_i | x, y_<i)

lm-eval's own model classes do it as well; here it is without lm-eval and without torch, so that a
GGUF's items are scored the same where only llama.cpp and numpy are installed (`score/file.py`) as
in a run (`score/lm.py`). Tokens, truncation and windows are lm-eval's
(tests/score/test_likelihood.py).

Legend: N nodes or answer tokens, C nodes of a chunk, H hidden, V vocabulary.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from more_itertools import constrained_batches, partition
from numpy.typing import NDArray
from tqdm import tqdm

from compress.score.trie import Row, rows_of

NODES = 64  # whose logits are held at once
Ids = list[int]
Asked = tuple[Any, Ids, Ids]  # anything, a context's ids, an answer's
Encode = Callable[[str, bool], Ids]  # text, whether special tokens are added


class Runtime(Protocol):
    """What computes hidden states. `reach`: the longest sequence that may branch off another one;
    `tokens`: of a batch, at most, unless one row has more.
    """

    reach: int
    tokens: int

    def hidden(self, rows: Sequence[Row]) -> list[Any]:
        """States after the final norm, (N, H) for the N nodes of each row."""


class Readout(Protocol):
    """What a head says of answers."""

    def answers(
        self, hidden: Sequence[Any], spots_N: NDArray[np.int64], answers_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """log p of each answer token behind the node at its spot, counted through `hidden`, and
        whether it is the most probable one.
        """


class ArrayReadout:
    """A head whose products numpy takes, in fp32: `logits` of hidden states (C, H) -> (C, V)."""

    def __init__(self, logits: Callable[[Any], Any]) -> None:
        self.logits = logits

    def answers(
        self, hidden: Sequence[Any], spots_N: NDArray[np.int64], answers_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """As `Readout.answers`."""
        hidden_NH = np.concatenate(hidden)
        logprob_N, first_N = np.zeros(len(spots_N), np.float32), np.zeros(len(spots_N), bool)
        for nodes, inside, at in chunks(spots_N):
            logits_CV = self.logits(hidden_NH[nodes])
            top_C1 = logits_CV.max(1, keepdims=True)
            mass_C = np.exp(logits_CV - top_C1).sum(1)

            tokens = answers_N[inside]
            logprob_N[inside] = logits_CV[at, tokens] - (top_C1[:, 0] + np.log(mass_C))[at]
            first_N[inside] = logits_CV.argmax(1)[at] == tokens
        return logprob_N, first_N


def chunks(
    spots_N: NDArray[np.int64],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """NODES different spots at a time; which answer tokens stand behind one of them, and behind
    which.
    """
    nodes, where_N = np.unique(spots_N, return_inverse=True)
    for start in range(0, len(nodes), NODES):
        inside = np.flatnonzero((where_N >= start) & (where_N < start + NODES))
        yield nodes[start : start + NODES], inside, where_N[inside] - start


class Likelihoods:
    """What a model gives to texts. At most `batch_size` rows at once; the model sees at most
    `max_length` tokens. `encode` cuts a text into ids; `prefix` is the id that stands before a
    text without a context, and `opening` its text.
    """

    def __init__(
        self,
        runtime: Runtime,
        readout: Readout,
        encode: Encode,
        prefix: tuple[int, str],
        batch_size: int,
        max_length: int,
    ) -> None:
        self.runtime = runtime
        self.readout = readout
        self.encode = encode
        self.prefix, self.opening = prefix
        self.batch_size = batch_size
        self.max_length = max_length

    def pair_ids(self, context: str, answer: str) -> tuple[Ids, Ids]:
        """Ids of a context and of the answer behind it, cut as one text: spaces at a context's end
        are the answer's. Without a context the prefix stands there, unless the answer has it.
        """
        if not context:
            ids = self.encode(answer, False)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        bare = context.rstrip()
        context_ids = self.text_ids(bare)
        return context_ids, self.text_ids(context + answer)[len(context_ids) :]

    def text_ids(self, text: str) -> Ids:
        """Ids of a text, with the special tokens in front of it unless it brings them."""
        return self.encode(text, not text.startswith(self.opening))

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """log p of an answer behind its context, and whether greedy decoding would write it, of
        requests whose `args` these two are, as lm-eval's.
        """
        return self.of_ids([(one.args, *self.pair_ids(*one.args)) for one in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """log p of the text in each request's `args`, every token of it once, in windows of
        `max_length` tokens.
        """
        asked: list[Asked] = []
        owners = []
        for owner, request in enumerate(requests):
            ids = self.text_ids(request.args[0])
            for context, answer in windows(ids, self.prefix, self.max_length):
                asked.append((("", ""), context, answer))
                owners.append(owner)

        # A text's log-likelihood is the sum over its windows.
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self.of_ids(asked), strict=True):
            totals[owner] += logprob
        return totals

    def of_ids(self, asked: Sequence[Asked], quiet: bool | None = None) -> list[tuple[float, bool]]:
        """As `loglikelihood`, of token ids. ValueError for an answer of no token, or of more than
        the model may see. `quiet`: no progress bar; None shows one on terminals only.
        """
        for _, _, answer in asked:
            if not 0 < len(answer) <= self.max_length:
                raise ValueError(
                    f"an answer of {len(answer)} tokens can't be scored; allowed: 1 to the model's"
                    f" {self.max_length}"
                )

        # A prompt is all but the answer's last token, and loses its beginning where it is too long.
        prompts = [(context + answer)[-self.max_length - 1 : -1] for _, context, answer in asked]
        rows = rows_of(prompts, self.runtime.reach)

        results = [(0.0, False)] * len(asked)
        with tqdm(total=len(asked), desc="log-likelihoods", disable=quiet) as bar:
            for batch in self._batches(rows):
                owners = [i for row in batch for i, _, _ in row.paths]
                lengths = [len(asked[i][2]) for i in owners]
                logprob_N, first_N = self.readout.answers(
                    self.runtime.hidden(batch),
                    _answer_nodes(batch, lengths),
                    np.concatenate([np.array(asked[i][2]) for i in owners]),
                )

                # Each request's own tokens.
                ends = np.cumsum(lengths)
                for i, end, length in zip(owners, ends, lengths, strict=True):
                    part = slice(end - length, end)
                    results[i] = float(logprob_N[part].sum()), bool(first_N[part].all())
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


class ServedStates:
    """A LlamaCpp as a runtime: no branches, and no bound of its own on a batch."""

    reach = 0
    tokens = sys.maxsize

    def __init__(self, server: Any) -> None:
        self.server = server

    def hidden(self, rows: Sequence[Row]) -> list[Any]:
        """Arrays (N, H)."""
        return self.server.states([row.ids for row in rows])


def windows(ids: Ids, prefix: int, length: int) -> Iterator[tuple[Ids, Ids]]:
    """A text in parts of at most `length` tokens, each with what stands before it as far as both
    fit: at least one token, for the first one the prefix.
    """
    for start in range(0, len(ids), length):
        end = min(start + length, len(ids))
        yield ids[end - length - 1 : start] if start else [prefix], ids[start:end]


def _answer_nodes(batch: Sequence[Row], answer_lengths: Sequence[int]) -> NDArray[np.int64]:
    """The nodes behind which answer tokens stand, path by path, counted through a batch's rows."""
    lengths = iter(answer_lengths)
    spots = []
    start = 0
    for row in batch:
        for _, path, _ in row.paths:
            spots.append(start + path[-next(lengths) :])
        start += len(row.ids)
    return np.concatenate(spots)
