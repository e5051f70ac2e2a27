"""A checkpoint is a plain Hugging Face directory: `config.json`, `generation_config.json`, `model.safetensors`, tokenizer files.

Opening never leaves the machine and never runs code found in the directory: safetensors and JSON only, no pickle, no `auto_map`.
Tokenizer files travel byte for byte from the teacher to every student: re-saved ones are read differently by other runtimes.
"""

import hashlib
import importlib.util
import json
import shutil
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from compress.store import sha256_file

TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
)  # fmt: skip
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
transformers_logging.disable_progress_bar()


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` as a dict. ValueError when it is missing, no JSON, or names code to run."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a checkpoint: config.json is missing; give a Hugging Face model directory")
    try:
        config = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); copy the checkpoint again") from error
    if "auto_map" in config:
        raise ValueError(f"{file} has an auto_map: the model needs remote code, which is never run; convert it to a stock architecture")
    return config


def config_object(config: dict[str, Any]) -> Any:
    """A config.json's content as the transformers config of its architecture."""
    return AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k not in ("model_type", "transformers_version")})


def head_dim(config: Any) -> int:
    """Width of one attention head by a transformers config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order. ValueError when missing or when an index leaves the directory."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if not (path / INDEX).is_file():
        other = sorted(p.name for p in path.glob("*.bin"))
        hint = f" ({', '.join(other)} is pickle and is not read; convert it to safetensors)" if other else ""
        raise ValueError(f"{path} has no {WEIGHTS}{hint}")
    names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
    for name in names:
        if PurePosixPath(name).name != name or not (path / name).is_file():
            raise ValueError(f"{path / INDEX} names the shard {name!r}: shards must be files of that directory")
    return [path / name for name in names]


def check(path: Path) -> None:
    """Refuse what cannot be opened. ValueError naming the directory and what is missing."""
    if not path.is_dir():
        raise ValueError(f"{path} does not exist or is not a directory; give a checkpoint directory, a GGUF file or a hub id")
    read_config(path)
    weight_files(path)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((path / name).is_file() for name in names):
        raise ValueError(f"{path} has no tokenizer (none of {', '.join(names)}); copy the tokenizer's files beside the weights")


def digest(path: Path) -> str:
    """sha256 over config and weights of a checkpoint: what its numbers depend on."""
    return _digest_of([path / "config.json", *weight_files(path)])


@dataclass(frozen=True)
class Model:
    """A checkpoint directory, an exported one or a GGUF file, with the digest of its weights; a checkpoint made of a GGUF names that as well."""

    path: Path
    digest: str
    runtime: str = "torch"  # or "llama.cpp", "onnxruntime"
    gguf: Path | None = None


def model_of(path: Path) -> Model:
    """A GGUF file or an exported ONNX directory, identified by its bytes, or a checkpoint directory, ready to be scored. ValueError as `check`."""
    if path.is_file():
        return Model(path.absolute(), sha256_file(path), "llama.cpp")
    if (path / "genai_config.json").is_file():
        return Model(path.absolute(), _digest_of(sorted(path.iterdir())), "onnxruntime")
    check(path)
    return Model(path.absolute(), digest(path))


def tokenizer_digest(path: Path) -> str:
    """sha256 over the tokenizer's files: what token ids depend on."""
    return _digest_of(_tokenizer_files(path))


def _digest_of(files: list[Path]) -> str:
    return hashlib.sha256("".join(f"{file.name} {sha256_file(file)}\n" for file in files).encode()).hexdigest()


def load_model(path: Path, dtype: torch.dtype = torch.float32, load: str = "plain") -> PreTrainedModel:
    """The model of a checkpoint directory in eval mode, SDPA attention; on the CPU when `load` is plain.

    `load` = "nf4" holds the linear layers in bitsandbytes' 4-bit, "int8" in torchao's 8-bit weights. ValueError as `check`.
    """
    check(path)
    packed = {} if load == "plain" else {"quantization_config": _packed_weights(load)}
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True,
            attn_implementation="sdpa", **packed,
        )  # fmt: skip
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: transformers can't open architecture {read_config(path).get('architectures')}: {error}") from error
    return model.eval()


def _packed_weights(load: str) -> Any:
    """transformers' configuration for weights held in fewer bits. ValueError when its package is missing."""
    package, install = {"nf4": ("bitsandbytes", "compress-lm[qlora]"), "int8": ("torchao", "torchao")}[load]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"weights in {load} need {package}, which is not installed: pip install '{install}'")
    if load == "nf4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights."""
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def token_count(tokenizer: Any) -> int:
    """Rows that a tokenizer's ids need in an embedding and a head: the highest id and one. Ids may have gaps, so that there are fewer tokens."""
    return max(tokenizer.get_vocab().values()) + 1


def best_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _tokenizer_files(path: Path) -> list[Path]:
    return [path / name for name in TOKENIZER_FILES if (path / name).is_file()]


def save_model(model: PreTrainedModel, out: Path, tokenizer_from: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `model` as a plain checkpoint: floats cast to `dtype`, tied tensors once, tokenizer files copied from `tokenizer_from`.

    Float stages save bf16; quantized stages save fp32, because their values fit no smaller float (Q4_0: fp16 scale times code).
    """
    out.mkdir(parents=True, exist_ok=True)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {
        name: (tensor.detach().to("cpu", dtype) if tensor.is_floating_point() else tensor.detach().cpu()).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in tied
    }
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = {key: value for key, value in model.config.to_dict().items() if key not in ("_name_or_path", "quantization_config")}
    config |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [type(model).__name__]}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tokenizer_from != out:
        copy_beside(tokenizer_from, out)


def copy_beside(checkpoint: Path, out: Path) -> None:
    """Copy what lies beside weights and config, byte for byte: the tokenizer's files and generation_config.json."""
    for file in [checkpoint / "generation_config.json", *_tokenizer_files(checkpoint)]:
        if file.is_file():
            shutil.copyfile(file, out / file.name)
