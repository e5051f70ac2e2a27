"""Records as tables: the terminal (rich), the README and the model card (Markdown). One list of
columns serves all.

A cell is a value and, in a muted second line, its difference from a reference: the teacher's record
within a run, the first run's in a comparison; a slot has its technique or its run there. KL,
agreement and accuracy kept already compare with the teacher, so they carry a difference only
between runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from compress.report.records import Record, Run, teacher_of, worst
from compress.report.schema import SCORES

KL, BITS = "kl_to_teacher", "bits_per_byte/heldout"
NONE = "-"  # ASCII: survives LANG=C and every pipe


@dataclass(frozen=True)
class Column:
    """A number of a record and how it is written. `value * scale` with `digits` decimals; `ratio`:
    differences in %.
    """

    key: str
    head: str
    digits: int
    scale: float = 1.0
    ratio: bool = True
    against_teacher: bool = False
    group: str = "scores"
    suffix: str = ""

    def value(self, record: Record) -> float | None:
        return (record.get(self.group) or {}).get(self.key)

    def finite(self, record: Record) -> float | None:
        value = self.value(record)
        return value if value is not None and math.isfinite(value) else None

    @property
    def sign(self) -> int:
        """1 where more of it is better, else -1."""
        return 1 if SCORES[self.key.partition("/heldout")[0]].better == "more" else -1

    def text(self, record: Record) -> str:
        value = self.value(record)
        if value is None:
            return NONE
        value *= self.scale
        if 0 < abs(value) < 10**-self.digits:
            return f"{value:.1e}"
        return f"{value:.{self.digits}f}{self.suffix}" if math.isfinite(value) else str(value)

    def difference(self, record: Record, reference: Record | None) -> str:
        """'-28%' or '+0.12', empty when there is nothing to compare."""
        value, base = self.value(record), self.value(reference) if reference else None
        if value is None or base is None or record is reference or not math.isfinite(value - base):
            return ""
        if not self.ratio:
            return f"{(value - base) * self.scale:+.{self.digits}f}"
        return f"{(value / base - 1) * 100:+.0f}%" if base else ""


COLUMNS = (
    Column("params", "params\n(M)", 1, 1e-6, against_teacher=True),
    Column("size_bytes", "size\n(MB)", 1, 1e-6, against_teacher=True),
    Column("bits_per_weight", "bits/\nweight", 2),
    Column("kl_to_teacher", "KL to\nteacher", 4, ratio=False),
    Column("top1_agree", "top-1\nagree", 1, 100, ratio=False, suffix="%"),
    Column("bits_per_byte/heldout", "bits/\nbyte", 3, ratio=False, against_teacher=True),
    Column("open/right", "open\nright", 1, 100, ratio=False, suffix="%"),
    Column("open/loops", "loops", 1, 100, ratio=False, suffix="%"),
    Column("open/kept", "open\nkept", 1, 100, ratio=False, suffix="%"),
    Column("kept", "kept", 1, 100, ratio=False, suffix="%"),
    Column("tok_per_sec", "tok/s", 1, against_teacher=True),
    Column("ttft_ms_p50", "TTFT\n(ms)", 1, against_teacher=True),
    Column("latency_ms_p50", "ms/tok\np50", 2, against_teacher=True),
    Column("peak_rss_bytes", "RSS\n(MB)", 0, 1e-6, against_teacher=True),
    Column("stage", "stage\n(min)", 1, 1 / 60, group="seconds"),
)
COLUMN = {column.key: column for column in COLUMNS}


def columns_of(records: Sequence[Record]) -> list[Column]:
    """The columns that at least one of these records fills."""
    return [c for c in COLUMNS if any(c.value(r) is not None for r in records)]


def standing(record: Record) -> str:
    """A slot's verdict in a word: the worst enforced one, else how many limits are already met
    ('2/4 met').
    """
    verdicts = record["verdicts"]
    met = sum(v["verdict"] == "PASS" for v in verdicts)
    return worst([record]) or (f"{met}/{len(verdicts)} met" if verdicts else NONE)


def undominated(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points (less is better in both) no other is at least as good as in both and better in
    one: the Pareto front.
    """
    return [not any(x <= a and y <= b and (x < a or y < b) for x, y in points) for a, b in points]


def measure_of(records: Sequence[Record], between_runs: bool = False) -> Column | None:
    """By what these are compared at their size, of what two of them have: accuracy kept, else KL.

    What several runs ship was asked all open prompts, so between runs the answers kept come first;
    and between models of different tokens bits per byte take the place of KL, which is a figure of
    each one's own tokens.
    """
    keys = ["kept", KL]
    if between_runs:
        tokens = {record["scores"].get("bytes_per_token") for record in records}
        keys = ["open/kept", "kept", KL if len(tokens) == 1 else BITS]
    sized = [record for record in records if COLUMN["size_bytes"].finite(record) is not None]
    for column in (COLUMN[key] for key in keys):
        if sum(column.finite(record) is not None for record in sized) > 1:
            return column
    return None


def fronts(records: Sequence[Record], between_runs: bool = False) -> list[str]:
    """For every record in which of `bytes` and `ms` nothing here beats it by what `measure_of`
    compares them.
    """
    marks: list[list[str]] = [[] for _ in records]
    measure = measure_of(records, between_runs)
    if measure is None:
        return [""] * len(records)
    for name, key in (("bytes", "size_bytes"), ("ms", "latency_ms_p50")):
        # Less is better in both of a pair.
        points = {}
        for i, record in enumerate(records):
            cost, value = COLUMN[key].finite(record), measure.finite(record)
            if cost is not None and value is not None:
                points[i] = (cost, -measure.sign * value)

        for i, on_front in zip(points, undominated(list(points.values())), strict=True):
            if on_front:
                marks[i].append(name)
    return [", ".join(mark) for mark in marks]


def verdict_word(verdict: dict) -> str:
    """PASS / FAIL / INCONCLUSIVE where the limit is enforced; elsewhere it is only a distance to
    the budget.
    """
    distance = {"PASS": "met", "FAIL": "not yet", "INCONCLUSIVE": "open"}
    return verdict["verdict"] if verdict.get("enforced") else distance[verdict["verdict"]]


def verdict_lines(records: Sequence[Record]) -> list[str]:
    """One line per enforced limit: 'PASS         gguf: size 58.6 MB is within 60.0 MB'."""
    lines = []
    for record in records:
        for verdict in record["verdicts"]:
            if verdict.get("enforced"):
                lines.append(f"{verdict['verdict']:<12} {record['slot']}: {verdict['sentence']}")
    return lines


def stage_table(records: Sequence[Record]) -> Table:
    """One row per slot, differences against the teacher."""
    teachers = [teacher_of(records, r.get("runtime", "torch")) for r in records]
    rows = zip(records, teachers, strict=True)
    return _table([(r["slot"], r["technique"], r, teacher) for r, teacher in rows], False)


def compare_table(runs: Sequence[Run]) -> Table:
    """Several runs: what was asked for of each, or what ships; differences against the first."""
    return _table([(run.final["slot"], run.name, run.final, runs[0].final) for run in runs], True)


def markdown_table(records: Sequence[Record]) -> str:
    """The same numbers for the README and the model card, without differences."""
    columns = columns_of(records)
    heads = [
        "slot",
        "technique",
        *(c.head.replace("/\n", "/").replace("\n", " ") for c in columns),
        "verdict",
    ]
    rows = []
    for record in records:
        cells = [column.text(record) for column in columns]
        rows.append([record["slot"], record["technique"], *cells, standing(record)])

    # No name ends a cell or a row, or begins a tag.
    escaped = str.maketrans({"\\": "\\\\", "|": "\\|", "<": "&lt;", "\n": " "})
    lines = [heads, ["---", "---", *(["---:"] * len(columns)), "---"], *rows]
    return "".join(
        "| " + " | ".join(cell.translate(escaped) for cell in line) + " |\n" for line in lines
    )


def print_table(table: Table, console: Console | None = None) -> None:
    """Print at the table's own width: a pipe gets no colours and no shortened number, whatever
    $COLUMNS says.
    """
    table.width = Console(width=10_000).measure(table).maximum
    (console or Console()).print(table, soft_wrap=True)


def _table(rows: Sequence[tuple[str, str, Record, Record | None]], between_runs: bool) -> Table:
    """Rows of (slot, what stands below it, record, reference)."""
    records = [record for _, _, record, _ in rows]
    columns = columns_of(records)
    table = Table("slot", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in columns:
        table.add_column(column.head, justify="right")
    table.add_column("verdict")

    marks = fronts(records, between_runs)
    for (slot, name, record, reference), front in zip(rows, marks, strict=True):
        below = f"\n{name}" if name != slot else ""
        cells = [Text.assemble((slot, "bold"), (below, "dim"))]

        # A difference stands below its value, where the column has one.
        for column in columns:
            difference = ""
            if between_runs or column.against_teacher:
                difference = column.difference(record, reference)
            below = f"\n{difference}" if difference else ""
            cells.append(Text.assemble(column.text(record), (below, "dim")))

        word = standing(record)
        style = {"PASS": "green", "FAIL": "bold red", "INCONCLUSIVE": "yellow"}.get(word, "dim")
        below = f"\nfront: {front}" if front and between_runs else ""
        cells.append(Text.assemble((word, style), (below, "dim")))
        table.add_row(*cells)
    return table
