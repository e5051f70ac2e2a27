"""Removals with compensation against slow, obvious least squares in float64."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from compress.prune.compensation import (
    DAMPINGS,
    Inputs,
    Remaining,
    cut_columns,
    error_fraction,
    keep_channels,
    keep_heads,
    reconstruct,
)

TINY = 1e-12  # damping that the comparison with undamped least squares can't see


def _problem(
    tokens: int = 60, channels: int = 10, hidden: int = 6
) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated inputs X (N, F) and a projection W (H, F)."""
    generator = torch.Generator().manual_seed(0)
    mix_FF = torch.randn(channels, channels, dtype=torch.float64, generator=generator)
    x_NF = torch.randn(tokens, channels, dtype=torch.float64, generator=generator) @ mix_FF
    return x_NF, torch.randn(hidden, channels, dtype=torch.float64, generator=generator)


def _lost(x_NF: torch.Tensor, weight_HF: torch.Tensor, keep: list[int]) -> float:
    """The squared error that no refit of those columns can get below."""
    y_NH = x_NF @ weight_HF.T
    fitted_KH = torch.linalg.lstsq(x_NF[:, keep], y_NH).solution
    return (x_NF[:, keep] @ fitted_KH - y_NH).square().sum().item()


def _damped_loss(x_NF, weight_HF, keep, damping) -> float:
    """As `_lost`, with rows below X that pull every column, kept or gone, to its old value."""
    ridge = damping * x_NF.square().sum(0).mean()
    rows_NF = torch.cat([x_NF, ridge.sqrt() * torch.eye(x_NF.shape[1], dtype=torch.float64)])
    return _lost(rows_NF, weight_HF, keep)


def test_removal_cost_equals_brute_force_least_squares():
    x_NF, weight_HF = _problem()
    cost_F = Remaining(weight_HF, x_NF.T @ x_NF, TINY).costs(torch.arange(10)[:, None])
    brute = [_lost(x_NF, weight_HF, [k for k in range(10) if k != j]) for j in range(10)]
    torch.testing.assert_close(cost_F, torch.tensor(brute, dtype=torch.float64), rtol=1e-6, atol=0)


def test_channels_one_by_one_equal_brute_force_greedy():
    x_NF, weight_HF = _problem()
    kept = list(range(10))
    while len(kept) > 4:
        kept.remove(min(kept, key=lambda j: _lost(x_NF, weight_HF, [k for k in kept if k != j])))
    assert keep_channels(weight_HF, x_NF.T @ x_NF, 4, TINY, block=1).tolist() == kept


@pytest.mark.parametrize("block", [1, 3, 64])
def test_keep_channels_count_order_and_purity(block: int):
    x_NF, weight_HF = _problem()
    gram_FF, before = x_NF.T @ x_NF, weight_HF.clone()
    copy = gram_FF.clone()
    kept = keep_channels(weight_HF, gram_FF, 7, 0.01, block)
    assert kept.shape == (7,) and (kept.diff() > 0).all()
    assert torch.equal(weight_HF, before) and torch.equal(gram_FF, copy)


def test_second_order_choice_beats_magnitude():
    """A loud channel that another one repeats is cheap; magnitude would keep it."""
    x_NF, weight_HF = _problem()
    x_NF[:, 3] = 2 * x_NF[:, 5]
    weight_HF[:, 3] *= 10
    kept = keep_channels(weight_HF, x_NF.T @ x_NF, 9, 1e-9).tolist()
    assert len({3, 5} & set(kept)) == 1


def test_reconstruction_equals_lstsq():
    x_NF, weight_HF = _problem()
    keep_K = torch.tensor([0, 2, 3, 7])
    fitted_HK = reconstruct(weight_HF, x_NF.T @ x_NF, keep_K, TINY)
    expected_KH = torch.linalg.lstsq(x_NF[:, keep_K], x_NF @ weight_HF.T).solution
    torch.testing.assert_close(fitted_HK, expected_KH.T, rtol=1e-7, atol=1e-9)


def test_reconstruction_is_pulled_to_the_old_columns_and_survives_dead_channels():
    x_NF, weight_HF = _problem()
    keep_K = torch.tensor([0, 2, 3, 7])
    strong = reconstruct(weight_HF, x_NF.T @ x_NF, keep_K, 1e9)
    torch.testing.assert_close(strong, weight_HF[:, keep_K], rtol=1e-6, atol=1e-6)
    dead = reconstruct(weight_HF.float(), torch.zeros(10, 10), keep_K, 0.01)
    assert dead.dtype == torch.float32 and torch.equal(dead, weight_HF[:, keep_K].float())


def test_error_fraction_on_the_tokens_themselves():
    x_NF, weight_HF = _problem()
    keep_K = torch.tensor([0, 2, 3, 7])
    fitted_HK = reconstruct(weight_HF, x_NF.T @ x_NF, keep_K, TINY)
    expected = _lost(x_NF, weight_HF, keep_K.tolist()) / (x_NF @ weight_HF.T).square().sum().item()
    assert error_fraction(weight_HF, x_NF.T @ x_NF, keep_K, fitted_HK) == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("damping", [TINY, 0.05])
def test_the_cost_of_a_group_equals_least_squares_on_the_columns_that_are_left(damping):
    x_NF, weight_HF = _problem(channels=12)
    groups_MG = torch.tensor([[0, 5, 7], [1, 2, 3], [4, 6, 11], [8, 9, 10]])
    cost_M = Remaining(weight_HF, x_NF.T @ x_NF, damping).costs(groups_MG)
    brute = [
        _damped_loss(x_NF, weight_HF, [k for k in range(12) if k not in group], damping)
        for group in groups_MG.tolist()
    ]
    torch.testing.assert_close(
        cost_M, torch.tensor(brute, dtype=torch.float64), rtol=1e-6, atol=1e-9
    )


def test_costs_after_a_removal_equal_least_squares_without_both_groups():
    """Cost so far and cost of the next group are together what least squares loses at once."""
    x_NF, weight_HF = _problem(channels=12)
    groups_MG = torch.arange(12).view(4, 3)
    remaining = Remaining(weight_HF, x_NF.T @ x_NF, TINY)
    first = remaining.costs(groups_MG)[1].item()
    remaining.remove(groups_MG[1])
    others = remaining.costs(groups_MG[[0, 2, 3]])
    for cost, group in zip(others.tolist(), (0, 2, 3), strict=True):
        gone = {3, 4, 5, *groups_MG[group].tolist()}
        both = _lost(x_NF, weight_HF, [k for k in range(12) if k not in gone])
        assert first + cost == pytest.approx(both, rel=1e-6)


def test_groups_of_a_real_size_can_be_weighed_on_several_threads():
    # torch's LU fails here, about every tenth time, where its right side is wide.
    columns_MG = torch.arange(576).view(3, -1)
    torch.set_num_threads(2)
    try:
        for seed in range(30):
            torch.manual_seed(seed)
            weight_HF, x_NF = torch.randn(576, 576), torch.randn(700, 576).double()
            remaining = Remaining(weight_HF, x_NF.T @ x_NF, 0.1)
            assert remaining.costs(columns_MG).isfinite().all()
    finally:
        torch.set_num_threads(1)


def test_the_weights_that_remain_are_the_reconstruction():
    x_NF, weight_HF = _problem(channels=12)
    remaining = Remaining(weight_HF, x_NF.T @ x_NF, 0.01)
    gone = remaining.removed(torch.arange(12).view(6, 2), 3)
    keep_K = torch.tensor([k for k in range(12) if k // 2 not in gone])
    fitted_HK = reconstruct(weight_HF, x_NF.T @ x_NF, keep_K, 0.01)
    torch.testing.assert_close(remaining.weight_HF[:, keep_K], fitted_HK, rtol=1e-8, atol=1e-9)
    columns_D = torch.arange(12).view(6, 2)[gone].flatten()
    assert remaining.weight_HF[:, columns_D].abs().max() < 1e-9


def test_groups_go_one_by_one_as_brute_force_would_have_them_go():
    x_NF, weight_HF = _problem(channels=12)
    kept, order = list(range(6)), []
    while len(kept) > 2:
        cost = {
            g: _lost(x_NF, weight_HF, [k for k in range(12) if k // 2 in set(kept) - {g}])
            for g in kept
        }
        order.append(min(cost, key=cost.__getitem__))
        kept.remove(order[-1])
    remaining = Remaining(weight_HF, x_NF.T @ x_NF, TINY)
    assert remaining.removed(torch.arange(12).view(6, 2), 4) == order


def test_of_all_key_value_heads_the_pair_that_loses_least_is_kept():
    """The second head nearly repeats the first, so that one of them is the cheapest."""
    x_NF, weight_HF = _problem(channels=12)
    x_NF[:, 4:8] = x_NF[:, :4].flip(1) + 0.01 * x_NF[:, 4:8]
    losses = {
        pair: _damped_loss(x_NF, weight_HF, [k for k in range(12) if k // 4 in pair], 1e-6)
        for pair in combinations(range(3), 2)
    }
    best = min(losses, key=losses.__getitem__)
    kept = keep_heads(weight_HF, x_NF.T @ x_NF, (3, 2), (2, 2), 1e-6)
    assert kept.tolist() == [2 * g + share for g in best for share in (0, 1)]


def test_every_group_keeps_as_many_query_heads_and_the_first_to_go_is_the_cheapest():
    x_NF, weight_HF = _problem(channels=12)
    kept = keep_heads(weight_HF, x_NF.T @ x_NF, (2, 3), (2, 2), TINY).tolist()
    assert [k // 3 for k in kept] == [0, 0, 1, 1]
    columns = {head: [2 * head, 2 * head + 1] for head in range(6)}

    def without(*heads: int) -> float:
        keep = [k for k in range(12) if k // 2 not in heads]
        assert len(keep) == 12 - sum(len(columns[head]) for head in heads)
        return _lost(x_NF, weight_HF, keep)

    first = min(range(6), key=without)
    others = range(3, 6) if first < 3 else range(3)
    second = min(others, key=lambda head: without(first, head))
    assert set(range(6)) - set(kept) == {first, second}


@pytest.mark.parametrize("groups, keep", list(product([(4, 3), (3, 4)], [(1, 1), (2, 2), (3, 1)])))
def test_heads_that_are_kept_are_uniform_whatever_is_asked_for(groups, keep):
    x_NF, weight_HF = _problem(channels=24)
    kept = keep_heads(weight_HF, x_NF.T @ x_NF, groups, keep, 0.01)
    assert (kept.diff() > 0).all()
    _, counts = torch.unique(kept // groups[1], return_counts=True)
    assert counts.tolist() == [keep[1]] * keep[0]


def _inputs(rows_BLF: torch.Tensor) -> Inputs:
    inputs = Inputs()
    for two_BLF in rows_BLF.split(2):
        inputs.add(two_BLF)
    return inputs


def test_every_eighth_row_is_held_out_and_all_of_them_are_the_whole():
    rows_BLF = torch.randn(17, 5, 6, generator=torch.Generator().manual_seed(0))
    inputs = _inputs(rows_BLF)
    held_NF = rows_BLF[[7, 15]].flatten(0, 1).double()
    x_NF = rows_BLF.flatten(0, 1).double()
    torch.testing.assert_close(inputs.held_out_FF, held_NF.T @ held_NF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        inputs.fit_FF + inputs.held_out_FF, x_NF.T @ x_NF, rtol=1e-5, atol=1e-5
    )


def test_the_damping_loses_least_on_held_out_rows_and_the_fit_is_then_of_all_rows():
    """Few noisy rows: the fit of the smallest damping is not the best on others."""
    generator = torch.Generator().manual_seed(3)
    rows_BLF = torch.randn(16, 3, 40, generator=generator) ** 3
    weight_HF = torch.randn(6, 40, generator=generator, dtype=torch.float64)
    inputs = _inputs(rows_BLF)
    calls = []

    def choose(gram_FF: torch.Tensor, damping: float) -> torch.Tensor:
        calls.append((gram_FF, damping))
        return keep_channels(weight_HF, gram_FF, 20, damping)

    def loss(damping: float) -> float:
        keep_K = keep_channels(weight_HF, inputs.fit_FF, 20, damping)
        fitted_HK = reconstruct(weight_HF, inputs.fit_FF, keep_K, damping)
        return error_fraction(weight_HF, inputs.held_out_FF, keep_K, fitted_HK)

    best = min(DAMPINGS, key=loss)
    cut = cut_columns(weight_HF, inputs, choose, None)
    assert cut.damping == best != DAMPINGS[0]
    given = cut_columns(weight_HF, inputs, choose, best)
    assert torch.equal(cut.keep_K, given.keep_K) and torch.equal(cut.weight_HK, given.weight_HK)
    assert [damping for _, damping in calls] == [*DAMPINGS, best, best]
    torch.testing.assert_close(calls[-1][0], inputs.fit_FF + inputs.held_out_FF)
