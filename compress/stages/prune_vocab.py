"""Cut the vocabulary: tokens that the training text, and data.vocabulary beside it, use least and
their teacher expects least go, leaves of the merge tree first (`compress/prune/vocabulary.py`),
with their rows of embedding and head.

Special tokens and all bytes stay, so that any text can be written as before, only in more tokens;
what that costs is a loss in bits per byte, not in KL a token, which means nothing across
vocabularies. Stages behind this one read text in the student's tokens and their teacher in these
(`compress/models/reading.py`). In a small model the embedding is much: 21% of SmolLM2-135M, two
thirds of Gemma-3-270M; and the head is read at every step.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.prune import shape
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_without_training

if TYPE_CHECKING:
    from compress.memory import Account, Given
    from compress.prune.vocabulary import Usage
    from compress.train.packed import Packed


@dataclass
class PruneVocab:
    """Keep `ids` tokens, snapped to the nearest `multiple`."""

    ids: int = 32768
    multiple: int = 64
    # Of training text, on which the teacher says what else it expects; 0: what text uses alone.
    calibration_sequences: int = 32
    family: ClassVar[Family] = Family.prune
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key in ("ids", "multiple"):
            if getattr(self, key) < 1:
                raise ValueError(f"prune_vocab.{key} is {getattr(self, key)}: allowed is 1 or more")
        if self.calibration_sequences < 0:
            raise ValueError(
                f"prune_vocab.calibration_sequences is {self.calibration_sequences}: allowed is 0"
                " or more"
            )

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result. ValueError when nothing would be cut."""
        present, target = config["vocab_size"], shape.snap(self.ids, self.multiple)
        if target >= present:
            raise ValueError(
                f"prune_vocab.ids is {self.ids} ({target} as a multiple of {self.multiple}) and the"
                f" model has {present} ids, so that nothing would be cut:"
                f" {shape.sizes_that_cut(self.multiple, present - 1)}"
            )
        return {**config, "vocab_size": target}

    def check_tokenizer(self, checkpoint: Path) -> None:
        """ValueError for a tokenizer that can't be cut so far: of another kind than BPE with all
        bytes, or with fewer tokens, or more that must stay.
        """
        from compress.prune.tokenizer_cut import read_bpe

        bpe = read_bpe(checkpoint)
        target = shape.snap(self.ids, self.multiple)
        if not len(bpe.protected) <= target < len(bpe.ids):
            raise ValueError(
                f"prune_vocab.ids is {self.ids} ({target} as a multiple of {self.multiple}); the"
                f" tokenizer has {len(bpe.ids):,} tokens, of which {len(bpe.protected):,} bytes and"
                " special tokens stay:"
                f" {shape.sizes_that_cut(self.multiple, len(bpe.ids) - 1, len(bpe.protected))}"
            )

    def calibration_rows(self) -> int:
        """Rows on which the teacher says what it expects; tokens are counted on all of the text."""
        return self.calibration_sequences

    def cost(self, sizes: Sizes) -> Cost:
        """A pass of the calibration text; rows are copied."""
        cost = cost_without_training(sizes, bytes_a_weight=2)
        return cost.with_calibration(sizes, self.calibration_sequences)

    def memory(self, given: Given) -> Account:
        """Text on its way through the teacher, then the fp32 model as it is opened."""
        from compress.memory import BASE, Account, Item, home, opened, walk
        from compress.prune.vocabulary import CHUNK_TOKENS

        phases = {"open": [*BASE, *opened(given.parent, given.stored_bytes)]}
        if self.calibration_sequences:
            logits = 4 * CHUNK_TOKENS * given.teacher.vocabulary
            phases["expected"] = [
                *BASE,
                *home(given.teacher),
                *walk(given.teacher, self.calibration_sequences, given.seq_len),
                Item("a chunk of logits and its probabilities", device=2 * logits),
            ]
        return Account(phases)

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the checkpoint of the smaller vocabulary. ValueError for a parent that is quantized
        or whose tokenizer can't be cut so far.
        """
        import torch

        from compress.formats.gguf_tokenizer import keep_pre_name
        from compress.models.checkpoint import load_model
        from compress.prune.tokenizer_cut import read_bpe, write_cut
        from compress.prune.vocabulary import kept_ids
        from compress.quant.codes import check_parent

        check_parent(self, parent, "prune")
        self.check_tokenizer(parent)

        # Which tokens stay, by how often text uses and the teacher expects them.
        bpe = read_bpe(parent)
        usage = self.usage(parent, ctx)
        target = shape.snap(self.ids, self.multiple)
        kept = kept_ids(bpe.ids, bpe.merges, usage, target, bpe.protected)
        metrics = {"text_growth_fraction": kept.tokens_added / usage.counts.total()}
        if expected := sum(usage.expected.values()):
            stays = sum(usage.expected[i] for i in kept.ids)
            metrics["expected_dropped_fraction"] = 1 - stays / expected

        model: Any = load_model(parent)

        # Files first: config.json names the ends by their new ids.
        params = model.num_parameters()
        with torch.no_grad():
            cut_rows(model, torch.tensor(kept.ids))
        out.mkdir(parents=True, exist_ok=True)
        model.config.eos_token_id = write_cut(parent, out, kept.ids)
        shape.save_checked(model, out, out)
        keep_pre_name(parent, out)

        return {
            "ids_removed_count": float(len(bpe.ids) - target),
            "params_removed_fraction": 1 - model.num_parameters() / params,
        } | metrics

    def usage(self, parent: Path, ctx: Context) -> Usage:
        """What decides which of a checkpoint's tokens stay."""
        from compress.models.checkpoint import load_stored
        from compress.models.reading import read_in, reading
        from compress.prune.vocabulary import Usage, expected_counts

        counts = counts_of(ctx.text(), ctx.vocabulary())
        if not self.calibration_sequences:
            return Usage(counts, {})
        teacher = load_stored(ctx.teacher)
        expected = expected_counts(
            teacher,
            read_in(teacher, reading(parent, ctx.teacher)),
            ctx.calibration(self.calibration_sequences),
            ctx.precision,
            lambda line: ctx.log(f"{ctx.label}: {line}"),
        )
        return Usage(counts, expected)


def counts_of(*texts: Packed | None) -> Counter[int]:
    """How often each id occurs in texts, of which some may be None."""
    counts: Counter[int] = Counter()
    for text in texts:
        if text is not None:
            ids, numbers = text.ids.unique(return_counts=True)
            counts.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
    return counts


def cut_rows(model: Any, kept_S: Any) -> None:
    """Keep these rows of embedding and head, tied or not, in place; the config follows."""
    import torch

    from compress.prune.tokenizer_cut import renumbered

    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    tied = output.weight is embedding.weight
    embedding.weight = torch.nn.Parameter(embedding.weight[kept_S])
    embedding.num_embeddings = len(kept_S)
    embedding.padding_idx = None

    # A head of its own, or the same matrix.
    output.weight = embedding.weight if tied else torch.nn.Parameter(output.weight[kept_S])
    output.out_features = len(kept_S)
    if getattr(output, "bias", None) is not None:
        output.bias = torch.nn.Parameter(output.bias[kept_S])

    # Ids in the config, and how many there are.
    new_ids = {old: new for new, old in enumerate(kept_S.tolist())}
    for key, value in renumbered(model.config.to_dict(), new_ids.get).items():
        if key.endswith(("token_id", "token_ids")):
            setattr(model.config, key, value)
    model.config.vocab_size = len(kept_S)
