"""Signatures of bundles: by whom, of what, and in whose format."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from test_bundle_open import made
from test_received_bundle import refused, sealed

from compress.__main__ import main
from compress.ship import signature

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "model_signing"


def pair(folder, name, curve=ec.SECP256R1, password=None):
    """A private key and its public one, as files."""
    key = ec.generate_private_key(curve())
    hidden = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hidden)
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return private, public


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def bundle(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_a_signed_bundle_verifies_by_its_key_alone(bundle, tmp_path, capfd, curve):
    private, public = pair(tmp_path, "ours", curve)
    _, other = pair(tmp_path, "theirs", curve)
    assert "is not signed" in refused(capfd, "verify", bundle, "--key", public)
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    assert main(["verify", str(bundle)]) == 0
    capfd.readouterr()
    assert main(["verify", str(bundle), "--key", str(public)]) == 0
    assert "unchanged since it was signed by the owner of" in capfd.readouterr().out
    for verb in ("verify", "accept"):
        assert "is by another key" in refused(capfd, verb, bundle, "--key", other)
    assert private.read_text() not in (bundle / "model.sig").read_text()


def test_a_signature_is_of_every_byte(bundle, tmp_path, capfd):
    """A file changed and the sums written again: what a forger without the key does."""
    private, public = pair(tmp_path, "ours")
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    capfd.readouterr()
    kept = (bundle / "model.sig").read_bytes()
    (bundle / "model.sig").unlink()
    (bundle / "hf" / "config.json").write_text("{}")
    sealed(bundle)
    (bundle / "model.sig").write_bytes(kept)
    told = refused(capfd, "verify", bundle, "--key", public)
    assert "is of other files: SHA256SUMS, hf/config.json, manifest.json" in told


def test_every_part_of_a_signature_counts(bundle, tmp_path, capfd):
    private, public = pair(tmp_path, "ours")
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    capfd.readouterr()
    whole = json.loads((bundle / "model.sig").read_text())

    def changed(*path, value):
        copy = json.loads(json.dumps(whole))
        table = copy
        for key in path[:-1]:
            table = table[key]
        table[path[-1]] = value
        return json.dumps(copy)

    envelope = whole["dsseEnvelope"]
    for text, said in (
        ("{", "is not JSON"),
        ("[]", "holds a JSON list"),
        ("[" * 50_000, "nested too deep"),
        ("{}", "no signature by a key"),
        (changed("mediaType", value="other"), "no signature by a key"),
        (changed("dsseEnvelope", "signatures", value=[]), "with one signature"),
        (changed("dsseEnvelope", "signatures", 0, "sig", value="AAAA"), "is no signature by"),
        (changed("dsseEnvelope", "signatures", 0, "sig", value="?"), "no signature by a key"),
        (changed("dsseEnvelope", "payload", value=envelope["payload"][4:]), "is no signature by"),
        (changed("verificationMaterial", "publicKey", "hint", value="0" * 64), "another key"),
    ):
        (bundle / "model.sig").write_text(text)
        assert said in refused(capfd, "verify", bundle, "--key", public), text[:80]


def test_a_key_that_is_none_is_a_wrong_command_line(bundle, tmp_path, capfd):
    private, public = pair(tmp_path, "ours")
    protected, _ = pair(tmp_path, "protected", password=b"correct horse")
    (tmp_path / "text.pem").write_text("a secret that is no key")
    rsa_key = rsa.generate_private_key(65537, 2048)
    (tmp_path / "rsa.pem").write_bytes(
        rsa_key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    for verb, key, said in (
        ("sign", tmp_path / "none.pem", "no such file"),
        ("sign", tmp_path / "text.pem", "is no private key in PEM"),
        ("sign", public, "is no private key in PEM"),
        ("sign", protected, "opens without a password"),
        ("sign", tmp_path / "rsa.pem", "allowed: secp256r1"),
        ("verify", tmp_path / "none.pem", "no such file"),
        ("verify", private, "is no public key in PEM"),
    ):
        told = refused(capfd, verb, bundle, "--key", key, code=2)
        assert said in told and "a secret" not in told
    assert not (bundle / "model.sig").exists()


def test_a_protected_key_opens_by_the_environment(bundle, tmp_path, capfd, monkeypatch):
    protected, public = pair(tmp_path, "protected", password=b"correct horse")
    monkeypatch.setenv("COMPRESS_SIGN_PASSWORD", "correct horse")
    assert main(["sign", str(bundle), "--key", str(protected)]) == 0
    assert main(["verify", str(bundle), "--key", str(public)]) == 0
    out, err = capfd.readouterr()
    assert "correct horse" not in out + err


def test_what_a_killed_process_left_of_a_signature_goes_when_it_is_signed_again(
    bundle, tmp_path, capfd
):
    private, public = pair(tmp_path, "ours")
    gone = subprocess.Popen(["true"])
    gone.wait()
    (bundle / f".model.sig.{gone.pid}").write_text("{")
    assert "is not in SHA256SUMS" in refused(capfd, "verify", bundle)
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    assert main(["verify", str(bundle), "--key", str(public)]) == 0


def test_what_was_changed_is_not_signed(bundle, tmp_path, capfd):
    private, _ = pair(tmp_path, "ours")
    (bundle / "README.md").write_text("x")
    assert "README.md was changed" in refused(capfd, "sign", bundle, "--key", private)


def test_signatures_of_the_package_itself_are_read():
    """By model-signing 1.1.1; tests/golden/model_signing/README says how."""
    digests = {
        str(file.relative_to(GOLDEN / "folder")): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted((GOLDEN / "folder").rglob("*"))
        if file.is_file() and file.name != "model.sig"
    }
    signature.check(GOLDEN / "folder", digests, GOLDEN / "public.pem")
    with pytest.raises(ValueError, match=r"is of other files: a\.txt"):
        signature.check(GOLDEN / "folder", digests | {"a.txt": "0" * 64}, GOLDEN / "public.pem")


def test_the_package_itself_reads_ours(bundle, tmp_path):
    pytest.importorskip("model_signing.verifying")
    private, public = pair(tmp_path, "ours")
    assert main(["sign", str(bundle), "--key", str(private)]) == 0
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(bundle)]
    options = ["--signature", str(bundle / "model.sig"), "--public_key", str(public)]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
