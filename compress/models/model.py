"""A model by its path and digest, and what runs it: what is known of one before anything that runs
it is imported.
"""

from dataclasses import dataclass
from pathlib import Path

from compress.models.gguf_header import check_file
from compress.store import sha256_file


@dataclass(frozen=True)
class Model:
    """A checkpoint directory, an exported one or a GGUF file, with the digest of its weights; a
    checkpoint made of a GGUF names that as well.
    """

    path: Path
    digest: str
    runtime: str = "torch"  # or "llama.cpp", "onnxruntime"
    gguf: Path | None = None


def runtime_at(path: Path) -> str:
    """What runs the model at a path: llama.cpp a file, ONNX Runtime GenAI a directory with its
    configuration, torch any other.
    """
    if path.is_file():
        return "llama.cpp"
    return "onnxruntime" if (path / "genai_config.json").is_file() else "torch"


def gguf_model(path: Path) -> Model:
    """A GGUF file, identified by its bytes. ValueError as `gguf_header.check_file`."""
    check_file(path)
    return Model(path.absolute(), sha256_file(path), "llama.cpp")
