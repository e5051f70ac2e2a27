"""Keep fewer experts in every block of a mixture, by router-weighted activation (REAP), and lower
how many of them see a token (`compress.prune.experts`).

Every block keeps as many, so that a plain config says it, under the name that its family has
(num_experts, num_local_experts). What a token costs is decided by `top_k` alone, what the file
costs by `experts`. The calibration text goes from block to block, so each is weighed on what the
blocks already cut send it. Experts that fewer than `floor_tokens` tokens reached are named in the
log, and with tokens and worth of all others, in `pruning.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.models.blocks import Work, row_for
from compress.prune import shape
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_without_training

if TYPE_CHECKING:
    from compress.memory import Account, Given
    from compress.prune.experts import ExpertCut


@dataclass
class PruneExperts:
    """Keep `experts` of every block, null for all, of which `top_k` see a token, null for as many
    as now; `merge` those that go into others where a block's output is then closer.
    """

    experts: int | None = None
    top_k: int | None = None
    merge: bool = True
    floor_tokens: int = 16
    calibration_sequences: int = 64
    family: ClassVar[Family] = Family.prune
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for key, least in (
            ("experts", 1),
            ("top_k", 1),
            ("floor_tokens", 1),
            ("calibration_sequences", shape.HELD_OUT),
        ):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ValueError(
                    f"prune_experts.{key} is {value}: allowed is {least} or more"
                    + (", or null for all" if key == "experts" else "")
                )
        if self.experts is None and not self.merge:
            raise ValueError(
                "prune_experts.merge is False: nothing uses it with experts=null; leave it out"
            )

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config of the result.

        ValueError when nothing would be cut, or the architecture is no mixture.
        """
        row = row_for(config, Work.experts)
        experts, top_k = shape.experts_of(config, row)
        keep, sees = self.experts or experts, self.top_k or top_k
        for key, count, most in (("experts", keep, experts), ("top_k", sees, top_k)):
            if count > most:
                raise ValueError(f"prune_experts.{key} is {count} and the model has {most}")
        if (keep, sees) == (experts, top_k):
            raise ValueError(
                f"prune_experts.experts={self.experts}, top_k={self.top_k} cuts nothing: the model"
                f" has {experts} experts of which {top_k} see a token; give less of one of them"
            )
        if keep < sees:
            raise ValueError(
                f"prune_experts.experts is {keep} and {sees} experts see a token: allowed is {sees}"
                f" or more, or a top_k of {keep} or less"
            )
        return shape.with_experts(config, row, keep, sees)

    def calibration_rows(self) -> int:
        """Rows on which experts are weighed."""
        return self.calibration_sequences

    def cost(self, sizes: Sizes) -> Cost:
        """Two passes of the calibration text: up to a block's FFN, then through it."""
        cost = cost_without_training(sizes, bytes_a_weight=2)
        return cost.with_calibration(sizes, self.calibration_sequences, passes=2)

    def memory(self, given: "Given") -> "Account":
        """A block at a time."""
        return given.walked(self.calibration_sequences)

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the checkpoint with fewer experts. ValueError for a parent that is quantized or no
        mixture, and for text that reaches too few experts of a block.
        """
        from compress.models.checkpoint import load_model, read_config
        from compress.models.experts import sentence_of
        from compress.models.walk import Walk
        from compress.prune.experts import Target, cut_experts
        from compress.quant.codes import check_parent

        check_parent(self, parent, "prune")
        config = read_config(parent)
        row = row_for(config, Work.experts)
        model: Any = load_model(parent)
        params = model.num_parameters()

        # Cut block by block, as the calibration text comes there.
        keep, top_k = shape.experts_of(self.check_shape(config), row)
        walk = Walk(
            model,
            ctx.calibration(self.calibration_sequences),
            precision=ctx.precision,
            log=lambda line: ctx.log(f"{ctx.label}: {line}"),
        )
        cuts = cut_experts(walk, row, Target(keep, top_k, self.floor_tokens, self.merge))
        for cut in cuts:
            if line := sentence_of(cut.block, cut.tokens_E, self.floor_tokens):
                ctx.log(f"{ctx.label}: {line}")

        # What the config says of it.
        for key, value in shape.with_experts(model.config.to_dict(), row, keep, top_k).items():
            if key in (*row.experts_keys, row.top_k_key):
                setattr(model.config, key, value)
        shape.save_checked(model, out, parent)
        (out / "pruning.json").write_text(json.dumps(self._note(cuts), indent=2) + "\n")
        return {
            "params_removed_fraction": 1 - model.num_parameters() / params,
            **self._metrics(cuts, shape.experts_of(config, row), (keep, top_k)),
        }

    def _note(self, cuts: "list[ExpertCut]") -> dict[str, Any]:
        """What pruning.json says."""
        from compress.models.experts import below

        return {
            "blocks": [
                {
                    "block": cut.block,
                    "experts_kept": cut.kept,
                    "tokens": cut.tokens_E.tolist(),
                    "worth": cut.worth_E.tolist(),
                    "merged_into": cut.merged,
                    "error_dropped": cut.error_dropped,
                    "error": cut.error,
                    "experts_below_floor": below(cut.tokens_E, self.floor_tokens),
                }
                for cut in cuts
            ]
        }

    def _metrics(
        self, cuts: "list[ExpertCut]", before: tuple[int, int], after: tuple[int, int]
    ) -> dict[str, float]:
        """What is known of the cut; experts and how many see a token, before and after."""
        tokens = [count for cut in cuts for count in cut.tokens_E.tolist()]
        errors = [cut.error for cut in cuts]
        return {
            "experts_removed_count": float(before[0] - after[0]),
            "top_k_lowered_count": float(before[1] - after[1]),
            "experts_unseen_count": float(tokens.count(0)),
            "experts_below_floor_count": float(sum(n < self.floor_tokens for n in tokens)),
            "experts_merged_count": float(sum(len(cut.merged) for cut in cuts)),
            "ffn_error_mean_fraction": sum(errors) / len(errors),
            "ffn_error_max_fraction": max(errors),
        }
