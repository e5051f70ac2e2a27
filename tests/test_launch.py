"""Recipes are data: what Hydra could execute is refused before Hydra runs, and mistakes are one
sentence and exit 2.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from compress.__main__ import main
from compress.assets import configs_dir, recipes_dir
from compress.errors import ConfigError
from compress.recipe_text import check_override, check_text

REPO_RECIPES = sorted(path.stem for path in recipes_dir().glob("*.yaml"))


def cli(capfd, *arguments):
    code = main(list(arguments))
    return code, *capfd.readouterr()


@pytest.mark.parametrize("name", REPO_RECIPES)
def test_every_recipe_composes_into_dataclasses(name):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from compress.composing import trust_hydra
    from compress.config import Recipe

    trust_hydra()
    overrides = ["teacher=embedded"] if name in ("mini", "nano") else []
    with initialize_config_dir(str(recipes_dir()), version_base="1.3"):
        recipe = OmegaConf.to_object(compose(name, overrides))
    assert isinstance(recipe, Recipe)
    assert recipe.steps()


@pytest.mark.parametrize(
    "file", sorted(configs_dir().glob("*/*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_every_option_composes_and_opens_with_a_sentence(file):
    from hydra import compose, initialize_config_dir

    from compress.composing import trust_hydra

    trust_hydra()
    assert file.read_text().startswith("# ")
    where = "@_here_" if file.parent.name == "stage" else ""
    chosen = ["+data=mixed"] if "override /data" in file.read_text() else []
    with initialize_config_dir(str(configs_dir()), version_base="1.3"):
        assert compose(
            config_name=None,
            overrides=chosen
            + (
                [f"+{file.parent.name}{where}={file.stem}"]
                if not where
                else [f"+stage@x={file.stem}"]
            ),
        )


def test_the_vocabulary_is_complete():
    counts = {
        folder.name: len(list(folder.glob("*.yaml")))
        for folder in configs_dir().iterdir()
        if folder.is_dir()
    }
    assert not counts.pop("tasks") and not counts.pop("open") and not counts.pop("conversations")
    assert counts == {
        "budget": 5,
        "data": 6,
        "eval": 4,
        "export": 16,
        "stage": 10,
        "teacher": 4,
        "track": 2,
        "trainer": 5,
    }
    assert REPO_RECIPES == ["demo", "gemma", "mini", "nano", "ptq_only", "qad_w4", "smoke"]


@pytest.mark.parametrize(
    ("overrides", "train"),
    [
        (["teacher=gemma"], ["embedded:questions", "embedded:docstrings"]),
        (["teacher=gemma", "data=python_docs"], ["embedded:docstrings"]),
        ([], ["embedded:conversations", "embedded:docstrings"]),
    ],
)
def test_a_base_model_brings_text_that_it_can_read_unless_other_text_is_named(overrides, train):
    from hydra import compose, initialize_config_dir

    from compress.composing import trust_hydra

    trust_hydra()
    with initialize_config_dir(str(recipes_dir()), version_base="1.3"):
        assert compose("ptq_only", overrides).data.train == train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "smok"], "recipe 'smok' does not exist; did you mean 'smoke'?"),
        (
            ["run", "smoke", "stages.heal.lrr=1"],
            "unknown key 'stages.heal.lrr'; did you mean 'lr'?",
        ),
        (
            ["run", "smoke", "stages.heal.tokens=many"],
            "stages.heal.tokens: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (["run", "smoke", "budget=nanoo"], "budget='nanoo' is no option; did you mean 'nano'?"),
        (["run", "smoke", "buget=nano"], "unknown key 'buget'; did you mean 'budget'?"),
        (
            ["run", "smoke", "+stage@stages.x=distil"],
            "stage='distil' is no option; did you mean 'distill'?",
        ),
        (
            ["run", "smoke", "pipeline=[heal,hael]"],
            "pipeline names the slot 'hael'; did you mean 'heal'?",
        ),
        (
            ["run", "smoke", "pipeline=[round,heal]"],
            "impossible order: 'heal' (distill) comes after 'round' (ptq)",
        ),
        (["run", "smoke", "pipeline=[]"], "pipeline is empty"),
        (["run", "smoke", "stages.heal.lr=-1"], "lr=-1.0 must be above 0"),
        (
            ["run", "smoke", "data.heldout=[embedded:docstrings]"],
            "held-out text must never be trained on",
        ),
        (
            ["run", "smoke", "data.vocabulary=[embedded:topics]"],
            "held-out text must never be trained on, nor decide which tokens stay",
        ),
        (["run", "smoke", "export=gguf_q8_0"], "export.files=gguf:Q8_0 would re-round slot 'qat'"),
        (
            ["run", "smoke", "export.files=[gguf:Q4_00]"],
            "export.files='gguf:Q4_00' is no format; did you mean 'gguf:Q4_0'?",
        ),
        (["run", "smoke", "export.files=[gguf]"], "export.files='gguf' is no format"),
        (["run", "smoke", "export.files=[gguf:Q4_0,gguf:Q4_0]"], "names a file twice"),
        (
            ["run", "smoke", "+budget.limits={size_byte:{max:1}}"],
            "budget limit 'size_byte' is no metric; did you mean 'size_bytes'?",
        ),
        (
            ["run", "smoke", "teacher=embeded"],
            (
                "teacher='embeded' is neither an option nor a path nor a hub id (owner/name); did"
                " you mean 'embedded'?"
            ),
        ),
        (
            ["run", "smoke", "budget.limits.size_bytes.max=1"],
            "'size_bytes' is not in this table yet; write +budget.limits.size_bytes.max=1",
        ),
        (["run"], "run needs a recipe"),
        (["rnu"], "unknown verb 'rnu'; did you mean 'run'?"),
        (["gc", "--stor"], "compress gc:"),
    ],
)
def test_mistakes_exit_2_in_under_two_seconds_with_the_nearest_name(
    capfd, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    start = time.process_time()  # what other processes do must not count
    code, out, err = cli(capfd, *arguments)
    assert message in err.replace("\n", " ")
    assert code == 2
    assert time.process_time() - start < 2
    assert list(tmp_path.iterdir()) == []


EVIL = {
    "callback": "hydra:\n  callbacks:\n    x:\n      _target_: os.system\n",
    "target": "stages:\n  x:\n    _target_: os.system\n",
    "environment": "seed: ${oc.env:HOME}\n",
    "launcher": "defaults:\n  - override hydra/launcher: joblib\n",
    "placed at hydra": "defaults:\n  - /base\n  - x@hydra.callbacks\n",
    "searchpath": "hydra:\n  searchpath: [file:///tmp]\n",
    "logging": "hydra:\n  job_logging:\n    handlers:\n      x:\n        (): os.getcwd\n",
    "package": "# @package hydra.callbacks\nx: 1\n",
}


@pytest.mark.parametrize("name", EVIL)
def test_a_recipe_that_names_code_is_refused_before_hydra_runs(capfd, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "evil.yaml").write_text(
        EVIL[name] if "defaults" in EVIL[name] else f"{EVIL[name]}defaults: [/base]\n"
    )

    def never(*_, **__):
        raise AssertionError("Hydra ran")

    monkeypatch.setattr("hydra.main", never)
    code, _, err = cli(capfd, "run", "evil", "--config-dir", "own")
    assert code == 2
    assert "a recipe is data and can't name code" in err


@pytest.mark.parametrize(
    "override",
    [
        "hydra.callbacks.x._target_=os.system",
        "+hydra.callbacks={}",
        "hydra/launcher=joblib",
        "seed=${oc.env:HOME}",
        "~hydra.sweeper",
        "++hydra.searchpath=[file:///]",
        "+stages.x={_target_:os.system}",
        "hydra.job.env_set.X=1",
        "seed=${oc . env:HOME}",
    ],
)
def test_overrides_that_name_code_are_refused(override):
    with pytest.raises(ConfigError, match="can't name code"):
        check_override(override)


def test_a_resolver_name_put_together_from_parts_reads_no_secret(capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECRET", "hunter2")
    code, out, err = cli(
        capfd,
        "run",
        "smoke",
        "--cfg",
        "job",
        "--resolve",
        "store='${oc.${track.project}:SECRET}'",
        "track.project=env",
    )
    assert "hunter2" not in out + err
    assert code == 2


@pytest.mark.parametrize(
    "text",
    [
        "hydra:\n  run:\n    dir: here\n",
        "hydra:\n  job:\n    name: mine\n",
        "hydra:\n  sweeper:\n    params:\n      seed: 1,2\n",
    ],
)
def test_the_allowed_hydra_keys_pass(text):
    check_text(text, Path("r.yaml"))


def test_cfg_job_shows_the_composed_recipe_without_running(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli(capfd, "run", "smoke", "--cfg", "job", "seed=7")
    assert code == 0
    assert "seed: 7" in out
    assert "tokens: 2048" in out


def test_a_folder_of_ones_own_adds_recipes_and_options(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "data").mkdir(parents=True)
    (tmp_path / "own" / "data" / "mine.yaml").write_text(
        "# Mine.\ndefaults: [/schema/data@_here_]\ntrain: [a.txt]\nheldout: [b.txt]\nseq_len: 77\n"
    )
    (tmp_path / "own" / "mine.yaml").write_text(
        "# Mine.\ndefaults:\n  - /base\n  - /stage/ptq@stages.four\n  - override /data: mine\n  -"
        " _self_\npipeline: [four]\n"
    )
    for recipe in (["mine"], ["smoke", "data=mine"]):
        code, out, err = cli(capfd, "run", *recipe, "--config-dir", "own", "--cfg", "job")
        assert code == 0, err
        assert "seq_len: 77" in out or recipe[0] == "smoke"
        assert "a.txt" in out


def test_list_names_recipes_and_options(capfd):
    code, out, _ = cli(capfd, "list")
    assert code == 0
    assert "smoke" in out
    assert "prune_width" in out


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["run", "--help"]])
def test_help_and_list_import_nothing_heavy(arguments, tmp_path):
    code = (
        f"import sys; from compress.__main__ import main; main({arguments});"
        " print(sorted({'torch', 'transformers', 'hydra'} & set(sys.modules)))"
    )
    root = str(Path(__file__).resolve().parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "compress run RECIPE" in done.stdout or "recipes" in done.stdout


def test_a_signal_path_without_its_package_is_refused_before_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "smoke", "stages.heal.signal.path=abfs2://container/x"]) == 2
    assert "signal.path=abfs2://container/x can't be opened" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "stages.heal.divergence=jsd",
            (
                "divergence=jsd needs all of the teacher's probabilities; set signal.scheme to"
                " hidden or online"
            ),
        ),
        (
            "stages.heal.hidden_weight=0.1",
            "needs the teacher's hidden states; set signal.scheme to hidden or online",
        ),
        ("stages.qat.grid=q9_0", "stages.qat.grid: Invalid value 'q9_0', expected one of [q4_0, "),
        (
            "stages.qat.scales=best",
            "stages.qat.scales: Invalid value 'best', expected one of [round, search, learned]",
        ),
        (
            "stages.heal.features.layers=1",
            "features need the teacher's inner states on given text; set signal.scheme=online",
        ),
        ("stages.heal.signal.threshold=2", "signal.threshold=2.0 must be in"),
        ("stages.heal.patience=2", "patience needs validations"),
        ("data.weights=[1,2,3]", "must be one number above 0 for each"),
        ("trainer.parallel=dp", "trainer.parallel='dp'; did you mean 'ddp'?"),
        ("trainer.processes=2", "above 1 only with trainer=ddp or trainer=fsdp2"),
        (
            "data.seq_len=4096",
            (
                "data.seq_len=4096 is longer than the teacher's context of 512 tokens; set"
                " data.seq_len to at most 512"
            ),
        ),
    ],
)
def test_what_cannot_train_is_refused_before_work(tmp_path, monkeypatch, capsys, override, message):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "smoke", override]) in (2, 3)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/smoke/*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "stages.qat.train=scales stages.qat.scales=learned trainer=fsdp2 trainer.processes=2",
            "stages.qat: train=scales needs whole matrices: trainer=auto or ddp",
        ),
        (
            "stages.heal.signal.scheme=online stages.heal.features.layers=1"
            " trainer.precision=bf16_stochastic",
            "stages.heal: features need whole fp32 models",
        ),
        (
            "stages.heal.signal.scheme=online stages.heal.on_policy=0.5"
            " stages.heal.prompt_tokens=64 data.seq_len=64",
            "stages.heal: on_policy=0.5 needs prompt_tokens=64 below data.seq_len=64",
        ),
    ],
)
def test_what_this_trainer_has_no_place_for_is_refused_by_the_plan(
    tmp_path, monkeypatch, capsys, overrides, message
):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "smoke", "--plan", *overrides.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag",
    [
        "--config-name=nano",
        "--config-n=nano",
        "--config-di=.",
        "--experimental-rerun=x",
        "-cn=nano",
        "--multi",
    ],
)
def test_flags_that_choose_another_file_are_refused_abbreviated_or_not(
    tmp_path, monkeypatch, capsys, flag
):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "smoke", flag]) == 2
    assert (
        f"{flag.partition('=')[0]} is not available; name the recipe after `run`"
        in capsys.readouterr().err
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "entry",
    [
        "- /budget@hydra.job.env_set: evil",
        "- /budget@hydra.job: evil",
        "- override /budget@hydra.callbacks: evil",
    ],
)
def test_a_defaults_entry_of_any_form_below_hydra_is_refused(tmp_path, monkeypatch, capsys, entry):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own/budget").mkdir(parents=True)
    (tmp_path / "own/budget/evil.yaml").write_text("LD_PRELOAD: x.so\n")
    (tmp_path / "own/mine.yaml").write_text(f"defaults:\n  - /base\n  {entry}\n  - _self_\n")
    assert main(["run", "mine", "--config-dir", "own"]) == 2
    assert "holds the defaults entry" in capsys.readouterr().err


def test_only_one_whole_folder_of_ones_own_is_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "evil"):
        (tmp_path / name).mkdir()
    assert main(["run", "smoke", "--config-dir=good", "--config-dir=evil"]) == 2
    assert "is not one directory" in capsys.readouterr().err
    assert main(["run", "smoke", "--config-dir"]) == 2
    assert "is not one directory" in capsys.readouterr().err
    (tmp_path / "good/budget").symlink_to(tmp_path / "evil")
    assert main(["run", "smoke", "--config-dir=good"]) == 2
    assert "holds a link to another folder, budget" in capsys.readouterr().err


@pytest.mark.parametrize("override", ["data.train=[a b", "teacher.source=~x"])
def test_what_the_grammar_of_overrides_cannot_read_is_told_with_how_to_write_it(
    override, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["run", "smoke", override]) == 2
    told = capsys.readouterr().err
    assert f"the override {override!r} can't be read; write KEY=VALUE" in told
    assert not list(tmp_path.iterdir())
