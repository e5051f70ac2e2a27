"""TRL's distillation on the student, teacher and text of `bench_distill.py`; runs in an
environment of its own that holds trl.

    gkd      trl.experimental.gkd.GKDTrainer, off-policy (lmbda 0), forward KL (beta 0), bf16
             autocast over fp32 masters
    chunked  the loss of trl.DistillationTrainer, which never holds all logits, in the loop of the
             benchmark's baseline

`python scripts/bench_distill.py --trl PATH_OF_THAT_PYTHON` calls it; it prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

ROWS, STEPS = 4, 8  # as in bench_distill.py; the first two steps warm up


class Clock(TrainerCallback):
    """Seconds of each step, the optimizer's part included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *arguments: Any, **more: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def gkd(work: Path, teacher: Any, student: Any, ids: torch.Tensor) -> list[float]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = torch.tensor([row["ids"] for row in rows])
        return {
            "input_ids": batch,
            "attention_mask": torch.ones_like(batch),
            "labels": batch.clone(),
            "prompts": batch[:, :1],
            "prompt_attention_mask": torch.ones_like(batch[:, :1]),
        }

    config = GKDConfig(
        output_dir=str(work / "trl"),
        lmbda=0.0,
        beta=0.0,
        temperature=1.0,
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-4,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        optim="adamw_torch_fused",
    )
    clock = Clock()
    trainer = GKDTrainer(
        student,
        teacher,
        config,
        data_collator=collate,
        train_dataset=Dataset.from_dict({"ids": ids[: ROWS * STEPS].tolist()}),
        processing_class=AutoTokenizer.from_pretrained(work / "teacher"),
        callbacks=[clock],
    )
    trainer.train()
    return clock.seconds


def chunked(work: Path, teacher: Any, student: Any, ids: torch.Tensor) -> list[float]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    device, seconds = student.device.type, []
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)
    for step in range(STEPS):
        start, batch = time.perf_counter(), ids[step * ROWS : (step + 1) * ROWS, :-1].to(device)
        with torch.no_grad():
            theirs = teacher.model(batch).last_hidden_state
        with torch.autocast(device, torch.bfloat16):
            ours = student.model(batch).last_hidden_state
            loss, _, _ = _chunked_divergence_loss(
                ours,
                theirs,
                student.lm_head.weight,
                teacher.lm_head.weight,
                torch.ones_like(batch),
                beta=0.0,
            )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    import trl

    parser = argparse.ArgumentParser()
    parser.add_argument("--side", choices=("gkd", "chunked"), required=True)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = (
        AutoModelForCausalLM.from_pretrained(options.work / "teacher", dtype=torch.bfloat16)
        .eval()
        .to(device)
    )
    student = (
        AutoModelForCausalLM.from_pretrained(options.work / "student", dtype=torch.float32)
        .train()
        .to(device)
    )
    ids = load_file(options.work / "ids.safetensors")["ids"].long()
    seconds = {"gkd": gkd, "chunked": chunked}[options.side](options.work, teacher, student, ids)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds[2:], "peak_rss_bytes": peak, "trl": trl.__version__}))


if __name__ == "__main__":
    main()
