"""One look at a checkpoint directory before anything is built from it: its files, headers
and values.

Weights may be quantized already, cut short, lack tensors or hold no numbers. What transformers
makes of such a directory is often a model, with random numbers in the gaps. So each is refused
here, in one sentence, by name. What only a loaded model can tell is in `compress/models/loaded.py`.
"""

import math
import re
from pathlib import Path, PurePosixPath
from typing import Any

from compress.doors import read_json, refuse_mark
from compress.models.generation_config import check_generation
from compress.models.model_config import (
    MOST_MODULES,
    check_bytes,
    is_packed,
    meta_model,
    read_config,
)
from compress.models.shapes import Table, tensor_places
from compress.models.weight_values import WHOLE, check_finite, pieces

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# JSON files that transformers and tokenizers read, which know no byte order mark.
FOR_OTHERS = (
    "config.json",
    "generation_config.json",
    INDEX,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
PACKED_SUFFIXES = (
    ".qweight",
    ".qzeros",
    ".absmax",
    ".quant_map",
    ".SCB",
    "_scale_inv",
    ".weight_packed",
    "_blocks",
    ".input_scale",
    ".weight_scale",
)
# Heads that `scale_and_softcap` (models/head.py) follows; another family with such a key is
# loaded to see.
SCALED_KEY = re.compile(r"logit|lm_head_mult|mup|dim_model_base|temperature")
SCALED_FAMILIES = (
    "cohere",
    "cohere2",
    "gemma2",
    "gemma3_text",
    "granite",
    "hyperclovax",
    "minicpm3",
    "nanochat",
)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order.

    ValueError when they are missing, or when an index is damaged or leaves the directory.
    """
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]

    # Neither one file nor an index of several.
    if not (path / INDEX).is_file():
        other = sorted(file.name for file in path.glob("*.bin"))
        hint = (
            f" ({', '.join(other)} is pickle and is not read; convert it to safetensors)"
            if other
            else ""
        )
        raise ValueError(
            f"{path} has no {WEIGHTS}{hint or ', or a link to a file that is gone; copy it again'}"
        )

    # The index names a shard for each tensor.
    check_bytes(path / INDEX)
    shards = read_json(path / INDEX).get("weight_map")
    if (
        not isinstance(shards, dict)
        or not shards
        or not all(isinstance(name, str) for name in shards.values())
    ):
        raise ValueError(
            f"{path / INDEX} has no weight_map of tensor names to shards; copy it again"
        )

    # Each shard is a file of this directory: none may lie elsewhere on the disk.
    names = sorted(set(shards.values()))
    for name in names:
        try:
            there = PurePosixPath(name).name == name and (path / name).is_file()
        except OSError:  # a name that is too long for any file
            there = False
        if not there:
            raise ValueError(
                f"{path / INDEX} names the shard {name[:200]!r}, which is no file of that "
                "directory; copy all shards again"
            )

    return [path / name for name in names]


def tensor_table(path: Path) -> Table:
    """Where every tensor of a checkpoint is.

    ValueError: a damaged file, a tensor in two of them, or not in the one that the index says.
    """
    table: Table = {}
    for file in weight_files(path):
        for name, place in tensor_places(file).items():
            if name in table:
                raise ValueError(
                    f"{path}: tensor {name} is in {table[name][0].name} and in {file.name}; remove "
                    "the older file or copy both again"
                )
            table[name] = file, place

    if not table:
        raise ValueError(f"{path}: its weights hold no tensor; copy them again")

    # What the index says must be what the files hold.
    shards = {} if (path / WEIGHTS).is_file() else read_json(path / INDEX)["weight_map"]
    for name, shard in shards.items():
        if name not in table or table[name][0].name != shard:
            raise ValueError(
                f"{path / INDEX} has tensor {name} in {shard}, which does not hold it; copy the "
                "index and the shards again"
            )
    return table


def check_directory(path: Path) -> None:
    """ValueError for what lies beside weights and would be run, attached or read in their place.

    Weights that a config calls quantized are refused too, but those of our own packed directories.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{path}: its path is not UTF-8, which tokenizers can't open; give the folders of it"
            " other names"
        ) from error

    # What would be added to the weights, or run.
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds adapter_config.json beside config.json: transformers would add that "
            "adapter to the weights, a second time if they were "
            "merged; move adapter_config.json and adapter_model.* out of it"
        )
    if (path / "custom_generate").exists():
        raise ValueError(
            f"{path} has a custom_generate folder: its code is never run; remove the folder"
        )

    # What others who read these files can't read.
    for file in (path / name for name in FOR_OTHERS):
        if file.is_file():
            refuse_mark(file)

    # What the configurations themselves say.
    config = read_config(path)
    check_generation(path)

    # Weights that are quantized already, but our own packed ones, which transformers unpacks.
    for key in ("quantization_config", "compression_config"):
        about = config.get(key)
        if about is not None and not is_packed(config):
            method = (
                about.get("quant_method", "unknown method")
                if isinstance(about, dict)
                else "unknown method"
            )
            raise ValueError(
                f"{path / 'config.json'} has a {key}: the weights are quantized already "
                f"({method}); give the unquantized checkpoint it was made of"
            )


def check_weights(path: Path) -> bool:
    """Compare config.json with the headers of the weights; then read every value once.

    Whether they are of one model for certain: False where only loading them can tell. ValueError
    naming tensors that are missing, of another shape, of no finite numbers, or tied by the config
    and not equal in the file.
    """
    config, table = read_config(path), tensor_table(path)
    layers = config.get("num_hidden_layers") or 1
    elements = sum(math.prod(place.shape) for _, place in table.values())
    if layers > len(table):
        raise ValueError(
            f"{path}: config.json says {layers:,} blocks, its weights hold {len(table):,} tensors; "
            "they are not of one model"
        )

    # Building the model takes time and memory by what the config claims: as much as the weights
    # have a use for.
    most_modules = min(MOST_MODULES, 1000 + 30 * len(table))
    model = meta_model(config, most_modules, path / "config.json")
    buffer_bytes = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if buffer_bytes > 64_000_000 + 16 * elements:
        raise ValueError(
            f"{path}: config.json asks for tables of {buffer_bytes:,} bytes beside {elements:,} "
            "parameters; they are not of one model"
        )

    # Packed weights have other names and shapes than the model: only their number is compared.
    if is_packed(config):
        if model.num_parameters() > 8 * elements:
            raise ValueError(
                f"{path}: config.json says {model.num_parameters():,} parameters, its weights hold "
                "fewer; they are not of one model"
            )
        settled = True
    else:
        settled = _check_names(path, config, model, table)

    check_finite(path, table)
    return settled


def _check_names(path: Path, config: dict[str, Any], model: Any, table: Table) -> bool:
    """Compare the names and shapes of unpacked weights with the model's.

    Whether they are of one model for certain. ValueError: quantized, parameters without a tensor,
    or tied ones that differ.
    """
    lacking, spare_names = _difference(model, table)

    # Names or types that a quantizer leaves.
    packed_names = [name for name in spare_names if name.endswith(PACKED_SUFFIXES)]
    if not packed_names:
        packed_names = [
            name
            for name in table
            if name not in spare_names and table[name][1].dtype in WHOLE and name.endswith("weight")
        ]
    if packed_names:
        raise ValueError(
            f"{path}: the weights are quantized already (they hold {packed_names[0]}); give the "
            "unquantized checkpoint they were made of"
        )

    # Parameters that no tensor is there for.
    elements = sum(math.prod(place.shape) for _, place in table.values())
    if lacking and model.num_parameters() > elements:
        tie_it = (
            "; if the head is the embedding, set tie_word_embeddings to true in"
            f" {path / 'config.json'}"
        )
        lacks_head_alone = (
            config.get("tie_word_embeddings") is False
            and len(lacking) == 1
            and lacking[0] in _head_names(model)
        )
        next_step = tie_it if lacks_head_alone else "; copy or merge the checkpoint again"
        raise ValueError(f"{path}: the weights lack {_listed(lacking)}{next_step}")

    _check_tied(path, model, table)
    return not lacking and not spare_names and not _scaled_otherwise(config)


def head_place(path: Path) -> list[str] | None:
    """Names in the files of a checkpoint's output weight and, if it has one, of its bias.

    None when they are others there than in the model.
    """
    model = meta_model(read_config(path), where=path / "config.json")
    table = tensor_table(path)
    output = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    weights = [name for name in _head_names(model) if name in table]
    biases = [name for name in _names_of(model, bias) if name in table] if bias is not None else []
    if not weights or bias is not None and not biases:
        return None
    return [*weights[:1], *biases[:1]]


def _variants(model: Any, name: str) -> list[str]:
    """A parameter's name, also without and with the base model's prefix,
    as transformers takes it.
    """
    prefix = f"{model.base_model_prefix}."
    return [name, name.removeprefix(prefix), prefix + name]


def _names_of(model: Any, wanted: Any) -> list[str]:
    """All names of one parameter."""
    every = model.named_parameters(remove_duplicate=False)
    return [
        other
        for name, parameter in every
        if parameter is wanted
        for other in _variants(model, name)
    ]


def _head_names(model: Any) -> list[str]:
    output = model.get_output_embeddings()
    return _names_of(model, getattr(output, "weight", None)) if output is not None else []


def names_in_files(model: Any, table: Table) -> dict[str, str] | None:
    """The name in the files of each parameter; None where they don't hold exactly the parameters,
    each under a name and in a shape of its own.
    """
    lacking, spare_names = _difference(model, table)
    if lacking or spare_names:
        return None
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_there = [other for other in _variants(model, name) if other in table]
        names |= {id(parameter): other for other in names_there[:1]}
    return {name: names[id(parameter)] for name, parameter in model.named_parameters()}


def _difference(model: Any, table: Table) -> tuple[list[str], list[str]]:
    """Parameters without a tensor of their name and shape, and tensors without a parameter.

    Tied parameters are named once; of a wrong shape is said what is there instead.
    """
    names: dict[int, list[str]] = {}
    shapes = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    # Of each parameter, tensors under any of its names.
    lacking: list[str] = []
    spare_names = set(table)
    for key, names_in_model in names.items():
        variants = [other for name in names_in_model for other in _variants(model, name)]
        names_in_files = [other for other in variants if other in table]
        spare_names -= set(names_in_files)
        if not names_in_files:
            lacking.append(names_in_model[0])
            continue
        shape = table[names_in_files[0]][1].shape
        if shape != shapes[key]:
            lacking.append(f"{names_in_model[0]} of shape {shapes[key]} (it is {shape})")
    return lacking, sorted(spare_names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _scaled_otherwise(config: dict[str, Any]) -> bool:
    """Whether logits may be scaled or capped in a way that only the model itself can tell."""
    keys = [
        key
        for key, value in config.items()
        if SCALED_KEY.search(key) and type(value) in (int, float, str, list, dict)
    ]
    return bool(keys) and config["model_type"] not in SCALED_FAMILIES


def _check_tied(path: Path, model: Any, table: Table) -> None:
    """ValueError when the file holds several different tensors for one tied weight of the model."""
    names = [name for name in dict.fromkeys(_head_names(model)) if name in table]
    for other in names[1:]:
        # Type and shape, then byte by byte: neither is loaded whole.
        same = table[names[0]][1][:2] == table[other][1][:2]
        pairs = zip(pieces(*table[names[0]]), pieces(*table[other]), strict=True)
        if not same or any(one != two for one, two in pairs):
            raise ValueError(
                f"{path}: config.json ties the head to the embedding, and {names[0]} and {other} "
                "differ in the weights; set tie_word_embeddings to "
                f"false to keep both, or remove {other if 'head' in other else names[0]}"
            )
