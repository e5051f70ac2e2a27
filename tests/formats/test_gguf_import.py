"""Teachers from any GGUF: what transformers makes of a file is the checkpoint that it was made
of, llama.cpp agrees, and what would come back as another model is refused. Parts are joined; pieces
of a package are put together, with the terms that they come under.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import gguf as gguf_package
import pytest
import torch
from test_gguf import tiny_checkpoint
from tiny_families import build
from tokenizers import processors

from compress.formats import gguf_import, llamacpp
from compress.formats.gguf import export_gguf
from compress.formats.gguf_sentencepiece import UNKNOWN, USER_DEFINED
from compress.formats.gguf_tokenizer import read_tokenizer
from compress.models.checkpoint import load_model, save_model
from compress.models.gguf_header import read_fields
from compress.models.head import hidden_states
from compress.models.tokenizer import load_tokenizer
from compress.models.vocabulary import difference, merges_of, vocabulary_of
from compress.prune.tokenizer_cut import read_bpe, write_cut
from compress.stages.prune_vocab import cut_rows
from compress.store import Store
from compress.teacher import TERMS, check_importable, import_gguf, open_teacher
from compress.text.sources import documents

TEXTS = [str(text) for text in documents("embedded:topics")[30:34]]
IDS = torch.randint(4, 512, (2, 40), generator=torch.Generator().manual_seed(0))
FAMILY = {"gemma3": "gemma3_text"}  # general.architecture -> model_type, where they differ


def silent(message: str) -> None:
    """Where nothing is logged."""


def logits(checkpoint: Path) -> torch.Tensor:
    with torch.inference_mode():
        return load_model(checkpoint)(IDS % 300).logits


@pytest.mark.parametrize("family", gguf_import.READ)
def test_a_file_comes_back_as_the_checkpoint_it_was_made_of(tmp_path, family):
    checkpoint = build(FAMILY.get(family, family), tmp_path / "hf")
    export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    import_gguf(tmp_path / "m.gguf", tmp_path / "back", TEXTS)
    assert torch.equal(logits(tmp_path / "back"), logits(checkpoint))

    # Its tokenizer too.
    theirs, ours = load_tokenizer(checkpoint), load_tokenizer(tmp_path / "back")
    for text in TEXTS:
        assert ours.encode(text[:400]) == theirs.encode(text[:400])
        assert ours.decode(ours.encode(text[:400])) == theirs.decode(theirs.encode(text[:400]))


def test_a_model_that_differs_from_its_file_is_refused(tmp_path):
    checkpoint = build("gemma2", tmp_path / "hf")
    export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    limits = gguf_import.check_import(tmp_path / "m.gguf", model, tokenizer, TEXTS, 256, 1)
    assert limits["states"] < 3e-3 and limits["strings"] == 0
    model.config.layer_types = ["full_attention"] * 3
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
        layer.self_attn.layer_type = "full_attention"
    with pytest.raises(ValueError, match="comes back as another model: hidden states are"):
        gguf_import.check_import(tmp_path / "m.gguf", model, tokenizer, TEXTS, 256, 1)


def test_what_would_come_back_wrong_is_refused_by_the_header(tmp_path):
    for name, words in (("llama", "rope_freqs.weight"), ("mixtral", "is unknown")):
        export_gguf(build(name, tmp_path / name), tmp_path / f"{name}.gguf", "F16")
        with pytest.raises(ValueError, match=words):
            check_importable(tmp_path / f"{name}.gguf")
    export_gguf(build("granite", tmp_path / "granite"), tmp_path / "g.gguf", "F16")
    with pytest.raises(ValueError, match="architecture 'granite' can't be imported; allowed"):
        check_importable(tmp_path / "g.gguf")
    with pytest.raises(ValueError, match="rope scaling 'yarn'"):
        about = {"general.architecture": "qwen2", "qwen2.rope.scaling.type": "yarn"}
        gguf_import.check_readable(tmp_path / "q.gguf", about, {})


def runs_taken_first(file: Path, out: Path) -> None:
    """A copy that says of runs of spaces what Gemma's own files say: user defined, spelled with
    spaces, of no score.
    """
    fields = read_fields(file)[0]
    tokens = fields["tokenizer.ggml.tokens"]
    runs = [i for i, token in enumerate(tokens) if len(token) > 1 and not token.strip("▁")]
    assert len(runs) > 2
    changed = {"tokens": list(tokens), "scores": [], "token_type": []}
    for name in ("scores", "token_type"):
        changed[name] = list(fields[f"tokenizer.ggml.{name}"])
    for i in runs:
        changed["tokens"][i] = " " * len(tokens[i])
        changed["scores"][i], changed["token_type"][i] = -1000.0, USER_DEFINED

    writer = gguf_package.GGUFWriter(out, fields["general.architecture"])
    for name, field in gguf_package.GGUFReader(file).fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        array = field.types[0] == gguf_package.GGUFValueType.ARRAY
        value = changed.get(name.removeprefix("tokenizer.ggml."), field.contents())
        writer.add_key_value(
            name, value, field.types[0], sub_type=field.types[-1] if array else None
        )
    for tensor in read_fields(file)[1]:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory) -> Path:
    """A GGUF of a tiny Gemma 3 whose runs of spaces are taken from a text before anything else."""
    folder = tmp_path_factory.mktemp("gemma")
    parent = build("gemma3_text", folder / "hf")
    bpe = read_bpe(parent)

    # Tokens of more than a run stand behind at most one space.
    kept = [i for token, i in bpe.ids.items() if "▁▁" not in token or not token.strip("▁")]
    (folder / "cut").mkdir()
    write_cut(parent, folder / "cut", sorted(kept))
    model = load_model(parent)
    cut_rows(model, torch.tensor(sorted(kept)))
    save_model(model, folder / "cut", folder / "cut", dtype=torch.float32)
    export_gguf(folder / "cut", folder / "plain.gguf", "F16")
    runs_taken_first(folder / "plain.gguf", folder / "m.gguf")
    return folder / "m.gguf"


def test_runs_of_spaces_that_a_file_takes_first_are_merged_before_everything_else(
    gemma_like, tmp_path
):
    figures = import_gguf(gemma_like, tmp_path / "back", TEXTS)
    assert figures["strings"] == 0
    tokenizer = load_tokenizer(tmp_path / "back")
    assert "▁▁" in tokenizer.tokenize("it.  The")

    # What ships of it has its ids and is known to have them.
    export_gguf(tmp_path / "back", tmp_path / "again.gguf", "F16")
    again = import_gguf(tmp_path / "again.gguf", tmp_path / "twice", TEXTS)
    assert again["strings"] == 0
    shipped = vocabulary_of(tmp_path / "again.gguf")
    assert difference(shipped, vocabulary_of(gemma_like)) == ""
    assert difference(shipped, vocabulary_of(tmp_path / "back")) == ""


def test_tokens_that_are_taken_from_a_text_first_have_no_merges():
    tokens = ["<unk>", "\n", "\n\n", "▁", "▁▁", "a", "▁a", "\t", "\t\t"]
    kinds = [UNKNOWN, USER_DEFINED, USER_DEFINED, 1, USER_DEFINED, 1, 1, *[USER_DEFINED] * 2]
    scores = [-1000.0, -1000.0, -1000.0, -2.0, -1000.0, -3.0, 0.0, -1000.0, -1000.0]
    assert merges_of(tokens, kinds, scores) == [("▁", "▁"), ("▁", "a")]


def test_every_text_that_is_compared_begins_as_the_tokenizer_begins_it(tmp_path, monkeypatch):
    checkpoint = build("gemma3_text", tmp_path / "hf")
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A $B", [(bos, tokenizer.bos_token_id)]
    )
    compared: list[list[int]] = []

    class Twin:
        """In place of llama.cpp, the model itself."""

        def __init__(self, *settings: object) -> None:
            self.context = settings[2]

        def hidden_states(self, rows: list[list[int]]) -> list[torch.Tensor]:
            compared.extend(rows)
            assert all(len(row) <= self.context for row in rows)
            return [hidden_states(model, torch.tensor([row])) for row in rows]

        def tokenize(self, text: str) -> list[int]:
            return tokenizer.encode(text, add_special_tokens=False)

        def close(self) -> None:
            """Nothing to close."""

    monkeypatch.setattr(llamacpp, "LlamaCpp", Twin)
    with torch.inference_mode():
        figures = gguf_import.check_import(tmp_path / "m", model, tokenizer, TEXTS, 48, 1)
    assert figures == {"states": 0.0, "strings": 0}
    assert [row[0] for row in compared] == [tokenizer.bos_token_id] * 3


def split(file: Path, folder: Path) -> list[Path]:
    """Two parts as llama.cpp's own tool writes them."""
    folder.mkdir()
    reader = gguf_package.GGUFReader(file)
    tensors = read_fields(file)[1]
    parts = [folder / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for i, part in enumerate(parts):
        writer = gguf_package.GGUFWriter(part, "qwen2")
        for name, field in reader.fields.items():
            if i == 0 and not name.startswith("GGUF.") and name != "general.architecture":
                array = field.types[0] == gguf_package.GGUFValueType.ARRAY
                writer.add_key_value(
                    name,
                    field.contents(),
                    field.types[0],
                    sub_type=field.types[-1] if array else None,
                )
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[i::2]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return parts


def test_all_parts_of_a_file_are_one_teacher(tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    checkpoint = tiny_checkpoint(tmp_path / "hf", kind=(Qwen2Config, Qwen2ForCausalLM))
    export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    parts = split(tmp_path / "m.gguf", tmp_path / "parts")
    teacher = open_teacher(str(parts[0]), None, Store(str(tmp_path / "store")), silent)
    import_gguf(tmp_path / "m.gguf", tmp_path / "back", TEXTS)
    assert torch.equal(logits(teacher.path), logits(tmp_path / "back"))

    parts[1].unlink()
    with pytest.raises(ValueError, match="m-00002-of-00002.gguf are not beside it; copy all parts"):
        open_teacher(str(parts[0]), None, Store(str(tmp_path / "store")), silent)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package whose GGUF lies in pieces in two more, with terms and a sum."""
    checkpoint = build("gemma3_text", tmp_path / "hf")
    export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    data = (tmp_path / "m.gguf").read_bytes()
    place = tmp_path / "site"
    for i, piece in enumerate((data[:100_000], data[100_000:]), 1):
        folder = place / f"small_model_part{i}" / "data"
        folder.mkdir(parents=True)
        (folder.parent / "__init__.py").write_text("raise ImportError('never imported')\n")
        (folder / f"small.gguf.part0{i - 1}").write_bytes(piece)
    folder = place / "small_model" / "data"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise ImportError('never imported')\n")
    (folder / "SMALL_TERMS.html").write_text("Be kind.")
    (folder / "SHA256SUMS").write_text(f"{hashlib.sha256(data).hexdigest()}  small.gguf\n")
    monkeypatch.syspath_prepend(str(place))
    return folder


def test_pieces_of_a_package_are_put_together_and_its_terms_are_told_and_kept(package, tmp_path):
    store, told = Store(str(tmp_path / "store")), []
    teacher = open_teacher("packaged:small_model", None, store, told.append)
    assert (teacher.path / TERMS / "SMALL_TERMS.html").read_text() == "Be kind."
    assert any("terms" in line and str(teacher.path / TERMS) in line for line in told)
    assert teacher.gguf is not None and teacher.gguf.name == "small.gguf"
    assert torch.equal(logits(teacher.path), logits(tmp_path / "hf"))


def test_pieces_with_another_sum_are_refused(package, tmp_path):
    (package / "SHA256SUMS").write_text(f"{'0' * 64}  small.gguf\n")
    with pytest.raises(ValueError, match="has not the sum that it names; install it again"):
        open_teacher("packaged:small_model", None, Store(str(tmp_path / "store")), silent)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3"])
def test_the_tokenizer_of_a_converted_file_reads_back(tmp_path, name):
    checkpoint = build(name, tmp_path / "hf")
    export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    (tmp_path / "t").mkdir()
    read_tokenizer(read_fields(tmp_path / "m.gguf")[0], tmp_path / "t")
    shutil.copyfile(checkpoint / "config.json", tmp_path / "t" / "config.json")
    ours, theirs = load_tokenizer(tmp_path / "t"), load_tokenizer(checkpoint)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert json.loads((tmp_path / "t" / "tokenizer.json").read_text())["model"]["type"] == "BPE"
