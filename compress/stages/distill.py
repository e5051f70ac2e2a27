"""Knowledge distillation: the parent learns the teacher's distribution on packed text, from the
teacher's cached signal.

loss = kl_weight * T^2 D(teacher, student) + ce_weight * cross-entropy + hidden_weight * (last
hidden states' squared distance), with D and T as in `compress/distill/losses.py`. Forward KL on all
positions is what recovers pruned models best (Minitron, arXiv 2407.14679, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from compress.distill.settings import Divergence, Features, Signal
from compress.errors import ConfigError
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_of_training
from compress.stages.training import Optimization, open_source, open_student

if TYPE_CHECKING:
    from compress.memory import Account, Given


@dataclass
class Distill(Optimization):
    """Recover a pruned student from its teacher."""

    kl_weight: float = 0.9
    ce_weight: float = 0.1
    # needs a student of the teacher's hidden size, and signal.scheme hidden or online
    hidden_weight: float = 0.0
    features: Features = field(default_factory=Features)
    divergence: Divergence = Divergence.forward_kl
    jsd_beta: float = 0.5  # 0 is reverse, 1 forward KL in the limit
    temperature: float = 1.0
    signal: Signal = field(default_factory=Signal)
    # share of the steps whose text the student writes itself; needs signal.scheme=online
    on_policy: float = 0.0
    prompt_tokens: int = 64  # of each row, before the student writes on
    # false keeps the teacher's: a short run at a high rate spoils the tokens it hardly sees
    train_embeddings: bool = True
    family: ClassVar[Family] = Family.recover
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()

        # Weights of the loss, and the numbers in it.
        weights = (self.kl_weight, self.ce_weight, self.hidden_weight)
        if min(weights) < 0 or (
            self.kl_weight + self.hidden_weight == 0 and not self.features.used
        ):
            raise ConfigError(
                f"kl_weight, ce_weight, hidden_weight = {weights}: none may be negative, and"
                " kl_weight, hidden_weight or a feature must be above 0"
            )
        if self.temperature <= 0 or not 0 < self.jsd_beta < 1:
            raise ConfigError(
                f"temperature={self.temperature} must be above 0 and jsd_beta={self.jsd_beta}"
                " between 0 and 1"
            )

        # What the teacher's signal must hold for them.
        if self.divergence is not Divergence.forward_kl and self.signal.scheme == "sampled":
            raise ConfigError(
                f"divergence={self.divergence} needs all of the teacher's probabilities; set"
                " signal.scheme to hidden or online"
            )
        if self.hidden_weight and self.signal.scheme == "sampled":
            raise ConfigError(
                f"hidden_weight={self.hidden_weight} needs the teacher's hidden states; set"
                " signal.scheme to hidden or online"
            )
        if self.features.used and (self.signal.scheme != "online" or self.on_policy):
            raise ConfigError(
                "features need the teacher's inner states on given text; set signal.scheme=online"
                " and on_policy=0"
            )

        # The student's own text.
        if not 0 <= self.on_policy <= 1 or self.prompt_tokens < 1:
            raise ConfigError(
                f"on_policy={self.on_policy} must be in [0, 1] and"
                f" prompt_tokens={self.prompt_tokens} at least 1"
            )
        if self.on_policy and self.signal.scheme != "online":
            raise ConfigError(
                f"on_policy={self.on_policy} needs the teacher at every step; set"
                " signal.scheme=online"
            )

    def cost(self, sizes: Sizes) -> Cost:
        """Training with the teacher's signal."""
        return cost_of_training(
            sizes,
            self.tokens,
            bytes_a_weight=2,
            signal=self.signal,
            signal_params=sizes.teacher_params,
        )

    def memory(self, given: Given) -> Account:
        """Training every weight, with the teacher's signal."""
        shape = given.parent
        embeddings = shape.head * (1 if shape.tied else 2)
        frozen = 0 if self.train_embeddings else embeddings
        return self.training_memory(
            given, shape.params - frozen, frozen, signal=self.signal, signal_of=given.teacher
        )

    def check_trainer(self, parallel: str, precision: str, seq_len: int) -> None:
        """ConfigError where the student's own text or the teacher's inner states need a whole
        model, and for prompts as long as a row.
        """
        if self.on_policy and (self.prompt_tokens >= seq_len or parallel == "fsdp2"):
            raise ConfigError(
                f"on_policy={self.on_policy} needs prompt_tokens={self.prompt_tokens} below"
                f" data.seq_len={seq_len}, and a whole model: trainer=auto or ddp"
            )
        if self.features.used and (parallel == "fsdp2" or precision == "bf16_stochastic"):
            raise ConfigError("features need whole fp32 models: trainer=auto or ddp")

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the distilled student. Metrics: steps_count, tokens_count, loss_first_nats,
        loss_last_nats.
        """
        from compress.distill.batches import common_vocabulary
        from compress.distill.features import FeatureLoss
        from compress.distill.losses import Mix
        from compress.distill.online import OnlineTeacher, with_rollouts
        from compress.models.checkpoint import read_config, save_model
        from compress.models.ends import end_ids
        from compress.quant.codes import check_parent

        # What parent and teacher must be for what is asked.
        check_parent(self, parent, "distill before quantizing, or use the qat stage, on")
        if self.hidden_weight:
            width, teacher_width = (
                read_config(path)["hidden_size"] for path in (parent, ctx.teacher)
            )
            if width != teacher_width:
                raise ValueError(
                    f"{parent}: hidden_weight={self.hidden_weight} needs a student of the teacher's"
                    " hidden size; set it to 0"
                )
        vocabulary = common_vocabulary(parent, ctx.teacher)

        # Student, room for its training, and teacher: a signal takes hours, so room is asked first.
        data = ctx.text()
        sequences = self.sequences(ctx.seq_len)
        model = open_student(parent, ctx)
        if not self.train_embeddings:
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                embeddings.weight.requires_grad_(False)
        self.reserve(model, ctx)
        source = open_source(
            self.signal, ctx, ctx.teacher, data, sequences, parent, self.temperature
        )

        # The loss, and what is put around batches and loss.
        mix = Mix(
            self.kl_weight,
            self.ce_weight,
            self.divergence.value,
            self.temperature,
            self.jsd_beta,
            self.hidden_weight,
        )
        wraps: dict[str, Any] = {}
        if isinstance(source, OnlineTeacher) and self.on_policy:
            wraps["wrap_batches"] = partial(
                with_rollouts,
                model=model,
                teacher=source,
                share=self.on_policy,
                prompt_tokens=self.prompt_tokens,
                ends=end_ids(parent),
                seed=ctx.seed,
                vocabulary=vocabulary,
            )
        if isinstance(source, OnlineTeacher) and self.features.used:
            wraps["wrap_loss"] = partial(
                FeatureLoss, student=model, teacher=source, features=self.features, seed=ctx.seed
            )

        metrics = self.optimize(model, mix, data, source, ctx, vocabulary=vocabulary, **wraps)
        save_model(model, out, tokenizer_from=parent)
        return metrics
