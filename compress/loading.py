"""One look at a checkpoint directory before anything is built from it: config.json, the headers of its weights, their values.

A config.json is somebody else's. It may name code to run, a kernel to fetch, sizes that no weights have, or weights that
are quantized already; weights may be cut short, lack tensors or hold no numbers. What transformers makes of such a
directory is often a model, with random numbers in the gaps. So each is refused here, in one sentence, by name.
What only a loaded model can tell is in `compress/loaded.py`.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from compress.doors import TensorPlace, read_json, tensor_places
from compress.errors import is_disk, is_memory

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_BYTES = 50_000_000  # of a config or an index; real ones have a few megabytes at most
MOST_LAYERS = 1_000  # the deepest known has 126
MOST_MODULES = 300_000  # of a model; a mixture of 61 blocks of 384 experts has 100,000
MOST_LABELS = 10_000  # of a classifier; transformers names each, though no model here has them
MOST_COUNT = 10_000_000  # of whatever else a config counts
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "vocab_size", "max_position_embeddings",
)  # fmt: skip
CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines")
KERNEL_KEYS = (
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "_experts_implementation", "_experts_implementation_internal", "kernel_config", "use_kernels",
)  # fmt: skip
PARTS_KEYS = ("text_config", "vision_config", "audio_config", "thinker_config", "llm_config", "language_config")
PACKED_SUFFIXES = (".qweight", ".qzeros", ".absmax", ".quant_map", ".SCB", "_scale_inv", ".weight_packed", "_blocks", ".input_scale", ".weight_scale")
LAYER_COUNT = re.compile(r"(num|n)_(\w+_)?layers?")
# Heads that `scale_and_softcap` (train/forward.py) follows; another family with such a key is loaded to see.
SCALED_KEY = re.compile(r"logit|lm_head_mult|mup|dim_model_base|temperature")
SCALED_FAMILIES = ("cohere", "cohere2", "gemma2", "gemma3_text", "granite", "hyperclovax", "minicpm3", "nanochat")

Table = dict[str, tuple[Path, TensorPlace]]  # name of a tensor -> the file that holds it, and its place


def is_of_input(error: BaseException) -> bool:
    """Whether a library gave up on what it was given: any error but of memory or disk; Rust panics with one that is no Exception."""
    kind = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    return kind and not is_memory(error) and not is_disk(error)


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a decoder-only model as a dict, with `architectures` and the sizes under transformers' common names.

    (GPT-2 says n_layer, others num_layers, where `num_hidden_layers` is meant.) Which attention or expert kernel it was run
    with is left out. ValueError: missing, damaged, names code or a kernel to fetch, no known family, sizes that make no sense.
    """
    file = path / "config.json"
    if not file.is_file():
        adapter = (path / "adapter_config.json").is_file()
        hint = "; it holds an adapter alone: merge that into its base model" if adapter else ""
        raise ValueError(f"{path} is not a checkpoint: config.json is missing; give a Hugging Face model directory{hint}")
    _check_bytes(file)
    config = _without_kernels(read_json(file), file)
    _check_family(config, file)
    _check_counts(config, file)
    config = {key: value for key, value in config.items() if key != "quantization_config" or value}
    about = config_object(config, file)
    common = {key: getattr(about, key, None) for key in (*SIZES, "tie_word_embeddings")}
    if not config.get("architectures"):
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]
    absent = {key: value for key, value in common.items() if value is not None and key not in config and key != "head_dim"}
    return config | absent


def config_object(config: dict[str, Any], where: object = "the config") -> Any:
    """A config.json's content as the transformers config of its architecture. ValueError that begins with `where`."""
    values = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}
    try:
        with quiet():
            return AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:  # whatever a family's own checks raise
        if not is_of_input(error):
            raise
        raise ValueError(f"{where} is no config of a {config['model_type']} model: {one_line(error)}; copy it again") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order. ValueError when missing or when an index leaves the directory."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        other = sorted(p.name for p in path.glob("*.bin"))
        hint = f" ({', '.join(other)} is pickle and is not read; convert it to safetensors)" if other else ""
        raise ValueError(f"{path} has no {WEIGHTS}{hint}")
    _check_bytes(path / INDEX)
    shards = read_json(path / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{path / INDEX} has no weight_map of tensor names to shards; copy it again")
    names = sorted(set(shards.values()))
    for name in names:
        if PurePosixPath(name).name != name or not (path / name).is_file():
            raise ValueError(f"{path / INDEX} names the shard {name!r}: shards must be files of that directory")
    return [path / name for name in names]


def tensor_table(path: Path) -> Table:
    """Where every tensor of a checkpoint is. ValueError: a damaged file, a tensor in two of them, or not in the one that the index says."""
    table: Table = {}
    for file in weight_files(path):
        for name, place in tensor_places(file).items():
            if name in table:
                raise ValueError(f"{path}: tensor {name} is in {table[name][0].name} and in {file.name}; remove the older file or copy both again")
            table[name] = file, place
    if not table:
        raise ValueError(f"{path}: its weights hold no tensor; copy them again")
    shards = {} if (path / WEIGHTS).is_file() else read_json(path / INDEX)["weight_map"]
    for name, shard in shards.items():
        if name not in table or table[name][0].name != shard:
            raise ValueError(f"{path / INDEX} has tensor {name} in {shard}, which does not hold it; copy the index and the shards again")
    return table


def check_directory(path: Path) -> None:
    """ValueError for what lies in a checkpoint's directory and would be run, attached or read in place of its weights, and for packed weights."""
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} holds adapter_config.json beside config.json: transformers would add that adapter to the weights, a second time if they were "
            "merged; move adapter_config.json and adapter_model.* out of it"
        )
    if (path / "custom_generate").exists():
        raise ValueError(f"{path} has a custom_generate folder: its code is never run; remove the folder")
    if (path / "generation_config.json").is_file():
        read_json(path / "generation_config.json")
    config = read_config(path)
    for key in ("quantization_config", "compression_config"):
        about = config.get(key)
        if about is not None and not is_packed(config):
            method = about.get("quant_method", "unknown method") if isinstance(about, dict) else "unknown method"
            raise ValueError(
                f"{path / 'config.json'} has a {key}: the weights are quantized already ({method}); give the unquantized checkpoint it was made of"
            )


def is_packed(config: dict[str, Any]) -> bool:
    """Whether a config is of a directory that export/compressed_tensors.py writes: packed, and unpacked by transformers while it loads."""
    about = config.get("quantization_config")
    return isinstance(about, dict) and about.get("quant_method") == "compressed-tensors" and about.get("dequantize") is True


def check_weights(path: Path) -> bool:
    """Compare config.json with the headers of the weights; then read every value once.

    Whether they are of one model for certain: False where only loading them can tell. ValueError naming tensors that are
    missing, of another shape, of no finite numbers, or tied by the config and not equal in the file.
    """
    config, table = read_config(path), tensor_table(path)
    layers, elements = config.get("num_hidden_layers") or 1, sum(math.prod(place.shape) for _, place in table.values())
    if layers > len(table):
        raise ValueError(f"{path}: config.json says {layers:,} blocks, its weights hold {len(table):,} tensors; they are not of one model")
    model = meta_model(config, min(MOST_MODULES, 1000 + 30 * len(table)))
    kept = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if kept > 64_000_000 + 16 * elements:
        raise ValueError(f"{path}: config.json asks for tables of {kept:,} bytes beside {elements:,} parameters; they are not of one model")
    settled = True
    if is_packed(config):
        if model.num_parameters() > 8 * elements:
            raise ValueError(f"{path}: config.json says {model.num_parameters():,} parameters, its weights hold fewer; they are not of one model")
    else:
        lacking, left = _difference(model, table)
        packed = [name for name in left if name.endswith(PACKED_SUFFIXES)]
        if packed := packed or [name for name in table if name not in left and "F" not in table[name][1].dtype and name.endswith("weight")]:
            raise ValueError(f"{path}: the weights are quantized already (they hold {packed[0]}); give the unquantized checkpoint they were made of")
        if lacking and model.num_parameters() > elements:
            tied = f"; if the head is the embedding, set tie_word_embeddings to true in {path / 'config.json'}"
            alone = config.get("tie_word_embeddings") is False and len(lacking) == 1 and lacking[0] in _head_names(model)
            raise ValueError(f"{path}: the weights lack {_listed(lacking)}{tied if alone else '; copy or merge the checkpoint again'}")
        _check_tied(path, model, table)
        settled = not lacking and not left and not _scaled_otherwise(config)
    _check_finite(path, table)
    return settled


def meta_model(config: dict[str, Any], most_modules: int = MOST_MODULES) -> Any:
    """The model of a config.json without memory for its weights. ValueError when it can't be built of so many modules."""
    about = config_object(config)
    try:
        with quiet(), torch.random.fork_rng(devices=[]), torch.device("meta"), _at_most(most_modules):
            return AutoModelForCausalLM.from_config(about, attn_implementation="eager")
    except Exception as error:
        if not is_of_input(error):
            raise
        raise ValueError(f"the config is of no {config['model_type']} model that can be built ({one_line(error)}); copy config.json again") from error


def head_place(path: Path) -> list[str] | None:
    """Names in the files of a checkpoint's output weight and, if it has one, its bias; None when they are others there than in the model."""
    model, table = meta_model(read_config(path)), tensor_table(path)
    output = model.get_output_embeddings()
    bias = getattr(output, "bias", None)
    weights = [name for name in _head_names(model) if name in table]
    biases = [name for name in _names_of(model, bias) if name in table] if bias is not None else []
    if not weights or bias is not None and not biases:
        return None
    return [*weights[:1], *biases[:1]]


def _check_bytes(file: Path) -> None:
    if (size := file.stat().st_size) > JSON_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, at most {JSON_BYTES:,} are read; copy it again")


def _without_kernels(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config without the kernels it was run with. ValueError: it names code, or a kernel that would be fetched, at any depth."""
    kept = {}
    for key, value in config.items():
        if key in CODE_KEYS:
            raise ValueError(f"{file} has an {key}: the model needs remote code, which is never run; convert it to a stock architecture")
        if key in KERNEL_KEYS:
            if not (value is None or isinstance(value, bool) or isinstance(value, str) and value.isidentifier()):
                raise ValueError(f"{file}: {key} names a kernel to be fetched ({str(value)[:80]!r}), which is never run; remove the key")
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{file}: {key} is {value}, which is no finite number; copy the file again")
        kept[key] = _without_kernels(value, file) if isinstance(value, dict) else value
    return kept


def _check_family(config: dict[str, Any], file: Path) -> None:
    """ValueError unless model_type is a decoder-only text model that transformers has."""
    family, classes = config.get("model_type"), config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"{file}: architectures is {str(classes)[:80]}; needed is a list of class names, as in [\"LlamaForCausalLM\"]")
    if not isinstance(family, str):
        named = [name for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if classes and kind == classes[0]]
        own = [name for name in named if classes[0].lower().startswith(name.replace("_", ""))] if classes else []
        hint = f'add "model_type": "{[*own, *named, "llama"][0]}", the name of its family' if family is None else "it must be a text"
        raise ValueError(f"{file} has no model_type that can be used (got {str(family)[:80]}); {hint}")
    if any(isinstance(config.get(key), dict) for key in PARTS_KEYS):
        raise ValueError(f"{file}: {family} is a model of several parts, text and images or sound; save its language model by itself and give that")
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or family not in CONFIG_MAPPING:
        raise ValueError(f"{file}: model_type {family!r} is no text model that transformers can open without remote code; convert it to one that is")
    if config.get("is_encoder_decoder"):
        raise ValueError(f"{file}: is_encoder_decoder is true; only decoder-only models can be compressed or scored")


def _check_counts(config: dict[str, Any], file: Path) -> None:
    """ValueError for a size that is no positive number, or a count that no model has: building it would fill the memory."""
    renamed = CONFIG_MAPPING[config["model_type"]].attribute_map
    sizes = {*SIZES, *(str(renamed[name]) for name in SIZES if name in renamed)}
    for key, value in config.items():
        values = value if isinstance(value, list) and key in sizes else [value]
        for one in values if key in sizes else ():
            if one is not None and (type(one) is not int or one < 1):
                raise ValueError(f"{file}: {key} is {str(one)[:80]}; needed is a whole number above 0")
        counted = key in sizes or key.startswith(("num_", "n_")) or LAYER_COUNT.fullmatch(key)
        few = MOST_LAYERS if LAYER_COUNT.fullmatch(key) else {"max_position_embeddings": 1 << 40, "num_labels": MOST_LABELS}.get(key)
        most = few or MOST_COUNT
        for one in values if counted else ():
            if type(one) is int and one > most:
                raise ValueError(f"{file}: {key} is {one if one < 1 << 63 else 'beyond 64 bits'}, at most {most:,} is read; copy it again")


@contextmanager
def quiet() -> Iterator[None]:
    """transformers logs nothing: what it would say of a file is said by us, in a sentence."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Building a model of more modules than that raises ValueError."""
    count = 0

    def note(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > modules:
            raise ValueError(f"more than {modules:,} modules, far more than its weights have tensors")

    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _variants(model: Any, name: str) -> list[str]:
    """A parameter's name, and as transformers also finds it: without the base model's prefix, and with it."""
    prefix = f"{model.base_model_prefix}."
    return [name, name.removeprefix(prefix), prefix + name]


def _names_of(model: Any, wanted: Any) -> list[str]:
    """All names of one parameter."""
    every = model.named_parameters(remove_duplicate=False)
    return [other for name, parameter in every if parameter is wanted for other in _variants(model, name)]


def _head_names(model: Any) -> list[str]:
    output = model.get_output_embeddings()
    return _names_of(model, getattr(output, "weight", None)) if output is not None else []


def _difference(model: Any, table: Table) -> tuple[list[str], list[str]]:
    """Parameters without a tensor of their name and shape, tied ones once, with what is there instead; and tensors without a parameter."""
    names: dict[int, list[str]] = {}
    shapes = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    lacking, left = [], set(table)
    for key, own in names.items():
        held = [other for name in own for other in _variants(model, name) if other in table]
        left -= set(held)
        if not held:
            lacking.append(own[0])
        elif table[held[0]][1].shape != shapes[key]:
            lacking.append(f"{own[0]} of shape {shapes[key]} (it is {table[held[0]][1].shape})")
    return lacking, sorted(left)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _scaled_otherwise(config: dict[str, Any]) -> bool:
    """Whether logits may be scaled or capped in a way that only the model itself can tell."""
    keys = [key for key, value in config.items() if SCALED_KEY.search(key) and type(value) in (int, float, str, list, dict)]
    return bool(keys) and config["model_type"] not in SCALED_FAMILIES


def _check_tied(path: Path, model: Any, table: Table) -> None:
    """ValueError when the file holds several different tensors for one tied weight of the model."""
    held = [name for name in dict.fromkeys(_head_names(model)) if name in table]
    for other in held[1:]:
        same = table[held[0]][1][:2] == table[other][1][:2]
        if not same or any(a != b for a, b in zip(_pieces(*table[held[0]]), _pieces(*table[other]), strict=True)):
            raise ValueError(
                f"{path}: config.json ties the head to the embedding, and {held[0]} and {other} differ in the weights; set tie_word_embeddings to "
                f"false to keep both, or remove {other if 'head' in other else held[0]}"
            )


def _pieces(file: Path, place: TensorPlace, size: int = 1 << 24) -> Iterator[bytes]:
    """The bytes of a tensor, so many at once."""
    left = math.prod(place.shape) * torch.empty((), dtype=TYPES[place.dtype]).element_size()
    with file.open("rb") as opened:
        opened.seek(place.start)
        while left:
            piece = opened.read(min(size, left))
            left -= len(piece)
            yield piece


TYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32,
    "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
}  # fmt: skip


def _check_finite(path: Path, table: Table) -> None:
    """ValueError naming a tensor with NaN or infinity in it, or of a type that torch does not have. 16 MB are held at once."""
    for name, (file, place) in table.items():
        if place.dtype not in TYPES:
            raise ValueError(f"{path}: tensor {name} is of type {place.dtype}; give the checkpoint in fp32, bf16 or fp16")
        dtype = TYPES[place.dtype]
        if not dtype.is_floating_point:
            continue
        for piece in _pieces(file, place):
            values = torch.frombuffer(bytearray(piece), dtype=dtype)
            if not (values.float() if dtype.itemsize == 1 else values).isfinite().all():
                raise ValueError(f"{path}: tensor {name} in {file.name} holds NaN or infinity; copy the checkpoint again, or train it again")
