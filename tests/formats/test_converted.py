"""Families whose GGUF llama.cpp's converter writes: each as a tiny random model says in llama.cpp
what it says in transformers, with our codes byte for byte; what a file can't say is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_gguf import tiny_checkpoint
from tiny_families import IN_GGUF, build, quantize
from tiny_tokenizers import fallback, tokenizer_of
from transformers import AutoConfig

from compress.errors import ConfigError
from compress.formats import converter, gguf, gguf_sentencepiece, llama_conversion
from compress.formats.families import FAMILIES
from compress.formats.gguf_tokenizer import PRE_KEY, PRE_TOKENIZERS, pre_name
from compress.formats.llamacpp import LlamaCpp
from compress.formats.llamacpp import head as gguf_head
from compress.formats.onnx import ARCHITECTURES as onnx
from compress.models.checkpoint import load_model
from compress.models.gguf_header import read_fields
from compress.models.head import hidden_states
from compress.models.tokenizer import load_tokenizer
from compress.models.vocabulary import difference, is_cut_of, vocabulary_of
from compress.quant.codes import load_quantized
from compress.quant.grids import GRIDS
from compress.quant.settings import Method
from compress.score.fidelity import States
from compress.score.parity import figures, parity, strings
from compress.stages.prune_experts import PruneExperts
from compress.stages.ptq import Ptq
from compress.text.sources import documents

IDS = torch.randint(4, 512, (3, 49), generator=torch.Generator().manual_seed(3))
TEXT = "".join(str(text) for text in documents("embedded:topics")[30:40])


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Name in IN_GGUF -> its checkpoint, made once."""
    folder = tmp_path_factory.mktemp("families")
    made: dict[str, Path] = {}

    def checkpoint(name: str) -> Path:
        if name not in made:
            made[name] = build(name, folder / name.replace(" ", "_"))
        return made[name]

    return checkpoint


def states_of(file: Path, ids: torch.Tensor) -> torch.Tensor:
    llama = LlamaCpp(file, 1, 256, 1)
    try:
        return torch.cat(llama.hidden_states(ids.tolist()))
    finally:
        llama.close()


def distance(name: str, file: Path, checkpoint: Path) -> float:
    """Of hidden states, relative. Of a mixture the least of three rows: where two experts are
    nearly as good, arithmetic decides, and all later states differ.
    """
    model = load_model(checkpoint)
    rows = 3 if name in FAMILIES and FAMILIES[name].published else 1
    ids = IDS[:rows, :40]
    with torch.inference_mode():
        expected = hidden_states(model, ids).view(rows, 40, -1)
    difference = states_of(file, ids).view_as(expected) - expected
    return float((difference.flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).min())


@torch.inference_mode()
def continued(model, ids: list[int], count: int) -> list[int]:
    written = list(ids)
    for _ in range(count):
        written.append(int(model(torch.tensor([written])).logits[0, -1].argmax()))
    return written[len(ids) :]


def strings_differing(checkpoint: Path, llama: LlamaCpp, count: int) -> int:
    tokenizer = load_tokenizer(checkpoint)
    ids = torch.tensor(tokenizer.encode(TEXT, add_special_tokens=False))
    return sum(
        llama.tokenize(text) != tokenizer.encode(text, add_special_tokens=False)
        for text in strings(tokenizer, ids, count)
    )


def test_at_least_twenty_five_families_are_proven_and_no_other_is_allowed(checkpoints):
    kinds = {AutoConfig.from_pretrained(checkpoints(name)).model_type for name in IN_GGUF}
    assert kinds == set(FAMILIES)
    assert len(kinds) >= 25 and len(IN_GGUF) >= 30


def family_table() -> str:
    """What docs/deploying.md says: each proven family, and who writes its GGUF."""
    lines = ["| family | its GGUF is written by | ONNX |", "|---|---|---|"]
    for kind in FAMILIES:
        writer = "us, or the converter" if kind in gguf.ARCHITECTURES else "the converter"
        lines.append(f"| {kind} | {writer} | {'yes' if kind in onnx else 'no'} |")
    return "\n".join(lines)


def test_the_page_says_which_family_has_which_format():
    page = Path(__file__).parents[2] / "docs" / "deploying.md"
    assert family_table() in page.read_text()


@pytest.mark.parametrize("name", IN_GGUF)
def test_an_f16_file_says_what_the_checkpoint_says(checkpoints, tmp_path, name):
    checkpoint, file = checkpoints(name), tmp_path / "m.gguf"
    gguf.export_gguf(checkpoint, file, "F16")
    assert distance(name, file, checkpoint) < 3e-3

    # The first prompt that does not end the text.
    model, prompts = load_model(checkpoint), IDS[[1, 2, 0], :20].tolist()
    texts = ((prompt, continued(model, prompt, 8)) for prompt in prompts)
    prompt, expected = next(pair for pair in texts if model.config.eos_token_id not in pair[1])
    llama = LlamaCpp(file, 1, 256, 1, embedding=False)
    said = llama.generate_ids(prompt, 8)
    differing = strings_differing(checkpoint, llama, 50)
    llama.close()
    assert said == expected
    assert differing == 0


@pytest.mark.parametrize("name", IN_GGUF)
def test_codes_land_byte_for_byte_wherever_the_converter_puts_their_rows(
    checkpoints, tmp_path, name
):
    parent, file = checkpoints(name), tmp_path / "m.gguf"
    checkpoint = quantize(parent, tmp_path / "q", "q4_0")
    gguf.export_gguf(checkpoint, file, "Q4_0")

    # The bytes of each row by the numbers that it had before rounding.
    bytes_of = {}
    weights, packed = load_file(parent / "model.safetensors"), load_quantized(checkpoint)
    for key, q in packed.items():
        rows = weights[key].reshape(q.codes.shape).numpy()
        for row, packed_B in zip(rows, GRIDS["q4_0"].pack(q.codes, q.scales).numpy(), strict=True):
            bytes_of[row.tobytes()] = packed_B

    # Where the converter puts those numbers, the file has the bytes.
    plain = converter.expected(parent, "F16", {})
    matrices = [t for t in read_fields(file)[1] if t.tensor_type.name == "Q4_0"]
    for tensor in matrices:
        w = plain[tensor.name].numpy()
        expected = np.stack([bytes_of[row.tobytes()] for row in w.reshape(-1, w.shape[-1])])
        assert (expected == tensor.data.reshape(expected.shape)).all(), tensor.name
    placed = sum(plain[tensor.name].numel() for tensor in matrices)
    assert placed == sum(q.codes.numel() for q in packed.values())

    assert distance(name, file, checkpoint) < 5e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_GGUF)
def test_a_thousand_strings_and_other_grids(checkpoints, tmp_path, name):
    parent, file = checkpoints(name), tmp_path / "m.gguf"
    gguf.export_gguf(parent, file, "F16")
    llama = LlamaCpp(file, 1, 256, 1, embedding=False)
    differing = strings_differing(parent, llama, 1000)
    llama.close()
    assert differing == 0

    for grid in ("iq4_nl", "q8_0"):
        checkpoint = quantize(parent, tmp_path / grid, grid)
        gguf.export_gguf(checkpoint, file, grid.upper())
        assert distance(name, file, checkpoint) < 5e-2


def proven(checkpoint: Path, file: Path, kind: str) -> dict[str, float]:
    shipped = States(states_of(file, IDS[:, :-1]), gguf_head(file))
    return parity(checkpoint, file, f"gguf:{kind}", IDS, shipped, 1)


@pytest.mark.parametrize("name", ["gemma2", "granite", "cohere", "phi", "lfm2", "mixtral"])
def test_parity_proves_a_converted_file(checkpoints, tmp_path, name):
    gguf.export_gguf(checkpoints(name), tmp_path / "m.gguf", "F16")
    figures = proven(checkpoints(name), tmp_path / "m.gguf", "F16")
    assert figures["parity_values_differing"] == figures["parity_strings_differing"] == 0
    assert figures["parity_kl_nats"] < (5e-3 if name == "mixtral" else 1e-5)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
@pytest.mark.parametrize("name", ["qwen3", "lfm2"])
def test_a_rounded_converted_file_is_its_rounded_twin(checkpoints, tmp_path, name, kind):
    gguf.export_gguf(checkpoints(name), tmp_path / "m.gguf", kind)
    figures = proven(checkpoints(name), tmp_path / "m.gguf", kind)
    assert figures["parity_values_differing"] == 0 and figures["parity_kl_nats"] < 5e-3


@pytest.mark.parametrize("name", ["olmoe", "granitemoe", "mixtral"])
def test_experts_without_codes_are_rounded_like_other_matrices(checkpoints, tmp_path, name):
    gguf.export_gguf(checkpoints(name), tmp_path / "m.gguf", "Q8_0")
    kinds = {t.tensor_type.name for t in read_fields(tmp_path / "m.gguf")[1] if "_exps" in t.name}
    assert kinds == {"Q8_0"}
    assert distance(name, tmp_path / "m.gguf", checkpoints(name)) < 5e-2


@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe"])
def test_a_mixture_of_fewer_experts_is_in_its_file_what_it_is_as_a_checkpoint(
    checkpoints, tmp_path, name
):
    """Three experts of four, one for a token; then rounded by what each of them is sent."""
    context = SimpleNamespace(
        calibration=lambda n: torch.randint(4, 512, (n, 32), generator=torch.Generator()),
        precision="fp32",
        label="test",
        log=lambda line: None,
        work=tmp_path,
    )
    cut, rounded = tmp_path / "cut", tmp_path / "rounded"
    for stage, parent, out in (
        (PruneExperts(experts=3, top_k=1, floor_tokens=1), checkpoints(name), cut),
        (Ptq(method=Method.gptq, calibration_sequences=8, floor_tokens=64), cut, rounded),
    ):
        out.mkdir()
        stage.run(parent, out, context)

    for kind, checkpoint in (("F16", cut), ("Q4_0", rounded)):
        file = tmp_path / f"{kind}.gguf"
        gguf.export_gguf(checkpoint, file, kind)
        fields = read_fields(file)[0]
        about = fields["general.architecture"]
        assert fields[f"{about}.expert_count"] == 3 and fields[f"{about}.expert_used_count"] == 1
        assert distance(name, file, checkpoint) < (3e-3 if kind == "F16" else 5e-2)

        # Arithmetic alone sends some tokens of a random mixture to another expert.
        shipped = States(states_of(file, IDS[:, :-1]), gguf_head(file))
        measured = figures(checkpoint, file, f"gguf:{kind}", IDS, shipped, 1)
        assert measured["parity_values_differing"] == measured["parity_strings_differing"] == 0


def test_a_converted_file_that_holds_another_number_is_refused(checkpoints, tmp_path):
    checkpoint = quantize(checkpoints("qwen3"), tmp_path / "q", "q4_0")
    file = tmp_path / "m.gguf"
    gguf.export_gguf(checkpoint, file, "Q4_0")
    assert proven(checkpoint, file, "Q4_0")["parity_values_differing"] == 0
    data = bytearray(file.read_bytes())
    place = next(t for t in read_fields(file)[1] if t.name == "blk.1.attn_k.weight").data_offset
    data[place + 2] ^= 0x11  # two codes of the first block, behind its scale
    file.write_bytes(data)
    with pytest.raises(ValueError, match="parity_values_differing is 2, at most 0 is allowed"):
        proven(checkpoint, file, "Q4_0")


def test_a_file_that_computes_something_else_is_refused(checkpoints, tmp_path):
    """Right numbers, another window: what converts and loads proves nothing."""
    checkpoint = tmp_path / "other"
    shutil.copytree(checkpoints("gemma2"), checkpoint)
    about = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(about | {"sliding_window": 4}))
    gguf.export_gguf(checkpoints("gemma2"), tmp_path / "m.gguf", "F16")
    with pytest.raises(ValueError, match="not the checkpoint it was made of.*parity_kl_nats"):
        proven(checkpoint, tmp_path / "m.gguf", "F16")


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "MIXED"])
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2"])
def test_our_writer_and_the_converter_write_the_same(tmp_path, family, kind):
    import transformers

    classes = (
        getattr(transformers, f"{family}Config"),
        getattr(transformers, f"{family}ForCausalLM"),
    )
    changes = {"sliding_window": None} if family == "Mistral" else {}
    parent = tiny_checkpoint(tmp_path / "hf", tied=family != "Llama", kind=classes, **changes)
    checkpoint = parent
    if kind == "MIXED":
        checkpoint = mixed(parent, tmp_path / "mixed")
    gguf.export_gguf(checkpoint, tmp_path / "ours.gguf", kind)
    quantized = load_quantized(checkpoint) if kind == "MIXED" else {}
    number = gguf.TYPES[gguf._main_type(quantized) if quantized else kind]
    converter.convert(checkpoint, tmp_path / "theirs.gguf", kind, number, quantized)

    # Every tensor, and all metadata but what names the file; theirs says some sizes twice.
    ours, theirs = (read_fields(tmp_path / f"{name}.gguf") for name in ("ours", "theirs"))
    tensors, others = ({t.name: t for t in listed} for _, listed in (ours, theirs))
    assert set(tensors) == set(others)
    for name, tensor in tensors.items():
        assert tensor.tensor_type == others[name].tensor_type, name
        assert (tensor.data == others[name].data).all(), name
    decisive = {key for key in ours[0] if not key.startswith(("general.name", "GGUF."))}
    lacking = {key for key in decisive if key not in theirs[0]}
    assert lacking <= {f"{ours[0]['general.architecture']}.{key}" for key in WIDTHS}
    assert {key: theirs[0][key] for key in decisive - lacking} == {
        key: ours[0][key] for key in decisive - lacking
    }


# Sizes that llama.cpp takes from others where they are not said.
WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count", "vocab_size")


def mixed(parent: Path, out: Path) -> Path:
    """A copy with every second matrix on Q8_0, others on Q4_0."""
    from safetensors.torch import save_file

    from compress.quant.codes import FILE, Quantized

    shutil.copytree(parent, out)
    weights, packed, grids = load_file(parent / "model.safetensors"), {}, {}
    for i, name in enumerate(name for name, w in weights.items() if w.dim() == 2):
        grids[name] = ("q4_0", "q8_0")[i % 2]
        q = Quantized(grids[name], *GRIDS[grids[name]].encode(weights[name], name))
        weights[name] = q.decode()
        packed |= {f"{name}.codes": q.codes, f"{name}.scales": q.scales}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    save_file(packed, out / FILE, metadata={"grids": json.dumps(grids)})
    return out


def test_matrices_of_two_grids_in_one_tensor_are_refused_by_name(checkpoints, tmp_path):
    checkpoint = mixed(checkpoints("gpt_neox"), tmp_path / "m")
    gguf.export_gguf(checkpoint, tmp_path / "m.gguf", "MIXED")  # fused in the checkpoint already
    rows = converter.Rows()
    w = np.random.default_rng(0).normal(size=(4, 32)).astype(np.float32)
    rows.feed("a", w[:2], np.zeros((2, 18), np.uint8), "Q4_0")
    rows.feed("b", w[2:], np.zeros((2, 34), np.uint8), "Q8_0")
    with pytest.raises(ValueError, match=r"blk.0.attn_qkv.* on Q4_0, Q8_0; give them one grid"):
        rows.take("blk.0.attn_qkv.weight", w)


def test_rows_that_were_transposed_or_scaled_and_those_without_a_place_are_refused():
    rows = converter.Rows()
    w = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    rows.feed("model.up", w, np.zeros((32, 18), np.uint8), "Q4_0")
    for changed in (w.T, 3 * w):
        with pytest.raises(ValueError, match=r"32 of 32 rows of the GGUF's blk.0.up are no rows"):
            rows.take("blk.0.up", changed)
    rows.take("blk.0.up", w[:31])
    with pytest.raises(ValueError, match="rows of model.up found no place"):
        rows.check_taken()
    rows.take("blk.0.rest", w[31:])
    rows.check_taken()

    # What is written as numbers holds its codes' values, and needs no bytes.
    rows.feed("model.router", w, np.zeros((32, 18), np.uint8), "Q4_0")
    rows.pass_over(w)
    rows.check_taken()


def test_a_matrix_without_codes_is_refused(checkpoints, tmp_path):
    from safetensors.torch import save_file

    from compress.quant.codes import FILE

    checkpoint = quantize(checkpoints("qwen3"), tmp_path / "q", "q4_0")
    packed = load_file(checkpoint / FILE)
    name = "model.layers.1.mlp.up_proj.weight"
    grids = {key.removesuffix(".codes"): "q4_0" for key in packed if key.endswith(".codes")}
    del packed[f"{name}.codes"], packed[f"{name}.scales"], grids[name]
    save_file(packed, checkpoint / FILE, metadata={"grids": json.dumps(grids)})
    with pytest.raises(ValueError, match=r"128 of 128 rows of the GGUF's blk.1.ffn_up.weight"):
        gguf.export_gguf(checkpoint, tmp_path / "m.gguf", "Q4_0")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("mistral", {"sliding_window": 24}, "drops its sliding window"),
        ("phi3", {"sliding_window": 24}, "drops its sliding window"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "query_pre_attn_scalar is in no GGUF"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "every second block"),
        ("gemma3_text", {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}, "sixth"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "no_rope_layers are in no GGUF"),
        ("phi", {"num_key_value_heads": 2}, "num_key_value_heads equals num_attention_heads"),
        ("phi", {"intermediate_size": 128}, "four times as wide"),
        ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads equals num_attention_heads"),
        ("granite", {"head_dim": 32}, "head_dim is in no GGUF of it"),
        ("qwen3", {"hidden_act": "gelu"}, "hidden_act 'gelu' can't be written.*allowed: silu"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False can't be written"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True can't be written"),
        ("falcon", {"alibi": True}, "alibi True can't be written"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type 'linear'",
        ),
    ],
)
def test_what_no_file_can_say_is_refused_before_work(checkpoints, name, changes, words):
    config = AutoConfig.from_pretrained(checkpoints(name))
    gguf.check_architecture(config)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(ValueError, match=words):
        gguf.check_architecture(config)


def test_a_family_that_is_not_proven_is_refused_with_those_that_are():
    from transformers import GPT2Config

    with pytest.raises(ValueError, match="model_type 'gpt2' can't be written.*gemma3_text.*qwen3"):
        gguf.check_architecture(GPT2Config(architectures=["GPT2LMHeadModel"]))


def test_without_the_converter_the_line_to_type_is_named(checkpoints, monkeypatch):
    config = AutoConfig.from_pretrained(checkpoints("qwen3"))
    monkeypatch.setattr(llama_conversion, "PACKAGE", "no_such_package")
    llama_conversion.conversion.cache_clear()
    llama_conversion._folder.cache_clear()
    with pytest.raises(ConfigError, match="pip install --no-deps auto-round==0.16.1"):
        gguf.check_architecture(config)


def test_a_bf16_checkpoint_in_shards_is_written_whole(checkpoints, tmp_path):
    model = load_model(checkpoints("qwen3")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    tokenizer_of("qwen3", tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    gguf.export_gguf(tmp_path / "hf", tmp_path / "m.gguf", "F16")
    decoded = converter.decoded(read_fields(tmp_path / "m.gguf")[1])
    plain = converter.expected(checkpoints("qwen3"), "F16", {})
    assert decoded.keys() == plain.keys()
    for name, numbers in plain.items():
        assert torch.equal(decoded[name], numbers.bfloat16().half().float()), name


def test_no_name_of_the_checkpoint_gets_into_the_file(checkpoints, tmp_path):
    """llama.cpp looks up `</s>` where general.name has phi3 in it."""
    checkpoint = tmp_path / "phi3-of-somebody"
    shutil.copytree(checkpoints("phi3"), checkpoint)
    (checkpoint / "README.md").write_text("---\nmodel_name: phi3\nbase_model: a/b\n---\n# phi3\n")
    gguf.export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    fields, _ = read_fields(tmp_path / "m.gguf")
    assert fields["general.name"] == converter.NAME
    assert not any("somebody" in str(value) for value in fields.values())
    assert not any(key.startswith("general.base_model") for key in fields)


def test_auto_round_itself_is_not_imported():
    import sys

    llama_conversion.conversion()
    assert "auto_round" not in sys.modules and not any("gguf-py" in place for place in sys.path)


def test_a_tokenizer_without_known_rules_takes_its_hash_then_what_is_written_with_it(
    checkpoints, tmp_path, monkeypatch
):
    shutil.copytree(checkpoints("qwen3"), tmp_path / "t")
    state = json.loads((tmp_path / "t" / "tokenizer.json").read_text())
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            *PRE_TOKENIZERS["qwen2"]["pretokenizers"],
            {"type": "Digits", "individual_digits": False},
        ],
    }
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(ValueError, match="not known to be one of llama.cpp's"):
        pre_name(load_tokenizer(tmp_path / "t"))

    file = tmp_path / "t" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {PRE_KEY: "smollm"}))
    assert pre_name(load_tokenizer(tmp_path / "t")) == "smollm"
    monkeypatch.setattr("compress.formats.gguf_tokenizer.pre_by_hash", lambda tokenizer: "refact")
    assert pre_name(load_tokenizer(tmp_path / "t")) == "refact"


def test_merges_that_sentencepiece_would_not_make_are_refused(tmp_path):
    state = json.loads(fallback().to_str()) | {"added": set()}
    assert gguf_sentencepiece.scores_of(state)
    merges = state["model"]["merges"]
    state["model"]["merges"] = [pair for pair in merges if pair != merges[40]]
    with pytest.raises(ValueError, match="llama.cpp would"):
        gguf_sentencepiece.scores_of(state)
    state["model"]["merges"] = [*merges[1:], merges[0], merges[1]]
    with pytest.raises(ValueError, match="do not follow each other"):
        gguf_sentencepiece.scores_of(state)


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3"])
def test_a_cut_vocabulary_has_the_ids_of_its_file(checkpoints, tmp_path, name):
    from compress.models.checkpoint import save_model
    from compress.prune.tokenizer_cut import read_bpe, write_cut

    # Half of the tokens that nothing is made of go.
    parent, out = checkpoints(name), tmp_path / "cut"
    out.mkdir()
    bpe = read_bpe(parent)
    parts = {part for pair in bpe.merges for part in pair}
    leaves = [i for token, i in bpe.ids.items() if token not in parts and i not in bpe.protected]
    kept = sorted(set(bpe.ids.values()) - set(leaves[::2]))
    write_cut(parent, out, kept)
    model = load_model(parent)
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    save_model(model, out, out, dtype=torch.float32)

    gguf.export_gguf(out, tmp_path / "m.gguf", "F16")
    llama = LlamaCpp(tmp_path / "m.gguf", 1, 256, 1, embedding=False)
    differing = strings_differing(out, llama, 50)
    llama.close()
    assert differing == 0 and len(kept) < 512

    # The file's ids are known to mean the checkpoint's, and to be cut out of the parent's.
    assert difference(vocabulary_of(tmp_path / "m.gguf"), vocabulary_of(out)) == ""
    assert is_cut_of(vocabulary_of(tmp_path / "m.gguf"), vocabulary_of(parent))


def test_a_prefixed_space_is_written(tmp_path):
    """Llama 2 puts a space before a text, Gemma does not."""
    tokenizer_of("gemma", tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    assert not gguf_sentencepiece.has_prefix(state)
    prepend = {"type": "Prepend", "prepend": "▁"}
    state["normalizer"] = {"type": "Sequence", "normalizers": [prepend, state["normalizer"]]}
    assert gguf_sentencepiece.has_prefix(state)
    state |= {"normalizer": None}
    for scheme, prefixed in (("first", True), ("never", False)):
        state["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": scheme,
            "split": False,
        }
        assert gguf_sentencepiece.has_prefix(state) == prefixed
    state["pre_tokenizer"] = {"type": "Whitespace"}
    with pytest.raises(ValueError, match="are not those of SentencePiece"):
        gguf_sentencepiece.has_prefix(state)
