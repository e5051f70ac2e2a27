"""Weights read straight into shards: no process opens a model whole or holds as much as one, and
what is learned is what one process learns.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from train.test_parallel import HERE, start

from compress.models.checkpoint import load_model
from compress.models.empty import empty_model, is_empty, places_of, read


def run(name, folder, teacher, world):
    folder.mkdir()
    shutil.copytree(teacher, folder / "teacher")
    codes, outputs = start([str(HERE / "one_stage.py"), name, str(folder)], world)
    assert codes == [0] * world, outputs
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", [pytest.param("distill", marks=pytest.mark.slow), "qat", "online"])
def test_no_process_holds_a_whole_model_and_all_learn_what_one_does(name, tiny_teacher, tmp_path):
    (alone,) = run(name, tmp_path / "one", tiny_teacher, 1)
    first, second = run(name, tmp_path / "two", tiny_teacher, 2)
    assert alone["opened"] > 0 and (first["opened"], second["opened"]) == (0, 0)
    for about in (first, second):
        # Half of the model; of rounded rows what carries them as well.
        share = 1.1 if name == "qat" else 0.8
        assert about["empty"] and about["peak"] < share * about["whole"], about
    assert second["shards"] == second["parameters"] and first["shards"] == 0
    for metric in ("loss_first_nats", "loss_last_nats"):
        assert first[metric] == pytest.approx(alone[metric], rel=1e-5)

    # Small gradients, of which AdamW makes steps as large as of any, differ by rounding.
    expected = load_file(tmp_path / "one/out/model.safetensors")
    for key, tensor in load_file(tmp_path / "two/out/model.safetensors").items():
        torch.testing.assert_close(tensor.float(), expected[key].float(), rtol=0.02, atol=5e-3)


def test_an_empty_model_has_the_tables_of_a_loaded_one_and_a_place_for_each_weight(tiny_teacher):
    loaded, empty = load_model(tiny_teacher), empty_model(tiny_teacher)
    assert is_empty(empty) and not any(buffer.is_meta for buffer in empty.buffers())
    for (name, buffer), (other, expected) in zip(
        empty.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert name == other and torch.equal(buffer, expected)
    places, parameters = places_of(empty), dict(loaded.named_parameters())
    assert places.keys() == parameters.keys()
    for name, place in places.items():
        rows = slice(1, 5)
        assert torch.equal(read(place, rows).float(), parameters[name][rows])
    assert empty.config.to_dict().items() >= {
        (key, value)
        for key, value in loaded.config.to_dict().items()
        if isinstance(value, int | str) and key not in ("_name_or_path", "dtype")
    }


def test_files_with_other_names_than_the_model_are_opened_whole(tiny_teacher, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(tiny_teacher, tmp_path / "t")
    file = tmp_path / "t" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.extra.weight"] = torch.zeros(2, 2)
    save_file(tensors, file, metadata={"format": "pt"})
    assert empty_model(tmp_path / "t") is None
