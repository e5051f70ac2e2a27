"""Size of a model, embeddings and container included: bits_per_weight = size_bytes x 8 / params."""

from pathlib import Path

from compress.doors import read_json
from compress.formats.runtimes import runtime_of
from compress.models.model import runtime_at


def size(path: Path) -> dict[str, float]:
    """`params` (a tied matrix counted once), `size_bytes`, `bits_per_weight` of a checkpoint
    directory, a GGUF file or an ONNX directory.

    `size_bytes` is all files of what ships as it is: a GGUF, an ONNX or packed directory; else the
    weight files; or `source_bytes` of `source.json` when the checkpoint was imported from a packed
    file (a GGUF teacher): that file is what its user has on disk.
    """
    params, files = runtime_of(runtime_at(path)).params_and_files(path)
    size_bytes = sum(file.stat().st_size for file in files)

    # Of an imported checkpoint what it was imported from.
    source = path / "source.json"
    source_bytes = read_json(source).get("source_bytes") if source.is_file() else None
    if type(source_bytes) is int and source_bytes > 0:
        size_bytes = source_bytes
    return {"params": params, "size_bytes": size_bytes, "bits_per_weight": 8 * size_bytes / params}
