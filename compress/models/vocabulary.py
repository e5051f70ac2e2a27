"""Whether two models mean the same by a token id: else one can't be scored in the other's tokens.

Compared are the token of every id, added and special ones included, and the rules by which text
becomes tokens: merges of BPE, scores of Unigram. Chat templates, ends and padding may differ: they
change what a model is asked, not what an id means.

A GGUF holds BPE with byte fallback as scores: of all neighbours whose text together is a token
those of the highest score are joined, so every way to make a token is a merge, and those of one
token have no order among them. Tokens that are taken from a text before anything is merged need no
merges, and have none here; of those, runs of spaces are merged after all, before everything else:
Gemma's own files give them the score -1000, which is none.
"""

import json
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from compress.models.model import Model

# llama.cpp's types of tokens: of text, taken from a text before anything is merged, filling a gap.
NORMAL, USER_DEFINED, UNUSED = 1, 4, 5
UNMERGED = -1e30  # score of a token that nothing is merged to
SPACE = "▁"  # a space, where bytes are tokens of their own


class Vocabulary(NamedTuple):
    """What decides the meaning of ids; `rules` is empty where a file does not hold them."""

    tokens: dict[int, str]
    rules: list[tuple[Any, ...]]


def of_tokenizer(tokenizer: Any) -> Vocabulary:
    """The vocabulary of an HF tokenizer."""
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model: dict[str, Any] = json.loads(backend.to_str())["model"] if backend is not None else {}
    vocab = model.get("vocab", [])
    rules = model.get("merges") or (vocab if isinstance(vocab, list) else [])
    merges = [_merge(rule) for rule in rules]
    if not model.get("byte_fallback"):
        return Vocabulary(tokens, merges)

    # What is taken from a text first is made by no merge.
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    taken = {token for token in added if SPACE not in token}
    return Vocabulary(tokens, grouped([pair for pair in merges if "".join(pair) not in taken]))


def of_gguf(file: Path) -> Vocabulary:
    """The vocabulary inside a GGUF, without what only fills it up."""
    from compress.models.gguf_header import read_metadata

    fields = read_metadata(file)
    tokens = fields.get("tokenizer.ggml.tokens", [])
    kinds = fields.get("tokenizer.ggml.token_type", [0] * len(tokens))
    rules = [_merge(rule) for rule in fields.get("tokenizer.ggml.merges", [])]
    if fields.get("tokenizer.ggml.model") == "llama":
        tokens = spelled(tokens, kinds)
        rules = merges_of(tokens, kinds, fields["tokenizer.ggml.scores"])
    named = {
        i: token
        for i, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind != UNUSED and token != f"[PAD{i}]"
    }
    return Vocabulary(named, rules)


def spelled(tokens: Sequence[str], kinds: Sequence[int]) -> list[str]:
    """Tokens of a GGUF with byte fallback as tokenizer.json spells them."""
    return [
        token.replace(" ", SPACE) if kind == USER_DEFINED else token
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def merges_of(
    tokens: Sequence[str], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """What scores mean as merges, in the order of scores; `tokens` as `spelled` gives them."""
    of_text = {tokens[i] for i, kind in enumerate(kinds) if kind in (NORMAL, USER_DEFINED)}
    runs = {i for i, kind in enumerate(kinds) if kind == USER_DEFINED and SPACE in tokens[i]}
    merged = runs | {i for i, kind in enumerate(kinds) if kind == NORMAL}
    joined = sorted(
        (i for i in merged if scores[i] > UNMERGED / 2 and len(tokens[i]) > 1),
        key=lambda i: (i not in runs, -scores[i], i),
    )
    return [
        (tokens[i][:at], tokens[i][at:])
        for i in joined
        for at in range(1, len(tokens[i]))
        if tokens[i][:at] in of_text and tokens[i][at:] in of_text
    ]


def grouped(merges: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Merges with those of one token side by side, the one that cuts it earliest first."""
    order: dict[str, int] = {}
    for merge in merges:
        order.setdefault("".join(merge), len(order))
    return sorted(merges, key=lambda merge: (order["".join(merge)], len(merge[0])))


def vocabulary_of(path: Path) -> Vocabulary:
    """The vocabulary of a checkpoint directory or a GGUF."""
    if path.is_file():
        return of_gguf(path)
    from compress.models.tokenizer import load_tokenizer  # transformers, which a GGUF needs not

    return of_tokenizer(load_tokenizer(path))


def _merge(rule: Any) -> tuple[Any, ...]:
    """A merge, written as a pair or as two words with a space between."""
    return tuple(rule.split(" ", 1) if isinstance(rule, str) else rule)


def difference(mine: Vocabulary, other: Vocabulary) -> str:
    """The first id, or else rule, in which two vocabularies differ, as words; "" for none."""
    for i in sorted(mine.tokens.keys() | other.tokens.keys()):
        if mine.tokens.get(i) != other.tokens.get(i):
            here, there = (
                repr(side.tokens[i]) if i in side.tokens else "no token" for side in (mine, other)
            )
            return f"id {i} is {here} in the one and {there} in the other"

    # A file may hold no rules: then ids alone decide.
    if mine.rules and other.rules:
        for number, rules in enumerate(zip_longest(mine.rules, other.rules), 1):
            if rules[0] != rules[1]:
                here, there = map(_words, rules)
                return f"rule {number} is {here} in the one and {there} in the other"
    return ""


def is_cut_of(small: Vocabulary, large: Vocabulary) -> bool:
    """Whether one vocabulary was cut out of another: its tokens all there, without gaps between its
    ids, and its merges those of the other whose tokens it has, in their order.
    """
    tokens = set(small.tokens.values())
    if not tokens < set(large.tokens.values()) or sorted(small.tokens) != list(range(len(tokens))):
        return False
    merges = [rule for rule in large.rules if {*rule, "".join(rule)} <= tokens]
    return bool(merges) and small.rules == merges


def _words(rule: tuple[Any, ...] | None) -> str:
    return "missing" if rule is None else " + ".join(map(repr, rule))


def check_same(model: Model, tokenizer_dir: Path) -> list[str]:
    """Refuse a model whose ids mean something else than those of the directory `tokenizer_dir`,
    unless its vocabulary was cut out of that one.

    Returns what else differs, as sentences.
    ValueError naming the first differing id.
    """
    from compress.models.tokenizer import load_tokenizer, tokenizer_digest

    if model.path.is_dir() and tokenizer_digest(model.path) == tokenizer_digest(tokenizer_dir):
        return []

    # What an id means must be the same.
    theirs = load_tokenizer(tokenizer_dir)
    ours = load_tokenizer(model.path) if model.path.is_dir() else None
    vocabulary = of_tokenizer(ours) if ours else of_gguf(model.path)
    teachers = of_tokenizer(theirs)
    cut = is_cut_of(vocabulary, teachers)
    first_difference = difference(vocabulary, teachers)
    if first_difference and not cut:
        next_step = "give the teacher whose tokens the model was made for, with --teacher"
        raise ValueError(
            f"{model.path} and {tokenizer_dir} have different tokenizers: {first_difference}, "
            f"so scores in these ids mean nothing; {next_step}"
        )

    # What a model is asked may differ: it is said, not refused.
    if cut:
        return [
            f"{model.path} has {len(vocabulary.tokens):,} of the teacher's {len(teachers.tokens):,}"
            " tokens: KL is a token of its own text, bits per byte are the fair measure"
        ]
    if ours is None:
        return []
    facts = {"chat template": "chat_template", "end token": "eos_token", "first token": "bos_token"}
    differing = [name for name, key in facts.items() if getattr(ours, key) != getattr(theirs, key)]
    return [
        f"{model.path} has the teacher's tokens, and another {name}: each model is asked by its own"
        for name in differing
    ]
