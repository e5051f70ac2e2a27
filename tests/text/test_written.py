"""Text that the teacher writes itself: on prompts, and out of nothing."""

from __future__ import annotations

import json
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from compress.assets import configs_dir
from compress.models.tokenizer import load_tokenizer
from compress.text import authors, conversations, written
from compress.text.authors import Said
from compress.text.conversations import from_nothing, openings
from compress.text.filter import Filter, evaluation_texts, words_of
from compress.text.packing import pack
from compress.text.sources import documents


def generated(source, teacher, folder, log):
    return written.generated(source, teacher, folder, log, documents)


def source(folder, name, count, words="hello"):
    path = folder / f"{name}.txt"
    path.write_text("\n\n".join(f"{name} number {i} says {words}." for i in range(count)))
    return str(path)


def chatty(folder):
    path = folder / "chat.jsonl"
    path.write_text(
        "\n".join(json.dumps({"question": f"What is {i}?", "answer": "given"}) for i in range(3))
    )
    return path


def test_the_teacher_writes_on_prompts_once_and_the_same_again_after_an_interruption(
    tiny_teacher, tmp_path
):
    prompts = source(tmp_path, "alpha", 40, " ".join(["hello to everyone here"] * 12))
    name, said = f"generated:20x8:{prompts}", []
    first = generated(name, tiny_teacher, tmp_path, said.append)
    assert len(first) == 20 and [line.partition(",")[0] for line in said] == [
        "teacher writes 16/20 documents",
        "teacher writes 20/20 documents",
    ]
    tokenizer = load_tokenizer(tiny_teacher)
    begun = [
        tokenizer.decode(tokenizer(text)["input_ids"][:32]) for text in documents(prompts)[:20]
    ]
    assert all(text.startswith(start) for text, start in zip(first, begun, strict=True))
    assert len({text[len(start) :] for text, start in zip(first, begun, strict=True)}) > 15

    whole = next(tmp_path.glob("generated-*.jsonl"))
    lines = whole.read_text().splitlines(keepends=True)
    whole.with_suffix(".part").write_text("".join(lines[:16]) + lines[16][:10])
    whole.unlink()
    said.clear()
    assert generated(name, tiny_teacher, tmp_path, said.append) == first and said == [
        "teacher writes 20/20 documents, 0 s left"
    ]
    said.clear()
    assert generated(name, tiny_teacher, tmp_path, said.append) == first and said == []


def test_the_teacher_answers_chats_anew(tiny_teacher, tmp_path):
    made = generated(f"generated:3x6:{chatty(tmp_path)}", tiny_teacher, tmp_path, print)
    assert [chat[0]["content"] for chat in made] == ["What is 0?", "What is 1?", "What is 2?"]
    assert all(chat[1]["role"] == "assistant" and chat[1]["content"] != "given" for chat in made)
    assert len(pack([f"generated:3x6:{chatty(tmp_path)}"], tiny_teacher, 16, tmp_path).ids) >= 1


def test_with_a_mocked_gpu_and_a_mocked_vllm_the_prompts_go_there_seeded_one_by_one(
    tiny_teacher, tmp_path, monkeypatch
):
    asked = []

    class LLM:
        def __init__(self, path, dtype):
            assert path == str(tiny_teacher) and dtype == "bfloat16"

        def generate(self, prompts, each, use_tqdm):
            asked.extend(zip(prompts, each, strict=True))
            return [
                SimpleNamespace(outputs=[SimpleNamespace(token_ids=[40, 41], finish_reason="stop")])
                for _ in prompts
            ]

    monkeypatch.setitem(
        sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace)
    )
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("compress.text.written.find_spec", lambda name: name == "vllm")
    made = generated("generated:3x6:embedded:docstrings", tiny_teacher, tmp_path, print)
    tokenizer = load_tokenizer(tiny_teacher)
    assert [params.seed for _, params in asked] == [0, 1, 2] and {
        params.max_tokens for _, params in asked
    } == {6}
    assert made == [
        tokenizer.decode(prompt["prompt_token_ids"]) + tokenizer.decode([40, 41])
        for prompt, _ in asked
    ]
    assert all(len(prompt["prompt_token_ids"]) == 32 for prompt, _ in asked)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ("many:embedded:topics", "is not generated:COUNTxTOKENS:PROMPTS"),
        ("9999x8:embedded:topics", "wants 9999 prompts"),
        (
            "1x8:" + "generated:1x8:" * 500 + "nothing",
            "on prompts that are to be written themselves",
        ),
        ("7" * 5000 + "x8:nothing", "is not generated:COUNTxTOKENS:PROMPTS"),
    ],
)
def test_malformed_generated_sources_are_refused(tiny_teacher, tmp_path, rest, message):
    with pytest.raises(ValueError, match=message):
        generated(f"generated:{rest}", tiny_teacher, tmp_path, print)


# ---- out of nothing ----


class Scripted:
    """An author that says what a function of prompt, tokens and seed says."""

    slots = 1

    def __init__(self, say):
        self.say = say
        self.calls = 0

    def write(self, prompts, tokens, temperature, seeds):
        self.calls += 1
        return [self.say(ids, tokens, seed) for ids, seed in zip(prompts, seeds, strict=True)]

    def close(self):
        pass


@pytest.fixture
def scripted(monkeypatch):
    """Lets an author of the test's own write, eight conversations a piece."""

    def use(say):
        author = Scripted(say)
        monkeypatch.setattr(conversations, "open_author", lambda engine, teacher, folder: author)
        monkeypatch.setattr(conversations, "engine_for", lambda teacher: "transformers")
        monkeypatch.setitem(authors.AT_ONCE, "transformers", 8)
        return author

    return use


def distinct(ids, tokens, seed):
    return Said(f" alpha{seed} beta{seed} gamma{seed} delta{seed}?", True)


def test_conversations_are_rows_of_turns_with_their_provenance(tiny_teacher, tmp_path, scripted):
    scripted(distinct)
    rows = from_nothing(12, 32, tiny_teacher, tmp_path, lambda line: None)
    assert [row["seed"] for row in rows] == list(range(12))
    assert all(set(row) == {"messages", "seed", "opening", "teacher", "engine"} for row in rows)
    for row in rows:
        assert [turn["role"] for turn in row["messages"]][:2] == ["user", "assistant"]
        assert row["messages"][0]["content"].startswith(row["opening"] or "alpha")
    opened = [row for row in rows if row["opening"]]
    assert opened and all(row["opening"] in openings() for row in opened)


def test_the_question_is_written_behind_the_start_of_a_users_turn(tiny_teacher, tmp_path, scripted):
    seen = []

    def say(ids, tokens, seed):
        seen.append(load_tokenizer(tiny_teacher).decode(ids))
        return distinct(ids, tokens, seed)

    scripted(say)
    rows = from_nothing(8, 32, tiny_teacher, tmp_path, lambda line: None)
    for row, prompt in zip(rows, seen[:8], strict=True):
        assert prompt.endswith("<|im_start|>user\n" + row["opening"])


def test_an_interrupted_run_goes_on_with_the_next_seed_and_gives_the_same(
    tiny_teacher, tmp_path, scripted
):
    author = scripted(distinct)
    whole = from_nothing(20, 32, tiny_teacher, tmp_path, lambda line: None)
    calls = author.calls
    assert (
        from_nothing(20, 32, tiny_teacher, tmp_path, lambda line: None) == whole
        and author.calls == calls
    )
    file = next(tmp_path.glob("conversations-*.jsonl"))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(
        "".join(lines[:9]) + "".join(lines[9:12]) + lines[12][:20]
    )  # killed inside the second piece
    assert from_nothing(20, 32, tiny_teacher, tmp_path, lambda line: None) == whole


def test_a_second_turn_that_does_not_end_is_dropped_but_not_the_conversation(
    tiny_teacher, tmp_path, scripted
):
    def say(ids, tokens, seed):
        follows = load_tokenizer(tiny_teacher).decode(ids).count("<|im_start|>user") > 1
        return distinct(ids, tokens, seed) if not follows else Said("and so on", False)

    scripted(say)
    rows = from_nothing(40, 32, tiny_teacher, tmp_path, lambda line: None)
    assert [row["seed"] for row in rows] == list(range(40)) and {
        len(row["messages"]) for row in rows
    } == {2}


def test_a_teacher_that_never_ends_is_given_up_with_a_sentence(tiny_teacher, tmp_path, scripted):
    scripted(lambda ids, tokens, seed: Said("and so on", False))
    with pytest.raises(
        ValueError, match=r"0 are usable, none of the last ones \(unended 160\); allow more tokens"
    ):
        from_nothing(5, 8, tiny_teacher, tmp_path, lambda line: None)


def test_a_base_model_writes_texts_from_bos(tiny_teacher, tmp_path, scripted, monkeypatch):
    starts = []

    def say(ids, tokens, seed):
        starts.append(ids)
        return distinct(ids, tokens, seed)

    scripted(say)
    tokenizer = load_tokenizer(tiny_teacher)
    tokenizer.chat_template = None
    monkeypatch.setattr(conversations, "load_tokenizer", lambda path: tokenizer)
    rows = from_nothing(8, 32, tiny_teacher, tmp_path, lambda line: None)
    assert (
        starts == [[tokenizer.bos_token_id]] * 8
        and rows[3]["text"] == "alpha3 beta3 gamma3 delta3?"
    )


def test_llama_cpp_writes_on_a_cpu_each_with_its_own_seed(tiny_teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(authors, "SLOTS", 4)
    monkeypatch.setattr(authors.LlamaCppAuthor, "slots", 4)
    assert authors.engine_for(tiny_teacher) == "llama.cpp"
    author = authors.open_author("llama.cpp", tiny_teacher, tmp_path)
    try:
        prompt = load_tokenizer(tiny_teacher)("the language")["input_ids"]
        first = author.write([prompt] * 3, 8, 1.0, [1, 2, 1])
        assert first[0] == first[2] != first[1]
    finally:
        author.close()


def test_the_mixed_source_is_read_by_the_packer(tiny_teacher, tmp_path, scripted):
    scripted(distinct)
    packed = pack(["generated:30x32:nothing"], tiny_teacher, 16, tmp_path)
    assert "gamma3" in load_tokenizer(tiny_teacher).decode(packed.ids.flatten())


@pytest.mark.parametrize(
    ("turns", "ended", "reason"),
    [
        (["What is a red fox?", "An animal."], True, ""),
        (["What is a red fox?", "An animal."], False, "unended"),
        (["What is a red fox?", "It is it is it is it is it is it is."], True, "looping"),
        (["Fox?", "An animal."], True, "short"),
        (["What is a red fox?", "..."], True, "short"),
        (["Tell me: what is the biggest city of all Spain, please?", "Madrid."], True, "evaluated"),
        (["Where do people live?", "The biggest city of all Spain is Madrid."], True, ""),
        (["Name three colors now.", "Red."], True, "evaluated"),
    ],
)
def test_the_filter_says_why_a_conversation_is_left_out(turns, ended, reason):
    accept = Filter(["What is the biggest city of all Spain?", "Name three colors.", "Why?"])
    assert accept.reason(turns, ended) == reason


def test_near_duplicates_of_an_earlier_question_are_left_out():
    accept = Filter()
    assert accept.reason(["What is the capital of the country Spain?", "Madrid."], True) == ""
    assert (
        accept.reason(["What is the capital of the country Spain, please?", "Madrid."], True)
        == "duplicate"
    )
    assert accept.reason(["How tall is the tower in the country Spain?", "Tall."], True) == ""
    assert (
        accept.reason(["what is the CAPITAL of the country Spain", "Madrid."], True) == "duplicate"
    )


def test_words_are_compared_without_case_and_punctuation():
    assert words_of("What's 12 + 3, Anna?") == ("what", "s", "12", "3", "anna")


def test_what_students_are_evaluated_on_is_known():
    texts = evaluation_texts()
    assert "The capital of France is" in texts and len(texts) > 600
    files = [
        json.loads(line)["prompt"]
        for line in (configs_dir() / "open" / "prompts.jsonl").read_text().splitlines()
    ]
    assert not Counter(files) - Counter(texts)
