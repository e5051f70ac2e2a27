"""Everything a recipe can say, as dataclasses; `register()` puts them into Hydra's ConfigStore as
schemas.

A YAML binds to its schema with `defaults: [/schema/NAME@_here_]`; unknown keys and wrong types then
fail while composing. `OmegaConf.to_object` turns the whole configuration into these classes before
anything else happens, and `__post_init__` checks what a type can't say. A recipe can't name code:
`STAGES` is the only way from a name to code.
"""

import re
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from compress import formats
from compress.bounds import check_values
from compress.budget import Budget
from compress.errors import ConfigError, nearest
from compress.formats.settings import Export
from compress.models.settings import Teacher
from compress.score.settings import Eval
from compress.stages import STAGES
from compress.stages.ptq import OnGrid
from compress.text.settings import Data
from compress.track.settings import Track
from compress.train.settings import Trainer


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
    # Slots in order; "slot@parent" branches off an earlier slot.
    pipeline: list[str] = field(default_factory=list)
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

        # What no part can check of itself alone.
        self.eval.check_data_dir()
        self.budget.check(self.eval, list(self.data.heldout_names()))
        self._check_slots()
        check_values("", self)
        self._check_steps()
        self._check_shipped()

    def _check_steps(self) -> None:
        """ConfigError for a step of the pipeline without a stage, out of order or named twice."""
        earlier = {"teacher"}
        for slot, parent in self.steps():
            if slot not in self.stages:
                raise ConfigError(f"pipeline names the slot {slot!r}; {nearest(slot, self.stages)}")
            if type(self.stages[slot]) not in STAGES.values():
                raise ConfigError(
                    f"stages.{slot} is no stage; write it as '- /stage/NAME@stages.{slot}' with"
                    f" NAME one of {', '.join(STAGES)}"
                )
            if slot in earlier:
                raise ConfigError(
                    f"pipeline names the slot {slot!r} twice, or takes the teacher's name; each"
                    " slot runs once"
                )

            # A stage works on what is there, and nothing but a file comes after a grid.
            if parent not in earlier:
                raise ConfigError(
                    f"pipeline: {slot!r} branches off {parent!r}, which does not run before it;"
                    f" {nearest(parent, earlier)}"
                )
            if parent != "teacher" and self.stages[parent].leaves_a_grid:
                raise ConfigError(
                    f"pipeline: impossible order: {slot!r} ({self.technique(slot)}) comes after"
                    f" {parent!r} ({self.technique(parent)}), which puts the weights on a grid that"
                    f" any later change would leave; put {parent!r} last, or branch with"
                    f" '{slot}@SLOT'"
                )
            earlier.add(slot)

    def _check_shipped(self) -> None:
        """ConfigError for limits on slots that don't run, and for a shipped slot that does not run,
        may not be what ships, or is on another grid than the files.
        """
        shipped = self.shipped_slot()
        run = {"teacher", *(slot for slot, _ in self.steps())}
        for slot in [*self.budget.slots, shipped]:
            if slot not in run:
                raise ConfigError(f"budget.slots or ship names {slot!r}; {nearest(slot, run)}")

        # With keep=better it may be the parent that goes on, which only a file can be made of.
        stage = self.stages.get(shipped)
        if not self.export.files and getattr(stage, "keep", "always") != "always":
            raise ConfigError(
                f"stages.{shipped}.keep=better on what ships needs a file in export.files, which is"
                " made of what is kept; add one"
            )
        grid = stage.layout_name if isinstance(stage, OnGrid) else None
        for name in self.export.files:
            formats.check_grid(name, f"slot {shipped!r}", grid)

    def _check_slots(self) -> None:
        """ConfigError for a slot that can't be the name of a folder or is that of a record which
        every run has, and for numbers of its stage.
        """
        files = {formats.slot_of(name)[0] for name in self.export.files}
        taken = {"teacher", "teacher_gguf", *files}
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

            # What is no stage is refused where the pipeline names it.
            if is_dataclass(stage):
                check_values(f"stages.{slot}", stage)

    def steps(self) -> list[tuple[str, str]]:
        """(slot, parent slot) in order.

        The parent is the slot before, or the one named after '@'.
        """
        steps = []
        previous = "teacher"
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
    waiting = [*SCHEMAS.values()]
    seen = set[type]()
    while waiting:
        schema = waiting.pop()
        if schema.__name__ == name:
            return schema
        if not is_dataclass(schema) or schema in seen:
            continue

        # Of a list or dict field also what is in it: of `dict[str, Limit]` Limit.
        seen.add(schema)
        for hint in get_type_hints(schema).values():
            waiting += [part for part in (hint, *get_args(hint)) if isinstance(part, type)]
    return None


def register() -> None:
    """Make every schema known to Hydra as `/schema/NAME`."""
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(group="schema", name=name, node=schema)
