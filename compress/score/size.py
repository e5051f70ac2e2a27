"""Size of a checkpoint, from the headers of its safetensors files: no tensor is loaded.

A safetensors file begins with 8 bytes n (little endian) and n bytes of JSON {tensor: {dtype, shape, data_offsets}}.
bits_per_weight = size_bytes x 8 / params, embeddings included, container included.
"""

import json
import math
from pathlib import Path

from safetensors import safe_open

from compress.checkpoint import read_config, weight_files


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's floating-point tensors, and of what compressed-tensors packed. ValueError when it is damaged."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is damaged: its header says {length} bytes, the file has {file.stat().st_size}; copy it again")
        header = json.loads(stream.read(length))
    with safe_open(file, "pt") as tensors:  # of a packed matrix the shape is a tensor by itself, and scales are no parameters
        packed = {name: tuple(tensors.get_tensor(name).tolist()) for name in header if name.endswith(".weight_shape")}
    header.pop("__metadata__", None)
    return packed | {name: tuple(t["shape"]) for name, t in header.items() if "F" in t["dtype"] and not name.endswith(".weight_scale")}


def size(checkpoint_dir: Path) -> dict[str, float]:
    """`params` (a tied head counted once), `size_bytes`, `bits_per_weight` of a checkpoint directory.

    `size_bytes` is the weight files' size; of a packed directory all its files', since it ships as it is; or `source_bytes` of
    `source.json` when the checkpoint was imported from a packed file (a GGUF teacher): that file is what its user has on disk.
    """
    files = weight_files(checkpoint_dir)
    shapes = {name: shape for file in files for name, shape in tensor_shapes(file).items()}
    if read_config(checkpoint_dir).get("tie_word_embeddings") and "model.embed_tokens.weight" in shapes:
        shapes.pop("lm_head.weight", None)
    params = sum(math.prod(shape) for shape in shapes.values())
    source = checkpoint_dir / "source.json"
    packed = json.loads(source.read_text()).get("source_bytes") if source.is_file() else None
    counted = checkpoint_dir.iterdir() if "quantization_config" in read_config(checkpoint_dir) else files
    size_bytes = packed or sum(file.stat().st_size for file in counted)
    return {"params": params, "size_bytes": size_bytes, "bits_per_weight": 8 * size_bytes / params}


def gguf_size(file: Path) -> dict[str, float]:
    """`params`, `size_bytes`, `bits_per_weight` of a GGUF file, tokenizer and header included in the bytes."""
    from compress.export.gguf import read_fields

    params = sum(int(tensor.n_elements) for tensor in read_fields(file)[1])
    size_bytes = file.stat().st_size
    return {"params": params, "size_bytes": size_bytes, "bits_per_weight": 8 * size_bytes / params}
