"""A GGUF of any family that transformers reads, as a checkpoint, with llama.cpp as the judge.

transformers dequantizes the file and builds the model of its metadata. What it does not read it
leaves at a default without a word: rotary factors of Llama 3, experts in a file of architecture
llama, sliding windows, sizes that are not the usual ones. What is known to go wrong is refused by
the header; then the model is compared with llama.cpp on the same file:

    states    hidden states of texts up to STATE_TOKENS long, relative: at most STATES. Kernels that
              round activations to 8 bits give 0.05, faults 0.2 and more
    strings   pieces of text that the two cut into other tokens: at most STRINGS_SHARE. Runs of more
              than 31 spaces may differ in Gemma's own; wrong rules give a tenth and more

Texts begin as the tokenizer begins them: without its BOS Gemma is another model, on which kernels
agree half as well. A model of several files is joined first, in a directory that goes again. Left
out: families of more than text, and files that llama.cpp can't open.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from compress.formats.gguf import decode_gguf, hf_name
from compress.formats.gguf_tokenizer import read_tokenizer
from compress.models.checkpoint import save_model
from compress.models.gguf_header import SCALARS, STRING, Items, check_file, read_fields
from compress.models.model_config import is_of_input, meta_model, one_line, quiet
from compress.models.tokenizer import load_tokenizer
from compress.models.tokens import opening
from compress.store import sha256_file

# general.architecture of files whose round trip through transformers is proven to give the same
# numbers (tests/formats/test_gguf_import.py).
READ = (
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "stablelm",
    "starcoder2",
    "nemotron",
    "falcon",
    "bloom",
)
STATES, STATE_TOKENS = 0.1, 768
STRINGS, STRINGS_SHARE = 1000, 0.01
GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}

PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def check_readable(gguf: Path, fields: dict[str, Any], tensors: Any) -> None:
    """ValueError, from the header alone, for a file that would come back wrong."""
    family = fields["general.architecture"]
    instead = "use the model's Hugging Face checkpoint"
    if family not in READ:
        raise ValueError(
            f"{gguf}: architecture {family!r} can't be imported; allowed: llama, {', '.join(READ)};"
            f" {instead}"
        )
    lost = [name for name in tensors if name.startswith("rope_f") or "_exps." in name]
    scaling = fields.get(f"{family}.rope.scaling.type", "none")
    if lost or scaling != "none":
        raise ValueError(
            f"{gguf} has {lost[0] if lost else f'rope scaling {scaling!r}'}, which is not imported;"
            f" {instead}"
        )


def open_model(gguf: Path, fields: dict[str, Any]) -> Any:
    """The model of a file in fp32. ValueError when transformers can't read it."""
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        with quiet():
            config = AutoConfig.from_pretrained(gguf.parent, **place)
            _complete(config, fields)
            return AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                config=config,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                trust_remote_code=False,
                **place,
            )
    except BaseException as error:
        if not is_of_input(error):
            raise
        raise ValueError(
            f"{gguf}: transformers can't read it ({one_line(error)}); use the model's Hugging Face"
            " checkpoint"
        ) from error


def _complete(config: Any, fields: dict[str, Any]) -> None:
    """What transformers leaves at a default although the file says it, or llama.cpp takes it for
    granted: widths of heads, windows, the scale of queries, the part of a head that is rotated.
    """

    def said(key: str) -> Any:
        return fields.get(f"{fields['general.architecture']}.{key}")

    width, window = said("attention.key_length"), said("attention.sliding_window")
    heads = config.num_attention_heads
    if width and hasattr(config, "head_dim"):
        config.head_dim = width
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = width or config.hidden_size // heads
    if window and hasattr(config, "sliding_window"):
        config.sliding_window = window

    # Of several rotary embeddings none is partial here.
    rotated, rope = said("rope.dimension_count"), getattr(config, "rope_parameters", None)
    if rotated and rope and "rope_theta" in rope:
        rope["partial_rotary_factor"] = rotated / (width or config.hidden_size // heads)


def check_import(
    gguf: Path, model: Any, tokenizer: Any, texts: Sequence[str], context: int, threads: int
) -> dict[str, float]:
    """`states` and `strings` of a model of so much `context` that was read from `gguf`, or
    ValueError where they are beyond their limits.
    """
    from compress.formats.llamacpp import LlamaCpp
    from compress.models.head import hidden_states

    # A text as long as a window, and two short ones, each begun as texts are.
    context = min(STATE_TOKENS, context)
    begins = opening(tokenizer)
    longest = context - len(begins)
    ids = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    short = min(64, longest)
    rows = [ids[:longest], ids[longest : longest + short], ids[-short:]]
    rows = [[*begins, *row] for row in rows if row]

    llama = LlamaCpp(gguf, threads, context, 1)
    try:
        shipped = llama.hidden_states(rows)
        pieces = _pieces("\n".join(texts), STRINGS)
        differing = sum(
            llama.tokenize(piece) != tokenizer.encode(piece, add_special_tokens=False)
            for piece in pieces
        )
    finally:
        llama.close()

    # Of each text the whole of its states.
    distance = 0.0
    with torch.inference_mode():
        for row, states in zip(rows, shipped, strict=True):
            expected = hidden_states(model, torch.tensor([row]))
            distance = max(distance, float((states - expected).norm() / expected.norm()))
    if not distance <= STATES or differing > STRINGS_SHARE * len(pieces):
        raise ValueError(
            f"{gguf} comes back as another model: hidden states are {distance:.2g} from llama.cpp's"
            f" (at most {STATES:g}), {differing} of {len(pieces)} strings are cut otherwise (at"
            f" most {STRINGS_SHARE:.0%}); use the model's Hugging Face checkpoint"
        )
    return {"states": distance, "strings": differing}


def _pieces(text: str, count: int) -> list[str]:
    """`count` pieces of a text, cut wherever."""
    step = max(1, len(text) // count)
    return [text[i * step : i * step + 24 + i % 41] for i in range(min(count, len(text)))]


def parts_of(gguf: Path) -> list[Path]:
    """All parts of a model of which `gguf` is the first, or the file alone. ValueError naming the
    ones that are missing.
    """
    place = PART.search(gguf.name)
    if place is None:
        return [gguf]
    count = int(place[2])
    stem = gguf.name[: place.start()]
    parts = [gguf.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ValueError(
            f"{gguf} is one of {count} parts, and {', '.join(missing[:3])} are not beside it; copy"
            " all parts"
        )
    return parts


def join(parts: Sequence[Path], out: Path) -> None:
    """Writes the model of several files as one."""
    import gguf

    from compress.models.gguf_header import read_fields, read_header

    first = gguf.GGUFReader(parts[0])
    family = read_header(parts[0]).fields["general.architecture"]
    writer = gguf.GGUFWriter(out, family)
    for name, field in first.fields.items():
        if name.startswith(("GGUF.", "split.")) or name == "general.architecture":
            continue
        kinds = field.types
        inner = kinds[-1] if kinds[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kinds[0], sub_type=inner)

    for part in parts:
        for tensor in read_fields(part)[1]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_importable(gguf: Path) -> None:
    """ValueError, from the header alone, for a GGUF that is damaged, in parts, or of a kind that
    `import_gguf` does not know.
    """
    fields, tensors = check_file(gguf)
    if fields["general.architecture"] != "llama":
        check_readable(gguf, fields, tensors)
        return

    # What other versions of Llama add.
    if any(key.startswith("llama.rope.scaling") for key in fields):
        raise ValueError(
            f"{gguf} has llama.rope.scaling.*, which is not imported; use the model's Hugging Face"
            " checkpoint"
        )
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{gguf} has rope_freqs.weight, scaled rotary positions, which are not imported; use"
            " the model's Hugging Face checkpoint"
        )
    try:
        for name in tensors:
            hf_name(name)
    except ValueError as error:
        raise ValueError(f"{gguf}: {error}; use the model's Hugging Face checkpoint") from error

    _check_numbers(gguf, fields)
    _check_vocabulary(gguf, fields, tensors["token_embd.weight"])


def _check_numbers(gguf: Path, fields: dict[str, Any]) -> None:
    """ValueError unless the numbers that the config is made of are there and make sense."""
    optional = ("attention.head_count_kv", "attention.key_length", "rope.freq_base")
    for key in (*GGUF_KEYS.values(), *optional):
        value = fields.get(f"llama.{key}")
        if value is None and key in optional:
            continue
        if value is None:
            raise ValueError(
                f"{gguf}: its metadata lack llama.{key}; it was not written by llama.cpp's"
                " converter: give another file"
            )

        # A bool is an int to Python, and no number of anything.
        kinds = (int, float) if key.endswith(("epsilon", "freq_base")) else (int,)
        if type(value) not in kinds or not 0 < value < 1 << 40:
            raise ValueError(
                f"{gguf}: llama.{key} is {value!r}; needed is a number above 0: copy the file again"
            )

    if fields["llama.embedding_length"] % fields["llama.attention.head_count"]:
        raise ValueError(
            f"{gguf}: llama.embedding_length is no multiple of llama.attention.head_count; copy the"
            " file again"
        )


def _check_vocabulary(gguf: Path, fields: dict[str, Any], embedding: tuple[int, ...]) -> None:
    """ValueError unless tokens, their types, merges and special ids are there and fit the
    `embedding`, a tensor's dimensions.
    """
    lengths: dict[str, int] = {}
    kinds_by_name = {"tokens": (STRING,), "token_type": tuple(SCALARS), "merges": (STRING,)}
    for name, kinds in kinds_by_name.items():
        value = fields.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, Items) or value.kind not in kinds:
            raise ValueError(
                f"{gguf}: its metadata have no list tokenizer.ggml.{name}; use the model's Hugging"
                " Face checkpoint"
            )
        lengths[name] = value.length

    # Every token has a type and a row.
    rows = embedding[-1]
    if not lengths["tokens"] == lengths["token_type"] == rows:
        raise ValueError(
            f"{gguf}: {lengths['tokens']:,} tokens, {lengths['token_type']:,} token types and"
            f" {rows:,} rows of the embedding; copy the file again"
        )
    for name in ("bos", "eos", "unknown", "padding"):
        index = fields.get(f"tokenizer.ggml.{name}_token_id")
        if index is not None and not (type(index) is int and 0 <= index < rows):
            raise ValueError(
                f"{gguf}: tokenizer.ggml.{name}_token_id is {index!r}, its vocabulary has {rows:,}"
                " ids; copy the file again"
            )


def import_gguf(
    gguf: Path, out: Path, texts: Sequence[str] = (), threads: int = 1
) -> dict[str, float]:
    """Writes the model of `gguf` into the directory `out`: config, fp32 safetensors, tokenizer,
    source.json. One that transformers reads is compared on `texts`: returns what `check_import`
    does.

    ValueError: as `check_importable` and `check_import`, tensors of other shapes than the metadata
    say, or a pre-tokenizer without a known mapping.
    """
    check_importable(gguf)
    fields, packed = read_fields(gguf)
    out.mkdir(parents=True, exist_ok=True)
    try:
        special = read_tokenizer(fields, out)
    except BaseException as error:
        if isinstance(error, ValueError) or not is_of_input(error):
            raise
        raise ValueError(
            f"{gguf}: its tokenizer can't be rebuilt ({one_line(error)}); use the model's Hugging"
            " Face checkpoint"
        ) from error

    figures: dict[str, float] = {}
    if fields["general.architecture"] == "llama":
        _decode_llama(gguf, fields, packed, special, out)
    else:
        model = open_model(gguf, fields)
        model.config.update(special)
        save_model(model, out, out, dtype=torch.float32)
        context = fields.get(f"{fields['general.architecture']}.context_length", STATE_TOKENS)
        figures = check_import(gguf, model, load_tokenizer(out), texts, context, threads)
    GenerationConfig(**special, do_sample=False).save_pretrained(out)
    source = {
        "source": gguf.name,
        "source_bytes": gguf.stat().st_size,
        "source_sha256": sha256_file(gguf),
        "licence": fields.get("general.license", "unknown"),
    }
    (out / "source.json").write_text(json.dumps(source, indent=2) + "\n")
    return figures


def _decode_llama(
    gguf: Path, fields: dict[str, Any], packed: list[Any], special: dict[str, Any], out: Path
) -> None:
    """Weights and config of a Llama, which this package decodes itself, into `out`."""
    # The model that the metadata describe, without memory: its tensors are the file's.
    tensors = decode_gguf(fields, packed)
    config = _config(fields, special, tied="lm_head.weight" not in tensors)
    for name, parameter in meta_model(config.to_dict()).named_parameters():
        shape = tuple(tensors[name].shape) if name in tensors else "missing"
        if shape != tuple(parameter.shape):
            raise ValueError(
                f"{gguf}: {name} is {shape}, by the file's metadata {tuple(parameter.shape)}; copy"
                " the file again"
            )
    config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def _config(fields: dict[str, Any], special: dict[str, Any], tied: bool) -> Any:
    """The LlamaConfig that a GGUF's metadata describe; `special`: its special token ids."""
    sizes = {name: fields[f"llama.{key}"] for name, key in GGUF_KEYS.items()}
    heads = sizes["num_attention_heads"]
    sizes |= {
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "num_key_value_heads": fields.get("llama.attention.head_count_kv", heads),
        "head_dim": fields.get("llama.attention.key_length", sizes["hidden_size"] // heads),
    }

    # The file has float32 of what somebody wrote in decimals.
    sizes["rms_norm_eps"] = _shortest(sizes["rms_norm_eps"])
    theta = _shortest(fields.get("llama.rope.freq_base", 10000.0))
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        tie_word_embeddings=tied,
        dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        **(sizes | special),
    )


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 9.99999974e-06 was written from 1e-05."""
    return float(str(np.float32(value)))
