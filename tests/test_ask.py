"""`compress ask`: what it prints and remembers, beside the speakers' own answers; tiny models."""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from fake_records import ROWS, write_run

from compress import ask
from compress.__main__ import main
from compress.formats.gguf import export_gguf
from compress.formats.llamacpp import Ending
from compress.models.checkpoint import digest, model_of
from compress.score.talk import open_speaker, prompts_of
from compress.text.repetition import loops


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Scripted:
    """A speaker that says what it is told to, and keeps what it was asked. None is Ctrl-C."""

    def __init__(self, *answers: list[str | None]) -> None:
        self.answers, self.prompts = list(answers), []

    def chat_prompt(self, turns):
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in turns)

    def prompt_ids(self, text):
        return text.split(">")

    def stream(self, prompt, n):
        self.prompts.append(prompt)
        for piece in self.answers.pop(0):
            if piece is None:
                raise KeyboardInterrupt
            yield piece
        return Ending(3, True)


def scripted(*answers, label="toy", context=1000, templated=True) -> ask.Voice:
    return ask.Voice(label, "torch", Scripted(*answers), templated, context)


@pytest.fixture(scope="module")
def gguf(tiny_teacher, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    export_gguf(tiny_teacher, file, "Q8_0")
    return file


@pytest.fixture
def run(tiny_teacher, gguf, tmp_path, monkeypatch) -> Path:
    """runs/demo/TIME of a teacher, a healed student and its GGUF, all the tiny teacher."""
    path = write_run(tmp_path / "runs", rows=[ROWS[0], ROWS[3], ROWS[-1]])
    for folder, weights in (
        ("00-teacher", tiny_teacher),
        ("01-heal", tiny_teacher),
        ("02-gguf", gguf),
    ):
        shutil.rmtree(path / folder / "weights")
        (path / folder / "weights").symlink_to(weights)
    monkeypatch.chdir(tmp_path)
    return path


def write_bundle(path: Path, gguf: Path, source: str, teacher: str) -> Path:
    lineage = [
        {"slot": "teacher", "technique": "teacher"},
        {"slot": "gguf", "technique": "export_gguf"},
    ]
    manifest = {
        "schema": 1, "run": "demo/now", "judged": "tiny.gguf", "scores": {}, "verdicts": [],
        "lineage": lineage, "config": {"teacher": {"source": source}},
        "teacher": {"digest": teacher},
    }  # fmt: skip
    path.mkdir()
    shutil.copy(gguf, path / "tiny.gguf")
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def cli(capfd, *arguments: object) -> tuple[int, str, str]:
    code = main(["ask", *map(str, arguments)])
    return code, *capfd.readouterr()


@pytest.mark.parametrize("kind", ["gguf", "checkpoint"])
def test_one_question_prints_the_runtimes_own_answer(kind, gguf, tiny_teacher, capfd):
    path = gguf if kind == "gguf" else tiny_teacher
    code, out, err = cli(capfd, path, "What", "is a tree?", "--tokens", 12)
    model = model_of(path)
    with open_speaker(model, 1) as speaker:
        [answer] = speaker.answers(prompts_of(speaker, ["What is a tree?"], True), 12)
    assert (code, err, answer.ended) == (0, "", False)
    remarks = "did not end within 12 tokens" + "; repeats itself" * loops(answer.text)
    text = ask.printable(
        answer.text.strip().rstrip("\ufffd")
    )  # a character cut short is not streamed
    assert re.sub("\ufffd+\n", "\n", out) == f"{path.name}: {text}\n({remarks})\n\n"


def test_json_holds_the_answer_as_it_is(gguf, capfd):
    code, out, _ = cli(capfd, gguf, "hi", "--tokens", 5, "--json")
    with open_speaker(model_of(gguf), 1) as speaker:
        [answer] = speaker.answers(prompts_of(speaker, ["hi"], True), 5)
    found = json.loads(out)
    seconds = found["answers"][0].pop("seconds")
    assert code == 0 and 0 < seconds < 60
    said = {
        "model": "tiny.gguf",
        "runtime": "llama.cpp",
        "answer": answer.text.strip(),
        "ended": False,
    }
    assert found == {"question": "hi", "answers": [said | {"loops": False, "tokens": 5}]}


def test_a_streams_ending_is_that_of_the_whole_answer(tiny_teacher, tmp_path, capfd):
    model = tmp_path / "ends"
    shutil.copytree(tiny_teacher, model)
    with open_speaker(model_of(model), 1) as speaker:
        [answer] = speaker.answers(prompts_of(speaker, ["hi"], True), 8)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, answer.ids[5]]}))
    code, out, _ = cli(capfd, model, "hi", "--tokens", 8, "--json")
    [found] = json.loads(out)["answers"]
    assert code == 0 and found["ended"] and found["tokens"] == answer.ids.index(answer.ids[5])


def test_a_checkpoint_stops_computing_when_its_stream_is_closed(tiny_teacher):
    with open_speaker(model_of(tiny_teacher), 1) as speaker:
        steps = []
        speaker.model.register_forward_hook(lambda *_: steps.append(time.sleep(0.002)))
        stream = speaker.stream(speaker.chat_prompt([{"role": "user", "content": "hi"}]), 400)
        next(stream)
        so_far = len(steps)
        stream.close()
    assert so_far < 300 and len(steps) < so_far + 20


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("demo", ["teacher", "gguf"]),
        ("demo/2026-11-21T03-30-00/heal", ["teacher", "heal"]),
        ("demo/02-gguf", ["teacher", "gguf"]),
        ("demo/teacher", ["teacher"]),
    ],
)
def test_a_run_or_its_slot_answers_beside_its_teacher(name, labels, run, capfd):
    code, out, _ = cli(capfd, name, "hi", "--tokens", 3, "--json")
    answers = json.loads(out)["answers"]
    assert code == 0 and [one["model"] for one in answers] == labels
    assert [one["runtime"] for one in answers] == [
        "llama.cpp" if label == "gguf" else "torch" for label in labels
    ]
    code, out, err = cli(capfd, name, "hi", "--tokens", 3, "--alone")
    assert [line.split(":")[0] for line in out.splitlines() if ": " in line] == labels[
        -1:
    ] and err == ""


def test_a_run_without_its_teachers_weights_answers_alone(run, capfd):
    (run / "00-teacher" / "weights").unlink()
    code, out, err = cli(capfd, "demo", "hi", "--tokens", 3)
    assert code == 0 and out.startswith("gguf: ") and "teacher" not in out
    weights = "runs/demo/2026-11-21T03-30-00/00-teacher/weights"
    missing = f"the teacher's weights are not here ({weights} is missing)"
    assert err == f"gguf answers alone: {missing}\n"


@pytest.mark.parametrize(
    ("source", "teacher", "said"),
    [
        ("DIRECTORY", "", ""),
        ("DIRECTORY", "other", "on this machine is not the one of the bundle"),
        (
            "owner/name",
            "",
            "and 'owner/name' is not on this machine; name the run to ask both",
        ),
        (
            "packaged:no_such_package",
            "",
            "the teacher's package 'no_such_package' is not installed",
        ),
    ],
)
def test_a_bundle_asks_its_teacher_where_no_network_is_needed(
    source, teacher, said, tiny_teacher, gguf, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("the network was asked")
    )
    bundle = write_bundle(
        tmp_path / "bundle",
        gguf,
        source.replace("DIRECTORY", str(tiny_teacher)),
        teacher or digest(tiny_teacher),
    )
    code, out, err = cli(
        capfd, bundle, "hi", "--tokens", 3, "--json", "--store", tmp_path / "store"
    )
    labels = [one["model"] for one in json.loads(out)["answers"]]
    assert code == 0 and said in err
    assert labels == (["gguf"] if said else ["teacher", "gguf"])


def test_a_model_without_a_template_is_asked_in_plain_text(
    tiny_teacher, tmp_path, monkeypatch, capfd
):
    bare = tmp_path / "bare"
    shutil.copytree(tiny_teacher, bare)
    (bare / "chat_template.jinja").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\n"))
    code, out, err = cli(capfd, bare, "--tokens", 3)
    assert code == 0 and err == "bare has no chat template and is asked in plain text\n"
    assert [line for line in out.splitlines() if line.startswith("> ")] == ["> one", "> two"]
    voice = scripted(["1"], ["2"], templated=False)
    for question in ("one", "two"):
        ask.reply(voice, question, 5, lambda piece: None)
    assert voice.speaker.prompts == [
        "Question: one\nAnswer:",
        "Question: one\nAnswer: 1\nQuestion: two\nAnswer:",
    ]


def test_an_answer_in_plain_text_ends_where_the_model_asks_itself():
    pieces = [" Par", "is", ".\n", "Quest", "ion: And", " of Italy?"]
    voice, shown = scripted(pieces, templated=False), []
    answer = ask.reply(voice, "What is the capital of France?", 64, shown.append)
    assert answer.text == "Paris." and answer.ending.ended
    assert "".join(shown) == "toy: Paris.\n" and voice.turns[-1]["content"] == "Paris."

    # What only looks like it is said after all.
    voice, shown = scripted([" Yes\n", "Que", "rying"], templated=False), []
    assert ask.reply(voice, "Is it?", 64, shown.append).text == "Yes\nQuerying"
    assert "".join(shown) == "toy: Yes\nQuerying\n"
    voice, shown = scripted([" Yes\n", "Que"], templated=False), []
    assert ask.reply(voice, "Is it?", 64, shown.append).text == "Yes\nQue"
    assert "".join(shown) == "toy: Yes\nQue\n"


def test_each_line_of_a_pipe_is_a_question_of_its_own(gguf, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhello\n"))
    code, out, _ = cli(capfd, gguf, "--tokens", 4, "--json")
    first, second = (json.loads(line)["answers"][0]["answer"] for line in out.splitlines())
    assert code == 0 and first == second, "the second answer knows of the first"


def test_a_conversation_on_a_terminal(gguf, monkeypatch, capfd):
    prompts = []
    put = ask.Voice.prompt

    def kept(self, question, n):
        turns, prompt = put(self, question, n)
        prompts.append(prompt)
        return turns, prompt

    monkeypatch.setattr(ask.Voice, "prompt", kept)
    monkeypatch.setattr(
        "sys.stdin",
        Terminal(
            "I am Ada\nWho am I?\n/nwe\n\n/new\nhello\n" + "long " * 400 + "\n/quit\nnever asked\n"
        ),
    )
    code, out, err = cli(capfd, gguf, "--tokens", 4)
    assert code == 0 and len(prompts) == 3
    assert (
        "I am Ada" in prompts[1]
        and "Who am I?" in prompts[1]
        and prompts[1].count("<|im_start|>assistant") == 1
    )
    assert "I am Ada" not in prompts[2]
    assert "/nwe is no command; did you mean '/new'? allowed: /new, /quit" in err
    assert "which has room for 508 beside an answer of 4; shorten it or lower --tokens)" in out


def test_ctrl_c_at_the_prompt_leaves_and_the_end_of_input_too(gguf, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdin", Terminal(""))
    assert cli(capfd, gguf)[0] == 0

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert cli(capfd, gguf)[0] == 130


def test_ctrl_c_stops_an_answer_and_the_next_model_answers(capsys):
    voices = [
        scripted(["Once ", "upon ", None], ["again"], label="a"),
        scripted(["b's"], label="b"),
        scripted([None], label="c"),
    ]
    ask.answer_in_text(voices, "Tell", 9, talking=True)
    assert capsys.readouterr().out == "a: Once upon \n(stopped)\n\nb: b's\n\nc: \n(stopped)\n\n"
    ask.reply(voices[0], "And?", 9, lambda piece: None)
    assert voices[0].speaker.prompts[1] == "<user>Tell<assistant>Once upon<user>And?"
    assert voices[2].turns == [], "a question without an answer is not remembered"
    with pytest.raises(KeyboardInterrupt):
        ask.answer_in_text([scripted(["Once", None])], "Tell", 9)


def test_the_oldest_turns_are_forgotten_and_that_is_said(capsys):
    voice = scripted(
        ["1"], ["2"], ["3"], context=7
    )  # three turns are 4 tokens here, five are 6, an answer 2
    for question in "abc":
        ask.reply(voice, question, 2, lambda piece: None)
    assert voice.speaker.prompts == [
        "<user>a",
        "<user>a<assistant>1<user>b",
        "<user>b<assistant>2<user>c",
    ]
    assert capsys.readouterr().err == "(toy is out of room and forgets 1 of 2 earlier turns)\n"
    with pytest.raises(
        ValueError,
        match="the question is 7 tokens long for toy, which has room for 5 beside an answer of 2",
    ):
        ask.reply(voice, ">>>>>", 2, lambda piece: None)
    assert len(voice.turns) == 4


def test_what_acts_on_a_terminal_is_never_shown(capsys):
    voice = scripted(
        [" \n", "\x1b]0;owned\x07red\x1b[31m\ttab", "\r\x9b2J\u202eknil", "\u00e9\U0001f600\n"],
        label="a\x1b[2J",
    )
    ask.answer_in_text([voice], "hi", 9)
    assert capsys.readouterr().out == "a[2J: ]0;ownedred[31m\ttab2Jknil\u00e9\U0001f600\n\n\n"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["GGUF", "hi", "--tokens", "0"], 2, "--tokens 0: an answer has at least 1"),
        (
            ["GGUF", "hi", "--tokens", "600"],
            2,
            "--tokens 600: tiny.gguf has room for 512 with the question; use less",
        ),
        (["GGUF", ""], 2, "the question is empty"),
        (["GGUF", "--json"], 2, "--json needs a question"),
        ([], 2, "the following arguments are required: RUN|BUNDLE|MODEL"),
        (["GGUF", "hi " * 600], 3, "the question is 1206 tokens long for tiny.gguf"),
        (["nothing", "hi"], 3, "no run called 'nothing'"),
        (["nothing", "hi"], 3, "or name a model: a checkpoint or ONNX directory, or a GGUF file"),
        (["no.gguf", "hi"], 3, "no.gguf does not exist"),
        (["CUT", "hi"], 3, "cut.gguf is no whole GGUF"),
    ],
)
def test_what_can_not_be_asked_is_refused_in_a_sentence(
    arguments, code, message, gguf, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", Terminal(""))
    Path("cut.gguf").write_bytes(gguf.read_bytes()[:20_000])
    found, _, err = cli(capfd, *({"GGUF": gguf, "CUT": "cut.gguf"}.get(a, a) for a in arguments))
    assert found == code and message in err and err.count("\n") == 1
