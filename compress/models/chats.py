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
PLAIN_NAMES = {"assistant": "Answer"}  # of turns without a template; all others ask


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


def plain_text(turns: Turns) -> str:
    """Turns as a base model reads them, which has no chat template: each named, a line each."""
    return "\n".join(
        f"{PLAIN_NAMES.get(turn['role'], 'Question')}: {turn['content']}" for turn in turns
    )


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
            raise ValueError(_failure_sentence(chat, text))
        if not text.strip():
            raise ValueError(_failure_sentence(chat, Failure("it makes nothing of the turns")))
        texts.append(text)
    return texts


def _failure_sentence(chat: Turns, failure: Failure) -> str:
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
            " no chat template; use data=plain, or plain text of your own in data.train, data.chat"
            " and data.heldout"
        )

    # Each with the template that belongs to its tools.
    special = tokenizer.special_tokens_map
    for batch in _requests(chats):
        items = []
        for chat in batch:
            tools = getattr(chat, "tools", None)
            turns = [
                {key: value for key, value in turn.items() if value is not None} for turn in chat
            ]
            template = _template(tokenizer, tools)
            items.append({"turns": turns, "tools": tools, "template": template})

        # The last answer says where a limit ended it: that row is to blame.
        answers = ask("render", items, limits, special=special, generation=generation)
        if isinstance(answers[-1], Failure) and answers[-1].ended:
            raise ValueError(_failure_sentence(batch[len(answers) - 1], answers[-1]))
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
    batch: list[Turns] = []
    characters = 0
    for chat in chats:
        length = sum(len(turn.get("content") or "") for turn in chat)
        if batch and (len(batch) == TOGETHER or characters + length > CHARACTERS):
            yield batch
            batch = []
            characters = 0
        batch.append(chat)
        characters += length

    # The rest.
    if batch:
        yield batch


def chat_tokens(tokenizer: Any, chats: Sequence[Chat], limits: Limits = LIMITS) -> list[Tokens]:
    """Ids of every chat, and which of them are an answer's.

    ValueError naming the row whose template fails, or in which answers can't be told from the rest.
    """
    texts = render(tokenizer, chats, limits=limits)
    spans = _turn_spans(tokenizer, chats, texts, limits)

    # Where turns do not add up, answers are marked.
    marked = [i for i, chat_spans in enumerate(spans) if chat_spans is None]
    clear = _marked_spans(tokenizer, [chats[i] for i in marked], [texts[i] for i in marked], limits)
    for i, answer_spans in zip(marked, clear, strict=True):
        spans[i] = answer_spans

    # A template that leaves out what the assistant says has nothing to teach.
    for chat, chat_spans in zip(chats, spans, strict=True):
        has_answer = any(str(chat[turn].get("content") or "").strip() for turn in _answers(chat))
        if has_answer and all(start == end for start, end in chat_spans or ()):
            failure = Failure("it leaves out all that the assistant says")
            raise ValueError(_failure_sentence(chat, failure))

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
    # Numbers of turns before and behind each answer, where the chat can be cut.
    edges: list[tuple[int, int]] = []
    for i, chat in enumerate(chats):
        answers = _answers(chat)
        cuts = {*answers, *(turn + 1 for turn in answers)} - {0, len(chat)}
        edges += [(i, turns) for turns in sorted(cuts)]

    beginnings = _rendered(
        tokenizer, [chats[i].part(chats[i][:turns]) for i, turns in edges], False, limits
    )

    # A beginning counts only where the whole rendering begins with it.
    lengths: dict[tuple[int, int], int] = {}
    for (i, turns), text in zip(edges, beginnings, strict=True):
        if isinstance(text, str) and texts[i].startswith(text):
            lengths[i, turns] = len(text)

    # An answer is between two such edges; the empty chat and the whole one are edges too.
    spans: list[list[Span] | None] = []
    for i, chat in enumerate(chats):
        places = lengths | {(i, 0): 0, (i, len(chat)): len(texts[i])}
        answers = _answers(chat)
        if all((i, turn) in places and (i, turn + 1) in places for turn in answers):
            spans.append([(places[i, turn], places[i, turn + 1]) for turn in answers])
        else:
            spans.append(None)
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
    turns = [(i, turn) for i, chat in enumerate(chats) for turn in _answers(chat)]
    marked = []
    for i, turn in turns:
        mark = {"role": "assistant", "content": MARK}
        marked.append(chats[i].part([*chats[i][:turn], mark, *chats[i][turn + 1 :]]))

    # What changes is the answer, if it follows the one before it and says the same.
    spans: list[list[Span]] = [[] for _ in chats]
    for (i, turn), text in zip(turns, _rendered(tokenizer, marked, False, limits), strict=True):
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
    before, mark, after = marked.partition(MARK)
    if not mark or MARK in after:
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
