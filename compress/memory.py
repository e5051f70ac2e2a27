"""How many bytes each stage needs at once, on the device and on the host, from a config alone: the
one place of these formulas, which `--plan` and the refusal before training read
(`tests/test_memory.py` holds them against peaks of processes).

A stage has phases, whose bytes are given back before the next one. On a CPU both places are one.

    walked      a model at home, in its file's type (bf16: 2 bytes a weight; what lies outside of
                the blocks and vectors 4), states of the text N H 4 beside it; on the device one
                block in fp32, 4 rows of text inside it, and what the technique keeps there: second
                moments C^2 in float64, their inverse and factors while columns go
    rounded     the same; a rounded matrix is its codes, 1.06 bytes a weight, its bf16 is let go of
    trained     of each trained weight itself (4 or 2), its gradient (4 or 2; and an fp32 sum over
                several micro-batches of bf16 weights), two moments (8, 2.03 in int8, or on the
                host), what is computed with where that is another (4 under rounding), casts that
                autograd keeps under autocast (2); of a frozen one itself and its casts; activations
                kept for backward, of all blocks or, checkpointed, of one and the states between;
                a chunk of logits; on the host the best weights

Not counted: what an allocator loses between pieces, kernels' workspaces, and the copy on the host
from which a training's state is written, as it is made only where twice its bytes are free
(`train/state.py`). The process itself is measured, on a CPU; a CUDA context's bytes are taken to be
CONTEXT.

Letters: N tokens of the text, H hidden, C columns of a layer.
"""

from __future__ import annotations

from typing import NamedTuple

from compress.models.decoder_sizes import Shape

PROCESS = 450e6  # of Python with torch, transformers and this package, on the host
CONTEXT = 600e6  # of CUDA on a device, taken from what others report; none was at hand
GROUP_ROWS = 4  # rows of text inside a block at once (`models/walk.py`)
CHUNK_TOKENS = 512  # of the head at once (`distill/fused_head.py`)
ROUNDED = 1 << 24  # weights rounded at once (`quant/blockwise.py`)
CODE_BYTES = 1.0625  # a code and its share of an fp16 scale in blocks of 32
UPDATED = 1 << 24  # weights moved at once by our optimizer (`train/moments.py`)
INT8_MOMENTS = 2 * (1 + 4 / 256)  # codes and scales of both (`train/moments.py`)


class Item(NamedTuple):
    """Something that lies in memory: what it is, and its bytes on the device and on the host."""

    what: str
    device: float = 0.0
    host: float = 0.0


class Account:
    """Items that lie in memory at the same time, by phase."""

    def __init__(self, phases: dict[str, list[Item]]) -> None:
        self.phases = phases

    def device(self) -> float:
        """Peak of a device of its own, in bytes."""
        return max(sum(item.device for item in items) for items in self.phases.values())

    def host(self) -> float:
        """Peak of the host beside such a device."""
        return max(sum(item.host for item in items) for items in self.phases.values())

    def together(self) -> float:
        """Peak where the device is the CPU."""
        peaks = (
            sum(item.device + item.host for item in items if item.what != CONTEXT_NAME)
            for items in self.phases.values()
        )
        return max(peaks)

    def listed(self, most: int = 6, place: str = "") -> str:
        """The largest items of the phase that needs most, with their GB; at one `place`, "device"
        or "host", or at both.
        """

        def size(item: Item) -> float:
            return float(getattr(item, place)) if place else item.device + item.host

        phase = max(self.phases.values(), key=lambda items: sum(map(size, items)))
        items = [item for item in phase if item not in BASE and size(item)]
        largest = sorted(items, key=size, reverse=True)[:most]
        return ", ".join(f"{item.what} {size(item) / 1e9:.2f} GB" for item in largest)


class Setup(NamedTuple):
    """How a run computes: `config.Trainer` and the precision that "auto" stands for."""

    precision: str = "fp32"
    activation_checkpointing: bool = False
    moments: str = "fp32"
    parallel: str = "none"
    processes: int = 1


CONTEXT_NAME = "CUDA context"
BASE = [Item("process", host=PROCESS), Item(CONTEXT_NAME, device=CONTEXT)]


class Given(NamedTuple):
    """What a stage's bytes depend on besides its options: the parent and the teacher, tokens of a
    row, how the run computes and whether on a GPU, bytes of a weight in the parent's file.
    """

    parent: Shape
    teacher: Shape
    seq_len: int
    setup: Setup = Setup()
    gpu: bool = False
    stored_bytes: int = 2

    def walked(self, rows: int, *more: Item, copies: int = 1) -> Account:
        """Of a stage that sends rows of text through the parent's blocks, cuts and saves it."""
        start = [*BASE, *home(self.parent, self.stored_bytes)]
        walking = walk(self.parent, rows, self.seq_len, copies)
        return Account(
            {
                "open": looked_at(self.parent, self.stored_bytes),
                "blocks": [*start, *walking, *more],
                "save": [*BASE, *saved(self.parent)],
            }
        )


def looked_at(shape: Shape, stored_bytes: int = 2) -> list[Item]:
    """A model that has computed once in its file's type, every page of which is mapped, as what is
    outside of the blocks turns to fp32.
    """
    return [
        *BASE,
        Item("the file, mapped", host=stored_bytes * shape.params),
        Item("embedding, head and vectors in fp32", host=4 * shape.outside),
    ]


def home(shape: Shape, stored_bytes: int = 2) -> list[Item]:
    """A model that a walk goes through, as `checkpoint.load_stored` opens it."""
    return [
        Item("matrices of blocks, as stored", host=stored_bytes * shape.matrices),
        Item("embedding, head and vectors in fp32", host=4 * shape.outside),
    ]


def walk(shape: Shape, rows: int, seq_len: int, copies: int = 1) -> list[Item]:
    """One block on the device with a group of rows inside it, and the states of all rows: so many
    copies of them.
    """
    tokens = min(rows, GROUP_ROWS) * seq_len
    inside = 3 * shape.ffn + 2 * shape.hidden + shape.queries
    return [
        Item("states of the text", host=4 * rows * seq_len * shape.hidden * copies),
        Item("present block in fp32", device=4 * shape.block),
        Item("4 rows of text in it", device=4 * tokens * inside),
    ]


def columns_cut(rows_out: float, columns: float) -> list[Item]:
    """Columns of a layer (rows, columns) that go by group OBS (`prune/compensation.py`)."""
    squares = 8 * columns * columns
    return [
        Item("second moments, fitted, held out and of both", device=3 * squares),
        Item("damped, factor and inverse", device=3 * squares),
        Item("weights that make up for it", device=8 * rows_out * columns * 2),
    ]


def folded(shape: Shape, rows: int, seq_len: int) -> list[Item]:
    """Dropped blocks fitted into a down projection (`prune/folding.py`)."""
    tokens = rows * seq_len
    squares = 8 * shape.ffn * shape.ffn
    across = 8 * shape.ffn * shape.hidden
    return [
        Item("inputs of the projection", device=4 * tokens * shape.ffn),
        Item("what it adds, and the rest", device=4 * tokens * shape.hidden),
        Item("the rest of the stream", host=4 * tokens * shape.hidden),
        Item("second moments, fitted, held out and of both", device=3 * (squares + across)),
        Item("damped, pull and factor", device=3 * squares + 2 * across),
    ]


def saved(shape: Shape, bytes_a_weight: int = 2) -> list[Item]:
    """A cut model, saved and opened once more: never both at once."""
    return [
        Item("the model in bf16", host=bytes_a_weight * shape.params),
        Item("the largest tensor, converted", host=4 * max(shape.largest, shape.head)),
    ]


def rounded_block(shape: Shape, balance: bool, gptq: bool) -> list[Item]:
    """What balancing and rounding keep of a block (`quant/balance.py`, `quant/gptq.py`)."""
    widest = max(shape.ffn, shape.hidden, shape.queries)
    group = max(2 * shape.ffn * shape.hidden, shape.ffn * shape.hidden)
    items = []
    if balance:
        moments = 2 * shape.hidden**2 + shape.queries**2 + shape.ffn**2
        items += [
            Item("second moments of its groups", device=4 * moments),
            Item("a group's weights on trial", device=4 * 5 * group),
        ]
    if gptq:
        items += [
            Item("second moments in float64 and factors", device=(4 + 4 * 8) * widest**2),
            Item("weights as rounded ones move them", device=9 * shape.ffn * shape.hidden),
        ]
    return items


def rounded(
    shape: Shape, rows: int, seq_len: int, *, balance: bool, gptq: bool, stored_bytes: int = 2
) -> Account:
    """Rounding without training, by text where there are rows."""
    numbers = min(max(shape.head, shape.largest), ROUNDED)
    piece = Item("a piece of the embedding before and behind rounding", host=3 * 4 * numbers)
    codes = Item("codes", host=CODE_BYTES * shape.params)
    start = [*BASE, *home(shape, stored_bytes)]
    done = [*BASE, codes, Item("embedding, head and vectors in fp32", host=4 * shape.outside)]
    phases = {
        "open": looked_at(shape, stored_bytes),
        "embedding": [*start, piece, Item("its codes", host=CODE_BYTES * shape.head)],
        "save": [*done, Item("a matrix, decoded", host=8 * max(shape.largest, shape.head))],
    }
    if rows:
        block = rounded_block(shape, balance, gptq)
        phases["blocks"] = [*start, *walk(shape, rows, seq_len), *block]
    return Account(phases)


class Training(NamedTuple):
    """What a training stage trains: how many weights of how many, in micro-batches of so many
    tokens; `frozen_bytes` of a weight that stays.
    """

    trained: float
    frozen: float
    tokens: float
    micro_batches: int = 1
    frozen_bytes: float = 4.0
    values: bool = False
    validations: bool = False
    teacher_head: float = 0.0  # bytes
    teacher: float = 0.0  # bytes, of one that runs at every step


def kept_activations(shape: Shape, tokens: float, setup: Setup, fused: bool) -> float:
    """Bytes that backward needs of one block: states, norms, queries, keys, values, what attention
    gives, and the FFN's gate, its activation, up and product.
    """
    size = 4 if setup.precision == "fp32" else 2
    stream = 2 if setup.precision == "bf16_stochastic" else 4
    attention = 2 * shape.queries + 2 * shape.keys + 2 * shape.hidden
    norms = (2 if fused else 4) * shape.hidden
    return tokens * (size * (attention + 4 * shape.ffn) + stream * norms)


def weight_bytes(
    setup: Setup, *, trained: bool, micro_batches: int = 1, values: bool = False
) -> dict[str, float]:
    """Bytes on the device of a weight in training, by what they are."""
    size = 2 if setup.precision == "bf16_stochastic" else 4
    bytes_by_item: dict[str, float] = {"weights": size}
    if values:
        bytes_by_item["values on the grid"] = size
    if not trained:
        return bytes_by_item
    moments = {"fp32": 8.0, "int8": INT8_MOMENTS, "host": 0.0}[setup.moments]
    sums = 4 if size == 2 and micro_batches > 1 else 0
    return bytes_by_item | {"gradients": size + sums, "moments": moments}


def opened(shape: Shape, stored_bytes: int = 2) -> list[Item]:
    """An fp32 model as it is opened: transformers converts tensor by tensor what it has mapped."""
    mapped = 0 if stored_bytes == 4 else stored_bytes
    return [
        Item("weights in fp32", host=4 * shape.params),
        Item("the file, mapped", host=mapped * shape.params),
    ]


def head_chunk(shape: Shape, tokens: float, setup: Setup, *, learns: bool) -> list[Item]:
    """The loss on the head (`distill/fused_head.py`): logits of a chunk and of its target, what is
    made of them, and the gradient of the states.
    """
    size = 4 if setup.precision == "fp32" else 2
    logits = min(tokens, CHUNK_TOKENS) * shape.vocabulary
    cast = 2 * shape.head if setup.precision == "bf16" else 0
    items = [
        Item("a chunk of logits and its target's", device=3 * 4 * logits),
        Item("final states and their gradient", device=2 * size * tokens * shape.hidden),
        Item("the head as it multiplies", device=cast),
    ]
    # A tied embedding gets a second gradient, of all of its rows, that is added to the first.
    if learns and shape.tied:
        items.append(Item("the tied embedding's second gradient", device=4 * shape.head))
    return items


def casts(shape: Shape, setup: Setup, training: Training) -> float:
    """Bytes of bf16 weights beside fp32 ones: autocast keeps those of trained weights to the end of
    forward, autograd those that it multiplies by to backward. A shard is gathered so, a block at a
    time and the next one meanwhile; a base that stays is bf16 itself.
    """
    if setup.precision != "bf16":
        return 0.0
    if setup.parallel == "fsdp2":
        return 2 * 2 * shape.block
    if training.values:
        return 2 * (shape.block if setup.activation_checkpointing else shape.matrices)
    return 0.0 if training.frozen else 2 * shape.matrices


def activations(given: Given, training: Training) -> list[Item]:
    """What backward needs of all blocks; checkpointed, of one, and the states between them."""
    shape, setup, tokens = given.parent, given.setup, training.tokens
    block = kept_activations(shape, tokens, setup, not given.gpu)
    state = (2 if setup.precision == "bf16_stochastic" else 4) * tokens * shape.hidden
    if setup.activation_checkpointing:
        kept = [
            Item("states between blocks", device=state * shape.depth),
            Item("one block, computed again", device=2 * block),
        ]
    else:
        kept = [Item("activations for backward", device=block * shape.depth)]
    return [*kept, Item("weights as they multiply", device=casts(shape, setup, training))]


def update(shape: Shape, setup: Setup, trained: float) -> list[Item]:
    """What an optimizer's step holds besides: torch's fused one nothing, ours a matrix."""
    if setup.precision != "bf16_stochastic" and setup.moments == "fp32":
        return []
    numbers = min(trained, max(shape.largest, shape.head), UPDATED)
    copies = 5 if setup.moments == "fp32" else 7
    return [Item("one parameter's update in fp32", device=4 * copies * numbers)]


def trained(given: Given, training: Training) -> Account:
    """A training stage."""
    shape, setup = given.parent, given.setup
    share = setup.processes if setup.parallel == "fsdp2" else 1
    learning = weight_bytes(
        setup, trained=True, micro_batches=training.micro_batches, values=training.values
    )
    weights = [
        Item(f"{what} of what is trained", device=size * training.trained / share)
        for what, size in learning.items()
    ]
    if setup.moments == "host":
        weights.append(Item("moments of what is trained", host=8 * training.trained))
    if training.frozen:
        frozen = training.frozen_bytes * training.frozen / share
        weights.append(Item("what stays as it is", device=frozen))
    if training.validations:
        size = learning["weights"]
        weights.append(Item("the best weights so far", host=size * training.trained))

    # A teacher, or its head alone, and what a step computes.
    teacher = [
        Item("the teacher", device=training.teacher),
        Item("the teacher's head", device=training.teacher_head),
    ]
    step = [
        *activations(given, training),
        *head_chunk(shape, training.tokens, setup, learns=not training.frozen),
    ]
    if training.values and training.micro_batches > 1:
        values = (training.frozen or training.trained) / share
        size = learning["values on the grid"]
        step.append(Item("gradients of values, held to the end", device=size * values))

    always = [*BASE, *weights, *teacher]
    return Account(
        {
            "open": [*BASE, *opened(shape, given.stored_bytes)],
            "step": [*always, *step],
            "update": [*always, *update(shape, setup, training.trained)],
        }
    )


def signal_made(given: Given, teacher: Shape) -> list[Item]:
    """A cached signal being made, beside a student that waits on the host."""
    shape, seq_len = given.parent, given.seq_len
    size = 4 if given.setup.precision == "fp32" else 2
    inside = seq_len * (3 * teacher.ffn + 4 * teacher.hidden) * size
    return [
        *BASE,
        Item("the student, waiting", host=4 * shape.params),
        Item("the teacher", device=size * teacher.params),
        Item("its file, mapped", host=2 * teacher.params),
        Item("a row of text in it", device=inside),
        Item("logits", device=4 * 4 * min(seq_len, CHUNK_TOKENS) * teacher.vocabulary),
    ]
