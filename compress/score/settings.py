"""How every model is scored."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from compress.bounds import check_values
from compress.errors import ConfigError, nearest
from compress.formats.devices import Device
from compress.score.perturb import PERTURBATIONS


@dataclass
class Eval:
    """How every stage, the teacher included, is scored."""

    tasks: list[str] = field(default_factory=list)
    # A folder <task>/<split>.jsonl for lm-eval's own tasks without a hub.
    data_dir: str | None = None
    limit: int | None = None  # items per task
    # Examples before each item; None: as many as the task itself says. Tasks that fix none get
    # none.
    num_fewshot: int | None = None
    # Damages of score/perturb.py: what each costs is reported as drop/TASK@NAME.
    perturbations: list[str] = field(default_factory=list)
    # A student's tasks end once every accuracy limit is decided; the teacher's never.
    stop_early: bool = False
    batch_size: int = 32
    # That a model sees at once in tasks, in every runtime; what is longer loses its beginning.
    context_tokens: int = 1024
    heldout_sequences: int = 8  # of each held-out text

    # Asked of every model (`compress/score/open.py`): "embedded", a JSON Lines file, or a file's
    # name below data_dir; empty: nothing is asked.
    open_prompts: list[str] = field(default_factory=lambda: ["embedded"])
    open_limit: int | None = None  # prompts of each file

    # Where times are taken, and files of llama.cpp run: what a budget's limits on times are of.
    device: Device = Device.cpu
    # In each of so many fresh processes, which are the sample of the intervals, so many repeats.
    prompt_tokens: int = 128
    new_tokens: int = 32
    repeats: int = 5
    processes: int = 5
    time_stages: bool = False  # times of stages that do not ship, too
    # The time to the first token of these as well, where the model takes them.
    prompt_lengths: list[int] = field(default_factory=list)
    # Sequences decoded together, for throughput.
    batch_sizes: list[int] = field(default_factory=list)
    # Peak memory with so many tokens of prompt and answer, where the model takes them.
    context_lengths: list[int] = field(default_factory=list)
    # Of the machine, in any money: what a million tokens cost is reported then.
    price_per_hour: float | None = None

    def __post_init__(self) -> None:
        # Two rows for an interval, and a token behind the first one.
        least_counts = {
            "batch_size": 1,
            "context_tokens": 1,
            "heldout_sequences": 2,
            "prompt_tokens": 1,
            "new_tokens": 2,
            "repeats": 1,
            "processes": 1,
            "prompt_lengths": 1,
            "batch_sizes": 1,
            "context_lengths": self.new_tokens + 1,
        }
        for name, least in least_counts.items():
            value = getattr(self, name)
            counts = value if isinstance(value, list) else [value]
            if min(counts, default=least) < least:
                raise ConfigError(f"eval.{name}={value} must be at least {least}")

        for name in self.perturbations:
            if name not in PERTURBATIONS:
                raise ConfigError(
                    f"eval.perturbations={name!r} is no perturbation;"
                    f" {nearest(name, PERTURBATIONS)}"
                )

        # None at all is written otherwise than as a limit of 0.
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
