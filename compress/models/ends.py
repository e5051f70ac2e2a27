"""At which tokens a text ends: one answer, for generation, proof and every export alike.

A checkpoint says it in up to four places, and in practice they differ: config.json,
generation_config.json (often with one more), the tokenizer's end token, and the token that closes
a turn in the chat template. Text ends at any of them: the ends are their union.

What can't be meant is refused with the file that says it: an id that the model does not have, and
a file that names ordinary words alone, at which texts would end in the middle of a sentence. No
end anywhere is refused too: texts would go on for ever.
"""

from pathlib import Path
from typing import Any

from compress.models.end_files import (
    CONFIG,
    GENERATION,
    KEY,
    TEMPLATE,
    TOKENIZER,
    in_files,
    vocabulary_rows,
)

_ANSWER = "Certainly"  # of the turn that is rendered to see what closes it


def end_ids(checkpoint: Path, tokenizer: Any = None) -> list[int]:
    """Where texts of a checkpoint directory end: the tokenizer's own end, then others, ascending.

    `tokenizer`: its HF tokenizer, loaded where it is not given. ValueError naming the file whose
    ends can't be, or no end anywhere.
    """
    if tokenizer is None:
        from compress.models.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(checkpoint)

    # Their union, wherever they are stated.
    ids = {i for place in stated(checkpoint, tokenizer).values() for i in place}
    if not ids:
        places = f"{CONFIG}, {GENERATION}, tokenizer and chat template"
        raise ValueError(
            f"{checkpoint} has no EOS token in {places}, so texts would never end; "
            "set eos_token in tokenizer_config.json"
        )
    return sorted(ids, key=lambda i: (i != tokenizer.eos_token_id, i))


def stated(checkpoint: Path, tokenizer: Any) -> dict[str, list[int]]:
    """Place -> the ids that it names as ends, where it names any. ValueError as `end_ids`."""
    files = in_files(checkpoint)
    rows = vocabulary_rows(checkpoint)
    end_token = tokenizer.eos_token_id
    closing = turn_end(tokenizer)
    places = files | {
        name: [i] for name, i in ((TOKENIZER, end_token), (TEMPLATE, closing)) if i is not None
    }

    # Ids that the model does not have.
    for name, ids in places.items():
        if rows and max(ids) >= rows:
            where = checkpoint / name if name in files else f"{checkpoint}: {name}"
            raise ValueError(
                f"{where} ends texts at id {max(ids)}, and the model has ids up to {rows - 1}; "
                "give an end that it has"
            )

    # Ids that are words.
    for name, ids in files.items():
        if not is_special(tokenizer, *ids):
            words = ", ".join(f"{i} ({tokenizer.convert_ids_to_tokens(i)!r})" for i in ids)
            problem = (
                f"{KEY} {words} is ordinary text to the tokenizer; texts would end in the middle"
            )
            raise ValueError(
                f"{checkpoint / name}: {problem}. Name the tokenizer's end tokens there, "
                f"or take {KEY} out"
            )
    return places


def is_special(tokenizer: Any, *ids: int) -> bool:
    """Whether one of the ids is a token that the tokenizer holds apart from text."""
    return any(i in tokenizer.added_tokens_decoder or i in tokenizer.all_special_ids for i in ids)


def turn_end(tokenizer: Any) -> int | None:
    """The special token that closes an answer in the chat template; None where there is none."""
    if not tokenizer.chat_template:
        return None
    from compress.models.chats import render

    # A template is a program: it may fail or never end, and is refused where it is used.
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _ANSWER}]
    try:
        before, answer, behind = render(tokenizer, [turns])[0].rpartition(_ANSWER)
    except ValueError:
        return None
    if not answer:
        return None
    ids = tokenizer(behind.lstrip(), add_special_tokens=False, verbose=False)["input_ids"]
    token = tokenizer.added_tokens_decoder.get(ids[0]) if ids else None

    # The last: what opens answers as well does not end them.
    if token is None or not token.special or before.rstrip().endswith(token.content):
        return None
    return int(ids[0])


def obey(model: Any, checkpoint: Path, tokenizer: Any = None) -> set[int]:
    """Let a transformers model of the directory `checkpoint` end at `end_ids`; returns them."""
    ids = end_ids(checkpoint, tokenizer)
    model.generation_config.eos_token_id = ids
    return set(ids)
