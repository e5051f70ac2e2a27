"""What runs a model: RUNTIMES, one module a runtime, and what each of them has.

A new runtime is such a module, a line in RUNTIMES, and what `models.checkpoint.model_of` knows its
models by. Modules are imported when they are used: a process that measures one runtime's memory
must not hold another's.
"""

import importlib
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

if TYPE_CHECKING:
    from compress.formats.llamacpp import Answer, Ending
    from compress.models.head import Head

RUNTIMES = {
    "torch": "compress.formats.torch_runtime",
    "llama.cpp": "compress.formats.llamacpp",
    "onnxruntime": "compress.formats.onnxruntime",
}
Turns = Sequence[dict[str, str]]
# (prompt tokens, new tokens, sequences) -> milliseconds: of each token if it is one sequence.
Generate = Callable[[int, int, int], list[float]]


class Speaker(Protocol):
    """A model in its runtime."""

    def chat_prompt(self, turns: Turns) -> str:
        """Turns {"role", "content"} rendered for an answer; ValueError where its template fails."""

    def prompt_ids(self, prompt: str) -> list[int]:
        """What the model sees."""

    def answers(self, prompts: Sequence[str], n: int) -> "list[Answer]":
        """Greedy, at most `n` tokens each."""

    def stream(self, prompt: str, n: int) -> "Generator[str, None, Ending]":
        """Pieces of one greedy answer."""

    def close(self) -> None:
        """Frees what the runtime holds."""


class Runtime(Protocol):
    """What a runtime's module has. ValueError, from each, when the model can't be read or run;
    ConfigError where it can't be on the `device`, cpu or gpu (`compress/formats/devices.py`).
    """

    def head(self, path: Path) -> "Head":
        """The fp32 head, as decoded from what ships."""

    def speaker(
        self, path: Path, threads: int, context: int, together: int, device: str
    ) -> Speaker:
        """The model ready for `together` questions of `context` tokens with their answers."""

    def timer(self, path: Path, threads: int, device: str) -> tuple[Generate, int]:
        """What is timed, in the shipping type, and the bytes of the weights."""

    def params_and_files(self, path: Path) -> tuple[int, list[Path]]:
        """Parameters, a tied matrix counted once, and the files that count as the model's."""

    def has_template(self, path: Path) -> bool:
        """Whether a chat template ships with it."""

    def context_tokens(self, path: Path) -> int | None:
        """Tokens that it was made to see at once; None where it does not say."""


def runtime_of(name: str) -> Runtime:
    """The module of a runtime, imported. KeyError for a name that is none."""
    return cast(Runtime, importlib.import_module(RUNTIMES[name]))
