"""Talking in the terminal to what was made: the student, its teacher beside it where that is here.

Every model answers greedily, in the runtime it is for and through its own chat template
(score/talk.py), and remembers its own side of the conversation. When that outgrows CONTEXT_TOKENS,
or what the model was made for, the oldest turns are forgotten, and that is said. What a model
writes is untrusted: only what `printable` leaves of it is shown.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from compress.errors import ConfigError, ResourceError, nearest, printable
from compress.formats.llamacpp import Ending
from compress.formats.runtimes import Speaker, runtime_of
from compress.models.checkpoint import Model, model_of, weights_digest
from compress.report.records import Run, folder_of, open_run
from compress.score.talk import NEXT_QUESTION, has_template, open_speaker, plain_prompt
from compress.store import Store
from compress.teacher import open_teacher
from compress.text.repetition import loops

CONTEXT_TOKENS = 2048  # of a conversation without its next answer
MODEL_FILES = ("config.json", "genai_config.json", "model.safetensors")  # one of them makes a model
COMMANDS = ("/new", "/quit")
Turn = dict[str, str]


def _show(text: str) -> None:
    """Prints what is printable; what the terminal's encoding lacks, as question marks."""
    encoding = sys.stdout.encoding or "utf-8"
    print(printable(text).encode(encoding, "replace").decode(encoding), end="", flush=True)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


@dataclass
class Voice:
    """A model that is talked to: its conversation so far, and the tokens it has room for."""

    label: str
    runtime: str
    speaker: Speaker
    templated: bool
    context: int
    turns: list[Turn] = field(default_factory=list)

    def render(self, turns: list[Turn]) -> str:
        """Turns by the model's chat template, or as plain text."""
        if self.templated:
            return self.speaker.chat_prompt(turns)
        return plain_prompt(turns)

    def length(self, prompt: str) -> int:
        """Tokens of a prompt as the model reads it."""
        return len(self.speaker.prompt_ids(prompt))

    def prompt(self, question: str, n: int) -> tuple[list[Turn], str]:
        """A question behind as many of the last turns as leave room for `n` tokens, and its prompt.

        ValueError: the question alone is too long, or the chat template fails.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        for start in range(0, len(turns), 2):  # a question and its answer
            prompt = self.render(turns[start:])
            length = self.length(prompt)
            if length + n > self.context:
                continue
            if start:
                forgotten = f"{start // 2} of {len(self.turns) // 2} earlier turns"
                _note(f"({self.label} is out of room and forgets {forgotten})")
            return turns[start:], prompt

        # The last one tried was the question alone.
        raise ValueError(
            f"the question is {length} tokens long for {self.label}, which has room for "
            f"{self.context - n} beside an answer of {n}; shorten it or lower --tokens"
        )

    def answer(self, written: str) -> tuple[str, bool]:
        """What of a text that is being written is certainly the answer; whether it ends there: in
        plain text it does where the next question begins.
        """
        if self.templated:
            return written.lstrip(), False
        text, next_question, _ = written.partition(NEXT_QUESTION)

        # An end that may become the beginning of a question waits.
        beginnings = [NEXT_QUESTION[:length] for length in range(len(NEXT_QUESTION))]
        longest = max((len(part) for part in beginnings if text.endswith(part)), default=0)
        certain = text if next_question else text[: len(text) - longest]
        return certain.lstrip(), bool(next_question)


@dataclass(frozen=True)
class Reply:
    """An answer, how it ended (None: the user stopped it) and the seconds it took."""

    text: str
    ending: Ending | None
    seconds: float

    def remarks(self, n: int) -> list[str]:
        """What to know about an answer of at most `n` tokens."""
        holds_by_remark = {
            "stopped": not self.ending,
            f"did not end within {n} tokens": self.ending and not self.ending.ended,
            "repeats itself": loops(self.text),
            "said nothing": self.ending and not self.text,
        }
        return [remark for remark, holds in holds_by_remark.items() if holds]


def reply(
    voice: Voice, question: str, n: int, say: Callable[[str], None], stoppable: bool = False
) -> Reply:
    """Asks one model, which remembers it; `say` gets a line: the label, the pieces as they come.

    `stoppable`: Ctrl-C ends the answer instead of the program. ValueError as `Voice.prompt`.
    """
    start = time.perf_counter()
    turns, prompt = voice.prompt(question, n)

    # How the answer ended is what the stream returns behind its last piece.
    written = text = ""
    ending = None
    say(f"{voice.label}: ")
    try:
        with closing(voice.speaker.stream(prompt, n)) as stream:
            while ending is None:
                written += next(stream)
                longer, ended = voice.answer(written)
                say(longer[len(text) :])
                text = longer
                if ended:
                    ending = Ending(voice.length(prompt + text) - voice.length(prompt), True)
    except StopIteration as end:
        ending = end.value
        say(written.lstrip()[len(text) :])
        text = written.lstrip()
    except KeyboardInterrupt:
        if not stoppable:
            raise
    finally:
        say("\n")

    # A model that said nothing forgets that it was asked.
    text = text.rstrip()
    if text:
        voice.turns = [*turns, {"role": "assistant", "content": text}]
    return Reply(text, ending, time.perf_counter() - start)


def answer_in_text(voices: list[Voice], question: str, n: int, talking: bool = False) -> None:
    """Prints every model's answer behind its label, as it comes. ValueError as `reply`.

    `talking`: Ctrl-C and a refusal end the answer of one model, not the program.
    """
    for voice in voices:
        try:
            remarks = reply(voice, question, n, _show, stoppable=talking).remarks(n)
        except ValueError as error:
            if not talking:
                raise
            remarks = [str(error)]
        _show(f"({'; '.join(remarks)})\n\n" if remarks else "\n")


def answer_in_json(voices: list[Voice], question: str, n: int) -> None:
    """Prints every model's answer as one JSON object in a line. ValueError as `reply`."""
    answers = []
    for voice in voices:
        answer = reply(voice, question, n, lambda piece: None)
        assert answer.ending, "it can't be stopped"
        answers.append({
            "model": voice.label, "runtime": voice.runtime, "answer": answer.text,
            "ended": answer.ending.ended, "loops": loops(answer.text),
            "tokens": answer.ending.tokens, "seconds": round(answer.seconds, 3),
        })  # fmt: skip
    print(json.dumps({"question": question, "answers": answers}), flush=True)


def _clean(question: str) -> str:
    """A line as it was meant: no space around it, and bytes that are no UTF-8 as question marks."""
    return question.strip().encode("utf-8", "replace").decode()


def converse(voices: list[Voice], n: int) -> None:
    """A conversation on a terminal, until /quit or the end of input."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit a line)
    who = " and ".join(voice.label for voice in voices)
    _note(f"talking to {who}; /new starts over, /quit leaves, Ctrl-C stops an answer")

    # A path is a question: /etc/hosts has a second slash.
    while (question := _asked()) != "/quit":
        if question == "/new":
            _start_over(voices)
        elif question.startswith("/") and question[1:].isalpha():
            _note(f"{question} is no command; {nearest(question, COMMANDS)}")
        elif question:
            answer_in_text(voices, question, n, talking=True)


def _start_over(voices: list[Voice]) -> None:
    for voice in voices:
        voice.turns = []


def _asked() -> str:
    """A line typed behind the prompt; the end of input is /quit."""
    try:
        return _clean(input("> "))
    except EOFError:
        print()
        return "/quit"
    except KeyboardInterrupt:
        print()
        raise


def models_of(target: str, alone: bool, store: Path) -> list[tuple[str, Model]]:
    """What `target` names, with a label each; first its teacher, where it is here and not `alone`.

    ValueError: neither a model nor a run nor a bundle, or its weights are not here.
    """
    path = Path(os.path.expanduser(target))
    if path.is_file() or path.suffix == ".gguf" or any((path / f).is_file() for f in MODEL_FILES):
        return [(path.absolute().name, model_of(path))]
    try:
        run = open_run(target)
    except ValueError as error:
        kinds = "a checkpoint or ONNX directory, or a GGUF file"
        raise ValueError(f"{error}; or name a model: {kinds}") from error
    weights, runtime = run.model()
    label = run.final["slot"]
    asked = [(label, Model(weights, run.final.get("digest", ""), runtime))]

    # A teacher that is not here is no reason to say nothing.
    if alone or run.teacher is run.final:
        return asked
    try:
        return [("teacher", _teacher(run, store)), *asked]
    except (ValueError, ResourceError) as error:
        _note(f"{label} answers alone: {error}")
        return asked


def _teacher(run: Run, store: Path) -> Model:
    """The teacher of a run, or of a bundle if no network is needed. ValueError: it is not here."""
    if "judged" in run.info:
        return _teacher_of_bundle(run, store)
    if run.teacher is None:
        raise ValueError(f"{run.path} has no record of a teacher")
    weights = folder_of(run.path, run.teacher) / "weights"
    if not weights.exists():
        raise ValueError(f"the teacher's weights are not here ({weights} is missing)")
    runtime = run.teacher.get("runtime", "torch")
    return Model(weights.resolve(), run.teacher.get("digest", ""), runtime)


def _teacher_of_bundle(run: Run, store: Path) -> Model:
    """The teacher that a bundle's recipe names, opened as for a run. ValueError: it is not here."""
    named, origin = run.info["config"].get("teacher"), run.info.get("teacher")
    if not isinstance(named, dict) or not isinstance(origin, dict):
        raise ValueError(f"{run.path / 'manifest.json'} does not say what its teacher is")
    source = str(named.get("source", ""))
    here = source.startswith(("packaged:", "random:")) or source.endswith(".gguf")
    if not here and not Path(os.path.expanduser(source)).is_dir():
        raise ValueError(
            f"a bundle does not hold its teacher, and {source!r} is not on this machine; "
            "name the run to ask both"
        )

    # Older bundles name the weights alone.
    teacher = open_teacher(source, None, Store(store), _note)
    digest = origin.get("digest")
    if digest != teacher.digest and digest != weights_digest(teacher.path):
        raise ValueError(f"the teacher {source!r} on this machine is not the one of the bundle")
    return teacher


def context_of(model: Model) -> int | None:
    """Tokens of the longest text that a model was made for, None where it does not say.

    ValueError: it can't be read.
    """
    try:
        return runtime_of(model.runtime).context_tokens(model.path)
    except (ValueError, LookupError) as error:
        raise ValueError(
            f"{model.path} is no model of {model.runtime}, or damaged ({error}); copy it again"
        ) from error


def open_voice(stack: ExitStack, label: str, model: Model, n: int) -> Voice:
    """A model ready for answers of `n` tokens; closed with `stack`. ValueError: it can't be."""
    most = context_of(model) or CONTEXT_TOKENS + n
    if n >= most:
        raise ConfigError(f"--tokens {n}: {label} has room for {most} with the question; use less")
    context = min(most, CONTEXT_TOKENS + n)
    templated = has_template(model)
    if not templated:
        _note(f"{label} has no chat template and is asked in plain text")
    speaker = open_speaker(model, torch.get_num_threads(), context, together=1)
    return Voice(label, model.runtime, stack.enter_context(speaker), templated, context)


def ask(
    target: str, question: str | None, tokens: int, alone: bool, as_json: bool, store: Path
) -> None:
    """Asks `target` one question, every line of standard input, or what is typed on a terminal.

    At most `tokens` an answer. ConfigError: the options can't be meant like this; ValueError: a
    model can't be opened, or a question is too long for one.
    """
    if tokens < 1:
        raise ConfigError(f"--tokens {tokens}: an answer has at least 1")
    if question is not None and not question.strip():
        raise ConfigError("the question is empty; leave it out for a conversation")
    answer = answer_in_json if as_json else answer_in_text
    talks = question is None and sys.stdin.isatty()
    if talks and as_json:
        raise ConfigError("--json needs a question, or a line for each on standard input")

    # Lines from a pipe are no conversation: each is asked afresh.
    with ExitStack() as stack:
        models = models_of(target, alone, store)
        voices = [open_voice(stack, label, model, tokens) for label, model in models]
        if question is not None:
            answer(voices, _clean(question), tokens)
        elif talks:
            converse(voices, tokens)
        else:
            for line in filter(None, map(_clean, sys.stdin)):
                _start_over(voices)
                _show("" if as_json else f"> {line}\n")
                answer(voices, line, tokens)
