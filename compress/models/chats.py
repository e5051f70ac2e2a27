"""Chats: what a row says, turn by turn, as the teacher's chat template renders it, and which of
its tokens are an answer's.

`render` is the one door to a chat template: it runs in a process of its own under limits of time,
memory and length (`compress/confined.py`), and whatever it raises becomes a ValueError that names
the row.

A template need not render a conversation's beginning as it renders the conversation: Qwen3's and
DeepSeek's leave the reasoning out of all answers but the last. Which characters are an answer's is
therefore asked of the whole rendering. Where it begins with the renderings of its own beginnings,
an answer is what its turn adds, header and end included. Else every answer is replaced by a mark in
turn: what stands between the same beginning and the same end is the answer; the special token
behind it, where the model stops, is learned too.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from compress.confined import Failure, Limits, ask
from compress.models.tokens import encode_with_ends

Turns = Sequence[dict[str, Any]]
Tokens = tuple[np.ndarray, np.ndarray]  # ids int32 and label mask bool of one document
Span = tuple[int, int]  # characters or tokens, from, up to
TOGETHER = 64  # chats of a request, which share its limits
CHARACTERS = 2_000_000  # of these together
LIMITS = Limits()  # of a request
MARK = "\ue000answer\ue000"  # private characters, which no text and no template has


class Chat(list[dict[str, Any]]):
    """Turns {"role", "content", ...}, the tools that a model may call in them, and where they come
    from.
    """

    def __init__(
        self,
        turns: Iterable[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        where: str = "the chat",
    ) -> None:
        super().__init__(turns)
        self.tools, self.where = tools, where

    def part(self, turns: Iterable[dict[str, Any]]) -> Chat:
        """Other turns of the same row."""
        return Chat(turns, self.tools, self.where)


Document = str | Chat


def content(document: Document) -> Any:
    """What identifies a document, as JSON."""
    if isinstance(document, str) or not document.tools:
        return document
    return {"turns": document, "tools": document.tools}


def render(
    tokenizer: Any, chats: Sequence[Turns], *, generation: bool = False, limits: Limits = LIMITS
) -> list[str]:
    """Chats as text, with `generation` up to where an answer begins. ValueError naming the row
    whose template fails.
    """
    texts: list[str] = []
    for chat, text in zip(chats, _rendered(tokenizer, chats, generation, limits), strict=True):
        if isinstance(text, Failure):
            raise ValueError(_told(chat, text))
        if not text.strip():
            raise ValueError(_told(chat, Failure("it makes nothing of the turns")))
        texts.append(text)
    return texts


def _told(chat: Turns, failure: Failure) -> str:
    where = getattr(chat, "where", "the chat")
    return (
        f"{where}: the chat template fails ({failure.why}); change the row, or chat_template in the"
        " tokenizer's files"
    )


def _rendered(
    tokenizer: Any, chats: Sequence[Turns], generation: bool, limits: Limits
) -> Iterator[str | Failure]:
    """The text of every chat, or what its template raises. ValueError where there is no template,
    or where a limit ended it.
    """
    if not chats:  # plain text needs no template
        return
    if not tokenizer.chat_template:
        raise ValueError(
            f"{getattr(chats[0], 'where', 'the chat')} is a chat, and the teacher's tokenizer has"
            " no chat template; use plain text in data.train, data.chat and data.heldout"
        )
    special = tokenizer.special_tokens_map
    for some in _requests(chats):
        items = []
        for chat in some:
            tools = getattr(chat, "tools", None)
            turns = [
                {key: value for key, value in turn.items() if value is not None} for turn in chat
            ]
            template = _template(tokenizer, tools)
            items.append({"turns": turns, "tools": tools, "template": template})
        answers = ask("render", items, limits, special=special, generation=generation)
        if isinstance(answers[-1], Failure) and answers[-1].ended:
            raise ValueError(_told(some[len(answers) - 1], answers[-1]))
        yield from answers


def _template(tokenizer: Any, tools: Any) -> Any:
    """The template that transformers would take.

    ValueError where none of several is the default.
    """
    try:
        return tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        names = ", ".join(map(repr, tokenizer.chat_template))
        raise ValueError(
            f"{tokenizer.name_or_path}: of its chat templates {names} none is the default; name one"
            " of them 'default' in tokenizer_config.json, or save it as chat_template.jinja"
        ) from error


def _requests(chats: Sequence[Turns]) -> Iterator[list[Turns]]:
    """Chats that are rendered together: at most TOGETHER, and CHARACTERS or one."""
    some: list[Turns] = []
    size = 0
    for chat in chats:
        length = sum(len(turn.get("content") or "") for turn in chat)
        if some and (len(some) == TOGETHER or size + length > CHARACTERS):
            yield some
            some, size = [], 0
        some.append(chat)
        size += length
    if some:
        yield some


def chat_tokens(tokenizer: Any, chats: Sequence[Chat], limits: Limits = LIMITS) -> list[Tokens]:
    """Ids of every chat, and which of them are an answer's.

    ValueError naming the row whose template fails, or in which answers can't be told from the rest.
    """
    texts = render(tokenizer, chats, limits=limits)
    spans = _turn_spans(tokenizer, chats, texts, limits)
    marked = [i for i, one in enumerate(spans) if one is None]
    clear = _marked_spans(tokenizer, [chats[i] for i in marked], [texts[i] for i in marked], limits)
    for i, some in zip(marked, clear, strict=True):
        spans[i] = some

    # A template that leaves out what the assistant says has nothing to teach.
    for chat, answer_spans in zip(chats, spans, strict=True):
        has_answer = any(str(chat[turn].get("content") or "").strip() for turn in _answers(chat))
        if has_answer and all(start == end for start, end in answer_spans or ()):
            raise ValueError(_told(chat, Failure("it leaves out all that the assistant says")))

    # Characters to tokens: a token that stands on both sides of a place belongs to what is behind
    # it.
    special = {i for i, added in tokenizer.added_tokens_decoder.items() if added.special}
    tokens = []
    for i, (ids, ends) in enumerate(encode_with_ends(tokenizer, texts)):
        mask = np.zeros(len(ids), dtype=bool)
        for span in spans[i] or ():
            start, end = np.searchsorted(ends, span, side="right")
            if i in marked:
                end = _through_end(tokenizer, ids, end, special | set(tokenizer.all_special_ids))
            mask[start:end] = True
        tokens.append((ids, mask))
    return tokens


def _through_end(tokenizer: Any, row: np.ndarray, place: int, ends: set[int]) -> int:
    """Behind the special token that follows a place, with nothing but space between; else the
    place itself.
    """
    for i in range(place, len(row)):
        if int(row[i]) in ends:
            return i + 1
        if tokenizer.decode([int(row[i])]).strip():
            break
    return place


def _turn_spans(
    tokenizer: Any, chats: Sequence[Chat], texts: Sequence[str], limits: Limits
) -> list[list[Span] | None]:
    """Characters that each answer's turn adds to the chat before it; None where a rendering does
    not begin with its beginning's.
    """
    wanted = [
        (i, turns)
        for i, chat in enumerate(chats)
        for turns in sorted(
            {edge for turn in _answers(chat) for edge in (turn, turn + 1)} - {0, len(chat)}
        )
    ]
    beginnings = _rendered(
        tokenizer, [chats[i].part(chats[i][:turns]) for i, turns in wanted], False, limits
    )
    lengths: dict[tuple[int, int], int] = {}
    for (i, turns), text in zip(wanted, beginnings, strict=True):
        if isinstance(text, str) and texts[i].startswith(text):
            lengths[i, turns] = len(text)
    spans: list[list[Span] | None] = []
    for i, chat in enumerate(chats):
        edge = lengths | {(i, 0): 0, (i, len(chat)): len(texts[i])}
        known = all((i, place) in edge for turn in _answers(chat) for place in (turn, turn + 1))
        spans.append(
            [(edge[i, turn], edge[i, turn + 1]) for turn in _answers(chat)] if known else None
        )
    return spans


def _answers(chat: Turns) -> list[int]:
    """Numbers of the assistant's turns."""
    return [i for i, turn in enumerate(chat) if turn["role"] == "assistant"]


def _marked_spans(
    tokenizer: Any, chats: Sequence[Chat], texts: Sequence[str], limits: Limits
) -> list[list[Span]]:
    """Characters of each answer, by what changes when a mark takes its place. ValueError naming
    the row where that is not clear.
    """
    wanted = [(i, turn) for i, chat in enumerate(chats) for turn in _answers(chat)]
    marked = []
    for i, turn in wanted:
        said = {"role": "assistant", "content": MARK}
        marked.append(chats[i].part([*chats[i][:turn], said, *chats[i][turn + 1 :]]))
    spans: list[list[Span]] = [[] for _ in chats]
    for (i, turn), text in zip(wanted, _rendered(tokenizer, marked, False, limits), strict=True):
        span = _between(texts[i], text) if isinstance(text, str) else None
        before = spans[i][-1][1] if spans[i] else 0
        if (
            span is None
            or span[0] < before
            or not _says(texts[i][slice(*span)], chats[i][turn].get("content"))
        ):
            raise ValueError(
                f"{chats[i].where}: in what the chat template makes of it, answer {turn + 1} can't"
                " be told from the other turns; use data.chat_labels=all for this source, or other"
                " rows"
            )
        spans[i].append(span)
    return spans


def _between(text: str, marked: str) -> Span | None:
    """What of `text` lies between the beginning and the end that it shares with `marked`, in which
    one MARK stands for it.
    """
    before, found, after = marked.partition(MARK)
    if not found or MARK in after:
        return None
    start = len(os.path.commonprefix([text, before]))
    end = len(text) - len(os.path.commonprefix([text[::-1], after[::-1]]))
    return (start, end) if start <= end else None


def _says(rendered: str, content: Any) -> bool:
    """Whether what was rendered is the answer, a part of it, or holds it; space aside."""
    one, other = "".join(rendered.split()), "".join(str(content or "").split())
    return one in other or other in one


def prompt_ids(tokenizer: Any, turns: Turns) -> list[int]:
    """Token ids of a conversation rendered for an answer."""
    rendered = render(tokenizer, [turns], generation=True)[0]
    return tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
