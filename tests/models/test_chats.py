"""Chat templates and tokenizers: which tokens are an answer's, and what a hostile one can't do."""

from __future__ import annotations

import json
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from compress import confined
from compress.confined import Limits
from compress.formats.torch_runtime import rendered
from compress.models.chats import Chat, chat_tokens, render
from compress.models.head import Head
from compress.models.probe import check_tokenizer
from compress.models.tokenizer import load_tokenizer
from compress.models.tokens import encode, encode_with_ends, opening, pieces
from compress.score.fidelity import States, bits_and_bytes
from compress.text import written
from compress.text.authors import Said
from compress.text.packing import pack
from compress.text.sources import documents

USER, ANSWER = (
    {"role": "user", "content": "What is 2 plus 2?"},
    {
        "role": "assistant",
        "content": "It is 4.",
    },
)
BODY = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
# As Qwen3's and DeepSeek's: earlier answers lose their reasoning, the last one is given an empty
# one.
THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set said = m.content.split('</think>')[-1].lstrip('\\n') %}\
{% if loop.last %}<think>
{{ (m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '')\
.strip('\\n') }}
</think>

{% endif %}{{ said }}{% else %}{{ m.content }}{% endif %}<|im_end|>
{% endfor %}"""
STRICT = (
    "{% if messages[0].role == 'system' %}{% if messages | length == 1 %}{{ raise_exception('only a"
    " system turn') }}{% endif %}{% endif %}{% for m in messages %}" + BODY + "{% endfor %}"
)


@pytest.fixture
def tokenizer(tiny_teacher):
    return load_tokenizer(tiny_teacher)


def learned(tokenizer, chat, template=None):
    """(all text, the labels' text, joined where they are apart by a bar)."""
    tokenizer.chat_template = template or tokenizer.chat_template
    ((ids, mask),) = chat_tokens(tokenizer, [Chat(chat, where="FILE, line 7")])
    assert ids.dtype == np.int32 and mask.dtype == bool and len(ids) == len(mask)
    runs, last = [], False
    for token, label in zip(ids, mask, strict=True):
        if label:
            runs = [*runs, [token]] if not last else [*runs[:-1], [*runs[-1], token]]
        last = label
    return tokenizer.decode(ids), [tokenizer.decode(run) for run in runs]


# ---- which tokens are an answer's ----


def test_an_answer_is_what_its_turn_adds(tokenizer):
    assert (
        learned(tokenizer, [USER, ANSWER, USER, ANSWER])[1]
        == ["<|im_start|>assistant\nIt is 4.<|im_end|>\n"] * 2
    )
    assert learned(tokenizer, [ANSWER, USER])[1] == ["<|im_start|>assistant\nIt is 4.<|im_end|>\n"]
    assert learned(tokenizer, [USER])[1] == []


def test_a_template_that_drops_earlier_reasoning_gets_the_labels_of_what_it_renders(tokenizer):
    first = ANSWER | {"content": "<think>\nTwo twos.\n</think>\n\nIt is 4."}
    second = ANSWER | {"content": "<think>\nOne more.\n</think>\n\nThen 5."}
    text, said = learned(tokenizer, [USER, first, USER, second], THINKING)
    assert "Two twos" not in text and text.count("What is 2 plus 2?") == 2
    assert said == ["It is 4.<|im_end|>", "One more.\n</think>\n\nThen 5.<|im_end|>"]


def test_a_template_that_adds_an_empty_reasoning_to_the_last_answer(tokenizer):
    text, said = learned(tokenizer, [USER, ANSWER, USER, ANSWER | {"content": "Then 5."}], THINKING)
    assert text.count("<think>") == 1 and said == ["It is 4.<|im_end|>", "Then 5.<|im_end|>"]


def test_tool_calls_are_part_of_an_answer_that_is_told_by_a_mark(tokenizer):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    template = (
        "{{ messages | length }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{%"
        " for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{%"
        " endfor %}<|im_end|>\n{% endfor %}"
    )
    turns = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        ANSWER,
    ]
    assert learned(tokenizer, turns, template)[1] == ['add{"a": 1}<|im_end|>', "It is 4.<|im_end|>"]


def test_no_beginning_is_rendered_without_need(tokenizer):
    system = {"role": "system", "content": "Be short."}
    assert learned(tokenizer, [system, USER, ANSWER], STRICT)[1] == [
        "<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    ]
    assert learned(tokenizer, [system, ANSWER], STRICT)[1] == ["It is 4.<|im_end|>"]


def test_a_letter_that_joins_two_turns_belongs_to_the_later_one(tokenizer):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [USER | {"content": "the quest"}, ANSWER | {"content": "ion is there"}]
    text, said = learned(tokenizer, turns, template)
    assert text == "the question is there" and "".join(said).endswith("ion is there")


def test_answers_that_cannot_be_told_are_refused_by_row(tokenizer):
    for template in (
        "{% for m in messages %}{{ loop.length }}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{{ m.content }}{% endfor %}",
    ):
        with pytest.raises(
            ValueError,
            match="FILE, line 7: in what the chat template makes of it, answer 2 can't be told",
        ):
            learned(tokenizer, [USER, ANSWER], template)


# ---- the door to a template ----


def test_texts_are_those_of_transformers(tokenizer):
    tools = [{"type": "function", "function": {"name": "add", "description": "Grüße"}}]
    templates = [
        tokenizer.chat_template,
        (
            "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}{% set ns ="
            " namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if ns.n > 3 %}{%"
            " break %}{% endif %}{% generation %}{{ m.content or 'none' }}{% endgeneration %}{%"
            " endfor %}{% if add_generation_prompt %}>{% endif %}"
        ),
        {"default": "d{{ messages[0].content }}", "tool_use": "t{{ tools[0].function.name }}"},
    ]
    for template in templates:
        tokenizer.chat_template = template
        for given in (None, tools):
            for generation in (False, True):
                chat = Chat([USER, {"role": "assistant", "content": None}, USER, ANSWER], given)
                wanted = tokenizer.apply_chat_template(
                    list(chat), tools=given, tokenize=False, add_generation_prompt=generation
                )
                assert render(tokenizer, [chat, chat], generation=generation) == [wanted, wanted]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such turn') }}", "TemplateError: no such turn"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ messages[0].content.nothing.at_all }}", "UndefinedError"),
        ("{% include 'x' %}", "TypeError|TemplateNotFound"),
        ("{{ '%s' | format }}", "TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{% for i in range(100001) %}{% endfor %}", "OverflowError"),
    ],
)
def test_what_a_template_raises_is_a_sentence_with_the_row(tokenizer, template, message):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=rf"FILE, line 7: the chat template fails \(.*({message})"):
        render(tokenizer, [Chat([USER], where="FILE, line 7")])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{# nothing #} {{ '' }}\n", "it makes nothing of the turns"),
        ("<|im_start|>Hello{{ eos_token }}", "it leaves out all that the assistant says"),
        (
            "{% for m in messages %}{{ m.role }} {% if m.role == 'user' %}{{ m.content }}"
            "{% endif %}{% if loop.last %}end{% endif %}{% endfor %}",
            "it leaves out all that the assistant says|can't be told",
        ),
    ],
)
def test_a_template_that_drops_answers_is_blamed_not_the_row(tokenizer, template, message):
    tokenizer.chat_template = template
    chat = Chat([USER, ANSWER], where="FILE, line 7")
    with pytest.raises(ValueError, match=rf"FILE, line 7: .*({message})"):
        chat_tokens(tokenizer, [chat])


def test_a_tokenizer_without_a_template_reads_plain_text_and_names_the_chat(tiny_teacher, tmp_path):
    folder = shutil.copytree(tiny_teacher, tmp_path / "base")
    (folder / "chat_template.jinja").unlink()
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The river was wide and the boat was small."}\n' * 40)
    assert len(pack([str(text)], folder, 16, tmp_path / "data").ids) > 10
    text.write_text('{"prompt": "What?", "completion": "That."}\n' * 40)
    with pytest.raises(
        ValueError, match=r"text.jsonl, line \d+ is a chat, and .* no chat template"
    ):
        pack([str(text)], folder, 16, tmp_path / "data")


def test_an_answer_that_says_nothing_may_be_nothing(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    ((ids, mask),) = chat_tokens(tokenizer, [Chat([USER, ANSWER | {"content": " "}])])
    assert len(ids) and not mask[: len(ids) - 1].any()


def test_templates_of_which_none_is_the_default_are_named(tokenizer):
    tokenizer.chat_template = {"a": "x", "b": "y"}
    with pytest.raises(
        ValueError, match="of its chat templates 'a', 'b' none is the default; name"
    ):
        render(tokenizer, [Chat([USER])])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "has not ended after computing for 0.3 s",
        ),
        ("{{ 10 ** (messages | length * 1000000000) }}", "has not ended after computing for 0.3 s"),
        ("{{ 'a' * 1000000000 }}", "needs more than 0.1 GB of memory"),
        ("{{ 'a' | center(1000000000) }}", "needs more than 0.1 GB of memory"),
        ("{{ '%01000000000d' % 1 }}", "needs more than 0.1 GB of memory"),
        ("{{ ([0] * 99999999) | length }}", "needs more than 0.1 GB of memory"),
        ("{{ 'a' * 1000001 }}", "gives 1,000,001 characters, at most 1,000,000 are allowed"),
    ],
)
def test_a_template_takes_no_more_time_and_memory_than_it_is_given(tokenizer, template, message):
    tokenizer.chat_template = (
        "{% if messages[0].content == 'bad' %}" + template + "{% else %}ok{% endif %}"
    )
    limits = Limits(seconds=0.3, memory_bytes=100_000_000, characters=1_000_000)
    chats = [
        Chat([USER], where="FILE, line 1"),
        Chat([USER | {"content": "bad"}], where="FILE, line 2"),
    ]
    with pytest.raises(ValueError, match=f"FILE, line 2: the chat template fails .*{message}"):
        render(tokenizer, chats, limits=limits)
    assert render(tokenizer, chats[:1]) == ["ok"]  # the next one is served


def test_a_hostile_template_is_refused_wherever_it_is_asked(tokenizer, tiny_teacher, monkeypatch):
    monkeypatch.setattr("compress.models.chats.LIMITS", Limits(seconds=0.2))
    monkeypatch.setattr(
        render, "__kwdefaults__", {"generation": False, "limits": Limits(seconds=0.2)}
    )
    tokenizer.chat_template = (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(
        ValueError, match=f"{tiny_teacher}: its chat template fails .*has not ended"
    ):
        rendered(tokenizer, [USER], tiny_teacher)


def test_a_fork_has_a_process_of_its_own(tokenizer, monkeypatch):
    before = render(tokenizer, [[USER]])
    child = confined._child
    monkeypatch.setattr("os.getpid", lambda: -1)
    assert render(tokenizer, [[USER]]) == before and confined._child is not child
    confined._child.close()
    monkeypatch.undo()
    assert child.process.poll() is None
    confined._child = child


def test_an_interrupted_request_and_a_process_that_was_killed_leave_nothing_behind(
    tokenizer, monkeypatch
):
    before, real = render(tokenizer, [[USER]]), confined._answers

    def interrupted(child, request, count):
        real(child, request, count - 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(confined, "_answers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render(tokenizer, [[USER | {"content": "one"}], [USER | {"content": "two"}]])
    monkeypatch.undo()
    assert render(tokenizer, [[USER]]) == before
    confined._child.process.kill()
    confined._child.process.wait()
    assert render(tokenizer, [[USER]]) == before


# ---- tokenizers ----


def with_pattern(teacher, folder, pattern):
    shutil.copytree(teacher, folder)
    file = folder / "tokenizer.json"
    told = json.loads(file.read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, told["pre_tokenizer"]]}
    file.write_text(json.dumps(told))
    return file


@pytest.mark.parametrize("pattern", ["(a+)+$", r"(\w+\s?)+$", "(z|z)*$", r"q*q*q*q*\d"])
def test_a_pattern_that_backtracks_is_refused_by_name(tiny_teacher, tmp_path, pattern):
    with pytest.raises(
        ValueError,
        match=r"tokenizer.json: its patterns fail on a run of '.' \(.*(retry-limit|not ended)",
    ):
        load_tokenizer(with_pattern(tiny_teacher, tmp_path / "t", pattern).parent)


@pytest.mark.parametrize(
    ("part", "value", "told"),
    [
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100_000},
            r"(a run of 'e'; mend the normalizer|patterns fail on a run of 'e')",
        ),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "€"}, "content": "e" * 200},
            "it makes 200,001 tokens or characters of 1,001 characters, a run of '€'",
        ),
        (
            "normalizer",
            {"type": "Replace", "pattern": {"String": "€"}, "content": "e" * 20},
            "",
        ),
        ("model", {"dropout": 0.5}, "model.dropout is 0.5, so one text has other tokens each time"),
        ("model", {"dropout": 0.0}, ""),
    ],
)
def test_a_tokenizer_that_multiplies_text_or_draws_its_tokens_is_refused(
    tiny_teacher, tmp_path, part, value, told
):
    folder = shutil.copytree(tiny_teacher, tmp_path / "t")
    file = folder / "tokenizer.json"
    table = json.loads(file.read_text())
    table[part] = value if part == "normalizer" else table[part] | value
    table["model"]["vocab"]["dropout"] = table["model"]["vocab"].pop("zz", 511)  # no setting
    file.write_text(json.dumps(table))
    if not told:
        check_tokenizer(file)
        return
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{told}"):
        check_tokenizer(file)


def test_ordinary_patterns_pass_in_little_time(tiny_teacher, tmp_path):
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    file = with_pattern(tiny_teacher, tmp_path / "t", pattern)
    confined.ask("tokenize", ["a"], Limits(), file=str(file))  # the process is there
    begun = time.process_time()
    check_tokenizer(file)
    assert time.process_time() - begun < 0.5
    check_tokenizer(tmp_path / "there is none.json")


def test_a_panic_of_the_tokenizer_is_a_sentence():
    class PanicException(BaseException):
        pass

    def tokenizer(texts, **how):
        raise PanicException("retry-limit-in-match over")

    with pytest.raises(
        ValueError, match=r"the tokenizer fails on a text \(retry-limit-in-match over\)"
    ):
        encode(tokenizer, ["a"])


def test_a_long_document_is_tokenised_in_pieces(tokenizer):
    text = (
        "".join(f"Line {i} of a long text.\n" + "\n" * (i % 3 == 0) for i in range(200)) + "x" * 300
    )
    parts = list(pieces(text, 100))
    assert "".join(parts) == text and max(map(len, parts)) <= 100 and len(parts) > 40
    assert sum(part.endswith("\n\n") for part in parts) > 30
    sizes = []

    def watched(texts, **how):
        sizes.append(max(map(len, texts)))
        return tokenizer(texts, **how)

    ids = encode(watched, [text, "short", ""], size=100)
    assert max(sizes) <= 100 and [tokenizer.decode(row) for row in ids] == [text, "short", ""]
    assert encode(tokenizer, ["short"])[0].tolist() == tokenizer("short")["input_ids"]
    for size in (100, 10_000):
        (ids, ends), (none, _) = encode_with_ends(tokenizer, [text, ""], size)
        assert ends[-1] == len(text) and not len(none)
        assert all(
            tokenizer.decode(ids[: i + 1]) == text[: ends[i]] for i in range(0, len(ids), 17)
        )
    with pytest.raises(ValueError, match="does not say which characters a token stands for"):
        encode_with_ends(SimpleNamespace(is_fast=False), ["a"])


# ---- BOS ----


@pytest.fixture
def bos_teacher(tiny_teacher, tmp_path):
    """The tiny teacher with a tokenizer that begins every text with BOS and a template
    that writes it.
    """
    path = tmp_path / "bos"
    shutil.copytree(tiny_teacher, path)
    tokenizer = load_tokenizer(path)
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer.save_pretrained(path)
    return path


def test_a_text_begins_with_bos_where_the_tokenizer_begins_it_so(bos_teacher, tmp_path):
    tokenizer = load_tokenizer(bos_teacher)
    assert opening(tokenizer) == [tokenizer.bos_token_id]
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(f"Document number {i} says hello." for i in range(40)))
    for packing in ("stream", "documents"):
        packed = pack([str(path)], bos_teacher, 16, tmp_path, packing=packing)
        starts = packed.ids == tokenizer.bos_token_id
        assert packed.ids[0, 0] == tokenizer.bos_token_id and 30 < starts.sum() <= 40
        assert torch.equal(packed.mask, ~starts)
        before = packed.ids.flatten()[torch.roll(starts.flatten(), -1)]
        assert (before[:-1] == tokenizer.eos_token_id).all()


def test_the_bos_between_documents_costs_no_bits(bos_teacher, tmp_path):
    tokenizer = load_tokenizer(bos_teacher)
    states = States(torch.zeros(6, 8), Head(torch.zeros(512, 8)))
    row = torch.tensor([[1, 40, 41, 2, 1, 42, 43]])
    assert bits_and_bytes(states, row, tokenizer)[0] == [pytest.approx(5 * 9)]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A", special_tokens=[])
    assert opening(tokenizer) == [] and bits_and_bytes(states, row, tokenizer)[0] == [
        pytest.approx(6 * 9)
    ]


def test_a_chat_has_the_bos_of_its_template_alone(bos_teacher, tmp_path):
    tokenizer = load_tokenizer(bos_teacher)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n")
    for labels in ("all", "answers"):
        ids = pack([str(path)], bos_teacher, 30, tmp_path, chat_labels=labels).ids
        assert ids[0, 0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1


def test_a_teacher_goes_on_with_a_text_from_its_bos(bos_teacher):
    tokenizer, given = load_tokenizer(bos_teacher), []
    author = SimpleNamespace(
        write=lambda prompts, *more: given.extend(prompts) or [Said(" more", True)]
    )
    assert written._continued(author, tokenizer, ["Hello there"], 8, 0) == ["Hello there more"]
    assert given == [
        [tokenizer.bos_token_id, *tokenizer("Hello there", add_special_tokens=False)["input_ids"]]
    ]


def by_hand(tokenizer, source, labels):
    """(ids, mask) of all documents in order, a turn at a time, as it was done before there were
    pieces, BOS and marks.
    """
    ids, mask = [], []
    for number in torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist():
        document = source[number]
        if isinstance(document, str):
            row = [
                *tokenizer(document, add_special_tokens=False)["input_ids"],
                tokenizer.eos_token_id,
            ]
            marks = [True] * len(row)
        else:
            row, marks = [], []
            for turns in range(1, len(document) + 1):
                text = tokenizer.apply_chat_template(list(document[:turns]), tokenize=False)
                row = tokenizer(text, add_special_tokens=False)["input_ids"]
                marks += [labels == "all" or document[turns - 1]["role"] == "assistant"] * (
                    len(row) - len(marks)
                )
        ids, mask = ids + row, mask + marks
    return ids, mask


@pytest.mark.parametrize("labels", ["all", "answers"])
def test_packed_ids_and_labels_without_bos_are_what_they_were(
    tiny_teacher, tokenizer, tmp_path, monkeypatch, labels
):
    some = [*documents("embedded:topics")[:20], *documents("embedded:conversations")[:40]]
    monkeypatch.setattr("compress.text.packing.documents", lambda source, log: some)
    packed = pack(["some"], tiny_teacher, 256, tmp_path, chat_labels=labels)
    ids, mask = by_hand(tokenizer, some, labels)
    count = packed.ids.numel()
    assert (
        packed.ids.flatten().tolist() == ids[:count]
        and packed.mask.flatten().tolist() == mask[:count]
    )
    assert len(ids) - count < 257
