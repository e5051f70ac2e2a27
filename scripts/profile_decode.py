"""Where a token's time goes, in llama.cpp and in ONNX Runtime.

    python scripts/profile_decode.py [--teacher embedded] [--grids q4_0 iq4_nl q8_0] [--threads 1 2]
                                     [--seconds 60] [--store DIR] [--out FOLDER] [SETTING ...]

llama.cpp keeps no clock of its parts. So files of random weights in shapes that differ in blocks,
FFN, heads and vocabulary are timed in turn, and the milliseconds of each part are what fits them
all (`compress/search/speed.py`): the call, what a block has whatever its width (norms, and the
barriers at which threads wait for each other), its attention, its FFN, the head. Beside each part
stand its bytes a millisecond, and what the memory gives to as many threads that only read. With
several threads, `barriers` is what blocks and call take beyond their time on one.

ONNX Runtime is asked itself: its profile of a token behind 64 others, of the q4_0 directory in fp32
and of the one that rounds activations to 8 bits, summed by kind of node.

Prints tables; the last line is one JSON object. With --out it writes profile.json there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compress import machine
from compress.config import Recipe
from compress.formats.onnx import export_onnx
from compress.formats.onnx_folder import MODEL, wheel
from compress.formats.settings import Export
from compress.launch import without_recipe
from compress.quant.settings import GridName
from compress.score.latency import read_bytes_per_second
from compress.search import solution, speed
from compress.search.sizes import Sizes
from compress.session import Session, log
from compress.stages.ptq import Ptq
from compress.stages.qat import Qat

PAST, TOKENS = 64, 48  # of ONNX Runtime's profile: tokens before, and profiled
PARTS = {"MatMulNBits": "products of blocks", "GroupQueryAttention": "attention"}


def opened(store: Path, grid: str, threads: int, settings: Sequence[str]) -> Session:
    """A recipe that ships one file on a grid."""
    parts = without_recipe([f"store={store}", f"trainer.threads={threads}", *settings])
    return Session(
        Recipe(
            **parts,
            export=Export([f"gguf:{grid.upper()}"]),
            stages={"qat": Qat(grid=GridName(grid))},
            pipeline=["qat"],
        )
    )


def rounded(session: Session, work: Path) -> Path:
    """The teacher's codes on q4_0, each the nearest."""
    Ptq().run(session.teacher.path, work / "hf", session.context("q4_0", work, work, []))
    return work / "hf"


def llama_parts(session: Session) -> dict[str, float]:
    """Milliseconds of each part of a token of the teacher's own shape, bytes a second of the two
    largest, and the error on shapes that were not fitted.
    """
    family, skeletons = solution.opened(session, log)
    model = solution.speed_of(session, family, skeletons, log)
    ms = speed.terms(family.full) * np.array(model.coefficients["token_ms"])
    row = dict(zip(speed.TERMS, ms.tolist(), strict=True))

    # Bytes that grow with the FFN and with the vocabulary.
    sizes = Sizes(family, skeletons.header_bytes)
    full, levels = family.full, family.levels

    def grows(structure: str, least: int) -> float:
        lacking = sizes.file_bytes(full) - sizes.file_bytes(full._replace(**{structure: least}))
        return lacking * getattr(full, structure) / (getattr(full, structure) - least)

    ffn_bytes, head_bytes = grows("ffn", levels.ffn[-1]), grows("ids", levels.ids[-1])
    # A part that shows no time has no rate.
    rates = {
        f"{part}_bytes_per_sec": 1e3 * count / row[part]
        for part, count in (("ffn", ffn_bytes), ("head", head_bytes))
        if row[part] > 0
    }
    return {f"{name}_ms": value for name, value in row.items()} | {
        "token_ms": sum(row.values()),
        **rates,
        "read_bytes_per_sec": read_bytes_per_second(sizes.file_bytes(full), session.threads),
        "error_p95": model.error_p95("tok_per_sec"),
    }


def onnx_parts(folder: Path, threads: int, work: Path) -> dict[str, float]:
    """Milliseconds a token by kind of node, from ONNX Runtime's own profile."""
    ort = wheel("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(work / folder.name)
    session = ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {
        n.name: np.zeros([1, n.shape[1], PAST, n.shape[3]], "float32")
        for n in session.get_inputs()
        if n.name.startswith("past")
    }
    feed["attention_mask"] = np.ones([1, PAST + 1], "int64")
    for token in range(TOKENS):
        session.run(["logits"], feed | {"input_ids": np.array([[100 + token]], "int64")})

    # The first tokens warm up: their events come first.
    events = [
        event
        for event in json.loads(Path(session.end_profiling()).read_text())
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]
    later = events[len(events) // 4 :]
    sums: dict[str, float] = defaultdict(float)
    for event in later:
        kind = PARTS.get(event["args"]["op_name"], "rest")
        sums["head" if event["name"].startswith("lm_head") else kind] += event["dur"] / 1e3
    tokens = TOKENS * 3 / 4
    return {f"{kind}_ms": value / tokens for kind, value in sums.items()}


def show(rows: dict[str, dict[str, float]]) -> None:
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    print(f"{'':32s}" + "".join(f"{name.removesuffix('_per_sec'):>20s}" for name in columns))
    for name, row in rows.items():
        cells = [f"{row[column]:20.4g}" if column in row else f"{'':20s}" for column in columns]
        print(f"{name:32s}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--grids", nargs="*", default=["q4_0", "iq4_nl", "q8_0"])
    all_threads = machine.available_threads()
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, all_threads}))
    parser.add_argument("--seconds", type=float, default=60, help="of timing a row, at most")
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("settings", nargs="*", help="as for compress run: data=python_docs")
    options = parser.parse_intermixed_args()
    speed.LONGEST_SECONDS = options.seconds
    settings = [f"teacher={options.teacher}", *options.settings]

    llama: dict[str, dict[str, float]] = {}
    onnx: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        store = options.store or work / "store"

        # ONNX Runtime: codes of the teacher, rounded to the nearest.
        session = opened(store, "q4_0", all_threads, settings)
        checkpoint = rounded(session, work)
        rows = session.text(session.teacher.path).ids[:, :-1].long()
        export_onnx(checkpoint, work / "fp32")
        export_onnx(checkpoint, work / "a8", "A8", rows)
        for threads in options.threads:
            for name in ("fp32", "a8"):
                onnx[f"{name}, {threads} threads"] = onnx_parts(work / name, threads, work)

        for grid in options.grids:
            for threads in options.threads:
                session = opened(store, grid, threads, settings)
                llama[f"{grid}, {threads} threads"] = llama_parts(session)
            one, most = (llama.get(f"{grid}, {n} threads") for n in (1, max(options.threads)))
            if one and most and one is not most:
                waiting = sum(most[f"{name}_ms"] - one[f"{name}_ms"] for name in ("call", "block"))
                most["barriers_ms"] = max(0.0, waiting)

    print("llama.cpp")
    show(llama)
    print("ONNX Runtime")
    show(onnx)
    record = {"llama.cpp": llama, "onnxruntime": onnx, "versions": machine.versions()}
    record |= {"machine": machine.describe(all_threads), "git_sha": machine.git_sha()}
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "profile.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
