"""Shapes of a teacher: levels, configs, exact parameters and bytes."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from compress.formats.gguf import export_gguf
from compress.models.checkpoint import read_config
from compress.prune.tokenizer_cut import read_bpe
from compress.prune.vocabulary import Usage
from compress.search.shapes import Family, Shape, shape_of, steps_of
from compress.search.sizes import Sizes, Skeletons
from compress.stages.prune_vocab import PruneVocab
from compress.text.packing import pack

ROWS = {
    "depth": {"calibration_sequences": 4, "fold_sequences": 16},
    "heads": {"calibration_sequences": 16},
    "narrow": {"calibration_sequences": 16},
}


@pytest.fixture
def family(tiny_teacher):
    return Family(read_config(tiny_teacher), "iq4_nl", len(read_bpe(tiny_teacher).protected))


def reading(context, checkpoint, folder):
    """The context of a stage behind `checkpoint`: text in its tokens, as a session gives it."""
    text = pack(
        ["embedded:topics"], context.teacher, context.seq_len, folder / "data", tokens_of=checkpoint
    )
    return dataclasses.replace(
        context, text=lambda: text, calibration=lambda n: text.ids[:n, :-1].long()
    )


def test_levels_begin_with_the_teacher_and_end_where_text_can_still_be_written(family):
    assert family.full == Shape(512, 4, 192, 2) == family.levels.full
    assert family.levels.ids == (512, 448, 384, 320)
    assert family.levels.blocks == (4, 3, 2) and family.levels.ffn == (192, 128)
    assert family.levels.kv_heads == (2, 1)
    assert all(family.config_of(shape) for shape in family.levels.shapes())


def test_levels_of_a_real_teacher_are_few_multiples_of_64():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "num_hidden_layers": 30,
        "intermediate_size": 14336,
        "num_key_value_heads": 1,
        "num_attention_heads": 8,
        "hidden_size": 512,
    }
    levels = Family(config, "q4_0", None).levels
    assert levels.ids == (49152,) and levels.blocks[-1] == 15 and levels.kv_heads == (1,)
    assert len(levels.ffn) == 17 and not any(level % 64 for level in levels.ffn)
    ids = Family(config, "q4_0", 300).levels.ids
    assert ids[:6] == (49152, 43008, 39936, 36864, 32768, 30720)
    assert ids[6:] == (27648, 24576, 21504, 18432)


def test_an_architecture_or_rows_without_a_place_are_refused(family):
    with pytest.raises(ValueError, match="architecture GPT2"):
        Family(family.config | {"architectures": ["GPT2LMHeadModel"]}, "q4_0", None)
    with pytest.raises(ValueError, match="multiple of 256"):
        Family(family.config, "q4_k", None)


def test_a_step_stays_on_the_levels(family):
    levels, full = family.levels, family.full
    assert levels.stepped(full, "blocks", 1) == full._replace(blocks=3)
    assert levels.stepped(full, "blocks", -1) is None and levels.stepped(full, "ffn", 2) is None


def test_every_shape_is_made_by_as_few_stages_as_it_needs(family):
    assert steps_of(family.full, family.full) == {}
    rows = {"narrow": {"calibration_sequences": 3}}
    steps = steps_of(Shape(448, 3, 128, 2), family.full, rows)
    assert list(steps) == ["depth", "vocab", "narrow"]
    assert (steps["depth"].blocks, steps["vocab"].ids, steps["narrow"].ffn) == (1, 448, 128)
    assert steps["narrow"].calibration_sequences == 3


@pytest.mark.parametrize("shape", [(512, 4, 192, 2), (448, 2, 128, 1)])
def test_parameters_and_bytes_are_those_of_the_real_file(shape, family, context, tmp_path):
    shape = Shape(*shape)
    usage = PruneVocab().usage(context.teacher, context)
    skeletons = Skeletons(context.teacher, lambda: usage, tmp_path / "skeletons")
    sizes = Sizes(family, skeletons.header_bytes)

    # Really cut, stage by stage, and exported: an oracle that knows no formula.
    path = context.teacher
    for slot, stage in steps_of(shape, family.full, ROWS).items():
        stage.run(path, tmp_path / slot, reading(context, path, tmp_path))
        path = tmp_path / slot
    export_gguf(path, tmp_path / "model.gguf", "IQ4_NL")

    assert shape_of(read_config(path)) == shape
    assert sizes.file_bytes(shape) == (tmp_path / "model.gguf").stat().st_size
    assert family.config_of(shape)["intermediate_size"] == shape.ffn
    from compress.score.size import size

    assert sizes.params(shape) == size(tmp_path / "model.gguf")["params"]


def test_more_than_ten_blocks_have_longer_names_and_are_still_exact(tiny_teacher, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from compress.models.checkpoint import save_model

    config = read_config(tiny_teacher) | {"num_hidden_layers": 15}
    about = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    save_model(LlamaForCausalLM(about), tmp_path / "deep", tokenizer_from=tiny_teacher)
    family = Family(read_config(tmp_path / "deep"), "q8_0", None)
    skeletons = Skeletons(tmp_path / "deep", lambda: Usage(Counter(), {}), tmp_path / "skeletons")
    export_gguf(tmp_path / "deep", tmp_path / "model.gguf", "Q8_0")
    size = (tmp_path / "model.gguf").stat().st_size
    assert Sizes(family, skeletons.header_bytes).file_bytes(family.full) == size


def test_every_tensor_takes_whole_multiples_of_32_bytes(family):
    part = Sizes(family, lambda ids: 0)._part(
        {"model.norm.weight": (3,), "lm_head.weight": (3, 32)}
    )
    assert part.weight_bytes == 32 + 64 and part.params == 3 + 96 and part.tensors == 2
    names = len("output_norm.weight") + len("output.weight")
    assert part.record_bytes == 2 * (8 + 4 + 4 + 8) + names + 8 * (1 + 2)
