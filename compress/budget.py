"""Limits against metrics: every limit becomes a verdict, and every verdict is a sentence.

A value with a confidence interval passes only when the whole interval is inside the limit, fails only when all of it is outside, and
is INCONCLUSIVE in between. Values without one (bytes, parameters, milliseconds of this run) are compared as they are.
"""

from collections.abc import Mapping
from typing import Any

PASS, FAIL, INCONCLUSIVE = "PASS", "FAIL", "INCONCLUSIVE"


def human(metric: str, value: float) -> str:
    """A value with its unit, as people say it."""
    if metric in ("size_bytes", "peak_rss_bytes"):
        return f"{value / 1e6:,.1f} MB"
    if metric == "params":
        return f"{value / 1e6:,.1f}M parameters"
    if "_ms" in metric:
        return f"{value:,.1f} ms"
    if metric == "tok_per_sec":
        return f"{value:,.0f} tokens/s"
    if metric.startswith(("kept", "acc/", "flips/")) or metric == "top1_agree":
        return f"{100 * value:.1f}%"
    return f"{value:.4g}"


def judge(
    scores: Mapping[str, float], intervals: Mapping[str, tuple[float, float]], limits: Mapping[str, Any], *, enforced: bool
) -> list[dict[str, Any]]:
    """One verdict a limit (objects with max, min, why). A metric that was not measured is INCONCLUSIVE."""
    verdicts = []
    for name, limit in limits.items():
        op, side, bound = ("<=", "at most", limit.max) if limit.max is not None else (">=", "at least", limit.min)
        value = scores.get(name)
        if value is None:
            word, sentence = INCONCLUSIVE, f"{name} was not measured, so its limit {op} {human(name, bound)} can't be judged"
        else:
            low, high = intervals.get(name) or (value, value)
            inside = [high <= bound, low <= bound] if op == "<=" else [low >= bound, high >= bound]
            word = PASS if inside[0] else INCONCLUSIVE if inside[1] else FAIL
            spread = f" (95% interval {human(name, low)} to {human(name, high)})" if name in intervals else ""
            relation = {PASS: "is within", FAIL: "violates", INCONCLUSIVE: "can't be told from"}[word]
            sentence = f"{name} {human(name, value)}{spread} {relation} the limit of {side} {human(name, bound)}"
        verdict = {"limit": name, "bound": bound, "op": op, "value": value, "enforced": enforced, "why": limit.why}
        verdicts.append(verdict | {"verdict": word, "sentence": sentence})
    return verdicts


def failed(verdicts: list[dict[str, Any]], *, strict: bool) -> bool:
    """Whether enforced verdicts make the run exit with 4."""
    bad = (FAIL, INCONCLUSIVE) if strict else (FAIL,)
    return any(v["enforced"] and v["verdict"] in bad for v in verdicts)
