"""Where a runtime computes: refused by name where it can't, and handed down to what computes.

There may be no GPU here: torch and llama.cpp are doubles that say they see one.
"""

from __future__ import annotations

from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from compress.errors import ConfigError
from compress.formats import torch_runtime
from compress.formats.devices import ALL_LAYERS, Device, check_device, gpu_layers
from compress.formats.llamacpp import LlamaCpp
from compress.models.walk import lent
from compress.quant import blockwise
from compress.quant.blockwise import Blockwise
from compress.quant.codes import quantizable
from compress.score.latency import Timing
from compress.score.latency import run as timed
from compress.score.settings import Eval

Kind = Enum("Kind", ["BACKEND_DEVICE_TYPE_CPU", "BACKEND_DEVICE_TYPE_GPU"])
OTHER = torch.device("cpu:0")  # stands for a GPU: another device by its name


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("xllamacpp.get_device_info", lambda: [{"type": Kind(1)}])


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("xllamacpp.get_device_info", lambda: [{"type": Kind(1)}, {"type": Kind(2)}])


@pytest.mark.parametrize(
    ("runtime", "lacks"),
    [
        ("torch", "torch sees no GPU"),
        ("llama.cpp", "the installed xllamacpp sees no GPU"),
        ("onnxruntime", "written for the CPU"),
    ],
)
def test_a_runtime_without_a_gpu_is_refused_by_what_lacks(no_gpu, runtime, lacks):
    check_device(runtime, "cpu")
    with pytest.raises(ConfigError, match=f"eval.device=gpu for {runtime}: .*{lacks}.*=cpu, or"):
        check_device(runtime, Device.gpu)


def test_a_gpu_that_is_there_is_no_reason_to_refuse_what_can_use_it(gpu):
    check_device("torch", "gpu")
    check_device("llama.cpp", "gpu")
    assert (gpu_layers("gpu"), gpu_layers("cpu")) == (ALL_LAYERS, 0)
    with pytest.raises(ConfigError, match="eval.device=gpu for onnxruntime"):
        check_device("onnxruntime", "gpu")


@pytest.mark.parametrize(("device", "layers"), [("cpu", 0), ("gpu", ALL_LAYERS)])
def test_llama_cpp_is_asked_for_all_layers_where_the_budget_is_of_a_gpu(
    gpu, monkeypatch, tmp_path, device, layers
):
    servers = []
    monkeypatch.setattr("xllamacpp.Server", lambda params: servers.append(params.n_gpu_layers))
    (tmp_path / "model.gguf").touch()
    LlamaCpp(tmp_path / "model.gguf", 1, 64, device=device)
    assert servers == [layers]


def test_times_are_taken_on_the_device_that_is_asked_for(monkeypatch):
    """Runtime and sweep are doubles: which of them is asked, and for which device."""
    asked = []

    def timer(model: Path, threads: int, device: str):
        asked.append(device)
        return lambda tokens, count, batch: [2.0] * count, 1000

    monkeypatch.setattr(
        "compress.score.latency.runtime_of", lambda name: SimpleNamespace(timer=timer)
    )
    monkeypatch.setattr("compress.score.latency.pin", lambda threads: [])
    monkeypatch.setattr("compress.score.latency.gpu_read_bytes_per_second", lambda size: 1e6)
    monkeypatch.setattr("compress.score.latency.read_bytes_per_second", lambda size, n: 4e6)
    shares = {}
    for device in ("cpu", "gpu"):
        record = timed(Path(), "torch", Timing(4, 3, 1, 1, device=device))
        assert record["latency"]["device"] == device
        shares[device] = record["scores"]["bandwidth_share"]
    assert asked == ["cpu", "gpu"] and shares["gpu"] == pytest.approx(4 * shares["cpu"])


def test_a_checkpoint_that_is_timed_on_a_gpu_that_is_not_there_is_refused(no_gpu, tiny_teacher):
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        torch_runtime.timer(tiny_teacher, 1, "gpu")


def test_the_device_of_times_is_an_option_of_eval():
    assert Eval().device == "cpu" and Eval(device=Device.gpu).device == "gpu"
    assert [str(device) for device in Device] == ["cpu", "gpu"]


def test_a_matrix_rounded_without_text_is_on_the_device_meanwhile(monkeypatch, tiny_teacher):
    from compress.models.checkpoint import load_model

    # Which module is on loan, and to where, whenever a matrix is rounded.
    loans, rounded = [], []

    @contextmanager
    def noted(module, device):
        loans.append((module, device))
        yield
        loans.pop()

    class Watched(Blockwise):
        def round(self, name, weight, gram_CC=None):
            rounded.append((name, *loans))
            super().round(name, weight, gram_CC)

    monkeypatch.setattr(blockwise, "best_device", lambda: OTHER)
    monkeypatch.setattr(blockwise, "lent", noted)
    model = load_model(tiny_teacher)
    homes = {name: matrix.home for name, matrix in quantizable(model).items()}
    Watched(model, dict.fromkeys(homes, "q4_0")).plain()
    assert rounded == [(name, (home, OTHER)) for name, home in homes.items()]


def test_a_module_comes_home_when_what_it_was_lent_for_fails():
    module = torch.nn.Linear(2, 2)
    with pytest.raises(KeyError), lent(module, torch.device("meta")):
        assert module.weight.device.type == "meta"
        module.to_empty(device="cpu")
        raise KeyError
    assert module.weight.device.type == "cpu"


def test_the_head_of_a_file_that_is_scored_is_on_the_device(monkeypatch):
    from compress.models.head import Head
    from compress.score.lm import served_lm

    monkeypatch.setattr("compress.score.lm.best_device", lambda: torch.device("meta"))
    tokenizer = SimpleNamespace(encode=str.split, bos_token_id=0, decode=str)
    lm = served_lm(SimpleNamespace(ctx_len=64), Head(torch.randn(9, 4)), tokenizer, 2)
    spots, answers = np.array([0, 1]), np.array([3, 4])
    assert lm.likelihoods.readout.head.weight_VH.device.type == "meta"
    with pytest.raises(NotImplementedError, match="meta"):  # nothing was computed on the CPU
        lm.likelihoods.readout.answers([torch.randn(2, 4)], spots, answers)
