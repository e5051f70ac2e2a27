"""Asking a model something, in the runtime it is for and the way a deployment would: greedy
answers to a user's turn.

Every model is asked through what ships with it: its own chat template and tokenizer as its own
runtime reads them, and its own idea of where an answer ends (a GGUF's metadata, genai_config.json,
generation_config.json). That is the point: a template that lost its generation prompt, a doubled
BOS or a missing end is then seen as what it does to answers.

A model without a chat template, as base models are, continues plain text: "Question: ...", and on a
line below "Answer:". Its answer ends where it goes on with a question of its own.

Each runtime speaks in its module of formats/runtimes.py, torch in fp32 as everything is scored.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from typing import Any

from compress.formats.llamacpp import Answer
from compress.formats.runtimes import Speaker, Turns, runtime_of
from compress.models.chats import PLAIN_NAMES, plain_text, prompt_ids
from compress.models.model import Model

CONTEXT_TOKENS = 512  # of a question with its answer
TOGETHER = 32  # questions that are answered together: the rest waits
NEXT_QUESTION = "\nQuestion:"  # where an answer in plain text ends


def open_speaker(
    model: Model,
    threads: int,
    context: int = CONTEXT_TOKENS,
    together: int = TOGETHER,
    device: str = "cpu",
) -> AbstractContextManager[Speaker]:
    """A model in its own runtime for `together` questions of `context` tokens with their answers,
    closed at the end of a `with` block.

    ValueError when the runtime can't load it.
    """
    runtime = runtime_of(model.runtime)
    return closing(runtime.speaker(model.path, threads, context, together, device))


def plain_prompt(turns: Turns) -> str:
    """Turns as a model without a chat template is asked them, up to where its answer begins."""
    return f"{plain_text(turns)}\n{PLAIN_NAMES['assistant']}:"


def plain_answer(answer: Answer) -> Answer:
    """What of a model's continuation of plain text is its answer; one that goes on with a question
    has ended.
    """
    text, next_question, _ = answer.text.partition(NEXT_QUESTION)
    return Answer(answer.ids, text, True) if next_question else answer


def question_ids(tokenizer: Any, question: str) -> list[int]:
    """Token ids of a question for an answer, as an HF tokenizer's model is asked it."""
    turns = [{"role": "user", "content": question}]
    if tokenizer.chat_template:
        return prompt_ids(tokenizer, turns)
    from compress.formats.torch_runtime import text_ids  # torch is not needed to ask a GGUF

    return text_ids(tokenizer, plain_prompt(turns))


def has_template(model: Model) -> bool:
    """Whether a chat template ships with the model."""
    return runtime_of(model.runtime).has_template(model.path)


def prompts_of(speaker: Speaker, questions: Sequence[str], templated: bool) -> list[str]:
    """Questions as the model wants them: rendered by its chat template, or as plain text."""
    asked = [[{"role": "user", "content": question}] for question in questions]
    return [speaker.chat_prompt(turns) if templated else plain_prompt(turns) for turns in asked]
