"""What distillation, LoRA and QAT feed to the training loop: batches of packed text, with a
teacher when there is one.

On-policy distillation (`with_rollouts`): in a share of the steps the student learns on what it
writes itself (GKD, arXiv 2306.13649, algorithm 1). A row's first `prompt_tokens` are the prompt;
the student samples the rest at temperature 1 up to its EOS, and the teacher is asked what it would
have said there. Only those places are labels. Which steps are on-policy, and the samples, are
functions of (seed, step, weights), so that a resumed run writes the same. Divergences for it:
reverse_kl or jsd, which the paper finds better than forward KL there.

Learning from the teacher's inner states (`FeatureLoss`): layer by layer, by attention relations,
and block by block. Pairs (s, t) say that student block s should give what teacher block t gives; by
default t = round((s + 1) T / S) - 1 for S and T blocks.

    layers      mean over pairs of |u(W h_s) - u(h_t)|^2 / H, u scaling to unit RMS, W learned where
    the widths differ (arXiv 1909.10351, section 3) relations   at the last pair, KL(softmax(X_t
    X_t^T / sqrt(d)) || softmax(X_s X_s^T / sqrt(d))), mean over X = Q, K, V and over heads of d
                columns, which need not be attention's own heads; causal, so widths and head counts
                may differ (arXiv 2012.15828, section 3)
    blocks      instead of the whole loss: the blocks up to s, from the pair before on, take the
    teacher's states from the pair before as
                input and learn its states at t; no gradient crosses from one pair to the next, and
                no head is computed

Legend: R rows (sequences), L positions, P prompt tokens, N = R * L tokens, K teacher ids a token, H
hidden, D width of Q, K or V, A relation heads.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from compress.distill.losses import Mix, head_loss, hidden_mse
from compress.distill.signal import Signals, as_target
from compress.models.checkpoint import best_device, head_dim, read_config
from compress.models.cpu_kernels import use_cpu_kernels
from compress.models.head import Head, head_of, hidden_states
from compress.models.tokenizer import load_tokenizer, token_count, tokenizer_digest
from compress.models.vocabulary import difference, of_tokenizer
from compress.train import parallel
from compress.train.packed import Packed
from compress.train.plan import Batch, LossFunction

if TYPE_CHECKING:
    from compress.stages.distill import Features

Pairs = list[tuple[int, int]]
Batches = Callable[[int, int], list[Batch]]  # (step, micro) -> this rank's micro-batches


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal language model. ValueError when it has no list of that many
    modules.
    """
    depth = model.config.num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} blocks, where features and adapters are"
        " placed; distill without features"
    )


@contextmanager
def tapped(model: Any, layers: Sequence[int], projections: Sequence[int] = (),
           inputs: dict[int, Tensor] | None = None) -> Iterator[dict[str, Tensor]]:  # fmt: skip
    """Collect, while `model` runs, outputs (R, L, H) of `layers` as "layer<i>", -1 being the
    embeddings, and Q, K, V of `projections` as "q<i>".

    `inputs`: what blocks get instead of their predecessor's output. ValueError when a block has no
    q_proj, k_proj, v_proj.
    """
    seen: dict[str, Tensor] = {}
    blocks = blocks_of(model)

    def keep(name: str) -> Any:
        return lambda module, arguments, out: seen.update(
            {name: out[0] if isinstance(out, tuple) else out}
        )

    with ExitStack() as hooks:
        for i in layers:
            if i < 0:
                hooks.enter_context(
                    blocks[0].register_forward_pre_hook(
                        lambda module, arguments: seen.update({"layer-1": arguments[0]})
                    )
                )
            else:
                hooks.enter_context(blocks[i].register_forward_hook(keep(f"layer{i}")))
        for i in projections:
            for name in "qkv":
                projection = getattr(getattr(blocks[i], "self_attn", None), f"{name}_proj", None)
                if projection is None:
                    raise ValueError(
                        f"{type(blocks[i]).__name__} has no self_attn.{name}_proj: set"
                        " features.relations=0"
                    )
                hooks.enter_context(projection.register_forward_hook(keep(f"{name}{i}")))
        for i, given in (inputs or {}).items():
            hooks.enter_context(
                blocks[i].register_forward_pre_hook(
                    lambda module, arguments, given=given: (given, *arguments[1:])
                )
            )
        yield seen


class OnlineTeacher:
    """The teacher itself, run for every batch: exact, nothing on disk, and as slow as the teacher
    is large.

    `sharded` spreads its blocks over the processes (fsdp2); each keeps a whole head, which the loss
    needs chunk by chunk.
    """

    def __init__(self, model: Any, data: Packed, *, sharded: bool = False) -> None:
        self.model, self.data = model.to(best_device()), data
        self.taps: tuple[list[int], list[int]] = (
            [],
            [],
        )  # blocks whose states, and whose Q, K and V, `read` gives too, under "teacher/"
        use_cpu_kernels(self.model)
        head = head_of(model).detach()
        self.teacher_head: Head | None = (
            replace(head, weight_VH=head.weight_VH.clone()) if sharded else head
        )
        if sharded:
            parallel.shard(model.base_model, model, "as it is")

    @torch.no_grad()
    def read(self, rows: list[int]) -> Batch:
        """{"teacher_hidden": (N, H)} and what `taps` name, as "teacher/layer3" (R, L, H)."""
        with tapped(self.model, *self.taps) as seen:
            hidden_NH = hidden_states(
                self.model, **send_to_device(self.data.inputs(rows), self.model.device)
            )
        return {"teacher_hidden": hidden_NH} | {
            f"teacher/{name}": state for name, state in seen.items()
        }


TeacherSource = (
    Signals | OnlineTeacher
)  # `read(rows)` gives tensors that `as_target` understands, `teacher_head` goes with hidden states


def make_batches(
    data: Packed, source: TeacherSource | None, *, seed: int, sequences: int, batch: int
) -> Batches:
    """Micro-batches of this rank's part of a step's `batch` rows. Kept signals of the next step
    are fetched while this one computes.
    """

    def batches(step: int, micro: int) -> list[Batch]:
        rows, following = (
            data.rows(seed, s * batch, batch, sequences)[parallel.rank() :: parallel.world()]
            for s in (step, step + 1)
        )
        made = [one_batch(data, source, rows[i : i + micro]) for i in range(0, len(rows), micro)]
        if isinstance(
            source, Signals
        ):  # the next batch's online teacher would compete with this batch's student
            source.prefetch(following)
        return made

    return batches


def one_batch(data: Packed, source: TeacherSource | None, rows: list[int]) -> Batch:
    """Rows as the loss takes them: `Packed.batch` and, with a source, the teacher's tensors."""
    return data.batch(rows) | (source.read(rows) if source else {})


def with_rollouts(
    batches: Batches,
    model: Any,
    teacher: OnlineTeacher,
    *,
    share: float,
    prompt_tokens: int,
    ends: list[int],
    seed: int,
    vocabulary: int | None = None,
) -> Batches:
    """`batches`, in a `share` of the steps with the student's own text behind each row's prompt,
    until one of `ends`.

    It writes the first `vocabulary` ids only: the rows behind them are padding.
    """
    rows = int(model.config.vocab_size)
    padding = list(range(min(rows, vocabulary or rows), rows)) or None

    def mixed(step: int, micro: int) -> list[Batch]:
        made = batches(step, micro)
        if random.Random(f"{seed} {step}").random() >= share:
            return made
        with (
            torch.random.fork_rng()
        ):  # what is drawn behind, as stochastic rounding, is to be the same on every rank
            torch.manual_seed((seed * 1_000_003 + step) * 1009 + parallel.rank())
            return [
                _own_text(model, teacher, batch["inputs"], prompt_tokens, ends, padding)
                for batch in made
            ]

    return mixed


@torch.no_grad()
def _own_text(
    model: Any,
    teacher: OnlineTeacher,
    inputs_RL: Tensor,
    prompt_tokens: int,
    ends: list[int],
    padding: list[int] | None,
) -> Batch:
    length, device = inputs_RL.shape[1], next(model.parameters()).device
    prompt_RP = inputs_RL[:, :prompt_tokens].to(device)
    training = model.training
    model.eval()
    ids = model.generate(
        input_ids=prompt_RP,
        attention_mask=torch.ones_like(prompt_RP),
        max_new_tokens=length + 1 - prompt_tokens,
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        eos_token_id=ends,
        pad_token_id=ends[0],
        suppress_tokens=padding,
        use_cache=True,
    )
    model.train(training)
    ids = torch.nn.functional.pad(
        ids, (0, length + 1 - ids.shape[1]), value=ends[0]
    )  # all rows may have ended early
    inputs_RL, place_L = ids[:, :-1], torch.arange(length, device=device)
    ended_RL = (
        torch.isin(inputs_RL, torch.tensor(ends, device=device)) & (place_L >= prompt_tokens)
    ).cumsum(-1) > 0
    mask_RL = (place_L >= prompt_tokens - 1) & ~ended_RL
    return {
        "inputs": inputs_RL,
        "labels": ids[:, 1:],
        "mask": mask_RL,
        "teacher_hidden": hidden_states(teacher.model, inputs_RL),
    }


def common_vocabulary(student: Path, teacher: Path) -> int:
    """Rows of both heads that the ids of their tokenizer need; heads may be padded, and padded
    differently, behind them.

    ValueError when the tokenizers differ, or when a head has fewer rows than that.
    """
    sizes = [int(read_config(path)["vocab_size"]) for path in (student, teacher)]
    ids = token_count(load_tokenizer(teacher))
    same = tokenizer_digest(student) == tokenizer_digest(teacher)
    if not same and (
        told := difference(*(of_tokenizer(load_tokenizer(path)) for path in (student, teacher)))
    ):
        raise ValueError(
            f"{student} and {teacher} have different tokenizers; distillation compares"
            f" probabilities of the same ids, and {told}"
        )
    if min(sizes) < ids:
        raise ValueError(
            f"{student} and {teacher} have heads of {sizes[0]} and {sizes[1]} rows, their tokenizer"
            f" has {ids} ids; both need as many"
        )
    return ids


def make_loss(
    mix: Mix, teacher_head: Head | None = None, vocabulary: int | None = None
) -> LossFunction:
    """`loss_fn(model, batch)` -> (loss sum in nats, labels counted).

    Of the teacher's head the rows behind the tokenizer's `vocabulary` ids take no part; the
    student's are padding, whose mass is held down.
    """

    def loss_fn(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden_NH, mask_N = (
            hidden_states(model, batch["inputs"], batch.get("positions")),
            batch["mask"].flatten(),
        )
        head = head_of(model)
        rows = min(len(head.weight_VH), vocabulary or len(head.weight_VH))
        target = as_target(batch, teacher_head.first(rows) if teacher_head else None)
        whole = (
            torch.is_grad_enabled() and parallel.world() == 1 and head.weight_VH.is_leaf
        )  # elsewhere autograd's hooks must see the gradient
        into_VH = head.weight_VH.grad if whole else None
        loss = head_loss(
            hidden_NH,
            head,
            batch["labels"].flatten(),
            mask_N,
            target,
            mix,
            into_VH=into_VH,
            shared=rows,
        )
        if mix.hidden_weight:
            loss = loss + mix.hidden_weight * hidden_mse(hidden_NH, batch["teacher_hidden"], mask_N)
        return loss, torch.count_nonzero(mask_N)

    return loss_fn


def layer_pairs(student: int, teacher: int, wanted: int) -> Pairs:
    """`wanted` evenly spaced student blocks, the last one included, with the teacher blocks at the
    same share of the depth.
    """
    chosen = sorted(
        {round((i + 1) * student / min(wanted, student)) - 1 for i in range(min(wanted, student))}
    )
    return [(s, round((s + 1) * teacher / student) - 1) for s in chosen]


def check_pairs(pairs: Sequence[Sequence[int]], student: int, teacher: int) -> Pairs:
    """The pairs as tuples. ValueError unless both numbers rise and exist."""
    made = [(int(pair[0]), int(pair[1])) for pair in pairs if len(pair) == 2]
    rising = all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(made))
    if (
        len(made) != len(pairs)
        or not rising
        or not all(0 <= s < student and 0 <= t < teacher for s, t in made)
    ):
        wanted = (
            f"each is [student block, teacher block], both rising, below {student} and {teacher}"
        )
        raise ValueError(
            f"features.pairs={list(pairs)}: {wanted}; leave it empty for evenly spaced ones"
        )
    return made


def relation_kl(student_RLD: Tensor, teacher_RLD: Tensor, mask_N: Tensor, heads: int) -> Tensor:
    """Sum over masked tokens of the mean over `heads` of KL(teacher || student) between relations
    to the positions so far, in nats.
    """

    def relations(x_RLD: Tensor) -> Tensor:
        x_RALd = (
            x_RLD.to(torch.promote_types(x_RLD.dtype, torch.float32))
            .unflatten(-1, (heads, -1))
            .transpose(1, 2)
        )
        scores = x_RALd @ x_RALd.transpose(2, 3) * x_RALd.shape[-1] ** -0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)
        return scores.masked_fill(future, torch.finfo(scores.dtype).min).log_softmax(-1)

    with torch.autocast(student_RLD.device.type, enabled=False):
        log_p, log_q = relations(teacher_RLD), relations(student_RLD)
        return (torch.linalg.vecdot(log_p.exp(), log_p - log_q).mean(1).flatten() * mask_N).sum()


class FeatureLoss(nn.Module):
    """`loss_fn` plus the weighted terms, or with `blocks` that term alone; its projections train
    with the student and end with the stage.
    """

    def __init__(
        self, loss_fn: Any, student: Any, teacher: OnlineTeacher, features: Features, seed: int = 0
    ) -> None:
        """Sets the teacher's taps; `seed` is that of the projections. ValueError when the models
        allow no such term.
        """
        super().__init__()
        config, other = student.config, teacher.model.config
        width, wide, depths = (
            config.hidden_size,
            other.hidden_size,
            (config.num_hidden_layers, other.num_hidden_layers),
        )
        self.loss_fn, self.features, self.heads = (
            loss_fn,
            features,
            int(getattr(other, "num_key_value_heads", 1)),
        )
        self.pairs = (
            check_pairs(features.pairs, *depths)
            if features.pairs
            else layer_pairs(*depths, depths[0] if features.blocks else 4)
        )
        if features.blocks and width != wide:
            wanted = f"needs a student of the teacher's hidden size {wide}, got {width}"
            raise ValueError(f"features.blocks={features.blocks} {wanted}; use features.layers")
        if features.relations:
            columns = head_dim(config) * getattr(
                config, "num_key_value_heads", config.num_attention_heads
            )  # Q's is a multiple of it
            if columns % self.heads:
                raise ValueError(
                    f"features.relations needs K and V of a multiple of {self.heads} columns, the"
                    f" student's have {columns}; set it to 0"
                )
        projected = features.layers and width != wide
        self.projections = nn.ModuleList(
            nn.Linear(width, wide, bias=False) if projected else nn.Identity() for _ in self.pairs
        )
        generator = torch.Generator().manual_seed(seed)
        for weight in self.projections.parameters():
            nn.init.orthogonal_(weight, generator=generator)
        states = [-1, *(t for _, t in self.pairs)] if features.layers or features.blocks else []
        teacher.taps = states, [self.pairs[-1][1]] if features.relations else []

    def forward(self, model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        weights, (last_s, last_t), mask_N = self.features, self.pairs[-1], batch["mask"].flatten()
        if weights.blocks:
            before = [(-1, -1), *self.pairs[:-1]]
            given = {
                s + 1: batch[f"teacher/layer{t}"].to(next(model.parameters()).dtype)
                for s, t in before
            }
            with tapped(model, [s for s, _ in self.pairs], inputs=given) as seen:
                hidden_states(model, batch["inputs"], batch.get("positions"))
            return weights.blocks * self._distance(seen, batch, mask_N), torch.count_nonzero(mask_N)
        with tapped(
            model,
            [s for s, _ in self.pairs] if weights.layers else [],
            [last_s] if weights.relations else [],
        ) as seen:
            loss, count = self.loss_fn(model, batch)
        if weights.layers:
            loss = loss + weights.layers * self._distance(seen, batch, mask_N)
        if weights.relations:
            terms = [
                relation_kl(seen[f"{x}{last_s}"], batch[f"teacher/{x}{last_t}"], mask_N, self.heads)
                for x in "qkv"
            ]
            loss = loss + weights.relations * sum(terms) / 3
        return loss, count

    def _distance(
        self, seen: dict[str, Tensor], batch: dict[str, Tensor], mask_N: Tensor
    ) -> Tensor:
        """Mean over the pairs of `hidden_mse`, the student's states projected
        where widths differ.
        """
        terms = [
            hidden_mse(
                projection(seen[f"layer{s}"]).flatten(0, 1),
                batch[f"teacher/layer{t}"].flatten(0, 1),
                mask_N,
            )
            for projection, (s, t) in zip(self.projections, self.pairs, strict=True)
        ]
        return torch.stack(terms).mean()
