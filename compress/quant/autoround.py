"""AutoRound, through its own package: each block's rounding is learned by signed gradient descent
on the block's output error.

    w_q = s * clamp(round(w / s + v), -8, 7),  s = fp16(m / 8) with m = the block of 32's extreme
            times a learned factor
    v, factors <- sign of the gradient of |block_q(x_q) - block(x)|^2  arXiv 2309.05516, section 3,
            algorithm 1

x_q come from the quantized blocks before, x from the unquantized model. The package's symmetric
"full range" scale is signed, so its int4 group-32 result is Q4_0's own arithmetic, d = s and code =
q + 8; each result is checked to equal its codes' values exactly. Left out: its calibration sets,
export and embeddings; here it gets one block at a time, which is how it is driven by
llm-compressor. Its `amp` is off, as it would round the weights themselves to bf16, off the grid;
autocast around the call leaves them in fp32.
"""

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.quant.grids import GRIDS

BATCH = 8  # sequences a step, the package's default
NEEDED = ("auto_round", "sentencepiece")


class _Alone(nn.Module):
    """A model of one block, the least that the package takes."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([block])
        self.config, self.dtype = block.self_attn.config, torch.float32


def rounder(iterations: int, seed: int) -> Callable[..., dict[str, tuple[Tensor, Tensor]]]:
    """A function that rounds one block onto Q4_0. ValueError when the package is missing, with the
    line that installs it.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"method=autoround needs {', '.join(missing)}, not installed: pip install"
            " 'compress-lm[autoround]'"
        )

    def round_block(
        block: Any, keywords: dict[str, Any], states: list[Tensor], wanted: list[Tensor]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Codes and scales of every Linear below `block` by name, its weights as before; `states`
        and `wanted` (rows, L, H): inputs, and outputs to reach. ValueError when the package's
        values are not those of codes and scales.
        """
        from auto_round import AutoRound
        from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig

        logging.getLogger("autoround").setLevel(logging.WARNING)
        masters = {
            name: layer.weight.detach().clone()
            for name, layer in block.named_modules()
            if isinstance(layer, nn.Linear)
        }
        inputs = [x_1LH for x_BLH in states for x_1LH in x_BLH.split(1)]
        torch.manual_seed(seed)
        with torch.enable_grad():
            rounding = AutoRound(
                _Alone(block),
                tokenizer="",
                scheme={
                    "bits": 4,
                    "group_size": 32,
                    "sym": True,
                    "data_type": "int",
                    "act_bits": 16,
                },
                alg_configs=SignRoundConfig(iters=iterations, enable_quanted_input=False),
                dataset=[],
                seed=seed,
                amp=False,
                nsamples=len(inputs),
                seqlen=inputs[0].shape[1],
                batch_size=min(BATCH, len(inputs)),
                enable_torch_compile=False,
                low_cpu_mem_usage=False,
                device_map="cpu",
            )
            rounding.quantize_block(
                block, [(((x_1LH,), keywords),) for x_1LH in inputs], auto_offload=False,
                reference_output=[x_1LH for x_BLH in wanted for x_1LH in x_BLH.split(1)],
            )  # fmt: skip
        made = {}
        with torch.no_grad():
            for name, master in masters.items():
                layer, grid = block.get_submodule(name), GRIDS["q4_0"]
                scales = layer.scale.detach().half().view(len(master), -1)
                codes = grid.codes(layer.weight, scales)
                if not torch.equal(grid.decode(codes, scales), layer.weight):
                    line = "pip install auto-round==0.16.1, or use method=gptq"
                    raise ValueError(
                        f"{name}: auto-round's values are not fp16 scales times codes -8 to 7;"
                        f" {line}"
                    )
                layer.weight.copy_(master)
                made[name] = codes, scales
        return made

    return round_block
