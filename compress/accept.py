"""A received bundle's budget, measured again on this machine.

Whoever wrote the bundle is not trusted: its manifest, items, prompts and answers are read and
checked whole before anything is measured, every number that decides how long it takes has a bound,
and nothing outside the bundle is opened or asked for unless the receiver says so: `hub` lets it ask
the hub for the teacher and text that the manifest names, `local` lets it open files and folders of
this machine that the manifest names. What is in installed packages, or made of a seed, needs
neither. Limits that can't be judged without stay undecided.

Of a GGUF everything but held-out text is measured by llama.cpp and numpy alone (`score/file.py`),
with torch and without it the same; torch is imported where a limit needs text or the teacher.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.budget import failed, is_heldout, judge
from compress.errors import EXIT_BUDGET, EXIT_OK, ConfigError, printable, shown
from compress.models.settings import Teacher
from compress.score.file import file_scores
from compress.score.intervals import Interval, Scores, paired_scores
from compress.score.measured import Measured
from compress.score.open import beside_teacher
from compress.ship.manifest import MANIFEST
from compress.ship.received import STAND_IN, STAND_IN_TOKENS, UNREAD, Received, receive
from compress.text.settings import Data
from compress.threads import available_threads

if TYPE_CHECKING:
    from compress.score.scorer import Scorer


def _note(text: str) -> None:
    print(shown(text), file=sys.stderr)


def text_at_hand(sources: Sequence[str], *, hub: bool, local: bool) -> str:
    """Empty where all sources of held-out text may be opened, else why one may not."""
    for source in sources:
        kind = source.partition(":")[0]
        if kind == "generated":
            return f"the held-out text {source!r} would have to be written by its teacher"

        # What lies outside the bundle is opened where the receiver says so.
        if kind == "hub" and not hub:
            return f"the held-out text {source!r} is on the hub, which is not asked without --hub"
        if kind not in ("embedded", "hub") and not local:
            return (
                f"the held-out text {source!r} is a file outside the bundle, which is not opened"
                " without --local"
            )
    return ""


def teacher_at_hand(source: str, *, hub: bool, local: bool) -> str:
    """Empty where a teacher may be opened, else why it may not."""
    if source.partition(":")[0] in ("packaged", "random"):
        return ""

    # A name of the hub, and not the path of something here.
    is_id = re.fullmatch(r"\w[\w.-]*/[\w.-]+", source) and not source.endswith(".gguf")
    if is_id and hub and not Path(source).exists():
        return ""
    if is_id and not local:
        return f"the teacher {source!r} is on the hub, which is not asked without --hub"
    if local:
        return ""
    return (
        f"the teacher {source!r} is a file or folder outside the bundle, which is not opened"
        " without --local"
    )


def _own_text(received: Received, bundle: Path) -> Data:
    """The bundle's own held-out text, as a recipe would name it. ValueError where it can't be."""
    try:
        return Data([UNREAD], [], received.heldout, received.seq_len)
    except ConfigError as error:
        raise ValueError(f"{bundle / MANIFEST}, config: {error}") from error


def _open(
    received: Received, bundle: Path, store: str, own_text: Data, *, hub: bool, local: bool
) -> tuple[Scorer | None, Measured | None, bool]:
    """A scorer, the teacher as it was measured where it can be had, and whether the bundle's own
    held-out text is what it scores on. No scorer for a GGUF that has neither.
    """
    from compress import session
    from compress.models.checkpoint import weights_digest
    from compress.train.settings import Trainer

    lacking = text_at_hand(received.heldout, hub=hub, local=local)
    stand_in = Data([UNREAD], [], [STAND_IN], min(received.seq_len, STAND_IN_TOKENS))
    text = None if lacking else own_text

    # Beside the teacher, where it may be opened and is the one that the bundle names.
    rest = Trainer(), store, received.requests, received.prompts
    if no_teacher := teacher_at_hand(received.teacher.source, hub=hub, local=local):
        _note(f"{no_teacher}; limits on closeness to it stay undecided")
    else:
        try:
            scorer, teacher = session.open_scorer(
                received.teacher, text or stand_in, received.settings, *rest
            )
            # Older bundles name the weights.
            named = received.manifest["teacher"]["digest"]
            if named == teacher.digest or named == weights_digest(teacher.path):
                if lacking:
                    _note(f"{lacking}; limits on closeness stay undecided")
                measured = scorer.measure(teacher, tasks=False, asked="none", timed=False)
                return scorer, measured, text is not None
            _note(
                f"the teacher {received.teacher.source!r} on this machine is not the bundle's;"
                " limits on closeness to it stay undecided"
            )
        except ValueError as error:
            _note(
                f"the teacher, or the text that it was compared on, can't be had here ({error});"
                " limits on closeness to it stay undecided"
            )

    # The student alone, with its own tokenizer.
    alone = Teacher(str(bundle.absolute() / "hf"))
    if text is not None:
        try:
            return session.open_scorer(alone, text, received.settings, *rest)[0], None, True
        except ValueError as error:
            lacking = f"the held-out text can't be had here ({error})"
    _note(f"{lacking}; limits on closeness and on bits per byte stay undecided")
    if received.model.runtime == "llama.cpp":
        return None, None, False
    return session.open_scorer(alone, stand_in, received.settings, *rest)[0], None, False


def accept(
    bundle: Path,
    store: str,
    *,
    hub: bool = False,
    local: bool = False,
    sha256: str | None = None,
    key: Path | None = None,
) -> int:
    """Measure a bundle's budget again and print one sentence a limit.

    Returns the exit code, 0 or 4.

    ConfigError: it has no limits. ValueError naming file and key or line: it does not verify, or
    can't be meant like this.
    """
    received = receive(bundle, sha256, key)
    own_text = _own_text(received, bundle)
    counted = f"{len(received.requests):,} items, {len(received.prompts):,} open prompts"
    _note(
        f"unchanged since it was written; measuring {received.manifest['judged']} on this machine:"
        f" {counted}"
    )

    # Items whose rule is code stay out.
    unscored_tasks = sorted({row["task"] for row in received.requests if row["rule"] == "text"})
    if unscored_tasks:
        _note(
            "not scored again, because only the task's own code can tell a right answer:"
            f" {', '.join(unscored_tasks)}"
        )
    received = received._replace(
        requests=[row for row in received.requests if row["rule"] != "text"]
    )

    measured, scorer, reference, on_own_text = _measured(
        received, bundle, store, own_text, hub=hub, local=local
    )

    # On a text that is not the bundle's, losses are no figures of its budget.
    scores, intervals = _figures(scorer, received, measured, reference)
    if not on_own_text:
        scores = {name: value for name, value in scores.items() if not is_heldout(name)}

    verdicts = judge(scores, intervals, received.budget.limits, enforced=True)
    print("\n".join(f"{one['verdict']:<12} {printable(one['sentence'])}" for one in verdicts))
    return EXIT_BUDGET if failed(verdicts, strict=received.budget.strict) else EXIT_OK


def _measured(
    received: Received, bundle: Path, store: str, own_text: Data, *, hub: bool, local: bool
) -> tuple[Measured, Scorer | None, Measured | None, bool]:
    """What was judged, measured; then as `_open`, without a scorer where no limit needs one."""
    if received.model.runtime != "llama.cpp":
        scorer, reference, on_own_text = _open(
            received, bundle, store, own_text, hub=hub, local=local
        )
        assert scorer is not None, "it is scored on text that stands in"
        return scorer.measure(received.model), scorer, reference, on_own_text

    # All that needs neither text nor teacher.
    fields = file_scores(
        received.model,
        received.settings,
        received.requests,
        received.prompts,
        available_threads(),
    )
    alone = Measured(received.model, "", **fields)
    beside_text = [name for name in received.budget.limits if _needs_torch(name)]
    if not beside_text:
        return alone, None, None, False
    if importlib.util.find_spec("torch") is None:
        _note(
            "torch is not installed (pip install 'compress-lm[train]' brings it): these limits"
            f" stay undecided: {', '.join(beside_text)}"
        )
        return alone, None, None, False

    # Then what does: the same file on held-out text.
    scorer, reference, on_own_text = _open(received, bundle, store, own_text, hub=hub, local=local)
    if scorer is None:
        return alone, None, None, False
    on_text = scorer.measure(received.model, tasks=False, asked="none", timed=False)
    scores = on_text.scores | alone.scores
    if "bytes_per_token/heldout" in scores:
        scores["bytes_per_sec"] = scores["tok_per_sec"] * scores["bytes_per_token/heldout"]
    measured = replace(
        alone,
        key=on_text.key,
        scores=scores,
        intervals=on_text.intervals | alone.intervals,
        rows=on_text.rows,
    )
    return measured, scorer, reference, on_own_text


def _needs_torch(metric: str) -> bool:
    """Whether a metric is measured on held-out text, or by the teacher itself."""
    return is_heldout(metric) or metric == "open/plausible"


def _figures(
    scorer: Scorer | None, received: Received, measured: Measured, reference: Measured | None
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Scores and intervals of what a model is by itself, beside the teacher's items and answers
    that the bundle holds, and beside the teacher `reference` where there is one.
    """
    paired = nearness = Scores({}, {}, [])
    if received.requests:
        paired = paired_scores(measured.items, received.requests, measured.chance)

    # The bundle's items were compared above, and its answers are the teacher's.
    if scorer and reference:
        teacher = replace(reference, answers=received.said)
        nearness = scorer.beside(replace(measured, items=[]), teacher, None)
    elif received.said:
        nearness = Scores(*beside_teacher(measured.answers, received.said), [])

    return (
        measured.scores | paired.scores | nearness.scores,
        measured.intervals | paired.intervals | nearness.intervals,
    )
