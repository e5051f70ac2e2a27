"""Knowledge distillation: the parent learns the teacher's distribution on packed text, from the teacher's cached signal.

loss = kl_weight * KL(teacher || student) + ce_weight * cross-entropy + hidden_weight * (last hidden states' squared distance).
Forward KL on all positions is what recovers pruned models best (Minitron, arXiv 2407.14679, section 4.3).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.errors import ConfigError
from compress.stages.context import Context
from compress.stages.optimization import Optimization


@dataclass
class Distill(Optimization):
    """Recover a pruned student from its teacher."""

    kl_weight: float = 0.9
    ce_weight: float = 0.1
    hidden_weight: float = 0.0  # needs a student of the teacher's hidden size
    train_embeddings: bool = True  # false keeps the teacher's: a short run at a high rate spoils the tokens it hardly sees

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = (self.kl_weight, self.ce_weight, self.hidden_weight)
        if min(weights) < 0 or self.kl_weight + self.hidden_weight == 0:
            raise ConfigError(
                f"kl_weight, ce_weight, hidden_weight = {weights}: none may be negative, and kl_weight or hidden_weight must be above 0"
            )

    def check_shape(self, config: dict[str, Any]) -> dict[str, Any]:
        """Distillation keeps the shape."""
        return config

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the distilled student. Metrics: steps_count, tokens_count, loss_first_nats, loss_last_nats."""
        from compress.checkpoint import load_model, read_config, save_model
        from compress.distill.signal import Signals
        from compress.distill.steps import make_batches, make_loss
        from compress.quant.fake import is_quantized
        from compress.train.loop import train

        if is_quantized(parent):
            raise ValueError(f"{parent} is quantized; distill before quantizing, or use the qat stage on the unquantized parent")
        if self.hidden_weight and read_config(parent)["hidden_size"] != read_config(ctx.teacher)["hidden_size"]:
            raise ValueError(f"{parent}: hidden_weight={self.hidden_weight} needs a student of the teacher's hidden size; set it to 0")
        data, sequences = ctx.text(), self.sequences(ctx.seq_len)
        signals = Signals(ctx.signals, ctx.teacher, data, seed=ctx.seed, hidden=self.hidden_weight > 0, precision=ctx.precision, log=ctx.log)
        signals.make(min(sequences, len(data.ids)))
        model = load_model(parent)
        if not self.train_embeddings:
            for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
                embeddings.weight.requires_grad_(False)
        batches = make_batches(data, signals, seed=ctx.seed, sequences=sequences, batch=self.batch_sequences, micro=self.micro_batch_sequences)
        loss = make_loss(kl_weight=self.kl_weight, ce_weight=self.ce_weight, hidden_weight=self.hidden_weight)
        result = train(model, loss, batches, **self.loop_arguments(ctx))
        save_model(model, out, tokenizer_from=parent)
        return self.metrics(result, ctx)
