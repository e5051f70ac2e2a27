"""The fused head against plain torch in float64: odd sizes, ragged masks, every chunk size."""

from __future__ import annotations

import pytest
import torch

from compress.distill.losses import head_loss, hidden_mse
from compress.distill.signal import sample_targets

N, H, V = 13, 5, 37


def oracle(hidden, weight, labels, mask, p, kl_weight, ce_weight):
    """Written independently: full logits, F.kl_div and F.cross_entropy."""
    log_q = (hidden @ weight.T).log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    ce = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    return ((kl_weight * kl + ce_weight * ce) * mask).sum()


def example(dtype=torch.float64):
    torch.manual_seed(3)
    hidden, weight = torch.randn(N, H, dtype=dtype), torch.randn(V, H, dtype=dtype)
    labels, mask = torch.randint(V, (N,)), torch.rand(N) > 0.4
    p = (2 * torch.randn(N, V, dtype=dtype)).softmax(-1)
    return hidden, weight, labels, mask, p


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 12, 13, 100])
@pytest.mark.parametrize(("kl_weight", "ce_weight"), [(1.0, 0.0), (0.0, 1.0), (0.7, 0.4)])
def test_loss_and_gradients_equal_plain_torch_in_float64(chunk, kl_weight, ce_weight):
    hidden, weight, labels, mask, p = example()
    ids = torch.arange(V).expand(N, V)
    entropy = -(p * p.log()).sum(-1)
    results = []
    for fused in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if fused:
            signal = {"ids_NK": ids, "probs_NK": p, "entropy_N": entropy}
            loss = head_loss(h, w, labels, mask, kl_weight=kl_weight, ce_weight=ce_weight, chunk=chunk, **signal)
        else:
            loss = oracle(h, w, labels, mask, p, kl_weight, ce_weight)
        (3.0 * loss).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_float32_gradients_are_within_1e_5_of_float64():
    hidden, weight, labels, mask, p = example()
    grads = []
    for dtype in (torch.float32, torch.float64):
        h, w = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        entropy = -(p * p.log()).sum(-1)
        head_loss(
            h, w, labels, mask, ids_NK=torch.arange(V).expand(N, V), probs_NK=p, entropy_N=entropy, kl_weight=1.0, ce_weight=0.5, chunk=4
        ).backward()
        grads.append(torch.cat([h.grad.flatten(), w.grad.flatten()]).double())
    assert (grads[0] - grads[1]).norm() / grads[1].norm() < 1e-5


def test_repeated_teacher_ids_add_up():
    hidden, weight, labels, mask, _ = example()
    one = head_loss(
        hidden, weight, labels, mask, ids_NK=torch.full((N, 1), 4), probs_NK=torch.ones(N, 1), entropy_N=torch.zeros(N), kl_weight=1.0, ce_weight=0.0
    )
    two = head_loss(
        hidden,
        weight,
        labels,
        mask,
        ids_NK=torch.full((N, 2), 4),
        probs_NK=torch.full((N, 2), 0.5),
        entropy_N=torch.zeros(N),
        kl_weight=1.0,
        ce_weight=0.0,
    )
    torch.testing.assert_close(one, two)


def test_sampled_targets_are_unbiased_with_the_predicted_spread():
    torch.manual_seed(0)
    logits = 2 * torch.randn(1, 300)
    p = logits.softmax(-1)[0]
    generator = torch.Generator().manual_seed(1)
    draws, top, tail = 4000, 8, 8
    mean = torch.zeros(300, dtype=torch.float64)
    for _ in range(draws):
        ids, weights, entropy = sample_targets(logits, generator, top, tail)
        mean.index_add_(0, ids[0], weights[0].double() / draws)
    rest = p.clone()
    rest[p.topk(top).indices] = 0
    expected_error = (rest.sum() * rest / tail / draws).sqrt()
    assert ((mean - p).abs() <= 4.5 * expected_error + 1e-5).all()
    torch.testing.assert_close(mean[p.topk(top).indices].float(), p.topk(top).values)
    torch.testing.assert_close(entropy[0], -(p * p.log()).sum())


def test_hidden_mse_is_zero_for_scaled_copies_and_counts_only_masked_tokens():
    x = torch.randn(6, 8)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    assert hidden_mse(3 * x, x, mask) < 1e-6
    y = x.clone()
    y[2] += 5
    assert hidden_mse(y, x, mask) < 1e-6
    assert hidden_mse(-x, x, mask) == pytest.approx(4 * 4, rel=1e-4)
