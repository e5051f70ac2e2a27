"""Every stage of the registry, held to the same protocol."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal

import pytest
import tiny_families as tiny
import torch
from conftest import make_context

from compress.distill.settings import Divergence, SchemeName, Signal
from compress.errors import Interrupted
from compress.memory import Given
from compress.models.checkpoint import digest, load_model, read_config, save_model
from compress.models.decoder_sizes import Shape
from compress.models.tokenizer import load_tokenizer, token_count
from compress.stages import STAGES
from compress.stages.distill import Distill
from compress.stages.stage import Family, Sizes
from compress.store import Store, file_table

SMALL = {
    "prune_depth": {"blocks": 1, "calibration_sequences": 2},
    "prune_vocab": {"ids": 448},
    "prune_width": {"ffn": 128, "multiple": 32, "calibration_sequences": 8},
    "prune_heads": {"kv_groups": 1, "calibration_sequences": 8},
    "prune_experts": {"experts": 3, "floor_tokens": 1, "calibration_sequences": 8},
    "sparsify": {"calibration_sequences": 2},
    "distill": {"tokens": 128, "batch_sequences": 2, "micro_batch_sequences": 1},
    "lora": {"tokens": 128, "batch_sequences": 2, "micro_batch_sequences": 1, "rank": 2},
    "ptq": {},
    "qat": {"tokens": 128, "batch_sequences": 2, "micro_batch_sequences": 1},
}
UNITS = ("_count", "_nats", "_fraction", "_relative", "_sum", "bits_per_weight")


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_says_what_it_is_for_and_what_it_costs(name, tiny_teacher):
    stage = STAGES[name](**SMALL[name])
    sizes = Sizes(
        params=90,
        parent_params=100,
        teacher_params=200,
        config={"num_hidden_layers": 2, "hidden_size": 8},
        teacher_config={"vocab_size": 512, "hidden_size": 8},
        seq_len=32,
    )
    cost = stage.cost(sizes)
    assert stage.family in Family and stage.leaves_a_grid == (stage.family is Family.quantize)
    assert cost.flops >= 0 and cost.disk_bytes >= 2 * 90
    assert stage.calibration_rows() >= 0
    trains = hasattr(stage, "tokens")
    shape = Shape(read_config(tiny_teacher))
    account = stage.memory(Given(shape, shape, 32))
    assert account.together() > 2 * shape.params
    assert ("step" in account.phases) == trains
    if trains:
        assert cost.flops >= 6 * 90 * stage.tokens


@pytest.fixture(scope="module")
def tiny_mixture(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "teacher"
    return tiny.make(folder, "Qwen3MoeForCausalLM", tiny_teacher)


@pytest.fixture
def teacher(name, tiny_teacher, tiny_mixture):
    """What a stage works on: one of them needs experts."""
    return tiny_mixture if name == "prune_experts" else tiny_teacher


def run(name, teacher, folder, parent=None):
    folder.mkdir(exist_ok=True)
    out = folder / "out"
    out.mkdir()
    context = make_context(teacher, folder)
    metrics = STAGES[name](**SMALL[name]).run(parent or teacher, out, context)
    return out, metrics


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_writes_a_plain_checkpoint_and_leaves_its_parent_alone(name, teacher, tmp_path):
    before = file_table(teacher)
    out, metrics = run(name, teacher, tmp_path / "a")
    assert file_table(teacher) == before
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    logits = model(torch.arange(9)[None]).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(load_model(out)(torch.arange(9)[None]).logits, logits)
    tokenizers = load_tokenizer(teacher), load_tokenizer(out)
    if name != "prune_vocab":  # the only one that may change what an id means
        ids, student_ids = (each("Hello world 123")["input_ids"] for each in tokenizers)
        assert student_ids == ids
        for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (out / file).read_bytes() == (teacher / file).read_bytes()
    assert metrics
    for key, value in metrics.items():
        assert key.endswith(UNITS), f"{key} has no unit"
        assert isinstance(value, int | float)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_deterministic(name, teacher, tmp_path):
    first, metrics = run(name, teacher, tmp_path / "a")
    second, again = run(name, teacher, tmp_path / "b")
    assert file_table(first) == file_table(second)
    assert metrics == again


@pytest.mark.parametrize("name", STAGES)
def test_a_wrong_parent_is_refused_naming_directory_and_what_is_missing(name, teacher, tmp_path):
    parent = tmp_path / "parent"
    shutil.copytree(teacher, parent)
    (parent / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=re.escape(str(parent)) + ".*model.safetensors"):
        run(name, teacher, tmp_path / "a", parent)


@pytest.mark.parametrize("name", STAGES)
def test_a_quantized_parent_is_refused(name, teacher, tmp_path):
    quantized, _ = run("ptq", teacher, tmp_path / "q")
    with pytest.raises(ValueError, match="quantized"):
        run(name, teacher, tmp_path / "a", quantized)


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_dies_leaves_no_entry(name, teacher, tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    stage = STAGES[name](**SMALL[name])

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    monkeypatch.setattr("compress.models.checkpoint.write_tensors", fails)
    monkeypatch.setattr("compress.distill.signals.write_whole", fails)
    context = make_context(teacher, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        store.build(
            "k" * 64,
            {},
            lambda out, work: stage.run(teacher, out, dataclasses.replace(context, work=work)),
        )
    assert not store.entry("k" * 64).exists()


def test_the_adapter_is_kept_beside_and_the_merge_equals_it(tiny_teacher, tmp_path):
    from peft import PeftModel

    out, _ = run("lora", tiny_teacher, tmp_path / "a")
    assert not (out / "adapter_config.json").exists()
    adapted = PeftModel.from_pretrained(load_model(tiny_teacher), out / "adapter")
    ids = torch.arange(20)[None]
    torch.testing.assert_close(
        adapted(ids).logits, load_model(out)(ids).logits, rtol=0, atol=0.05
    )  # the merge is stored in bf16
    assert digest(out) != digest(tiny_teacher)


def test_qlora_trains_on_an_nf4_base(tiny_teacher, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the qlora extra is not installed")
    (tmp_path / "out").mkdir()
    metrics = STAGES["lora"](**SMALL["lora"], load_in_4bit=True).run(
        tiny_teacher, tmp_path / "out", make_context(tiny_teacher, tmp_path)
    )
    assert metrics["steps_count"] == 2
    assert load_model(tmp_path / "out")(torch.arange(9)[None]).logits.isfinite().all()


def test_a_missing_optional_package_is_named_before_work(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "bitsandbytes" else real(name, *a),
    )
    with pytest.raises(
        ValueError,
        match=r"needs bitsandbytes, which is not installed: pip install 'compress-lm\[qlora\]'",
    ):
        STAGES["lora"](load_in_4bit=True)


def test_frozen_embeddings_stay_the_parents(tiny_teacher, tmp_path):
    from compress.models.checkpoint import load_model

    for train in (True, False):
        out = tmp_path / str(train)
        out.mkdir()
        context = make_context(tiny_teacher, tmp_path, work=tmp_path / f"work-{train}")
        STAGES["distill"](**SMALL["distill"], lr=0.01, train_embeddings=train).run(
            tiny_teacher, out, context
        )
        before, after = (
            load_model(path).get_input_embeddings().weight for path in (tiny_teacher, out)
        )
        assert torch.equal(before, after) is not train


def padded(teacher, out, rows):
    """The same model with `rows` rows of padding behind its vocabulary."""
    model = load_model(teacher)
    model.resize_token_embeddings(model.config.vocab_size + rows, mean_resizing=False)
    save_model(model, out, teacher)
    return out


def outside(model, ids):
    """Nats of probability, -log of the mass that a model leaves to its first 512 ids, mean over a
    text (R, L).
    """
    return float(-load_model(model)(ids).logits.softmax(-1)[..., :512].sum(-1).log().mean())


@pytest.mark.parametrize("scheme", ["sampled", "hidden", "online"])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_heads_padded_differently_are_compared_on_the_ids_they_share(
    which, scheme, tiny_teacher, tmp_path
):
    other = padded(tiny_teacher, tmp_path / "padded", 24)
    student, teacher = (other, tiny_teacher) if which == "student" else (tiny_teacher, other)
    stage = Distill(
        tokens=64,
        batch_sequences=2,
        ce_weight=0.0,
        kl_weight=1.0,
        signal=Signal(scheme=SchemeName(scheme)),
    )
    (tmp_path / "out").mkdir()
    context = make_context(teacher, tmp_path)
    metrics = stage.run(student, tmp_path / "out", context)
    # Both are the same model, up to what the scheme leaves out, and to the mass of the student's
    # padding, which is held down.
    text = context.text().ids[:64, :-1].long()
    mass = outside(student, text)
    assert (mass > 0.03) is (which == "student")
    assert metrics["loss_first_nats"] == pytest.approx(mass, abs=2e-2)


@pytest.mark.parametrize("scheme", ["sampled", "hidden", "online"])
def test_a_padded_head_is_quantized_from_its_own_signal_and_its_padding_shrinks(
    scheme, tiny_teacher, tmp_path
):
    teacher = padded(tiny_teacher, tmp_path / "padded", 32)
    context, stage = (
        make_context(teacher, tmp_path),
        STAGES["qat"](tokens=1024, lr=3e-3, signal=Signal(scheme=SchemeName(scheme))),
    )
    stage.run(teacher, tmp_path / "out", context)
    text = context.text().ids[:16, :-1].long()
    assert 0 < outside(tmp_path / "out", text) < 0.9 * outside(teacher, text)


def gapped(teacher, out):
    """The same model on 576 rows, with tokens at ids 540 and 541 and none from 512 to 539."""
    padded(teacher, out, 64)
    state = json.loads((out / "tokenizer.json").read_text())
    for i, content in ((540, "<|tool|>"), (541, "<|chat_end|>")):
        token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        state["added_tokens"].append({"id": i, "content": content, "special": True, **token})
        state["model"]["vocab"][content] = i
    (out / "tokenizer.json").write_text(json.dumps(state))
    return out


@pytest.mark.parametrize("name", ["distill", "lora", "qat"])
def test_ids_with_gaps_are_trained_up_to_the_highest(name, tiny_teacher, tmp_path):
    teacher = gapped(tiny_teacher, tmp_path / "gapped")
    tokenizer = load_tokenizer(teacher)
    assert (len(tokenizer), token_count(tokenizer)) == (514, 542)
    context = make_context(teacher, tmp_path)
    text = context.text()
    text.ids[:, 5] = 541  # a text that uses it
    out, schemes = tmp_path / "out", ["sampled", "hidden", "online"] if name != "lora" else [None]
    for scheme in schemes:
        options = {"signal": Signal(scheme=SchemeName(scheme))} if scheme else {}
        here = dataclasses.replace(
            context,
            text=lambda: text,
            work=tmp_path / f"work-{scheme}",
            signals=tmp_path / f"signals-{scheme}",
        )
        metrics = STAGES[name](**SMALL[name], **options).run(teacher, out, here)
        assert metrics["loss_first_nats"] > 0 and len(load_model(out).lm_head.weight) == 576


def test_a_padded_student_writes_no_padding(tiny_teacher, tmp_path):
    from compress.distill.batches import make_batches
    from compress.distill.online import OnlineTeacher, with_rollouts

    student = padded(tiny_teacher, tmp_path / "padded", 400)
    data, teacher = (
        make_context(tiny_teacher, tmp_path).text(),
        OnlineTeacher(load_model(tiny_teacher), None),
    )
    teacher.data = data
    plain = make_batches(data, teacher, seed=0, sequences=8, batch=4)
    batch = with_rollouts(
        plain,
        load_model(student),
        teacher,
        share=1.0,
        prompt_tokens=4,
        ends=[0],
        seed=0,
        vocabulary=512,
    )(0, 4)[0]
    assert int(batch["inputs"].max()) < 512


def test_text_of_its_own_leaves_the_random_numbers_behind_it_alone(tiny_teacher, tmp_path):
    from compress.distill.batches import make_batches
    from compress.distill.online import OnlineTeacher, with_rollouts

    data, model = make_context(tiny_teacher, tmp_path).text(), load_model(tiny_teacher)
    teacher = OnlineTeacher(load_model(tiny_teacher), data)
    rollouts = with_rollouts(
        make_batches(data, teacher, seed=0, sequences=8, batch=4),
        model,
        teacher,
        share=1.0,
        prompt_tokens=8,
        ends=[0],
        seed=0,
    )
    torch.manual_seed(3)
    before = torch.get_rng_state()
    rollouts(0, 4)
    assert torch.equal(torch.get_rng_state(), before)


SHAPE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"vocab_size": 512, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("kind", "changes", "linears", "said"),
    [
        (
            "llama",
            SHAPE,
            ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
            None,
        ),
        (
            "phi3",
            SHAPE | {"pad_token_id": 0},
            ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"],
            None,
        ),
        ("gpt2", GPT2, ["c_attn", "c_fc", "c_proj"], None),
        ("gpt_neox", SHAPE, ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"], None),
        (
            "mixtral",
            SHAPE | {"num_local_experts": 4},
            ATTENTION,
            "left as they are: mlp.gate.weight",
        ),
    ],
)
def test_adapters_reach_every_linear_layer_of_the_blocks(
    kind, changes, linears, said, tiny_teacher, tmp_path
):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model, parent, out, lines = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **changes)),
        tmp_path / "parent",
        tmp_path / "out",
        [],
    )
    save_model(model, parent, tiny_teacher)
    STAGES["lora"](**SMALL["lora"] | {"lr": 0.01}).run(
        parent, out, make_context(tiny_teacher, tmp_path, log=lines.append)
    )
    before, after = (dict(load_model(path).named_parameters()) for path in (parent, out))
    kept = {name for name, p in after.items() if p.ndim > 1 and torch.equal(p, before[name])}
    assert all(not any(part in name for part in linears) for name in kept)
    assert all(
        "layers" not in name and ".h." not in name or name.endswith("mlp.gate.weight")
        for name in kept
    )
    assert all(
        torch.equal(p, before[name])
        for name, p in after.items()
        if "embed" in name or "head" in name or ".wte" in name
    )
    assert lines[0].removeprefix("test: adapters on ").split(", ")[: len(linears)] == linears
    assert [line.removeprefix("test: ") for line in lines if "left as" in line] == (
        [said] if said else []
    )
    if kind != "mixtral":  # whose experts choose by differences that bf16 takes away
        adapted, ids = (
            PeftModel.from_pretrained(load_model(parent), out / "adapter"),
            torch.arange(20)[None],
        )
        torch.testing.assert_close(
            adapted(ids).logits, load_model(out)(ids).logits, rtol=0, atol=0.05
        )


def test_a_model_without_linear_layers_is_refused(tiny_teacher):
    from compress.stages.lora import targets_of

    model = load_model(tiny_teacher)
    for block in model.model.layers:
        block.self_attn, block.mlp = torch.nn.Identity(), torch.nn.Identity()
    with pytest.raises(
        ValueError,
        match=(
            "LlamaForCausalLM has no linear layer in its blocks that an adapter fits; use a distill"
            " stage"
        ),
    ):
        targets_of(model)


def test_another_tokenizer_is_refused(tiny_teacher, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_teacher, other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|jm_start|>"))
    assert (other / "tokenizer.json").read_text() != text
    with pytest.raises(
        ValueError,
        match="have different tokenizers, and the first is not cut out of the second: id 1 is",
    ):
        Distill(tokens=64).run(other, tmp_path / "out", make_context(tiny_teacher, tmp_path))


def test_a_head_smaller_than_the_tokenizer_is_refused(tiny_teacher, tmp_path):
    other = padded(tiny_teacher, tmp_path / "cut", -12)
    with pytest.raises(
        ValueError, match="cut has a head of 500 rows, its tokenizer has 512 ids; it needs as many"
    ):
        Distill(tokens=64).run(other, tmp_path / "out", make_context(tiny_teacher, tmp_path))


def test_on_policy_steps_learn_on_the_students_own_text_and_resume_in_the_same_bits(
    tiny_teacher, tmp_path, monkeypatch
):
    from compress.distill.online import OnlineTeacher

    stage = Distill(
        tokens=256,
        batch_sequences=2,
        ce_weight=0.0,
        kl_weight=1.0,
        divergence=Divergence.reverse_kl,
        signal=Signal(scheme=SchemeName.online),
        on_policy=0.5,
        prompt_tokens=8,
    )
    student, _ = run("prune_depth", tiny_teacher, tmp_path / "student")
    finals, read, calls = [], OnlineTeacher.read, []

    def interrupting(self, rows):
        calls.append(rows)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return read(self, rows)

    for cut in (False, True):
        folder = tmp_path / str(cut)
        folder.mkdir()
        context = make_context(tiny_teacher, folder)
        (folder / "out").mkdir()
        if cut:
            monkeypatch.setattr(OnlineTeacher, "read", interrupting)
            with pytest.raises(Interrupted):
                stage.run(student, folder / "out", context)
            assert len(list(context.work.glob("state-*"))) == 1
        stage.run(student, folder / "out", context)
        finals.append(digest(folder / "out"))
    assert finals[0] == finals[1]


def test_the_students_text_is_masked_to_what_it_wrote_until_its_end(tiny_teacher, tmp_path):
    from compress.distill.batches import make_batches
    from compress.distill.online import OnlineTeacher, with_rollouts

    data, model = make_context(tiny_teacher, tmp_path).text(), load_model(tiny_teacher)
    teacher, eos = (
        OnlineTeacher(load_model(tiny_teacher), data),
        load_tokenizer(tiny_teacher).eos_token_id,
    )
    plain = make_batches(data, teacher, seed=0, sequences=8, batch=4)
    batch = with_rollouts(
        plain, model, teacher, share=1.0, prompt_tokens=8, ends=[eos, 300], seed=0
    )(0, 4)[0]
    before = plain(0, 4)[0]
    assert torch.equal(batch["inputs"][:, :8], before["inputs"][:, :8]) and not torch.equal(
        batch["inputs"], before["inputs"]
    )
    assert torch.equal(batch["inputs"][:, 1:], batch["labels"][:, :-1])
    assert not batch["mask"][:, :7].any() and batch["mask"][:, 7].all()
    for inputs, mask in zip(batch["inputs"], batch["mask"], strict=True):
        ends = [i for i in range(8, len(inputs)) if int(inputs[i]) in (eos, 300)]
        assert (
            mask[7 : ends[0] if ends else len(inputs)].all()
            and not mask[ends[0] if ends else len(inputs) :].any()
        )
    assert batch["teacher_hidden"].shape[0] == batch["inputs"].numel()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_policy": 0.5}, "set signal.scheme=online"),
        ({"on_policy": 2.0}, "on_policy=2.0 must be in"),
    ],
)
def test_impossible_rollouts_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Distill(**changes)


def test_under_bf16_the_base_of_adapters_has_the_bytes_of_its_file(context, tmp_path):
    stage = STAGES["lora"](**SMALL["lora"])
    bf16 = dataclasses.replace(context, precision="bf16")
    base = stage._base(context.teacher, bf16)
    assert {p.dtype for p in base.model.layers[0].mlp.parameters()} == {torch.bfloat16}
    assert base.get_input_embeddings().weight.dtype == torch.float32
    for whole in (context, dataclasses.replace(bf16, parallel="fsdp2")):
        types = {p.dtype for p in stage._base(context.teacher, whole).parameters()}
        assert types == {torch.float32}
    metrics = stage.run(context.teacher, tmp_path / "out", bf16)
    assert metrics["adapter_params_count"] > 0
    assert (
        load_model(tmp_path / "out").num_parameters()
        == load_model(context.teacher).num_parameters()
    )
