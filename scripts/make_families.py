"""Writes docs/models.md's table again: what can be done to which family, from `models/blocks.py`.

python scripts/make_families.py
"""

from __future__ import annotations

import re
from pathlib import Path

from compress.models.blocks import ROWS, Row, Work

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- table: made by scripts/make_families.py -->\n", "<!-- end of table -->"
COLUMNS = {
    Work.depth: "`prune_depth`",
    Work.fold: "its fold",
    Work.width: "`prune_width`",
    Work.heads: "`prune_heads`",
    Work.experts: "`prune_experts`",
    Work.calibrated: "AWQ, GPTQ",
}


def peculiarities(row: Row) -> str:
    """What is odd about a family, as its row says it."""
    fields = {
        "fused q, k, v": len(row.qkv) == 1,
        "fused gate and up": row.gated and len(row.gate_up) == 1 and not row.router,
        "no gate": not row.gated,
        "experts": bool(row.router),
        "norms of q and k, of each head": row.qk_norm == "head",
        "norms of q and k, over all heads": row.qk_norm == "all",
        "norms behind": bool(row.norms_behind),
        "no norms in front": not row.attention_norm,
        "stored transposed": row.transposed,
        "what blocks add is scaled": bool(row.residual_key),
    }
    return ", ".join([*(quirk.value for quirk in row.quirks), *(k for k, v in fields.items() if v)])


def table() -> str:
    """Markdown: a line a family, and the reasons below it by number."""
    reasons: list[str] = []

    def cell(row: Row, work: Work) -> str:
        if work is Work.experts and not row.router:
            return "–"
        reason = row.reason(work)
        if reason and reason not in reasons:
            reasons.append(reason)
        return f"no ({reasons.index(reason) + 1})" if reason else "yes"

    # Reasons are numbered as they come.
    head = ["family", "class", "trained, rounded, scored", *COLUMNS.values(), "of its kind"]
    lines = [head, ["---"] * len(head)]
    for row in ROWS:
        cells = [cell(row, work) for work in COLUMNS]
        lines.append([row.family, f"`{row.architecture}`", "yes", *cells, peculiarities(row)])
    notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *notes]) + "\n"


def main() -> None:
    """Put the table between its markers."""
    text = PAGE.read_text()
    whole_table = re.escape(BEGIN) + ".*?" + re.escape(END)
    PAGE.write_text(re.sub(whole_table, lambda _: BEGIN + table() + END, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
