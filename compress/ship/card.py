"""The bundle's README.md: a model card with the fields of Hugging Face's, and lines to copy."""

from collections.abc import Mapping, Sequence
from typing import Any

from compress import formats
from compress.budget import human
from compress.formats import Format
from compress.report import answers
from compress.report.records import Run
from compress.report.table import markdown_table, verdict_lines
from compress.ship.signature import SIGNATURE
from compress.ship.sums import SUMS
from compress.teacher import TERMS

# Answers in the model card.
WORST = 5
GOOD = 3
# Techniques of a lineage -> how the hub's readers look for them.
TAGS = {
    "prune_vocab": "pruned",
    "prune_depth": "pruned",
    "prune_width": "pruned",
    "prune_heads": "pruned",
    "prune_experts": "pruned",
    "sparsify": "sparse",
    "distill": "distilled",
    "lora": "lora",
    "ptq": "quantized",
    "qat": "quantization-aware-training",
}
# Figure -> the hub's name of its kind.
KINDS = {"acc": "accuracy", "bits_per_byte": "bits_per_byte", "kl_to_teacher": "kl_divergence"}
PLAIN = ("kept", "open/kept", "open/right", "open/loops", "kl_to_teacher")
COMMANDS = {
    ".gguf": (
        "llama-server -m {file} --jinja --port 8080          # llama.cpp",
        'echo "FROM $PWD/{file}" > /tmp/Modelfile && ollama create student -f /tmp/Modelfile',
        "compress serve . --port 8080                       # with keys, limits and metrics",
        "podman build -t student . && podman run -e COMPRESS_KEY -p 127.0.0.1:8080:8080 student",
    ),
    "onnx": ("python -c \"import onnxruntime_genai as g; g.Model('{file}')\"   # GenAI",),
    "compressed_tensors": ("vllm serve ./{file}                # its documented layout",),
    "hf": ("transformers chat ./{file}                         # transformers",),
}


def _front(run: Run, manifest: Mapping[str, Any], shipped: Sequence[Format]) -> str:
    """The YAML in front of the card: what the hub reads of a model."""
    import yaml

    licence = manifest["licence"]
    techniques = [slot["technique"] for slot in manifest["lineage"]]
    tags = {TAGS[technique] for technique in techniques if technique in TAGS}
    tags |= {"compress", *(format.file.partition(".")[2] for format in shipped)}
    fields: dict[str, Any] = {"license": licence["id"], "pipeline_tag": "text-generation"}
    if licence["id"] == "other":
        fields |= {"license_name": licence["name"]}
    if languages := manifest["teacher"].get("languages"):
        fields["language"] = languages

    # What a hub has no page for can't be a base model there.
    source = str(manifest["teacher"].get("repository") or manifest["teacher"]["source"])
    if source.count("/") == 1 and ":" not in source and not source.endswith(".gguf"):
        fields["base_model"] = source
    fields["library_name"] = "transformers"
    fields["tags"] = sorted(tags - {""})
    results = [_result(manifest, name) for name in _told(manifest["scores"])]
    fields["model-index"] = [{"name": run.info["recipe"], "results": results}]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100).rstrip()


def _told(scores: Mapping[str, Any]) -> list[str]:
    """Figures for the hub: of each task its accuracy, of held-out text the bits, and the rest."""
    parts = [name for name in scores if name.startswith(("acc/", "bits_per_byte/"))]
    plain = [name for name in parts if "@" not in name]
    return [*plain, *(name for name in PLAIN if name in scores)]


def _result(manifest: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One evaluation result, as the hub's model-index has it."""
    kind, _, dataset = name.partition("/")
    if kind == "open" or not dataset:
        kind, dataset = name, "open prompts" if kind == "open" else "all tasks"
    if name == "kl_to_teacher":
        dataset = "held-out text"
    value = float(manifest["scores"][name])
    shown = human(name, value)
    if name in manifest["intervals"]:
        low, high = (human(name, end) for end in manifest["intervals"][name])
        shown += f" (95% interval {low} to {high})"
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": "compress", "name": dataset},
        "metrics": [{"type": KINDS.get(kind, kind), "value": value, "name": f"{name}: {shown}"}],
    }


def lines_to_copy(files: Sequence[str]) -> list[str]:
    """What to type, in the bundle's folder, for each of its `files` and the plain checkpoint."""
    lines: list[str] = []
    for file in [*files, "hf"]:
        key = ".gguf" if file.endswith(".gguf") else file.partition("-")[0]
        commands = [command.format(file=file) for command in COMMANDS[key]]
        lines += [f"`{file}`:", "", "```", *commands, "```", ""]
    return lines


def _what_it_says(run: Run) -> list[str]:
    """The model card's section on open answers, empty where nothing was asked."""
    figures = answers.figures(run.final)
    if not figures:
        return []
    pairs = answers.asked(run)

    # Good ones are spread over their ids, and so of several kinds.
    good = []
    for pair in pairs[WORST:]:
        student = pair[1]
        if student["right"] and student["ended"] and not student["loops"]:
            good.append(pair)
    spread = good[:: max(1, len(good) // GOOD)][:GOOD]

    lines = ["## What it says", "", figures, answers.plainly(run), ""]
    for title, shown in (("The worst answers:", pairs[:WORST]), ("Good ones:", spread)):
        if shown:
            lines += [title, "", *(f"{answers.quoted(pair)}\n" for pair in shown)]
    return lines


def model_card(run: Run, manifest: dict[str, Any], *, passed: bool) -> str:
    """The bundle's README: what it is, what it costs, where it comes from."""
    origin, config = manifest["teacher"], run.info["config"]
    texts = [*config["data"]["train"], *config["data"]["chat"]]
    shipped = [formats.parse(name)[:2] for name in config["export"]["files"]]
    files = []
    for format, type in shipped:
        file = format.place(type)
        files.append(f"- `{file}`: {format.about.format(file=file)}")
    lineage = [
        f"{number}. `{slot['slot']}` ({slot['technique']}) from `{slot['parent'] or 'nothing'}`,"
        f" weights sha256 `{slot['digest'][:16]}`"
        for number, slot in enumerate(manifest["lineage"], 1)
    ]

    lines = [
        "---",
        _front(run, manifest, [format for format, _ in shipped]),
        "---",
        "",
        f"# {run.info['recipe']}: a student of {origin['source']}",
        "",
        "" if passed else "**This bundle violates its budget; see the verdicts below.**\n",
        (
            f"Made by `compress run {run.info['recipe']}` ({run.info['name']})."
            f" `{manifest['judged']}` is the file that was judged."
        ),
        "",
        "## Files",
        "",
        "- `hf/`: the checkpoint for transformers and further training, unpacked",
        *files,
        "",
        "## Run it",
        "",
        *lines_to_copy([format.place(type) for format, type in shipped]),
        "## Scores",
        "",
        markdown_table(run.records),
        "",
        "## Verdicts",
        "",
        *[f"- {line}" for line in verdict_lines(run.records)],
        "",
        *_what_it_says(run),
        "## Lineage",
        "",
        *lineage,
        "",
        "## Licences",
        "",
        *_licences(manifest),
        *[f"- Training text: {name}" for name in texts],
        "",
        "## Check it",
        "",
        "```",
        f"sha256sum -c {SUMS}",
        "compress verify .",
        "compress accept .   # measures the budget again on this machine",
        "```",
        "",
        (
            "`pip install 'compress-lm[accept]'` is enough for a GGUF. Where its sender signed it,"
            f" `compress verify . --key PUBLIC_PEM` says so ({SIGNATURE})."
        ),
        "",
    ]
    return "\n".join(lines)


def _licences(manifest: dict[str, Any]) -> list[str]:
    """What the student is under, and what that asks of whoever passes it on."""
    licence = manifest["licence"]
    terms = f", which are in `{TERMS}/`" if _has_terms(manifest) else ""
    lines = [
        f"- Teacher: {licence['name']}. The student is a derived work and stays under those"
        f" terms{terms}."
    ]
    if licence["restricts"]:
        lines.append(f"- **Read before you pass it on:** {licence['sentence']}.")
    return lines


def _has_terms(manifest: dict[str, Any]) -> bool:
    """Whether the teacher's terms are in the bundle."""
    return any(name.startswith(f"{TERMS}/") for name in manifest["files"])
