"""From what a recipe calls its teacher to a plain checkpoint directory.

packaged:MODULE   the .gguf inside an installed package, imported into the store once
random:SEED       a tiny Llama with random weights and a small tokenizer, for smoke tests
FILE.gguf         imported into the store once
DIRECTORY         used where it is, never written to
OWNER/NAME        a hub id: downloaded by huggingface_hub, identified by its commit
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.checkpoint import check, digest, load_tokenizer, sha256_file
from compress.store import Store, sha256_json

IMPORT_SCHEMA = 1  # raise when an import writes other bytes than before


@dataclass(frozen=True)
class OpenTeacher:
    """The teacher's directory, the digest of its weights, and the file it came from when that is a GGUF."""

    path: Path
    digest: str
    gguf: Path | None = None


def open_teacher(source: str, revision: str | None, store: Store, log: Callable[[str], None]) -> OpenTeacher:
    """Find, import or download. ValueError naming what is missing and what to give instead."""
    gguf: Path | None = None
    if source.startswith("random:"):
        seed = source.removeprefix("random:")
        if not seed.isdigit():
            raise ValueError(f"teacher source {source!r}: the seed after random: must be a whole number")
        path = _import(store, {"random": int(seed)}, lambda out: random_teacher(out, int(seed)))
    elif source.startswith("packaged:") or source.endswith(".gguf"):
        from compress.gguf_teacher import find_packaged, import_gguf

        gguf = find_packaged(source.removeprefix("packaged:")) if source.startswith("packaged:") else Path(source).expanduser()
        if not gguf.is_file():
            raise ValueError(f"teacher file {gguf} does not exist; give a .gguf file, a checkpoint directory or a hub id")
        log(f"teacher: {gguf.name}")
        found = gguf
        path = _import(store, {"gguf": sha256_file(gguf)}, lambda out: import_gguf(found, out))
    elif Path(source).expanduser().is_dir():
        path = Path(source).expanduser().absolute()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        path = _download(source, revision)
    else:
        raise ValueError(f"teacher {source!r} does not exist; give a checkpoint directory, a .gguf file or a hub id (owner/name)")
    check(path)
    if load_tokenizer(path).eos_token_id is None:
        raise ValueError(f"{path}: the tokenizer has no EOS token, so documents can't be told apart; set eos_token in tokenizer_config.json")
    return OpenTeacher(path, digest(path), gguf)


def _import(store: Store, what: dict[str, Any], write: Callable[[Path], None]) -> Path:
    inputs = {"teacher": what, "schema": IMPORT_SCHEMA}

    def make(out: Path, work: Path) -> dict[str, float]:
        write(out)
        return {}

    return store.build(sha256_json(inputs), inputs, make)


def _download(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"hub teacher {name!r} can't be had ({type(error).__name__}); check the name, the network and `hf auth login`, or give a local directory"
        ) from error


def random_teacher(out: Path, seed: int) -> None:
    """A Llama of 0.4M random parameters and a 512-token byte-level BPE tokenizer with a chat template."""
    import json

    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from compress.checkpoint import save_model
    from compress.train.sources import documents

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([str(text) for text in documents("embedded:topics")[:20]], trainer)
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>")
    fast.chat_template = template
    fast.save_pretrained(out)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    save_model(LlamaForCausalLM(config), out, tokenizer_from=out)
    (out / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}) + "\n")
    (out / "source.json").write_text(json.dumps({"source": f"random weights, seed {seed}", "licence": "none needed"}) + "\n")
