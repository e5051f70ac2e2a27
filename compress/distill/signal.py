"""The teacher's signal, made once and kept on disk: a second epoch, a second student or a QAT stage never runs the teacher again.

Scheme `sampled`: the M most probable ids with their exact probabilities, plus S ids drawn from the rest in proportion to the
teacher's probability, each weighing (mass of the rest) / S. For any function f: E[sum_k w_k f(id_k)] = sum_v p_v f(v), so losses
and gradients are unbiased, where plain top-k teaches the student that the tail does not exist (arXiv 2503.16870, sections 3-4).
The exact entropy of p is kept too, so that the KL itself, not only its gradient, can be reported.

A directory of shards: `meta.json` names teacher, data, scheme, seed; `NNNNN-<sha256[:16]>.safetensors` holds ROWS_PER_SHARD
sequences and carries its own checksum in its name. A shard is a pure function of (meta, its number): draws are seeded by it.

Legend: R rows (sequences), L positions, V vocabulary, K = M + S ids a token, H hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from compress.checkpoint import best_device, digest, load_model, sha256_file
from compress.store import fsync, sha256_json, write_json
from compress.train.data import Packed
from compress.train.forward import hidden_and_head

ROWS_PER_SHARD = 16
TOP, DRAWS = 32, 16  # 48 ids of 4 bytes and 4 bytes of entropy: 196 bytes a token
CHUNK = 256  # tokens whose full logits are held at once


class Signals:
    """Signals of one teacher on one packed text. Reading makes what is missing first."""

    def __init__(self, root: Path, teacher: Path, data: Packed, *, seed: int, hidden: bool, precision: str, log: Callable[[str], None]) -> None:
        self.teacher, self.data, self.hidden, self.log = teacher, data, hidden, log
        self.meta: dict[str, Any] = {
            "schema": 1, "scheme": "sampled", "top": TOP, "draws": DRAWS, "teacher": digest(teacher), "data": data.digest,
            "seed": seed, "hidden": hidden, "rows_per_shard": ROWS_PER_SHARD, "precision": precision,
            "threads": torch.get_num_threads(), "device": best_device().type, "torch": torch.__version__,
        }  # fmt: skip
        self.folder = root / sha256_json(self.meta)[:32]
        self._model: Any = None
        self._shards: dict[int, dict[str, Tensor]] = {}
        if not (self.folder / "meta.json").is_file():
            write_json(self.folder / "meta.json", self.meta)

    def read(self, rows: list[int]) -> dict[str, Tensor]:
        """ids (R, L, K) int64, probs (R, L, K) fp32, entropy (R, L) fp32 and, if kept, hidden (R, L, H) bf16 of these rows.

        ValueError when a shard on disk is damaged.
        """
        parts = [{name: t[row % ROWS_PER_SHARD] for name, t in self._shard(row // ROWS_PER_SHARD).items()} for row in rows]
        batch = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
        batch["ids"] = batch["ids"].view(torch.int16).to(torch.int64) & 0xFFFF if batch["ids"].dtype == torch.uint16 else batch["ids"].to(torch.int64)
        batch["probs"] = batch["probs"].float()
        batch["probs"] /= batch["probs"].sum(-1, keepdim=True)  # fp16 rounding moves the sum by up to 1e-3
        return batch

    def make(self, rows: int) -> None:
        """Make every shard that the first `rows` sequences need; shards on disk are kept."""
        missing = [n for n in range(-(-rows // ROWS_PER_SHARD)) if self._find(n) is None]
        for done, number in enumerate(missing):
            self._write(number)
            self.log(f"teacher signal {done + 1}/{len(missing)} shards")
        self._model = None

    def _find(self, number: int) -> Path | None:
        return next(iter(self.folder.glob(f"{number:05d}-*.safetensors")), None)

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = self._find(number) or self._write(number)
            data = path.read_bytes()
            if path != self._name(number, data):
                raise ValueError(f"teacher signal {path} is damaged (its checksum differs from its name); delete it and run again")
            self._shards[number] = load(data)
        return self._shards[number]

    def _name(self, number: int, data: bytes) -> Path:
        return self.folder / f"{number:05d}-{hashlib.sha256(data).hexdigest()[:16]}.safetensors"

    def _write(self, number: int) -> Path:
        if self._model is None:
            self._model = load_model(self.teacher, torch.bfloat16 if self.meta["precision"] == "bf16" else torch.float32)
            self._model.to(best_device())
        rows = self.data.ids[number * ROWS_PER_SHARD : (number + 1) * ROWS_PER_SHARD, :-1]
        generator = torch.Generator().manual_seed(self.meta["seed"] * 1_000_003 + number)
        made = [sequence_signal(self._model, row.long(), generator, hidden=self.hidden) for row in rows]
        beside = self.folder / f".{number:05d}.part"
        save_file({name: torch.stack([m[name] for m in made]) for name in made[0]}, beside)
        fsync(beside)
        final = self.folder / f"{number:05d}-{sha256_file(beside)[:16]}.safetensors"
        beside.replace(final)
        return final


@torch.inference_mode()
def sequence_signal(model: Any, ids_L: Tensor, generator: torch.Generator, *, hidden: bool) -> dict[str, Tensor]:
    """The sampled signal of one sequence (L,): ids (L, K) uint16 or int32, probs (L, K) fp16, entropy (L,) fp32."""
    hidden_LH, weight_VH = hidden_and_head(model, ids_L[None].to(model.device))
    small = weight_VH.shape[0] <= 1 << 16
    parts = [sample_targets((hidden_LH[i : i + CHUNK] @ weight_VH.T).float(), generator) for i in range(0, len(ids_L), CHUNK)]
    ids_LK, probs_LK, entropy_L = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    signal = {"ids": ids_LK.to(torch.uint16 if small else torch.int32), "probs": probs_LK.half(), "entropy": entropy_L}
    return signal | ({"hidden": hidden_LH.bfloat16().cpu()} if hidden else {})


def sample_targets(logits_NV: Tensor, generator: torch.Generator, top: int = TOP, draws: int = DRAWS) -> tuple[Tensor, Tensor, Tensor]:
    """(ids (N, K), weights (N, K), entropy (N,)): exact top ids, then `draws` unbiased draws from the rest. fp32 logits in."""
    log_p = logits_NV.log_softmax(-1)
    p_NV = log_p.exp()
    entropy_N = -(p_NV * log_p).sum(-1)
    top = min(top, p_NV.shape[1] - 1)
    top_p, top_ids = p_NV.topk(top, sorted=False)
    cdf_NV = p_NV.scatter_(1, top_ids, 0.0).cumsum(-1)
    rest_N1 = cdf_NV[:, -1:].contiguous()
    u = torch.rand(len(p_NV), draws, generator=generator).to(p_NV.device) * rest_N1
    tail_ids = torch.searchsorted(cdf_NV, u, right=True).clamp_(max=p_NV.shape[1] - 1)
    return torch.cat([top_ids, tail_ids], 1), torch.cat([top_p, (rest_N1 / draws).expand(-1, draws)], 1), entropy_N
