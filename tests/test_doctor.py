"""`compress doctor`: what is here, what works, what lacks."""

from __future__ import annotations

import json

import pytest

from compress import doctor, packages
from compress.__main__ import main
from compress.formats.runtimes import RUNTIMES


@pytest.fixture
def quick(monkeypatch):
    """Runtimes that say at once what they are told to."""

    def quick(**told):
        monkeypatch.setattr(doctor, "RUNTIMES", told)
        monkeypatch.setattr(doctor, "tried", lambda name: told[name])

    return quick


FINE = {"works": True, "detail": "generated a token", "device": "CPU"}
ABSENT = {"works": None, "detail": "onnx not installed", "device": None}
BROKEN = {"works": False, "detail": "OSError: no such symbol", "device": None}


def test_every_runtime_and_extra_is_looked_at():
    assert doctor.RUNTIMES.keys() == doctor.NEEDS.keys() == RUNTIMES.keys()
    assert packages.EXTRAS.keys() <= doctor.PURPOSE.keys()


def test_what_is_here_is_said_and_fine(quick, capfd):
    quick(a=FINE, b=ABSENT)
    assert main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "free: " in out and "numpy 2" in out and "a            works   generated a token" in out
    assert "b            absent  onnx not installed" in out


def test_what_lacks_is_said_with_the_line_that_brings_it(quick, capfd, monkeypatch):
    quick(a=FINE)
    monkeypatch.setattr(doctor, "EXTRAS", {"onnx": {"nothing_like_it": "nothing-like-it"}})
    assert main(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "lacks nothing-like-it (writes and runs directories" in out
    assert "pip install 'compress-lm[onnx]'" in out


def test_what_is_installed_and_fails_is_an_error(quick, capfd):
    quick(a=FINE, b=BROKEN)
    assert main(["doctor", "--json"]) == 5
    record = json.loads(capfd.readouterr().out)
    assert record["runtimes"]["b"] == BROKEN and record["machine"]["threads"] >= 1
    assert main(["doctor", "more"]) == 2


def test_llama_cpp_writes_a_token_here():
    told = doctor.tried("llama.cpp")
    assert told == FINE | {"device": told["device"]}


def test_a_runtime_that_crashes_or_hangs_is_told_of(monkeypatch):
    monkeypatch.setitem(doctor.NEEDS, "of no name", ())
    told = doctor.tried("of no name")  # a KeyError in the process
    assert told["works"] is False and "of no name" in told["detail"]
    monkeypatch.setattr(doctor, "SECONDS", 0.01)
    assert "no answer in 0.01 s" in doctor.tried("llama.cpp")["detail"]
    monkeypatch.setitem(doctor.NEEDS, "absent", ("nothing_like_it",))
    assert doctor.tried("absent") == {
        "works": None,
        "detail": "nothing_like_it not installed",
        "device": None,
    }


@pytest.mark.slow
@pytest.mark.parametrize("runtime", sorted(RUNTIMES))
def test_every_runtime_writes_a_token_here(runtime):
    assert doctor.tried(runtime)["works"] is True
