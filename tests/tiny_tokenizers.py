"""The tokenizers of tiny_families.py: 512 tokens, byte-level or with byte fallback."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compress.formats.gguf_tokenizer import PRE_TOKENIZERS
from compress.text.sources import documents

VOCABULARY = 512
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
# Model types that are published with a tokenizer of BPE with byte fallback.
FALLBACK = ("gemma", "gemma2", "gemma3_text", "phi3", "nemotron", "mistral")


def tokenizer_of(name: str, out: Path) -> None:
    """A byte-level tokenizer, or one with byte fallback for FALLBACK."""
    backend = fallback() if name in FALLBACK else byte_level()
    if name == "qwen2":  # whatever its file says, transformers cuts by the family's rules
        state = json.loads(backend.to_str()) | {"pre_tokenizer": PRE_TOKENIZERS["qwen2"]}
        backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(out)


@cache
def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(backend, VOCABULARY, SPECIAL, sorted(alphabet))
    return backend


@cache
def fallback() -> Tokenizer:
    """Like Gemma's: all ways to split a token are merges, in the order of the tokens."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    _train(backend, VOCABULARY, SPECIAL + spelled, [])
    state = json.loads(backend.to_str())
    model = state["model"]
    state["added_tokens"] = [e for e in state["added_tokens"] if e["content"] in SPECIAL]

    # Trained merges know one way to make a token.
    vocab, made = model["vocab"], ["".join(pair) for pair in model["merges"]]
    model["merges"] = [
        [token[:i], token[i:]]
        for token in dict.fromkeys(made)
        for i in range(1, len(token))
        if token[:i] in vocab and token[i:] in vocab
    ]
    state["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    return Tokenizer.from_str(json.dumps(state))


def _train(backend: Tokenizer, size: int, special: list[str], alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    texts = [str(text) for text in documents("embedded:topics")[:20]]
    backend.train_from_iterator(texts, trainer)
