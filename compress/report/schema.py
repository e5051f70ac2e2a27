"""Every key of a record: what it says, its unit, which way is better, where its interval comes
from.

A record is one slot's line of `records.jsonl`. RECORD names its keys, SCORES those of its `scores`
(and so of `intervals` and `rows`). Behind a slash stands what a figure is of: `acc/TASK`,
`kl_to_teacher/TEXT`, `drop/TASK@DAMAGE`, `ttft_ms_p50/TOKENS`, `peak_rss_bytes/TOKENS`,
`throughput_tok_per_sec/SEQUENCES`; without one it is over all of them.

A student of a smaller vocabulary has KL and top-1 agreement a token of its own, its teacher read in
these (`models/reading.py`); between vocabularies bits per byte and bytes a second compare.
"""

from typing import NamedTuple

RECORD: dict[str, str] = {
    "schema": "version of these keys",
    "run": "name of the run directory",
    "recipe": "name of the recipe",
    "created": "when the record was written, ISO 8601",
    "index": "place in the run, from 0",
    "slot": "name of the slot, `teacher`, `teacher_gguf` or that of a file",
    "technique": "name of the stage in STAGES, `teacher`, or export_FORMAT",
    "runtime": "what ran the model: torch, llama.cpp, onnxruntime",
    "parent": "slot whose weights it was made of; null for the teacher",
    "digest": "sha256 of the model's files",
    "key": "key of its entry in the store, empty for the teacher",
    "reused": "whether the store had it already",
    "stage_config": "the stage's settings",
    "metrics": "what stage or export says of its own work; names carry units",
    "seconds": "of the stage and of scoring it",
    "scores": "key of SCORES -> value",
    "intervals": "key of SCORES -> [low, high], 95%",
    "rows": "figures of text -> their terms, a list of numbers a row of held-out text",
    "excluded_tasks": "tasks on which the teacher is not above chance",
    "verdicts": "one a limit: limit, bound, op, value, verdict, sentence, enforced, why",
    "latency": "how times were measured: processes, repeats, CPUs, load, bytes a second",
    "curve": "training losses by step, thinned",
    "payoff": "whether a stage that buys only quality paid, and whose weights go on",
    "open_form": "`plain` where no chat template ships and prompts were put as plain text",
}


class Figure(NamedTuple):
    """One kind of score. `better`: less, more, or empty where neither is. `interval`: what it is
    over, empty where the figure is exact or has none.
    """

    what: str
    unit: str
    better: str
    interval: str


ITEMS, PROMPTS, ROWS, PROCESSES = (
    "items, paired with the teacher's",
    "open prompts",
    "rows of held-out text",
    "fresh processes, where there are several",
)
SCORES: dict[str, Figure] = {
    "params": Figure("parameters, a tied matrix counted once", "", "less", ""),
    "size_bytes": Figure("the file or directory", "bytes", "less", ""),
    "bits_per_weight": Figure("bits of the file a parameter", "bits", "less", ""),
    "acc": Figure("accuracy", "share", "more", "items"),
    "pct_stereotype": Figure("stereotypes found likelier than their opposites", "share", "", ""),
    "acc_stderr": Figure("its standard error", "share", "", ""),
    "kept": Figure("accuracy above chance that is left of the teacher's", "share", "more", ITEMS),
    "points_lost": Figure("the teacher's accuracy less its own", "share", "less", ITEMS),
    "flips": Figure("answers that went from right to wrong or back", "share", "less", ITEMS),
    "mcnemar_p": Figure("p of McNemar's exact test", "", "", ""),
    "mcnemar_p_holm": Figure("the same, corrected for the number of tasks", "", "", ""),
    "drop": Figure("accuracy lost to a damage of the prompt", "share", "less", "items"),
    "drift": Figure("a bias or truthfulness figure less the teacher's", "share", "", ""),
    "n": Figure("items or prompts that count", "items", "", ""),
    "items_left": Figure("items that an early stop left out", "items", "", ""),
    "word_perplexity": Figure("perplexity a word", "", "less", "documents"),
    "byte_perplexity": Figure("perplexity a byte", "", "less", "documents"),
    "bits_per_byte": Figure("bits of the text a byte", "bits", "less", ROWS),
    "bytes_per_token": Figure("bytes of text a token stands for", "bytes", "more", ""),
    "kl_to_teacher": Figure("KL(teacher || model), mean over tokens", "nats", "less", ROWS),
    "kl_to_parent": Figure("KL(parent || model), mean over tokens", "nats", "less", ROWS),
    "top1_agree": Figure("tokens with the teacher's first choice", "share", "more", ROWS),
    "heldout_rows": Figure("rows of held-out text", "rows", "", ""),
    "open/right": Figure("open answers that are right", "share", "more", PROMPTS),
    "open/kept": Figure("of the teacher's right ones those right here", "share", "more", PROMPTS),
    "open/loops": Figure("answers that repeat themselves", "share", "less", PROMPTS),
    "open/loops_gained": Figure("loops less the teacher's", "share", "less", PROMPTS),
    "open/ended": Figure("answers that end by themselves", "share", "more", PROMPTS),
    "open/ended_lost": Figure("the teacher's ended less its own", "share", "less", PROMPTS),
    "open/plausible": Figure(
        "by how much less likely the teacher finds its answers", "nats a token", "less", PROMPTS
    ),
    "open/choice_gap": Figure("right of four less right in the open", "share", "less", PROMPTS),
    "open/form_differing": Figure("prompts that reach it as other tokens", "share", "less", ""),
    "draft_speedup": Figure(
        "times as fast as its teacher alone, drafting so many tokens", "", "more", PROMPTS
    ),
    "draft_accepted": Figure("drafted tokens that the teacher keeps", "share", "more", ""),
    "draft_same": Figure("answers that drafting leaves as they are", "share", "more", ""),
    "ttft_ms_p50": Figure("time to the first token, median", "ms", "less", PROCESSES),
    "latency_ms_p50": Figure("time of a further token, median", "ms", "less", PROCESSES),
    "latency_ms_p90": Figure("the same, 90th percentile", "ms", "less", PROCESSES),
    "latency_ms_p95": Figure("the same, 95th percentile", "ms", "less", PROCESSES),
    "latency_ms_p99": Figure("the same, 99th percentile", "ms", "less", PROCESSES),
    "tok_per_sec": Figure("further tokens a second", "tokens/s", "more", PROCESSES),
    "bytes_per_sec": Figure(
        "tok_per_sec times bytes a token of held-out text", "bytes/s", "more", ""
    ),
    "throughput_tok_per_sec": Figure(
        "tokens of sequences decoded together", "tokens/s", "more", PROCESSES
    ),
    "joules_per_token": Figure(
        "energy of the processors or the GPU a token answered", "joules", "less", PROCESSES
    ),
    "cost_per_million_tokens": Figure(
        "money for a million tokens at eval.price_per_hour", "", "less", PROCESSES
    ),
    "bandwidth_share": Figure("share of the memory's rate", "share", "more", PROCESSES),
    "peak_rss_bytes": Figure("memory at its peak", "bytes", "less", ""),
}


def figure_of(key: str) -> Figure | None:
    """What a score's key says; None for a key that no record has."""
    return SCORES.get(key) or SCORES.get(key.partition("/")[0])


def explained(key: str) -> str:
    """A key in a sentence, for whoever points at a column; empty for one that is not a score."""
    figure = figure_of(key)
    if figure is None:
        return ""
    parts = [figure.what + (f", {figure.unit}" if figure.unit else "")]
    if figure.better:
        parts.append(f"{figure.better} is better")
    if figure.interval:
        parts.append(f"95% interval over {figure.interval}")
    return "; ".join(parts)
