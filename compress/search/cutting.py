"""Shapes really cut out of the teacher, measured and healed for a while, by the stages that a
recipe would use.

Shapes that begin with the same cuts share them: they are taken in order, and of the last one every
step stays on disk until a shape needs another in its place. Finished cuts of the best are kept for
healing as links to the same files.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from compress.errors import ConfigError
from compress.keys import WEIGHTS, sources_digest, versions_of
from compress.models.checkpoint import best_device
from compress.search.explore import Clock, Nats
from compress.search.judge import Judge
from compress.search.kept import Kept
from compress.search.shapes import Shape, steps_of
from compress.session import Session
from compress.stages import STAGES
from compress.stages.distill import Distill
from compress.stages.stage import Stage
from compress.store import commit, sha256_json
from compress.train.packed import Packed

JUDGED_ROWS = 8  # the last ones of the training text, which nothing here learns from
# Of calibration, fewer than the stages' own numbers: which of two cuts is better shows earlier than
# how good each is. More where they would not tell all channels apart.
LEAST_ROWS = 16
ROWS_PER_COLUMN = 4  # tokens, for every channel that is weighed
DAMPING = 0.1  # of fits; trying seven on held-out rows takes eight times as long
BATCH_ROWS = (
    1  # of healing, with the rates below the best of what was tried (results/prune/rates.md)
)
# Learning rate of healing by nats of a cut: on the embedded teacher 2e-5 is right behind a cut of
# 0.02 nats, where 1e-4 does harm; behind one of 0.4 1e-4 and 2e-4 are (results/prune/rates.md).
RATE_PER_NAT, LOWEST_RATE, HIGHEST_RATE = 4e-4, 2e-5, 2e-4
SLOT = "heal"


def rows_of(full: Shape, seq_len: int) -> dict[str, dict[str, int]]:
    """Slot -> options of its stage that say how much text it is calibrated on."""
    rows = max(LEAST_ROWS, -(-ROWS_PER_COLUMN * full.ffn // seq_len))
    return {
        "depth": {"calibration_sequences": LEAST_ROWS // 2, "fold_sequences": rows},
        "heads": {"calibration_sequences": rows},
        "narrow": {"calibration_sequences": rows},
    }


def healing_rate(nats: float) -> float:
    """The learning rate behind a cut that lost so much."""
    return min(HIGHEST_RATE, max(LOWEST_RATE, RATE_PER_NAT * nats))


class Workshop:
    """Cuts shapes, and measures what they lose."""

    def __init__(self, session: Session, full: Shape, log: Callable[[str], None]) -> None:
        """ConfigError for text that has not enough rows to judge by beside those of calibration."""
        self.session = session
        self.full = full
        self.log = log
        self.teacher = session.teacher.path
        text = session.text(self.teacher)
        self._rows = rows_of(full, session.recipe.data.seq_len)
        needed = JUDGED_ROWS + max(max(rows.values()) for rows in self._rows.values())
        self._options: dict[str, dict[str, Any]] = dict(self._rows)
        self._options |= {
            slot: self._rows[slot] | {"damping": DAMPING} for slot in ("heads", "narrow")
        }
        if len(text.ids) < needed:
            raise ConfigError(
                f"the training text has {len(text.ids)} sequences of {session.recipe.data.seq_len}"
                f" tokens, a search needs {needed}: {JUDGED_ROWS} to judge by beside those that"
                " cuts are calibrated on; add text to data.train or lower data.seq_len"
            )

        self.kept = Kept(session.store, self._settings(text.digest))
        self.folder = session.store.root / "work" / self.kept.key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._judged_SL = text.ids[-JUDGED_ROWS:]
        self._rows_in_all = len(text.ids)
        self._judge: Judge | None = None
        self._chain: list[tuple[str, Stage, Path]] = []
        self._seconds_a_token = 0.0  # seconds a token, 0 until something was healed

    def _settings(self, text: str) -> dict[str, Any]:
        """What losses depend on besides the shape."""
        # Whatever may cut or heal, and what judges.
        modules = sorted(stage.__module__ for stage in STAGES.values())
        sources = sources_digest(*modules, "compress.search.judge", "compress.search.cutting:")

        return {
            "kind": "damage",
            "teacher": self.session.teacher.digest,
            "text": text,
            "vocabulary": (more := self.session.vocabulary(self.teacher)) and more.digest,
            "seq_len": self.session.recipe.data.seq_len,
            "seed": self.session.recipe.seed,
            "precision": self.session.precision,
            "device": str(best_device()),
            "rows": [JUDGED_ROWS, self._options, BATCH_ROWS, RATE_PER_NAT],
            "sources": sources,
            "versions": versions_of(*WEIGHTS),
        }

    def losses(
        self,
        shapes: Sequence[Shape],
        clock: Clock,
        share: float,
        what: str,
        *,
        keep_cuts: bool = False,
        at_least: int = 1,
    ) -> Nats:
        """The loss of each shape, most promising first, right after its cut: those that are known,
        and of others as many as fit into a share of the time, `at_least` so many. `keep_cuts`:
        healing may need them.
        """
        # Behind each promising one those that begin with the same cuts, in the order of the steps.
        place: dict[int, int] = {}
        for number, shape in enumerate(shapes):
            place.setdefault(shape.blocks, number)
        order = sorted(shapes, key=lambda s: (place[s.blocks], -s.ids, -s.kv_heads, -s.ffn))
        measure = partial(self._loss, keep_cut=keep_cuts)
        return self._in_time(order, measure, clock, share, what, at_least=at_least)

    def healed(self, shapes: Collection[Shape], tokens: int, clock: Clock) -> Nats:
        """The loss of each shape after so many tokens of healing, or of none where that does harm;
        nothing where they don't all fit into the time, as far as that is known.
        """
        # A rung that is not finished decides nothing.
        waiting = sum(f"{_name(shape)}+{tokens}" not in self.kept for shape in shapes)
        seconds = waiting * tokens * self._seconds_a_token
        if waiting and not clock.allows(seconds):
            self.log(
                f"healing for {tokens:,} tokens is left out: it would take about"
                f" {seconds / 60:.1f} min; {clock}"
            )
            return {}

        return self._in_time(
            shapes,
            lambda shape: self._healed(shape, tokens),
            clock,
            1.0,
            f"healing for {tokens:,} tokens",
            suffix=f"+{tokens}",
            at_least=0,
        )

    def _in_time(
        self,
        shapes: Collection[Shape],
        measure: Callable[[Shape], float],
        clock: Clock,
        share: float,
        what: str,
        suffix: str = "",
        at_least: int = 1,
    ) -> Nats:
        """Losses by shape; a line after each that was not kept."""
        results = {
            shape: self.kept[_name(shape) + suffix]
            for shape in shapes
            if _name(shape) + suffix in self.kept
        }
        waiting = [shape for shape in shapes if shape not in results]

        # One after the other, as long as the next one fits by what the others took.
        start = time.monotonic()
        for done, shape in enumerate(waiting):
            seconds_each = (time.monotonic() - start) / max(1, done)
            if done >= at_least and not clock.allows(seconds_each, share):
                self.log(f"{what}: time is up, {len(waiting) - done} shapes are left out")
                break
            name = _name(shape) + suffix
            results[shape] = self.kept.get(name, partial(measure, shape))
            self.log(
                f"{what} {done + 1}/{len(waiting)}: {results[shape]:.4f} nats, {shape}; {clock}"
            )
        return results

    def _loss(self, shape: Shape, keep_cut: bool) -> float:
        """Of a shape, cut now."""
        if shape == self.full:
            return 0.0
        path = self.cut(shape)
        loss = self.judge.loss(path)
        if keep_cut:
            self._keep(shape, path)
        return loss

    @property
    def judge(self) -> Judge:
        """Made when it is needed: it runs the teacher."""
        if self._judge is None:
            self._judge = Judge(self.teacher, self._judged_SL)
        return self._judge

    def _healed(self, shape: Shape, tokens: int) -> float:
        """The loss after healing, from the cut on."""
        start = time.monotonic()
        out = self.heal(shape, tokens)
        loss = self.judge.loss(out)
        self._seconds_a_token = (time.monotonic() - start) / tokens
        shutil.rmtree(out)
        return min(loss, self.kept[_name(shape)])

    def heal(self, shape: Shape, tokens: int) -> Path:
        """The checkpoint of a shape after so many tokens of distilling, until the next one."""
        nats = self.kept.get(_name(shape), partial(self._loss, shape, keep_cut=True))
        stage = Distill(
            tokens=tokens,
            lr=healing_rate(nats),
            batch_sequences=BATCH_ROWS,
            micro_batch_sequences=BATCH_ROWS,
            train_embeddings=False,
        )
        parent = self._kept_folder(shape)
        if not parent.is_dir():
            self._keep(shape, self.cut(shape))

        # Unfinished training goes on after a kill: its state lies in the folder of work.
        out = self.folder / "healed"
        shutil.rmtree(out, ignore_errors=True)
        work = self.folder / f"healing-{_name(shape)}-{tokens}"
        work.mkdir(exist_ok=True)
        stage.run(parent, out, self._context(SLOT, parent, work))
        shutil.rmtree(work)
        return out

    def _context(self, slot: str, parent: Path, work: Path) -> Any:
        """What a stage may ask for, without its lines, and without the text that judges: of that a
        vocabulary that was counted on it would seem to miss nothing.
        """
        context = self.session.context(slot, parent, work, [])
        return replace(
            context, log=lambda line: None, text=lambda: self._but_judged(context.text())
        )

    def _but_judged(self, text: Packed) -> Packed:
        """All rows of the text but its end, which is longer where tokens are fewer."""
        judged = -(-JUDGED_ROWS * len(text.ids) // self._rows_in_all)
        first_SL = None if text.first is None else text.first[:-judged]
        digest = sha256_json([text.digest, judged])
        return Packed(text.ids[:-judged], text.mask[:-judged], digest, first_SL)

    def cut(self, shape: Shape) -> Path:
        """The checkpoint of a shape: what it begins with like the last one is not cut again."""
        steps = list(steps_of(shape, self.full, self._options).items())
        common = 0
        for (slot, stage), (done_slot, done_stage, _) in zip(steps, self._chain, strict=False):
            if (slot, stage) != (done_slot, done_stage):
                break
            common += 1
        for _, _, path in self._chain[common:]:
            shutil.rmtree(path)
        del self._chain[common:]

        # The rest, one behind the other.
        for slot, stage in steps[common:]:
            parent = self._chain[-1][2] if self._chain else self.teacher
            out, work = self.folder / slot, self.folder / f"work-{slot}"
            shutil.rmtree(out, ignore_errors=True)
            work.mkdir(exist_ok=True)
            stage.run(parent, out, self._context(slot, parent, work))
            shutil.rmtree(work)
            self._chain.append((slot, stage, out))
        return self._chain[-1][2] if self._chain else self.teacher

    def keep_best(self, shapes: Collection[Shape]) -> None:
        """Remove the cuts of all other shapes."""
        names = {_name(shape) for shape in shapes}
        for folder in (self.folder / "kept").glob("*"):
            if folder.name not in names:
                shutil.rmtree(folder)

    def _kept_folder(self, shape: Shape) -> Path:
        return self.folder / "kept" / _name(shape)

    def _keep(self, shape: Shape, path: Path) -> None:
        """Link a cut's files under its name, whole or not at all."""
        folder = self._kept_folder(shape)
        if folder.is_dir():
            return
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(path, part, copy_function=_linked)
        commit(part, folder)

    def close(self) -> None:
        """Remove what was cut; figures stay."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._chain.clear()


def _name(shape: Shape) -> str:
    return "-".join(map(str, shape))


def _linked(source: str, copy: str) -> None:
    """A second name of a file, or a copy where the file system has no links."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copy2(source, copy)
