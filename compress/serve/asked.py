"""What may be asked: a request's body, checked before anything of it reaches a model.

Only the keys below pass. A key that no runtime here obeys is refused by name instead of being
ignored; llama.cpp's own keys that reach into its slots and files are among those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compress.doors import (
    FLAG,
    NUMBER,
    TABLE,
    TEXT,
    Kind,
    check_object,
    optional,
    parse_json,
    refuse_halves,
    whole,
)

BODY_BYTES = 4_000_000
STOPS = 8
STRING = Kind("a text that is not empty", lambda value: isinstance(value, str) and value != "")
TEXT_PROMPT = Kind("a text; one prompt a request", lambda value: isinstance(value, str))
STOP = Kind(
    f"a text, or a list of at most {STOPS}",
    lambda value: (
        len(value) <= STOPS and all(map(STRING.holds, value))
        if isinstance(value, list)
        else STRING.holds(value)
    ),
)
LIST = Kind("a list", lambda value: isinstance(value, list))
MESSAGES = Kind("a list with at least one message", lambda value: LIST.holds(value) and bool(value))
TOKENS = whole(1, 2**31 - 1)
ONE = Kind("1: one answer a request", lambda value: type(value) is int and value == 1)
SHARE = Kind("a number in (0, 1]", lambda value: NUMBER.holds(value) and 0 < value <= 1)
HEAT = Kind("a number in [0, 2]", lambda value: NUMBER.holds(value) and 0 <= value <= 2)
PENALTY = Kind("a number in [-2, 2]", lambda value: NUMBER.holds(value) and -2 <= value <= 2)
SEED = whole(-1, 2**32 - 1)
# Of any answer, whatever runs the model.
COMMON = {
    "model": TEXT,
    "stream": FLAG,
    "stream_options": TABLE,
    "max_tokens": TOKENS,
    "temperature": HEAT,
    "top_p": SHARE,
    "seed": SEED,
    "stop": STOP,
    "n": ONE,
    "user": TEXT,
}
CHAT = {"max_completion_tokens": TOKENS, "logprobs": FLAG}
CONTINUED = {"prompt": TEXT_PROMPT, "logprobs": whole(0, 20)}
# What llama.cpp can besides.
LLAMA = {
    "top_k": whole(0, 2**31 - 1),
    "min_p": Kind("a number in [0, 1]", lambda value: NUMBER.holds(value) and 0 <= value <= 1),
    "repeat_penalty": Kind("a number in (0, 4]", lambda v: NUMBER.holds(v) and 0 < v <= 4),
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "logit_bias": TABLE,
}
LLAMA_CHAT = {
    "top_logprobs": whole(0, 20),
    "response_format": TABLE,
    "tools": LIST,
    "tool_choice": Kind("a text or an object", lambda value: isinstance(value, str | dict)),
    "parallel_tool_calls": FLAG,
}
ROLES = ("system", "developer", "user", "assistant", "tool")


class Refusal(Exception):
    """A request that gets an error instead of an answer: HTTP status, a sentence, and a code that
    names the reason without a word of what was asked.
    """

    def __init__(self, status: int, code: str, sentence: str, seconds: int | None = None) -> None:
        super().__init__(sentence)
        self.status, self.code, self.sentence = status, code, sentence
        self.seconds = seconds  # after which trying again makes sense

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.sentence, "type": kind, "param": None, "code": self.code}
        return {"error": error}


@dataclass(frozen=True)
class Terms:
    """What a request is checked against: the model's name, its runtime, whether it has a chat
    template, and tokens of an answer at most.
    """

    model: str
    runtime: str
    templated: bool
    max_tokens: int


@dataclass(frozen=True)
class Asked:
    """A request as the backend gets it; `path` is that of the endpoint."""

    path: str
    body: dict[str, Any]

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def usage(self) -> bool:
        """Whether the stream is to end with its usage."""
        return bool(self.body.get("stream_options", {}).get("include_usage"))

    @property
    def logprobs(self) -> bool:
        return self.body.get("logprobs") not in (None, False)


def kinds_of(chat: bool, runtime: str) -> dict[str, Kind]:
    """Keys of a body, each of its kind."""
    kinds = COMMON | (CHAT if chat else CONTINUED)
    if runtime == "llama.cpp":
        kinds = kinds | LLAMA | (LLAMA_CHAT if chat else {})
    needed = {"messages": MESSAGES} if chat else {"prompt": TEXT_PROMPT}
    return {name: optional(kind) for name, kind in kinds.items()} | needed


def read_asked(path: str, data: bytes, terms: Terms) -> Asked:
    """The checked body of a request to `path`. Refusal, in a sentence, for any other."""
    chat = path.endswith("/chat/completions")
    try:
        body = parse_json(data.decode("utf-8"), "the body")
        if isinstance(body, dict):
            body = {name: value for name, value in body.items() if value is not None}
        check_object(body, kinds_of(chat, terms.runtime), "the body")
        refuse_halves(body, "the body")
        if chat:
            _check_messages(body["messages"], tools="tools" in body)
    except UnicodeDecodeError as error:
        raise Refusal(400, "not_json", "the body is not UTF-8; send JSON in UTF-8") from error
    except ValueError as error:
        raise Refusal(400, "not_understood", str(error)) from error

    if chat and not terms.templated:
        raise Refusal(
            400,
            "no_chat_template",
            f"{terms.model} has no chat template; send a prompt to /v1/completions instead",
        )
    if body.get("model", terms.model) != terms.model:
        raise Refusal(
            404,
            "model_not_found",
            f"the model {body['model'][:200]!r} is not served here; name {terms.model!r}",
        )
    return Asked(path, _limited(body, terms))


def _limited(body: dict[str, Any], terms: Terms) -> dict[str, Any]:
    """The body with one name for the length of an answer and none for what a model is not told.
    Refusal for a longer one than is served.
    """
    asked_tokens = [
        body.pop(name) for name in ("max_completion_tokens", "max_tokens") if name in body
    ]
    tokens = asked_tokens[0] if asked_tokens else terms.max_tokens
    if tokens > terms.max_tokens:
        raise Refusal(
            400,
            "too_many_tokens",
            f"max_tokens is {tokens:,}, this server answers in at most {terms.max_tokens:,}; ask"
            " for less",
        )

    # What was judged was greedy: without a temperature an answer is.
    plain = {name: value for name, value in body.items() if name not in ("n", "user")}
    return {"temperature": 0} | plain | {"model": terms.model, "max_tokens": tokens}


def _check_messages(messages: list[Any], *, tools: bool) -> None:
    """ValueError for a message without a role or a text; with `tools` it may hold calls instead."""
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{where} needs a 'role' of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):
            for part in content:
                if not isinstance(part, dict) or part.get("type") != "text":
                    raise ValueError(f"{where}: only parts of the type 'text' are taken")
                if not isinstance(part.get("text"), str):
                    raise ValueError(f"{where}: a part of the type 'text' needs a 'text'")
        elif not isinstance(content, str) and not (tools and content is None):
            raise ValueError(f"{where} needs a 'content' that is a text")
