"""Size of a model; of a checkpoint from the headers of its safetensors files: no tensor is loaded.

bits_per_weight = size_bytes x 8 / params, embeddings included, container included.
"""

import math
from pathlib import Path
from typing import Any

from compress.doors import read_json
from compress.formats.onnx_folder import CONFIG
from compress.models.checkpoint import read_config, weight_files
from compress.models.shapes import tensor_shapes

# Buffers that older checkpoints hold: no parameters.
COMPUTED = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def size(path: Path) -> dict[str, float]:
    """`params` (a tied matrix counted once), `size_bytes`, `bits_per_weight` of a checkpoint
    directory, a GGUF file or an ONNX directory.

    `size_bytes` is all files of what ships as it is: a GGUF, an ONNX or packed directory; else the
    weight files; or `source_bytes` of `source.json` when the checkpoint was imported from a packed
    file (a GGUF teacher): that file is what its user has on disk.
    """
    params, files = _params_and_files(path)
    size_bytes = sum(file.stat().st_size for file in files)

    # Of an imported checkpoint what it was imported from.
    source = path / "source.json"
    source_bytes = read_json(source).get("source_bytes") if source.is_file() else None
    if type(source_bytes) is int and source_bytes > 0:
        size_bytes = source_bytes
    return {"params": params, "size_bytes": size_bytes, "bits_per_weight": 8 * size_bytes / params}


def _all_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _params_and_files(path: Path) -> tuple[int, list[Path]]:
    """How many parameters there are, and the files that count as the model's."""
    if path.is_file():
        from compress.models.gguf_header import read_fields

        return sum(int(tensor.n_elements) for tensor in read_fields(path)[1]), [path]
    if (path / CONFIG).is_file():
        from compress.formats.onnx_weights import decode_onnx

        return sum(weight.numel() for weight in decode_onnx(path).values()), _all_files(path)

    # A checkpoint: shapes from its headers, a head that is the embedding's matrix left out.
    config = read_config(path)
    files = weight_files(path)
    shapes: dict[str, Any] = {}
    for file in files:
        for name, shape in tensor_shapes(file).items():
            if not name.endswith(COMPUTED):
                shapes[name] = shape
    if config.get("tie_word_embeddings") and any(name.endswith(EMBEDDINGS) for name in shapes):
        shapes.pop("lm_head.weight", None)

    # Of a packed directory all files ship.
    params = sum(math.prod(shape) for shape in shapes.values())
    return params, _all_files(path) if "quantization_config" in config else files
