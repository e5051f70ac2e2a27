"""Sources, packing, masks and the order of training."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.models.checkpoint import load_model
from compress.models.head import hidden_states
from compress.models.tokenizer import load_tokenizer
from compress.score.talk import plain_prompt
from compress.session import Session
from compress.stages.distill import Distill
from compress.stages.prune_width import PruneWidth
from compress.text.embedded import EMBEDDED
from compress.text.packing import pack
from compress.text.sources import documents


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_text_is_there_on_any_python(name):
    assert len(documents(f"embedded:{name}")) > 50


def test_heldout_topics_share_no_document_with_the_training_docstrings():
    topics = set(documents("embedded:topics"))
    assert not topics & set(documents("embedded:docstrings"))


def test_packed_rows_hold_whole_text_and_are_cached(tiny_teacher, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Document number {i} says hello." for i in range(40)))
    packed = pack([str(path)], tiny_teacher, 16, tmp_path)
    assert packed.ids.shape[1] == 17
    assert packed.mask.all()
    text = load_tokenizer(tiny_teacher).decode(packed.ids.flatten())
    assert text.count("<|im_end|>") >= 35
    again = pack([str(path)], tiny_teacher, 16, tmp_path)
    assert again.digest == packed.digest
    assert torch.equal(again.ids, packed.ids)
    path.write_text(path.read_text().replace("hello", "hallo"))
    assert pack([str(path)], tiny_teacher, 16, tmp_path).digest != packed.digest


def test_chat_counts_only_answers(tiny_teacher, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"question": "Where is the red fox?", "answer": f"Under tree {i}."})
            for i in range(30)
        )
    )
    packed = pack([str(path)], tiny_teacher, 32, tmp_path, chat_labels="answers")
    tokenizer = load_tokenizer(tiny_teacher)
    learned = tokenizer.decode(packed.ids.flatten()[packed.mask.flatten()])
    assert "Under tree" in learned
    assert "red fox" not in learned
    assert "red fox" in tokenizer.decode(packed.ids.flatten())


def test_a_student_of_a_teacher_learns_every_token_of_a_chat(tiny_teacher, tmp_path):
    path = tmp_path / "chat.jsonl"
    rows = [{"question": "Where is the red fox?", "answer": f"Under tree {i}."} for i in range(30)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    whole, answers = (
        pack([str(path)], tiny_teacher, 32, tmp_path, chat_labels=labels)
        for labels in ("all", "answers")
    )
    assert whole.mask.all() and torch.equal(whole.ids, answers.ids)
    assert whole.digest != answers.digest


def test_the_last_tenth_of_the_conversations_is_held_out():
    train, heldout = (
        documents("embedded:conversations"),
        documents("embedded:conversations_heldout"),
    )
    assert len(heldout) == round((len(train) + len(heldout)) / 10)
    asked = {chat[0]["content"] for chat in train}
    assert not asked & {chat[0]["content"] for chat in heldout}
    assert all([turn["role"] for turn in chat][:2] == ["user", "assistant"] for chat in train)


def test_questions_are_the_conversations_as_a_base_model_is_asked():
    chats = documents("embedded:conversations_heldout")
    texts = documents("embedded:questions_heldout")
    assert len(texts) == len(chats) and all(isinstance(text, str) for text in texts)
    question, answer = chats[0][0]["content"], chats[0][1]["content"]
    assert texts[0].startswith(f"Question: {question}\nAnswer: {answer}")
    asked = plain_prompt([{"role": "user", "content": question}])
    assert texts[0].startswith(asked)
    assert set(texts).isdisjoint(documents("embedded:questions"))


def test_no_conversation_shares_a_phrase_with_what_students_are_evaluated_on():
    from compress.text.filter import Filter, evaluation_texts

    accept = Filter(evaluation_texts())
    chats = documents("embedded:conversations") + documents("embedded:conversations_heldout")
    reasons = [accept.reason([turn["content"] for turn in chat], True) for chat in chats]
    assert set(reasons) == {""}


def test_every_epoch_reads_every_row_once_in_another_order(tiny_teacher, tmp_path):
    packed = pack(["embedded:topics"], tiny_teacher, 32, tmp_path)
    first, second = packed.rows(0, 0, 10, 10), packed.rows(0, 10, 10, 10)
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert packed.rows(0, 4, 3, 10) == first[4:7]
    assert packed.rows(1, 0, 10, 10) != first


def source(folder, name, count, words="hello"):
    path = folder / f"{name}.txt"
    path.write_text("\n\n".join(f"{name} number {i} says {words}." for i in range(count)))
    return str(path)


def test_weights_are_shares_of_the_tokens_and_nothing_is_repeated(tiny_teacher, tmp_path):
    sources = [
        source(tmp_path, "alpha", 400),
        source(tmp_path, "omega", 60, "hello and good bye to all of you"),
    ]
    packed = pack(sources, tiny_teacher, 16, tmp_path, weights=[3.0, 1.0])
    text = load_tokenizer(tiny_teacher).decode(packed.ids.flatten())
    tokenizer = load_tokenizer(tiny_teacher)
    tokens = {
        name: sum(len(tokenizer(d)["input_ids"]) + 1 for d in text.split("<|im_end|>") if name in d)
        for name in ("alpha", "omega")
    }
    assert tokens["alpha"] / tokens["omega"] == pytest.approx(3, rel=0.05)
    whole = text.split("<|im_end|>")[1:-1]
    assert len(whole) == len(set(whole))
    assert 55 <= text.count("omega") <= 60  # the scarcer source ends the mixture
    assert packed.digest != pack(sources, tiny_teacher, 16, tmp_path).digest


def test_a_token_sees_only_its_own_document_and_no_document_announces_the_next(
    tiny_teacher, tmp_path
):
    model = load_model(tiny_teacher)
    apart = pack([source(tmp_path, "alpha", 40)], tiny_teacher, 32, tmp_path, packing="documents")
    batch = apart.batch([0, 1])
    starts = (batch["positions"] == 0).nonzero().tolist()
    assert len(starts) > 4
    packed_RLH = hidden_states(model, batch["inputs"], batch["positions"]).view(2, 32, -1)
    for (row, start), after in zip(starts, [*starts[1:], [2, 0]], strict=True):
        end = after[1] if after[0] == row else 32
        alone = hidden_states(model, batch["inputs"][row : row + 1, start:end])
        torch.testing.assert_close(packed_RLH[row, start:end], alone, rtol=1e-4, atol=1e-5)
    announced = (
        batch["positions"][:, 1:] == 0
    )  # labels of these places are the first tokens of documents
    assert (
        not batch["mask"][:, :-1][announced].any()
        and batch["mask"].sum() == batch["mask"].numel() - apart.first[:2, 1:].sum()
    )


def test_stream_and_documents_hold_the_same_tokens(tiny_teacher, tmp_path):
    file = source(tmp_path, "alpha", 40)
    stream, apart = (
        pack([file], tiny_teacher, 32, tmp_path, packing=packing)
        for packing in ("stream", "documents")
    )
    assert torch.equal(stream.ids, apart.ids) and stream.digest != apart.digest
    assert "positions" not in stream.batch([0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist; sources are embedded:NAME"),
        ("empty.txt", "", "has no usable text"),
        ("empty.jsonl", "\n", "has no usable text"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "bad.jsonl, line 2 is not JSON"),
        (
            "fields.jsonl",
            '{"body": "a"}\n',
            r"line 1 has the fields \['body'\]; needed: text, messages",
        ),
        ("table.csv", "a,b", "ends in '.csv'; allowed: .txt, .jsonl"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        documents(str(tmp_path / name))


def test_unknown_embedded_and_malformed_hub_sources_are_refused():
    with pytest.raises(
        ValueError,
        match=(
            "embedded sources are conversations, conversations_heldout, docstring_chat, docstrings"
        ),
    ):
        documents("embedded:novels")
    with pytest.raises(ValueError, match=r"is not hub:NAME\[@CONFIG\]:SPLIT:FIELD"):
        documents("hub:name")


def test_too_little_text_for_one_sequence_says_how_much_there_is(tiny_teacher, tmp_path):
    (tmp_path / "short.txt").write_text("Hello.")
    with pytest.raises(
        ValueError, match=r"hold \d+ tokens, one sequence needs 65; add text or lower data.seq_len"
    ):
        pack([str(tmp_path / "short.txt")], tiny_teacher, 64, tmp_path)


def test_parquet_rows_are_documents(tmp_path):
    import datasets

    path = tmp_path / "t.parquet"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(path)
    assert documents(str(path)) == ["one", "two"]


def test_sequences_without_a_label_are_left_out_and_counted(tiny_teacher, tmp_path):
    path, said = tmp_path / "chat.jsonl", []
    question = "Where does the river go when the water rises above the old wall? " * 12
    path.write_text(
        "".join(
            json.dumps({"question": f"{i} {question}", "answer": "Yes."}) + "\n" for i in range(8)
        )
    )
    for packing in ("stream", "documents"):
        packed = pack(
            [str(path)],
            tiny_teacher,
            32,
            tmp_path,
            chat_labels="answers",
            packing=packing,
            log=said.append,
        )
        batch = packed.batch(list(range(len(packed.ids))))
        assert batch["mask"].any(1).all() and 8 <= len(packed.ids) <= 16
    whole = pack([str(path)], tiny_teacher, 32, tmp_path)
    assert whole.mask.all() and len(whole.ids) > 50
    left_out = len(whole.ids) - len(packed.ids)
    assert (
        f"{path}: {left_out} of {len(whole.ids)} sequences hold no token of an answer and are"
        " left out" in said
    )


def test_text_that_teaches_no_answer_at_all_is_refused(tiny_teacher, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"Where is the fox {i}?"}]}) + "\n"
            for i in range(20)
        )
    )
    with pytest.raises(
        ValueError,
        match=(
            r"chat.jsonl.*: none of \d+ sequences holds a token of an answer.*; give chats with"
            r" assistant turns"
        ),
    ):
        pack([str(path)], tiny_teacher, 32, tmp_path, chat_labels="answers")


# ---- text that is read more often than was asked for ----


VALIDATED = Distill(tokens=3200, epochs=2, validations=1, validation_sequences=5)


def session_of(stage, sequences, reread="tell"):
    from compress.text.settings import Data, Reread

    data = Data(
        train=["embedded:docstrings"],
        heldout=["embedded:topics"],
        seq_len=32,
        reread=Reread(reread),
    )
    text = SimpleNamespace(ids=torch.zeros(sequences, 33))
    return SimpleNamespace(
        recipe=SimpleNamespace(stages={"heal": stage}, data=data),
        teacher=SimpleNamespace(path=Path("teacher")),
        text=lambda tokens_of: text,
        chat=lambda tokens_of: text,
    )


@pytest.mark.parametrize(
    ("stage", "sequences", "message"),
    [
        (Distill(tokens=3200), 100, ""),
        (Distill(tokens=3200, epochs=10), 10, ""),
        (
            Distill(tokens=3200),
            40,
            (
                "tokens=3200 read each of 40 sequences of text 2.5 times, epochs=1 asks for 1: .*"
                " set tokens to at most 1280"
            ),
        ),
        (
            VALIDATED,
            45,
            "tokens=3200 read each of 40 sequences of text 2.5 times, epochs=2 asks for 2: .* 2560",
        ),
        (PruneWidth(ffn=64, calibration_sequences=16), 16, ""),
        (
            PruneWidth(ffn=64, calibration_sequences=17),
            16,
            "calibration_sequences=17, the text has 16 sequences: .* at most 16",
        ),
    ],
)
def test_too_short_a_text_is_told_or_refused_before_work_starts(capsys, stage, sequences, message):
    Session._check_length(session_of(stage, sequences), "heal")
    told = capsys.readouterr().err
    assert re.search(f"heal: {message}", told) if message else not told
    if message:
        with pytest.raises(ValueError, match=f"heal: {message}.*; or set data.reread=tell"):
            Session._check_length(session_of(stage, sequences, "refuse"), "heal")
    else:
        Session._check_length(session_of(stage, sequences, "refuse"), "heal")


def test_a_stage_records_how_often_it_read_its_text(context, tiny_teacher, tmp_path):
    (tmp_path / "short.txt").write_text(
        "\n\n".join(f"Sentence number {i} is short." for i in range(16))
    )
    text = pack([str(tmp_path / "short.txt")], tiny_teacher, 32, tmp_path)
    stage = Distill(tokens=32 * 4 * 5)
    metrics = stage.run(
        tiny_teacher, tmp_path / "out", dataclasses.replace(context, text=lambda: text)
    )
    assert (
        metrics["readings_count"] == pytest.approx(20 / len(text.ids), abs=0.01)
        and metrics["readings_count"] > 1
    )
