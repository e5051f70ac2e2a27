"""Writes the tables of families again: of docs/models.md what can be done to which, of README.md in
brief that and which files hold it. From `models/blocks.py` and the tables of formats, to which
tests/models/test_families.py holds every family.

python scripts/make_families.py
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from compress.formats.families import FAMILIES
from compress.formats.onnx import ARCHITECTURES
from compress.models.blocks import ROWS, Row, Work

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "models.md", ROOT / "README.md"
BEGIN, END = "<!-- table: made by scripts/make_families.py -->\n", "<!-- end of table -->"
BRIEF_BEGIN = "<!-- families: made by scripts/make_families.py -->\n"
BRIEF_END = "<!-- end of families -->"
COLUMNS = {
    Work.depth: "`prune_depth`",
    Work.fold: "its fold",
    Work.width: "`prune_width`",
    Work.heads: "`prune_heads`",
    Work.experts: "`prune_experts`",
    Work.calibrated: "AWQ, GPTQ",
}

CUTS = (Work.depth, Work.width, Work.heads, Work.experts)


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


MODEL_TYPES = {name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def files_of(row: Row) -> dict[str, bool]:
    """Entry of `export.files` without its type -> whether it can hold a family."""
    kind = MODEL_TYPES[row.architecture]
    return {
        "gguf": kind in FAMILIES,
        "onnx": kind in ARCHITECTURES,
        "compressed_tensors": not row.transposed and not row.router,
    }


def brief() -> str:
    """Markdown: a line for all families of which the same is true."""
    families: dict[tuple[str, ...], list[str]] = {}
    for row in ROWS:
        cuts = [work.name for work in CUTS if not row.reason(work)]
        four_bits = "yes" if row.reason(Work.calibrated) else "yes, AWQ, GPTQ"
        files = ("yes" if held else "no" for held in files_of(row).values())
        families.setdefault((", ".join(cuts), four_bits, *files), []).append(row.family)

    # What has no row, and what of that a GGUF holds.
    rest = set(FAMILIES) - {MODEL_TYPES[row.architecture] for row in ROWS}
    head = ("families", "cut", "4 bits", "GGUF", "ONNX", "compressed-tensors")
    lines: list[tuple[str, ...]] = [head, ("---",) * len(head)]
    lines += [(", ".join(names), *cells) for cells, names in families.items()]
    more = f"[{len(rest)} more](docs/deploying.md)"
    lines.append(("any other causal model", "no", "yes", more, "no", "linear layers only"))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def put(page: Path, begin: str, table: str, end: str) -> None:
    """Put a table between its markers on a page."""
    between = re.escape(begin) + ".*?" + re.escape(end)
    text = re.sub(between, lambda _: begin + table + end, page.read_text(), flags=re.DOTALL)
    page.write_text(text)


def main() -> None:
    """Put both tables between their markers."""
    put(PAGE, BEGIN, table(), END)
    put(README, BRIEF_BEGIN, brief(), BRIEF_END)


if __name__ == "__main__":
    main()
