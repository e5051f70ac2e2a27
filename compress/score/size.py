"""Size of a model; of a checkpoint from the headers of its safetensors files: no tensor is loaded.

bits_per_weight = size_bytes x 8 / params, embeddings included, container included.
"""

import math
from pathlib import Path

from compress.doors import read_json
from compress.formats.onnx_folder import CONFIG
from compress.models.checkpoint import read_config, weight_files
from compress.models.shapes import tensor_shapes

COMPUTED = (
    "rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
)  # buffers that older checkpoints hold: no parameters
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


def size(path: Path) -> dict[str, float]:
    """`params` (a tied matrix counted once), `size_bytes`, `bits_per_weight` of a checkpoint
    directory, a GGUF file or an ONNX directory.

    `size_bytes` is all files of what ships as it is: a GGUF, an ONNX or packed directory; else the
    weight files; or `source_bytes` of `source.json` when the checkpoint was imported from a packed
    file (a GGUF teacher): that file is what its user has on disk.
    """
    params, files = _params_and_files(path)
    source = path / "source.json"
    imported = read_json(source).get("source_bytes") if source.is_file() else None
    size_bytes = (
        imported
        if type(imported) is int and imported > 0
        else sum(file.stat().st_size for file in files)
    )
    return {"params": params, "size_bytes": size_bytes, "bits_per_weight": 8 * size_bytes / params}


def _all_files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def _params_and_files(path: Path) -> tuple[int, list[Path]]:
    if path.is_file():
        from compress.models.gguf_header import read_fields

        return sum(int(tensor.n_elements) for tensor in read_fields(path)[1]), [path]
    if (path / CONFIG).is_file():
        from compress.formats.onnx_weights import decode_onnx

        return sum(weight.numel() for weight in decode_onnx(path).values()), _all_files(path)
    config, files = read_config(path), weight_files(path)
    shapes = {
        name: shape
        for file in files
        for name, shape in tensor_shapes(file).items()
        if not name.endswith(COMPUTED)
    }
    if config.get("tie_word_embeddings") and any(name.endswith(EMBEDDINGS) for name in shapes):
        shapes.pop("lm_head.weight", None)
    return sum(math.prod(shape) for shape in shapes.values()), (
        _all_files(path) if "quantization_config" in config else files
    )
