"""Bundles that somebody else wrote: what `verify`, `accept` and `ask` refuse, and what they never
open.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from dataclasses import fields

import pytest
from fake_records import ASKED, PROMPTS
from test_bundle_open import Asker, fields_of, made

from compress.__main__ import main
from compress.bounds import EMBEDDED_SOURCES
from compress.budget import Limit
from compress.models.checkpoint import Model
from compress.score.settings import Eval
from compress.score.tasks import DRIFTS, RULES
from compress.ship import received
from compress.ship.bundle import SUMS
from compress.text.settings import Data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def bundle(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "bundle")
    return tmp_path / "bundle"


def sealed(bundle, manifest=None):
    """The bundle with a changed manifest, its table of files and all sums written again: what a
    forger does.
    """
    manifest = manifest or json.loads((bundle / "manifest.json").read_text())
    names = sorted(str(p.relative_to(bundle)) for p in bundle.rglob("*") if p.is_file())
    digest = {n: hashlib.sha256((bundle / n).read_bytes()).hexdigest() for n in names}
    if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
        manifest["files"] = {
            n: {"sha256": digest[n], "bytes": (bundle / n).stat().st_size}
            for n in names
            if n not in ("manifest.json", "README.md", SUMS)
        }
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    (bundle / "manifest.json").write_text(text)
    digest["manifest.json"] = hashlib.sha256(text.encode()).hexdigest()
    rows = [f"{digest[n]}  {n}\n" for n in names if n != SUMS]
    (bundle / SUMS).write_text("".join(rows))
    return bundle


def forged(bundle, *path, value):
    """The bundle with one value of its manifest changed, sealed."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    table = manifest
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    return sealed(bundle, manifest)


def refused(capfd, *arguments, code=3):
    """The one sentence of a refusal."""
    assert main(list(map(str, arguments))) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    return err


# ------------------------------------------------------------------ verify


def test_verify_says_what_it_proves_and_prints_what_to_compare(bundle, capfd):
    assert main(["verify", str(bundle)]) == 0
    digest = hashlib.sha256((bundle / SUMS).read_bytes()).hexdigest()
    out = capfd.readouterr().out
    assert "unchanged since it was written; this does not prove who wrote it" in out
    assert f"sha256 of {SUMS}: {digest}" in out
    assert main(["verify", str(bundle), "--sha256", digest.upper()]) == 0
    capfd.readouterr()
    for verb in ("verify", "accept"):
        assert "is not the bundle that was meant" in refused(
            capfd, verb, bundle, "--sha256", "0" * 64
        )
        assert "64 hexadecimal digits" in refused(capfd, verb, bundle, "--sha256", "abc", code=2)


def _double(data):
    return data + data.splitlines(keepends=True)[0]


def _other_sum(data):
    return data + b"0" * 64 + data.splitlines(keepends=True)[0][64:]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: data.replace(b"\n", b"\x0b"),
        lambda data: data.replace(b"\n", b"\x0b", 1),
        lambda data: data.replace(b"  ", b" *"),
        lambda data: data.replace(b"  ", b" "),
        lambda data: data.replace(b"  hf/", b"  ./hf/"),
        lambda data: data.replace(b"  hf/", b"  hf//"),
        lambda data: data.replace(b"  hf/", b"  hf/../hf/"),
        lambda data: data.replace(b"  hf/", b"  /hf/"),
        lambda data: data.upper(),
        lambda data: b"\\" + data,
        lambda data: data + b"\n",
        lambda data: data[:-1],
        lambda data: data + b"\xff" * 70 + b"\n",
        lambda data: data + b"0" * 64 + b"  SHA256SUMS\n",
        lambda data: data + b"0" * 64 + b"  a\x1b[2J\n",
        _double,
        _other_sum,
        lambda data: b"",
    ],
)
def test_sums_that_another_reader_takes_otherwise_are_refused(bundle, capfd, change):
    (bundle / SUMS).write_bytes(change((bundle / SUMS).read_bytes()))
    told = refused(capfd, "verify", bundle)
    assert SUMS in told and "\x1b" not in told


def test_every_bit_of_a_sum_and_of_its_line_end_counts(bundle, capfd):
    data = (bundle / SUMS).read_bytes()
    end = data.index(b"\n")
    for place in (0, 63, 64, 65, 66, end):
        for bit in range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            (bundle / SUMS).write_bytes(changed)
            refused(capfd, "verify", bundle)


@pytest.mark.parametrize(
    ("add", "told"),
    [
        (lambda b: os.mkfifo(b / "pipe"), "pipe is no plain file"),
        (lambda b: (b / "hf" / "empty").mkdir(), "hf/empty is an empty folder"),
        (lambda b: (b / "link").symlink_to("/etc/passwd"), "link is a symbolic link"),
        (lambda b: (b / "link").symlink_to(b / "hf"), "link is a symbolic link"),
        (lambda b: (b / "gone").symlink_to("nowhere"), "gone is a symbolic link"),
        (lambda b: (b / "extra").write_text(""), "extra is not in SHA256SUMS"),
        (lambda b: (b / "hf/config.json").unlink(), "hf/config.json is missing"),
        (lambda b: (b / "README.md").write_text("x"), "README.md was changed"),
    ],
)
def test_what_does_not_belong_is_named(bundle, capfd, add, told):
    add(bundle)
    assert told in refused(capfd, "verify", bundle)


@pytest.mark.parametrize("kind", ["missing", "fifo", "link", "folder"])
def test_sums_are_a_plain_file(bundle, capfd, kind, tmp_path):
    (bundle / SUMS).rename(tmp_path / "kept")
    make = {
        "fifo": os.mkfifo, "link": lambda p: p.symlink_to(tmp_path / "kept"), "folder": os.mkdir,
    }  # fmt: skip
    make.get(kind, lambda p: None)(bundle / SUMS)
    assert "is missing or no plain file" in refused(capfd, "verify", bundle)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "'schema' is missing"),
        ("[]", "holds a JSON list"),
        ("[" * 50_000, "nested too deep"),
        ('{"a": ' * 50_000, "nested too deep"),
        ("{", "is not JSON"),
        ('{"schema": 3}', "install a newer one"),
        ('{"schema": true}', "manifest.json"),
        ("9" * 5000, "can't be read as JSON"),
    ],
)
def test_a_manifest_that_is_none_is_one_sentence(bundle, capfd, text, told):
    sealed(bundle, text)
    for verb in ("verify", "accept"):
        assert told in refused(capfd, verb, bundle)


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("extra",), 1, "the key 'extra' is not known here"),
        (("schema",), True, "'schema' is true, needed: "),
        (("run",), 5, "'run' is 5, needed: a text"),
        (("scores",), {"a": "b"}, "'scores' is"),
        (("intervals",), {"a": [1]}, "'intervals' is"),
        (("scores",), {"a": 10**400}, "'scores' is"),
        (("run",), "cut \ud83d", "holds half a character"),
        (
            ("config", "budget", "limits"),
            {"open/right": {"max": 10**400}},
            "limits.open/right: 'max' is 1000",
        ),
        (("verdicts",), [5], "'verdicts' is [5]"),
        (("verdicts",), {}, "'verdicts' is {}"),
        (("verdicts", 0, "verdict"), "MAYBE", "verdicts[0]: 'verdict' is \"MAYBE\""),
        (("verdicts", 0, "value"), 0.9, "it was edited"),
        (("lineage",), [5], "'lineage' is [5]"),
        (("lineage",), [{}], "lineage[0]: 'slot' is missing"),
        (("teacher",), {}, "teacher: 'digest' is missing"),
        (("config",), [], "'config' is []"),
        (("config", "budget"), 5, "config.budget: 'limits' is missing"),
        (("config", "budget", "limits"), {"open/right": 5}, "limits.open/right holds a JSON int"),
        (("config", "budget", "limits"), {"open/right": {"mx": 1}}, "the key 'mx'"),
        (("config", "budget", "limits"), {"open/right": {"max": "1"}}, "'max' is \"1\""),
        (("config", "budget", "limits"), {"open/right": {"max": float("nan")}}, "'max' is NaN"),
        (("config", "budget", "limits"), {"open/right": {}}, "exactly one of max and min"),
        (("config", "budget", "strict"), "no", "'strict' is 'no'"),
        (("judged",), "../outside", "'judged' is '../outside'"),
        (("judged",), "..", "'judged' is '..'"),
        (("judged",), "", "'judged' is ''"),
        (("judged",), "/etc", "'judged' is '/etc'"),
        (("judged",), "hf/../..", "'judged' is 'hf/../..'"),
        (("judged",), "h", "no file or folder of this bundle"),
        (("files",), 5, "'files' is 5"),
    ],
)
def test_a_forged_manifest_is_refused_by_key(bundle, capfd, path, value, told):
    forged(bundle, *path, value=value)
    for verb in ("verify", "accept"):
        assert told in refused(capfd, verb, bundle)


def test_a_manifest_of_other_files_is_refused(bundle, capfd):
    """Weights changed and the sums written again, the manifest left as it was."""
    manifest = (bundle / "manifest.json").read_bytes()
    (bundle / "model-Q4_0.gguf").write_bytes(b"GGUg")
    sealed(bundle)
    (bundle / "manifest.json").write_bytes(manifest)
    rows = (bundle / SUMS).read_text().splitlines()
    rows = [
        r if "manifest" not in r else hashlib.sha256(manifest).hexdigest() + r[64:] for r in rows
    ]
    (bundle / SUMS).write_text("\n".join(rows) + "\n")
    assert "its table of files differs from SHA256SUMS in model-Q4_0.gguf" in refused(
        capfd, "verify", bundle
    )


def test_an_edited_verdict_contradicts_the_scores(tmp_path, capfd):
    bundle = made(tmp_path, said=["The The The The The The The The The The"] * len(ASKED))
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert "FAIL" in [one["verdict"] for one in manifest["verdicts"]]
    assert "'budget' is PASS, its own scores and limits say FAIL" in refused(
        capfd, "verify", bundle
    )
    forged(bundle, "budget", value="FAIL")
    assert main(["verify", str(bundle)]) == 0
    capfd.readouterr()
    forged(bundle, "verdicts", 0, "verdict", value="PASS")
    assert "it was edited" in refused(capfd, "verify", bundle)
    forged(bundle, "verdicts", value=[])
    forged(bundle, "budget", value="PASS")
    assert "it was edited" in refused(capfd, "verify", bundle)


# ------------------------------------------------------------------ accept


@pytest.fixture
def measured(monkeypatch, capfd, tmp_path):
    """Runs `accept`, whose scorers are told what to say: code, what was printed,
    what was opened.
    """

    def measured(bundle, *flags, digest="of the teacher", has_teacher=True):
        opened = []

        def open_scorer(teacher, data, settings, trainer, store, requests, prompts):
            if not teacher.source.endswith("/hf") and not has_teacher:
                raise ValueError("no such teacher")
            opened.append((teacher, data, settings, requests))
            return Asker(prompts, [one[4] for one in ASKED]), Model(bundle / "hf", digest)

        def file_scores(model, settings, requests, prompts, threads):
            return fields_of(Asker(prompts, [one[4] for one in ASKED]).measure(model))

        monkeypatch.setattr("compress.session.open_scorer", open_scorer)
        monkeypatch.setattr("compress.accept.file_scores", file_scores)
        monkeypatch.chdir(tmp_path)
        code = main(["accept", str(bundle), *flags])
        return code, *capfd.readouterr(), opened

    return measured


def never(*_, **__):
    raise AssertionError("something was measured")


@pytest.fixture
def nothing_is_measured(monkeypatch):
    monkeypatch.setattr("compress.accept.file_scores", never)
    monkeypatch.setattr("compress.session.open_scorer", never)


def test_without_limits_there_is_nothing_to_accept(bundle, capfd, nothing_is_measured):
    forged(bundle, "config", "budget", "limits", value={})
    assert "has no limits" in refused(capfd, "accept", bundle, code=2)


HUGE = 10**9


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("eval", "heldout_sequences"), HUGE, "'heldout_sequences' is 1000000000"),
        (("eval", "repeats"), HUGE, "'repeats'"),
        (("eval", "processes"), HUGE, "'processes'"),
        (("eval", "new_tokens"), HUGE, "'new_tokens'"),
        (("eval", "prompt_tokens"), HUGE, "'prompt_tokens'"),
        (("eval", "context_tokens"), HUGE, "'context_tokens'"),
        (("eval", "batch_size"), HUGE, "'batch_size'"),
        (("eval", "batch_sizes"), [HUGE], "'batch_sizes'"),
        (("eval", "prompt_lengths"), [1] * 99, "'prompt_lengths'"),
        (("eval", "batch_size"), "32", "'batch_size' is \"32\""),
        (("eval", "batch_size"), 1.5, "'batch_size' is 1.5"),
        (("eval", "batch_size"), True, "'batch_size' is true"),
        (
            ("eval", "of_a_newer_version"),
            1,
            "config.eval: the key 'of_a_newer_version' is not known here",
        ),
        (("eval",), [], "config.eval holds a JSON list"),
        (("data", "seq_len"), HUGE, "'seq_len'"),
        (("data", "heldout"), [], "'heldout' is []"),
        (("data", "heldout"), [5], "'heldout' is [5]"),
        (("data", "heldout"), "embedded:topics", "'heldout'"),
        (("data", "more"), 1, "config.data: the key 'more'"),
        (("teacher", "source"), 5, "'source' is 5"),
        (("teacher", "source"), "packaged:evil.sub", "behind packaged:"),
        (("teacher", "source"), "random:" + "9" * 99, "behind random:|the seed after random:"),
        (("teacher",), None, "config.teacher holds a JSON NoneType"),
        (("budget", "limits"), {"acc/../x": {"min": 1, "max": 2}}, "exactly one of max and min"),
        (("budget", "limits"), {"size": {"min": 1}}, "'size' is no metric"),
    ],
)
def test_every_number_and_key_of_the_config_is_bounded(
    bundle, capfd, nothing_is_measured, path, value, told
):
    forged(bundle, "config", *path, value=value)
    message = refused(capfd, "accept", bundle)
    assert "manifest.json" in message and any(one in message for one in told.split("|"))


def test_timing_is_bounded_as_a_whole(bundle, capfd, nothing_is_measured):
    for key, value in (("repeats", 200), ("processes", 50), ("new_tokens", 2048)):
        forged(bundle, "config", "eval", key, value=value)
    assert "timing would write 20,480,000 tokens" in refused(capfd, "accept", bundle)


ITEM = {
    "task": "grammar",
    "doc_id": 0,
    "rule": "argmax",
    "context": "",
    "choices": ["a", "b"],
    "gold": 0,
    "logliks": [-1.0, -2.0],
    "choice": 0,
    "correct": True,
}
OTHERS = [
    ITEM | {"rule": "greedy", "task": "lambada_openai", "choices": ["a"], "logliks": [-1.0]},
    {key: value for key, value in ITEM.items() if key != "correct"}
    | {"rule": "mass", "task": "truthfulqa_mc2", "gold": [0, 1], "value": 0.5},
    {
        "task": "wikitext",
        "doc_id": 0,
        "rule": "rolling",
        "context": "",
        "choices": ["text"],
        "logliks": [-9.0],
        "words": 2,
        "bytes": 9,
    },
    {
        "task": "gsm8k",
        "doc_id": 0,
        "rule": "text",
        "context": "q",
        "choices": [],
        "gold": "4",
        "text": "4",
        "correct": True,
    },
]


@pytest.mark.parametrize("row", [ITEM, *OTHERS], ids=lambda row: row["rule"])
def test_items_of_every_rule_are_read(tmp_path, row):
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n\n")
    assert received.read_requests(tmp_path / "r.jsonl") == [row]
    assert {one["rule"] for one in (ITEM, *OTHERS)} == {*RULES, "rolling", "text"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rule": None}, "'rule' is None"),
        ({"rule": "other"}, "'rule' is 'other', allowed: argmax"),
        ({"rule": ["argmax"]}, "'rule' is ['argmax']"),
        ({"rule": "mass"}, "the key 'correct' is not known here"),
        ({"more": 1}, "the key 'more' is not known here"),
        ({"gold": 2}, "'gold' is 2; needed: the number of a choice, 0 to 1"),
        ({"gold": -1}, "'gold' is -1"),
        ({"gold": [0, 7]}, "'gold' is [0, 7]"),
        ({"gold": []}, "'gold' is []"),
        ({"gold": "a"}, "'gold' is 'a'"),
        ({"gold": True}, "'gold' is True"),
        ({"choices": []}, "0 choices"),
        ({"choices": "ab"}, "'choices' is \"ab\""),
        ({"choices": ["a"] * 2000}, "2000 choices"),
        ({"context": ["a"]}, "1 contexts for 2 choices"),
        ({"context": 5}, "'context' is 5"),
        ({"logliks": [-1.0]}, "1 logliks for 2 choices"),
        ({"logliks": ["x", "y"]}, "'logliks' is"),
        ({"correct": 1}, "'correct' is 1"),
        ({"doc_id": "0"}, "'doc_id' is \"0\""),
        ({"logliks": [-1.0, 10**400]}, "'logliks' is"),
        ({"context": "cut \ud83d"}, "holds half a character"),
        ({"choices": ["a", "\udc00"]}, "holds half a character"),
        ({"task": "../../etc"}, "'task' is \"../../etc\""),
        ({"task": ".."}, "'task' is \"..\""),
        ({"task": 5}, "'task' is 5"),
    ],
)
def test_a_wrong_item_is_named_by_file_and_line_before_anything_is_measured(
    bundle, capfd, nothing_is_measured, change, told
):
    rows = [ITEM | {"doc_id": 7}, ITEM | change]
    (bundle / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refused(capfd, "accept", sealed(bundle))
    assert "requests.jsonl, line 2" in message and told in message


def test_the_number_of_choices_and_prompts_is_bounded(
    bundle, capfd, nothing_is_measured, monkeypatch
):
    rows = [ITEM | {"doc_id": number} for number in range(4)]
    (bundle / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(received, "MOST_REQUESTS", 7)
    assert "line 4: the items so far have 8 choices" in refused(capfd, "accept", sealed(bundle))
    monkeypatch.setattr(received, "MOST_REQUESTS", 8)
    monkeypatch.setattr(received, "MOST_PROMPTS", 29)
    assert "has 30 prompts, at most 29" in refused(capfd, "accept", bundle)
    monkeypatch.setattr(received, "LINES_BYTES", 100)
    assert "at most 100 are read" in refused(capfd, "accept", bundle)


def test_items_are_whole_and_alike(bundle, capfd, nothing_is_measured):
    row = json.dumps(ITEM)
    other = ITEM | {"doc_id": 1, "rule": "greedy"}
    mass = {key: value for key, value in ITEM.items() if key != "correct"} | {
        "rule": "mass",
        "value": 1,
    }
    for lines, told in (
        (row + "\n" + row, "line 2: item 0 of grammar is there already"),
        (row + "\n" + json.dumps(other), "other items of grammar have 'argmax'"),
        (json.dumps(mass), "the rule mass is that of " + ", ".join(DRIFTS)),
        ("[" * 50_000, "line 1 is nested too deep"),
        ("5", "line 1: 'rule' is None"),
        ("\n\n{", "line 3 is not JSON"),
        (row.replace('"gold": 0', '"gold": ' + "9" * 5000), "line 1 can't be read as JSON"),
    ):
        (bundle / "requests.jsonl").write_text(lines)
        assert told in refused(capfd, "accept", sealed(bundle))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"more": 1}, "unknown key 'more'"),
        ({"choices": 5}, "'choices' must be a list of texts"),
        ({"choices": [5]}, "checks are texts"),
        ({"must_contain": 5}, "'must_contain' must be a list of texts"),
        ({"must_not_contain": None}, "'must_not_contain' must be a list of texts"),
        ({"exact": {"a": 1}}, "'exact' must be a list of texts"),
        ({"kind": []}, "'kind' must be a text"),
        ({"answer": 5}, "'answer' must be a text"),
        ({"pattern": 5}, "'pattern' must be a text"),
        ({"pattern": "(a+)+$!"}, "runs away"),
        ({"pattern": "((a{1000}){1000}){1000}b"}, "takes too much time or memory to compile"),
        ({"pattern": "a" * 3000}, "has 3,000 characters"),
        ({"prompt": 5}, "`prompt` must be a text"),
        ({"prompt": "cut \ud83d"}, "holds half a character"),
    ],
)
def test_a_wrong_prompt_is_named(bundle, capfd, nothing_is_measured, change, told):
    rows = (bundle / "open_prompts.jsonl").read_text().splitlines()
    rows[0] = json.dumps(json.loads(rows[0]) | change)
    (bundle / "open_prompts.jsonl").write_text("\n".join(rows))
    message = refused(capfd, "accept", sealed(bundle))
    assert "open_prompts.jsonl, line 1" in message and told in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda row: row | {"more": 1}, "line 1: the key 'more'"),
        (lambda row: {"id": row["id"]}, "line 1: the key 'teacher' is missing"),
        (lambda row: row | {"teacher": 5}, "'teacher' is 5"),
        (lambda row: row | {"teacher": {}}, "line 1, teacher: the key 'form' is missing"),
        (lambda row: row | {"teacher": row["teacher"] | {"right": 1}}, "'right' is 1"),
        (lambda row: row | {"student": row["student"] | {"ids": []}}, "the key 'ids'"),
        (lambda row: row | {"id": "unknown"}, "line 1: 'id' is 'unknown'"),
        (lambda row: [row], "line 1 holds a JSON list"),
        (
            lambda row: row | {"teacher": row["teacher"] | {"answer": "cut \ud83d"}},
            "line 1 holds half a character",
        ),
    ],
)
def test_a_wrong_answer_is_named(bundle, capfd, nothing_is_measured, change, told):
    rows = (bundle / "open_answers.jsonl").read_text().splitlines()
    rows[0] = json.dumps(change(json.loads(rows[0])))
    (bundle / "open_answers.jsonl").write_text("\n".join(rows))
    message = refused(capfd, "accept", sealed(bundle))
    assert "open_answers.jsonl" in message and told in message
    (bundle / "open_answers.jsonl").write_text("\n".join(rows[1:]))
    assert "has no answer to the prompt" in refused(capfd, "accept", sealed(bundle))


WATCH: list[str] = []


def _watch(event: str, args: tuple) -> None:
    if WATCH and event in (
        "open",
        "os.listdir",
        "os.scandir",
        "socket.connect",
        "socket.getaddrinfo",
    ):
        WATCH.append(f"{event} {args[0]!r} {args[1:] if event.startswith('socket') else ''}")


@pytest.mark.parametrize(
    ("teacher", "heldout", "told"),
    [
        (
            "owner/name",
            "embedded:topics",
            "the teacher 'owner/name' is on the hub, which is not asked without --hub",
        ),
        ("SECRET/t", "embedded:topics", "outside the bundle, which is not opened without --local"),
        (
            "SECRET/t.gguf",
            "embedded:topics",
            "outside the bundle, which is not opened without --local",
        ),
        ("random:0", "SECRET/held.jsonl", "'SECRET/held.jsonl' is a file outside the bundle"),
        ("random:0", "../held.jsonl", "'../held.jsonl' is a file outside the bundle"),
        ("random:0", "https://example.org/held.jsonl", "is a file outside the bundle"),
        ("random:0", "hub:owner/text:test:text", "is on the hub, which is not asked without --hub"),
        ("random:0", "generated:99999999x99999:nothing", "would have to be written by its teacher"),
    ],
)
def test_accept_opens_nothing_outside_the_bundle(
    bundle, measured, tmp_path, teacher, heldout, told
):
    """Seen by an audit hook; size, speed and answers are judged all the same."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "held.jsonl").write_text('{"text": "x"}\n')
    (tmp_path.parent / "held.jsonl").write_text('{"text": "x"}\n')
    limits = {"open/right": {"min": 0.1}, "kl_to_teacher": {"max": 9.0}}
    forged(bundle, "config", "budget", "limits", value=limits)
    forged(bundle, "config", "teacher", "source", value=teacher.replace("SECRET", str(secret)))
    forged(bundle, "config", "data", "heldout", value=[heldout.replace("SECRET", str(secret))])
    sys.addaudithook(_watch)
    WATCH.append("on")
    try:
        code, out, err, opened = measured(bundle)
        seen = "\n".join(WATCH)
    finally:
        WATCH.clear()
    assert code == 0 and told.replace("SECRET", str(secret)) in err
    assert str(secret) not in seen and "held.jsonl" not in seen and "socket" not in seen
    assert "PASS         open/right" in out
    text = heldout.startswith("embedded")
    assert ("kl_to_teacher was not measured" in out) and all(
        data.heldout == ["embedded:topics"] for _, data, *_ in opened
    )
    assert [one[0].source for one in opened] == (["random:0"] if not text else [f"{bundle}/hf"])


def test_the_receiver_may_let_it_open_them(bundle, measured, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "t").mkdir()
    forged(bundle, "config", "data", "heldout", value=["held.jsonl"])
    forged(bundle, "config", "teacher", "source", value=str(tmp_path / "t"))
    forged(bundle, "config", "budget", "limits", value={"kl_to_teacher": {"max": 9.0}})
    code, out, err, opened = measured(bundle, "--local")
    assert code == 0 and [one[0].source for one in opened] == [str(tmp_path / "t")]
    assert opened[0][1].heldout == ["held.jsonl"] and "PASS         kl_to_teacher" in out
    forged(bundle, "config", "data", "heldout", value=["hub:owner/text:test:text"])
    forged(bundle, "config", "teacher", "source", value="owner/name")
    code, out, err, opened = measured(bundle, "--hub")
    assert (
        code == 0
        and opened[0][0].source == "owner/name"
        and opened[0][1].heldout[0].startswith("hub:")
    )


def test_another_teacher_than_the_bundles_is_said_and_not_used(bundle, measured, monkeypatch):
    monkeypatch.setattr(
        "compress.models.checkpoint.weights_digest", lambda path: "of other weights"
    )
    forged(bundle, "config", "budget", "limits", value={"kl_to_teacher": {"max": 9.0}})
    code, out, err, opened = measured(bundle, digest="another")
    assert code == 0 and "on this machine is not the bundle's" in err and "INCONCLUSIVE" in out
    code, out, err, opened = measured(bundle, has_teacher=False)
    assert code == 0 and "can't be had here (no such teacher)" in err and "INCONCLUSIVE" in out


def test_a_held_out_text_that_nothing_has_is_one_sentence(bundle, capfd, nothing_is_measured):
    forged(bundle, "config", "data", "heldout", value=["embedded:topic"])
    assert main(["accept", str(bundle)]) == 3
    assert "manifest.json, config: data.heldout: 'embedded:topic' is no" in capfd.readouterr().err


@pytest.mark.parametrize("name", EMBEDDED_SOURCES)
def test_every_embedded_text_may_be_the_held_out_one(bundle, measured, name):
    forged(bundle, "config", "data", "heldout", value=[f"embedded:{name}"])
    forged(bundle, "config", "budget", "limits", value={"bits_per_byte/heldout": {"max": 9.0}})
    code, _, _, opened = measured(bundle)
    assert code == 0 and opened[0][1].heldout == [f"embedded:{name}"]


def test_only_the_bundles_own_items_and_prompts_are_asked(bundle, measured):
    """Task names, data_dir and prompt files of the recipe never become paths."""
    for key, value in (
        ("tasks", ["../../../etc"]),
        ("data_dir", "/etc"),
        ("open_prompts", ["/etc/passwd"]),
    ):
        forged(bundle, "config", "eval", key, value=value)
    forged(bundle, "config", "budget", "limits", value={"kl_to_teacher": {"max": 9.0}})
    code, _, _, opened = measured(bundle)
    settings = opened[0][2]
    assert code == 0 and (settings.tasks, settings.data_dir, settings.open_prompts) == (
        [],
        None,
        [],
    )


def test_what_accept_knows_of_the_config_is_what_a_recipe_can_say():
    assert {one.name for one in fields(Eval)} == received.EVAL.keys()
    assert {one.name for one in fields(Data)} == received.DATA.keys()
    assert {one.name for one in fields(Limit)} == {"max", "min", "why"}


def test_ask_and_compare_stay_inside_a_bundle(bundle, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for judged in ("../outside", "/etc/passwd", "", "..", "hf/../../x"):
        forged(bundle, "judged", value=judged)
        assert "'judged' is" in refused(capfd, "ask", bundle, "hi")
        assert "'judged' is" in refused(capfd, "compare", bundle)
    forged(bundle, "judged", value="model-Q4_0.gguf")
    forged(bundle, "lineage", value=[5])
    assert "'lineage'" in refused(capfd, "ask", bundle, "hi")


def test_an_onnx_directory_is_read_before_anything_runs(bundle, capfd, nothing_is_measured):
    (bundle / "onnx").mkdir()
    options = {"custom_ops_library": "ops.so"}
    config = {"model": {"decoder": {"session_options": options}}, "search": {}}
    (bundle / "onnx" / "genai_config.json").write_text(json.dumps(config))
    forged(bundle, "judged", value="onnx")
    assert "onnx/genai_config.json, search: the key 'do_sample' is missing" in refused(
        capfd, "accept", bundle
    )


def test_prompts_are_those_of_the_run(bundle):
    assert received.receive(bundle).prompts == PROMPTS
