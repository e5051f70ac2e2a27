"""Byte-level BPE tokenizers between Hugging Face and GGUF.

A GGUF stores vocabulary, merges and token types, but the pre-tokenizer (how text is cut before
merging) by name only, `tokenizer.ggml.pre`; llama.cpp holds the rules behind the name.
`PRE_TOKENIZERS` is our copy of those rules, read in both directions: a name that is not in it is
refused on import, rules that are not in it are refused on export. A guess would give other token
ids, hence another model. ("\\n\\n1" is [1116, 33] for SmolLM2; without its digit splitter it
becomes [198, 198, 33].) Rules that are not in it have a name where llama.cpp's converter knows the
tokenizer by a hash of ids, or where tokenizer_config.json gives one as PRE_KEY: a cut vocabulary
has another hash. BPE with byte fallback is in formats/gguf_sentencepiece.py.

Of the ends of a text llama.cpp reads three: eos, eot (of a turn) and eom (of a message). Some more
it knows by their names (ENDS_BY_NAME). Of several chat templates the default one is
tokenizer.chat_template, the others are there by name.

Left out: Unigram tokenizers, and normalizers other than NFC, which llama.cpp does not apply.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.formats.gguf_sentencepiece import (
    has_prefix,
    is_sentencepiece,
    read_sentencepiece,
    scores_of,
    write_sentencepiece,
)
from compress.formats.llama_conversion import pre_by_hash
from compress.models.end_files import as_value
from compress.models.ends import turn_end
from compress.models.tokenizer import load_tokenizer
from compress.models.vocabulary import SPACE, spelled

PRE_KEY = "gguf_pre"  # of tokenizer_config.json
# Names whose published tokenizers have no normalizer.
NOT_NORMALIZED = ("gpt-2", "smollm", "llama-bpe", "dbrx")
# llama.cpp's src/llama-vocab.cpp, llama_token_type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# Special tokens at which llama.cpp ends a text although no key of the file says so (seen by forcing
# each; tests/models/test_ends.py).
ENDS_BY_NAME = frozenset(
    (
        "<|endoftext|>",
        "<|im_end|>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<EOT>",
        "[EOT]",
        "</s>",
        "<eos>",
        "[EOS]",
        "<｜end▁of▁sentence｜>",
        "<end_of_utterance>",
        "<|return|>",
        "<|call|>",
    )
)

_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SYMBOLS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"


def split(regex: str) -> dict[str, Any]:
    """The rule that makes a piece of every match, as `tokenizers` writes it."""
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def _sequence(regex: str) -> dict[str, Any]:
    """The rules that cut by `regex` and spell out bytes behind it."""
    return {
        "type": "Sequence",
        "pretokenizers": [split(regex), {**_BYTE_LEVEL, "use_regex": False}],
    }


# tokenizer.ggml.pre -> the pre-tokenizer as `tokenizers` writes it
PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "gpt-2": _BYTE_LEVEL,
    "smollm": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    },
    "llama-bpe": _sequence(_WORDS + r"\p{N}{1,3}" + _SYMBOLS + _TAIL),
    "dbrx": _sequence(_WORDS + r"\p{N}{1,3}" + _SYMBOLS + _TAIL),
    "qwen2": _sequence(_WORDS + r"\p{N}" + _SYMBOLS + _TAIL),
}


def pre_name(tokenizer: Any) -> str:
    """The `tokenizer.ggml.pre` name of a fast byte-level HF tokenizer. ValueError when llama.cpp
    would cut text otherwise.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise ValueError(
            f"the tokenizer's model is {state['model']['type']}; allowed in a GGUF: BPE. Leave gguf"
            " out of export.files, or take another teacher"
        )

    # How text is cut, by llama.cpp's name.
    cutting = _rules(state["pre_tokenizer"])
    names = [name for name, rules in PRE_TOKENIZERS.items() if cutting == _rules(rules)]
    names = names or [pre_by_hash(tokenizer) or tokenizer.init_kwargs.get(PRE_KEY)]
    if names == [None]:
        raise ValueError(
            f"the tokenizer's pre-tokenizer {json.dumps(state['pre_tokenizer'])} is not known to be"
            f" one of llama.cpp's (known: {', '.join(PRE_TOKENIZERS)}); add it to PRE_TOKENIZERS,"
            f" or its name in llama.cpp as {PRE_KEY} to tokenizer_config.json, and compare token"
            " ids with llama.cpp"
        )

    # What the name implies besides.
    merged = state["model"].get("ignore_merges", False)
    fitting = [name for name in names if name not in PRE_TOKENIZERS or ignores(name) == merged]
    if not fitting:
        raise ValueError(
            f"a {names[0]} tokenizer has ignore_merges = {not merged}, which llama.cpp reverses"
        )
    normalizer = state["normalizer"]
    if normalizer is not None and (normalizer["type"] != "NFC" or fitting[0] in NOT_NORMALIZED):
        raise ValueError(
            f"the tokenizer's normalizer {normalizer['type']} is not in llama.cpp; allowed: none"
        )
    return fitting[0]


def keep_pre_name(parent: Path, cut: Path) -> None:
    """Write into a cut checkpoint's tokenizer_config.json the name that its parent's pre-tokenizer
    has in llama.cpp, where only a hash of ids tells it, which are others after a cut.
    """
    tokenizer = load_tokenizer(parent)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if is_sentencepiece(state):
        return
    cutting = _rules(state["pre_tokenizer"])
    if any(cutting == _rules(rules) for rules in PRE_TOKENIZERS.values()):
        return

    name = pre_by_hash(tokenizer) or tokenizer.init_kwargs.get(PRE_KEY)
    if name:
        file = cut / "tokenizer_config.json"
        settings = json.loads(file.read_text()) | {PRE_KEY: name}
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def ignores(pre: str) -> bool:
    """Whether llama.cpp takes a text that is a token without merging it."""
    return pre == "llama-bpe"


def check_tokenizer(tokenizer: Any) -> None:
    """ValueError when a tokenizer has no place in a GGUF."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if is_sentencepiece(state):
        state["added"] = {token.content for token in tokenizer.added_tokens_decoder.values()}
        has_prefix(state)
        scores_of(state)
    else:
        pre_name(tokenizer)


def _rules(pre_tokenizer: Any) -> Any:
    """The rules without what does not change ids: `trim_offsets`, and ByteLevel's own default of
    `use_regex`.
    """

    def rule(entry: dict[str, Any]) -> dict[str, Any]:
        entry.pop("trim_offsets", None)
        return {"use_regex": True} | entry if entry.get("type") == "ByteLevel" else entry

    return json.loads(json.dumps(pre_tokenizer), object_hook=rule)


def write_tokenizer(writer: Any, tokenizer: Any, vocab_size: int, ends: Sequence[int]) -> None:
    """Adds vocabulary, merges, types, special tokens, `ends` of texts and chat templates of an HF
    tokenizer to a `gguf.GGUFWriter`.

    ValueError: what llama.cpp would read otherwise, or has no place for.
    """
    vocab = {index: token for token, index in tokenizer.get_vocab().items()}
    if max(vocab) >= vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {max(vocab)}, the model embeds {vocab_size} tokens; one"
            " is foreign"
        )
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if is_sentencepiece(state):
        write_sentencepiece(writer, tokenizer, vocab, vocab_size)
    else:
        _write_byte_level(writer, tokenizer, vocab, vocab_size, state["model"]["merges"])
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])

    # Special tokens, and the ends of a text.
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "unk", "pad")}
    ids |= end_keys(tokenizer, ends)
    for name in ("bos", "eos", "unk", "pad", "eot", "eom"):
        if (index := ids.get(name)) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    _write_templates(writer, templates_of(tokenizer.chat_template))


def _write_byte_level(
    writer: Any, tokenizer: Any, vocab: dict[int, str], vocab_size: int, merges: list[Any]
) -> None:
    """Adds model, tokens, types and merges of byte-level BPE."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_name(tokenizer))

    # Rows of the embedding without a token are padding.
    writer.add_token_list([vocab.get(i, f"[PAD{i}]") for i in range(vocab_size)])
    writer.add_token_types(_token_types(tokenizer, vocab, vocab_size))
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_add_space_prefix(False)


def _token_types(tokenizer: Any, vocab: dict[int, str], vocab_size: int) -> list[int]:
    """llama.cpp's type of each id below `vocab_size`."""
    added = tokenizer.added_tokens_decoder
    types = []
    for i in range(vocab_size):
        if i in added:
            types.append(CONTROL if added[i].special else USER_DEFINED)
        else:
            types.append(NORMAL if i in vocab else UNUSED)
    return types


def end_keys(tokenizer: Any, ends: Sequence[int]) -> dict[str, int]:
    """eos, eot, eom -> id: the tokenizer's end, then the turn's, then those that llama.cpp does
    not know by name.
    """
    closing = turn_end(tokenizer)
    unknown = {i for i in ends if tokenizer.convert_ids_to_tokens(i) not in ENDS_BY_NAME}
    order = sorted(ends, key=lambda i: (i != ends[0], i != closing, i not in unknown, i))
    if unknown_without_key := unknown.intersection(order[3:]):
        raise ValueError(
            f"texts end at {len(ends)} tokens; a GGUF has keys for three, and llama.cpp does not"
            f" know {sorted(unknown_without_key)} by name"
        )
    return dict(zip(("eos", "eot", "eom"), order, strict=False))


def templates_of(templates: str | dict[str, str] | None) -> dict[str, str]:
    """A tokenizer's chat templates by name; a single one is the default. ValueError when none of
    several is.
    """
    if isinstance(templates, dict):
        named = templates
    else:
        named = {"default": templates} if templates else {}

    if named and "default" not in named:
        raise ValueError(
            f"the tokenizer has the chat templates {', '.join(sorted(named))}, and none is called"
            " default; name one so"
        )
    return named


def _write_templates(writer: Any, named: dict[str, str]) -> None:
    """Adds the chat templates."""
    names = sorted(name for name in named if name != "default")
    for name in names:
        writer.add_string(f"tokenizer.chat_template.{name}", named[name])

    # gguf's own function takes the names from a set, in another order every time.
    if names:
        writer.add_array("tokenizer.chat_templates", names)
    if named:
        writer.add_chat_template(named["default"])


def read_tokenizer(fields: dict[str, Any], out: Path) -> dict[str, Any]:
    """Writes the HF tokenizer files of a GGUF's metadata into `out`; returns its special ids
    (`bos_token_id`, ...; of ends one or a list).
    """
    from transformers import PreTrainedTokenizerFast

    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    backend = _backend(fields, ids["bos"])
    tokens = fields["tokenizer.ggml.tokens"]
    special = {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        model_max_length=fields.get(f"{fields['general.architecture']}.context_length"),
        **special,
    )
    tokenizer.chat_template = _templates(fields)
    tokenizer.save_pretrained(out)

    # Like the class name of transformers 5, older readers (vLLM) don't know `backend`; all know the
    # old name.
    file = out / "tokenizer_config.json"
    config = json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.pop("backend", None)
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    special_ids: dict[str, Any] = {
        f"{name}_token_id": index
        for name, index in ids.items()
        if index is not None and name != "unk"
    }
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if several := list(dict.fromkeys(i for i in ends if i is not None)):
        special_ids["eos_token_id"] = as_value(several)
    return special_ids


def _backend(fields: dict[str, Any], bos: int | None) -> Any:
    """The `tokenizers.Tokenizer` of a GGUF's metadata, whose texts begin with `bos` where the file
    says so. ValueError when its cutting rules are not known.
    """
    from tokenizers import AddedToken, Tokenizer, models, processors

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    model = fields.get("tokenizer.ggml.model")
    pre = str(fields.get("tokenizer.ggml.pre"))
    if model != "llama" and (model != "gpt2" or pre not in PRE_TOKENIZERS):
        raise ValueError(
            f"the GGUF's tokenizer is model {model!r} with pre-tokenizer {pre!r}; known are model"
            f" 'llama', and model 'gpt2' with {', '.join(PRE_TOKENIZERS)}. A guess would change"
            " token ids: use this model's Hugging Face checkpoint"
        )

    # Rules are set as JSON: as `tokenizers` writes them, which is how they are known here.
    if model == "llama":
        tokens = spelled(tokens, kinds)
        backend = Tokenizer.from_str(json.dumps(read_sentencepiece(fields)))
    else:
        merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
        vocab = {token: index for index, token in enumerate(tokens)}
        bpe = Tokenizer(models.BPE(vocab, merges, ignore_merges=ignores(pre)))
        state = json.loads(bpe.to_str())
        state |= {"pre_tokenizer": PRE_TOKENIZERS[pre], "decoder": _BYTE_LEVEL}
        backend = Tokenizer.from_str(json.dumps(state))
        backend.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False)

    # BOS before every text, where the file asks for it.
    if fields.get("tokenizer.ggml.add_bos_token", model == "llama" or pre == "llama-bpe"):
        token = tokens[bos]
        backend.post_processor = processors.TemplateProcessing(
            [token, "$A"], [token, "$A", "$B:0"], [(token, bos)]
        )

    # Where spaces are spelled, runs of them are made by merges.
    added = [
        (token, kind)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind == CONTROL or (kind == USER_DEFINED and (model == "gpt2" or SPACE not in token))
    ]
    backend.add_tokens(
        [AddedToken(token, special=kind == CONTROL, normalized=False) for token, kind in added]
    )
    return backend


def _templates(fields: dict[str, Any]) -> Any:
    """A GGUF's chat template; where there are more than the default one, all by name."""
    default = fields.get("tokenizer.chat_template")
    more = {
        name: fields[f"tokenizer.chat_template.{name}"]
        for name in fields.get("tokenizer.chat_templates", [])
        if f"tokenizer.chat_template.{name}" in fields
    }
    return {"default": default} | more if default and more else default
