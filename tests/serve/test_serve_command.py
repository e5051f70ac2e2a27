"""What `compress serve` refuses before or while it starts: one sentence and an exit code."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

import pytest
from served import KEY, tiny_gguf
from ship.test_bundle_open import made

from compress.__main__ import main
from compress.serve.keys import Lock
from compress.serve.settings import is_loopback
from compress.serve.target import target_of


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("command"), context=512)


@pytest.fixture
def refused(capfd, monkeypatch):
    """Exit code and sentence of a command that serves nothing."""
    monkeypatch.delenv("COMPRESS_KEY", raising=False)
    monkeypatch.delenv("COMPRESS_TEACHER_KEY", raising=False)

    def run(*arguments):
        code = main(["serve", *map(str, arguments)])
        out, err = capfd.readouterr()
        assert not out and err.startswith("compress: ") and err.count("\n") == 1, err
        return code, err

    return run


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "a key is needed: give --key-file FILE or the environment's COMPRESS_KEY"),
        (["--no-key", "--host", "0.0.0.0"], "--no-key with --host 0.0.0.0: without a key only"),
        (["--no-key", "--port", "70000"], "--port 70000: allowed are 1 to 65,535"),
        (["--no-key", "--port", "many"], "argument --port: invalid int value"),
        (["--no-key", "--parallel", "0"], "--parallel 0: allowed is 1 or more"),
        (["--no-key", "--queue", "-1"], "--queue -1: allowed is 0 or more"),
        (["--no-key", "--timeout", "0"], "--timeout 0.0: allowed are seconds above 0"),
        (["--no-key", "--max-tokens", "0"], "--max-tokens 0: allowed is 1 or more"),
        (["--no-key", "--price", "cheap"], "--price 'cheap' is no IN:OUT"),
        (["--no-key", "--file", "hf"], "is no bundle, which alone has several"),
        (["--no-key", "--threshold", "-1"], "--threshold says something of a teacher"),
        (["--no-key", "--teacher-budget", "3"], "--teacher-budget says something of a teacher"),
        (["--no-key", "--tuning", "x", "--threads", "1"], "--tuning says how a model is served"),
        (["--no-key", "--tuning", "x"], "--tuning x is no file; `compress tune MODEL"),
        (["--calibrate", "x.json"], "--calibrate needs a bundle"),
        (["--calibrate", "x", "--teacher", "http://a"], "--calibrate chooses a threshold and"),
        (["--no-key", "--teacher", "https://a/v1"], "nothing says where tiny.gguf is unsure"),
        (
            ["--no-key", "--teacher", "https://a/v1", "--teacher-timeout", "120"],
            "--teacher-timeout 120 leaves the student no time",
        ),
        (
            ["--no-key", "--teacher", "a", "--threshold", "-1"],
            "--teacher 'a' is no URL",
        ),
    ],
)
def test_options_that_cannot_be_meant_are_refused(refused, gguf, arguments, sentence):
    code, err = refused(gguf, *arguments)
    assert sentence in err and code == 2


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("fifteen-letters", "has 15 characters, at least 16 are needed"),
        ("a key with spaces in it", "characters that can't stand in a header"),
        ("ключ-ключ-ключ-ключ", "characters that can't stand in a header"),
        ("", "has 0 characters"),
    ],
)
def test_a_key_that_is_too_short_or_no_header_is_refused(
    refused, gguf, tmp_path, monkeypatch, key, sentence
):
    (tmp_path / "key").write_text(key)
    code, err = refused(gguf, "--key-file", tmp_path / "key")
    assert sentence in err and code == 2
    monkeypatch.setenv("COMPRESS_KEY", key)
    code, err = refused(gguf)
    assert f"the key in COMPRESS_KEY {sentence}" in err or sentence in err and code == 2
    assert not key or key not in err


def test_a_key_file_that_is_none_is_refused(refused, gguf, tmp_path):
    code, err = refused(gguf, "--key-file", tmp_path)
    assert "is no file of at most 4,096 bytes" in err and code == 3


def test_a_port_in_use_is_refused_before_the_model_is_loaded(refused, gguf):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, err = refused(gguf, "--no-key", "--port", port)
    assert f"port {port} of 127.0.0.1 is in use" in err and code == 5


def test_an_address_of_another_machine_is_refused(refused, gguf, monkeypatch):
    monkeypatch.setenv("COMPRESS_KEY", KEY)
    with pytest.raises(AssertionError, match="203.0.113.9 is reached over the network"):
        refused(gguf, "--host", "203.0.113.9", "--port", "0")  # two lines: the warning too


def test_a_context_that_the_model_was_not_made_for_is_refused(refused, gguf):
    code, err = refused(gguf, "--no-key", "--port", "0", "--context", "513")
    assert "--context 513: tiny.gguf was made for 512 tokens" in err and code == 2


def test_what_is_no_model_is_refused(refused, tmp_path):
    code, err = refused(tmp_path / "nothing", "--no-key")
    assert "does not exist; give a bundle, a GGUF file" in err and code == 3
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    code, err = refused(tmp_path / "broken.gguf", "--no-key", "--port", "0")
    assert "is no whole GGUF" in err and code == 3


def test_a_package_that_is_missing_is_named_with_the_line_to_type(refused, gguf, monkeypatch):
    find = importlib.util.find_spec
    for package in ("aiohttp", "prometheus_client"):
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, p=package: None if name == p else find(name)
        )
        code, err = refused(gguf, "--no-key")
        assert f"serve needs the package {package.replace('_', '-')}" in err and code == 2
        assert "pip install 'compress-lm[serve]'" in err


def test_a_lock_opens_for_its_key_alone():
    lock = Lock(KEY)
    assert lock.admits(f"Bearer {KEY}") and lock.admits(f"bearer  {KEY}")
    for header in (None, "", KEY, f"Basic {KEY}", f"Bearer {KEY[1:]}", "Bearer ", "Bearer \udcff"):
        assert not lock.admits(header)
    assert Lock(None).admits(None)


def test_loopback_is_this_machine_and_nothing_else():
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "")))


def test_directories_are_known_by_what_is_in_them(tmp_path, tiny_teacher):
    assert target_of(tiny_teacher).runtime == "torch"
    (tmp_path / "genai_config.json").write_text("{}")
    target = target_of(tmp_path)
    assert (target.runtime, target.name, target.bundle) == ("onnxruntime", tmp_path.name, None)
    assert target.path == Path(tmp_path).absolute()


def test_of_a_bundle_the_judged_file_is_served_once_every_byte_is_verified(refused, tmp_path):
    bundle = made(tmp_path)
    target = target_of(bundle)
    assert (target.name, target.runtime) == ("demo/model-Q4_0.gguf", "llama.cpp")
    assert target.path == bundle / "model-Q4_0.gguf" and target.bundle == bundle
    assert target_of(bundle, "hf").runtime == "torch"
    code, err = refused(bundle, "--no-key", "--file", "model-Q4.gguf")
    assert "--file 'model-Q4.gguf' is no model of" in err and code == 2
    assert "did you mean 'model-Q4_0.gguf'?" in err

    # One bit, and nothing is served.
    file = bundle / "model-Q4_0.gguf"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, err = refused(bundle, "--no-key", "--port", "0")
    assert "does not verify: model-Q4_0.gguf was changed" in err and code == 3
