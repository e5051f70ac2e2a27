"""Reading runs back, the tables and the page: the numbers shown are the records' numbers, and
nothing else gets in.
"""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from fake_records import ASKED, PROMPTS, ROWS, ask, write_run
from rich.console import Console

from compress.report.html import write_html
from compress.report.picture import lines_svg
from compress.report.records import load_run, open_run, worst
from compress.report.table import (
    compare_table,
    fronts,
    markdown_table,
    print_table,
    stage_table,
    standing,
    undominated,
    verdict_lines,
)

HOSTILE = "<script>alert(1)</script>\"'&|"


@pytest.fixture
def run(tmp_path):
    return load_run(write_run(tmp_path))


@pytest.fixture
def later(tmp_path):
    smaller = [(*row[:4], row[4] * 0.5, *row[5:]) for row in ROWS]
    return load_run(write_run(tmp_path, "2026-11-22T09-00-00", smaller))


def printed(table, width: int = 40, terminal: bool = False) -> str:
    out = io.StringIO()
    print_table(table, Console(file=out, width=width, force_terminal=terminal, _environ={}))
    return out.getvalue()


# ------------------------------------------------------------------ records


def test_records_come_in_slot_order_whatever_the_folders_say(run):
    assert [r["slot"] for r in run.records] == [row[0] for row in ROWS]
    assert run.teacher["slot"] == "teacher" and run.final["slot"] == "gguf"
    assert worst(run.records) == "INCONCLUSIVE"


def test_interrupted_run_is_readable_and_a_finished_one_with_a_hole_is_not(run):
    (run.path / "07-gguf" / "record.json").unlink()
    with pytest.raises(
        ValueError, match="incomplete run .*no record.json for gguf; `compress run demo` again"
    ):
        load_run(run.path)
    (run.path / "run.json").write_text(json.dumps({**run.info, "exit": None, "finished": None}))
    assert load_run(run.path).final["slot"] == "qat"


def test_missing_run_says_what_a_run_is(tmp_path):
    with pytest.raises(
        ValueError,
        match="no run at .*nowhere: it has no run.json; a run is .*runs/<recipe>/<time>/",
    ):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": {"params": "many"}}, r"scores\['params'\] is 'many', allowed: a number"),
        ({"scores": None}, "'scores' is None, allowed: a dict"),
        ({"schema": 9}, "schema 9, this version reads schema 1"),
        ({"slot": "stranger"}, "slot 'stranger' is not in run.json's slots"),
        ({"verdicts": [{"verdict": "MAYBE"}]}, "allowed: a sentence and one of"),
    ],
)
def test_malformed_record_names_file_and_key(run, change, message):
    file = run.path / "03-heal" / "record.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f"03-heal/record.json: .*{message}"):
        load_run(run.path)


def test_broken_json_names_the_file(run):
    (run.path / "run.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match="cannot read .*run.json: .*run the recipe again"):
        load_run(run.path)


def test_open_run_takes_a_path_a_name_the_newest_and_a_slot(run, later, tmp_path):
    for name, path, slot in (
        (str(run.path), run.path, "gguf"),
        ("demo/2026-11-21T03-30-00", run.path, "gguf"),
        ("demo", later.path, "gguf"),
        (f"{tmp_path}/demo", later.path, "gguf"),
        ("demo/heal", later.path, "heal"),
        ("demo/2026-11-21T03-30-00/heal", run.path, "heal"),
        (f"{run.path}/03-heal", run.path, "heal"),
    ):
        found = open_run(name, tmp_path)
        assert (found.path, found.final["slot"]) == (path, slot), name
    assert open_run("demo/heal", tmp_path).name == "demo/2026-11-22T09-00-00/heal"
    with pytest.raises(
        ValueError,
        match=(
            "no run called 'dmeo' in .*; did you mean 'demo'. allowed: demo; name a run directory"
        ),
    ):
        open_run("dmeo", tmp_path)
    with pytest.raises(ValueError, match="has no run or slot 'haal'; did you mean 'heal'"):
        open_run("demo/haal", tmp_path)


def test_a_committed_run_without_folders_is_readable_and_has_no_weights(run, tmp_path):
    committed = tmp_path / "results"
    committed.mkdir()
    (committed / "run.json").write_text(json.dumps(run.info))
    (committed / "records.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in run.records)
    )
    found = open_run(str(committed))
    assert found.records == run.records and found.rows(found.final, "items") == []
    with pytest.raises(
        ValueError,
        match=(
            "does not hold the weights of gguf: .*07-gguf/weights is missing; name the run itself"
            " or its bundle"
        ),
    ):
        found.model()
    assert run.model() == ((run.path / "07-gguf" / "weights").resolve(), "llama.cpp")
    (committed / "records.jsonl").write_text('{"schema": 1}\n')
    with pytest.raises(ValueError, match="malformed .*records.jsonl: 'slot' is None"):
        open_run(str(committed))


# ------------------------------------------------------------------- tables


def test_piped_table_has_every_number_whole_and_no_colours(run):
    text = printed(stage_table(run.records))
    assert "\x1b" not in text and "…" not in text
    for number in (
        "134.5",
        "233.6",
        "4.64",
        "0.8120",
        "68.1%",
        "1.702",
        "83.9%",
        "138.6",
        "7.20",
        "INCONCLUSIVE",
    ):
        assert number in text
    assert max(map(len, text.splitlines())) <= 105


def test_terminal_table_mutes_differences_against_the_teacher(run):
    assert re.search(r"\x1b\[2m *-43%", printed(stage_table(run.records), 140, terminal=True))


def test_columns_absent_everywhere_are_left_out(run):
    for record in run.records:
        del record["scores"]["kept"]
    assert "kept" not in printed(stage_table(run.records)) and "kept" not in markdown_table(
        run.records
    )
    del run.records[3]["scores"]["kl_to_teacher"]
    assert re.search(
        r"heal +97.3 +194.7 +16.00 +- .*\n distill ", printed(stage_table(run.records))
    )


def test_verdicts_are_words_where_enforced_and_distances_elsewhere(run, tmp_path):
    assert (standing(run.records[1]), standing(run.records[7])) == ("0/3 met", "INCONCLUSIVE")
    assert verdict_lines(run.records)[0] == "PASS         gguf: size 56.4 MB is within 60.0 MB"
    assert len(verdict_lines(run.records)) == 3
    texts = page_of([run], tmp_path).texts
    assert texts[texts.index(" size 194.7 MB is 134.7 MB over 60.0 MB") - 2 :][:2] == [
        "not yet",
        "prune_width",
    ]
    assert texts[texts.index(" size 56.4 MB is within 60.0 MB") - 2 :][:2] == ["PASS", "gguf"]


def test_markdown_escapes_and_lines_up(run):
    run.records[2]["slot"] = HOSTILE
    lines = markdown_table(run.records).splitlines()
    assert len(lines) == 10 and {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {16}
    assert "<script" not in "".join(lines)


def test_compare_shows_differences_against_the_first_run(run, later):
    final = printed(compare_table([run, later]))
    assert "demo/2026-11-22T09-00-00" in final and "-50%" in final and final.count("gguf") == 2


def test_the_front_marks_what_nothing_beats_in_bytes_and_in_milliseconds(run):
    assert fronts(run.records) == ["bytes, ms", "", "", "", "ms", "", "bytes", "ms"]
    for record in run.records:
        del record["scores"]["kept"]
    assert fronts(run.records)[7] == "ms" and "front" in printed(compare_table([run, run]))  # by KL
    for record in run.records:
        del record["scores"]["kl_to_teacher"]
    assert not any(fronts(run.records)) and "front" not in printed(compare_table([run, run]))


def test_open_columns_stand_before_accuracy_kept(run):
    ask(run.path)
    records = load_run(run.path).records
    heads = markdown_table(records).splitlines()[0]
    assert "| bits/byte | open right | loops | open kept | kept |" in heads
    lines = printed(stage_table(records)).splitlines()
    gguf = next(line for line in lines if line.startswith(" gguf"))
    assert re.search(r" 63\.3% +6\.7% 65\.5% +83\.9% ", gguf)
    assert max(map(len, lines)) <= 125


def test_a_technique_stands_below_its_slot_unless_they_are_called_the_same(run):
    lines = printed(stage_table(run.records)).splitlines()
    assert sum("prune_depth" in line for line in lines) == 1
    heal = [line.startswith(" heal ") for line in lines].index(True)
    assert lines[heal + 1].startswith(" distill ")


# --------------------------------------------------------------------- page


class Page(HTMLParser):
    """Every tag, attribute and visible text of a page;
    fails on a tag that closes what is not open.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page_of(runs, tmp_path) -> Page:
    write_html(runs, tmp_path / "report.html")
    return Page((tmp_path / "report.html").read_text())


def test_page_asks_nobody_and_needs_no_script(run, later, tmp_path):
    run.records[2]["curve"] = [{"step": step, "loss": 2.0 - 0.1 * step} for step in range(5)]
    for runs in ([run], [run, later]):
        page = page_of(runs, tmp_path)
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        assert not {"src", "href", "onload", "onclick"} & {name for name, _ in page.attributes}
        assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
        text = (tmp_path / "report.html").read_text()
        assert not re.search(
            r"https?:|url\(|@import|//[a-z]", re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
        )
        assert ' style="' not in re.sub("<svg.*?</svg>", "", text, flags=re.DOTALL)
        assert ("http-equiv", "Content-Security-Policy") in page.attributes
        assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_page_shows_the_values_of_the_records(run, tmp_path):
    page = page_of([run], tmp_path)
    for record in run.records:
        scores = record["scores"]
        assert (
            f"{scores['size_bytes'] / 1e6:.1f}" in page.texts
            and f"{scores['kept'] * 100:.1f}%" in page.texts
        )
        assert f"{scores['kl_to_teacher']:.4f}" in page.texts
        assert record["digest"] in page.texts
        assert all(any(v["sentence"] in text for text in page.texts) for v in record["verdicts"])
    assert any(
        "gguf: 56.4 MB, kept 83.9%, 7.20 ms per token in llama.cpp" in (v or "")
        for k, v in page.attributes
    )


def test_bars_are_in_proportion_to_kl(run, tmp_path):
    widths = [
        float(v[:-1])
        for k, v in page_of([run], tmp_path).attributes
        if k == "width" and v.endswith("%")
    ]
    kls = [r["scores"]["kl_to_teacher"] for r in run.records]
    assert widths == pytest.approx([100 * kl / max(kls) for kl in kls], abs=0.01)


def test_hostile_names_stay_text(tmp_path):
    rows = [(HOSTILE if x == "heal" else x for x in row) for row in ROWS]
    run = load_run(write_run(tmp_path, rows=[tuple(row) for row in rows]))
    run.records[7]["verdicts"][0]["sentence"] = run.info["machine"]["cpu"] = run.records[7][
        "digest"
    ] = HOSTILE
    run.info["config"][HOSTILE] = run.info["started"] = run.records[7]["runtime"] = HOSTILE
    page = page_of([run], tmp_path)
    assert "script" not in page.tags and HOSTILE in page.texts
    assert not [name for name, _ in page.attributes if name.startswith("on") or "<" in name]


def test_page_survives_records_without_scores_and_nan(run, tmp_path):
    run.records[2]["scores"].update(
        kl_to_teacher=float("nan"), kept=float("nan"), latency_ms_p50=float("inf")
    )
    assert "nan" in page_of([run], tmp_path).texts
    for record in run.records:
        record["scores"], record["verdicts"] = {}, []
    page = page_of([run], tmp_path)
    assert (
        page.tags.count("section") == 5 and "No limit was enforced." in page.texts
    )  # no picture, no bars


def test_picture_falls_back_to_kl_with_up_still_better(run, tmp_path):
    for record in run.records:
        del record["scores"]["kept"]
    text = page_of([run], tmp_path) and (tmp_path / "report.html").read_text()
    assert "KL to teacher (nats, less is better)" in text
    heights = {
        m[1]: float(m[2])
        for m in re.finditer(r'aria-label="(\w+): [^>]*><title>.*? y="([\d.]+)"', text)
    }
    assert heights["teacher"] < heights["heal"] < heights["prune_width"]  # y grows downwards in SVG


def test_pareto_front_is_what_nothing_beats_in_both():
    sizes_and_kept = [(100, 1.0), (50, 0.8), (60, 0.8), (50, 0.7), (40, 0.2)]
    assert undominated([(size, -kept) for size, kept in sizes_and_kept]) == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert undominated(sizes_and_kept) == [
        False,
        False,
        False,
        False,
        True,
    ]  # less is better: the smallest also has the least


def test_names_of_bubbles_in_one_place_stand_apart_and_inside(run, tmp_path):
    page_of([run], tmp_path)
    text = (tmp_path / "report.html").read_text()
    for kind, width in (("wide", 960), ("narrow", 380)):
        svg = re.search(f'<svg class="{kind}".*?</svg>', text, re.DOTALL)[0]
        places = {
            m[3]: (float(m[1]), float(m[2]))
            for m in re.finditer(r'x="([\d.]+)" y="([\d.]+)">(\w+)', svg)
        }
        for one, other in (("heal", "lora"), ("qat", "gguf")):
            (x, y), (u, v) = places[one], places[other]
            assert abs(x - u) > 20 or abs(y - v) > 12
        assert all(0 < places[row[0]][0] < width for row in ROWS)


def test_drawings_follow_the_dark_page_and_are_the_same_every_time(run, tmp_path):
    run.records[2]["curve"] = [{"step": step, "loss": 2.0 - 0.1 * step} for step in range(5)]
    page_of([run], tmp_path)
    first = (tmp_path / "report.html").read_bytes()
    page_of([run], tmp_path)
    assert (tmp_path / "report.html").read_bytes() == first
    drawn = "".join(re.findall("<svg.*?</svg>", first.decode(), re.DOTALL))
    assert (
        "fill: var(--ink, #" in drawn
        and "stroke: var(--line, #" in drawn
        and "fill: var(--quantize, #" in drawn
    )
    assert (
        not re.search(": (#1d1c1a|#6d6a64|#e4e1da|#ffffff)", drawn) and "fill: black" not in drawn
    )


def test_training_curves_are_drawn_from_the_records_and_absent_without_them(run, tmp_path):
    assert "Training" not in page_of([run], tmp_path).texts
    steps = [{"step": step, "loss": 2.0 - 0.1 * step} for step in range(5)]
    run.records[2]["curve"] = [
        *steps,
        {"step": 4, "validation_kl": 1.5},
        {"step": 5, "validation_kl": 1.4},
    ]
    page = page_of([run], tmp_path)
    slot = run.records[2]["slot"]
    assert "Training" in page.texts and {slot, f"{slot}, validation KL"} <= set(page.texts)


def test_lines_go_down_the_page_as_values_fall():
    svg = lines_svg({"a": [(0, 3.0), (1, 2.0), (2, 1.0)]}, "step", "loss")
    path = re.search(r'<title>a</title><path d="M ([\d. L]+)"', svg)[1]
    x, y = zip(*[map(float, point.split()) for point in path.split("L")], strict=True)
    assert list(x) == sorted(x) and list(y) == sorted(y)
    assert y[1] - y[0] == pytest.approx(y[2] - y[1], abs=0.2)
    assert lines_svg({"a": [(0, 1.0)]}, "step", "loss") == ""


# ----------------------------------------------------- what they say when asked


def section_of(page: Page, title: str) -> list[str]:
    """The visible texts of one section that are not white space."""
    texts = [text.strip() for text in page.texts if text.strip()]
    start = texts.index(title)
    ends = [i for i, text in enumerate(texts) if i > start and text in ("Stages", "Training")]
    return texts[start : ends[0]]


def test_the_page_shows_the_worst_ten_answers_and_the_rest_folded(run, tmp_path):
    ask(run.path)
    texts = section_of(page_of([load_run(run.path)], tmp_path), "What they say when asked")
    assert "Asked 30 questions, the teacher answers 29 rightly, the student 19;" in texts[2]
    assert "it keeps 65.5% (95% interval 47." in texts[2]
    assert "6.7% of its answers repeat themselves (the teacher's 0.0%)" in texts[2]
    first = [ASKED[1][1], "facts-001", "teacher", "right", ASKED[1][3]]
    assert texts[3:8] == first
    assert texts[8:13] == ["gguf", "wrong", "loops", "not ended", ASKED[1][4]]
    folded = texts.index("The other 20 answers")
    prompts = [prompt.prompt for prompt in PROMPTS]
    shown = [text for text in texts if text in prompts]
    assert len([text for text in texts[:folded] if text in prompts]) == 10
    assert sorted(shown) == sorted(prompts)
    assert "(nothing)" in texts and not any("plain text" in text for text in texts)


def test_few_answers_are_not_folded_and_none_make_no_section(run, tmp_path):
    assert "What they say when asked" not in page_of([run], tmp_path).texts
    ask(run.path)
    for folder in ("00-teacher", "07-gguf"):
        file = run.path / folder / "open.jsonl"
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:10]))
    texts = section_of(page_of([load_run(run.path)], tmp_path), "What they say when asked")
    assert not any(text.startswith("The other") for text in texts)
    for folder in ("00-teacher", "07-gguf"):  # a committed run: figures without rows
        (run.path / folder / "open.jsonl").unlink()
    texts = section_of(page_of([load_run(run.path)], tmp_path), "What they say when asked")
    assert len(texts) == 3 and texts[2].startswith("Asked 30 questions")


def test_the_page_says_who_was_asked_in_plain_text(run, tmp_path):
    ask(run.path)
    whole = load_run(run.path)
    whole.final["open_form"] = "plain"
    texts = section_of(page_of([whole], tmp_path), "What they say when asked")
    assert "Without a chat template, and so asked in plain text: gguf." in texts[1]


def test_hostile_answers_stay_text_on_the_page(run, tmp_path):
    said = f"{HOSTILE}\n</p></section>`code` <img src=x onerror=alert(1)> {{{{ 7 * 7 }}}}\u202e"
    ask(run.path, [said] * len(ASKED))
    page = page_of([load_run(run.path)], tmp_path)
    assert said in page.texts and not {"script", "img"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert ("dir", "auto") in page.attributes, "what turns a text's direction stays in its block"


def test_answers_that_are_no_text_do_not_stop_the_page(run, tmp_path):
    ask(run.path, ["a lone surrogate: \ud800 \x00 end"] * len(ASKED))
    page_of([load_run(run.path)], tmp_path)
    assert "a lone surrogate: ?" in (tmp_path / "report.html").read_text()


def test_cards_name_open_answers_before_accuracy(run, tmp_path):
    assert "Open answers kept" not in page_of([run], tmp_path).texts
    ask(run.path)
    texts = page_of([load_run(run.path)], tmp_path).texts
    assert texts.index("Open answers kept") < texts.index("Accuracy kept")
    assert texts[texts.index("Open answers kept") + 1] == "65.5% "
    lead = "65.5% of the teacher's right open answers are kept; 83.9% of the"
    assert any(lead in text for text in texts)


def test_stages_that_did_not_pay_are_marked_and_what_went_on_is_named(run, tmp_path):
    assert ("class", "payoffs") not in page_of([run], tmp_path).attributes
    run.records[3]["payoff"] = {"paid": True, "sentence": "paid: kept better", "kept": "heal"}
    told = "did not pay: <b>worse</b>"
    run.records[4]["payoff"] = {"paid": False, "sentence": told, "kept": "heal"}
    write_html([run], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "<li><b>heal</b>: paid: kept better</li>" in text
    unpaid = "did not pay: &lt;b&gt;worse&lt;/b&gt;; heal went on in its place"
    assert f'<li class="INCONCLUSIVE"><b>lora</b>: {unpaid}</li>' in text


def test_closeness_has_a_group_of_bars_for_each_text_where_there_are_several(run, tmp_path):
    for record in run.records:
        record["scores"]["kl_to_teacher/topics"] = 2 * record["scores"]["kl_to_teacher"]
    assert "caption" not in page_of([run], tmp_path).tags, "one text: what it says is what all say"
    for record in run.records[1:]:
        record["scores"]["kl_to_teacher/<code>"] = record["scores"]["kl_to_teacher"]
    page = page_of([run], tmp_path)
    assert page.tags.count("caption") == 2 and {"topics", "<code>"} <= set(page.texts)
    widths = [float(v[:-1]) for k, v in page.attributes if k == "width" and v.endswith("%")]
    kls = [r["scores"]["kl_to_teacher"] for r in run.records]
    both = [*kls[1:], *(2 * kl for kl in kls)]  # on one scale
    assert widths == pytest.approx([100 * kl / max(both) for kl in both], abs=0.01)
