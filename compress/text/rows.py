"""A row of data, whatever its fields are called, as a document: a text, or a chat whose roles and
contents were checked.

    text  a text
    messages, conversations  turns: role or from, content or value, as OpenAI's and ShareGPT's
    instruction, input, output  Alpaca's question and answer
    prompt|question and answer|response|completion  a question and its answer, as strings or as
            turns

The first of these that a row has counts. `system`, a string, stands before a chat's turns; `tools`,
a list of JSON schemas, is given to the chat template.
"""

from __future__ import annotations

from typing import Any

from compress.doors import parse_json
from compress.models.chats import Chat, Document

ROLES = ("system", "developer", "user", "assistant", "tool")
CALLED = {"human": "user", "gpt": "assistant", "observation": "tool"}  # ShareGPT's names
QUESTIONS, ANSWERS = ("prompt", "question"), ("answer", "response", "completion")
FIELDS = (
    "text",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    *QUESTIONS,
    *ANSWERS,
    "system",
    "tools",
)
NEEDED = (
    "needed: text, messages, conversations, instruction with output, or prompt|question with"
    " answer|response|completion"
)


def document(row: Any, where: str) -> Document:
    """What a row says. ValueError that begins with `where` when it says nothing that can be
    trained on.
    """
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise ValueError(
            f"{where} is a JSON {type(row).__name__}; a row is an object with named fields, or a"
            f" string; {NEEDED}"
        )

    # Fields that say something, whatever else a row has.
    given = {key: row[key] for key in FIELDS if row.get(key) is not None}
    if "text" in given:
        return _string(given["text"], where, "text")
    for key in ("messages", "conversations"):
        if key in given:
            return _chat(given[key], given, where, key)

    # Alpaca's: what is asked, and what it is asked of.
    if "instruction" in given and "output" in given:
        question = _string(given["instruction"], where, "instruction")
        if more := _string(given.get("input", ""), where, "input"):
            question += "\n\n" + more
        turns = _pair(question, _string(given["output"], where, "output"))
        return _chat(turns, given, where, "output")

    # A question and its answer under other names.
    question_field = next((key for key in QUESTIONS if key in given), "")
    answer_field = next((key for key in ANSWERS if key in given), "")
    if not question_field or not answer_field:
        empty = [key for key in FIELDS if key in row and row[key] is None]
        hint = f" ({', '.join(empty)} null: leave such rows out)" if empty else ""
        raise ValueError(f"{where} has the fields {sorted(map(str, row))}{hint}; {NEEDED}")

    # Both as turns, or both as texts.
    if isinstance(given[question_field], list) and isinstance(given[answer_field], list):
        return _chat([*given[question_field], *given[answer_field]], given, where, answer_field)
    question = _string(given[question_field], where, question_field)
    answer = _string(given[answer_field], where, answer_field)
    return _chat(_pair(question, answer), given, where, answer_field)


def _pair(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _string(value: Any, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}: the field {field!r} is a {_kind(value)}, a string is needed")
    return value


def _kind(value: Any) -> str:
    name = type(value).__name__
    return {"NoneType": "null", "dict": "JSON object"}.get(name, name)


def _chat(turns: Any, row: dict[str, Any], where: str, field: str) -> Chat:
    """A chat of a row's turns, its `system` and its `tools`."""
    if not isinstance(turns, list):
        raise ValueError(
            f"{where}: the field {field!r} is a {_kind(turns)}, a list of turns is needed"
        )
    chat = [_turn(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, 1)]
    system = _string(row.get("system", ""), where, "system")
    if system and chat and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    return Chat(chat, _tools(row.get("tools"), where), where)


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A turn with an allowed role and a string as content, besides whatever else it holds for the
    template.
    """
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is a {_kind(turn)}; a turn is an object with role and content")

    # Fields that are null are as good as absent: a table of turns has every field in every one.
    kept = {
        key: value
        for key, value in turn.items()
        if value is not None and key not in ("from", "value")
    }

    # Whose turn it is.
    name = turn.get("role", turn.get("from"))
    role = CALLED.get(name, name) if isinstance(name, str) else name
    if role not in ROLES:
        raise ValueError(
            f"{where} has the role {repr(name)[:60]}; allowed: {', '.join(ROLES)}, or ShareGPT's"
            f" {', '.join(CALLED)}"
        )

    # A turn may call tools instead of saying anything.
    calls = turn.get("tool_calls")
    if calls is not None and not (
        isinstance(calls, list) and all(isinstance(call, dict) for call in calls)
    ):
        raise ValueError(
            f"{where}: tool_calls is no list of objects; write them as OpenAI's, or leave them out"
        )
    content = turn.get("content", turn.get("value"))
    if content is None and role == "assistant" and calls:
        return kept | {"role": role}
    return kept | {"role": role, "content": _content(content, where)}


def _content(content: Any, where: str) -> str:
    """A string, or the texts of a list of parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"{where}: its content is a {_kind(content)}; needed: a string, or a list of parts"
        )

    # Images and sounds have no text to train on.
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}: its content has a part of the type {kind!r}; only text can be trained"
                " on: leave such rows out"
            )
    return "".join(part["text"] for part in content)


def _tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """A row's tools, a list or the JSON text of one."""
    if isinstance(tools, str):
        tools = parse_json(tools, f"{where}: the field 'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(
            f"{where}: the field 'tools' is no list of objects, one a tool; write them as JSON"
            " schemas, or leave them out"
        )
    return tools
