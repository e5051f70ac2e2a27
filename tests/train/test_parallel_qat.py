"""Training on a grid in shards: two processes that each round their rows give the codes of one."""

from __future__ import annotations

import pytest
import torch
from train.test_parallel import launch, result

from compress.quant.codes import Quantized


@pytest.mark.parametrize(
    "option", [pytest.param("round", marks=pytest.mark.slow), "learned", "lowrank"]
)
def test_rows_that_round_by_themselves_give_the_codes_of_one_process(
    option, tiny_teacher, tmp_path
):
    made = {}
    for kind, world in (("none", 1), ("fsdp2", 2)):
        codes, outputs = launch(
            f"{kind}-{option}-sgd", tmp_path / kind, tiny_teacher, steps=3, world=world
        )
        assert set(codes) == {0}, outputs
        made[kind] = result(tmp_path / kind)
    (expected, weights), (about, shards) = made["none"], made["fsdp2"]
    assert about["sharded"] >= about["parameters"] and expected["sharded"] == 0
    for ours, theirs in zip(about["curve"], expected["curve"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
    for name, tensor in weights.items():
        if name.endswith(".codes"):
            assert (shards[name] != tensor).float().mean() < 1e-4, name
        else:
            torch.testing.assert_close(shards[name], tensor, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("option", ["learned", pytest.param("lowrank", marks=pytest.mark.slow)])
def test_bf16_masters_round_alike_in_one_process_and_in_shards(option, tiny_teacher, tmp_path):
    made = []
    for kind, world in (("none", 1), ("fsdp2", 2)):
        codes, outputs = launch(
            f"{kind}-{option}-bf16_stochastic", tmp_path / kind, tiny_teacher, steps=2, world=world
        )
        assert set(codes) == {0}, outputs
        made.append(result(tmp_path / kind))
    # Behind the first update masters were rounded by other draws, and codes with them.
    shards, alone = (about["curve"] for about in (made[1][0], made[0][0]))
    for step, share in enumerate((1e-3, 1e-2)):
        assert shards[step]["loss"] == pytest.approx(alone[step]["loss"], rel=share)
        assert shards[step]["grad_norm"] == pytest.approx(alone[step]["grad_norm"], rel=2e-2)

    # What ships decodes to fp32 numbers that bf16 could not hold.
    for name, codes in made[1][1].items():
        if name.endswith(".codes"):
            matrix = name.removesuffix(".codes")
            scales = made[1][1][f"{matrix}.scales"]
            assert torch.equal(Quantized("q4_0", codes, scales).decode(), made[1][1][matrix]), (
                matrix
            )
