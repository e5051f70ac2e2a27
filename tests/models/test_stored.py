"""Models in the bytes of their files: opened in bf16, walked in fp32, saved tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from pruning_parents import KINDS
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from compress.models import checkpoint
from compress.models.checkpoint import load_model, load_stored, save_model
from compress.models.tensor_file import NAMES, Entry, write_tensors
from compress.models.walk import Walk

CPU = torch.device("cpu")


def test_a_file_written_tensor_by_tensor_has_the_bytes_of_safetensors_own(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{kind}.{name}": torch.randn(3, 5, generator=generator).to(kind)
        for kind in NAMES
        for name in ("b", "ä\"'", "a")
    }
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    entries = {name: Entry(t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()}
    write_tensors(tmp_path / "ours", entries, {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_type_that_no_file_is_given_is_refused_by_name(tmp_path):
    entry = Entry(torch.complex128, (1,), lambda: torch.zeros(1, dtype=torch.complex128))
    with pytest.raises(ValueError, match="w is of type torch.complex128"):
        write_tensors(tmp_path / "f", {"w": entry}, {})


@pytest.fixture(params=KINDS)
def parent(request, tiny_teacher, tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(KINDS[request.param]())
    save_model(model, tmp_path / "parent", tiny_teacher)
    return tmp_path / "parent"


def test_a_stored_model_walks_as_the_fp32_one_to_the_last_bit(parent):
    ids = torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(1))
    walks = [Walk(load(parent), ids, device=CPU) for load in (load_model, load_stored)]
    assert walks[1].blocks[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert walks[1].model.get_input_embeddings().weight.dtype == torch.float32
    for index in range(len(walks[0].blocks)):
        for walk in walks:
            walk.advance(index)
        assert all(torch.equal(*pair) for pair in zip(*(w.states for w in walks), strict=True))
    assert torch.equal(*(walk.final_states() for walk in walks))


def test_a_block_is_fp32_while_it_is_present_and_goes_home_as_it_would_be_saved(parent):
    walk = Walk(load_stored(parent), torch.arange(24)[None], device=CPU)
    down = walk.blocks[1].mlp.down_proj
    norm = next(p for p in walk.blocks[1].parameters() if p.dim() == 1)
    walk.bring(1)
    changed = down.weight.detach() * 1.001
    with torch.no_grad():
        down.weight.copy_(changed)
        norm.fill_(1.001)
    assert down.weight.dtype == torch.float32
    walk.advance(1)
    assert torch.equal(down.weight, changed.bfloat16())
    assert norm.dtype == torch.float32
    assert not torch.equal(norm, norm.bfloat16().float())


def test_an_fp32_file_and_a_family_without_a_row_are_opened_in_fp32(
    parent, tiny_teacher, tmp_path, monkeypatch
):
    save_model(load_model(parent), tmp_path / "fp32", tiny_teacher, torch.float32)
    assert {p.dtype for p in load_stored(tmp_path / "fp32").parameters()} == {torch.float32}
    monkeypatch.setattr(checkpoint, "row_of", lambda model: None)
    assert {p.dtype for p in load_stored(parent).parameters()} == {torch.float32}


def test_a_parameter_that_is_let_go_of_keeps_its_shape_and_no_memory():
    parameter = torch.nn.Parameter(torch.ones(1000, 1000))
    checkpoint.let_go(parameter)
    assert parameter.shape == (1000, 1000) and parameter.untyped_storage().nbytes() == 4
    assert parameter.isnan().all()
