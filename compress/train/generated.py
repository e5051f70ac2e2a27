"""Text the teacher writes itself (sequence-level distillation, arXiv 1606.07947, section 3.2; data-free where no text is at hand).

A source `generated:COUNTxTOKENS:PROMPTS` takes COUNT documents of the source PROMPTS. Of plain text the teacher continues the first
PROMPT_TOKENS tokens by up to TOKENS; in a chat it answers the questions anew, turn by turn in place of the answers given. It samples at
temperature 1 from the TOP_P nucleus (arXiv 1904.09751): greedy text repeats itself. What is written is kept in the store, piece by
piece, each seeded by its number, so that an interrupted run goes on where it stopped. On a GPU vLLM writes, where it is installed.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compress.checkpoint import best_device, digest, load_model, load_tokenizer
from compress.machine import fast_dtype
from compress.store import sha256_json
from compress.train.sources import Document, documents

PROMPT_TOKENS, TOP_P = 32, 0.95
AT_ONCE = {"transformers": 16, "vllm": 512}  # documents of a piece
Sample = Callable[[list[list[int]], int, int], list[str]]  # prompts' ids, tokens at most, seed -> texts
SYNTAX = re.compile(r"generated:(\d+)x(\d+):(.+)")


def generated(source: str, teacher: Path, folder: Path, log: Callable[[str], None]) -> list[Document]:
    """The documents of a `generated:` source. ValueError when it is malformed or its prompts are too few."""
    match = SYNTAX.fullmatch(source)
    if not match:
        raise ValueError(f"data source {source!r} is not generated:COUNTxTOKENS:PROMPTS, as in generated:200x128:embedded:docstrings")
    count, tokens, prompts = int(match[1]), int(match[2]), documents(match[3])[: int(match[1])]
    if len(prompts) < count or not tokens:
        raise ValueError(
            f"data source {source!r} wants {count} prompts and {tokens} tokens; {match[3]} has {len(prompts)} documents, tokens start at 1"
        )
    engine = "vllm" if torch.cuda.is_available() and find_spec("vllm") else "transformers"
    key = sha256_json([digest(teacher), prompts, tokens, PROMPT_TOKENS, TOP_P, engine, AT_ONCE[engine]])[:32]
    part, whole = folder / f"generated-{key}.part", folder / f"generated-{key}.jsonl"
    if not whole.is_file():
        _write(part, prompts, tokens, teacher, engine, log)
        part.replace(whole)
    return [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]


def _write(part: Path, prompts: list[Document], tokens: int, teacher: Path, engine: str, log: Callable[[str], None]) -> None:
    """Append what is missing to `part`, a piece at a time; a torn last piece is written again."""
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True) if part.is_file() else []
    piece, begun = AT_ONCE[engine], time.monotonic()
    done = len([line for line in lines if line.endswith("\n")]) // piece * piece
    part.write_text("".join(lines[:done]), encoding="utf-8")
    tokenizer = load_tokenizer(teacher)
    sample = _vllm(teacher, tokenizer) if engine == "vllm" else _transformers(teacher, tokenizer)
    for start in range(done, len(prompts), piece):
        some = prompts[start : start + piece]
        made = [_answered(sample, tokenizer, d, tokens, start + i) if isinstance(d, list) else None for i, d in enumerate(some)]
        texts = iter(_continued(sample, tokenizer, [d for d in some if isinstance(d, str)], tokens, start))
        with part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(next(texts) if document is None else document) + "\n" for document in made)
        written = start + len(some)
        left = (time.monotonic() - begun) / (written - done) * (len(prompts) - written)
        log(f"teacher writes {written}/{len(prompts)} documents, {left:.0f} s left")


def _transformers(teacher: Path, tokenizer: Any) -> Sample:
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model: Any = load_model(teacher, torch.bfloat16 if fast_dtype() == "bf16" else torch.float32)
    model.to(best_device())

    @torch.inference_mode()
    def sample(prompts: list[list[int]], tokens: int, seed: int) -> list[str]:
        torch.manual_seed(seed)
        batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
        out = model.generate(
            **batch, max_new_tokens=tokens, do_sample=True, top_p=TOP_P, top_k=0, temperature=1.0, pad_token_id=tokenizer.pad_token_id
        )
        return [tokenizer.decode(row, skip_special_tokens=True) for row in out[:, batch["input_ids"].shape[1] :]]

    return sample


def _vllm(teacher: Path, tokenizer: Any) -> Sample:
    from vllm import LLM, SamplingParams

    engine = LLM(str(teacher), dtype="bfloat16")

    def sample(prompts: list[list[int]], tokens: int, seed: int) -> list[str]:
        each = [SamplingParams(temperature=1.0, top_p=TOP_P, max_tokens=tokens, seed=seed + i) for i in range(len(prompts))]
        done = engine.generate([{"prompt_token_ids": ids} for ids in prompts], each, use_tqdm=False)
        return [tokenizer.decode(one.outputs[0].token_ids, skip_special_tokens=True) for one in done]

    return sample


def _continued(sample: Sample, tokenizer: Any, texts: list[str], tokens: int, seed: int) -> list[str]:
    if not texts:
        return []
    prompts = [ids[:PROMPT_TOKENS] for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    return [tokenizer.decode(ids) + text for ids, text in zip(prompts, sample(prompts, tokens, seed), strict=True)]


def _answered(sample: Sample, tokenizer: Any, turns: list[dict[str, str]], tokens: int, seed: int) -> list[dict[str, str]]:
    """The same questions with the teacher's own answers."""
    said: list[dict[str, str]] = []
    for turn in turns:
        if turn["role"] == "assistant":
            rendered = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            turn = turn | {"content": sample([ids], tokens, seed + len(said))[0].strip()}
        said.append(turn)
    return said
