"""Tokens a second and MFU of distillation, of making the teacher's signal, of scoring.

MFU is what the model's own arithmetic takes of what the card could do: with N parameters that
multiply (all but an input embedding of its own), A = layers * heads * head_dim and rows of L tokens

    FLOPs a token = 6 N + 6 A L          training: forward and twice that backward; attention is
                                         4 A L a token forward, half of it masked
    MFU = FLOPs a token * tokens a second / the card's dense bf16 FLOPs a second

(PaLM, arXiv 2204.02311, appendix B, less the masked half). Recomputed activations and the teacher
don't count; of online distillation the teacher's 2 N + 2 A L come in a figure of their own.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_models import Place, config_of, random_text

# Dense bf16 tensor FLOPs a second, without sparsity, by NVIDIA's data sheets of these products; a
# name that is part of another stands behind it.
CARDS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "RTX 6000 Ada": 364e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A6000": 155e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
TARGETS = {"mfu": 0.40, "share_of_plain_forward": 0.60}
STEPS, WARM = 14, 4
# Rows of a step, and their tokens.
BATCH, LENGTH = 16, 1024


def card() -> str | None:
    """What the GPU is called."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], repeats: int = 10, warm: int = 3) -> float:
    """The median of repeats, each waited for."""
    times = []
    for _ in range(warm + repeats):
        begun = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[warm:])


def product_flops(place: Place) -> float:
    """FLOPs a second of a large square product: bf16 on a GPU, fp32 else."""
    size = place.size(8192, 512)
    kind = torch.bfloat16 if place.device.type == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=place.device, dtype=kind) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b)


def peak_flops(place: Place) -> dict[str, Any]:
    """The card's FLOPs a second and where that is from; measured for a card that is not listed."""
    measured = product_flops(place)
    name = card() or ""
    listed = next((flops for part, flops in CARDS.items() if part in name), None)
    return {
        "peak_flops": listed or measured,
        "peak_flops_from": "data sheet, dense bf16" if listed else "a large product, measured here",
        "product_flops": measured,
    }


def flops_a_token(config: Any, length: int, passes: int = 3) -> float:
    """Of the model itself, by the formula above; `passes`: 3 for training, 1 forward alone."""
    model = _meta(config)
    multiplied = sum(p.numel() for p in model.parameters())
    if not config.tie_word_embeddings:
        multiplied -= model.get_input_embeddings().weight.numel()
    attention = config.num_hidden_layers * config.hidden_size * length
    return 2.0 * passes * (multiplied + attention)


def _meta(config: Any) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _signals(place: Place, text: Any, work: str, log: Callable[[str], None]) -> Any:
    """A folder of signals of the 0.5B teacher that is empty."""
    from compress.distill.schemes import Scheme
    from compress.distill.signals import Signals

    folder = place.folder / work
    shutil.rmtree(folder, ignore_errors=True)
    return Signals(
        folder,
        place.checkpoint("0.5B", seed=1),
        text,
        Scheme(),
        seed=0,
        precision=_precision(place),
        log=log,
    )


def _precision(place: Place) -> str:
    return "fp32" if place.dry else "bf16"


def _text(place: Place, rows: int) -> Any:
    return random_text(place.size(151936, 512), rows, place.size(LENGTH, 32))


def distilled(place: Place, scheme: str) -> dict[str, Any]:
    """Distillation at 0.5B from a teacher of 0.5B, fp32 masters under bf16 autocast, by the loop
    that stages use; `scheme` is cached or online.
    """
    from compress.distill.batches import make_batches, make_loss
    from compress.distill.losses import Mix
    from compress.distill.online import OnlineTeacher
    from compress.models.checkpoint import load_model
    from compress.train.loop import train
    from compress.train.plan import Plan

    # Text and the teacher.
    batch, length = place.size(BATCH, 2), place.size(LENGTH, 32)
    rows = 4 * batch
    text = _text(place, rows)
    if scheme == "cached":
        source: Any = _signals(place, text, "speed-signals", print)
        source.make(rows)
    else:
        kind = torch.float32 if place.dry else torch.bfloat16
        source = OnlineTeacher(load_model(place.checkpoint("0.5B", seed=1), kind), text)

    # The loop that stages use.
    work = place.folder / f"speed-{scheme}"
    shutil.rmtree(work, ignore_errors=True)
    curve = train(
        load_model(place.checkpoint("0.5B")),
        make_loss(Mix(0.9, 0.1), source.teacher_head),
        make_batches(text, source, seed=0, sequences=rows, batch=batch),
        Plan(
            steps=place.size(STEPS, WARM + 2),
            lr=1e-4,
            micro=place.size(8, 2),
            precision=_precision(place),
        ),
        work=work,
        label=scheme,
        log=print,
    ).curve
    seconds = statistics.median(row["seconds"] for row in curve[WARM:])

    # Beside what the card can do.
    config = config_of("0.5B", place.dry)
    peak = peak_flops(place)
    tokens_per_sec = batch * length / seconds
    figures = {
        "shape": "0.5B",
        "batch_sequences": batch,
        "length": length,
        "tokens_per_sec": tokens_per_sec,
        "flops_a_token": flops_a_token(config, length),
        "mfu": tokens_per_sec * flops_a_token(config, length) / peak["peak_flops"],
        "loss_first_nats": curve[0]["loss"],
        "loss_last_nats": curve[-1]["loss"],
        **peak,
    }
    if scheme == "cached":
        return figures | {"target_mfu": TARGETS["mfu"]}
    both = flops_a_token(config, length) + flops_a_token(config, length, passes=1)
    return figures | {"mfu_with_teacher": tokens_per_sec * both / peak["peak_flops"]}


def signal(place: Place) -> dict[str, Any]:
    """Making the teacher's signal, shard by shard, beside the teacher's plain forward: bf16, logits
    of all tokens, the same rows one at a time and eight at a time.
    """
    from compress.models.checkpoint import load_model

    # Shards as their log lines come; the first one warms up.
    rows = place.size(96, 48)
    text = _text(place, rows)
    done: list[float] = []
    signals = _signals(place, text, "signal", lambda line: done.append(time.perf_counter()))
    signals.make(rows)
    shards = [after - before for before, after in zip(done, done[1:], strict=False)]
    a_shard = 16 * (text.ids.shape[1] - 1)
    made = a_shard / statistics.median(shards)

    # The teacher alone.
    kind = torch.float32 if place.dry else torch.bfloat16
    model: Any = load_model(place.checkpoint("0.5B", seed=1), kind)
    model.to(place.device)
    ids = text.ids[:16, :-1].long().to(place.device)

    @torch.inference_mode()
    def forward(rows_at_once: int) -> None:
        for part in ids.split(rows_at_once):
            model(part, use_cache=False)

    plain = {count: a_shard / seconds_of(partial(forward, count), 5) for count in (1, 8)}
    return {
        "shape": "0.5B",
        "length": text.ids.shape[1] - 1,
        "signal_tokens_per_sec": made,
        "plain_forward_tokens_per_sec": plain[1],
        "plain_forward_of_8_rows_tokens_per_sec": plain[8],
        "share_of_plain_forward": made / plain[1],
        "share_of_plain_forward_of_8_rows": made / plain[8],
        "target_share_of_plain_forward": TARGETS["share_of_plain_forward"],
        "bytes_per_token": signals.bytes_per_token(),
    }


def closeness(place: Place) -> dict[str, Any]:
    """Scoring closeness: states of two models of 0.5B on held-out rows, then KL and bits."""
    from compress.models.checkpoint import load_model
    from compress.models.head import head_of
    from compress.score.fidelity import States, hidden_of
    from compress.score.fidelity import closeness as beside

    ids = _text(place, place.size(32, 4)).ids
    states = []
    begun = time.perf_counter()
    for seed in (0, 1):
        model: Any = load_model(place.checkpoint("0.5B", seed=seed))
        hidden_NH = hidden_of(model.to(place.device), ids)
        states.append(States(hidden_NH, head_of(model.to("cpu")).detach()))
        del model
    opened_seconds = time.perf_counter() - begun

    begun = time.perf_counter()
    result = beside(states[0], states[1], rows=len(ids))
    return {
        "shape": "0.5B",
        "tokens": len(states[0].hidden_NH),
        "states_seconds": opened_seconds,
        "closeness_seconds": time.perf_counter() - begun,
        "kl_nats": result["kl"],
    }


def latency(place: Place) -> dict[str, Any]:
    """Times of a checkpoint of 0.5B in torch, in a fresh process, on the device."""
    from compress.score.latency import Timing, measure

    timing = Timing(
        prompt_tokens=place.size(128, 8),
        new_tokens=place.size(32, 3),
        repeats=place.size(5, 1),
        device="cpu" if place.dry else "gpu",
    )
    return {"shape": "0.5B", **measure(place.checkpoint("0.5B"), "torch", timing)["scores"]}
