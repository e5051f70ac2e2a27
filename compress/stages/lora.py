"""LoRA fine-tuning: low-rank updates W + (alpha / r) B A of the linear layers (arXiv 2106.09685, section 4.1), merged at the end.

With `load_in_4bit` the frozen base is held in bitsandbytes' NF4 while the adapters train (QLoRA, arXiv 2305.14314, section 3) and are then
merged into the unquantized base. The adapter itself is kept in `adapter/`, never beside config.json, where transformers would apply it a
second time. Embeddings and head are never adapted: with tied weights one of the two updates would be lost on reload.
"""

import importlib.util
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from compress.errors import ConfigError
from compress.stages.context import Context
from compress.stages.optimization import Optimization

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


LoraData = StrEnum("LoraData", ["chat", "text"])  # what the adapters learn


@dataclass
class Lora(Optimization):
    """Fine-tune with low-rank adapters and merge them."""

    rank: int = 16
    alpha: int = 32
    data: LoraData = LoraData.chat
    load_in_4bit: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank <= 0 or self.alpha <= 0:
            raise ConfigError(f"rank={self.rank}, alpha={self.alpha}: both must be above 0")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError("load_in_4bit=true needs bitsandbytes, which is not installed: pip install 'compress-lm[qlora]'")

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the merged model and `adapter/`. Metrics: as every training stage, and adapter_params_count."""
        import torch
        from peft import LoraConfig, PeftModel, get_peft_model

        from compress.checkpoint import load_model, save_model
        from compress.distill.losses import Mix
        from compress.quant.codes import check_parent

        check_parent(self, parent, "put lora before ptq and qat, on")
        torch.manual_seed(ctx.seed)
        base = load_model(parent, load="nf4" if self.load_in_4bit else "plain")
        model: Any = get_peft_model(base, LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=LINEARS, task_type="CAUSAL_LM"))
        data = ctx.chat() if self.data is LoraData.chat else ctx.text()
        metrics = self.optimize(model, Mix(kl_weight=0.0, ce_weight=1.0), data, None, ctx)
        adapter = out / "adapter"
        model.save_pretrained(str(adapter), safe_serialization=True)
        (adapter / "README.md").unlink(missing_ok=True)  # peft's card
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None  # a path of this machine
        config["target_modules"] = sorted(config["target_modules"])  # a set: its order differs from process to process
        (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        adapter_params = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.load_in_4bit:
            model = PeftModel.from_pretrained(load_model(parent), adapter)
        save_model(model.merge_and_unload(), out, tokenizer_from=parent)
        return metrics | {"adapter_params_count": adapter_params}
