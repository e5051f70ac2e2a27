"""Comparing candidates: refusals, differences with intervals, what got worse, and the page in a
real browser.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from fake_records import ASKED, PROMPTS, ROWS, ask, write_run
from scipy import stats

from compress.__main__ import main
from compress.report.compare import (
    Difference,
    accuracy_differences,
    differences,
    flips,
    open_differences,
    speed_sentence,
)
from compress.report.html import write_html
from compress.report.records import folder_of, load_run, open_run
from compress.score.intervals import ratio_interval

TEXT = 'Which is right? <script>alert("x")</script> ' + "a-very-long-word" * 12


def answers(rights, task="grammar"):
    return [
        {
            "task": task,
            "doc_id": i,
            "correct": bool(r),
            "choice": 1 - int(r),
            "logliks": [-5.0, -4.0 - i],
        }
        for i, r in enumerate(rights)
    ]


def write_items(run, slot, items):
    (
        folder_of(run.path, next(r for r in run.records if r["slot"] == slot)) / "items.jsonl"
    ).write_text("".join(json.dumps(item) + "\n" for item in items))


@pytest.fixture
def runs(tmp_path):
    """Two runs of other sizes and answers; those of the grammar task with their texts."""
    first = load_run(write_run(tmp_path / "runs"))
    second = load_run(
        write_run(
            tmp_path / "runs",
            "2026-11-22T09-00-00",
            [(*row[:4], row[4] * 0.5, *row[5:]) for row in ROWS],
        )
    )
    coin = np.random.default_rng(0)
    for run, share in ((first, 0.9), (second, 0.6)):
        asked = [
            {"context": f"{TEXT} {i}", "choices": ["yes & no", "<b>no</b>"]} for i in range(80)
        ]
        grammar, facts = (answers(coin.random(80) < share, task) for task in ("grammar", "facts"))
        write_items(
            run, "gguf", [*(item | text for item, text in zip(grammar, asked, strict=True)), *facts]
        )
        write_items(run, "teacher", answers([1] * 80))
    (second.path / "bundle").mkdir()
    (second.path / "bundle" / "requests.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in answers([1] * 80))
    )
    (second.path / "bundle" / "answers.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in second.rows(second.final, "items"))
    )
    return first, second


def change(run, **config):
    (run.path / "run.json").write_text(json.dumps(run.info | {"config": config}))
    return load_run(run.path)


def test_other_settings_are_refused_by_name_and_other_precision_is_not(runs, tmp_path, capfd):
    base = {"eval": {"limit": 100, "repeats": 3}, "data": {"heldout": ["a"], "train": ["b"]}}
    first = change(runs[0], **base)
    page = ["--html", str(tmp_path / "page.html")]
    for other, said in (
        (
            base | {"eval": {"limit": 50, "repeats": 3}},
            "eval.limit is 100 in demo/2026-11-21T03-30-00 and 50 in demo/2026-11-22T09-00-00",
        ),
        (base | {"data": {"heldout": ["c"]}}, "data.heldout is ['a'] in"),
    ):
        second = change(runs[1], **other)
        assert main(["compare", str(first.path), str(second.path), *page]) == 3
        assert said in capfd.readouterr().err
    second = change(
        runs[1],
        eval={"limit": 100, "repeats": 20, "processes": 5},
        data={"heldout": ["a"], "train": ["z"]},
    )
    assert main(["compare", str(first.path), str(second.path), *page]) == 0
    for run in (first, second):
        change(run, eval={"data_dir": str(run.path)}, data={"heldout": [str(run.path)]})
        (run.path / "run.json").write_text(
            json.dumps(load_run(run.path).info | {"digests": {"the tasks' files": "aa"}})
        )
    assert main(["compare", str(first.path), str(second.path), *page]) == 0, (
        "files of other names that hold the same"
    )
    (second.path / "run.json").write_text(
        json.dumps(load_run(second.path).info | {"digests": {"the tasks' files": "bb"}})
    )
    assert main(["compare", str(first.path), str(second.path), *page]) == 3
    assert (
        "the digest of the tasks' files is 'aa' in demo/2026-11-21T03-30-00 and 'bb' in"
        in capfd.readouterr().err
    )
    older = {key: value for key, value in second.info.items() if key != "digests"} | {
        "config": {"data": {"heldout": ["other text"]}}
    }
    (second.path / "run.json").write_text(json.dumps(older))
    assert main(["compare", str(first.path), str(second.path), *page]) == 3, (
        "a run that knows no digests is told by its files' names"
    )
    assert "data.heldout is " in capfd.readouterr().err
    (second.path / "run.json").write_text(
        (first.path / "run.json").read_text().replace(first.name, second.name)
    )
    file = second.path / "00-teacher" / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"digest": "another"}))
    assert main(["compare", str(first.path), str(second.path), *page]) == 3
    assert "the teacher's digest is" in capfd.readouterr().err
    assert main(["compare", str(first.path), "--speed"]) == 2
    assert "--speed compares with the first; name a second" in capfd.readouterr().err


def test_accuracy_is_paired_by_item():
    first, other = answers([1] * 60 + [0] * 40), answers([1] * 50 + [0] * 45 + [1] * 5)
    (one,) = accuracy_differences(first, other)
    assert (
        one.metric == "acc/grammar"
        and one.value == pytest.approx(-0.05)
        and one.p == pytest.approx(0.3017578125)
    )  # 10 and 5 of 15 flips
    error = np.sqrt((15 / 100 - 0.05**2) / 100)  # of a paired mean
    assert one.interval == pytest.approx((-0.05 - 1.96 * error, -0.05 + 1.96 * error), abs=0.015)
    assert str(one).startswith("-5.0 points (95% interval -") and str(one).endswith(
        "p 0.3): no difference shown"
    )
    (same,) = accuracy_differences(first, first)
    assert (
        same.value == 0 and -0.03 < same.interval[0] < 0 < same.interval[1] < 0.03 and same.p == 1
    )
    assert (
        accuracy_differences(first, answers([1], "facts"))
        == []
        == accuracy_differences([{"task": "t", "doc_id": 0, "logliks": [1.0]}], first)
    )


def test_the_mean_over_tasks_counts_tasks_alike():
    first = answers([1] * 10) + answers([1] * 1000, "facts")
    mean, facts, grammar = accuracy_differences(
        first, answers([0] * 5 + [1] * 5) + answers([1] * 1000, "facts")
    )
    assert (mean.metric, facts.value, grammar.value) == ("acc/mean", 0, -0.5)
    assert mean.value == pytest.approx(-0.25) and mean.interval == pytest.approx(
        tuple(x / 2 for x in grammar.interval), abs=0.06
    )


def test_intervals_of_both_sides_make_the_interval_of_the_difference(runs):
    first, second = runs
    first.final["intervals"], second.final["intervals"] = (
        {"kl_to_teacher": [0.47, 0.55]},
        {"kl_to_teacher": [0.40, 0.44]},
    )
    second.final["scores"]["kl_to_teacher"] = 0.419
    found = {one.metric: one for one in differences(first, second)}
    one = found["kl_to_teacher"]
    assert one.interval == pytest.approx(
        (-0.09 - np.hypot(0.019, 0.041), -0.09 + np.hypot(0.021, 0.039))
    )
    assert (
        "no difference" not in str(one)
        and str(found["size_bytes"]) == "-28.2 MB"
        and str(found["params"]) == "the same"
    )
    assert "latency_ms_p50" in found
    second.info["machine"]["cpu"] = "another"
    assert not {"latency_ms_p50", "ttft_ms_p50", "tok_per_sec"} & {
        one.metric for one in differences(first, second)
    }
    assert str(Difference("latency_ms_p50", -0.0312)) == "-0.0312 ms"


def test_figures_of_the_same_text_are_paired_row_by_row(runs):
    first, second = runs
    hard = np.linspace(0.1, 1.2, 8)  # rows differ by far more than the two models do
    better = hard - np.array([0.02, 0.03, 0.02, 0.025, 0.03, 0.02, 0.025, 0.03])
    for run, rows in ((first, hard), (second, better)):
        run.final["scores"] |= {
            "kl_to_teacher": rows.mean(),
            "bits_per_byte/heldout": rows.sum() / 80,
        }
        run.final["rows"] = {
            "kl_to_teacher": [rows.tolist()],
            "bits_per_byte/heldout": [rows.tolist(), [10] * 8],
        }
        run.final["intervals"] = {
            name: ratio_interval(*own) for name, own in run.final["rows"].items()
        }
    found = {one.metric: one for one in differences(first, second)}
    lost = stats.t.interval(0.95, 7, np.mean(better - hard), stats.sem(better - hard))
    assert found["kl_to_teacher"].interval == pytest.approx(lost, abs=2e-4)
    assert found["bits_per_byte/heldout"].interval == pytest.approx(
        [x / 10 for x in lost], abs=2e-5
    )
    second.final["rows"]["bits_per_byte/heldout"][1] = [11] * 8  # of another text
    apart = {one.metric: one for one in differences(first, second)}[
        "bits_per_byte/heldout"
    ].interval
    assert apart is not None and apart[0] < -0.04 < 0.04 < apart[1]


def test_flips_begin_with_the_surest_mistake_and_carry_the_text():
    first, other = answers([1, 1, 1, 0]), answers([0, 1, 0, 1])
    other[2] |= {"context": "Which?", "choices": [" yes", " no"]}
    other[3] |= {"context": ["A", "B"], "choices": [" x", " x"]}
    found = flips(first, [*other, {"task": "text", "doc_id": 0, "correct": True, "text": "5"}])
    assert [(f.doc_id, f.became) for f in found] == [(0, "worse"), (2, "worse"), (3, "better")]
    assert found[0].nats == 1.0 and found[1] == ("grammar", 2, "worse", -1.0, "Which?", "yes", "no")
    assert (found[0].right, found[0].wrong) == ("choice 0", "choice 1") and (
        found[2].text,
        found[2].right,
        found[2].wrong,
    ) == ("", "A x", "B x")


def flags(name, values):
    return [
        {"id": f"own-{i:03d}", "prompt": "?", "right": True} | {name: bool(v)}
        for i, v in enumerate(values)
    ]


def test_open_answers_are_paired_prompt_by_prompt():
    first, other = flags("loops", [0] * 90 + [1] * 10), flags("loops", [0] * 80 + [1] * 20)
    for rows in (first, other):
        for row in rows:
            row["ended"] = True
    found = {one.metric: one for one in open_differences(first, other[:99], [])}
    assert found["open/loops"].value == pytest.approx(10 / 99) and "open/kept" not in found
    error = np.sqrt((10 / 99 - (10 / 99) ** 2) / 99)  # of a paired mean: ten changed, all one way
    ends = 10 / 99 - 1.96 * error, 10 / 99 + 1.96 * error
    assert found["open/loops"].interval == pytest.approx(ends, abs=0.02)
    assert found["open/right"].value == 0 and "no difference shown" in str(found["open/right"])
    assert str(found["open/loops"]).startswith("+10.1 points (95% interval +")
    assert open_differences(first, [], []) == []


def test_open_kept_is_over_what_the_teacher_gets_right():
    """Of 40 prompts the teacher gets 20 right: the first of two all of these and no other, the
    second 15 of these and all others."""
    teacher = flags("right", [1] * 20 + [0] * 20)
    first = flags("right", [1] * 20 + [0] * 20)
    other = flags("right", [1] * 15 + [0] * 5 + [1] * 20)
    for row in [*first, *other]:
        row |= {"loops": False, "ended": True}
    found = {one.metric: one.value for one in open_differences(first, other, teacher)}
    assert found["open/kept"] == pytest.approx(-0.25)
    assert found["open/right"] == pytest.approx(15 / 40)
    fewer = {one.metric for one in open_differences(first[1:], other, teacher)}
    assert "open/kept" not in fewer, "19 right ones are too few"


def test_differences_of_runs_hold_the_paired_answers_and_those_of_each_text(runs):
    first, second = runs
    ask(first.path)
    ask(second.path, [one[3] if i % 2 else one[4] for i, one in enumerate(ASKED)])
    for path in (first.path, second.path):
        file = path / "07-gguf" / "record.json"
        record = json.loads(file.read_text())
        record["scores"] |= {"kl_to_teacher/a": 1.0, "kl_to_teacher/b": 2.0, "top1_agree/a": 0.5}
        file.write_text(json.dumps(record))
    first, second = load_run(first.path), load_run(second.path)
    found = {one.metric: one for one in differences(first, second)}
    names = list(found)
    assert names.index("open/right") < names.index("open/kept") < names.index("kept")
    assert "open/ended" in names
    before, after = (
        [row["right"] for row in run.rows(run.final, "open")] for run in (first, second)
    )
    gained = sum(after) - sum(before)
    assert gained == 5 and found["open/right"].value == pytest.approx(gained / len(PROMPTS))
    assert {"kl_to_teacher/a", "kl_to_teacher/b", "top1_agree/a"} <= found.keys()
    assert "top1_agree/b" not in found
    for path in (first.path, second.path):  # committed runs have no rows
        (path / "07-gguf" / "open.jsonl").unlink()
    apart = {one.metric: one for one in differences(first, second)}["open/right"]
    assert apart.value == pytest.approx(gained / len(PROMPTS)), "by the records' own intervals"
    assert np.ptp(apart.interval) > np.ptp(found["open/right"].interval)


def test_answers_that_got_worse_are_listed_with_both_texts(runs, tmp_path):
    first, second = runs
    ask(first.path)
    said = [
        "a <b>worse</b> answer" if i in (6, 7) else one[3] if i == 1 else one[4]
        for i, one in enumerate(ASKED)
    ]
    ask(second.path, said)
    write_html([load_run(first.path), load_run(second.path)], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    section = page[page.index("Answers that changed: ") :].partition("</section>")[0]
    assert f"Answers that changed: {second.name}" in section
    assert "1 got worse, 1 better." in section
    assert ASKED[7][1] in section and "The sum is 10." in section
    assert "a &lt;b&gt;worse&lt;/b&gt; answer" in section
    assert ASKED[6][1] not in section, "wrong in both"
    write_html([load_run(first.path), load_run(first.path)], tmp_path / "page.html")
    assert "Answers that changed: " not in (tmp_path / "page.html").read_text()


def test_runs_that_were_asked_other_things_are_refused(runs, tmp_path, capfd):
    page = ["--html", str(tmp_path / "page.html")]

    def settings(run, prompts, limit, digest, stages=False):
        asked = {"open_prompts": prompts, "open_limit": limit, "time_stages": stages}
        info = change(run, eval=asked, data={}).info | {"digests": {"the open prompts": digest}}
        (run.path / "run.json").write_text(json.dumps(info))
        return str(run.path)

    one = settings(runs[0], ["embedded"], None, "aa")
    for prompts, limit, said in (
        (["mine"], None, "eval.open_prompts is ['embedded'] in"),
        (["embedded"], 8, "eval.open_limit is None in"),
        (["embedded"], None, "the digest of the open prompts is 'aa' in"),
    ):
        assert main(["compare", one, settings(runs[1], prompts, limit, "bb"), *page]) == 3
        assert said in capfd.readouterr().err
    other = settings(runs[1], ["bundle/open_prompts.jsonl"], 240, "aa", stages=True)
    code = main(["compare", one, other, *page])
    assert code == 0, "the same prompts by another name; times of stages don't matter"


def test_a_speed_up_whose_interval_holds_1_is_no_difference(runs):
    said = speed_sentence(*runs, "latency_ms_p50", (1.02, 0.97, 1.08))
    assert said.startswith(
        "a further token: no difference shown, demo/2026-11-22T09-00-00 is 1.02 times as fast (95%"
        " interval 0.97 to 1.08)"
    )
    assert "no difference" not in speed_sentence(*runs, "ttft_ms_p50", (1.2, 1.1, 1.3))


def test_runs_slots_and_bundles_stand_side_by_side(runs, tmp_path, capfd):
    first, second = runs
    lineage = [
        {key: r[key] for key in ("slot", "technique", "parent", "digest")} for r in second.records
    ]
    manifest = {
        "schema": 1,
        "run": second.name,
        "judged": "model-Q4_0.gguf",
        "config": {},
        "lineage": lineage,
        "machine": second.info["machine"],
    }
    manifest |= {key: second.final[key] for key in ("scores", "verdicts")}
    (second.path / "bundle" / "manifest.json").write_text(json.dumps(manifest))
    bundle = open_run(str(second.path / "bundle"))
    assert (
        bundle.final["runtime"] == "llama.cpp" and bundle.final["scores"] == second.final["scores"]
    )
    assert [row["correct"] for row in bundle.rows(bundle.final, "items")] == [
        row["correct"] for row in second.rows(second.final, "items")
    ]
    assert bundle.rows(bundle.final, "steps") == [] != bundle.rows(bundle.records[0], "items")
    names = [str(first.path), f"{second.path}/heal", f"{second.path}/bundle"]
    assert main(["compare", *names, "--html", str(tmp_path / "page.html")]) == 0
    out = capfd.readouterr().out
    assert (
        "front" in out
        and f"{second.name}/heal from {first.name}" in out
        and f"{second.name}/bundle" in out
    )
    assert "  latency_ms_p50           +10.9 ms" in out
    page = (tmp_path / "page.html").read_text()
    assert "3 candidates compared" in page and page.count("What differs: ") == 2


def test_without_a_file_the_slot_that_ships_is_the_final_one(tmp_path):
    run = load_run(write_run(tmp_path, rows=[row for row in ROWS if row[0] != "gguf"]))
    assert run.final == run.records[-1] and run.final["slot"] != "heal"
    assert change(run, ship="heal").final["slot"] == "heal"


def test_the_committed_demo_can_be_compared(runs, tmp_path, capfd):
    demo = str(Path(__file__).resolve().parents[2] / "results" / "demo")
    assert main(["compare", demo, f"{demo}/qat", "--html", str(tmp_path / "page.html")]) == 0
    assert "kl_to_teacher" in capfd.readouterr().out


PROBE = """<iframe id=f width=%d height=3000 src="page.html"></iframe><script>
f.onload = () => {
  const d = f.contentDocument;
  const all = [...d.querySelectorAll("summary, [tabindex='0']")]
    .filter(e => e.getClientRects().length);
  const reached = all.filter(e => { e.focus(); return d.activeElement === e; });
  d.querySelectorAll("summary").forEach(e => e.click());
  document.body.textContent = JSON.stringify({
    scroll: d.documentElement.scrollWidth, width: d.documentElement.clientWidth,
    all: all.length, reached: reached.length,
    open: d.querySelectorAll("details[open]").length, details: d.querySelectorAll("details").length,
    items: [...d.querySelectorAll(".items li")].filter(e => e.getClientRects().length).length,
    scripts: d.scripts.length, shown: d.querySelector(".items .context").innerText});
};</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_in_chromium_the_page_fits_and_the_keyboard_reaches_everything(runs, tmp_path, width):
    for run, said in zip(runs, (None, [TEXT * 3] * len(ASKED)), strict=True):
        ask(run.path, said)
    first, second = (load_run(run.path) for run in runs)
    write_html([first, second], tmp_path / "page.html", ["a further token: no difference shown"])
    (tmp_path / "probe.html").write_text(PROBE % width)
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path}/profile",
    ]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=4000", "--dump-dom", f"file://{tmp_path}/probe.html"],
        capture_output=True,
        text=True,
    )
    body = shown.stdout.partition("<body>")[2].partition("</body>")[0]
    found = json.loads(body.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert found["scroll"] <= found["width"], "the page scrolls sideways"
    assert found["all"] == found["reached"] > 10 and found["open"] == found["details"] > 2
    assert found["items"] > 10 and found["scripts"] == 0 and '<script>alert("x")' in found["shown"]
