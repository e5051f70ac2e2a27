"""A quantized checkpoint as a compressed-tensors directory: what transformers opens by itself and
vLLM documents.

`config.json` gets a `quantization_config` with one scheme for all Linear and Embedding modules,
format pack-quantized, and of each matrix model.safetensors holds, as the package's own
`pack_to_int32` lays it out (docs.vllm.ai, "Compressed Tensors"; package version 0.20):

    NAME.weight_packed  int32, 8 codes of 4 bits or 4 of 8 bits each, as unsigned numbers
    NAME.weight_scale   fp32 (R, C / group); fp16 numbers, stored wider because both readers
                        multiply in the type they find (grids/integer.py)
    NAME.weight_zero_point  int32, 8 of 4 bits along R; asymmetric grids only
    NAME.weight_shape   (R, C)

Codes and scales are those of quant.safetensors, never computed again: Q4_0's (code - 8) * d is int4
of group 32, Q8_0's code * d int8 of group 32, negative d included. 1-D tensors stay as they are.
Embeddings are packed too, with a tied head once: unpacked they would need fp32 and be two thirds of
a small model. So the config says `dequantize: true`, and transformers unpacks while it loads; its
other way, at the first forward pass, can't initialize packed embeddings (5.23). vLLM ignores that
key and takes scales into the type it runs in: fp16 is exact. By its sources it reads packed
embeddings of symmetric grids where a model hands them the quantization config, tied ones not yet
(pull request 45535). Left out: several grids in one directory (transformers' loader takes one
scheme for all), activations as integers.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compress.formats import codes_of
from compress.models.checkpoint import (
    WEIGHTS,
    check,
    copy_beside,
    load_model,
    read_config,
    weight_files,
)
from compress.models.end_files import as_ids, as_value
from compress.models.ends import end_ids
from compress.models.tokenizer import load_tokenizer
from compress.quant.codes import Quantized, verified
from compress.quant.grids import GRIDS


def export_compressed_tensors(checkpoint: Path, out: Path, type: str = "") -> None:
    """Write the new directory `out`, of the one type there is.

    ValueError: no codes in the checkpoint, codes on several grids or on one that the format can't
    hold, codes that are not the weights.
    """
    from compressed_tensors import __version__
    from compressed_tensors.quantization import QuantizationConfig

    check(checkpoint)
    quantized = codes_of(checkpoint, "compressed_tensors")

    # One grid for all matrices.
    grid = GRIDS[next(iter(quantized.values())).grid]
    bits = 8 if grid.dtype == torch.int8 else 4
    tensors: dict[str, Tensor] = {}
    for file in weight_files(checkpoint):
        for name, w in load_file(file).items():
            if w.ndim == 1:
                tensors[name] = w
            else:
                tensors |= _packed(name, verified(name, w, quantized), bits)

    # What readers are told about them.
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": grid.stored == 1,
        "strategy": "group" if grid.block else "channel",
        "group_size": grid.block or None,
        "dynamic": False,
    }
    scheme = {"targets": ["Linear", "Embedding"], "weights": weights}
    layout = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=[],
    )
    config = read_config(checkpoint) | {
        "quantization_config": layout.model_dump() | {"dequantize": True, "version": __version__}
    }
    config["eos_token_id"] = as_value(end_ids(checkpoint))

    out.mkdir(parents=True)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    copy_beside(checkpoint, out)


def _packed(name: str, q: Quantized, bits: int) -> dict[str, Tensor]:
    """The tensors of one matrix."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    grid = GRIDS[q.grid]
    stem = name.removesuffix(".weight")
    codes = (q.codes.to(torch.int16) - grid.offset).to(torch.int8)
    scale, *zero = q.scales.view(len(codes), -1, grid.stored).unbind(-1)
    tensors = {
        f"{stem}.weight_packed": pack_to_int32(codes, bits),
        f"{stem}.weight_scale": scale.float(),
        f"{stem}.weight_shape": torch.tensor(codes.shape),
    }

    # Asymmetric grids store a zero point behind each scale.
    return tensors | {
        f"{stem}.weight_zero_point": pack_to_int32(z.to(torch.int8), bits, packed_dim=0)
        for z in zero
    }


class ReloadedDirectory:
    """A `Reloaded` (score/parity.py): the directory as transformers opens it, in fp32, on as many
    threads as torch has.
    """

    def __init__(self, path: Path, threads: int) -> None:
        self.model: Any = load_model(path)
        self.tokenizer: Any = load_tokenizer(path)

    def tensors(self) -> dict[str, Tensor]:
        return {
            name: tensor
            for name, tensor in self.model.state_dict().items()
            if name not in self.model.all_tied_weights_keys
        }

    def generate_ids(self, prompt: Sequence[int], n: int) -> list[int]:
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False
            )[0, len(prompt) :].tolist()

    def tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def eos_ids(self) -> set[int]:
        return set(
            as_ids(self.model.generation_config.eos_token_id, "the directory's generation config")
        )

    def ends_at(self, token: int) -> bool:
        return token in self.eos_ids()

    def close(self) -> None:
        self.model = None


def check_architecture(config: Any) -> None:
    """Refuses none: what can be quantized is in Linear and Embedding modules, whatever is around
    them.
    """


# For formats/__init__.py.
write, reload = export_compressed_tensors, ReloadedDirectory
