"""A received bundle's budget, measured again on this machine.

Whoever wrote the bundle is not trusted: its manifest, items, prompts and answers are read and
checked whole before anything is measured, every number that decides how long it takes has a bound,
and nothing outside the bundle is opened or asked for unless the receiver says so: `hub` lets it ask
the hub for the teacher and text that the manifest names, `local` lets it open files and folders of
this machine that the manifest names. What is in installed packages, or made of a seed, needs
neither. Limits that can't be judged without stay undecided.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compress import session
from compress.budget import failed, is_heldout, judge
from compress.config import Teacher
from compress.errors import EXIT_BUDGET, EXIT_OK, ConfigError, printable
from compress.models.checkpoint import weights_digest
from compress.score.intervals import Interval, Scores, paired_scores
from compress.score.measured import Measured
from compress.score.open import beside_teacher
from compress.score.scorer import Scorer
from compress.ship.manifest import MANIFEST
from compress.ship.received import STAND_IN, STAND_IN_TOKENS, UNREAD, Received, receive
from compress.text.settings import Data
from compress.train.settings import Trainer


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)


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


def _open(
    received: Received, bundle: Path, store: str, *, hub: bool, local: bool
) -> tuple[Scorer, Measured | None, bool]:
    """A scorer, the teacher as it was measured where it can be had, and whether the bundle's own
    held-out text is what it scores on.
    """
    lacking = text_at_hand(received.heldout, hub=hub, local=local)
    stand_in = Data([UNREAD], [], [STAND_IN], min(received.seq_len, STAND_IN_TOKENS))
    try:
        text = None if lacking else Data([UNREAD], [], received.heldout, received.seq_len)
    except ConfigError as error:
        raise ValueError(f"{bundle / MANIFEST}, config: {error}") from error

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
    return session.open_scorer(alone, stand_in, received.settings, *rest)[0], None, False


def accept(
    bundle: Path, store: str, *, hub: bool = False, local: bool = False, sha256: str | None = None
) -> int:
    """Measure a bundle's budget again and print one sentence a limit.

    Returns the exit code, 0 or 4.

    ConfigError: it has no limits. ValueError naming file and key or line: it does not verify, or
    can't be meant like this.
    """
    received = receive(bundle, sha256)
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

    # On a text that is not the bundle's, losses are no figures of its budget.
    scorer, reference, on_own_text = _open(received, bundle, store, hub=hub, local=local)
    measured = scorer.measure(received.model)
    scores, intervals = _figures(scorer, received, measured, reference)
    if not on_own_text:
        scores = {name: value for name, value in scores.items() if not is_heldout(name)}

    verdicts = judge(scores, intervals, received.budget.limits, enforced=True)
    print("\n".join(f"{one['verdict']:<12} {printable(one['sentence'])}" for one in verdicts))
    return EXIT_BUDGET if failed(verdicts, strict=received.budget.strict) else EXIT_OK


def _figures(
    scorer: Scorer, received: Received, measured: Measured, reference: Measured | None
) -> tuple[dict[str, float], dict[str, Interval]]:
    """Scores and intervals of what a model is by itself, beside the teacher's items and answers
    that the bundle holds, and beside the teacher `reference` where there is one.
    """
    paired = nearness = Scores({}, {}, [])
    if received.requests:
        paired = paired_scores(measured.items, received.requests, measured.chance)

    # The bundle's items were compared above, and its answers are the teacher's.
    if reference:
        teacher = replace(reference, answers=received.said)
        nearness = scorer.beside(replace(measured, items=[]), teacher, None)
    elif received.said:
        nearness = Scores(*beside_teacher(measured.answers, received.said), [])

    return (
        measured.scores | paired.scores | nearness.scores,
        measured.intervals | paired.intervals | nearness.intervals,
    )
