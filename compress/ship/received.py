"""A received bundle, read and checked before anything in it is run or believed."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from compress.budget import Budget, Limit
from compress.doors import (
    FLAG,
    NUMBER,
    TABLE,
    TEXT,
    TEXTS,
    Kind,
    check_object,
    is_real,
    json_lines,
    optional,
    refuse_halves,
    whole,
)
from compress.errors import ConfigError
from compress.formats.devices import Device
from compress.models.gguf_header import read_header
from compress.models.model import Model, gguf_model, runtime_at
from compress.models.settings import Teacher
from compress.report.records import bundle_rows
from compress.score.prompts import Prompt, read_prompts
from compress.score.settings import Eval
from compress.score.tasks import DRIFTS, RULES
from compress.ship.manifest import MANIFEST, limits_of
from compress.ship.sums import verify_bundle
from compress.text.settings import Data

MOST_CHOICES, MOST_REQUESTS = 1_000, 1_000_000  # choices of an item and of all items
MOST_PROMPTS = 10_000  # open prompts
LINES_BYTES = 1_000_000_000  # of each of the bundle's JSON Lines files
GENERATED_TOKENS = 1_000_000  # that timing may write: new tokens x repeats x processes
STAND_IN_TOKENS = 256  # a row of it
UNREAD = "generated:1x1:nothing"  # training text: settings must name some, though none is read
# Text to run a model on where its own is not to be had; what is measured on it is not reported.
STAND_IN = "embedded:topics"
SIZES = Kind(
    "at most 16 whole numbers from 1 to 65,536",
    lambda value: isinstance(value, list) and len(value) <= 16 and all(map(_is_size, value)),
)
ANY = Kind("anything", lambda value: True)
COUNT = whole(1, 10**9)
# Of config.eval: how it is scored, and so how long it takes.
MEASURED = {
    "batch_size": whole(1, 1024),
    "context_tokens": whole(1, 2**17),
    "heldout_sequences": whole(2, 1024),
    "prompt_tokens": whole(1, 2**15),
    "new_tokens": whole(2, 2048),
    "repeats": whole(1, 200),
    "processes": whole(1, 50),
    "prompt_lengths": SIZES,
    "batch_sizes": SIZES,
    "context_lengths": SIZES,
    "price_per_hour": Kind(
        "null or a number above 0",
        lambda value: value is None or (NUMBER.holds(value) and value > 0),
    ),
    "device": Kind("cpu or gpu", lambda value: value in list(Device)),
}
# The bundle's own items and prompts stand in place of these.
RECIPE_ONLY = (
    "tasks",
    "data_dir",
    "limit",
    "num_fewshot",
    "perturbations",
    "stop_early",
    "open_prompts",
    "open_limit",
    "time_stages",
)
EVAL = {key: optional(kind) for key, kind in MEASURED.items()} | dict.fromkeys(
    RECIPE_ONLY, optional(ANY)
)
DATA = {
    "heldout": Kind("one to 32 texts", lambda value: TEXTS.holds(value) and 1 <= len(value) <= 32),
    "seq_len": optional(whole(8, 2**17)),
    **dict.fromkeys(("train", "chat"), TEXTS),
    **dict.fromkeys(("weights", "packing", "chat_labels", "reread", "vocabulary"), optional(ANY)),
}
TEACHER = {
    "source": TEXT,
    "revision": optional(
        Kind("a text or null", lambda value: value is None or isinstance(value, str))
    ),
}
# Of requests.jsonl, whatever its rule.
ITEM = {
    "task": Kind(
        "a task's name",
        lambda value: (
            isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,199}", value))
        ),
    ),
    "doc_id": whole(0, 10**9),
    "rule": TEXT,
    "choices": TEXTS,
    "context": Kind(
        "a text, or one a choice", lambda value: isinstance(value, str) or TEXTS.holds(value)
    ),
}
LOGLIKS = Kind(
    "a list of numbers",
    lambda value: isinstance(value, list) and all(map(is_real, value)),
)
SAID = {"form": TEXT, "answer": TEXT, "ended": FLAG, "loops": FLAG, "right": FLAG}
ANSWERS = {"id": TEXT, "teacher": TABLE, "student": TABLE}


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value <= 2**16


class Received(NamedTuple):
    """What a bundle asks to be measured, checked."""

    manifest: dict[str, Any]
    budget: Budget
    settings: Eval
    heldout: list[str]  # sources of text, which may lie outside the bundle
    seq_len: int
    teacher: Teacher
    requests: list[dict[str, Any]]
    prompts: list[Prompt]
    said: list[dict[str, Any]]  # the teacher's answers to the prompts
    model: Model


def _item(row: Any, where: str) -> dict[str, Any]:
    """A row of requests.jsonl that can be scored again. ValueError that begins with `where`."""
    rule = row.get("rule") if isinstance(row, dict) else None
    rules = (*RULES, "rolling", "text")
    if rule not in rules:
        raise ValueError(f"{where}: 'rule' is {rule!r}, allowed: {', '.join(rules)}")
    task = str(row.get("task"))
    check_object(row, ITEM | _teachers_answer(rule, task), where)

    # Only the task's own code can mark a text: it is not scored again.
    if rule == "text":
        return row
    _check_choices(row, rule, where)
    if rule == "mass" and task not in DRIFTS:
        raise ValueError(f"{where}: the rule mass is that of {', '.join(DRIFTS)}, not of {task!r}")
    if rule != "rolling":
        _check_gold(row, where)
    return row


def _teachers_answer(rule: str, task: str) -> dict[str, Kind]:
    """Keys of an item that say what the teacher answered, by the item's rule and task."""
    if rule == "rolling":
        return {"logliks": LOGLIKS, "words": COUNT, "bytes": COUNT}
    if rule == "text":
        return {"gold": ANY, "text": TEXT, "correct": FLAG}
    answer = {"gold": ANY, "logliks": LOGLIKS, "choice": whole(0, MOST_CHOICES)}
    if rule == "mass" or DRIFTS.get(task, "acc") != "acc":
        return answer | {"value": NUMBER}
    return answer | {"correct": FLAG}


def _check_choices(row: dict[str, Any], rule: str, where: str) -> None:
    """ValueError that begins with `where` unless an item has as many of everything as choices."""
    count = len(row["choices"])
    if not 1 <= count <= MOST_CHOICES or (rule == "rolling" and count != 1):
        raise ValueError(
            f"{where}: {count} choices; allowed: 1 to {MOST_CHOICES:,}, for the rule rolling 1"
        )

    # One context for all, or one a choice; of the teacher's figures one a choice.
    if isinstance(row["context"], list) and len(row["context"]) != count:
        raise ValueError(
            f"{where}: {len(row['context'])} contexts for {count} choices; one, or one a choice, is"
            " needed"
        )
    if len(row["logliks"]) != count:
        raise ValueError(
            f"{where}: {len(row['logliks'])} logliks for {count} choices; one a choice is needed"
        )


def _check_gold(row: dict[str, Any], where: str) -> None:
    """ValueError that begins with `where` unless an item's right choices are among its choices."""
    count = len(row["choices"])
    gold = row["gold"] if isinstance(row["gold"], list) else [row["gold"]]
    if not gold or not all(type(one) is int and 0 <= one < count for one in gold):
        raise ValueError(
            f"{where}: 'gold' is {row['gold']!r}; needed: the number of a choice, 0 to"
            f" {count - 1}, or several"
        )


def read_requests(file: Path) -> list[dict[str, Any]]:
    """The items of requests.jsonl; none where the file is empty.

    ValueError naming file, line and key.
    """
    rows: list[dict[str, Any]] = []
    lines: dict[tuple[str, int], str] = {}
    rules: dict[str, str] = {}
    asked = 0
    for where, value in json_lines(_sized(file)):
        refuse_halves(value, where)
        row = _item(value, where)

        # One item a line, and one rule a task.
        name = row["task"], row["doc_id"]
        if name in lines:
            raise ValueError(
                f"{where}: item {name[1]} of {name[0]} is there already ({lines[name]})"
            )
        if rules.setdefault(row["task"], row["rule"]) != row["rule"]:
            raise ValueError(
                f"{where}: 'rule' is {row['rule']!r}, other items of {row['task']} have"
                f" {rules[row['task']]!r}"
            )

        # Each choice is a text to score: their number is the work that is asked.
        lines[name] = where
        rows.append(row)
        asked += len(row["choices"])
        if asked > MOST_REQUESTS:
            raise ValueError(
                f"{where}: the items so far have {asked:,} choices, at most {MOST_REQUESTS:,} are"
                " scored; ask its sender"
            )
    return rows


def _sized(file: Path) -> Path:
    """The file, if it is one of a size that is read. ValueError."""
    if file.is_file() and (length := file.stat().st_size) > LINES_BYTES:
        raise ValueError(
            f"{file} has {length:,} bytes, at most {LINES_BYTES:,} are read; ask its sender for"
            " fewer items"
        )
    return file


def read_said(bundle: Path, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """The teacher's answers to the prompts. ValueError naming file, line and key, or a prompt that
    was not answered.
    """
    file = bundle / "open_answers.jsonl"
    if not prompts:
        return []
    answered: set[str] = set()
    ids = {prompt.id for prompt in prompts}

    # Form and owner of each answer.
    for where, row in json_lines(_sized(file)):
        refuse_halves(row, where)
        check_object(row, ANSWERS, where)
        for side in ("teacher", "student"):
            check_object(row[side], SAID, f"{where}, {side}")
        if row["id"] not in ids or row["id"] in answered:
            raise ValueError(
                f"{where}: 'id' is {row['id']!r}, which open_prompts.jsonl lacks or which was"
                " answered before"
            )
        answered.add(row["id"])

    if lacking := sorted(ids - answered):
        raise ValueError(
            f"{file} has no answer to the prompt {lacking[0]!r} of open_prompts.jsonl; copy the"
            " bundle again"
        )
    return bundle_rows(bundle, "teacher", "open")


def receive(bundle: Path, sha256: str | None = None, key: Path | None = None) -> Received:
    """Everything in a bundle that decides what `accept` does, checked. `sha256` and `key` as
    `verify_bundle` takes them. ValueError naming file and key or line; ConfigError without limits.
    """
    manifest = verify_bundle(bundle, sha256, key)
    file = bundle / MANIFEST
    config = manifest["config"]
    for part, kinds in (("eval", EVAL), ("data", DATA), ("teacher", TEACHER)):
        check_object(config.get(part), kinds, f"{file}, config.{part}")
    limits = limits_of(manifest, file)
    if not limits:
        raise ConfigError(
            f"{bundle} has no limits: its recipe set none, so there is nothing to accept; `compress"
            " verify` checks its bytes"
        )

    # What is asked, and how it is scored.
    requests = read_requests(bundle / "requests.jsonl")
    prompts = _open_prompts(bundle)
    tasks = sorted({row["task"] for row in requests})
    budget, settings, teacher = _settings(config, limits, tasks, file)

    # The model, as far as it can be checked without running it.
    model, most_tokens = _model(bundle / manifest["judged"], bundle / "hf")
    seq_len = config["data"].get("seq_len", Data.seq_len)
    if isinstance(most_tokens, int) and seq_len > most_tokens:
        raise ValueError(
            f"{file}, config.data: 'seq_len' is {seq_len}, and the model was made for"
            f" {most_tokens} tokens"
        )
    return Received(
        manifest=manifest,
        budget=budget,
        settings=settings,
        heldout=config["data"]["heldout"],
        seq_len=seq_len,
        teacher=teacher,
        requests=requests,
        prompts=prompts,
        said=read_said(bundle, prompts),
        model=model,
    )


def _model(path: Path, checkpoint: Path) -> tuple[Model, Any]:
    """What was judged, and the tokens that it sees at once as its file or the checkpoint says.
    ValueError as `model_of`. A GGUF is opened without torch.
    """
    if runtime_at(path) == "llama.cpp":
        model = gguf_model(path)
        fields = read_header(path).fields
        return model, fields.get(f"{fields['general.architecture']}.context_length")
    from compress.models.checkpoint import model_of, read_config

    model = model_of(path)
    if model.runtime == "onnxruntime":
        from compress.formats.onnx_folder import check_folder

        check_folder(model.path)
    return model, read_config(checkpoint).get("max_position_embeddings")


def _open_prompts(bundle: Path) -> list[Prompt]:
    """The prompts that the bundle's models answered; none where there is no such file.

    ValueError naming the file, and the line where one is to blame.
    """
    file = _sized(bundle / "open_prompts.jsonl")
    if not file.is_file():
        return []

    # Prompts are read by the same reader as a recipe's, which knows nothing of half characters.
    for where, row in json_lines(file):
        refuse_halves(row, where)
    prompts = read_prompts(file)
    if len(prompts) > MOST_PROMPTS:
        raise ValueError(
            f"{file} has {len(prompts):,} prompts, at most {MOST_PROMPTS:,} are asked; ask its"
            " sender for fewer"
        )
    return prompts


def _settings(
    config: dict[str, Any], limits: dict[str, dict[str, Any]], tasks: list[str], file: Path
) -> tuple[Budget, Eval, Teacher]:
    """The recipe's limits, how its models were scored on `tasks`, and their teacher.

    ValueError naming the manifest `file`: what a recipe can't mean either, or timing without end.
    """
    measured = {key: config["eval"][key] for key in MEASURED if key in config["eval"]}
    try:
        budget = Budget(
            {name: Limit(**limit) for name, limit in limits.items()},
            {},
            bool(config["budget"].get("strict")),
        )
        settings = Eval(**measured, tasks=tasks, open_prompts=[])
        teacher = Teacher(**config["teacher"])
    except ConfigError as error:
        raise ValueError(f"{file}, config: {error}") from error

    # Each setting is within bounds; their product must be too.
    tokens = settings.new_tokens * settings.repeats * settings.processes
    if tokens > GENERATED_TOKENS:
        raise ValueError(
            f"{file}, config.eval: timing would write {tokens:,} tokens, at most"
            f" {GENERATED_TOKENS:,} are allowed"
        )
    return budget, settings, teacher
