"""One page for one or several runs: self-contained, no scripts, no request to anywhere, readable without a mouse.

A pure view of records. Every string out of a record passes `escape`; a Content-Security-Policy makes the browser refuse
whatever would still ask for the network.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from compress.report.curves import lines_svg
from compress.report.picture import COLUMN, FAMILY, size_accuracy_latency
from compress.report.records import Record, Run, teacher_of, worst
from compress.report.table import Column, columns_of, comparison, standing, verdict_word

CARDS = (  # score, title, unit, what stands below when it is not the teacher's own number
    ("size_bytes", "Size", "MB", ""), ("params", "Parameters", "M", ""),
    ("kept", "Accuracy kept", "", "above chance"),
    ("kl_to_teacher", "KL to the teacher", "nats", "mean per token"), ("latency_ms_p50", "Per token", "ms", ""),
)  # fmt: skip
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
FAMILIES = {"teacher": "teacher", "prune": "pruned", "recover": "trained", "quant": "quantized", "ship": "shipped file"}


def write_html(runs: list[Run], out: Path) -> None:
    """Write the report of `runs` (at least one; several are compared with the first) to the file `out`."""
    if not runs:
        raise ValueError("a report needs at least one run, got none; make one with `compress run RECIPE`")
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    title = " vs ".join(run.name for run in runs)
    parts = _comparison(runs) if len(runs) > 1 else []
    for run in runs:
        parts += _run(run, len(runs) > 1)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><style>{css}</style></head><body><main>'
        f"{''.join(parts)}<footer>Made by compress from the records of the run; every number on this page is in them."
        f"</footer></main></body></html>\n"
    )
    Path(out).write_text(page, encoding="utf-8")


def _run(run: Run, several: bool) -> list[str]:
    """Everything about one run; the picture only when it is not already drawn for all of them together."""
    parts = [_header(run, "h3" if several else "h1"), _cards(run)]
    if not several:
        parts.append(_picture([run]))
    parts.append(f'<div class="two">{_kl_bars(run)}{_verdicts(run)}</div>')
    parts.append(_training(run))
    cells = [(r["slot"], _technique(r), r, teacher_of(run.records, r.get("runtime", "torch"))) for r in run.records]
    parts.append(_section("Stages", "Small figures: difference from the teacher.", _table(cells, False)))
    parts.append(f'<div class="two">{_machine(run)}{_lineage(run)}</div>')
    config = escape(json.dumps(run.info.get("config", {}), indent=2, ensure_ascii=False))
    folded = f"<details><summary>Configuration, as resolved</summary><pre>{config}</pre></details>"
    return [*parts, f"<section>{folded}</section>"]


def _comparison(runs: Sequence[Run]) -> list[str]:
    ends, stages = ([(slot, run.name, r, ref) for slot, run, r, ref in comparison(runs, s)] for s in (False, True))
    every = f"<details><summary>Every stage</summary>{_table(stages, True)}</details>"
    note = f"Last slot of each run; small figures: difference from {runs[0].name}."
    return [f"<header><h1>{len(runs)} runs compared</h1></header>", _picture(runs),
            _section("Side by side", note, _table(ends, True) + every)]  # fmt: skip


def _header(run: Run, level: str) -> str:
    info, word = run.info, worst(run.records)
    started, took = _when(info.get("started")), _minutes(info)
    state = "" if info.get("finished") else "still running or interrupted"
    facts = " · ".join(escape(f) for f in (started, took, state) if f)
    return (f"<header><{level}>{escape(run.name)}</{level}>{_chip(word or 'no budget enforced', word)}"
            f'<p class="muted">{facts}</p><p class="lead">{escape(_summary(run))}</p></header>')  # fmt: skip


def _summary(run: Run) -> str:
    """The run in one sentence, from the teacher's and the last record's numbers."""
    if run.teacher is None or run.final is run.teacher:
        return f"{len(run.records)} slot(s) on record, last: {run.final['slot']}."
    said = []
    for key, form in (("params", "{} M parameters became {} M"), ("size_bytes", "{} MB became {} MB")):
        pair = COLUMN[key].text(run.teacher), COLUMN[key].text(run.final)
        if COLUMN[key].value(run.teacher) is not None and COLUMN[key].value(run.final) is not None:
            said.append(form.format(*pair))
    if COLUMN["kept"].value(run.final) is not None:
        said.append(f"{COLUMN['kept'].text(run.final)} of the accuracy above chance is kept")
    return f"{'; '.join(said)} ({run.final['slot']})." if said else f"Last slot: {run.final['slot']}."


def _cards(run: Run) -> str:
    cards = []
    for key, name, unit, below in CARDS:
        column = COLUMN[key]
        if column.value(run.final) is None:
            continue
        teacher = teacher_of(run.records, run.final.get("runtime", "torch"))
        if change := not below and column.difference(run.final, teacher):
            below = f"teacher {column.text(teacher or {})} · {change}"
        cards.append(f"<div><dt>{name}</dt><dd><b>{column.text(run.final)} <small>{unit}</small></b></dd>"
                     f"<dd>{escape(below)}</dd></div>")  # fmt: skip
    return f'<dl class="cards">{"".join(cards)}</dl>' if cards else ""


def _picture(runs: Sequence[Run]) -> str:
    svg = size_accuracy_latency(runs)
    if not svg:
        return ""
    if len(runs) > 1:
        keys = "".join(f'<li class="run{i % 6}">{escape(run.name)}</li>' for i, run in enumerate(runs))
    else:
        used = {FAMILY.get(r["technique"], "ship") for r in runs[0].records}
        keys = "".join(f'<li class="{f}">{name}</li>' for f, name in FAMILIES.items() if f in used)
    note = "Up and to the left is better. A bubble's area is its milliseconds per token; arrows lead from the parent."
    timed = [r for run in runs for r in run.records if COLUMN["latency_ms_p50"].value(r) is not None]
    if len(places := sorted({r.get("runtime", "torch") for r in timed}, reverse=True)) > 1:
        note += f" Milliseconds were taken in {' and '.join(places)}: compare them within one runtime."
    legend = f'<ul class="legend">{keys}<li class="pareto">Pareto front: nothing is both smaller and better</li></ul>'
    return _section("Size, accuracy, latency", note, svg + legend)


def _kl_bars(run: Run) -> str:
    column, by_slot = COLUMN["kl_to_teacher"], {r["slot"]: r for r in run.records}
    rows = [(r, v) for r in run.records if (v := column.value(r)) is not None and math.isfinite(v)]
    top, out = max((v for _, v in rows), default=0) or 1.0, []
    for r, value in rows:
        change = column.difference(r, by_slot.get(r.get("parent")))
        bar = f'<rect width="{100 * value / top:.2f}%" height="16" rx="3"/>'
        bar = f'<svg class="{FAMILY.get(r["technique"], "ship")}" aria-hidden="true">{bar}</svg>'
        out.append(f'<tr><th scope="row">{escape(r["slot"])}</th><td>{bar}</td><td>{column.text(r)}</td>'
                   f'<td class="muted">{change}</td></tr>')  # fmt: skip
    note = "Mean KL divergence per token in nats, and the change from the stage's parent. Less is closer."
    return _section("Distance to the teacher", note, f'<table class="bars">{"".join(out)}</table>') if out else ""


def _training(run: Run) -> str:
    """The loss of every stage that trained, and the validation KL where it was measured."""
    lines = {r["slot"]: [(row["step"], row["loss"]) for row in r["curve"] if "loss" in row] for r in run.records if r.get("curve")}
    for r in run.records:
        if measured := [(row["step"], row["validation_kl"]) for row in r.get("curve", []) if "validation_kl" in row]:
            lines[f"{r['slot']}, validation KL"] = measured
    note = "Mean loss per token in nats, of the stage's own loss; different stages' losses are different things."
    svg = lines_svg(lines, "optimizer step", "loss (nats)")
    return _section("Training", note, svg) if svg else ""


def _verdicts(run: Run) -> str:
    pairs = [(r, v) for r in run.records for v in r["verdicts"]]
    enforced, distance = ([_verdict(r, v) for r, v in pairs if bool(v.get("enforced")) is e] for e in (True, False))
    body = f'<ul class="verdicts">{"".join(enforced)}</ul>' if enforced else ""
    if distance:
        body += ("<details><summary>Distance to the budget, stage by stage</summary>"
                 f'<ul class="verdicts distance">{"".join(distance)}</ul></details>')  # fmt: skip
    note = "Limits set beforehand for a slot or for the shipped file." if enforced else "No limit was enforced."
    return _section("Verdicts", note, body)


def _verdict(record: Record, verdict: dict[str, Any]) -> str:
    chip = _chip(verdict_word(verdict), verdict["verdict"])
    return f"<li>{chip}<span><b>{escape(record['slot'])}</b> {escape(str(verdict['sentence']))}</span></li>"


def _table(rows: Sequence[tuple[str, str, Record, Record | None]], between_runs: bool) -> str:
    """Rows of (name, what stands below it, record, reference); the same columns and texts as the terminal's table."""
    columns = columns_of([r for _, _, r, _ in rows])
    heads = "".join(f'<th scope="col">{escape(c.head).replace(chr(10), "<br>")}</th>' for c in columns)
    body = []
    for name, below, r, reference in rows:
        cells = "".join(_cell(c, r, reference if between_runs or c.against_teacher else None) for c in columns)
        word = standing(r)
        body.append(f'<tr><th scope="row">{escape(name)}<small>{escape(below)}</small></th>{cells}'
                    f"<td>{_chip(word, word)}</td></tr>")  # fmt: skip
    head = f'<thead><tr><th scope="col">slot</th>{heads}<th scope="col">verdict</th></tr></thead>'
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="table, scrolls sideways">'
            f'<table class="stages">{head}<tbody>{"".join(body)}</tbody></table></div>')  # fmt: skip


def _cell(column: Column, record: Record, reference: Record | None) -> str:
    difference = column.difference(record, reference)
    return f"<td>{column.text(record)}{f'<small>{difference}</small>' if difference else ''}</td>"


def _machine(run: Run) -> str:
    machine, versions = run.info.get("machine") or {}, run.info.get("versions") or {}
    ram = machine.get("ram_bytes")
    facts = {
        "processor": machine.get("cpu"), "cores": machine.get("cores"), "threads": machine.get("threads"),
        "memory": f"{ram / 2**30:.1f} GiB" if ram else None, "accelerator": machine.get("gpu") or "none",
        **versions, "git": run.info.get("git_sha"),
    }  # fmt: skip
    items = "".join(f"<dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd>" for k, v in facts.items() if v is not None)
    return _section("Machine and versions", "", f'<dl class="facts">{items}</dl>')


def _lineage(run: Run) -> str:
    items: Iterable[str] = (
        f"<li><b>{escape(r['slot'])}</b> {escape(_technique(r))}"
        f"{escape(f' from {parent}') if (parent := r.get('parent')) else ''}{', reused' if r.get('reused') else ''}"
        f"<br><code>{escape(str(r.get('digest', '')))}</code></li>"
        for r in run.records
    )
    return _section("Lineage", "SHA-256 of each slot's weights.", f'<ol class="lineage">{"".join(items)}</ol>')


def _section(title: str, note: str, body: str) -> str:
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{below}{body}</section>"


def _technique(record: Record) -> str:
    runtime = record.get("runtime", "torch")
    return record["technique"] if runtime == "torch" else f"{record['technique']}, {runtime}"


def _chip(text: str, word: str | None) -> str:
    return f'<span class="chip {word if word in ("PASS", "FAIL", "INCONCLUSIVE") else "none"}">{escape(text)}</span>'


def _when(moment: str | None) -> str:
    try:
        return datetime.fromisoformat(moment or "").strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return moment or ""


def _minutes(info: dict[str, Any]) -> str:
    try:
        took = datetime.fromisoformat(info["finished"]) - datetime.fromisoformat(info["started"])
    except (KeyError, TypeError, ValueError):
        return ""
    return f"{took.total_seconds() / 60:.1f} minutes"
