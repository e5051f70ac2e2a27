"""A BPE tokenizer's files without some of its tokens: vocabulary, merges, added tokens, what a
post-processor puts around a text, and the ids in config.json and generation_config.json.

Two kinds are known. Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM) spells every byte as a letter of
its own alphabet; BPE with byte fallback (Llama 2, Gemma) has the tokens <0x00> to <0xFF>. Either
can still write any text when only special tokens and bytes are left, so cutting loses no text. Ids
keep their order and close up. Left out: Unigram and WordPiece, whose tokens build on nothing; and
SentencePiece's own file, tokenizer.model, which is not written again: tokenizer.json says it all.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.doors import read_json
from compress.models.end_files import CONFIG, GENERATION, as_value
from compress.models.ends import end_ids
from compress.models.tokenizer import tokenizer_files
from compress.prune.vocabulary import Merge

TOKENIZER = "tokenizer.json"
SPACE = "▁"  # SentencePiece's: a text's spaces can be written by no other token
IDS_KEYS = ("token_id", "token_ids", "suppress_tokens")  # ends of keys that hold token ids


class Bpe(NamedTuple):
    """A BPE tokenizer: token -> id, added ones included; merges in order; ids that must stay."""

    ids: dict[str, int]
    merges: list[Merge]
    protected: set[int]


def read_bpe(checkpoint: Path) -> Bpe:
    """The BPE tokenizer of a checkpoint. ValueError, naming its kind, for one that can't be cut."""
    file = checkpoint / TOKENIZER
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} has no {TOKENIZER}, the only kind of tokenizer whose tokens can be cut;"
            " save it with transformers' AutoTokenizer first"
        )
    state = read_json(file)
    model = state["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"{file}: its model is {model.get('type')}; tokens can be cut of byte-level BPE and of"
            " BPE with byte fallback"
        )

    # Every text must stay writable, so all bytes stay.
    ids: dict[str, int] = dict(model["vocab"])
    if model.get("byte_fallback"):
        spelled = [f"<0x{byte:02X}>" for byte in range(256)] + [SPACE]
    elif "ByteLevel" in json.dumps([state.get("pre_tokenizer"), state.get("decoder")]):
        spelled = _byte_letters()
    else:
        spelled = []
    affixes = [model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix")]
    if not spelled or any(affixes):
        raise ValueError(
            f"{file}: its BPE is neither byte-level nor with byte fallback, or marks parts of words"
            f" ({affixes}); without all bytes a smaller vocabulary could not write every text"
        )

    added = {entry["content"]: int(entry["id"]) for entry in state.get("added_tokens", [])}
    ids |= added
    protected = set(added.values()) | {ids[token] for token in spelled if token in ids}
    if model.get("unk_token") in ids:
        protected.add(ids[model["unk_token"]])
    return Bpe(ids, [_pair(merge) for merge in model["merges"]], protected | _named_ids(checkpoint))


def _byte_letters() -> list[str]:
    """The letters by which byte-level BPE writes the 256 bytes."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _pair(merge: str | Sequence[str]) -> Merge:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _named_ids(checkpoint: Path) -> set[int]:
    """Ids that config.json and generation_config.json name, and the ends of texts."""
    named = set(end_ids(checkpoint))
    for name in (CONFIG, GENERATION):
        if (checkpoint / name).is_file():
            renumbered(read_json(checkpoint / name), named.add)
    return {i for i in named if type(i) is int and i >= 0}


def renumbered(about: Any, new_id: Any, key: str = "") -> Any:
    """A configuration with `new_id(i)` in place of every token id `i`, at any depth."""
    if isinstance(about, dict):
        return {name: renumbered(value, new_id, str(name)) for name, value in about.items()}
    if isinstance(about, list):
        return [renumbered(value, new_id, key) for value in about]
    is_id = key.endswith(IDS_KEYS) and type(about) is int and about >= 0
    return new_id(about) if is_id else about


def write_cut(checkpoint: Path, out: Path, kept: Sequence[int]) -> int | list[int]:
    """Write the tokenizer's files and generation_config.json of a checkpoint into `out` with the
    ids `kept` alone, numbered anew in their order; the new `eos_token_id`.
    """
    new_ids = {old: new for new, old in enumerate(kept)}
    ends = as_value([new_ids[i] for i in end_ids(checkpoint)])
    for file in tokenizer_files(checkpoint):
        if file.name == "tokenizer.model":
            continue
        copy = out / file.relative_to(checkpoint)
        copy.parent.mkdir(exist_ok=True)
        if rewrite := REWRITTEN.get(file.name):
            copy.write_text(rewrite(file, new_ids), encoding="utf-8")
        else:
            shutil.copyfile(file, copy)

    # Its readers look for ends nowhere else.
    if (checkpoint / GENERATION).is_file():
        about = renumbered(read_json(checkpoint / GENERATION), new_ids.__getitem__)
        (out / GENERATION).write_text(json.dumps(about | {"eos_token_id": ends}, indent=2) + "\n")
    return ends


def _tokenizer(file: Path, new_ids: Mapping[int, int]) -> str:
    """tokenizer.json with the tokens that are left."""
    state = read_json(file)
    model = state["model"]
    vocab: dict[str, int] = model["vocab"]
    model["vocab"] = {token: new_ids[i] for token, i in vocab.items() if i in new_ids}
    model["merges"] = [
        merge for merge in model["merges"] if "".join(_pair(merge)) in model["vocab"]
    ]
    for entry in state.get("added_tokens", []):
        entry["id"] = new_ids[entry["id"]]

    # What is put around a text or behind it has ids of its own.
    if state.get("post_processor"):
        state["post_processor"] = _processor(state["post_processor"], new_ids)
    if state.get("padding"):
        state["padding"]["pad_id"] = new_ids[state["padding"]["pad_id"]]
    return json.dumps(state, indent=2, ensure_ascii=False) + "\n"


def _processor(rule: Any, new_ids: Mapping[int, int]) -> Any:
    """A post-processor with new ids: template's `ids`, and BERT's pairs `sep` and `cls`."""
    if isinstance(rule, list):
        return [_processor(part, new_ids) for part in rule]
    if not isinstance(rule, dict):
        return rule
    changed = {key: _processor(value, new_ids) for key, value in rule.items()}
    if isinstance(rule.get("ids"), list):
        changed["ids"] = [new_ids[i] for i in rule["ids"]]
    for key in ("sep", "cls"):
        if isinstance(rule.get(key), list):
            token, index = rule[key]
            changed[key] = [token, new_ids[index]]
    return changed


def _tokenizer_config(file: Path, new_ids: Mapping[int, int]) -> str:
    """tokenizer_config.json, whose added tokens are named by their ids."""
    about = read_json(file)
    if "added_tokens_decoder" in about:
        about["added_tokens_decoder"] = {
            str(new_ids[int(i)]): token for i, token in about["added_tokens_decoder"].items()
        }
    return json.dumps(about, indent=2, ensure_ascii=False) + "\n"


def _vocab(file: Path, new_ids: Mapping[int, int]) -> str:
    """A table of token -> id, as vocab.json and added_tokens.json are."""
    table = {token: new_ids[i] for token, i in read_json(file).items() if i in new_ids}
    return json.dumps(table, ensure_ascii=False) + "\n"


def _merges(file: Path, new_ids: Mapping[int, int]) -> str:
    """merges.txt, a merge a line."""
    vocab = read_json(file.parent / TOKENIZER)["model"]["vocab"]
    lines = file.read_text(encoding="utf-8").splitlines()
    return "".join(
        f"{line}\n"
        for line in lines
        if line.startswith("#version") or vocab.get(line.replace(" ", "", 1)) in new_ids
    )


REWRITTEN = {
    TOKENIZER: _tokenizer,
    "tokenizer_config.json": _tokenizer_config,
    "added_tokens.json": _vocab,
    "vocab.json": _vocab,
    "merges.txt": _merges,
}
