"""Made-up but realistic records of an eight-slot run, for the tests of report/ and track/. Never
shown as results.
"""

from __future__ import annotations

import json
from pathlib import Path

from compress.score.open import beside_teacher, own_scores
from compress.score.prompts import Prompt
from compress.text.repetition import loops

# slot, technique, parent, params M, size MB, bits, KL, top1, bpb, kept, tok/s, ttft, ms, rss MB,
# minutes
ROWS = [
    (
        "teacher",
        "teacher",
        None,
        134.515,
        98.1,
        5.83,
        0.0,
        1.0,
        1.021,
        1.0,
        41.2,
        212.0,
        24.3,
        1010,
        0.3,
    ),
    (
        "prune_depth",
        "prune_depth",
        "teacher",
        116.8,
        233.6,
        16.0,
        0.812,
        0.604,
        1.391,
        0.713,
        47.9,
        178.0,
        20.9,
        940,
        0.4,
    ),
    (
        "prune_width",
        "prune_width",
        "prune_depth",
        97.3,
        194.7,
        16.0,
        1.47,
        0.498,
        1.702,
        0.522,
        55.1,
        151.0,
        18.1,
        860,
        0.9,
    ),
    (
        "heal",
        "distill",
        "prune_width",
        97.3,
        194.7,
        16.0,
        0.431,
        0.706,
        1.214,
        0.861,
        55.3,
        150.0,
        18.1,
        861,
        5.2,
    ),
    (
        "lora",
        "lora",
        "heal",
        97.3,
        194.7,
        16.0,
        0.418,
        0.712,
        1.208,
        0.868,
        55.2,
        151.0,
        18.1,
        862,
        1.1,
    ),
    (
        "round",
        "ptq",
        "lora",
        97.3,
        55.9,
        4.6,
        0.692,
        0.621,
        1.331,
        0.774,
        54.8,
        152.0,
        18.2,
        905,
        0.1,
    ),
    (
        "qat",
        "qat",
        "lora",
        97.3,
        55.9,
        4.6,
        0.506,
        0.681,
        1.249,
        0.842,
        54.9,
        152.0,
        18.2,
        905,
        2.4,
    ),
    (
        "gguf",
        "export_gguf",
        "qat",
        97.3,
        56.4,
        4.64,
        0.509,
        0.679,
        1.251,
        0.839,
        138.6,
        74.0,
        7.2,
        231,
        0.1,
    ),
]
KEYS = (
    "params",
    "size_bytes",
    "bits_per_weight",
    "kl_to_teacher",
    "top1_agree",
    "bits_per_byte/heldout",
    "kept",
    "tok_per_sec",
    "ttft_ms_p50",
    "latency_ms_p50",
    "peak_rss_bytes",
)
SCALE = {"params": 1e6, "size_bytes": 1e6, "peak_rss_bytes": 1e6}


def record(name: str, index: int, row: tuple) -> dict:
    slot, technique, parent, *numbers, minutes = row
    scores = {key: value * SCALE.get(key, 1) for key, value in zip(KEYS, numbers, strict=True)}
    for key in ("params", "size_bytes", "peak_rss_bytes"):
        scores[key] = round(scores[key])
    return {
        "schema": 1,
        "run": name,
        "recipe": name.split("/")[0],
        "slot": slot,
        "index": index,
        "technique": technique,
        "runtime": "llama.cpp" if technique == "export_gguf" else "torch",
        "parent": parent,
        "digest": f"{index:x}3a9f0c1" * 8,
        "key": f"{index:x}b77d2e4" * 8,
        "reused": index == 1,
        "stage_config": {"seed": 0},
        "metrics": {"loss_nats": 2.5, "tokens": 400_000} if technique == "distill" else {},
        "scores": scores,
        "verdicts": verdicts(scores, technique == "export_gguf"),
        "seconds": {"stage": minutes * 60, "score": 31.0},
        "created": "2026-11-21T03:40:00+00:00",
    }


def verdicts(scores: dict, enforced: bool) -> list[dict]:
    size, kept, kl = scores["size_bytes"] / 1e6, scores["kept"], scores["kl_to_teacher"]
    over = "within" if size <= 60 else f"{size - 60:.1f} MB over"
    said = {
        "size_bytes": ("PASS" if size <= 60 else "FAIL", f"size {size:.1f} MB is {over} 60.0 MB"),
        "kept": (
            "PASS" if kept >= 0.8 else "FAIL",
            f"keeps {kept:.1%} of the accuracy above chance, at least 80.0%",
        ),
        "kl_to_teacher": (
            "INCONCLUSIVE" if 0.5 < kl < 0.52 else "PASS" if kl <= 0.5 else "FAIL",
            f"KL to the teacher {kl:.3f} nats against 0.500, an interval of ±5%",
        ),
    }
    bounds = {"size_bytes": (60e6, "<="), "kept": (0.8, ">="), "kl_to_teacher": (0.5, "<=")}
    return [
        {
            "limit": limit,
            "bound": bounds[limit][0],
            "op": bounds[limit][1],
            "value": scores[limit],
            "verdict": word,
            "enforced": enforced,
            "sentence": sentence,
        }
        for limit, (word, sentence) in said.items()
    ]


def write_run(
    root: Path, time: str = "2026-11-21T03-30-00", rows: list[tuple] | None = None
) -> Path:
    """A run directory as the pipeline writes it; the weights are a few bytes."""
    rows, recipe = rows or ROWS, "demo"
    name, run = f"{recipe}/{time}", root / recipe / time
    info = {
        "schema": 1,
        "recipe": recipe,
        "name": name,
        "started": "2026-11-21T03:30:00+00:00",
        "finished": "2026-11-21T03:43:12+00:00",
        "exit": 0,
        "git_sha": "4f1c0de" * 5 + "4f1c0",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "compress": "0.1.0"},
        "machine": {
            "cpu": "Imaginary Processor 9000",
            "cores": 2,
            "threads": 2,
            "ram_bytes": 16 * 2**30,
            "gpu": None,
        },
        "config": {"recipe": recipe, "seed": 0, "stages": {"heal": {"tokens": 400000, "lr": 1e-4}}},
        "slots": [row[0] for row in rows],
    }
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(info))
    for index, row in enumerate(rows):
        folder = run / f"{index:02d}-{row[0].replace('/', '_')}"
        (folder / "weights").mkdir(parents=True)
        (folder / "weights" / "model.safetensors").write_bytes(bytes([index]) * 64)
        (folder / "record.json").write_text(json.dumps(record(name, index, row)))
    return run


# kind, prompt, what makes an answer right, what the teacher says, what the student says
ASKED = [
    (
        "facts",
        "Which gas in the air do people need to stay alive?",
        "oxygen",
        "People need oxygen to stay alive.",
        "Oxygen.",
    ),
    (
        "facts",
        "On which continent are the Himalayas?",
        "asia",
        "The Himalayas are in Asia.",
        "The Himalayas are" + " a mountain range in the Himalayas," * 4,
    ),
    (
        "code",
        "How do I test in Python whether x is greater than 10?",
        "10",
        "Compare them:\n\n```python\nif x > 10:\n    print(x)\n```",
        "if x < 10:\n    if x < 10:\n" * 4,
    ),
    (
        "lists",
        "Name three colors.",
        "red",
        "1. Red\n2. Blue\n3. Green",
        "\n".join(f"{i}. Red" for i in range(1, 10)),
    ),
    ("instructions", "Write the word 'stop' and nothing else.", "stop", "Stop.", ""),
    (
        "nonsense",
        "What is the biggest city on the Sun?",
        "no city",
        "The largest city on the Sun is Tokyo.",
        "The biggest city is the Sun.",
    ),
    *[
        (
            "arithmetic",
            f"What is {i} plus {i + 2}?",
            str(2 * i + 2),
            f"{i} plus {i + 2} is {2 * i + 2}.",
            f"The sum is {2 * i + 2 + (i % 3 == 0)}.",
        )
        for i in range(3, 27)
    ],
]
PROMPTS = [
    Prompt(f"{kind}-{i:03d}", prompt, kind, [right])
    for i, (kind, prompt, right, *_) in enumerate(ASKED)
]
ENDS = (".", "```", "Green")  # of answers that ended


def open_rows(prompts: list[Prompt], said: list[str]) -> list[dict]:
    """Rows of open.jsonl, as `score.open.answered` makes them."""
    return [
        {
            "id": p.id,
            "kind": p.kind,
            "prompt": p.prompt,
            "answer": answer,
            "ids": [1, 2],
            "form": "same",
            "ended": answer.endswith(ENDS),
            "loops": loops(answer),
            "right": p.is_right(answer),
        }
        for p, answer in zip(prompts, said, strict=True)
    ]


def ask(run: Path, said: list[str] | None = None, judged: str = "07-gguf") -> None:
    """Let a fake run's teacher and judged file have answered PROMPTS, the latter as `said`."""
    teacher = open_rows(PROMPTS, [one[3] for one in ASKED])
    student = open_rows(PROMPTS, said or [one[4] for one in ASKED])
    found = {"00-teacher": [own_scores(teacher)]}
    found[judged] = [own_scores(student), beside_teacher(student, teacher)]
    for folder, rows in (("00-teacher", teacher), (judged, student)):
        (run / folder / "open.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        file = run / folder / "record.json"
        record = json.loads(file.read_text())
        for scores, intervals in found[folder]:
            record["scores"] |= scores
            record["intervals"] = record.get("intervals", {}) | intervals
        file.write_text(json.dumps(record))
