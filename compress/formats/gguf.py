"""A checkpoint as one GGUF file for llama.cpp, and back.

Names: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`; tied embeddings are in it once,
no `output.weight`. Rotary layout: HF Llama rotates row j with row j + d/2 of a head (d: head
width), llama.cpp's "llama" architecture rows 2j and 2j + 1; so q and k rows are interleaved on the
way out and back on the way in. Codes and scales are rows too: they move along and are never
computed again. qwen2 keeps HF's layout. All matrices, the embedding too, get the type asked for:
F16, or a grid of `compress/quant/grids/`, whose modules say what their blocks hold; MIXED gives
each matrix the type of its codes. 1-D tensors stay F32. Left out: llama.cpp's own mixtures such as
Q4_K_M (Q4_K here is Q4_K throughout).

This module writes ARCHITECTURES in their plain form; what else is in formats/families.py, rope
scaling of Llama included, goes through llama.cpp's converter (formats/converter.py), which the
tests hold against this one.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from compress.formats import check_config, codes_of, converter
from compress.formats.families import check_family
from compress.formats.gguf_tokenizer import (
    check_tokenizer,
    end_keys,
    templates_of,
    write_tokenizer,
)
from compress.formats.llama_conversion import converter_of
from compress.models.checkpoint import check, head_dim, read_config, weight_files
from compress.models.ends import end_ids
from compress.models.gguf_header import read_fields
from compress.models.model_config import meta_model
from compress.models.shapes import tensor_shapes
from compress.models.tokenizer import load_tokenizer
from compress.quant.codes import Quantized, verified
from compress.quant.grids import GRIDS
from compress.scratch import Scratch

# ggml type of the matrices -> llama_ftype, the file's main type
TYPES = {
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q4_K": 14,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "MXFP4": 38,
    "NVFP4": 39,
}
TENSOR_BYTES = 160  # name, shape, place and padding of a tensor
MIXED = "MIXED"  # every matrix in the type of its own codes
# HF model_type -> general.architecture
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2"}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | {
    f"model.layers.{{}}.{name}": f"blk.{{}}.{short}"
    for name, short in {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }.items()
}
_BACK = {short: name for name, short in _NAMES.items()}


def export_gguf(checkpoint: Path, out_file: Path, type: str) -> None:
    """Writes `checkpoint` as `out_file` in `type`, one of TYPES or MIXED.

    With `quant.safetensors` in the checkpoint, its codes and scales are written as they are.
    ValueError: a type that is unknown or not their grid, MIXED without codes, an architecture,
    tensor or tokenizer without a place in the file, values that the type can't hold.
    """
    import gguf

    check(checkpoint)
    quantized = codes_of(checkpoint, f"gguf:{type}")
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
    main_type = _main_type(quantized) if quantized else type
    if not is_plain(config):
        converter.convert(checkpoint, out_file, type, TYPES[main_type], quantized)
        return
    part = out_file.with_name(out_file.name + ".part")
    writer = _described(checkpoint, config, main_type, part)

    # Tensors under llama.cpp's names, then the file in one go.
    for name, raw, kind in _packed(checkpoint, type, quantized, config):
        short = _renamed(
            name, _NAMES, f"tensor {name} has no place in a GGUF; export this model as Hugging Face"
        )
        writer.add_tensor(short, raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(part, out_file)


def _main_type(quantized: dict[str, Quantized]) -> str:
    """The type that most weights are of."""
    weights_of: Counter[str] = Counter()
    for q in quantized.values():
        weights_of[q.grid.upper()] += q.codes.numel()
    return max(TYPES, key=lambda kind: weights_of[kind])


def _described(checkpoint: Path, config: Any, type: str, file: Path) -> Any:
    """A GGUFWriter to `file` that knows all but the tensors."""
    import gguf

    writer = gguf.GGUFWriter(file, architecture(config))
    writer.add_name(f"compress {config.model_type}")
    writer.add_file_type(TYPES[type])
    writer.add_quantization_version(2)

    # The shape of the model.
    width = head_dim(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)

    tokenizer = load_tokenizer(checkpoint)
    write_tokenizer(writer, tokenizer, config.vocab_size, end_ids(checkpoint, tokenizer))
    return writer


def overhead_bytes(checkpoint: Path) -> int:
    """Bytes of the checkpoint's GGUF besides its matrices: metadata, tokenizer, 1-D tensors, and
    at most TENSOR_BYTES for every tensor.
    """
    shapes: list[tuple[int, ...]] = []
    for file in weight_files(checkpoint):
        shapes += tensor_shapes(file).values()
    vector_bytes = sum(4 * shape[0] for shape in shapes if len(shape) == 1)
    return header_bytes(checkpoint) + len(shapes) * TENSOR_BYTES + vector_bytes


def header_bytes(checkpoint: Path) -> int:
    """Bytes of metadata and tokenizer in a GGUF with a checkpoint's config.json and tokenizer,
    whose weights need not be there.
    """
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)

    # It is written to be measured.
    with Scratch() as folder:
        file = folder / "header.gguf"
        if is_plain(config):
            writer = _described(checkpoint, config, "F16", file)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
        else:
            converter.write_header(checkpoint, file)
        return file.stat().st_size


def is_plain(config: Any) -> bool:
    """Whether this module writes it; the converter writes others."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    biases = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    windowed = getattr(config, "sliding_window", None) is not None
    plain = rope == "default" and not biases and not windowed
    return config.model_type in ARCHITECTURES and plain


def check_architecture(config: Any) -> None:
    """ValueError when no GGUF can be of a transformers config. ConfigError when the converter of
    its family is not installed.
    """
    if is_plain(config):
        architecture(config)
    else:
        check_family(config)
        converter_of(config)


def architecture(config: Any) -> str:
    """The GGUF architecture of a transformers config. ValueError when there is none."""
    check_config(
        config,
        "GGUF",
        "export compressed_tensors",
        model_type=tuple(ARCHITECTURES),
        hidden_act=("silu",),
        rope_type=("default",),
        sliding_window=(None,),
    )

    # llama.cpp's qwen2 takes the width of its heads together to be that of the model.
    arch = ARCHITECTURES[config.model_type]
    width = config.num_attention_heads * head_dim(config)
    if arch == "qwen2" and width != config.hidden_size:
        raise ValueError(
            f"num_attention_heads * head_dim is {width} and hidden_size {config.hidden_size}:"
            " llama.cpp runs a qwen2 only where they are equal; keep all heads, or export"
            " compressed_tensors"
        )
    return arch


def check_teacher(path: Path) -> None:
    """ValueError when a teacher has a tokenizer or tensors that no student of it could bring into
    a GGUF.
    """
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer)
    end_keys(tokenizer, end_ids(path, tokenizer))
    templates_of(tokenizer.chat_template)
    if not is_plain(AutoConfig.from_pretrained(path, local_files_only=True)):
        return
    for name, _ in meta_model(read_config(path)).named_parameters():
        _renamed(
            name,
            _NAMES,
            f"tensor {name} has no place in a GGUF; export this model as compressed_tensors",
        )


def _renamed(name: str, table: dict[str, str], refusal: str) -> str:
    """A tensor's name by `table`, the number of its block in place of {}. ValueError, the refusal,
    when it is not in there.
    """
    stem, _, suffix = name.rpartition(".")
    block = next((part for part in stem.split(".") if part.isdigit()), "{}")
    place = table.get(stem.replace(f".{block}.", ".{}."))

    # Biases have a place where llama.cpp adds them: in q, k and v.
    if place is None or (
        suffix == "bias" and not place.endswith(("_q", "_k", "_v", "q_proj", "k_proj", "v_proj"))
    ):
        raise ValueError(refusal)
    return f"{place.format(block)}.{suffix}"


def _interleave(heads: int, rows: int) -> np.ndarray:
    """Row order p of `heads` stacked heads with gguf[i] = hf[p[i]]: within a head 0, d/2, 1, d/2 +
    1, ...
    """
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def _packed(
    checkpoint: Path, type: str, quantized: dict[str, Quantized], config: Any
) -> Iterator[tuple[str, np.ndarray, str]]:
    """(HF name, bytes or values as the writer takes them, ggml type) of every tensor of the
    checkpoint.
    """
    # Rows of q and k in the order that llama.cpp rotates; all other tensors keep theirs.
    row_orders = {}
    if architecture(config) == "llama":
        width = head_dim(config)
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        row_orders["q_proj"] = _interleave(heads, heads * width)
        row_orders["k_proj"] = _interleave(kv_heads, kv_heads * width)

    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (the handle is no mapping)
                # A tied head is the embedding, which the file holds once.
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue

                w = weights.get_tensor(name).float()
                rows = row_orders.get(name.split(".")[-2], slice(None))
                if w.ndim == 1:
                    yield name, w.numpy()[rows], "F32"
                elif quantized:
                    q = verified(name, w, quantized)
                    yield name, GRIDS[q.grid].pack(q.codes, q.scales).numpy()[rows], q.grid.upper()
                else:
                    yield name, _encode(name, w, type)[rows], type


def _encode(name: str, w: Tensor, type: str) -> np.ndarray:
    """An unquantized matrix in `type`: fp16 values, or the bytes of a grid's blocks. ValueError
    when F16 can't hold it.
    """
    if type == "F16":
        half = w.half()
        if not half.isfinite().all():
            raise ValueError(
                f"{name}: values up to {w.abs().max():.3g} don't fit F16 (65504); export as Q8_0"
            )
        return half.numpy()
    grid = GRIDS[type.lower()]
    return grid.pack(*grid.encode(w, name)).numpy()


def gguf_name(tensor: str) -> str:
    """The name in a GGUF of a tensor of HF. ValueError when it has no place there."""
    return _renamed(tensor, _NAMES, f"tensor {tensor} has no place in a GGUF")


def hf_name(tensor: str) -> str:
    """The HF name of a GGUF's tensor. ValueError when it has none here."""
    return _renamed(tensor, _BACK, f"GGUF tensor {tensor} is unknown; allowed: {', '.join(_BACK)}")


def decode_gguf(fields: dict[str, Any], tensors: list[Any]) -> dict[str, Tensor]:
    """HF state-dict name -> fp32 tensor of what `read_fields` returned: exactly the file's
    numbers, in HF's row order.

    ValueError: an architecture or tensor that is not known.
    """
    import gguf

    arch = fields.get("general.architecture")
    if arch not in ARCHITECTURES.values():
        raise ValueError(
            f"the GGUF's architecture {arch!r} can't be decoded; allowed: llama, qwen2"
        )

    # All names, before any tensor is decoded.
    names = {tensor.name: hf_name(tensor.name) for tensor in tensors}
    decoded = {}
    for tensor in tensors:
        w = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=True)

        # Back to the rows of HF, where llama.cpp's are interleaved.
        kind = tensor.name.split(".")[-2]
        if arch == "llama" and kind in ("attn_q", "attn_k"):
            heads = fields["llama.attention.head_count"]
            if kind == "attn_k":
                heads = fields.get("llama.attention.head_count_kv", heads)
            if type(heads) is not int or heads < 1 or len(w) % (2 * heads):
                raise ValueError(
                    f"GGUF tensor {tensor.name} of {len(w)} rows can't be of {heads} heads; copy"
                    " the file again"
                )
            w = w[np.argsort(_interleave(heads, len(w)))]
        decoded[names[tensor.name]] = torch.from_numpy(w)
    return decoded


class ReloadedGguf:
    """A `Reloaded` (score/parity.py): the file as llama.cpp opens it, and its numbers as the
    `gguf` package decodes them.
    """

    def __init__(self, file: Path, threads: int) -> None:
        from compress.formats.llamacpp import LlamaCpp

        self.fields, self.listed = read_fields(file)
        llama = LlamaCpp(file, threads, 512, 1, embedding=False)
        self.generate_ids = llama.generate_ids
        self.tokenize = llama.tokenize
        self.ends_at = llama.ends_at
        self.close = llama.close

    def tensors(self) -> dict[str, Tensor]:
        if self.is_converted():
            return converter.decoded(self.listed)
        return decode_gguf(self.fields, self.listed)

    def is_converted(self) -> bool:
        """Whether llama.cpp's converter wrote it: its tensors keep the names of a GGUF."""
        return bool(self.fields.get("general.name") == converter.NAME)

    def expected(self, checkpoint: Path, type: str) -> dict[str, Tensor] | None:
        """What `tensors` must be, under their names, where those are not HF's."""
        if not self.is_converted():
            return None
        return converter.expected(checkpoint, type, codes_of(checkpoint, f"gguf:{type}"))

    def eos_ids(self) -> set[int]:
        keys = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
        return {self.fields[key] for key in keys if key in self.fields}


# For formats/__init__.py.
write, reload = export_gguf, ReloadedGguf
