"""Proof that a file is the checkpoint it was made of, by reloading it in its own runtime, whatever
its format.

The twin is the checkpoint with each matrix as the file's type holds it: the checkpoint itself when
it is quantized, its rounded copy otherwise. The file is a `Reloaded`. Measured, and refused where
it is more than arithmetic can explain; exact: F16 in llama.cpp and all that torch runs; others:
integer types of llama.cpp, whose kernels round activations to 8 bits, and mixtures: where two
experts are nearly as good, arithmetic decides which is asked:

    parity_values_differing     numbers of the twin that the decoded file does not hold bit for
                                bit: 0
    parity_kl_nats              KL(twin || file) on held-out text: at most 1e-5 where exact, 5e-3
                                for others; 1e-2 of K-quants, for which activations have one step
                                for 256: rounding all inputs of down_proj so costs the demo's
                                student 0.0022, by 32 0.0005
    parity_top1_beyond_gap      top-1 agreement where the twin's first two candidates are more than
                                TOP1_GAP nats apart: 1 where exact; at least 0.995 for others:
                                8-bit activations turned 1 of 1,789 such tokens of a demo; 0.99 of
                                K-quants: 0.71% of a demo's
    parity_greedy_tokens_count  greedy tokens of the file, of GREEDY, before the first that the
                                twin would not have said
    parity_greedy_gap_nats      by how much the twin preferred its own token there, 0 without such
                                a place: at most 1e-3 where exact, else told only
    parity_strings_differing    held-out strings that the runtime's tokenizer and the checkpoint's
                                cut differently: 0
    parity_eos_differing_flag   1 unless texts of the file end at every special token that ends the
                                checkpoint's (compress/models/ends.py), at one at least that each
                                of its files names, and the file names no other end: 0

Legend: N tokens, C tokens a chunk, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.formats import parse
from compress.models.checkpoint import best_device, load_model
from compress.models.end_files import in_files
from compress.models.ends import is_special, turn_end
from compress.models.head import head_of, hidden_states
from compress.models.model_config import read_config
from compress.models.tokenizer import load_tokenizer
from compress.quant.codes import is_quantized, load_quantized, quantizable
from compress.quant.grids import GRIDS
from compress.score.fidelity import States, closeness, hidden_of, logits_of

EXACT_LIMITS = {"parity_kl_nats": 1e-5, "parity_greedy_gap_nats": 1e-3}
KL_MOST = {32: 5e-3, 256: 1e-2}  # of integer types, by how many activations have one step
TOP1_GAP = 0.2  # nats
TOP1_LEAST = {32: 0.995, 256: 0.99}
GREEDY = 64


class Reloaded(Protocol):
    """A file as its own runtime opens it; each module of `formats/__init__.py` has one."""

    def tensors(self) -> dict[str, Tensor]:
        """HF state-dict name -> fp32, as decoded from the file; without a tied head. Names may be
        the file's own, where it has a method `expected(checkpoint, type)` that gives the numbers to
        compare with, or None for the twin's.
        """

    def generate_ids(self, prompt: Sequence[int], n: int) -> list[int]:
        """Greedy continuation of at most `n` tokens, ended by EOS."""

    def tokenize(self, text: str) -> list[int]:
        """By the file's tokenizer, nothing added."""

    def eos_ids(self) -> set[int]:
        """Tokens at which generation ends, as the file says."""

    def ends_at(self, token: int) -> bool:
        """Whether generation ends at it."""

    def close(self) -> None:
        """Frees what the runtime holds."""


def twin_of(checkpoint: Path, name: str) -> Any:
    """The checkpoint's model in fp32 with each matrix as a file of `name`, an entry of
    `export.files`, holds it.
    """
    model = load_model(checkpoint)
    kind = parse(name)[1]
    if is_quantized(checkpoint) or not kind:
        return model

    # Rounded as the file's type rounds: in F16 all that is no vector, experts and convolutions too.
    with torch.no_grad():
        if kind == "F16":
            for weight in (p for p in model.parameters() if p.dim() > 1):
                weight.copy_(weight.half().float())
        else:
            grid = GRIDS[kind.lower()]
            for tensor, matrix in quantizable(model).items():
                matrix.rows.copy_(grid.decode(*grid.encode(matrix.rows, tensor)))
    return model


def numbers_of(twin: Any) -> dict[str, Tensor]:
    """The twin's state dict without what is tied."""
    return {
        name: tensor
        for name, tensor in twin.state_dict().items()
        if name not in twin.all_tied_weights_keys
    }


def values_differing(expected: dict[str, Tensor], decoded: dict[str, Tensor]) -> int:
    """Numbers of `expected` that the file, decoded, holds otherwise or not at all."""
    # What has no place there differs in every number, and so does what the file lacks.
    differing = sum(tensor.numel() for name, tensor in decoded.items() if name not in expected)
    for name, tensor in expected.items():
        other = decoded.get(name)
        if other is not None and other.shape == tensor.shape:
            differing += int((other != tensor).sum())
        else:
            differing += tensor.numel()
    return differing


@torch.inference_mode()
def top1_beyond_gap(twin: States, shipped: States) -> float:
    """Top-1 agreement over the tokens where the twin's first two logits are more
    than TOP1_GAP apart.
    """
    agree = count = 0
    for twin_CV, shipped_CV in zip(logits_of(twin), logits_of(shipped), strict=True):
        top_C2 = twin_CV.topk(2, -1)
        sure_C = top_C2.values[:, 0] - top_C2.values[:, 1] > TOP1_GAP
        same_C = shipped_CV.argmax(-1) == top_C2.indices[:, 0]
        agree += int((same_C & sure_C).sum())
        count += int(sure_C.sum())
    return agree / count if count else 1.0


@torch.inference_mode()
def greedy(twin: Any, written: Sequence[int], prompt: Sequence[int]) -> tuple[int, float]:
    """(tokens before the first that the twin would not have said, nats by which it preferred
    another there or 0).
    """
    ids = torch.tensor([[*prompt, *written]], device=twin.device)
    logits_LV = head_of(twin).logits(hidden_states(twin, ids)[len(prompt) - 1 : -1])
    gap_L = logits_LV.amax(-1) - logits_LV.gather(1, ids[0, len(prompt) :, None])[:, 0]
    first = next((i for i, gap in enumerate(gap_L.tolist()) if gap > 0), len(written))
    return first, float(gap_L[first]) if first < len(written) else 0.0


def strings(tokenizer: Any, rows: Tensor, count: int = 1000) -> Iterator[str]:
    """`count` pieces of held-out text, cut wherever:
    half of them begin inside a word or a number.
    """
    text = tokenizer.decode(rows.flatten(), skip_special_tokens=True)
    step = max(1, len(text) // count)
    for i in range(min(count, len(text))):
        yield text[i * step : i * step + 24 + i % 41]


def parity(
    checkpoint: Path, file: Path, name: str, heldout: Tensor, shipped: States, threads: int
) -> dict[str, float]:
    """`figures`, or ValueError naming every figure that is beyond its limit."""
    measured = figures(checkpoint, file, name, heldout, shipped, threads)
    mixture = any(read_config(checkpoint).get(key) for key in ("num_experts", "num_local_experts"))
    exact = parse(name)[2].exact and not mixture

    # Counts and flags may not be above 0, differences not above what arithmetic explains.
    limits = {key: 0.0 for key in measured if key.endswith(("_differing", "_flag"))}
    together = _activation_block(checkpoint, name)
    limits |= EXACT_LIMITS if exact else {"parity_kl_nats": KL_MOST[together]}
    bad = [
        f"{key} is {measured[key]:.6g}, at most {limit:g} is allowed"
        for key, limit in limits.items()
        if not measured[key] <= limit
    ]

    least = 1.0 if exact else TOP1_LEAST[together]
    if measured["parity_top1_beyond_gap"] < least:
        bad.append(
            f"parity_top1_beyond_gap is {measured['parity_top1_beyond_gap']:.6f}, at least"
            f" {least:g} is needed"
        )
    if bad:
        raise ValueError(
            f"{file.name} is not the checkpoint it was made of and is not bundled:"
            f" {'; '.join(bad)}; report this with the recipe"
        )
    return measured


def _activation_block(checkpoint: Path, name: str) -> int:
    """How many activations a runtime rounds by one step, at most: as many as weights of a K-quant
    have one scale, or 32.
    """
    kind = parse(name)[1].lower()
    grids = {kind} & set(GRIDS)
    if is_quantized(checkpoint):
        grids = {matrix.grid for matrix in load_quantized(checkpoint).values()}
    return 256 if any(GRIDS[grid].block == 256 for grid in grids) else 32


def figures(
    checkpoint: Path, file: Path, name: str, heldout: Tensor, shipped: States, threads: int
) -> dict[str, float]:
    """Those of the module's docstring. `heldout` (R, L + 1) ids are those whose states `shipped`
    (R L, H) the file gave.
    """
    # On held-out text.
    twin = twin_of(checkpoint, name)
    tokenizer = load_tokenizer(checkpoint)
    twin.to(best_device())
    states = States(hidden_of(twin, heldout), head_of(twin.to("cpu")).detach())
    measured = {
        "parity_kl_nats": closeness(states, shipped)["kl"],
        "parity_top1_beyond_gap": top1_beyond_gap(states, shipped),
    }

    # What the file's own runtime holds, says, cuts and ends at.
    reloaded: Reloaded = parse(name)[0].module.reload(file, threads)
    prompt = heldout[0, :32].tolist()
    try:
        expected = getattr(reloaded, "expected", lambda *_: None)(checkpoint, parse(name)[1])
        measured["parity_values_differing"] = values_differing(
            expected or numbers_of(twin), reloaded.tensors()
        )
        written = reloaded.generate_ids(prompt, GREEDY)
        strings_differing = sum(
            reloaded.tokenize(text) != tokenizer.encode(text, add_special_tokens=False)
            for text in strings(tokenizer, heldout)
        )
        ends_agree = _ends_agree(checkpoint, tokenizer, reloaded)
    finally:
        reloaded.close()

    tokens_count, gap_nats = greedy(twin.to(best_device()), written, prompt)
    measured["parity_eos_differing_flag"] = float(not ends_agree)
    measured["parity_greedy_tokens_count"] = tokens_count
    measured["parity_greedy_gap_nats"] = gap_nats
    measured["parity_strings_differing"] = strings_differing
    return measured


def _ends_agree(checkpoint: Path, tokenizer: Any, reloaded: Reloaded) -> bool:
    """Whether the file ends texts where its checkpoint does."""
    places = in_files(checkpoint) | {
        "tokenizer": [tokenizer.eos_token_id],
        "template": [turn_end(tokenizer)],
    }
    ends_by_place = [set(ids) - {None} for ids in places.values()]
    ends = set[int]().union(*ends_by_place)
    reached = {token for token in ends if reloaded.ends_at(token)}

    # Some runtimes take one end only: of each place that names any, one at least is obeyed.
    special = {token for token in ends if is_special(tokenizer, token)}
    one_of_each = all(ids & reached for ids in ends_by_place if ids)
    return special <= reached and reloaded.eos_ids() <= ends and one_of_each
