"""Writes tests/golden/grids.safetensors: rows of weights and the blocks that llama.cpp's own
quantizer makes of them.

    python3 -m venv CY && CY/bin/pip install --no-deps cyllama==0.2.18
    python scripts/make_golden.py CY/bin/python

A one-layer random Llama goes out as an F32 GGUF, `llama_model_quantize` turns it into each type,
and rows of its down projection are kept. cyllama has an environment of its own: its libraries must
not meet xllamacpp's.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import torch
from safetensors.torch import save_file

LLAMA_FTYPE = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q4_k": 14, "q6_k": 18}
ROWS, COLUMNS = 16, 512
QUANTIZE = """
import json, pathlib, sys, cyllama, cyllama.llama.llama_cpp as c
p = c.LlamaModelQuantizeParams()
p.ftype, p.pure, p.nthread = int(sys.argv[3]), True, 1
c.model_quantize(sys.argv[1], sys.argv[2], p)
build = pathlib.Path(cyllama.__file__).parent / "build_config.json"
print(json.loads(build.read_text())["versions"]["llama_cpp_version"])
"""


def weights() -> torch.Tensor:
    """(ROWS, COLUMNS) fp16: normal, heavy-tailed, one-sided, partly zero, and on a coarse grid, by
    turns.
    """
    g = torch.Generator().manual_seed(11)
    w = torch.randn(ROWS, COLUMNS, generator=g) * 0.05
    w[1::5] /= torch.rand(w[1::5].shape, generator=g).clamp(min=0.02)
    w[2::5] = w[2::5].abs() + 0.01
    w[3::5, 40:300] = 0
    w[4::5] = (w[4::5] * 40).round() / 40
    return w.half()


def write_f32(path: Path, down: torch.Tensor) -> None:
    """A Llama of one layer whose down projection begins with the rows of `down`."""
    g = torch.Generator().manual_seed(0)
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 256),
        ("feed_forward_length", COLUMNS),
        ("head_count", 4),
        ("layer_norm_rms_eps", 1e-5),
        ("vocab_size", 32),
    ):
        getattr(writer, f"add_{add}")(value)
    shapes = {
        "token_embd": (32, 256),
        **{f"blk.0.attn_{n}": (256, 256) for n in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": (COLUMNS, 256),
        "blk.0.ffn_up": (COLUMNS, 256),
        "blk.0.ffn_down": (256, COLUMNS),
    }
    for name, shape in shapes.items():
        w = torch.randn(shape, generator=g)
        if name == "blk.0.ffn_down":
            w[: len(down)] = down.float()
        writer.add_tensor(f"{name}.weight", w.numpy())
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", torch.ones(256).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(python: str) -> None:
    golden = {"weight": weights()}
    with TemporaryDirectory() as folder:
        source, target = Path(folder) / "f32.gguf", Path(folder) / "quantized.gguf"
        write_f32(source, golden["weight"])
        for name, ftype in LLAMA_FTYPE.items():
            done = subprocess.run(
                [python, "-c", QUANTIZE, source, target, str(ftype)],
                capture_output=True,
                text=True,
                check=True,
            )
            version = done.stdout.split()[-1]
            down = next(
                t for t in gguf.GGUFReader(target).tensors if t.name == "blk.0.ffn_down.weight"
            )
            assert down.tensor_type.name == name.upper()
            golden[name] = torch.from_numpy(down.data[:ROWS].copy())
    out = Path(__file__).resolve().parents[1] / "tests" / "golden" / "grids.safetensors"
    out.parent.mkdir(exist_ok=True)
    save_file(
        golden,
        out,
        metadata={"made by": "scripts/make_golden.py", "cyllama": "0.2.18", "llama.cpp": version},
    )
    print(f"{out}: {out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
