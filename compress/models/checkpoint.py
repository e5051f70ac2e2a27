"""A checkpoint is a plain Hugging Face directory: `config.json`, `generation_config.json`,
`model.safetensors`, tokenizer files.

Opening never leaves the machine and never runs code found in the directory: safetensors and JSON
only, no pickle, no `auto_map`. Tokenizer files travel byte for byte from the teacher to every
student: re-saved ones are read differently by other runtimes.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from compress.doors import read_json
from compress.models.blocks import blocks_of, row_of
from compress.models.end_files import GENERATION, as_ids, as_value
from compress.models.ends import end_ids
from compress.models.loaded import check_complete, check_forward
from compress.models.loading import (
    WEIGHTS,
    check_directory,
    check_weights,
    tensor_table,
    weight_files,
)
from compress.models.model import Model, gguf_model, runtime_at
from compress.models.model_config import config_object, is_of_input, one_line, quiet, read_config
from compress.models.tensor_file import Entry, write_tensors
from compress.models.tokenizer import copy_tokenizer, tokenizer_files
from compress.store import files_digest

# Found here by their users.
__all__ = ["WEIGHTS", "Model", "config_object", "read_config", "runtime_at", "weight_files"]

# States of files that `check` found to be whole checkpoints; a renamed directory keeps its own.
_looked: set[tuple[Any, ...]] = set()
# Of those whose model was loaded and compared with itself.
_proven: set[tuple[Any, ...]] = set()
transformers_logging.disable_progress_bar()


def head_dim(config: Any) -> int:
    """Width of one attention head by a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check(path: Path) -> None:
    """Refuse what cannot be opened. ValueError naming the directory and what is missing."""
    if not path.is_dir():
        raise ValueError(
            f"{path} does not exist or is not a directory; give a checkpoint directory, a GGUF file"
            " or a hub id"
        )

    # Everything it is made of is there.
    check_directory(path)
    files = weight_files(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((path / name).is_file() for name in names):
        raise ValueError(
            f"{path} has no tokenizer (none of {', '.join(names)}); copy the tokenizer's files"
            " beside the weights"
        )

    # Weights are looked at once, while their files stay as they are.
    state = _state([path / "config.json", *files])
    if state in _looked:
        return
    if not check_weights(path):
        _prove(path, _opened(path, torch.float32, "plain"))
    _looked.add(state)


def _state(files: list[Path]) -> tuple[Any, ...]:
    """What changes when one of the files does."""
    states = [(file.name, file.stat()) for file in files]
    return tuple(
        (name, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        for name, state in states
    )


def _prove(path: Path, model: PreTrainedModel) -> None:
    """`check_forward`, once for every checkpoint in this process."""
    state = _state([path / "config.json", *weight_files(path)])
    if state not in _proven:
        check_forward(path, model)
        _proven.add(state)


def digest(path: Path) -> str:
    """sha256 over a checkpoint: config, weights, and every file that is copied beside them."""
    return files_digest(path, [path / "config.json", *weight_files(path), *_beside(path)])


def weights_digest(path: Path) -> str:
    """sha256 over config and weights of a checkpoint: what its hidden states depend on."""
    return files_digest(path, [path / "config.json", *weight_files(path)])


def model_of(path: Path) -> Model:
    """A GGUF file or an exported ONNX directory, identified by its bytes, or a checkpoint
    directory, ready to be scored.

    ValueError as `check` and `gguf_header.check_file`.
    """
    runtime = runtime_at(path)
    if runtime == "llama.cpp":
        return gguf_model(path)

    # Of what ONNX Runtime GenAI opens, all that is in the directory counts.
    if runtime == "onnxruntime":
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return Model(path.absolute(), files_digest(path, files), runtime)

    check(path)
    return Model(path.absolute(), digest(path))


def load_model(
    path: Path, dtype: torch.dtype = torch.float32, load: str = "plain"
) -> PreTrainedModel:
    """The model of a checkpoint directory in eval mode, SDPA attention where the family has it; on
    the CPU when `load` is plain.

    `load` = "nf4" holds the linear layers in bitsandbytes' 4-bit, "int8" in torchao's 8-bit
    weights. ValueError as `check`, and when tensors are missing or foreign, or hidden states times
    head are not the model's own logits (`compress/models/loaded.py`).
    """
    check(path)
    model = _opened(path, dtype, load)
    if load == "plain":
        _prove(path, model)
    return model


def load_stored(path: Path) -> PreTrainedModel:
    """As `load_model`, in the bytes of the file: matrices in the decoder blocks of a bf16
    checkpoint stay bf16, and where they are, read when they are used; all else is fp32.

    For whoever computes with one block at a time, in fp32 (`models/walk.py`), or under autocast:
    the values are those of `load_model`. Files of other types, and families without a row in
    `models/blocks.py`, are opened in fp32 altogether.
    """
    check(path)
    floats = {place.dtype for _, place in tensor_table(path).values() if "F" in place.dtype}
    if floats != {"BF16"}:
        return load_model(path)

    # What a family without a row does besides its blocks is not known.
    model = load_model(path, torch.bfloat16)
    if row_of(model) is None:
        return load_model(path)

    # Each matrix is mapped by itself: all of a file's are otherwise there until the last one goes.
    short = {id(p) for p in blocks_of(model).parameters() if p.dim() > 1}
    table = tensor_table(path)
    for name, parameter in model.named_parameters():
        if id(parameter) not in short:
            parameter.data = parameter.data.float()
        elif name in table and torch.equal(_mapped(table[name][0], name), parameter):
            parameter.data = _mapped(table[name][0], name)
    return model


def _mapped(file: Path, name: str) -> Tensor:
    """A tensor of a safetensors file, read when it is used; writing to it changes no file."""
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def let_go(parameter: nn.Parameter) -> None:
    """Take the memory of a parameter that nobody reads again: it keeps shape and type alone."""
    nothing = torch.full((), torch.nan, dtype=parameter.dtype, device=parameter.device)
    parameter.data = nothing.expand(parameter.shape)


def open_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint that `load_model` opened before, without another look at it: for
    measuring its time and memory.
    """
    check_directory(path)
    return _opened(path, dtype, "plain")


def _opened(path: Path, dtype: torch.dtype, load: str) -> PreTrainedModel:
    """The model as transformers opens it, complete. ValueError as `load_model`."""
    packed = {} if load == "plain" else {"quantization_config": _packed_weights(load)}
    classes = read_config(path)["architectures"]
    try:
        with quiet():
            config = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            sdpa = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation="sdpa" if sdpa else "eager",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **packed,
            )
    # Whatever a family's own code raises about a file.
    except Exception as error:
        if not is_of_input(error):
            raise
        raise ValueError(
            f"{path}: transformers can't open architecture {classes}: {one_line(error)}"
        ) from error

    # What is missing or of another size is refused here, by name.
    model, info = loaded
    check_complete(path, info)
    return model.eval()


def _packed_weights(load: str) -> Any:
    """transformers' configuration for weights held in fewer bits. ValueError when its package is
    missing.
    """
    package, install = {
        "nf4": ("bitsandbytes", "compress-lm[qlora]"),
        "int8": ("torchao", "torchao"),
    }[load]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"weights in {load} need {package}, which is not installed: pip install '{install}'"
        )
    if load == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def best_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def save_model(
    model: PreTrainedModel,
    out: Path,
    tokenizer_from: Path,
    dtype: torch.dtype = torch.bfloat16,
    instead: Mapping[str, Callable[[], Tensor]] | None = None,
) -> None:
    """Write `model` as a plain checkpoint: floats cast to `dtype`, tied tensors once, tokenizer
    files copied from `tokenizer_from`, whose ends config.json names. `instead` makes tensors, by
    name, that the model does not hold. One tensor is converted at a time.

    Float stages save bf16; quantized stages save fp32, because their values fit no smaller float
    (Q4_0: fp16 scale times code).
    """
    out.mkdir(parents=True, exist_ok=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    entries: dict[str, Entry] = {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            make = (instead or {}).get(name, partial(_as_it_is, tensor))
            entries[name] = Entry(kind, tuple(tensor.shape), partial(_on_cpu, make, kind))
    write_tensors(out / WEIGHTS, entries, {"format": "pt"})

    # How it was opened is no part of it.
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in ("_name_or_path", "quantization_config")
    }
    config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    if tokenizer_from != out:
        config["eos_token_id"] = as_value(end_ids(tokenizer_from))
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    if tokenizer_from != out:
        copy_beside(tokenizer_from, out)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _on_cpu(make: Callable[[], Tensor], kind: torch.dtype) -> Tensor:
    return make().detach().to("cpu", kind)


def copy_beside(checkpoint: Path, out: Path) -> None:
    """Copy what lies beside weights and config, byte for byte: the tokenizer's files and
    generation_config.json.

    A generation_config.json that lacks one of the checkpoint's ends is written with all of them:
    its readers look nowhere else.
    """
    copy_tokenizer(checkpoint, out)
    if not (checkpoint / GENERATION).is_file():
        return

    shutil.copyfile(checkpoint / GENERATION, out / GENERATION)
    about = read_json(checkpoint / GENERATION)
    ends = end_ids(checkpoint)
    if set(as_ids(about.get("eos_token_id"), checkpoint / GENERATION)) != set(ends):
        (out / GENERATION).write_text(
            json.dumps(about | {"eos_token_id": as_value(ends)}, indent=2) + "\n"
        )


def _beside(path: Path) -> list[Path]:
    """What `copy_beside` copies."""
    generation = [path / GENERATION] if (path / GENERATION).is_file() else []
    return generation + tokenizer_files(path)
