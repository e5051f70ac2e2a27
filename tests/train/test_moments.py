"""Moments in 8 bits and on the host: the same updates, as near as 8 bits are."""

from __future__ import annotations

import pytest
import torch

from compress.errors import ConfigError
from compress.train import moments as kept
from compress.train.moments import MOMENTS, empty_moments, read_moment, rows_at_once, write_moment
from compress.train.optimizer import BETAS, StochasticAdamW
from compress.train.settings import Trainer

KINDS = ("fp32", "int8", "host")


def trained(kind: str, dtype: torch.dtype, steps: int = 20):
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(300, 40).to(dtype))
    optimizer = StochasticAdamW([parameter], 1e-2, kind)
    for _ in range(steps):
        parameter.grad = (parameter.detach().float() + torch.randn(300, 40)).to(dtype)
        optimizer.step()
    return parameter.detach(), optimizer.state[parameter]


def test_on_fp32_weights_it_is_torchs_own_adamw():
    ours, _ = trained("fp32", torch.float32)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(300, 40))
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, betas=BETAS, weight_decay=0.0)
    for _ in range(20):
        parameter.grad = parameter.detach() + torch.randn(300, 40)
        optimizer.step()
    torch.testing.assert_close(ours, parameter.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_on_the_host_are_the_same_numbers(dtype):
    assert torch.equal(trained("host", dtype)[0], trained("fp32", dtype)[0])


def test_moments_of_8_bits_move_weights_as_fp32_ones_nearly_do():
    begun = trained("fp32", torch.float32, steps=0)[0]
    exact = trained("fp32", torch.float32)[0] - begun
    ours, state = trained("int8", torch.float32)
    assert all(state[name].dtype == torch.uint8 for name in MOMENTS)
    assert float((ours - begun - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize("name", MOMENTS)
@pytest.mark.parametrize("shape", [(512, 33), (70, 77)])
def test_rows_are_read_where_they_were_written(name, shape, monkeypatch):
    monkeypatch.setattr(kept, "UPDATED", 1)
    parameter = torch.nn.Parameter(torch.zeros(shape))
    rows = rows_at_once(parameter)
    assert rows == 256
    packed = empty_moments(parameter, "int8")[name]
    moment = torch.rand(shape, generator=torch.Generator().manual_seed(0)) + 0.1
    for first, part in zip(range(0, shape[0], rows), moment.split(rows), strict=True):
        write_moment(name, packed, first, parameter.numel(), part)
    for first, part in zip(range(0, shape[0], rows), moment.split(rows), strict=True):
        read = read_moment(name, packed, first, parameter.numel(), part)
        torch.testing.assert_close(read, part, rtol=0.1, atol=0.02)


def test_updates_of_so_many_rows_at_once_are_those_of_all(monkeypatch):
    exact = [trained(kind, torch.bfloat16)[0] for kind in KINDS]
    monkeypatch.setattr(kept, "UPDATED", 256 * 40)
    pieces = [trained(kind, torch.bfloat16)[0] for kind in KINDS]
    for whole, part in zip(exact, pieces, strict=True):
        assert torch.equal(whole, part)


def test_what_can_not_be_had_is_refused_by_name(monkeypatch):
    with pytest.raises(ConfigError, match="trainer.moments='fp8'"):
        Trainer(moments="fp8")
    with pytest.raises(ConfigError, match="trainer.moments=int8 is for whole parameters"):
        Trainer(moments="int8", parallel="fsdp2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="moments=int8 needs bitsandbytes, .*moments=host"):
        Trainer(moments="int8")
