"""`--plan`: what a recipe will cost in time, disk and memory, before anything starts; and what is
refused for want of disk or memory before every run.

Times come from operation counts, 2 P flops a token forward and 6 P for a training step (P
parameters; Kaplan et al., arXiv 2001.08361, table 1), over the rate that training steps of a few of
the teacher's own blocks reach just now, on the device that the run will use and in the type that it
will multiply. They are estimates: scoring dominates small runs, and is told by what it took on two
cores. Bytes are those of `compress/memory.py`.
"""

import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from rich.console import Console
from rich.table import Column, Table
from torch.utils.benchmark import Timer

from compress import formats
from compress.config import Recipe
from compress.errors import ResourceError, amount
from compress.memory import BASE, Account, Given, Item, Setup
from compress.models.checkpoint import best_device
from compress.models.decoder_sizes import Shape
from compress.models.model_config import meta_model
from compress.session import Session
from compress.stages.ptq import OnGrid
from compress.stages.stage import Sizes

# Of a model whose blocks can't be trained here by themselves: assumed share of the square matrix
# product's rate that a whole training step reaches.
EFFICIENCY = 0.5
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers")  # as families name it
BLOCKS = 3  # that are trained to know what one takes
STEP_TOKENS = 1024  # of such a step, at least one row
TRAINED_BYTES = 16  # of a parameter and its gradient in fp32, and what is between
TASK_TOKENS = 16_000  # about the tokens of the embedded tasks
# To ask a quarter of the open prompts in torch, or all in llama.cpp, on two cores with AVX512 and
# 135M parameters: 15 and 26 s before answers shared what prompts begin with, and by how much that
# shortens them (results/open/bench.md).
ANSWER_SECONDS = 7.0
FILE_SECONDS = 18.0


class SlotCost(NamedTuple):
    """One slot's estimate."""

    slot: str
    technique: str
    params: int
    seconds: float
    disk_bytes: int
    memory: Account


def params_of(config: dict[str, Any]) -> int:
    """Parameters of a HF config, counted on the meta device."""
    return meta_model(config).num_parameters()


def matmul_flops_per_sec(
    n: int = 0, seconds: float = 0.5, dtype: torch.dtype = torch.bfloat16
) -> float:
    """Measured rate of an n x n x n product on the device that runs compute on; n of 0 is 1024 on a
    CPU and 8192 on a GPU.
    """
    device = best_device()
    n = n or (1024 if device.type == "cpu" else 8192)
    timer = Timer(
        "a @ a",
        globals={"a": torch.randn(n, n, device=device).to(dtype)},
        num_threads=torch.get_num_threads(),
    )
    return 2 * n**3 / timer.blocked_autorange(min_run_time=seconds).mean


def rate_of(session: Session, config: dict[str, Any]) -> float:
    """Operations a second that this run's training reaches on a model of an HF config."""
    try:
        return step_flops_per_sec(config, session.recipe.data.seq_len, session.precision)
    except (ValueError, MemoryError):
        fp32 = session.precision == "fp32"
        return EFFICIENCY * matmul_flops_per_sec(dtype=torch.float32 if fp32 else torch.bfloat16)


def step_flops_per_sec(config: dict[str, Any], seq_len: int, precision: str) -> float:
    """Operations a second, 6 for each parameter and token, of training steps on the device that
    runs compute on: one block of the model and a few are trained, and what a block adds is counted
    as often as the model has blocks.

    ValueError for a model that can't be built of fewer blocks, MemoryError where they don't fit.
    """
    depth = _depth(config)
    deeper = min(BLOCKS, depth)
    ids_BL = torch.zeros(max(1, STEP_TOKENS // seq_len), seq_len, dtype=torch.long)
    alone, together = (
        _step_seconds(_of_blocks(config, blocks), ids_BL, precision) for blocks in (1, deeper)
    )
    a_block = max(0.0, together - alone) / max(1, deeper - 1)
    return 6 * params_of(config) * ids_BL.numel() / (alone + (depth - 1) * a_block)


def _depth(config: dict[str, Any]) -> int:
    """How many blocks a model has. ValueError where its config does not say so."""
    for name in DEPTHS:
        if isinstance(depth := config.get(name), int) and depth > 0:
            return depth
    raise ValueError(f"{config['model_type']}: the config does not say how many blocks it has")


def _of_blocks(config: dict[str, Any], blocks: int) -> dict[str, Any]:
    """The same model with its first blocks alone: what is listed for every block, for these."""
    depth = _depth(config)
    fewer = {
        name: value[:blocks] if isinstance(value, list) and len(value) == depth else value
        for name, value in config.items()
    }
    return fewer | {name: blocks for name in DEPTHS if name in config}


def _step_seconds(config: dict[str, Any], ids_BL: torch.Tensor, precision: str) -> float:
    """Seconds of a step forward and back through a model of this shape, the better of two."""
    device = best_device()
    model = meta_model(config)
    if device.type == "cpu" and TRAINED_BYTES * model.num_parameters() > room_here().host / 2:
        raise MemoryError
    model = model.to_empty(device=device)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()

    ids_BL = ids_BL.to(device)
    seconds = []
    for _ in range(3):  # the first one warms up
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32"):
            logits = model(input_ids=ids_BL, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids_BL.flatten())
        loss.backward()
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def estimate(session: Session, shapes: dict[str, dict[str, Any]], rate: float) -> list[SlotCost]:
    """A cost for every slot, in order.

    `shapes`: slot -> HF config after it, as `check_shapes` gives them; `rate`: flops a second of
    training.
    """
    recipe = session.recipe
    decoders = {slot: Shape(config) for slot, config in shapes.items()}
    sizes = {slot: decoder.params for slot, decoder in decoders.items()}
    score_tokens = _score_tokens(recipe)

    # The teacher is imported and scored, nothing else; it is asked everything.
    size = sizes["teacher"]
    asked = ANSWER_SECONDS * bool(recipe.eval.open_prompts) / 135e6  # for a quarter, a parameter
    seconds = 2 * size * score_tokens * 3 / rate + 10 + 4 * asked * size
    costs = [SlotCost("teacher", "teacher", size, seconds, 4 * size, _scored(size))]

    for slot, parent in recipe.steps():
        stage = recipe.stages[slot]
        given = given_of(session, shapes[parent], decoders[parent], decoders["teacher"])
        needed = stage.cost(
            Sizes(
                params=sizes[slot],
                parent_params=sizes[parent],
                teacher_params=sizes["teacher"],
                config=shapes[slot],
                teacher_config=shapes["teacher"],
                seq_len=recipe.data.seq_len,
            )
        )
        scoring = 2 * sizes[slot] * score_tokens * 3 / rate + 10 + asked * sizes[slot]
        costs.append(
            SlotCost(
                slot,
                recipe.technique(slot),
                sizes[slot],
                needed.flops / rate + scoring,
                int(needed.disk_bytes),
                stage.memory(given),
            )
        )

    # A file that ships lies in the store and in the bundle.
    shipped = sizes[recipe.shipped_slot()]
    for name in recipe.export.files:
        disk = int(formats.parse(name)[2].bits_per_weight / 4 * shipped)
        seconds = 40 + FILE_SECONDS * bool(recipe.eval.open_prompts) * shipped / 135e6
        costs.append(SlotCost(*formats.slot_of(name), shipped, seconds, disk, _scored(shipped)))
    return costs


def given_of(session: Session, config: dict[str, Any], parent: Shape, teacher: Shape) -> Given:
    """What a stage's memory depends on in this run, its parent being of an HF config."""
    trainer = session.recipe.trainer
    setup = Setup(
        session.precision,
        trainer.activation_checkpointing,
        trainer.moments,
        trainer.parallel,
        trainer.count(),
    )
    stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    gpu = best_device().type == "cuda"
    seq_len = session.recipe.data.seq_len
    return Given(parent, teacher, seq_len, setup, gpu, 4 if "32" in stored else 2)


def _scored(params: int) -> Account:
    """An fp32 model as it is opened and asked, on the device."""
    file = Item("the file, mapped", host=2 * params)
    host = Item("weights as they are opened", host=4 * params)
    return Account(
        {"open": [*BASE, host, file], "ask": [*BASE, Item("weights", device=4 * params)]}
    )


def _score_tokens(recipe: Recipe) -> int:
    """Tokens that a model reads to be scored: of the tasks and of the held-out texts."""
    scoring, data = recipe.eval, recipe.data
    heldout = scoring.heldout_sequences * data.seq_len * len(data.heldout)
    return TASK_TOKENS * bool(scoring.tasks) + heldout


def check_disk(session: Session, costs: list[SlotCost], run_dir: Path | None = None) -> None:
    """ResourceError when the store's disk has less free space than the recipe may need, or the disk
    of the run directory less than the bundle.
    """
    needs = [(session.store.root, sum(cost.disk_bytes for cost in costs), "store=DIR")]
    if run_dir is not None:
        weights, files = _bundle_bytes(session, costs)
        folder = _existing(run_dir)
        if folder.stat().st_dev == session.store.root.stat().st_dev:  # the costs hold both copies
            needs[0] = (session.store.root, needs[0][1] + weights, "store=DIR")
        else:
            needs.append((folder, weights + files, "hydra.run.dir=DIR"))

    for folder, needed, setting in needs:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise ResourceError(
                f"the recipe may need {amount(needed)} in {folder}, {amount(free)} are free; free"
                f" some (`compress gc`) or set {setting}"
            )


def _bundle_bytes(session: Session, costs: list[SlotCost]) -> tuple[int, int]:
    """What is copied into the run directory: the shipped checkpoint, whose numbers take two bytes
    and on a grid four, and its files, of which the costs hold two copies.
    """
    slot = session.recipe.shipped_slot()
    on_grid = isinstance(session.recipe.stages.get(slot), OnGrid)
    weights = (4 if on_grid else 2) * next(cost.params for cost in costs if cost.slot == slot)
    files = {formats.slot_of(name)[0] for name in session.recipe.export.files}
    return weights, sum(cost.disk_bytes // 2 for cost in costs if cost.slot in files)


def _existing(path: Path) -> Path:
    """The nearest folder above a path, or itself, that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def told_needs(
    error: BaseException, session: Session, costs: list[SlotCost], done: Collection[str]
) -> ResourceError:
    """An error of a full disk, with what the slots that are not `done` may still need beside what
    is free.
    """
    root = session.store.root
    needed = sum(cost.disk_bytes for cost in costs if cost.slot not in done)
    free = shutil.disk_usage(root).free
    return ResourceError(
        f"no room ({' '.join(str(error).split())[:300]}): what is left of the recipe may need"
        f" {amount(needed)} in {root}, {amount(free)} are free; what is finished is kept: free"
        " some (`compress gc`) or set store=DIR, then repeat the command to go on"
    )


class Room(NamedTuple):
    """Bytes of the device, None where it is the CPU, and of the host."""

    device: int | None
    host: int


def room_here() -> Room:
    """What this machine has in all."""
    host = psutil.virtual_memory().total + psutil.swap_memory().total
    if best_device().type == "cpu":
        return Room(None, host)
    return Room(torch.cuda.get_device_properties(best_device()).total_memory, host)


FITS = (
    "what takes less: trainer.activation_checkpointing=true, trainer=bf16_stochastic with"
    " trainer.moments=int8 or host, a lora stage or qat with rank=N (most weights frozen), a"
    " smaller micro_batch_sequences or calibration_sequences, trainer=fsdp2 on more processes, or"
    " a smaller student"
)


def check_memory(costs: list[SlotCost], room: Room) -> None:
    """ResourceError naming the first slot that needs more than the device or the host has, item by
    item, and what would take less.
    """
    for cost in costs:
        account = cost.memory
        if room.device is None:
            places = [("this machine", "", account.together(), room.host)]
        else:
            places = [
                ("the GPU", "device", account.device(), room.device),
                ("the host", "host", account.host(), room.host),
            ]
        for name, place, needed, there in places:
            if needed > there:
                raise ResourceError(
                    f"{cost.slot}: needs {amount(int(needed))} on {name}, which has"
                    f" {amount(there)}: {account.listed(place=place)}; {FITS}"
                )


def print_plan(costs: list[SlotCost], store: Path) -> None:
    """The plan as a table on stdout."""
    numbers = (
        Column(heading, justify="right")
        for heading in ("params (M)", "minutes", "disk (MB)", *_places())
    )
    table = Table(
        "slot", "technique", *numbers, title="estimates; finished stages are reused from the store"
    )

    # Times and files add up; memory is given back before the next slot.
    phases = {f"{cost.slot} {name}": p for cost in costs for name, p in cost.memory.phases.items()}
    total = SlotCost(
        "all",
        "",
        0,
        sum(cost.seconds for cost in costs),
        sum(cost.disk_bytes for cost in costs),
        Account(phases),
    )
    for cost in [*costs, total]:
        params = f"{cost.params / 1e6:.1f}" if cost.params else ""
        table.add_row(
            cost.slot,
            cost.technique,
            params,
            f"{cost.seconds / 60:.1f}",
            f"{cost.disk_bytes / 1e6:.0f}",
            *(f"{size / 1e6:.0f}" for size in _peaks(cost.memory)),
        )
    table.rows[-2].end_section = True

    Console().print(table)
    print(f"store {store}: {shutil.disk_usage(store).free / 1e9:.1f} GB free")


def _places() -> list[str]:
    """Headings of what `_peaks` gives."""
    cpu = best_device().type == "cpu"
    return ["memory (MB)"] if cpu else ["GPU (MB)", "host (MB)"]


def _peaks(account: Account) -> list[float]:
    """Bytes on the device and on the host, or of both where they are one."""
    if best_device().type == "cpu":
        return [account.together()]
    return [account.device(), account.host()]
