"""Open answers in a bundle: files, model card, `accept`, and what `score` prints."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_records import ASKED, PROMPTS, ask, open_rows, write_run
from markdown_it import MarkdownIt

from compress.__main__ import main
from compress.budget import OPEN, Budget, Limit, judge
from compress.formats.gguf import export_gguf
from compress.models.checkpoint import Model
from compress.report.answers import SHOWN, literal, one_line
from compress.report.records import load_run, open_run
from compress.score.intervals import Scores
from compress.score.measured import Measured
from compress.score.open import beside_teacher, own_scores
from compress.score.prompts import Prompt, as_row
from compress.score.scorer import Scorer, open_prompts
from compress.score.settings import Eval
from compress.ship.bundle import write_bundle
from compress.teacher import random_teacher
from compress.text.settings import Data

HOSTILE = (
    "<script>alert(1)</script> | a | b |\n\n# Heading\n> quote\n- item\n```\ncode `tick`\n"
    "[link](javascript:x) ![img](x) **bold** __u__ ~~s~~ $x$ \\ &lt; &amp; \x1b[31m\x9b \u202e end"
)
LIMITS = {"open/right": {"min": 0.5}, "open/kept": {"min": 0.3}, "open/loops": {"max": 0.3}}


@cache
def whole_files() -> tuple[str, bytes]:
    """config.json and a GGUF of a tiny model: damaged ones are refused before
    anything is measured.
    """
    with tempfile.TemporaryDirectory() as folder:
        random_teacher(Path(folder) / "hf", 0)
        export_gguf(Path(folder) / "hf", Path(folder) / "tiny.gguf", "Q4_0")
        return (Path(folder) / "hf/config.json").read_text(), (
            Path(folder) / "tiny.gguf"
        ).read_bytes()


def made(tmp_path, said=None, prompts=PROMPTS, asked=True, **record):
    """The bundle of a fake run whose judged file said `said`."""
    folder = write_run(tmp_path / "runs")
    if asked:
        ask(folder, said)
    run = load_run(folder)
    for one in run.records:
        one |= {"rows": {}, "intervals": one.get("intervals", {})}
    limits = {name: Limit(**limit) for name, limit in LIMITS.items()}
    scores, intervals = run.final["scores"], run.final["intervals"]
    run.final.update({"verdicts": judge(scores, intervals, limits, enforced=True)} | record)
    run.info["digests"] = {}
    run.info["config"] |= {
        "teacher": {"source": "random:0"}, "export": {"files": ["gguf:Q4_0"]},
        "data": {"train": ["embedded:docstrings"], "chat": [], "heldout": ["embedded:topics"]},
        "eval": {"tasks": [], "open_prompts": ["nowhere.jsonl"]},
        "budget": {"limits": LIMITS, "slots": {}, "strict": False},
    }  # fmt: skip
    for slot in ("00-teacher", "07-gguf"):
        (folder / slot / "items.jsonl").write_text("")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(whole_files()[0])
    (tmp_path / "model-Q4_0.gguf").write_bytes(whole_files()[1])
    shipped = SimpleNamespace(
        model=SimpleNamespace(path=tmp_path / "model-Q4_0.gguf"), record=run.final
    )
    teacher = SimpleNamespace(path=tmp_path, digest="of the teacher")
    out = tmp_path / "bundle"
    return write_bundle(out, run, tmp_path / "hf", [shipped], teacher, passed=True, prompts=prompts)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


# ------------------------------------------------------------------- files


def test_the_terms_of_the_teacher_are_in_the_bundle_and_named_in_its_card(tmp_path):
    (tmp_path / "terms").mkdir()
    (tmp_path / "terms" / "SMALL_TERMS.html").write_text("Be kind.")
    bundle = made(tmp_path)
    assert (bundle / "terms" / "SMALL_TERMS.html").read_text() == "Be kind."
    assert "stays under those terms, which are in `terms/`." in (bundle / "README.md").read_text()
    assert "terms/SMALL_TERMS.html" in (bundle / "SHA256SUMS").read_text()


def test_the_prompts_can_be_asked_again_and_the_answers_are_both_sides(tmp_path):
    bundle = made(tmp_path)
    again = open_prompts(Eval(open_prompts=[str(bundle / "open_prompts.jsonl")]))
    assert again == PROMPTS
    rows = lines(bundle / "open_answers.jsonl")
    assert [row["id"] for row in rows] == [prompt.id for prompt in PROMPTS]
    loop = rows[1]
    assert loop["teacher"] == {
        "form": "same",
        "answer": ASKED[1][3],
        "ended": True,
        "loops": False,
        "right": True,
    }
    assert loop["student"] == {
        "form": "same",
        "answer": ASKED[1][4],
        "ended": False,
        "loops": True,
        "right": False,
    }
    assert main(["verify", str(bundle)]) == 0


def test_prompts_that_only_one_side_answered_are_left_out(tmp_path):
    """A file of them could not be compared by `accept`."""
    bundle = made(tmp_path, prompts=[*PROMPTS, Prompt("own-999", "Unasked?", "own", ["x"])])
    assert len(lines(bundle / "open_prompts.jsonl")) == len(PROMPTS)


def test_a_bundle_is_read_back_as_the_run_that_it_was_made_of(tmp_path):
    bundle = made(tmp_path)
    run, back = load_run(tmp_path / "runs" / "demo" / "2026-11-21T03-30-00"), open_run(str(bundle))
    for ours, theirs in ((run.teacher, back.teacher), (run.final, back.final)):
        rows = [{key: row[key] for key in row if key != "ids"} for row in run.rows(ours, "open")]
        assert back.rows(theirs, "open") == rows and len(rows) == len(PROMPTS)
    (bundle / "open_answers.jsonl").write_text('{"id": "facts-000", "teacher": {}}\n')
    with pytest.raises(
        ValueError, match="malformed .*bundle: 'student' is missing in open_prompts"
    ):
        back.rows(back.final, "open")


def test_nothing_is_written_where_nothing_was_asked(tmp_path):
    bundle = made(tmp_path, asked=False)
    assert not list(bundle.glob("open_*"))
    assert "What it says" not in (bundle / "README.md").read_text()
    back = open_run(str(bundle))
    assert back.rows(back.final, "open") == [] == back.rows(back.teacher, "open")


# -------------------------------------------------------------- model card


def test_the_card_has_the_figures_the_worst_and_some_good_answers(tmp_path):
    card = (made(tmp_path) / "README.md").read_text()
    card = card[card.index("## What it says") : card.index("## Lineage")]
    assert "Asked 30 questions, the teacher answers 29 rightly, the student 19; " in card
    assert "of the 29 it keeps 65.5% (95% interval 47" in card
    assert "6.7% of its answers repeat themselves (the teacher's 0.0%)" in card
    worst, good = card.split("Good ones:")
    assert worst.count("- student, wrong") == 5 and good.count("- student, right: ") == 3
    first = worst[worst.index("\n> ") :].split("\n\n")[0]
    assert "On which continent are the Himalayas?" in first and "wrong, loops, not ended" in first
    assert "plain text" not in card


def test_the_card_says_that_there_was_no_chat_template(tmp_path):
    bundle = made(tmp_path, open_form="plain")
    said = "Without a chat template, and so asked in plain text: gguf."
    assert said in (bundle / "README.md").read_text()
    assert open_run(str(bundle)).final["open_form"] == "plain"


def test_too_few_right_answers_give_no_share(tmp_path):
    """19 right ones: one below the bound."""
    from compress.report.answers import figures

    teacher = open_rows(PROMPTS, [one[3] if i < 19 else "no" for i, one in enumerate(ASKED)])
    student = open_rows(PROMPTS, [one[4] for one in ASKED])
    scores = own_scores(student)[0] | beside_teacher(student, teacher)[0]
    told = figures({"scores": scores})
    assert "fewer than 20 are too few to say what share of them it keeps" in told
    assert "%" not in told.partition("too few")[0]


def test_hostile_answers_stay_text_in_the_card(tmp_path):
    """Rendered by a CommonMark reader with raw HTML and tables on: no markup is theirs."""
    bundle = made(tmp_path, said=[HOSTILE] * len(ASKED))
    card = (bundle / "README.md").read_text()
    section = card[card.index("## What it says") : card.index("## Lineage")]
    assert "<script" not in card and "\x1b" not in card and "\x9b" not in card
    body = section.partition("The worst answers:")[2]
    assert all(line.startswith(">") for line in body.splitlines() if line)
    reader = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    tokens = reader.parse(body)
    inner = [child for token in tokens for child in token.children or []]
    assert {token.type for token in inner} <= {
        "text",
        "text_special",
        "strong_open",
        "strong_close",
    }
    blocks = {token.type.removesuffix("_open").removesuffix("_close") for token in tokens}
    assert blocks == {"blockquote", "paragraph", "inline", "bullet_list", "list_item"}
    texts = ["".join(child.content for child in token.children or []) for token in tokens]
    assert f"student, wrong, not ended: {one_line(HOSTILE)}" in texts
    shown = one_line(HOSTILE)
    assert shown.startswith("<script>") and "# Heading > quote" in shown and shown.endswith(" end")


@pytest.mark.parametrize("text", ["`", "\\", "a`b``c", "*_~|[]<>&\\`$", "<!-- ", "&#60;b>", "1. x"])
def test_literal_renders_as_the_text_itself(text):
    tokens = MarkdownIt("commonmark", {"html": True}).parse(f"> - x: {literal(text)}")
    (inline,) = [token for token in tokens if token.type == "inline"]
    assert "".join(child.content for child in inline.children) == f"x: {text.strip()}"


def test_one_line_is_short_and_says_when_there_is_nothing():
    assert one_line(" \n\t\x00") == "(nothing)"
    assert one_line("a\u2028b\r\nc\x85d") == "a b c d"
    assert one_line("x" * 999) == "x" * SHOWN + " ..."


# ------------------------------------------------------------------ accept


class Asker(Scorer):
    """A scorer whose models said what it is told; what is compared by text is left out."""

    def __init__(self, prompts, said):
        self.prompts, self.said, self.asked = prompts, said, []

    def measure(self, model, *, tasks=True, asked="all", **_):
        self.asked.append((model.path.name, tasks, asked))
        prompts = self.prompts if asked == "all" else []
        texts = dict(zip([p.id for p in PROMPTS], self.said, strict=True))
        rows = open_rows(prompts, [texts[p.id] for p in prompts])
        scores, spread = own_scores(rows) if rows else ({}, {})
        return Measured(model, model.path.name, scores, [], {}, spread, {}, {}, rows)

    def compare(self, student, reference):
        return Scores({"kl_to_teacher": 0.5}, {"kl_to_teacher": (0.4, 0.6)}, [])

    def check_tokenizer(self, model):
        return []

    def _plausible(self, student, teacher):
        assert len(teacher.answers) == len(student.answers)
        return {}


def fields_of(measured):
    """What `score.file.file_scores` gives of it."""
    keys = ("scores", "items", "chance", "intervals", "latency", "rows", "answers")
    return {key: getattr(measured, key) for key in keys}


@pytest.fixture
def accepted(monkeypatch, capfd):
    """Runs `accept` on a bundle whose judged file now says `said`: code, sentences, scorer."""

    def accepted(bundle, said, has_teacher):
        opened = []

        def open_scorer(teacher, data, settings, trainer, store, requests, prompts):
            if teacher.source == "random:0" and not has_teacher:
                raise ValueError("no such teacher")
            assert isinstance(data, Data) and isinstance(settings, Eval)
            opened.append(Asker(prompts, said))
            return opened[-1], Model(bundle / "hf", "of the teacher")

        def file_scores(model, settings, requests, prompts, threads):
            opened.append(Asker(prompts, said))
            return fields_of(opened[-1].measure(model))

        monkeypatch.setattr("compress.session.open_scorer", open_scorer)
        monkeypatch.setattr("compress.accept.file_scores", file_scores)
        code = main(["accept", str(bundle)])
        return code, capfd.readouterr().out, opened[-1]

    return accepted


@pytest.mark.parametrize("has_teacher", [True, False])
def test_accept_asks_the_bundle_s_prompts_again(tmp_path, accepted, has_teacher):
    """The teacher's answers are the bundle's, the judged file's are new: two more right ones."""
    bundle = made(tmp_path)
    now = [ASKED[i][3] if i in (1, 4) else one[4] for i, one in enumerate(ASKED)]
    code, out, scorer = accepted(bundle, now, has_teacher)
    assert code == 0 and scorer.prompts == PROMPTS
    assert (
        "open/kept 72.4% (95% interval 54.6% to 86.0%) is within the limit of at least 30.0%" in out
    )
    assert "PASS         open/loops 3.3%" in out and "PASS         open/right 70.0%" in out
    assert scorer.asked == [("model-Q4_0.gguf", True, "all")]  # no limit needs the teacher


def test_accept_fails_what_got_worse(tmp_path, accepted):
    code, out, _ = accepted(made(tmp_path), ["The The The"] * len(ASKED), False)
    assert code == 4
    assert "FAIL         open/kept 0.0% (95% interval 0.0% to 8.2%) violates the limit" in out


@pytest.mark.parametrize("has_teacher", [True, False])
def test_accept_of_a_bundle_without_prompts_asks_nothing(tmp_path, accepted, has_teacher):
    """As bundles were before open answers."""
    bundle = made(tmp_path, asked=False)
    code, out, scorer = accepted(bundle, [one[4] for one in ASKED], has_teacher)
    assert code == 0 and scorer.prompts == []
    assert out.count("INCONCLUSIVE") == 3
    assert "open/kept was not measured, so its limit >= 30.0% can't be judged" in out


# ------------------------------------------------------------------- score


def test_score_prints_the_worst_answers_with_the_teacher_s(tmp_path, monkeypatch, capfd):
    """On one line each, and no control character reaches the terminal."""
    said = [one[3] for one in ASKED]
    said[1], said[3] = ASKED[1][4], "\x1b[2Jred [bold]x[/bold]\nx"
    student = Asker(PROMPTS, said)
    teacher = Asker(PROMPTS, [one[3] for one in ASKED])
    model = Model(tmp_path / "t", "of the teacher")
    teacher_said = teacher.measure(model)
    monkeypatch.setattr("compress.session.open_scorer", lambda **_: (student, model))
    parts = {"budget": Budget()}
    monkeypatch.setattr("compress.launch.without_recipe", lambda overrides: dict(parts))
    measure = student.measure
    monkeypatch.setattr(
        student, "measure", lambda one, **how: teacher_said if one is model else measure(one)
    )
    file = tmp_path / "model-Q4_0.gguf"
    file.write_bytes(whole_files()[1])
    assert main(["score", str(file), "--teacher", "random"]) == 0
    out = capfd.readouterr().out
    worst = out.partition("the worst answers:\n")[2].splitlines()
    assert worst[:3] == [
        "facts-001: On which continent are the Himalayas?",
        "    teacher, right: The Himalayas are in Asia.",
        f"    student, wrong, loops, not ended: {ASKED[1][4]}",
    ]
    assert sum(line.startswith("    student, ") for line in worst) == 5
    assert "\x1b" not in out and "open/kept" in out


# --------------------------------------------------------------- sentences


@pytest.mark.parametrize("metric", OPEN)
def test_every_open_limit_is_a_sentence(metric):
    limit = (
        Limit(min=0.8) if metric in ("open/right", "open/kept", "open/ended") else Limit(max=0.9)
    )
    found = judge({metric: 0.861}, {metric: (0.805, 0.899)}, {metric: limit}, enforced=True)[0]
    unit = {"open/plausible": ""}.get(
        metric, " points" if metric.endswith(("gained", "lost", "gap")) else "%"
    )
    value, low, high, least, most = (
        f"{100 * x:.1f}{unit}" if unit else f"{x:g}" for x in (0.861, 0.805, 0.899, 0.8, 0.9)
    )
    bound = f"at least {least}" if limit.min else f"at most {most}"
    assert (
        found["sentence"]
        == f"{metric} {value} (95% interval {low} to {high}) is within the limit of {bound}"
    )


def test_what_a_bundle_keeps_of_a_prompt_is_what_a_file_holds():
    prompt = replace(PROMPTS[0], choices=["a", "b"], answer="oxygen", pattern="^x")
    assert "exact" not in as_row(prompt) and as_row(prompt)["pattern"] == "^x"
    assert Prompt(**as_row(prompt)) == prompt
