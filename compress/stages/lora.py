"""LoRA fine-tuning: low-rank updates W + (alpha / r) B A of the linear layers (arXiv 2106.09685,
section 4.1), merged at the end.

With `load_in_4bit` the frozen base is held in bitsandbytes' NF4 while the adapters train (QLoRA,
arXiv 2305.14314, section 3) and are then merged into the unquantized base. The adapter itself is
kept in `adapter/`, never beside config.json, where transformers would apply it a second time.
Adapted is every linear layer of the decoder blocks, whatever its name, and the matrices of experts;
a line says what is not. Embeddings and head are never adapted: with tied weights one of the two
updates would be lost on reload.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from compress.errors import ConfigError
from compress.stages.context import Context
from compress.stages.stage import Cost, Family, Sizes, cost_of_training
from compress.stages.training import Optimization

if TYPE_CHECKING:
    from torch import nn

    from compress.memory import Account, Given

LoraData = StrEnum("LoraData", ["chat", "text"])  # what the adapters learn


class Targets(NamedTuple):
    """Which matrices of the decoder blocks get adapters, by the ends of their names."""

    linears: list[str]  # linear layers, by their last name
    # matrices that a block stacks for its experts (E, R, C), by their path inside of the block
    experts: list[str]
    outside: list[str]  # whole names of layers that share such a last name and lie in no block
    # what has two dimensions or more and gets none, by its path inside of the block
    unadapted: list[str]


def targets_of(model: Any) -> Targets:
    """What there is to adapt in a causal language model. ValueError when that is nothing."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from compress.models.blocks import blocks_of

    # Every parameter of the blocks falls under one of three.
    linears = set()
    experts = set()
    unadapted = set()
    inside = set()
    for block in blocks_of(model):
        for path, module in block.named_modules():
            inside.add(id(module))
            place, _, last = path.rpartition(".")
            # a state-space mixer's kernel takes the bare weight of its last projection, past any
            # adapter
            bare = last == "out_proj" and hasattr(block.get_submodule(place), "conv1d")
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, nn.Linear | Conv1D) and not bare:
                    linears.add(last)
                elif parameter.ndim == 3 and name != "weight":
                    experts.add(f"{path}.{name}")
                elif parameter.ndim > 1:
                    unadapted.add(f"{path}.{name}")

    if not linears:
        raise ValueError(
            f"{type(model).__name__} has no linear layer in its blocks that an adapter fits; use a"
            " distill stage"
        )

    # Adapters go by last names, which layers elsewhere may share.
    outside = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in linears and id(module) not in inside
    ]
    return Targets(sorted(linears), sorted(experts), outside, sorted(unadapted))


def adapted(base: nn.Module, targets: Targets, rank: int, alpha: int) -> Any:
    """`base` under fresh adapters, drawn from torch's generator, and frozen but for them."""
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    # GPT-2 keeps its weights transposed.
    transposed = any(isinstance(module, Conv1D) for module in base.modules())
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets.linears,
        target_parameters=targets.experts or None,
        exclude_modules=targets.outside or None,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config)


def _same_everywhere(adapter: Path) -> None:
    """Take out of a saved adapter what differs from machine to machine or process to process."""
    (adapter / "README.md").unlink(missing_ok=True)  # peft's card
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = None  # a path of this machine

    # Sets, whose order differs from process to process.
    for key in ("target_modules", "target_parameters", "exclude_modules"):
        config[key] = sorted(config[key]) if config[key] else config[key]
    (adapter / "adapter_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n"
    )


@dataclass
class Lora(Optimization):
    """Fine-tune with low-rank adapters and merge them."""

    rank: int = 16
    alpha: int = 32
    data: LoraData = LoraData.chat
    load_in_4bit: bool = False
    family: ClassVar[Family] = Family.recover
    leaves_a_grid: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank <= 0 or self.alpha <= 0:
            raise ConfigError(f"rank={self.rank}, alpha={self.alpha}: both must be above 0")
        if self.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "load_in_4bit=true needs bitsandbytes, which is not installed: pip install"
                " 'compress-lm[qlora]'"
            )

    @property
    def reads_chat(self) -> bool:
        """Whether it learns the recipe's chat data."""
        return self.data is LoraData.chat

    def cost(self, sizes: Sizes) -> Cost:
        """Training without a teacher; counted as if every weight were trained."""
        return cost_of_training(sizes, self.tokens, bytes_a_weight=2)

    def memory(self, given: Given) -> Account:
        """Training adapters on a base that stays, whose matrices are bf16 under autocast."""
        shape = given.parent
        adapters = self.rank * sum(
            sum(sizes) for block in shape.blocks for sizes in block if len(sizes) == 2
        )
        short = given.setup.precision != "fp32" and given.setup.parallel != "fsdp2"
        frozen_bytes = (2 * shape.matrices + 4 * shape.outside) / shape.params if short else 4.0
        if self.load_in_4bit:
            frozen_bytes = (0.52 * shape.matrices + 2 * shape.outside) / shape.params
        return self.training_memory(given, adapters, shape.params, frozen_bytes=frozen_bytes)

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the merged model and `adapter/`. Metrics: as every training stage, and
        adapter_params_count.
        """
        import torch
        from peft import PeftModel

        from compress.distill.losses import Mix
        from compress.models.checkpoint import load_model, save_model
        from compress.quant.codes import check_parent

        check_parent(self, parent, "put lora before ptq and qat, on")

        # The frozen base, and a line of what is adapted and what is not.
        torch.manual_seed(ctx.seed)
        base = self._base(parent, ctx)
        is_short = any(p.dtype == torch.bfloat16 for p in base.parameters())
        targets = targets_of(base)
        ctx.log(f"{ctx.label}: adapters on {', '.join(targets.linears + targets.experts)}")
        if targets.unadapted:
            ctx.log(f"{ctx.label}: left as they are: {', '.join(targets.unadapted)}")

        model = adapted(base, targets, self.rank, self.alpha)
        data = ctx.chat() if self.reads_chat else ctx.text()
        metrics = self.optimize(model, Mix(kl_weight=0.0, ce_weight=1.0), data, None, ctx)
        adapter_params = sum(p.numel() for p in model.parameters() if p.requires_grad)

        adapter = out / "adapter"
        model.save_pretrained(str(adapter), safe_serialization=True)
        _same_everywhere(adapter)

        # Merged into the fp32 base.
        if is_short or self.load_in_4bit:
            model = PeftModel.from_pretrained(load_model(parent), adapter)
        save_model(model.merge_and_unload(), out, tokenizer_from=parent)
        return metrics | {"adapter_params_count": adapter_params}

    def _base(self, parent: Path, ctx: Context) -> Any:
        """The model that stays as it is while adapters train. Under bf16 autocast its matrices may
        be bf16 themselves: they are computed with so anyway. fsdp2 wants one type in a block.
        """
        from compress.models.checkpoint import load_model, load_stored

        if self.load_in_4bit:
            return load_model(parent, load="nf4")
        if ctx.precision == "fp32" or ctx.parallel == "fsdp2":
            return load_model(parent)

        # Adapters are added to stacked experts themselves, of one type with them.
        base = load_stored(parent)
        return load_model(parent) if targets_of(base).experts else base
