"""The fused head against plain torch in float64: every divergence, odd sizes, ragged masks, every
chunk size, transformed heads.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from compress.distill import fused_head, losses
from compress.distill.fused_head import head_loss
from compress.distill.losses import Dense, Mix, Sparse, hidden_mse
from compress.models.head import Head

N, H, V, H_TEACHER = 13, 5, 37, 7


def example(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    labels, mask = (
        torch.randint(V, (N,), generator=generator),
        torch.rand(N, generator=generator) > 0.4,
    )
    return rand(N, H), rand(V, H), rand(V), labels, mask, rand(N, H_TEACHER), rand(V, H_TEACHER)


def divergence(z, t, mix):
    """Written independently of the fused head: autograd through log_softmax."""
    log_q, log_p = (z / mix.temperature).log_softmax(-1), (t / mix.temperature).log_softmax(-1)
    if mix.divergence == "forward_kl":
        d = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    elif mix.divergence == "reverse_kl":
        d = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    elif mix.divergence == "jsd":
        log_m = torch.logsumexp(
            torch.stack([log_p + math.log(mix.jsd_beta), log_q + math.log(1 - mix.jsd_beta)]), 0
        )
        d = mix.jsd_beta * F.kl_div(log_m, log_p, reduction="none", log_target=True).sum(-1)
        d = d + (1 - mix.jsd_beta) * F.kl_div(log_m, log_q, reduction="none", log_target=True).sum(
            -1
        )
    else:
        d = F.l1_loss(log_q.exp(), log_p.exp(), reduction="none").sum(-1) / 2
    return mix.temperature**2 * d


def oracle_logits(h, w, b, scale, softcap):
    z = F.linear(h, w, b) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def compare(
    mix, target_of, oracle_kl, chunk, head_options=None, dtype=torch.float64, tolerance=1e-9
):
    """Loss and gradients of hidden, weight and bias, ours and the oracle's."""
    hidden, weight, bias, labels, mask, teacher_hidden, teacher_weight = example(dtype)
    options = head_options or {}
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        b = bias.clone().requires_grad_() if options.get("bias") else None
        transform = (options.get("scale", 1.0), options.get("softcap"))
        t = teacher_hidden @ teacher_weight.T
        if fused:
            loss = head_loss(
                h,
                Head(w, b, *transform),
                labels,
                mask,
                target_of(t, teacher_hidden, teacher_weight),
                mix,
                chunk,
            )
        else:
            z = oracle_logits(h, w, b, *transform)
            ce = F.cross_entropy(z, labels, reduction="none")
            loss = ((mix.kl_weight * oracle_kl(z, t, mix) + mix.ce_weight * ce) * mask).sum()
        (3.0 * loss).backward()
        results.append([loss.detach(), h.grad, w.grad] + ([b.grad] if b is not None else []))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=tolerance, atol=tolerance)


def dense(t, hidden, weight):
    return Dense(hidden, Head(weight))


def everything_sparse(t, hidden, weight):
    p = t.softmax(-1)
    return Sparse(torch.arange(V).expand(N, V), p, -(p * p.log()).sum(-1))


@pytest.mark.parametrize("chunk", range(1, N + 2))
@pytest.mark.parametrize("target_of", [dense, everything_sparse])
def test_every_chunk_size_gives_the_loss_and_gradients_of_plain_torch(
    chunk, target_of, monkeypatch
):
    monkeypatch.setattr(fused_head, "CACHED_TOKENS", 1 + chunk // 2)
    compare(Mix(0.7, 0.4), target_of, divergence, chunk)


@pytest.mark.parametrize("name", losses.DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.7, 0.4)])
def test_every_divergence_equals_plain_torch(name, temperature, kl_weight, ce_weight):
    compare(Mix(kl_weight, ce_weight, name, temperature, 0.3), dense, divergence, 4)


@pytest.mark.parametrize(
    "options",
    [
        {"bias": True},
        {"scale": 0.5},
        {"softcap": 2.0},
        {"bias": True, "scale": 1.7, "softcap": 3.0},
    ],
)
@pytest.mark.parametrize("target_of", [dense, everything_sparse])
def test_biased_scaled_and_capped_heads_equal_plain_torch(options, target_of):
    compare(Mix(0.7, 0.4), target_of, divergence, 5, options)


def test_cross_entropy_alone_equals_plain_torch():
    compare(Mix(0.0, 1.0), lambda *_: None, lambda z, t, mix: 0.0, 4)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_all_ids_of_a_tempered_teacher_give_the_tempered_divergence(temperature):
    def tempered(t, hidden, weight):
        return everything_sparse(t / temperature, hidden, weight)

    compare(Mix(0.7, 0.4, temperature=temperature), tempered, divergence, 4)


@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_fp32_is_within_1e_5_of_float64(name):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        hidden, weight, _, labels, mask, teacher_hidden, teacher_weight = example(dtype)
        h, w = hidden.requires_grad_(), weight.requires_grad_()
        head_loss(
            h,
            Head(w),
            labels,
            mask,
            dense(None, teacher_hidden, teacher_weight),
            Mix(1.0, 0.5, name),
            4,
        ).backward()
        gradients.append(torch.cat([h.grad.flatten(), w.grad.flatten()]).double())
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 1e-5


@pytest.mark.parametrize(("beta", "temperature"), [(0.5, 1.0), (0.3, 0.5)])
def test_jsd_is_finite_where_an_id_is_impossible_to_both(beta, temperature):
    spread = torch.tensor([[0.0, -110.0, -1.0, 3.0], [0.0, -112.0, 2.0, 1.0]], dtype=torch.float64)
    labels, mask, mix, made = (
        torch.zeros(1).long(),
        torch.ones(1).bool(),
        Mix(1.0, 0.0, "jsd", temperature, beta),
        [],
    )
    for dtype in (torch.float32, torch.float64):
        z, t = (row[None].to(dtype) for row in spread)
        h, unit = z.clone().requires_grad_(), Head(torch.eye(4, dtype=dtype))
        loss = head_loss(h, unit, labels, mask, Dense(t, unit), mix)
        loss.backward()
        made.append((loss.double(), h.grad.double()))
    z = spread[:1].clone().requires_grad_()
    expected = divergence(z, spread[1:], mix).sum()
    expected.backward()
    for loss, gradient in made:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient, z.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)])
@pytest.mark.parametrize("name", losses.DIVERGENCES)
def test_padding_of_the_students_head_is_held_down(name, kl_weight, ce_weight):
    hidden, weight, bias, labels, mask, teacher_hidden, teacher_weight = example()
    shared, mix, results = 30, Mix(kl_weight, ce_weight, name, jsd_beta=0.3), []
    labels, t = labels % shared, teacher_hidden @ teacher_weight[:shared].T
    for fused in (True, False):
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        if fused:
            target = Dense(teacher_hidden, Head(teacher_weight[:shared]))
            loss = head_loss(
                h, Head(w, b, softcap=3.0), labels, mask, target, mix, 4, shared=shared
            )
        else:
            z = oracle_logits(h, w, b, 1.0, 3.0)
            outside = -(z.softmax(-1)[:, :shared].sum(-1)).log()
            ce = F.cross_entropy(z[:, :shared], labels, reduction="none") + outside
            kl = divergence(z[:, :shared], t, mix) + outside
            if (
                name == "forward_kl"
            ):  # as over the whole head, where the teacher gives padding nothing
                p = torch.cat([t.softmax(-1), torch.zeros(N, V - shared, dtype=t.dtype)], 1)
                torch.testing.assert_close(
                    kl, torch.special.xlogy(p, p).sum(-1) - (p * z.log_softmax(-1)).sum(-1)
                )
            loss = ((kl_weight * kl + ce_weight * ce) * mask).sum()
        loss.backward()
        results.append([loss.detach(), h.grad, w.grad, b.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_chunks_of_a_bf16_head_add_up_in_fp32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, generator=generator) for shape in ((2048, 8), (40, 8), (2048, 40))
    )
    labels, mask, bias = torch.zeros(2048).long(), torch.ones(2048).bool(), torch.zeros(40)
    errors = {}
    for chunk in (2048, 8):
        made = []
        for dtype in (torch.bfloat16, torch.float64):
            h, w, b = (x.bfloat16().to(dtype).requires_grad_() for x in (hidden, weight, bias))
            target = Dense(teacher.to(dtype), Head(torch.eye(40, dtype=dtype)))
            head_loss(h, Head(w, b), labels, mask, target, Mix(0.7, 0.4), chunk).backward()
            assert w.grad.dtype == b.grad.dtype == dtype
            made.append(torch.cat([w.grad.flatten(), b.grad]).double())
        errors[chunk] = float((made[0] - made[1]).norm() / made[1].norm())
    assert errors[8] < 1.5 * errors[2048] < 0.02


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: there products of bf16 come out in fp32"
)
def test_logits_on_a_gpu_are_not_rounded_to_bf16():
    h, w = (torch.randn(*shape, device="cuda").bfloat16() * 3 for shape in ((64, 256), (512, 256)))
    made = fused_head._products(h, Head(w))
    torch.testing.assert_close(made.double(), h.double() @ w.double().T, rtol=1e-4, atol=1e-3)


def test_without_gradients_no_buffer_for_one_is_made():
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            tensors = [
                t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)
            ]
            made.extend(tuple(t.shape) for t in tensors if t.data_ptr() not in given)
            return out

    h, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((20, 6), (50, 6), (50,)))
    given = {x.data_ptr() for x in (h, w, b)}
    target = Dense(torch.randn(20, 6), Head(torch.randn(50, 6)))
    arguments = (torch.zeros(20).long(), torch.ones(20).bool(), target, Mix(0.7, 0.4), 4)
    with_gradients = head_loss(h, Head(w, b), *arguments)
    with Watch(), torch.no_grad():
        loss = head_loss(h, Head(w, b), *arguments)
    assert torch.equal(loss, with_gradients) and not loss.requires_grad
    assert not {(50, 6), (20, 6), (50,)} & set(made)


def test_repeated_teacher_ids_add_up():
    hidden, weight, _, labels, mask, _, _ = example()
    one = Sparse(torch.full((N, 1), 4), torch.ones(N, 1), torch.zeros(N))
    two = Sparse(torch.full((N, 2), 4), torch.full((N, 2), 0.5), torch.zeros(N))
    torch.testing.assert_close(
        *(head_loss(hidden, Head(weight), labels, mask, target, Mix()) for target in (one, two))
    )


def test_a_frozen_head_still_passes_the_hidden_gradient():
    hidden, weight, _, labels, mask, teacher_hidden, teacher_weight = example()
    grads = []
    for frozen in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        head_loss(
            h, Head(w), labels, mask, dense(None, teacher_hidden, teacher_weight), Mix(), 3
        ).backward()
        grads.append(h.grad)
    assert torch.equal(*grads)


def test_no_tensor_of_tokens_by_vocabulary_is_made():
    """The largest tensor made inside has a chunk's tokens, not all of them."""
    tokens, vocabulary = 64, 1000
    made = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made.extend(
                t.numel()
                for t in torch.utils._pytree.tree_leaves(out)
                if isinstance(t, torch.Tensor)
            )
            return out

    h, w = (
        torch.randn(tokens, 4, requires_grad=True),
        torch.randn(vocabulary, 4, requires_grad=True),
    )
    target = Dense(torch.randn(tokens, 4), Head(torch.randn(vocabulary, 4)))
    with Watch():
        head_loss(
            h,
            Head(w),
            torch.zeros(tokens, dtype=torch.long),
            torch.ones(tokens, dtype=torch.bool),
            target,
            Mix(1.0, 0.1, "jsd"),
            8,
        ).backward()
    assert max(made) == 8 * vocabulary


@pytest.mark.parametrize(
    ("mix", "target", "message"),
    [
        (Mix(divergence="kl"), None, "divergence 'kl' is unknown; allowed are forward_kl"),
        (Mix(), None, "needs the teacher's signal"),
        (
            Mix(divergence="jsd"),
            Sparse(torch.zeros(1, 1).long(), torch.ones(1, 1), torch.zeros(1)),
            "jsd needs all of the teacher's probabilities",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(mix, target, message):
    with pytest.raises(ValueError, match=message):
        mix.check(target)


def test_hidden_mse_is_zero_for_scaled_copies_and_counts_only_masked_tokens():
    x = torch.randn(6, 8)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    assert hidden_mse(3 * x, x, mask) < 1e-6
    y = x.clone()
    y[2] += 5
    assert hidden_mse(y, x, mask) < 1e-6
    assert hidden_mse(-x, x, mask) == pytest.approx(4 * 4, rel=1e-4)


def test_a_gradient_added_in_place_is_the_sum_of_both():
    hidden, weight, _, labels, mask, teacher_hidden, teacher_weight = example()
    target, grads = dense(None, teacher_hidden, teacher_weight), []
    for in_place in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        for _ in range(2):
            head_loss(
                h,
                Head(w),
                labels,
                mask,
                target,
                Mix(0.7, 0.4),
                4,
                into_VH=w.grad if in_place else None,
            ).backward()
        grads.append((h.grad, w.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
