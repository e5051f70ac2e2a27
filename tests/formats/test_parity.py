"""A file is proven to be its checkpoint, and whatever is not is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import make_context
from safetensors.torch import load_file, save_file
from test_gguf import tiny_checkpoint

from compress.formats.compressed_tensors import export_compressed_tensors
from compress.formats.gguf import decode_gguf, export_gguf
from compress.formats.llamacpp import LlamaCpp
from compress.formats.llamacpp import head as gguf_head
from compress.formats.torch_runtime import head as checkpoint_head
from compress.models.checkpoint import load_model
from compress.models.gguf_header import read_fields
from compress.models.head import Head
from compress.models.tokenizer import load_tokenizer
from compress.quant.settings import Allocation, GridName
from compress.score.fidelity import States, hidden_of
from compress.score.parity import (
    GREEDY,
    TOP1_GAP,
    greedy,
    numbers_of,
    parity,
    strings,
    top1_beyond_gap,
    twin_of,
    values_differing,
)
from compress.stages.ptq import Ptq

ROWS = torch.randint(3, 300, (3, 49), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def parent(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("parent"))


@pytest.fixture(scope="module")
def quantized(parent, tmp_path_factory) -> tuple[Path, Path]:
    """A Q4_0 checkpoint and its file."""
    folder = tmp_path_factory.mktemp("quantized")
    Ptq(grid=GridName.q4_0).run(parent, folder / "hf", None)
    export_gguf(folder / "hf", folder / "m.gguf", "Q4_0")
    return folder / "hf", folder / "m.gguf"


def states_of(file: Path) -> States:
    llama = LlamaCpp(file, 1, 64)
    try:
        return States(torch.cat(llama.hidden_states(ROWS[:, :-1].tolist())), gguf_head(file))
    finally:
        llama.close()


def measured(checkpoint: Path, file: Path, kind: str) -> dict[str, float]:
    return parity(checkpoint, file, f"gguf:{kind}", ROWS, states_of(file), 1)


@pytest.mark.parametrize(
    "kind", ["F16", "Q8_0", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4", "NVFP4"]
)
def test_a_rounded_export_of_a_plain_checkpoint_is_its_rounded_twin(parent, tmp_path, kind):
    if kind == "NVFP4":  # which needs rows of 64
        parent = tiny_checkpoint(tmp_path / "wide", intermediate_size=192)
    export_gguf(parent, tmp_path / "m.gguf", kind)
    figures = measured(parent, tmp_path / "m.gguf", kind)
    assert (
        figures["parity_values_differing"]
        == figures["parity_strings_differing"]
        == figures["parity_eos_differing_flag"]
        == 0
    )
    assert (
        figures["parity_top1_beyond_gap"] == 1.0
        and 0 < figures["parity_greedy_tokens_count"] <= GREEDY
    )
    assert figures["parity_kl_nats"] < (1e-5 if kind == "F16" else 5e-3)


def test_a_quantized_checkpoint_is_its_own_twin(quantized):
    assert measured(*quantized, "Q4_0")["parity_values_differing"] == 0


def test_one_flipped_byte_of_a_matrix_is_counted_and_refused(quantized, tmp_path):
    checkpoint, file = quantized
    data, tensors = bytearray(file.read_bytes()), read_fields(file)[1]
    place = (
        next(t for t in tensors if t.name == "blk.1.ffn_up.weight").data_offset + 2
    )  # two codes of the first block, behind its scale
    data[place] ^= 0x11
    (tmp_path / "m.gguf").write_bytes(data)
    assert (
        values_differing(
            numbers_of(twin_of(checkpoint, "gguf:Q4_0")),
            decode_gguf(*read_fields(tmp_path / "m.gguf")),
        )
        == 2
    )
    with pytest.raises(
        ValueError,
        match=(
            r"m.gguf is not the checkpoint it was made of.*parity_values_differing is 2, at most 0"
            r" is allowed"
        ),
    ):
        measured(checkpoint, tmp_path / "m.gguf", "Q4_0")


def test_more_first_choices_may_turn_where_activations_are_rounded_by_256(
    tmp_path, parent, quantized, monkeypatch
):
    wide = tiny_checkpoint(
        tmp_path / "wide", hidden_size=256, intermediate_size=256, initializer_range=0.03
    )
    export_gguf(wide, tmp_path / "m.gguf", "Q4_K")
    monkeypatch.setattr("compress.score.parity.top1_beyond_gap", lambda *_: 0.992)
    monkeypatch.setattr("compress.score.parity.closeness", lambda *_: {"kl": 0.008})
    figures = measured(wide, tmp_path / "m.gguf", "Q4_K")
    assert figures["parity_top1_beyond_gap"] == 0.992 and figures["parity_kl_nats"] == 0.008

    # By one matrix of a mixture that has such blocks; without one, as before.
    allocate = Allocation(bits_per_weight=4.6, grids=[GridName.q4_k, GridName.q8_0])
    Ptq(allocate=allocate).run(wide, tmp_path / "mixed", make_context(wide, tmp_path))
    export_gguf(tmp_path / "mixed", tmp_path / "mixed.gguf", "MIXED")
    measured(tmp_path / "mixed", tmp_path / "mixed.gguf", "MIXED")
    refused = r"kl_nats is 0\.008, at most 0\.005 .* is 0\.992000, at least 0\.995 is needed"
    with pytest.raises(ValueError, match=refused):
        measured(*quantized, "Q4_0")
    monkeypatch.setattr("compress.score.parity.top1_beyond_gap", lambda *_: 0.989)
    with pytest.raises(ValueError, match=r"beyond_gap is 0\.989000, at least 0\.99 is needed"):
        measured(wide, tmp_path / "m.gguf", "Q4_K")


def test_another_models_file_is_refused_naming_every_figure(quantized, tmp_path):
    torch.manual_seed(5)
    other = tiny_checkpoint(tmp_path / "other", initializer_range=0.3)
    export_gguf(other, tmp_path / "m.gguf", "Q4_0")
    with pytest.raises(
        ValueError,
        match=(
            r"parity_values_differing is \d+.*parity_kl_nats is .*at most"
            r" 0.005.*parity_top1_beyond_gap is 0"
        ),
    ):
        measured(quantized[0], tmp_path / "m.gguf", "Q4_0")


def test_another_end_of_sequence_is_refused(quantized, tmp_path):
    shutil.copytree(quantized[0], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    with pytest.raises(ValueError, match="parity_eos_differing_flag is 1"):
        measured(tmp_path / "hf", quantized[1], "Q4_0")


def test_one_of_several_ends_of_sequence_is_enough(quantized, tmp_path):
    shutil.copytree(quantized[0], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"eos_token_id": [7, 2]}))
    assert measured(tmp_path / "hf", quantized[1], "Q4_0")["parity_eos_differing_flag"] == 0


def test_another_tokenizer_is_refused(quantized, tmp_path):
    shutil.copytree(quantized[0], tmp_path / "hf")
    tokenizer = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"parity_strings_differing is \d+"):
        measured(tmp_path / "hf", quantized[1], "Q4_0")


def test_top1_counts_only_where_the_twin_is_sure():
    head = Head(torch.eye(3))
    twin = States(torch.tensor([[1.0, 0.0, 0.0], [0.0, TOP1_GAP / 2, 0.0], [0.0, 0.0, 2.0]]), head)
    shipped = States(torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]), head)
    assert top1_beyond_gap(twin, shipped) == 1.0
    assert top1_beyond_gap(twin, States(shipped.hidden_NH.flip(1), head)) == 0.0


def test_greedy_stops_at_the_first_token_the_twin_would_not_have_said(parent):
    twin, prompt = twin_of(parent, "gguf:F16"), ROWS[0, :8]
    said = twin.generate(prompt[None], max_new_tokens=6, do_sample=False, eos_token_id=None)[
        0, 8:
    ].tolist()
    assert greedy(twin, said, prompt.tolist()) == (6, 0.0)
    spoiled = [*said[:3], (said[3] + 1) % 300, *said[4:]]
    count, gap = greedy(twin, spoiled, prompt.tolist())
    assert count == 3 and gap > 0


def test_a_thousand_strings_come_from_the_held_out_text(parent):
    tokenizer = load_tokenizer(parent)
    rows = torch.randint(3, 300, (20, 129), generator=torch.Generator().manual_seed(1))
    made = list(strings(tokenizer, rows))
    text = tokenizer.decode(rows.flatten(), skip_special_tokens=True)
    assert (
        len(made) == min(1000, len(text))
        and all(s and s in text for s in made)
        and len(set(made)) > 500
    )


def packed(checkpoint: Path, folder: Path) -> dict[str, float]:
    """Parity of a compressed-tensors directory, its states computed as the scorer does."""
    states = States(hidden_of(load_model(folder), ROWS), checkpoint_head(folder))
    return parity(checkpoint, folder, "compressed_tensors", ROWS, states, 1)


def test_a_packed_directory_is_the_checkpoint_to_the_last_bit(quantized, tmp_path):
    export_compressed_tensors(quantized[0], tmp_path / "packed")
    figures = packed(quantized[0], tmp_path / "packed")
    assert figures.keys() == measured(*quantized, "Q4_0").keys()
    assert (
        figures["parity_values_differing"]
        == figures["parity_strings_differing"]
        == figures["parity_eos_differing_flag"]
        == 0
    )
    assert figures["parity_kl_nats"] < 1e-9 and figures["parity_top1_beyond_gap"] == 1.0
    assert figures["parity_greedy_tokens_count"] == GREEDY


@pytest.mark.parametrize("damage", ["code", "eos", "tokenizer"])
def test_a_packed_directory_that_differs_is_refused(quantized, tmp_path, damage):
    export_compressed_tensors(quantized[0], tmp_path / "packed")
    config, weights = (
        json.loads((tmp_path / "packed/config.json").read_text()),
        load_file(tmp_path / "packed/model.safetensors"),
    )
    if damage == "code":
        weights["model.layers.1.mlp.up_proj.weight_packed"][0, 0] ^= 1
        save_file(weights, tmp_path / "packed/model.safetensors", metadata={"format": "pt"})
    elif damage == "eos":
        (tmp_path / "packed/config.json").write_text(json.dumps(config | {"eos_token_id": 7}))
    else:
        tokenizer = json.loads((tmp_path / "packed/tokenizer.json").read_text())
        tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:5]
        (tmp_path / "packed/tokenizer.json").write_text(json.dumps(tokenizer))
    figure = {
        "code": "values_differing is 1,",
        "eos": "eos_differing_flag is 1,",
        "tokenizer": "strings_differing is [1-9]",
    }[damage]
    with pytest.raises(
        ValueError, match=f"packed is not the checkpoint it was made of.*parity_{figure}"
    ):
        packed(quantized[0], tmp_path / "packed")
