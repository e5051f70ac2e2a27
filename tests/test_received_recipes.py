"""Recipes, sweeps and command lines that somebody else wrote: refused in a sentence before
anything runs.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import jinja2
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from safetensors import SafetensorError

from compress import __main__ as program
from compress import composing
from compress.__main__ import main
from compress.bounds import EMBEDDED_SOURCES
from compress.config import SCHEMAS, Teacher, schema_named
from compress.errors import ConfigError, exit_code
from compress.launch import without_recipe
from compress.recipe_text import check_override
from compress.score.patterns import problems
from compress.score.prompts import embedded_file, read_prompts
from compress.session import Session
from compress.stages.lora import Lora
from compress.text.embedded import EMBEDDED


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """The recipes that would have been run, in an empty folder."""
    recipes = []
    monkeypatch.setattr("compress.pipeline.run", lambda recipe, *_: recipes.append(recipe) or 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    return recipes


def refused(capfd, *arguments, code=2):
    start = time.process_time()
    assert main(["run", *arguments]) == code
    assert time.process_time() - start < 5
    out, err = capfd.readouterr()
    told = [
        line for line in err.splitlines() if "Warning" not in line and "warnings.warn" not in line
    ]
    assert out == "" and len(told) == 1 and "Error executing job" not in err
    return told[0]


def own(text, name="r.yaml"):
    Path("own", name).parent.mkdir(exist_ok=True)
    Path("own", name).write_text(text)


RECIPE = "# Mine.\ndefaults:\n  - /base\n  - /stage/ptq@stages.a\n  - _self_\npipeline: [a]\n"


# ------------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    "params",
    [
        "+hydra.job.env_set.PYTHONPATH: DIR",
        "'++hydra.job.env_set': '{A: B}'",
        "hydra.job.chdir: true",
        "hydra/launcher: joblib,basic",
        "+eval@hydra.job: smoke",
        "'~hydra.sweeper': ''",
        "seed: '${oc.env:HOME}'",
        "+x: '{_target_: os.system}'",
        "'a.b@c:hydra.job': 1",
    ],
)
def test_keys_and_values_of_a_sweep_are_overrides_and_checked_as_such(ran, capfd, params):
    own(RECIPE + f"hydra:\n  sweeper:\n    params:\n      seed: 0,1\n      {params}\n")
    for flags in (["-m"], ["--multirun"], [], ["--cfg", "job"], ["--help"]):
        assert "can't name code" in refused(capfd, "r", "--config-dir=own", *flags)
    assert ran == []


def test_what_a_sweep_takes_from_elsewhere_is_checked_when_composed(ran, capfd):
    """The table that Hydra would sweep is an interpolation:
    no text of the recipe says hydra.job.
    """
    own(
        RECIPE
        + "track: {project: '+hydra.job.env_set.X=1'}\nhydra: {sweeper: {params: '${budget}'}}\n"
    )
    assert refused(capfd, "r", "--config-dir=own", "-m")
    own(RECIPE + "hydra:\n  sweeper:\n    params: {seed: '0,1', '\\u0068ydra.job.chdir': 'true'}\n")
    assert refused(capfd, "r", "--config-dir=own", "-m")
    assert ran == []


def test_every_job_of_a_sweep_is_composed_before_the_first_runs(ran, capfd):
    own(RECIPE + "hydra: {sweeper: {params: {seed: '0,1,2'}}}\n")
    assert main(["run", "r", "--config-dir=own", "-m", "eval.batch_size=8,16"]) == 0
    assert sorted((one.seed, one.eval.batch_size) for one in ran) == [
        (s, b) for s in range(3) for b in (8, 16)
    ]
    ran.clear()
    capfd.readouterr()
    assert "seed=-1 must be from 0" in refused(capfd, "r", "--config-dir=own", "-m", "seed=0,-1")
    assert "unknown key 'eval.batch'" in refused(
        capfd, "r", "--config-dir=own", "-m", "eval.batch=1,2"
    )
    assert "more than 1,000 jobs" in refused(
        capfd, "r", "--config-dir=own", "-m", "seed=range(0,1000000000)"
    )
    assert ran == []


def test_a_failing_job_leaves_the_others_running_and_is_told_in_our_words(ran, capfd, monkeypatch):
    own(RECIPE)

    def run(recipe, *_):
        ran.append(recipe)
        if recipe.seed != 1:
            raise ValueError(f"seed {recipe.seed} is wrong")
        return 0

    monkeypatch.setattr("compress.pipeline.run", run)
    assert main(["run", "r", "--config-dir=own", "-m", "seed=0,1,2"]) == 3
    err = capfd.readouterr().err
    assert len(ran) == 3 and "Error executing job" not in err
    assert "seed 0 is wrong" in err and "seed 2 is wrong" in err
    assert main(["run", "r", "--config-dir=own", "seed=0"]) == 3
    assert capfd.readouterr().err.splitlines()[-1] == "compress: seed 0 is wrong"


@pytest.mark.parametrize(
    "override",
    [
        "x@a:hydra.job=evil",
        "+eval@_global_.hydra=quick",
        "+hydra.sweeper.params.hydra.job.chdir=true",
        "hydra.sweeper.params={a:1}",
        "hydra.sweeper.params.+hydra.job.env_set.X=1",
        "+hydra={a:1}",
        "hydra=x",
        "eval@hydra.job=smoke",
        "++ hydra.job.chdir=true",
        "hydra.sweeper.params.seed=${oc.env:HOME}",
        "hydra.run=x",
        "hydra.output_subdir=x",
        "hydra.sweeper.max_batch_size=1",
    ],
)
def test_every_way_to_hydras_node_is_refused(override):
    with pytest.raises(ConfigError, match="can't name code"):
        check_override(override)


@pytest.mark.parametrize(
    "override",
    [
        "hydra.run.dir=x",
        "hydra.sweep.dir=x",
        "hydra.job.name=x",
        "+hydra.sweeper.params.seed=1,2",
        "a.hydra=1",
    ],
)
def test_what_is_allowed_below_hydra_passes(override):
    check_override(override)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("e.yaml", "# x\u2028# @package hydra.callbacks\nx: 1\n"),
        ("e.yaml", "# @package _global_.hydra\nx: 1\n"),
        ("e.yaml", "defaults:\n  - eval@x:hydra.job: smoke\n"),
        ("e.yaml", '"\\x68ydra": {job: {chdir: true}}\n'),
        ("e.yaml", "hydra.job.chdir: true\n"),
        ("e.yaml", "' hydra': {job: {chdir: true}}\n"),
        ("E.YAML", "hydra: {job: {chdir: true}}\n"),
        ("hydra/e.yaml", "x: 1\n"),
    ],
)
def test_no_file_beside_a_recipe_reaches_hydras_node(ran, capfd, name, text):
    own(RECIPE)
    own(text, name)
    assert "can't name code" in refused(capfd, "r", "--config-dir=own")


def test_the_whole_composed_node_is_compared(ran, capfd, monkeypatch):
    """Were a text check to miss something, composing would not."""
    own(RECIPE + "hydra: {job: {env_set: {A: B}}}\n")
    monkeypatch.setattr("compress.recipe_text.check_text", lambda *_: None)
    for flags in ([], ["-m"], ["--help"], ["--info"], ["--hydra-help"]):
        assert "settings of Hydra's launcher" in refused(capfd, "r", "--config-dir=own", *flags)
    for key in (
        "output_subdir: x",
        "verbose: true",
        "env: {default: {x: 1}}",
    ):
        own(RECIPE + f"hydra:\n  {key}\n")
        assert refused(capfd, "r", "--config-dir=own")


# -------------------------------------------------------------------- YAML

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"r.yaml": RECIPE, "budget/b.yaml": BOMB}, "aliases are written out"),
        ({"r.yaml": RECIPE, "x.yml": BOMB}, "aliases are written out"),
        ({"r.yaml": "5\n"}, "r.yaml holds a int, a recipe is a table"),
        ({"r.yaml": "[5]\n"}, "r.yaml holds a list, a recipe is a table"),
        ({"r.yaml": "a: &a [*a]\n"}, "holds itself"),
        ({"r.yaml": "a: &a {b: *a}\n"}, "holds itself"),
        ({"r.yaml": "[" * 5_000}, "nested too deep"),
        ({"r.yaml": RECIPE + "x" * 10**6}, "bytes, a recipe at most 1,000,000; name texts"),
        ({"r.yaml": RECIPE, "d.yaml": None}, "d.yaml is a directory"),
        ({"r.yaml": b"\xff\xfe\x00"}, "is not UTF-8"),
        ({"r.yaml": "a: !!python/object/apply:os.system [x]\n"}, "not plain YAML"),
        ({"r.yaml": "defaults: [r]\n"}, "goes round in a circle"),
        (
            {"r.yaml": "defaults: [s]\n", "s.yaml": "defaults: [t]\n", "t.yaml": "defaults: [r]\n"},
            "goes round in a circle",
        ),
        (
            {"r.yaml": RECIPE + "store: ${track.project}\ntrack: {project: '${store}'}\n"},
            "interpolation",
        ),
    ],
)
def test_files_that_never_end_are_refused_at_once(ran, capfd, files, told):
    for name, content in files.items():
        path = Path("own", name)
        path.parent.mkdir(exist_ok=True)
        (
            path.mkdir()
            if content is None
            else path.write_bytes(content if isinstance(content, bytes) else content.encode())
        )
    assert told in refused(capfd, "r", "--config-dir=own")
    if "r.yaml" not in told and len(files) > 1 and "circle" not in told:
        assert told in refused(capfd, "smoke", "--config-dir=own")


def test_a_pipe_among_the_files_is_not_waited_for(ran, capfd):
    own(RECIPE)
    os.mkfifo("own/p.yaml")
    assert "p.yaml" in refused(capfd, "r", "--config-dir=own")


def test_defaults_that_double_are_given_up(ran, capfd, monkeypatch):
    monkeypatch.setattr(composing, "COMPOSE_SECONDS", 1)
    own("defaults:\n  - x1@p: b\n  - x1@q: b\n")
    for i in range(1, 30):
        own(f"defaults:\n  - /x{i + 1}@p: b\n  - /x{i + 1}@q: b\n", f"x{i}/b.yaml")
    own("a: 1\n", "x30/b.yaml")
    assert "is not composed after 1 s" in refused(capfd, "r", "--config-dir=own")


def test_an_end_that_somebody_passes_over_comes_again(monkeypatch):
    monkeypatch.setattr(composing, "COMPOSE_SECONDS", 0.05)
    passed_over = False
    with pytest.raises(ConfigError, match="is not composed after"), composing.in_time("r"):
        try:
            while True:
                pass
        except ConfigError:
            passed_over = True
        while True:
            pass
    assert passed_over


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("trainer.threads=100000", "trainer.threads=100000 must be from 0 to"),
        ("eval.limit=0", "eval.limit=0 must be at least 1"),
        ("eval.limit=-1", "eval.limit=-1 must be at least 1"),
        ("eval.num_fewshot=-1", "eval.num_fewshot=-1 must be from 0"),
        ("eval.data_dir=/nonexistent", "eval.data_dir='/nonexistent' is no directory"),
        ("eval.data_dir=''", "eval.data_dir='' is no directory"),
        ("eval.batch_sizes=[99999999]", "eval.batch_sizes=[99999999] must be from 1"),
        ("data.weights=[nan]", "must be one number above 0"),
        ("data.weights=[inf]", "data.weights=[inf] must be a finite number"),
        ("data.seq_len=99999999999", "data.seq_len=99999999999 must be from 8"),
        ("seed=-1", "seed=-1 must be from 0"),
        ("seed=9223372036854775808", "must be from 0 to 9,223,372,036,854,775,807"),
        ("stages.heal.lr=nan", "stages.heal.lr=nan must be a finite number"),
        ("stages.heal.lr=inf", "stages.heal.lr=inf must be a finite number"),
        ("stages.heal.lr=1e300", "stages.heal.lr=1e+300 must be from 0 to 1,000"),
        ("stages.heal.temperature=inf", "stages.heal.temperature=inf must be a finite number"),
        ("stages.heal.kl_weight=inf", "stages.heal.kl_weight=inf must be a finite number"),
        ("stages.qat.grad_clip=inf", "stages.qat.grad_clip=inf must be a finite number"),
        ("stages.chat.rank=100000", "stages.chat.rank=100000 must be from 0 to 65,536"),
        ("stages.width.calibration_sequences=999999999", "must be from 1 to 1,000,000"),
        (
            "stages.round.allocate.file_bytes=99999999999999999999999",
            "stages.round.allocate.file_bytes",
        ),
        ("+budget.limits={size_bytes:{max:nan}}", "limit.max=nan must be a finite number"),
        ("+budget.limits={size_bytes:{max:inf}}", "limit.max=inf must be a finite number"),
        ("store=", "store is empty"),
        ("store=' '", "store is empty"),
        ("track.project=", "track.project is empty"),
        (
            "budget=nan",
            "budget=nan names no option of budget; allowed: demo, mini, nano, nano60, none",
        ),
        ("budget=null", "budget=null names no option of budget"),
        ("budget=5", "budget=5 names no option of budget"),
        ("budget=[a]", "budget='a' is no option"),
        (
            "+budget.limits.size_bytes={mx:5}",
            "size_bytes can't be {'mx': 5}; it is a table, allowed in it: max, min, why",
        ),
        ("+budget.limits.x=5", "x can't be 5; it is a table"),
        (
            "stages.heal.signal.thres=3",
            "unknown key 'stages.heal.signal.thres'; did you mean 'threshold'?",
        ),
        ("+trainer.quuality=x", "unknown key 'trainer.quuality'; allowed: activation"),
        ("+eval.limitt=5", "unknown key 'eval.limitt'; did you mean 'limit'?"),
        ("+x=1", "unknown key 'x'; allowed: budget"),
        ("+stages.heal.x={a:1}", "unknown key 'stages.heal.x'; allowed: batch"),
        (
            "data.train=[embedded:docstring]",
            "'embedded:docstring' is no embedded source; did you mean 'docstrings'?",
        ),
        (
            "data.train=[docstring]",
            "'docstring' is neither a file nor a source; did you mean 'embedded:docstrings'?",
        ),
        ("data.heldout=[embeded:topics]", "'embeded:topics' is neither a file nor a source"),
        ("data.train=['']", "'' is neither a file nor a source"),
        ("teacher=", "teacher='' is neither an option nor a path"),
        ("teacher.source=", "teacher.source is empty"),
        ("teacher.source=random:x", "the seed after random: must be a whole number"),
        ("teacher.source=random:99999999999999999999", "at most 18 digits"),
        ("teacher.source=packaged:a.b", "behind packaged: stands one module name"),
        ("teacher=~nobody_here/x", "the home of a user who does not exist here"),
        ("data.train=['~nobody_here/x.txt']", "the home of a user who does not exist here"),
        ("teacher=random:x", "teacher='random:x' is neither an option"),
    ],
)
def test_what_can_not_be_meant_exits_2_before_work(ran, capfd, override, told):
    assert told in refused(capfd, "smoke", override)
    assert ran == []


def test_a_verb_without_a_recipe_takes_no_unknown_key_either():
    with pytest.raises(ConfigError, match="unknown key 'eval.limitt'; did you mean 'limit'?"):
        without_recipe(["+eval.limitt=5"])


@pytest.mark.parametrize(
    "slot",
    [
        "a/b",
        "../../../evil",
        "..",
        "",
        "a b",
        "-a",
        "x" * 99,
        "teacher",
        "teacher_gguf",
        "a\u202eb",
        "\u00e4",
    ],
)
def test_a_slot_is_a_plain_name(ran, capfd, slot):
    own(RECIPE.replace("_self_\n", f"_self_\nstages:\n  {slot!r}: ${{stages.a}}\n"))
    assert refused(capfd, "r", "--config-dir=own").startswith("compress: stages names the slot")


def test_a_slot_is_not_called_as_a_file_that_ships(ran, capfd):
    assert "'gguf_q4_0', which is what a run calls" in refused(
        capfd, "smoke", "+stage@stages.gguf_q4_0=ptq"
    )


def test_every_number_of_every_schema_has_finite_bounds():
    """NaN is in no range, whatever the field: no option of any stage lets it through."""
    from dataclasses import fields, is_dataclass

    from compress.bounds import check_values

    for name, schema in SCHEMAS.items():
        if name in ("recipe", "data"):
            continue
        for option in fields(schema):
            if isinstance(option.default, float):
                one = schema()
                setattr(one, option.name, float("nan"))
                assert is_dataclass(one)
                with pytest.raises(ConfigError, match="must be a finite number"):
                    check_values(name, one)
    assert schema_named("Limit").__name__ == "Limit" and schema_named("Nothing") is None


def test_the_embedded_sources_have_one_list():
    assert set(EMBEDDED_SOURCES) == EMBEDDED.keys()


def test_chat_data_is_asked_for_by_slots_that_run_alone():
    """A base model without a chat template can be healed by a recipe that has a lora slot."""
    read = []

    class Opened:
        scorer = 0
        teacher = SimpleNamespace(path=Path("teacher"))

        def text(self, tokens_of):
            """Nothing of it is looked at."""

        def chat(self, tokens_of):
            read.append("chat")

    for steps in ([], [("chat", "teacher")]):
        opened = Opened()
        opened.recipe = SimpleNamespace(stages={"chat": Lora()}, steps=lambda steps=steps: steps)
        opened._check_length = lambda slot: None
        Session.open_data(opened)
    assert read == ["chat"]


# ---------------------------------------------------------------- teacher=


ODD = (
    "o'brien",
    "a b",
    "x${y}z",
    "b\\",
    "q\\'",
    "a,b",
    "[x]",
    "{a}",
    "a=b",
    "\u00e9\u4e2d",
    "a\\${b}",
    "'",
    '"',
    "$x",
    "#h",
    "a:b",
    "x~",
    "a\\\\'b\\\\",
    "%(x)s",
)


@pytest.mark.parametrize("name", ODD)
def test_a_teachers_path_may_hold_any_character(name):
    for path in (f"/t/{name}", f"/t/{name}/m", f"{name}/"):
        arguments = composing.expand_teacher([f"teacher={path}"])
        [override] = OverridesParser.create().parse_overrides(arguments[1:])
        assert OmegaConf.create({"source": override.value()}).source == path
        assert Teacher(path).source == path


def test_weights_are_those_of_the_sources_that_they_came_with(ran):
    Path("a.txt").write_text("text\n")
    given = "data.train=[a.txt]"
    for recipe, more in (
        ("demo", []),
        ("demo", [given]),
        ("demo", [given, "data.weights=[2]"]),
        ("mini", [f"++{given}"]),
    ):
        assert main(["run", recipe, *more]) == 0
    assert [recipe.data.weights for recipe in ran] == [[3, 1], [], [2], []]


def test_a_folder_of_recipes_may_have_an_apostrophe(ran):
    folder = Path("o'brien ${x}")
    folder.mkdir()
    (folder / "r.yaml").write_text(RECIPE)
    assert main(["run", "r", f"--config-dir={folder}", "seed=3"]) == 0
    assert [one.seed for one in ran] == [3]


# ----------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            RuntimeError("x\ny"),
            1,
            "this is a bug of compress: RuntimeError: x y; run again with --debug and report it",
        ),
        (KeyError("k"), 1, "this is a bug of compress: KeyError: 'k'"),
        (AssertionError(), 1, "this is a bug of compress: AssertionError"),
        (RecursionError("maximum"), 3, "nested too deep"),
        (SafetensorError("header"), 3, "can't be read (SafetensorError: header)"),
        (jinja2.TemplateSyntaxError("end", 3), 3, "can't be read (TemplateSyntaxError: end"),
        (jinja2.exceptions.SecurityError("no"), 3, "SecurityError"),
        (IsADirectoryError(21, "Is a directory", "x"), 3, "Is a directory: 'x'"),
        (ValueError("a\x1b[2Jb\udcff"), 3, "a\\x1b[2Jb\\udcff"),
        (ValueError(), 3, "ValueError without a word"),
        (MemoryError(), 5, "out of memory"),
    ],
)
def test_no_command_shows_a_traceback_unless_asked(monkeypatch, capfd, error, code, told):
    def fails(arguments):
        assert "--debug" not in arguments
        raise error

    monkeypatch.setitem(program.VERBS, "list", fails)
    assert main(["list"]) == code == exit_code(error)
    err = capfd.readouterr().err
    assert told in err and "Traceback" not in err and err.count("\n") == 1
    assert main(["list", "--debug"]) == main(["--debug", "list"]) == code
    assert "Traceback" in capfd.readouterr().err


def test_debug_is_in_the_help_and_alone_names_no_verb(capfd):
    assert "--debug" in program.HELP and "--hub" in program.HELP and "--sha256" in program.HELP
    assert main(["--debug"]) == 2
    assert "name a verb" in capfd.readouterr().err


def test_the_packages_own_patterns_hold():
    prompts = [prompt for prompt in read_prompts(embedded_file()) if prompt.pattern]
    assert not any(problems([(prompt.pattern, prompt.prompt) for prompt in prompts]))
