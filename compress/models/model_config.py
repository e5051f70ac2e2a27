"""A config.json that somebody else wrote: read within bounds, and its model built without memory.

It may name code to run, a kernel to fetch, another kind of model, or sizes that fill the memory
when transformers builds them. Each is refused in one sentence that names the file and the key.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from compress.doors import read_json
from compress.errors import is_disk, is_memory

JSON_BYTES = 50_000_000  # of a config or an index; real ones have a few megabytes at most
MOST_LAYERS = 1_000  # the deepest known has 126
MOST_MODULES = 300_000  # of a model; a mixture of 61 blocks of 384 experts has 100,000
MOST_LABELS = 10_000  # of a classifier; transformers names each, though no model here has them
MOST_COUNT = 10_000_000  # of whatever else a config counts
MOST_BY_KEY = {"max_position_embeddings": 1 << 40, "num_labels": MOST_LABELS}
OPEN_KEYS = ("time_step_limit",)  # of a state space, whose steps may have no upper limit
MOST_VALUES = 100_000  # in one file: transformers copies them all, several times a model
SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
CODE_KEYS = ("auto_map", "custom_generate", "custom_pipelines")
KERNEL_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "kernel_config",
    "use_kernels",
)
PARTS_KEYS = (
    "text_config",
    "vision_config",
    "audio_config",
    "thinker_config",
    "llm_config",
    "language_config",
)
LAYER_COUNT = re.compile(r"(num|n)_(\w+_)?layers?")


def is_of_input(error: BaseException) -> bool:
    """Whether a library gave up on what it was given: any error but of memory or disk.

    A panic of Rust's is one, though no Exception.
    """
    kind = isinstance(error, Exception) or type(error).__name__ == "PanicException"
    return kind and not is_memory(error) and not is_disk(error)


def one_line(error: BaseException) -> str:
    """What an error of a library says, in one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + " ..."


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a decoder-only model, with `architectures` and sizes under common names.

    (GPT-2 says n_layer, others num_layers, where `num_hidden_layers` is meant.) Which attention or
    expert kernel it was run with is left out. ValueError: missing, damaged, names code or a kernel
    to fetch, no known family, sizes that make no sense.
    """
    file = path / "config.json"
    if os.path.lexists(file) and not file.is_file():
        raise ValueError(
            f"{file} is no plain file, or a link to none; copy the checkpoint's files again"
        )
    if not file.is_file():
        adapter = (path / "adapter_config.json").is_file()
        hint = "; it holds an adapter alone: merge that into its base model" if adapter else ""
        raise ValueError(
            f"{path} is not a checkpoint: config.json is missing; give a Hugging Face model "
            f"directory{hint}"
        )

    # Keys that name code or a kernel, and sizes beyond reason, before transformers sees any.
    check_bytes(file)
    config = read_json(file)
    check_values(config, file)
    config = _without_kernels(config, file)
    _check_family(config, file)
    _check_counts(config, file)

    # Sizes under their common names, as the family itself renames them.
    config = {key: value for key, value in config.items() if key != "quantization_config" or value}
    about = config_object(config, file)
    common = {key: getattr(about, key, None) for key in (*SIZES, "tie_word_embeddings")}
    if not config.get("architectures"):
        config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config["model_type"]]]

    # What the file says itself counts.
    absent = {
        key: value
        for key, value in common.items()
        if value is not None and key not in config and key != "head_dim"
    }
    return config | absent


def config_object(config: dict[str, Any], where: object = "the config") -> Any:
    """A config.json's content as the transformers config of its architecture.

    ValueError that begins with `where`.
    """
    values = {k: v for k, v in config.items() if k not in ("model_type", "transformers_version")}

    # A family's own checks may raise anything.
    try:
        with quiet():
            return AutoConfig.for_model(config["model_type"], **values)
    except Exception as error:
        if not is_of_input(error):
            raise
        raise ValueError(
            f"{where} is no config of a {config['model_type']} model: {one_line(error)}; copy it "
            "again"
        ) from error


def is_packed(config: dict[str, Any]) -> bool:
    """Whether a config is of a directory that formats/compressed_tensors.py writes.

    It is packed, and transformers unpacks it while it loads.
    """
    about = config.get("quantization_config")
    return (
        isinstance(about, dict)
        and about.get("quant_method") == "compressed-tensors"
        and about.get("dequantize") is True
    )


def meta_model(
    config: dict[str, Any], most_modules: int = MOST_MODULES, where: object = "the config"
) -> Any:
    """The model of a config.json without memory for its weights.

    ValueError, beginning with `where`, when it can't be built of so many modules.
    """
    about = config_object(config, where)

    try:
        # No memory for weights, no random numbers used up, no more modules than so many.
        with (
            quiet(),
            torch.random.fork_rng(devices=[]),
            torch.device("meta"),
            _at_most(most_modules),
        ):
            return AutoModelForCausalLM.from_config(about, attn_implementation="eager")
    except Exception as error:
        if not is_of_input(error):
            raise
        raise ValueError(
            f"{where} is of no {config['model_type']} model that can be built "
            f"({one_line(error)}); copy it again"
        ) from error


def check_bytes(file: Path) -> None:
    """ValueError for a JSON file that is far longer than a real one."""
    if (size := file.stat().st_size) > JSON_BYTES:
        raise ValueError(
            f"{file} has {size:,} bytes, at most {JSON_BYTES:,} are read; copy it again"
        )


def check_values(config: dict[str, Any], file: Path) -> None:
    """ValueError for more values than a config has, and for a number that is not finite."""
    count = 0
    waiting: list[tuple[str, Any]] = [("", config)]
    while waiting:
        key, value = waiting.pop()
        count += 1
        bounded = isinstance(value, float) and not (key in OPEN_KEYS and value == math.inf)
        if bounded and not math.isfinite(value):
            raise ValueError(
                f"{file}: {key} is {value}, which is no finite number; copy the file again"
            )

        # What is inside has its turn later.
        if isinstance(value, dict):
            waiting += [(str(name), inner) for name, inner in value.items()]
        elif isinstance(value, list):
            waiting += [(key, inner) for inner in value]

        # Those that wait count too: a long list is refused before it is walked.
        if count + len(waiting) > MOST_VALUES:
            raise ValueError(
                f"{file} holds more than {MOST_VALUES:,} values; copy it again, or take lists out "
                "that a text model has no use for, as id2label"
            )


def _without_kernels(config: dict[str, Any], file: Path) -> dict[str, Any]:
    """The config without the kernels it was run with.

    ValueError: it names code, or a kernel that would be fetched, at any depth.
    """
    kept = {}
    for key, value in config.items():
        if key in CODE_KEYS:
            raise ValueError(
                f"{file} has an {key}: the model needs remote code, which is never run; convert it "
                "to a stock architecture"
            )

        # A plain word, such as "sdpa", is a kernel that transformers has itself.
        if key in KERNEL_KEYS:
            is_word = isinstance(value, str) and value.isidentifier()
            if value is not None and not isinstance(value, bool) and not is_word:
                raise ValueError(
                    f"{file}: {key} names a kernel to be fetched ({str(value)[:80]!r}), which is "
                    "never run; remove the key"
                )
            continue
        kept[key] = _without_kernels(value, file) if isinstance(value, dict) else value
    return kept


def _check_family(config: dict[str, Any], file: Path) -> None:
    """ValueError unless model_type is a decoder-only text model that transformers has."""
    family = config.get("model_type")
    classes = config.get("architectures")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise ValueError(
            f"{file}: architectures is {str(classes)[:80]}; needed is a list of class names, as in"
            ' ["LlamaForCausalLM"]'
        )
    if not isinstance(family, str):
        if family is None:
            hint = f'add "model_type": "{_family_of(classes)}", the name of its family'
        else:
            hint = "it must be a text"
        raise ValueError(
            f"{file} has no model_type that can be used (got {str(family)[:80]}); {hint}"
        )

    # A decoder of text, and nothing beside it.
    if any(isinstance(config.get(key), dict) for key in PARTS_KEYS):
        raise ValueError(
            f"{file}: {family} is a model of several parts, text and images or sound; save its "
            "language model by itself and give that"
        )
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or family not in CONFIG_MAPPING:
        raise ValueError(
            f"{file}: model_type {family!r} is no text model that transformers can open without "
            "remote code; convert it to one that is"
        )

    # What it would give must be what scores and losses read.
    for key, value in (("return_dict", False), ("torchscript", True)):
        if config.get(key) is value:
            raise ValueError(
                f"{file}: {key} is {str(value).lower()}, so the model would give bare tuples; take "
                "the key out"
            )
    if config.get("is_encoder_decoder"):
        raise ValueError(
            f"{file}: is_encoder_decoder is true; only decoder-only models can be compressed or "
            "scored"
        )


def _family_of(classes: list[str] | None) -> str:
    """The family that a config's classes are of, "llama" where none is known by them.

    Several families may share a class: the one whose name the class begins with comes first.
    """
    if not classes:
        return "llama"
    families = [
        name for name, kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if kind == classes[0]
    ]
    namesakes = [name for name in families if classes[0].lower().startswith(name.replace("_", ""))]
    return [*namesakes, *families, "llama"][0]


def _check_counts(config: dict[str, Any], file: Path) -> None:
    """ValueError for a size that is no positive number, or a count that no model has.

    Building it would fill the memory.
    """
    renamed = CONFIG_MAPPING[config["model_type"]].attribute_map
    sizes = {*SIZES, *(str(renamed[name]) for name in SIZES if name in renamed)}
    for key, value in config.items():
        values = value if isinstance(value, list) and key in sizes else [value]

        # A size may be a list, with one number a layer.
        for number in values if key in sizes else ():
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(
                    f"{file}: {key} is {str(number)[:80]}; needed is a whole number above 0"
                )

        # Whatever else is counted has a bound, for transformers would build so many.
        counted = key in sizes or key.startswith(("num_", "n_")) or LAYER_COUNT.fullmatch(key)
        most = MOST_LAYERS if LAYER_COUNT.fullmatch(key) else MOST_BY_KEY.get(key, MOST_COUNT)
        for number in values if counted else ():
            if type(number) is int and number > most:
                raise ValueError(
                    f"{file}: {key} is {number if number < 1 << 63 else 'beyond 64 bits'}, at most "
                    f"{most:,} is read; copy it again"
                )


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
            raise ValueError(
                f"more than {modules:,} modules, far more than its weights have tensors"
            )

    # torch tells of every module that is put into another.
    handle = register_module_module_registration_hook(note)
    try:
        yield
    finally:
        handle.remove()
