"""One page for one or several runs: self-contained, no scripts, no request to anywhere, readable
without a mouse.

A pure view of records. `report.html.j2` is the page; it escapes every string out of a record, and a
Content-Security-Policy makes the browser refuse whatever would still ask for the network.
"""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from compress.report import answers, compare, picture, records, table
from compress.report.picture import lines_svg
from compress.report.records import Run
from compress.report.schema import explained
from compress.report.table import COLUMN, Column
from compress.store import write_whole


def write_html(runs: list[Run], out: Path, speeds: Sequence[str] = ()) -> None:
    """Write the report of `runs` (at least one; several are compared with the first) and what was
    found of their `speeds` to the file `out`.
    """
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    # What the template may call: the views of records, and this module's own.
    page.globals.update(answers=answers, compare=compare, picture=picture)
    page.globals.update(records=records, table=table, explained=explained)
    page.globals.update(closeness=_closeness, summary=_summary, times=_times, training=_training)
    page.filters.update(
        family=picture.family,
        pretty=lambda config: json.dumps(config, indent=2, ensure_ascii=False),
    )
    page.tests["finite"] = lambda value: isinstance(value, int | float) and math.isfinite(value)

    text = page.get_template("report.html.j2").render(runs=runs, speeds=speeds)
    write_whole(Path(out), text.encode("utf-8", errors="replace"))


def _times(info: dict[str, Any]) -> list[str]:
    """When the run began, how long it took, and whether it is over, as far as its own words can be
    read.
    """
    started, finished = info.get("started") or "", info.get("finished") or ""
    words = [started, "", "" if finished else "still running or interrupted"]
    with suppress(TypeError, ValueError):
        began = datetime.fromisoformat(started)
        words[0] = f"{began:%Y-%m-%d %H:%M}"
        words[1] = f"{(datetime.fromisoformat(finished) - began).total_seconds() / 60:.1f} minutes"
    return words


def _summary(run: Run) -> str:
    """The run in one sentence, from the teacher's and the last record's numbers."""
    teacher, final = run.teacher, run.final
    if teacher is None or final is teacher:
        return f"{len(run.records)} slot(s) on record, last: {final['slot']}."

    # What both have: how much smaller it became.
    clauses = []
    for key, form in (
        ("params", "{} M parameters became {} M"),
        ("size_bytes", "{} MB became {} MB"),
    ):
        if COLUMN[key].value(teacher) is not None and COLUMN[key].value(final) is not None:
            clauses.append(form.format(COLUMN[key].text(teacher), COLUMN[key].text(final)))

    if COLUMN["open/kept"].value(final) is not None:
        kept = COLUMN["open/kept"].text(final)
        clauses.append(f"{kept} of the teacher's right open answers are kept")
    if COLUMN["kept"].value(final) is not None:
        clauses.append(f"{COLUMN['kept'].text(final)} of the accuracy above chance is kept")
    if not clauses:
        return f"Last slot: {final['slot']}."
    return f"{'; '.join(clauses)} ({final['slot']})."


def _closeness(run: Run) -> list[tuple[str, Column]]:
    """The KL on each held-out text, by name, where there are several; else over all of the text."""
    column = COLUMN["kl_to_teacher"]
    names = set(chain.from_iterable(record["scores"] for record in run.records))
    keys = sorted(name for name in names if name.startswith("kl_to_teacher/"))
    if len(keys) < 2:
        return [("", column)]
    return [(key.partition("/")[2], replace(column, key=key)) for key in keys]


def _training(run: Run) -> str:
    """The loss of every stage that trained, and the validation KL where it was measured; for a
    wide and a narrow screen.
    """
    lines = {}
    for key, name in (("loss", "{}"), ("validation_kl", "{}, validation KL")):
        for record in run.records:
            curve = record.get("curve", [])
            if points := [(row["step"], row[key]) for row in curve if key in row]:
                lines[name.format(record["slot"])] = points

    axes = ("optimizer step", "loss (nats)")
    wide = lines_svg(lines, *axes, "wide curves", 640)
    return wide + lines_svg(lines, *axes, "narrow curves", 340)
