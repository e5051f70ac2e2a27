"""A student of fewer tokens: its weights, what it learns of its teacher, and how it is scored."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import pytest
import torch
from conftest import make_context

from compress.distill.batches import make_loss, one_batch
from compress.distill.losses import Mix
from compress.distill.settings import SchemeName, Signal
from compress.formats.gguf import export_gguf
from compress.formats.gguf_tokenizer import PRE_KEY, pre_name
from compress.models.checkpoint import load_model, model_of, read_config
from compress.models.reading import reading
from compress.models.tokenizer import load_tokenizer
from compress.prune.tokenizer_cut import read_bpe
from compress.prune.vocabulary import Usage, kept_ids
from compress.score.scorer import Scorer
from compress.score.settings import Eval
from compress.stages.distill import Distill
from compress.stages.prune_vocab import PruneVocab, counts_of
from compress.stages.training import open_source
from compress.store import Store
from compress.text.packing import pack
from compress.train.packed import Packed

BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}


@pytest.fixture(scope="module")
def student(tiny_teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    PruneVocab(ids=384).run(tiny_teacher, folder / "out", make_context(tiny_teacher, folder))
    return folder / "out"


def test_kept_tokens_have_the_logits_that_they_had(tiny_teacher, student):
    kept_S = reading(student, tiny_teacher).kept_S
    ids = torch.tensor([[5, 9, 300, 17, 40]])
    with torch.no_grad():
        logits = load_model(tiny_teacher)(kept_S[ids]).logits[..., kept_S]
        torch.testing.assert_close(load_model(student)(ids).logits, logits)
    assert read_config(student)["vocab_size"] == len(load_tokenizer(student)) == 384


def test_tokens_of_more_text_are_counted_beside_those_of_the_training_text(tiny_teacher, tmp_path):
    context = make_context(tiny_teacher, tmp_path)
    used = set(context.text().ids.flatten().tolist())
    rare = next(i for i in range(300, 512) if i not in used)
    more = Packed(torch.full((4000, 33), rare, dtype=torch.int32), None, "more")

    def kept(name, **changes):
        stage = PruneVocab(ids=384, calibration_sequences=0)
        stage.run(tiny_teacher, tmp_path / name, dataclasses.replace(context, **changes))
        return set(reading(tmp_path / name, tiny_teacher).kept_S.tolist())

    alone, both = kept("alone"), kept("both", vocabulary=lambda: more)
    assert rare in both - alone and len(both) == len(alone) == 384
    assert counts_of(context.text(), None, more)[rare] == 4000 * 33


@pytest.mark.parametrize("again", [False, True])
def test_what_the_teacher_expects_counts_also_behind_another_cut(
    again, tiny_teacher, student, tmp_path
):
    parent, ids = (student, 320) if again else (tiny_teacher, 384)
    context = in_tokens_of(parent, tiny_teacher, tmp_path)
    few = Packed(context.text().ids[:2], None, "few")
    context = dataclasses.replace(context, text=lambda: few)
    alone = PruneVocab(ids=ids, calibration_sequences=0)
    assert "expected_dropped_fraction" not in alone.run(parent, tmp_path / "alone", context)
    stage = PruneVocab(ids=ids, calibration_sequences=24)
    metrics = stage.run(parent, tmp_path / "out", context)

    # By hand: the teacher's probabilities, those of tokens that the parent lacks at their pieces.
    given_BL = context.calibration(24)
    fold = reading(parent, tiny_teacher)
    with torch.no_grad():
        theirs_BL = fold.kept_S[given_BL] if fold else given_BL
        expected_V = load_model(tiny_teacher)(theirs_BL).logits.softmax(-1).double().sum((0, 1))
    if fold:
        moved_V = expected_V.index_add(0, fold.kept_S[fold.pieces_D], expected_V[fold.dropped_D])
        expected_V = moved_V[fold.kept_S]
    usage = Usage(counts_of(context.text(), None), dict(enumerate(expected_V.tolist())))
    bpe = read_bpe(parent)
    kept = kept_ids(bpe.ids, bpe.merges, usage, ids, bpe.protected).ids

    assert set(reading(tmp_path / "out", parent).kept_S.tolist()) == set(kept)
    assert set(reading(tmp_path / "alone", parent).kept_S.tolist()) != set(kept)
    dropped = 1 - float(expected_V[kept].sum() / expected_V.sum())
    assert metrics["expected_dropped_fraction"] == pytest.approx(dropped, rel=1e-3)
    assert metrics["expected_dropped_fraction"] > 0


def test_a_pre_tokenizer_that_only_a_hash_tells_is_written_down(
    tiny_teacher, student, tmp_path, monkeypatch
):
    assert PRE_KEY not in (student / "tokenizer_config.json").read_text(), "its rules tell it"
    shutil.copytree(tiny_teacher, tmp_path / "parent")
    file = tmp_path / "parent" / "tokenizer.json"
    about = json.loads(file.read_text())
    digits = {"type": "Digits", "individual_digits": False}
    about["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, BYTE_LEVEL]}
    file.write_text(json.dumps(about))

    monkeypatch.setattr("compress.formats.gguf_tokenizer.pre_by_hash", lambda tokenizer: "refact")
    context = make_context(tmp_path / "parent", tmp_path)
    PruneVocab(ids=384).run(tmp_path / "parent", tmp_path / "cut", context)
    monkeypatch.setattr("compress.formats.gguf_tokenizer.pre_by_hash", lambda tokenizer: None)
    assert pre_name(load_tokenizer(tmp_path / "cut")) == "refact"
    with pytest.raises(ValueError, match="not known to be one of llama.cpp's"):
        pre_name(load_tokenizer(tmp_path / "parent"))


def test_an_untied_head_with_a_bias_is_cut_like_the_embedding():
    from transformers import PhiConfig, PhiForCausalLM

    from compress.stages.prune_vocab import cut_rows

    config = PhiConfig(
        vocab_size=90, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, tie_word_embeddings=False, bos_token_id=4, eos_token_id=[8, 2],
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    kept_S = torch.tensor([2, 4, 8, 16, 32, 64])
    with torch.no_grad():
        before = model(kept_S[None]).logits[..., kept_S]
        cut_rows(model, kept_S)
        torch.testing.assert_close(model(torch.arange(6)[None]).logits, before)
    assert model.config.bos_token_id == 1 and model.config.eos_token_id == [2, 0]


def in_tokens_of(student, teacher, folder):
    context = make_context(teacher, folder)
    text = pack(["embedded:topics"], teacher, 32, folder / "data", tokens_of=student)
    return dataclasses.replace(
        context, text=lambda: text, calibration=lambda n: text.ids[:n, :-1].long()
    )


@pytest.mark.parametrize("scheme", ["sampled", "hidden", "online"])
def test_the_loss_is_the_kl_to_the_teachers_folded_probabilities(
    scheme, tiny_teacher, student, tmp_path
):
    context = in_tokens_of(student, tiny_teacher, tmp_path)
    signal = Signal(scheme=SchemeName(scheme), threshold=0.004)
    source = open_source(signal, context, tiny_teacher, context.text(), 16, student)
    batch = one_batch(context.text(), source, [0, 3])
    loss_fn = make_loss(Mix(1.0, 0.0), source.teacher_head, 384)
    with torch.no_grad():
        loss, count = loss_fn(load_model(student), batch)

        # By hand, from both models' logits in float64.
        fold = reading(student, tiny_teacher)
        given = batch["inputs"]
        p_NV = (
            load_model(tiny_teacher).double()(fold.kept_S[given]).logits.softmax(-1).flatten(0, 1)
        )
        log_q_NS = load_model(student).double()(given).logits.log_softmax(-1).flatten(0, 1)
    p_NS = p_NV[:, fold.kept_S]
    for dropped, piece in zip(fold.dropped_D.tolist(), fold.pieces_D.tolist(), strict=True):
        p_NS[:, piece] += p_NV[:, dropped]
    expected = (p_NS * (p_NS.log() - log_q_NS)).sum(-1).mean()
    tolerance = {"sampled": 0.15, "hidden": 0.02, "online": 1e-4}[scheme]
    assert float(loss / count) == pytest.approx(float(expected), rel=tolerance)


def test_a_student_of_fewer_tokens_learns_from_its_teacher(tiny_teacher, student, tmp_path):
    context = in_tokens_of(student, tiny_teacher, tmp_path)
    stage = Distill(tokens=4096, lr=3e-3, batch_sequences=4)
    metrics = stage.run(student, tmp_path / "out", context)
    assert metrics["loss_last_nats"] < metrics["loss_first_nats"]


def test_checkpoint_and_file_are_scored_in_their_own_tokens_and_the_teacher_in_these(
    tiny_teacher, student, tmp_path
):
    file = tmp_path / "student.gguf"
    export_gguf(student, file, "F16")
    settings = Eval(
        tasks=["grammar"], limit=4, heldout_sequences=3, open_limit=1, open_prompts=[],
        prompt_tokens=8, new_tokens=2, repeats=1, processes=1,
    )  # fmt: skip
    scorer = Scorer(
        Store(tmp_path / "store"),
        settings,
        lambda tokens: {
            "topics": pack(["embedded:topics"], tiny_teacher, 32, tmp_path, tokens_of=tokens)
        },
        tiny_teacher,
        1,
    )
    teacher, checkpoint, shipped = (
        scorer.measure(model_of(path), timed=path != tiny_teacher)
        for path in (tiny_teacher, student, file)
    )

    # The same text takes more tokens; times are made comparable by bytes.
    bytes_a_token = "bytes_per_token/heldout"
    assert checkpoint.scores[bytes_a_token] < teacher.scores[bytes_a_token]
    assert checkpoint.scores["bytes_per_sec"] == pytest.approx(
        checkpoint.scores["tok_per_sec"] * checkpoint.scores[bytes_a_token]
    )
    for name in ("bits_per_byte/heldout", "bytes_per_token/heldout", "acc/grammar"):
        assert shipped.scores[name] == pytest.approx(checkpoint.scores[name], rel=0.01)

    # Closeness is a token of the student's, its teacher read in these; both ways of keeping agree.
    kl = [scorer.compare(each, teacher).scores["kl_to_teacher"] for each in (checkpoint, shipped)]
    assert kl[0] == pytest.approx(kl[1], abs=0.01) and 0 < kl[0] < math.log(512)
    assert scorer.compare(checkpoint, teacher).scores["kl_to_teacher"] == kl[0]
    [remark] = scorer.check_tokenizer(model_of(student))
    assert "has 384 of the teacher's 512 tokens" in remark
    with pytest.raises(ValueError, match="give the checkpoint that the file was made of"):
        scorer.compare(
            checkpoint, dataclasses.replace(shipped, model=_as_teacher(tiny_teacher, tmp_path))
        )


def _as_teacher(teacher, folder):
    file = folder / "teacher.gguf"
    export_gguf(teacher, file, "F16")
    return model_of(file)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (511, r"prune_vocab.ids is 511 \(512 as a multiple of 64\) and the model has 512 ids"),
        (4000, "has 512 ids, so that nothing would be cut: allowed are 64 to 448 in steps of 64"),
    ],
)
def test_a_size_that_cuts_nothing_is_refused(ids, message, tiny_teacher):
    with pytest.raises(ValueError, match=message):
        PruneVocab(ids=ids).check_shape(read_config(tiny_teacher))


def test_bytes_and_special_tokens_can_not_be_cut(tiny_teacher, tmp_path, context):
    stage = PruneVocab(ids=128)
    message = "of which 259 bytes and special tokens stay: allowed are 320 to 448 in steps of 64"
    with pytest.raises(ValueError, match=message):
        stage.check_tokenizer(tiny_teacher)
    with pytest.raises(ValueError, match=message):
        stage.run(tiny_teacher, tmp_path / "out", context)
    with pytest.raises(ValueError, match="prune_vocab.multiple is 0: allowed is 1 or more"):
        PruneVocab(multiple=0)
    with pytest.raises(ValueError, match="calibration_sequences is -1: allowed is 0 or more"):
        PruneVocab(calibration_sequences=-1)


def test_padding_rows_of_the_embedding_go_first(tiny_teacher, tmp_path, context):
    padded = tmp_path / "padded"
    shutil.copytree(tiny_teacher, padded)
    model = load_model(tiny_teacher)
    model.resize_token_embeddings(576)
    from compress.models.checkpoint import save_model

    save_model(model, padded, tokenizer_from=tiny_teacher)
    PruneVocab(ids=448).run(padded, tmp_path / "out", context)
    assert read_config(tmp_path / "out")["vocab_size"] == 448
    with pytest.raises(ValueError, match="the tokenizer has 512 tokens, .* are 320 to 448"):
        PruneVocab(ids=512).check_tokenizer(padded)
