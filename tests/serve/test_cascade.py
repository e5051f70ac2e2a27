"""The student answers, and where it is unsure a larger model, here a second tiny server: who
answered, what it cost, and that no request fails whatever becomes of the teacher.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from served import FOREVER, KEY, Served, entries, tiny_gguf

from compress.errors import ConfigError
from compress.serve import calibration
from compress.serve.backend import Backend
from compress.serve.calibration import Row, calibrate, calibrated, outcome, read_rule, written
from compress.serve.service import warnings_of
from compress.serve.settings import Rule, Settings, TeacherSettings
from compress.serve.student import Student
from compress.serve.target import target_of

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 20} | FOREVER
BY = "x-compress-answered-by"
NEVER, ALWAYS = -100, 0  # thresholds in nats: below any certainty, and above


@pytest.fixture(scope="module")
def ggufs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cascade")
    return {
        name: tiny_gguf(folder / name, seed=seed)
        for seed, name in enumerate(("student", "teacher"))
    }


@pytest.fixture
def key_file(tmp_path):
    (tmp_path / "key").write_text(KEY + "\n")
    return tmp_path / "key"


def text(answer):
    return answer["choices"][0]["message"]["content"]


def behind(gguf, url, key_file, threshold, *more):
    """A student with a teacher."""
    teacher = ("--teacher", f"{url}/v1", "--teacher-key-file", key_file)
    return Served(gguf, *teacher, "--threshold", threshold, *more)


def dead_url():
    """Where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_the_unsure_student_is_helped_and_no_request_fails_when_the_teacher_is_killed(
    ggufs, key_file
):
    """The teacher is a cascade itself, which is always sure; its own teacher is not there."""
    teacher = behind(ggufs["teacher"], dead_url(), key_file, NEVER)
    student = behind(ggufs["student"], teacher.url, key_file, ALWAYS, "--teacher-price", "1:10")
    alone = teacher.post(CHAT, BODY)
    assert alone["headers"][BY] == "student"

    # Whole and in pieces it is the teacher's answer.
    helped = student.post(CHAT, BODY)
    assert helped["headers"][BY] == "teacher" and text(helped) == text(alone)
    client = openai.OpenAI(base_url=f"{student.url}/v1", api_key=KEY, max_retries=0)
    asked = {"model": student.model, "messages": BODY["messages"], "max_tokens": 20}
    events = list(client.chat.completions.create(**asked, stream=True, extra_body=FOREVER))
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(pieces) == text(alone) and not any(event.usage for event in events)

    # Both are counted: two answers of 20 tokens, and twice 16 of the student's that were unsure.
    assert student.figure('compress_answered_total{by="teacher",why="unsure"}') == 2
    assert student.figure('compress_tokens_total{by="teacher",kind="answer"}') == 40
    assert student.figure('compress_tokens_total{by="student",kind="answer"}') == 32
    read = student.figure('compress_tokens_total{by="teacher",kind="prompt"}')
    assert student.figure('compress_cost_total{by="teacher"}') == pytest.approx(
        (read + 10 * 40) / 1e6
    )

    # Long answers of the teacher are under way when it is killed.
    long = BODY | {"max_tokens": 600}
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(student.post, CHAT, long) for _ in range(3)]
        teacher.until(lambda: teacher.figure("compress_running") >= 1)
        teacher.end(signal.SIGKILL)
        answers = [one.result() for one in waiting]
    answers += [student.post(CHAT, BODY) for _ in range(3)]
    assert all("choices" in answer for answer in answers), answers
    assert {answer["headers"][BY] for answer in answers[3:]} == {"student"}

    # Where it keeps failing it is left alone.
    code, _, log = student.end()
    reasons = [row["why"] for row in entries(log)]
    assert reasons[:2] == ["unsure"] * 2 and set(reasons[2:]) == {"down", "paused"}
    assert code == 0
    assert "Hello" not in log and KEY not in log


def test_a_slow_teacher_and_one_over_its_budget_leave_the_answer_to_the_student(ggufs, key_file):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        limits = ("--teacher-timeout", 0.3, "--teacher-budget", 1)
        student = behind(ggufs["student"], url, key_file, ALWAYS, *limits)
        answers = [student.post(CHAT, BODY) for _ in range(2)]
        client = openai.OpenAI(base_url=f"{student.url}/v1", api_key=KEY, max_retries=0)
        asked = {"model": student.model, "prompt": "Once", "max_tokens": 5, "stream": True}
        assert list(client.completions.create(**asked, extra_body=FOREVER))
    assert [answer["headers"][BY] for answer in answers] == ["student", "student"]
    assert student.figure('compress_teacher_failures_total{why="slow"}') == 1
    _, _, log = student.end()
    assert [row["why"] for row in entries(log)] == ["slow", "budget", "budget"]


@pytest.mark.slow
def test_the_teacher_answers_while_the_student_is_started_again(ggufs, key_file):
    teacher = Served(ggufs["teacher"])
    student = behind(ggufs["student"], teacher.url, key_file, NEVER)
    assert student.post(CHAT, BODY)["headers"][BY] == "student"
    pid = student.process.pid
    child = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    os.kill(child, signal.SIGKILL)
    assert student.post(CHAT, BODY)["headers"][BY] == "teacher"
    student.until(lambda: student.figure("compress_ready") == 1, 60)
    assert student.post(CHAT, BODY)["headers"][BY] == "student"

    # In the middle of an answer of which nobody has anything yet.
    child = int(Path(f"/proc/{pid}/task/{pid}/children").read_text())
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(student.post, CHAT, BODY | {"max_tokens": 600})
        tokens = 'compress_tokens_total{by="student",kind="answer"}'
        probed = student.figure(tokens)
        student.until(lambda: student.figure(tokens) > probed)
        os.kill(child, signal.SIGKILL)
        answer = waiting.result()
    assert answer["headers"][BY] == "teacher" and "choices" in answer
    _, _, log = student.end()
    reasons = [row["why"] for row in entries(log)]
    assert reasons == ["sure", "student_gone", "sure", "student_gone"]
    teacher.end()


# ----------------------------------------------------------------- the threshold


def rows_of(n, lost, unsure_when_lost, unsure_otherwise):
    """Prompts that the teacher is right on, every `lost`-th wrong by the student."""
    rows = []
    for i in range(n):
        wrong = i // 2 % lost == 0
        low = unsure_when_lost if wrong else unsure_otherwise
        rows.append(Row(True, not wrong, [-3.0 if low(i) else -0.1, -0.1]))
    return rows


def test_a_student_that_is_unsure_when_it_is_wrong_keeps_the_promise():
    held = calibrated(rows_of(400, 10, lambda i: True, lambda i: False), 16, "sha")
    assert held["verdict"] == "met" and "the promise" in held["sentence"]
    assert held["heldout"]["kept"]["value"] == 1.0
    assert held["heldout"]["calls"]["value"] == pytest.approx(0.1)


def test_a_student_that_is_sure_of_what_is_wrong_cannot_keep_it_and_that_is_said():
    rows = rows_of(400, 3, lambda i: False, lambda i: i % 7 == 0)
    held = calibrated(rows, 16, "sha")
    assert held["verdict"] == "missed"
    assert "can't be met" in held["sentence"] and "would take 100% of the calls" in held["sentence"]
    assert held["heldout"]["calls"]["value"] <= calibration.CALLS + 0.05


def test_what_a_few_prompts_cannot_show_is_undecided():
    held = calibrated(rows_of(60, 10, lambda i: True, lambda i: False), 16, "sha")
    assert held["verdict"] == "undecided" and "is not shown" in held["sentence"]
    with pytest.raises(ValueError, match="right on 10 of 10 prompts of a half, at least 20"):
        calibrated(rows_of(20, 10, lambda i: True, lambda i: False), 16, "sha")


def test_shares_are_those_of_a_count_by_hand():
    rows = [
        Row(True, False, [-2.0]),  # asked, kept
        Row(True, True, [-0.1]),  # believed, kept
        Row(True, False, [-0.1]),  # believed, lost
        Row(False, True, [-2.0]),  # asked, and nothing to keep
    ]
    kept, calls = outcome(rows, Rule(-1.0))
    assert (kept.value, kept.of) == (pytest.approx(2 / 3), 3)
    assert (calls.value, calls.of) == (0.5, 4)
    assert kept.low < 2 / 3 < kept.high


def test_certainty_is_mean_and_lowest():
    logprobs = [-0.5, -1.0, -3.0]
    assert Rule(0, weight=0).certainty(logprobs) == pytest.approx(-1.5)
    assert Rule(0, weight=1).certainty(logprobs) == -3.0
    assert Rule(0, weight=0.5).certainty(logprobs) == pytest.approx(-2.25)
    assert Rule(-2.25).believes(logprobs) and not Rule(-2.24).believes(logprobs)
    assert Rule(0).believes([])


def test_a_threshold_is_calibrated_on_the_answers_of_a_bundle(ggufs, tmp_path):
    prompts = [{"id": f"p{i:03d}", "prompt": f"Say {i}."} for i in range(44)]
    right = {"right": True}
    answers = [
        {"id": row["id"], "teacher": right, "student": {"right": i % 5 > 0}}
        for i, row in enumerate(prompts)
    ]
    for name, rows in ((calibration.PROMPTS, prompts), (calibration.ANSWERS, answers)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    async def work():
        backend = Backend(target_of(ggufs["student"]), Settings(key=KEY, threads=1))
        student = Student(backend)
        try:
            await backend.start()
            return await calibrate(student, tmp_path, "a-digest", tokens=3)
        finally:
            await student.close()
            await backend.stop()

    held = asyncio.run(work())
    assert held["chosen_on"]["kept"]["of"] == held["heldout"]["kept"]["of"] == 22
    assert -20 < held["threshold"] < 0 and held["tokens"] == 3

    # It is read back for the same model alone.
    file = tmp_path / "cascade.json"
    file.write_text(written(held))
    rule = read_rule(str(file), "a-digest")
    assert (rule.threshold, rule.tokens, rule.weight) == (held["threshold"], 3, held["weight"])
    with pytest.raises(ValueError, match="calibrated with another model"):
        read_rule(str(file), "another")
    file.write_text('{"schema": 1, "threshold": NaN}')
    with pytest.raises(ValueError, match="'threshold' is NaN, needed: a finite number"):
        read_rule(str(file), "a-digest")
    with pytest.raises(ConfigError, match="neither a number of nats"):
        read_rule("high", "a-digest")


def test_a_bundle_without_open_answers_cannot_be_calibrated(tmp_path):
    with pytest.raises(ValueError, match="has no open_prompts.jsonl"):
        calibration.questions(tmp_path)


# ------------------------------------------------------------------ its address


@pytest.mark.parametrize(
    ("url", "warns"),
    [
        ("http://teacher.example/v1", True),
        ("http://10.0.0.7:8080/v1", True),
        ("https://teacher.example/v1", False),
        ("http://127.0.0.1:8080/v1", False),
        ("http://[::1]:8080/v1", False),
    ],
)
def test_a_teacher_without_tls_outside_this_machine_is_warned_of_by_name(url, warns):
    remarks = warnings_of(Settings(key=KEY), TeacherSettings(url, Rule(0)))
    assert [url in remark and "no TLS" in remark for remark in remarks] == [True] * warns


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("teacher.example/v1", "is no URL"),
        ("ftp://teacher.example", "is no URL"),
        ("https://me:secret@teacher.example/v1", "has a user, password or token in a URL"),
    ],
)
def test_an_address_that_is_none_or_holds_a_password_is_refused(url, sentence):
    with pytest.raises(ConfigError, match=sentence) as caught:
        TeacherSettings(url, Rule(0))
    assert "secret" not in str(caught.value)
