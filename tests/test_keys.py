"""Every input changes the key of weights, and nothing else does; the digest, sources, versions."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress import keys
from compress.assets import PACKAGE
from compress.keys import closure, sources_digest, versions_of
from compress.models.checkpoint import Model, digest, model_of, weights_digest
from compress.models.tokenizer import tokenizer_digest
from compress.quant.settings import Allocation, GridName
from compress.session import Session
from compress.stages import STAGES
from compress.stages.ptq import Ptq
from compress.store import sha256_json
from compress.train.packed import Packed
from compress.train.settings import Trainer


@pytest.fixture
def teacher(tiny_teacher, tmp_path) -> Path:
    """A copy that a test may edit, with a file of every kind that travels along."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    return folder


def other_version(monkeypatch, package: str) -> None:
    """Let one package have another version than it has, or one at all."""
    real = keys._version
    monkeypatch.setattr(keys, "_version", lambda name: "0.0" if name == package else real(name))


TEXT = Packed(torch.zeros(4, 33, dtype=torch.int32), torch.ones(4, 33, dtype=torch.bool), "text")
OTHER = dataclasses.replace(TEXT, digest="another")


def append(file: Path) -> None:
    """Change a file: a space more, or in weights, whose header must fit,
    the sign of the last number.
    """
    data = file.read_bytes()
    weights = file.suffix == ".safetensors"
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 0x80]) if weights else data + b" ")


# ---- what is copied, and sources ----

COPIED = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
]


@pytest.mark.parametrize("name", [*COPIED, "config.json", "model.safetensors"])
def test_the_digest_covers_every_file_that_is_copied(teacher, name):
    before = digest(teacher), tokenizer_digest(teacher), weights_digest(teacher)
    append(teacher / name)
    whole, tokenizer, weights = (
        a != b
        for a, b in zip(
            before,
            (digest(teacher), tokenizer_digest(teacher), weights_digest(teacher)),
            strict=True,
        )
    )
    numbers = name in ("config.json", "model.safetensors")
    assert (
        whole
        and weights == numbers
        and tokenizer == (not numbers and name != "generation_config.json")
    )


def test_the_digest_does_not_know_where_a_checkpoint_lies_or_what_else_does(teacher, tmp_path):
    shutil.copytree(teacher, tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    assert digest(tmp_path / "elsewhere") == digest(teacher)


@pytest.fixture
def package(tmp_path) -> Path:
    typed = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.only_types import T\n"
    )
    typed += "else:\n    import house.far\n"
    files = {
        "__init__.py": "",
        "stage.py": "def run():\n    from house.rooms import formula\n",
        "typed.py": typed,
        "rooms/__init__.py": "",
        "rooms/formula.py": "from . import near",
        "rooms/near.py": "import house.far as f",
        "far.py": "",
        "apart.py": "",
        "only_types.py": "",
        "session.py": "import house.apart\nclass Text:\n    size = 1\n\nclass Page:\n    pass\n",
    }
    for name, text in files.items():
        (tmp_path / "house" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "house" / name).write_text(text)
    return tmp_path / "house"


def names(package: Path, *files: str) -> set[str]:
    return {
        file.relative_to(package).as_posix()
        for file in closure([package / file for file in files], package)
    }


def test_a_closure_is_what_a_module_reaches_by_its_imports(package):
    assert names(package, "stage.py") == {
        "stage.py",
        "rooms/__init__.py",
        "rooms/formula.py",
        "rooms/near.py",
        "far.py",
    }
    assert names(package, "typed.py") == {"typed.py", "far.py"}


@pytest.mark.parametrize(
    ("edited", "changes"),
    [
        ("stage.py", True),
        ("rooms/near.py", True),
        ("far.py", True),
        ("apart.py", False),
        ("only_types.py", False),
        ("typed.py", False),
    ],
)
def test_the_sources_digest_follows_what_is_reached(package, tmp_path, edited, changes):
    shutil.copytree(package, tmp_path / "other" / "house")
    append(tmp_path / "other" / "house" / edited)
    here, there = (
        sources_digest("house.stage", package=place)
        for place in (package, tmp_path / "other" / "house")
    )
    assert (here != there) == changes


def test_a_class_or_a_file_can_be_a_root_of_its_own(package, tmp_path):
    other = tmp_path / "other" / "house"
    shutil.copytree(package, other)
    append(other / "apart.py")
    (other / "session.py").write_text(
        (other / "session.py").read_text().replace("pass", "title = 1")
    )
    for root, same in (
        ("house.session:Text", True),
        ("house.session:Page", False),
        ("house.session:", False),
        ("house.session", False),
    ):
        assert (
            sources_digest(root, package=package) == sources_digest(root, package=other)
        ) == same
    with pytest.raises(AssertionError, match="has no Nothing"):
        sources_digest("house.session:Nothing", package=package)


@pytest.mark.parametrize("technique", STAGES)
def test_a_stages_sources_hold_its_formulas_and_no_report(technique):
    file = PACKAGE / "stages" / f"{STAGES[technique].__module__.rpartition('.')[2]}.py"
    reached = {path.relative_to(PACKAGE).as_posix() for path in closure([file], PACKAGE)}
    assert {"models/checkpoint.py", "store.py", f"stages/{file.name}"} <= reached
    assert (
        not any(name.startswith(("report/", "track/")) for name in reached)
        and "pipeline.py" not in reached
    )


def test_a_package_that_is_not_there_is_none():
    assert (
        versions_of("torch", "no-such-package")["no-such-package"] is None
        and versions_of("torch")["torch"]
    )


# ---- weights ----


def session_of(teacher: Path) -> SimpleNamespace:
    """What `Session.inputs` reads of a session, for one stage of every technique."""
    stages = {
        "depth": STAGES["prune_depth"](blocks=1),
        "vocab": STAGES["prune_vocab"](ids=384),
        "heal": STAGES["distill"](tokens=64),
        "chat": STAGES["lora"](tokens=64),
        "qat": STAGES["qat"](tokens=64),
        "round": Ptq(grid=GridName.q4_0),
    }
    recipe = SimpleNamespace(
        stages=stages,
        data=SimpleNamespace(seq_len=32),
        seed=0,
        trainer=Trainer(),
        technique=lambda slot: next(
            name for name, kind in STAGES.items() if type(stages[slot]) is kind
        ),
    )
    return SimpleNamespace(
        recipe=recipe,
        teacher=model_of(teacher),
        text=lambda tokens_of: TEXT,
        chat=lambda tokens_of: TEXT,
        vocabulary=lambda tokens_of: None,
        precision="fp32",
        threads=1,
    )


def weights_key(session, slot: str = "heal", parent: str = "parent") -> str:
    return sha256_json(Session.inputs(session, slot, Model(Path(parent), parent, "torch")))


@pytest.fixture(scope="module")
def opened(tiny_teacher):
    return session_of(tiny_teacher)


def edit_teacher(session, monkeypatch):
    monkeypatch.setattr(session, "teacher", dataclasses.replace(session.teacher, digest="another"))


SESSION_CHANGES = {
    "teacher": edit_teacher,
    "data": lambda s, m: m.setattr(s, "text", lambda tokens_of: OTHER),
    "config": lambda s, m: m.setattr(s.recipe.stages["heal"], "lr", 0.123),
    "signal": lambda s, m: m.setattr(s.recipe.stages["heal"].signal, "threshold", 0.123),
    "seq_len": lambda s, m: m.setattr(s.recipe.data, "seq_len", 64),
    "seed": lambda s, m: m.setattr(s.recipe, "seed", 1),
    "precision": lambda s, m: m.setattr(s, "precision", "bf16"),
    "threads": lambda s, m: m.setattr(s, "threads", 2),
    "world": lambda s, m: m.setattr("compress.train.parallel.world", lambda: 2),
    "trainer": lambda s, m: m.setattr(s.recipe.trainer, "activation_checkpointing", True),
    "parallel": lambda s, m: m.setattr(s.recipe.trainer, "parallel", "ddp"),
    "moments": lambda s, m: m.setattr(s.recipe.trainer, "moments", "host"),
    "device": lambda s, m: m.setattr("compress.session.best_device", lambda: "cuda:0"),
    "sources": lambda s, m: m.setattr("compress.session.sources_digest", lambda *roots: "another"),
} | {package: lambda s, m, package=package: other_version(m, package) for package in keys.WEIGHTS}


@pytest.mark.parametrize("change", SESSION_CHANGES)
def test_each_input_changes_the_key_of_weights(opened, monkeypatch, change):
    before = weights_key(opened)
    assert weights_key(opened) == before
    SESSION_CHANGES[change](opened, monkeypatch)
    assert weights_key(opened) != before


def test_who_trains_is_no_input_where_another_number_of_processes_may_go_on(opened, monkeypatch):
    plain = weights_key(opened)
    monkeypatch.setattr(opened.recipe.trainer, "elastic", True)
    elastic = weights_key(opened)
    assert elastic != plain
    for change in ("world", "threads", "parallel"):
        SESSION_CHANGES[change](opened, monkeypatch)
    assert weights_key(opened) == elastic
    SESSION_CHANGES["trainer"](opened, monkeypatch)
    assert weights_key(opened) != elastic


def test_slot_names_and_what_goes_on_are_no_inputs_but_technique_parent_and_chat_are(
    opened, monkeypatch
):
    before, chat = weights_key(opened), weights_key(opened, "chat")
    assert weights_key(opened, parent="another") != before and weights_key(
        opened, "round"
    ) != weights_key(opened, "qat")
    monkeypatch.setitem(opened.recipe.stages, "other", opened.recipe.stages["heal"])
    assert weights_key(opened, "other") == before
    monkeypatch.setattr(opened, "chat", lambda tokens_of: OTHER)
    assert weights_key(opened) == before and weights_key(opened, "chat") != chat


def test_text_that_is_counted_is_an_input_of_a_smaller_vocabulary_alone(opened, monkeypatch):
    vocab, heal = weights_key(opened, "vocab"), weights_key(opened)
    monkeypatch.setattr(opened, "vocabulary", lambda tokens_of: OTHER)
    assert weights_key(opened, "vocab") != vocab and weights_key(opened) == heal


def test_a_mixture_depends_on_what_the_rest_of_a_gguf_takes(opened, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "compress.session.sources_digest", lambda *roots: asked.append(roots) or "x"
    )
    for allocate in (Allocation(), Allocation(file_bytes=10**6)):
        monkeypatch.setattr(opened.recipe.stages["round"], "allocate", allocate)
        weights_key(opened, "round")
    assert "compress.formats.gguf" not in asked[0] and "compress.formats.gguf" in asked[1]
