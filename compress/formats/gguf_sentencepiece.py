"""BPE with byte fallback (Llama 2, Gemma, Phi-3) between Hugging Face and GGUF.

tokenizer.json lists merges in order; llama.cpp's tokenizer "llama" knows none: of all neighbours
whose text together is a token it joins those of the highest score first, the leftmost of equals,
as SentencePiece does. The two agree where merges are what SentencePiece's model says: every way to
split a token into two tokens is a merge, and the merges that make one token follow each other. Then
a token's score is minus the place of its first merge. Other merges are refused. A vocabulary that
was cut keeps both properties, and no tokenizer.model is needed.

Spaces are ▁ in the vocabulary. A token that is taken from a text before anything is merged has no ▁
here: no text has one, so that merges make Gemma's runs of spaces on both sides. (Files of others
take them first, and llama.cpp cuts 32 spaces in another way.) Left out: Unigram, whose scores are
probabilities.
"""

import json
from typing import Any

from compress.models.vocabulary import SPACE, UNMERGED, merges_of, spelled

# llama.cpp's src/llama-vocab.cpp, llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_ESCAPED = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
_PREPENDED = {"type": "Prepend", "prepend": SPACE}


def is_sentencepiece(state: dict[str, Any]) -> bool:
    """Whether a tokenizer, as `tokenizers` writes it, is BPE with byte fallback."""
    model = state["model"]
    return model["type"] == "BPE" and bool(model.get("byte_fallback"))


def has_prefix(state: dict[str, Any]) -> bool:
    """Whether a space is put before a text. ValueError for rules that llama.cpp does not apply."""
    normalizer, cutter = state["normalizer"], state["pre_tokenizer"]
    rules = normalizer["normalizers"] if (normalizer or {}).get("type") == "Sequence" else None
    rules = rules if rules is not None else [normalizer] if normalizer else []
    split = cutter is not None and cutter.get("split", False)

    # Three ways of saying it.
    if cutter is not None and cutter["type"] == "Metaspace":
        crossing = any(SPACE in token[1:] for token in state["model"]["vocab"] if token[0] != SPACE)
        if not rules and cutter["replacement"] == SPACE and not (split and crossing):
            return bool(cutter.get("prepend_scheme", "always") != "never")
    idle = cutter is None or (cutter["type"] == "Split" and cutter["pattern"] == {"String": " "})
    if idle and rules == [_ESCAPED]:
        return False
    if idle and rules == [_PREPENDED, _ESCAPED]:
        return True
    raise ValueError(
        f"the tokenizer's rules {json.dumps([normalizer, cutter], ensure_ascii=False)} are not"
        " those of SentencePiece in llama.cpp; export compressed_tensors"
    )


def scores_of(state: dict[str, Any]) -> dict[str, float]:
    """Token -> score, of all that merges make. ValueError when llama.cpp would merge otherwise."""
    vocab = state["model"]["vocab"]
    pairs = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in state["model"]["merges"]
    ]
    scores: dict[str, float] = {}
    last = ""
    for place, pair in enumerate(pairs):
        token = "".join(pair)
        if token in scores and token != last:
            raise ValueError(
                f"the tokenizer's merges of {token!r} do not follow each other: llama.cpp would"
                " merge otherwise; export compressed_tensors"
            )
        scores.setdefault(token, -float(place))
        last = token

    # What llama.cpp would join and the tokenizer does not.
    known = set(pairs)
    for token in vocab:
        for i in range(1, len(token)):
            pair = token[:i], token[i:]
            if pair[0] in vocab and pair[1] in vocab and pair not in known:
                if token in state["added"] or token.startswith("<0x"):
                    continue
                raise ValueError(
                    f"the tokenizer does not merge {pair}, llama.cpp would; export"
                    " compressed_tensors"
                )
    return scores


def write_sentencepiece(writer: Any, tokenizer: Any, vocab: dict[int, str], ids_count: int) -> None:
    """Adds model, tokens, scores and types of the first `ids_count` ids to a `gguf.GGUFWriter`."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    added = tokenizer.added_tokens_decoder
    state["added"] = {token.content for token in added.values()}
    scores = scores_of(state)
    unknown = state["model"].get("unk_token")

    def kind(i: int) -> int:
        if i not in vocab:
            return UNUSED
        if vocab[i] == unknown:
            return UNKNOWN
        if i in added and (added[i].special or SPACE not in vocab[i]):
            return CONTROL if added[i].special else USER_DEFINED
        return BYTE if _is_byte(vocab[i]) else NORMAL

    # Padding rows have no token.
    tokens = [vocab.get(i, f"[PAD{i}]") for i in range(ids_count)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([scores.get(token, UNMERGED) for token in tokens])
    writer.add_token_types([kind(i) for i in range(ids_count)])
    writer.add_add_space_prefix(has_prefix(state))


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def read_sentencepiece(fields: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer of a GGUF's metadata as `tokenizers` writes it, without added tokens."""
    kinds = fields["tokenizer.ggml.token_type"]
    tokens = spelled(fields["tokenizer.ggml.tokens"], kinds)
    merges = merges_of(tokens, kinds, fields["tokenizer.ggml.scores"])
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    prefix = fields.get("tokenizer.ggml.add_space_prefix", True)
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unescape = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [_PREPENDED, _ESCAPED]}
        if prefix
        else _ESCAPED,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }
