"""manifest.json of a bundle that somebody else may have written: its keys and their types, and
whether it agrees with itself. Each schema is published beside this file, in schemas/, as JSON
Schema; a bundle of any that is listed there is read.

SHA256SUMS says that nothing was changed since it was written, not who wrote it: whoever edits a
bundle can write new sums. So what the manifest concludes is concluded again here, from the scores
and limits that it holds itself.
"""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compress import budget
from compress.doors import (
    FLAG,
    NUMBER,
    TABLE,
    TEXT,
    Kind,
    check_object,
    is_number,
    is_real,
    optional,
    read_json,
    refuse_halves,
)

MANIFEST = "manifest.json"
SCHEMA = 2  # that is written; FIRST_SCHEMA and later are read
FIRST_SCHEMA = 1
MANIFEST_BYTES = 100_000_000
WORDS = (budget.PASS, budget.FAIL, budget.INCONCLUSIVE)
ROWS = Kind(
    "a list of JSON objects",
    lambda value: isinstance(value, list) and all(isinstance(one, dict) for one in value),
)
SCORES = Kind(
    "numbers by name", lambda value: isinstance(value, dict) and all(map(_is_score, value.values()))
)
INTERVALS = Kind(
    "pairs of numbers by name",
    lambda value: isinstance(value, dict) and all(map(_is_pair, value.values())),
)
VERDICT = Kind(f"one of {', '.join(WORDS)}", lambda value: value in WORDS)
ANY_TEXT = Kind("a text or null", lambda value: value is None or isinstance(value, str))
KINDS = {
    "schema": Kind(
        f"{FIRST_SCHEMA} to {SCHEMA}",
        lambda value: type(value) is int and FIRST_SCHEMA <= value <= SCHEMA,
    ),
    "run": TEXT,
    "budget": Kind("PASS or FAIL", lambda value: value in ("PASS", "FAIL")),
    "teacher": TABLE,
    "config": TABLE,
    "judged": TEXT,
    "scores": SCORES,
    "intervals": INTERVALS,
    "rows": optional(TABLE),
    "verdicts": ROWS,
    "machine": TABLE,
    "versions": TABLE,
    "git_sha": ANY_TEXT,
    "digests": optional(TABLE),
    "lineage": ROWS,
    "files": TABLE,
}
# Schema -> keys that came with it.
ADDED: dict[int, dict[str, Kind]] = {2: {"licence": TABLE}}
LICENCE_KINDS = {"id": TEXT, "name": TEXT, "restricts": FLAG, "sentence": TEXT}
VERDICT_KINDS = {
    "limit": TEXT,
    "bound": NUMBER,
    "op": Kind("<= or >=", lambda value: value in ("<=", ">=")),
    "verdict": VERDICT,
    "sentence": TEXT,
    "value": Kind("a number or null", lambda value: value is None or _is_score(value)),
    "enforced": FLAG,
    "why": optional(TEXT),
}
LIMIT_KINDS = {
    "max": optional(
        Kind("a finite number or null", lambda value: value is None or is_number(value))
    ),
    "min": optional(
        Kind("a finite number or null", lambda value: value is None or is_number(value))
    ),
    "why": optional(TEXT),
}


def _is_score(value: Any) -> bool:
    """A number, also one that is not finite: what was measured is told as it is."""
    return is_real(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_score, value))


def read_manifest(bundle: Path, sums: Mapping[str, str]) -> dict[str, Any]:
    """The manifest of a bundle whose files have the sha256 `sums` by name.

    ValueError naming file and key: an unknown key, a wrong type, a newer schema, a table of files
    that is not that of SHA256SUMS, a judged name outside the bundle, or verdicts that are not those
    of its own scores and limits.
    """
    file = bundle / MANIFEST
    if (length := file.stat().st_size) > MANIFEST_BYTES:
        raise ValueError(
            f"{file} has {length:,} bytes, at most {MANIFEST_BYTES:,} are read; copy the bundle"
            " again"
        )
    manifest: dict[str, Any] = read_json(file)
    schema = manifest.get("schema")
    if isinstance(schema, int) and schema > SCHEMA:
        raise ValueError(
            f"{file} has schema {schema}, this version of compress reads {FIRST_SCHEMA} to"
            f" {SCHEMA}: install a newer one to read it"
        )

    # Its keys and their types, the schema's first: it says which there are.
    if "schema" in manifest:
        check_object({"schema": schema}, {"schema": KINDS["schema"]}, file)
    kinds = dict(KINDS)
    for number, added in ADDED.items():
        if isinstance(schema, int) and schema >= number:
            kinds |= added
    check_object(manifest, kinds, file)
    if "licence" in manifest:
        check_object(manifest["licence"], LICENCE_KINDS, f"{file}, licence")
    refuse_halves(manifest, file)

    # It must agree with the files beside it.
    _check_files(manifest["files"], sums, file)
    check_judged(manifest["judged"], sums, file)

    # What others read from it.
    for number, entry in enumerate(manifest["lineage"]):
        for key in ("slot", "technique"):
            if not isinstance(entry.get(key), str):
                raise ValueError(
                    f"{file}, lineage[{number}]: {key!r} is missing or no text; copy the bundle"
                    " again"
                )
    if not isinstance(manifest["teacher"].get("digest"), str):
        raise ValueError(f"{file}, teacher: 'digest' is missing or no text; copy the bundle again")

    # It must agree with itself.
    _check_verdicts(manifest, file)
    return manifest


def _check_files(table: Mapping[str, Any], sums: Mapping[str, str], file: Path) -> None:
    """ValueError where the manifest's own table of files is not that of SHA256SUMS. Manifest and
    README.md are written after it.
    """
    hashes = {
        name: entry.get("sha256") if isinstance(entry, dict) else None
        for name, entry in table.items()
    }
    later = (MANIFEST, "README.md")
    listed = {name: sha256 for name, sha256 in sums.items() if name not in later}
    if differing := sorted(
        name for name in hashes.keys() | listed.keys() if hashes.get(name) != listed.get(name)
    ):
        raise ValueError(
            f"{file}: its table of files differs from SHA256SUMS in {', '.join(differing[:5])}; the"
            " manifest is of another bundle"
        )

    # Lengths are stated beside the hashes.
    for name, entry in table.items():
        if entry.get("bytes") != (got := (file.parent / name).stat().st_size):
            raise ValueError(
                f"{file}, files: {name} has {got:,} bytes, not {entry.get('bytes')!r}; the manifest"
                " is of another bundle"
            )


def check_judged(judged: Any, names: Any, file: Path) -> None:
    """ValueError when what was judged is no file or folder of the bundle's files `names`."""
    inside = isinstance(judged, str) and bool(judged) and "/" not in judged
    if not inside or not any(name == judged or name.startswith(f"{judged}/") for name in names):
        raise ValueError(
            f"{file}: 'judged' is {judged!r}, which is no file or folder of this bundle; ask its"
            " sender"
        )


def limits_of(manifest: Mapping[str, Any], file: Path) -> dict[str, dict[str, Any]]:
    """The limits on what ships, by metric, as the recipe wrote them.

    ValueError naming file and key.
    """
    where, table = f"{file}, config.budget", manifest["config"].get("budget")
    if not isinstance(table, dict) or not isinstance(table.get("limits"), dict):
        raise ValueError(f"{where}: 'limits' is missing or no JSON object; copy the bundle again")
    for name, limit in table["limits"].items():
        check_object(limit, LIMIT_KINDS, f"{where}.limits.{name}")
        if (limit.get("max") is None) == (limit.get("min") is None):
            raise ValueError(f"{where}.limits.{name}: exactly one of max and min is needed")
    return dict(table["limits"])


def _check_verdicts(manifest: Mapping[str, Any], file: Path) -> None:
    """ValueError where a verdict, or all of them together, is not what the manifest's own scores,
    intervals and limits give.
    """
    scores = manifest["scores"]
    intervals = {name: tuple(pair) for name, pair in manifest["intervals"].items()}
    given = [
        check_object(one, VERDICT_KINDS, f"{file}, verdicts[{number}]")
        for number, one in enumerate(manifest["verdicts"])
    ]

    # Each again, by the limit that it names.
    for one in given:
        name, bound = one["limit"], one["bound"]
        limit = SimpleNamespace(
            max=bound if one["op"] == "<=" else None,
            min=bound if one["op"] == ">=" else None,
            why="",
        )
        [verdict] = budget.judge(scores, intervals, {name: limit}, enforced=one["enforced"])
        # As texts, for NaN is no number's equal.
        same_value = repr(verdict["value"]) == repr(one["value"])
        if verdict["verdict"] != one["verdict"] or not same_value:
            claim = f"{one['verdict']} for {name} at {one['value']}"
            raise ValueError(
                f"{file}: a verdict says {claim}, its own scores and limits give"
                f" {verdict['verdict']} at {verdict['value']}: it was edited"
            )

    # What the recipe's limits give, also where their verdicts were taken out.
    limits = {
        name: SimpleNamespace(**{"max": None, "min": None, "why": ""} | table)
        for name, table in limits_of(manifest, file).items()
    }
    again = [*given, *budget.judge(scores, intervals, limits, enforced=True)]

    # All together may be worse than the manifest says, never better.
    strict = manifest["config"]["budget"].get("strict", False)
    if not isinstance(strict, bool):
        raise ValueError(f"{file}, config.budget: 'strict' is {strict!r}, needed: true or false")
    if manifest["budget"] == budget.PASS and budget.failed(again, strict=strict):
        raise ValueError(
            f"{file}: 'budget' is PASS, its own scores and limits say FAIL: it was edited"
        )
