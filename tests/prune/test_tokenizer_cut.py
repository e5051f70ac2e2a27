"""A tokenizer's files without some of its tokens, of both kinds of BPE; other kinds are refused."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from compress.prune.tokenizer_cut import read_bpe, renumbered, write_cut
from compress.prune.vocabulary import Usage, kept_ids

WORDS = "the then there other another mother brothers bother bathe lather rather weather whether"


def random_strings(count, seed=0):
    """Strings of all Unicode planes, surrogates aside, with words and runs of spaces between."""
    draw = random.Random(seed)
    planes = [
        (0x20, 0x7F),
        (0x80, 0xD7FF),
        (0xE000, 0xFFFF),
        (0x10000, 0x3FFFF),
        (0x40000, 0x10FFFF),
    ]
    for _ in range(count):
        letters = [chr(draw.randint(*draw.choice(planes))) for _ in range(draw.randint(1, 12))]
        yield "".join(letters) + " " * draw.randint(0, 3) + draw.choice(WORDS.split())


def cut(checkpoint, out, keep, counts=None):
    bpe = read_bpe(checkpoint)
    kept = kept_ids(bpe.ids, bpe.merges, Usage(Counter(counts or {}), {}), keep, bpe.protected)
    out.mkdir()
    return kept.ids, write_cut(checkpoint, out, kept.ids)


@pytest.fixture
def fallback(tiny_teacher, tmp_path):
    """A checkpoint whose tokenizer is BPE with byte fallback and a BOS before every text, as Llama
    2's and Gemma's are.
    """
    folder = tmp_path / "fallback"
    shutil.copytree(tiny_teacher, folder)
    special = ["<pad>", "<bos>", "<eos>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=[*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, WORDS.title()] * 4, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        t for t in state["added_tokens"] if t["content"] in (*special, "<unk>")
    ]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).unlink()
    fast.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["byte level", "byte fallback"])
def test_any_text_comes_back_from_the_tokens_that_are_left(kind, tiny_teacher, fallback, tmp_path):
    parent = tiny_teacher if kind == "byte level" else fallback
    kept, _ = cut(parent, tmp_path / "out", 300)
    before, after = (
        AutoTokenizer.from_pretrained(parent),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert sorted(after.get_vocab().values()) == list(range(300))
    for text in random_strings(2000):
        ids = after.encode(text)
        assert after.decode(ids, skip_special_tokens=True) == text
        # Pieces of the larger's tokens, in its numbers, write the same.
        assert before.decode([kept[i] for i in ids], skip_special_tokens=True) == text


def test_special_tokens_templates_and_ends_follow(fallback, tmp_path):
    (fallback / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, 40], "pad_token_id": 0, "suppress_tokens": [7]})
    )
    state = json.loads((fallback / "tokenizer.json").read_text())
    state["added_tokens"].append(
        {"id": 40, "content": "<0x24>", "special": True, "normalized": False, "single_word": False,
         "lstrip": False, "rstrip": False}
    )  # fmt: skip
    state["padding"] = {
        "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
    }  # fmt: skip
    (fallback / "tokenizer.json").write_text(json.dumps(state))
    kept, ends = cut(fallback, tmp_path / "out", 290, dict.fromkeys(range(0, 380, 2), 1))
    new = {old: i for i, old in enumerate(kept)}
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after("the")["input_ids"][0] == after.bos_token_id == new[1]
    assert after.convert_tokens_to_ids("<eos>") == new[2]
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == [new[7]] and generation["pad_token_id"] == new[0]
    assert set(generation["eos_token_id"]) == set(ends) == {new[2], new[40]}


def test_the_older_files_say_the_same(tiny_teacher, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(tiny_teacher, parent)
    state = json.loads((parent / "tokenizer.json").read_text())["model"]
    (parent / "vocab.json").write_text(json.dumps(state["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in state["merges"])]
    (parent / "merges.txt").write_text("\n".join(lines) + "\n")
    (parent / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": 0}))
    (parent / "tokenizer.model").write_bytes(b"of other ids")
    cut(parent, tmp_path / "out", 400)
    after = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]
    assert json.loads((tmp_path / "out" / "vocab.json").read_text()) == after["vocab"]
    merges = (tmp_path / "out" / "merges.txt").read_text().splitlines()
    assert merges == ["#version: 0.2", *(" ".join(merge) for merge in after["merges"])]
    assert json.loads((tmp_path / "out" / "added_tokens.json").read_text()) == {"<|endoftext|>": 0}
    assert not (tmp_path / "out" / "tokenizer.model").exists()


def test_ids_are_numbered_anew_wherever_a_configuration_names_them():
    about = {
        "eos_token_id": [2, 3],
        "pad_token_id": None,
        "vocab_size": 9,
        "inner": {"bos_token_id": 3, "layer_ids": [3]},
        "decoder_start_token_id": -1,
    }
    assert renumbered(about, {2: 0, 3: 1}.__getitem__) == about | {
        "eos_token_id": [0, 1],
        "inner": {"bos_token_id": 1, "layer_ids": [3]},
    }


def tokenizer_of(folder, model, **changes):
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    state = json.loads(tokenizer.to_str())
    state["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            models.Unigram([("a", 0.0), ("b", -1.0)], 0, False),
            {},
            "its model is Unigram; tokens can",
        ),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), {}, "its model is WordPiece"),
        (models.BPE({"a": 0, "b": 1}, []), {}, "its BPE is neither byte-level nor with byte fall"),
        (models.BPE({"a": 0}, [], byte_fallback=True), {"end_of_word_suffix": "</w>"}, "or marks"),
    ],
)
def test_another_kind_of_tokenizer_is_refused_by_name(
    tiny_teacher, tmp_path, model, changes, message
):
    folder = tmp_path / "other"
    shutil.copytree(tiny_teacher, folder)
    tokenizer_of(folder, model, **changes)
    with pytest.raises(ValueError, match=message):
        read_bpe(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json, the only kind"):
        read_bpe(folder)
