"""Sources, packing, masks and the order of training."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from compress.checkpoint import load_model, load_tokenizer
from compress.train.data import EMBEDDED, documents, generated, pack
from compress.train.forward import hidden_states


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
    path.write_text("\n".join(json.dumps({"question": "Where is the red fox?", "answer": f"Under tree {i}."}) for i in range(30)))
    packed = pack([str(path)], tiny_teacher, 32, tmp_path)
    tokenizer = load_tokenizer(tiny_teacher)
    learned = tokenizer.decode(packed.ids.flatten()[packed.mask.flatten()])
    assert "Under tree" in learned
    assert "red fox" not in learned
    assert "red fox" in tokenizer.decode(packed.ids.flatten())


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
    sources = [source(tmp_path, "alpha", 400), source(tmp_path, "omega", 60, "hello and good bye to all of you")]
    packed = pack(sources, tiny_teacher, 16, tmp_path, weights=[3.0, 1.0])
    text = load_tokenizer(tiny_teacher).decode(packed.ids.flatten())
    tokenizer = load_tokenizer(tiny_teacher)
    tokens = {name: sum(len(tokenizer(d)["input_ids"]) + 1 for d in text.split("<|im_end|>") if name in d) for name in ("alpha", "omega")}
    assert tokens["alpha"] / tokens["omega"] == pytest.approx(3, rel=0.05)
    whole = text.split("<|im_end|>")[1:-1]
    assert len(whole) == len(set(whole))
    assert 55 <= text.count("omega") <= 60  # the scarcer source ends the mixture
    assert packed.digest != pack(sources, tiny_teacher, 16, tmp_path).digest


def test_a_token_sees_only_its_own_document_and_no_document_announces_the_next(tiny_teacher, tmp_path):
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
    announced = batch["positions"][:, 1:] == 0  # labels of these places are the first tokens of documents
    assert not batch["mask"][:, :-1][announced].any() and batch["mask"].sum() == batch["mask"].numel() - apart.first[:2, 1:].sum()


def test_stream_and_documents_hold_the_same_tokens(tiny_teacher, tmp_path):
    file = source(tmp_path, "alpha", 40)
    stream, apart = (pack([file], tiny_teacher, 32, tmp_path, packing=packing) for packing in ("stream", "documents"))
    assert torch.equal(stream.ids, apart.ids) and stream.digest != apart.digest
    assert "positions" not in stream.batch([0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "does not exist; sources are embedded:NAME"),
        ("empty.txt", "", "has no usable text"),
        ("empty.jsonl", "\n", "has no usable text"),
        ("bad.jsonl", '{"text": "a"}\n{"text": \n', "bad.jsonl, line 2 is not JSON"),
        ("fields.jsonl", '{"body": "a"}\n', r"line 1 has the fields \['body'\]; needed: text, messages"),
        ("table.csv", "a,b", "ends in '.csv'; allowed: .txt, .jsonl"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        documents(str(tmp_path / name))


def test_unknown_embedded_and_malformed_hub_sources_are_refused():
    with pytest.raises(ValueError, match="embedded sources are docstring_chat, docstrings, topics"):
        documents("embedded:novels")
    with pytest.raises(ValueError, match=r"is not hub:NAME\[@CONFIG\]:SPLIT:FIELD"):
        documents("hub:name")


def test_too_little_text_for_one_sequence_says_how_much_there_is(tiny_teacher, tmp_path):
    (tmp_path / "short.txt").write_text("Hello.")
    with pytest.raises(ValueError, match=r"hold \d+ tokens, one sequence needs 65; add text or lower data.seq_len"):
        pack([str(tmp_path / "short.txt")], tiny_teacher, 64, tmp_path)


def test_parquet_rows_are_documents(tmp_path):
    import datasets

    path = tmp_path / "t.parquet"
    datasets.Dataset.from_dict({"text": ["one", "two"]}).to_parquet(path)
    assert documents(str(path)) == ["one", "two"]


def chatty(folder):
    path = folder / "chat.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"What is {i}?", "answer": "given"}) for i in range(3)))
    return path


def test_the_teacher_writes_on_prompts_once_and_the_same_again_after_an_interruption(tiny_teacher, tmp_path):
    prompts = source(tmp_path, "alpha", 40, " ".join(["hello to everyone here"] * 12))
    name, said = f"generated:20x8:{prompts}", []
    first = generated(name, tiny_teacher, tmp_path, said.append)
    assert len(first) == 20 and [line.partition(",")[0] for line in said] == ["teacher writes 16/20 documents", "teacher writes 20/20 documents"]
    tokenizer = load_tokenizer(tiny_teacher)
    begun = [tokenizer.decode(tokenizer(text)["input_ids"][:32]) for text in documents(prompts)[:20]]
    assert all(text.startswith(start) for text, start in zip(first, begun, strict=True))
    assert len({text[len(start) :] for text, start in zip(first, begun, strict=True)}) > 15

    whole = next(tmp_path.glob("generated-*.jsonl"))
    lines = whole.read_text().splitlines(keepends=True)
    whole.with_suffix(".part").write_text("".join(lines[:16]) + lines[16][:10])
    whole.unlink()
    said.clear()
    assert generated(name, tiny_teacher, tmp_path, said.append) == first and said == ["teacher writes 20/20 documents, 0 s left"]
    said.clear()
    assert generated(name, tiny_teacher, tmp_path, said.append) == first and said == []


def test_the_teacher_answers_chats_anew(tiny_teacher, tmp_path):
    made = generated(f"generated:3x6:{chatty(tmp_path)}", tiny_teacher, tmp_path, print)
    assert [chat[0]["content"] for chat in made] == ["What is 0?", "What is 1?", "What is 2?"]
    assert all(chat[1]["role"] == "assistant" and chat[1]["content"] != "given" for chat in made)
    assert len(pack([f"generated:3x6:{chatty(tmp_path)}"], tiny_teacher, 16, tmp_path).ids) >= 1


def test_with_a_mocked_gpu_and_a_mocked_vllm_the_prompts_go_there_seeded_one_by_one(tiny_teacher, tmp_path, monkeypatch):
    asked = []

    class LLM:
        def __init__(self, path, dtype):
            assert path == str(tiny_teacher) and dtype == "bfloat16"

        def generate(self, prompts, each, use_tqdm):
            asked.extend(zip(prompts, each, strict=True))
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=[40, 41])]) for _ in prompts]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("compress.train.data.find_spec", lambda name: name == "vllm")
    made = generated("generated:3x6:embedded:docstrings", tiny_teacher, tmp_path, print)
    tokenizer = load_tokenizer(tiny_teacher)
    assert [params.seed for _, params in asked] == [0, 1, 2] and {params.max_tokens for _, params in asked} == {6}
    assert made == [tokenizer.decode(prompt["prompt_token_ids"]) + tokenizer.decode([40, 41]) for prompt, _ in asked]
    assert all(len(prompt["prompt_token_ids"]) == 32 for prompt, _ in asked)


@pytest.mark.parametrize(
    ("rest", "message"), [("many:embedded:topics", "is not generated:COUNTxTOKENS:PROMPTS"), ("9999x8:embedded:topics", "wants 9999 prompts")]
)
def test_malformed_generated_sources_are_refused(tiny_teacher, tmp_path, rest, message):
    with pytest.raises(ValueError, match=message):
        generated(f"generated:{rest}", tiny_teacher, tmp_path, print)
