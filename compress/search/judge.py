"""What a cut model has lost, in nats per token of its teacher, whatever tokens it has itself.

On rows of training text that no search calibrates, counts or trains on, with KL(p || q) in nats a
token,

    loss = KL(teacher read in the student's tokens || student) n' / n  +  max(0, c' - c) / n

n are the tokens of the text in the teacher's vocabulary, n' in the student's, c the teacher's
cross-entropy over the text in nats, c' the same of the teacher read in the student's tokens
(`models/reading.py`). The first term is what the cuts of the network lose, the second what text
loses that is written in more and rarer pieces: KL a token knows nothing of it, so by KL alone half
a vocabulary would be free. Both are sums over the same text, so shapes of all vocabularies compare.
Held-out text, which reports are of, is never looked at.

Legend: N tokens, H hidden, V vocabulary, C tokens a chunk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.models.checkpoint import best_device, load_model
from compress.models.head import Head, head_of
from compress.models.reading import read_in, reading
from compress.models.tokenizer import load_tokenizer, tokenizer_digest
from compress.models.tokens import encode
from compress.score.fidelity import CHUNK, States, closeness, hidden_of, logits_of


class Reading(NamedTuple):
    """The text in one vocabulary: rows of ids, the teacher's states on them, and what the text
    loses by being written so, in nats a token of the teacher.
    """

    rows: list[Tensor]
    teacher: States
    vocabulary_nats: float

    @property
    def tokens(self) -> int:
        """Tokens that are predicted."""
        return len(self.teacher.hidden_NH)


class Judge:
    """Measures losses of checkpoints that were cut out of one teacher."""

    def __init__(self, teacher: Path, rows_SL: Tensor) -> None:
        """`rows_SL`: text in the teacher's tokens."""
        self.teacher = teacher
        tokenizer: Any = load_tokenizer(teacher)
        self._texts: list[str] = [
            tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for row in rows_SL.tolist()
        ]
        self._readings: dict[str, Reading] = {}

        # The teacher in its own tokens: what all others are compared with.
        self._plain = self._read([row.long() for row in rows_SL], teacher)
        self._plain_nats = _nats(self._plain)

    def loss(self, checkpoint: Path) -> float:
        """The loss of a checkpoint, in nats per token of the teacher."""
        text = self._reading(checkpoint)
        model: Any = load_model(checkpoint)
        kl = closeness(text.teacher, _states(model, text.rows, head_of(model)))["kl"]
        return kl * text.tokens / self._plain.tokens + text.vocabulary_nats

    def _reading(self, checkpoint: Path) -> Reading:
        """The text in the tokens of a checkpoint; made once for every vocabulary."""
        digest = tokenizer_digest(checkpoint)
        if digest == tokenizer_digest(self.teacher):
            return self._plain
        if digest not in self._readings:
            ids = encode(load_tokenizer(checkpoint), self._texts)
            rows = [torch.from_numpy(row).long() for row in ids]
            text = self._read(rows, checkpoint)

            # What the text costs beyond what it does in the teacher's tokens.
            more_nats = max(0.0, _nats(text) - self._plain_nats)
            self._readings[digest] = text._replace(vocabulary_nats=more_nats / self._plain.tokens)
        return self._readings[digest]

    def _read(self, rows: list[Tensor], tokens_of: Path) -> Reading:
        """The teacher on rows in the tokens of a checkpoint."""
        model: Any = load_model(self.teacher)
        head = read_in(model, reading(tokens_of, self.teacher))
        return Reading(rows, _states(model, rows, head), 0.0)


def _states(model: Any, rows: Any, head: Head) -> States:
    """A model's states on rows of any lengths, and its head, in fp32 on the CPU."""
    hidden_NH = hidden_of(model.to(best_device()), rows).float()
    return States(hidden_NH, head.detach().to(torch.float32))


@torch.inference_mode()
def _nats(text: Reading) -> float:
    """The teacher's cross-entropy over all labels together."""
    labels_N = torch.cat([row[1:] for row in text.rows])
    total = 0.0
    for logits_CV, labels_C in zip(logits_of(text.teacher), labels_N.split(CHUNK), strict=True):
        targets_C = labels_C.to(logits_CV.device)
        nats = torch.nn.functional.cross_entropy(logits_CV, targets_C, reduction="sum")
        total += float(nats.double())
    return total
