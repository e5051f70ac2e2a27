"""Open prompts: what is asked, and what makes an answer right."""

import json
import os
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import regex

from compress.assets import configs_dir
from compress.doors import read_text, refuse_halves
from compress.errors import nearest
from compress.score.patterns import FLAGS, PATTERN_SECONDS, problems

ANSWER_TOKENS = 64  # of an answer, at most
CHECKS = ("must_contain", "must_not_contain", "pattern", "exact")
KEYS = ("id", "kind", "prompt", *CHECKS, "choices", "answer")
EDGES = string.punctuation + string.whitespace + "“”‘’«»。"


@dataclass(frozen=True)
class Prompt:
    """A user's turn, and what makes an answer right. `choices`: wrong ones for the choice form,
    `answer` the right one.
    """

    id: str
    prompt: str
    kind: str = "own"
    must_contain: list[Any] = field(default_factory=list)
    must_not_contain: list[str] = field(default_factory=list)
    pattern: str = ""
    exact: list[str] = field(default_factory=list)
    choices: list[str] = field(default_factory=list)
    answer: str = ""

    @property
    def in_quarter(self) -> bool:
        """Whether it is in the fixed quarter: the number that its id ends in is divisible by 4."""
        number = re.search(r"\d+$", self.id)
        return number is not None and int(number[0]) % 4 == 0

    def is_right(self, answer: str) -> bool:
        """Whether every check holds. TimeoutError when the pattern runs away."""
        # Words that must be there, one of each group, and words that must not.
        text = answer.strip()
        groups = [member if isinstance(member, list) else [member] for member in self.must_contain]
        if not all(any(_has_word(text, word) for word in group) for group in groups):
            return False
        if any(word.lower() in text.lower() for word in self.must_not_contain):
            return False

        # The answer's form.
        if self.exact and _bare(text) not in [_bare(form) for form in self.exact]:
            return False
        return not self.pattern or bool(
            regex.search(self.pattern, text, FLAGS, timeout=PATTERN_SECONDS)
        )


def _has_word(text: str, word: str) -> bool:
    """Whether `word` occurs with no letter or digit before or behind it."""
    return bool(re.search(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", text, re.IGNORECASE))


def _bare(text: str) -> str:
    """Lower case, single spaces, no punctuation around it."""
    return " ".join(text.lower().split()).strip(EDGES)


def read_prompts(file: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file. ValueError naming file, line and key: not JSON, a key that
    is unknown or of the wrong type, no check, an id twice, a pattern that does not compile or
    runs away on a short text.
    """
    if not file.is_file():
        raise ValueError(
            f"eval.open_prompts: {file} does not exist; name a JSON Lines file with `prompt` and"
            f" one of {', '.join(CHECKS)} a line"
        )

    # Prompts, each with its file and line.
    placed: list[tuple[str, Prompt]] = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            where = f"{file}, line {number}"
            placed.append((where, _prompt(line, where, number)))
    if not placed:
        raise ValueError(
            f"{file} holds no prompt; write one JSON object a line with `prompt` and one of"
            f" {', '.join(CHECKS)}"
        )

    counts = Counter(prompt.id for _, prompt in placed)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        raise ValueError(
            f"{file}: the id {twice[0]!r} is there twice; give each prompt one of its own"
        )
    if file != embedded_file():  # a test tries these
        _try_patterns(placed)
    return [prompt for _, prompt in placed]


def _try_patterns(placed: Sequence[tuple[str, Prompt]]) -> None:
    """ValueError for a pattern that can't be used."""
    with_pattern = [(where, prompt) for where, prompt in placed if prompt.pattern]
    if not with_pattern:
        return
    answers = problems([(prompt.pattern, prompt.prompt) for _, prompt in with_pattern])
    for (where, prompt), problem in zip(with_pattern, answers, strict=True):
        if problem:
            raise ValueError(f"{where}: pattern {prompt.pattern[:200]!r} {problem}")


def _prompt(line: str, where: str, number: int) -> Prompt:
    """One line of a prompt file, checked."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} is not JSON ({error}); one JSON object a line is needed"
        ) from error
    prompt = Prompt(**_fields(row, where, number))

    # Every check is a text that can fail, and one of them tells right from wrong.
    groups = [member if isinstance(member, list) else [member] for member in prompt.must_contain]
    words = [word for group in groups for word in group]
    strings = [*words, *prompt.must_not_contain, *prompt.exact, *prompt.choices]
    if not all(isinstance(word, str) for word in strings) or not all(groups) or "" in strings:
        raise ValueError(f"{where}: checks are texts or lists of texts, none of them empty")
    if not (prompt.must_contain or prompt.pattern or prompt.exact):
        raise ValueError(
            f"{where}: nothing says which answer is right; give must_contain, pattern or exact"
        )
    return prompt


def _fields(row: Any, where: str, number: int) -> dict[str, Any]:
    """Fields of a `Prompt` of the right types; without an id it is named by its line."""
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("prompt"), str)
        or not row["prompt"].strip()
    ):
        raise ValueError(f"{where}: `prompt` must be a text that is not empty")
    refuse_halves(row, where)
    unknown = sorted(row.keys() - set(KEYS))
    if unknown:
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; {nearest(unknown[0], KEYS)}")

    # One text may stand for a list of one.
    row["id"] = str(row.get("id", number))
    for name in ("must_contain", "must_not_contain", "exact"):
        if isinstance(row.get(name), str):
            row[name] = [row[name]]

    for name in (*CHECKS, "choices", "kind", "answer"):
        if name not in row:
            continue
        is_text = name in ("pattern", "kind", "answer")
        if not isinstance(row[name], str if is_text else list):
            needed = "a text" if is_text else "a list of texts"
            raise ValueError(f"{where}: {name!r} must be {needed}, not {row[name]!r}")
    return row


def embedded_file() -> Path:
    """The prompts that ship with the package."""
    return configs_dir() / "open" / "prompts.jsonl"


def prompts_of_eval(
    open_prompts: Sequence[str], data_dir: str | None, limit: int | None
) -> list[Prompt]:
    """The prompts that `eval.open_prompts` names, up to `limit` of each: "embedded", a file, or a
    file's name below `data_dir`. ValueError as `read_prompts`, and when two files give one id.
    """
    prompts: dict[str, Prompt] = {}
    for name in open_prompts:
        file = _prompt_file(name, data_dir)

        # Answers are compared by id, across all files.
        for prompt in read_prompts(file)[:limit]:
            if prompt.id in prompts:
                raise ValueError(
                    f"{file}: the id {prompt.id!r} is in another file of eval.open_prompts too;"
                    " give each prompt one of its own"
                )
            prompts[prompt.id] = prompt
    return list(prompts.values())


def _prompt_file(name: str, data_dir: str | None) -> Path:
    """Where the prompts of a name lie; a file below `data_dir` goes before any other."""
    if name == "embedded":
        return embedded_file()
    file = Path(name)
    if data_dir:
        file = Path(os.path.expanduser(data_dir)) / "open" / f"{name}.jsonl"
    return file if file.is_file() else Path(os.path.expanduser(name))


def as_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a line of a prompt file: only what it has."""
    return {key: value for key, value in asdict(prompt).items() if value}
