"""model.sig: a bundle's signature, in the format of OpenSSF Model Signing 1.0 with a key.

    {"mediaType": a sigstore bundle 0.3, "verificationMaterial": {"publicKey": {"hint": sha256}},
     "dsseEnvelope": {"payload": statement, "payloadType": in-toto, "signatures": [{"sig": ...}]}}

The statement (in-toto v1) names every file of the folder with its sha256; its subject is the sha256
of these, one behind the other in the order of their names. Signed is DSSE's encoding of it with
ECDSA on P-256, P-384 or P-521 (sha256, 384, 512).

`model_signing verify key` reads what is written here, and this reads what `model_signing sign key`
writes (tests/ship/test_signature.py; golden files by model-signing 1.1.1). That package is not used
because it brings 33 others, the clients of a signing service among them; this needs `cryptography`.
Signatures without a key, by that service, are for the package itself.
"""

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.doors import read_json
from compress.errors import ConfigError
from compress.store import write_whole

SIGNATURE = "model.sig"
SIGNATURE_BYTES = 50_000_000
MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://model_signing/signature/v1.0"
CURVES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
KEY_BYTES = 100_000
PASSWORD = "COMPRESS_SIGN_PASSWORD"  # of a private key, in the environment


def sign(bundle: Path, digests: Mapping[str, str], key: Path) -> Path:
    """Write model.sig of a bundle whose files, by name, have the sha256 `digests`. Returns its
    path. `key`: a PEM file with a private key.

    ConfigError: no such key, or of another kind.
    """
    from cryptography.hazmat.primitives.asymmetric import ec

    private = private_key(key)
    payload = json.dumps(_statement(bundle.absolute().name, digests)).encode()
    signed = private.sign(_encoded(payload), ec.ECDSA(_hash(private.public_key())))
    document = {
        "mediaType": MEDIA_TYPE,
        "verificationMaterial": {
            "publicKey": {"hint": _hint(private.public_key())},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signed).decode(), "keyid": ""}],
        },
    }
    file = bundle / SIGNATURE
    write_whole(file, (json.dumps(document) + "\n").encode())
    return file


def check(bundle: Path, digests: Mapping[str, str], key: Path) -> None:
    """Compare model.sig with a public key and with the sha256 of every file by name.

    ConfigError: no such key. ValueError: there is no signature, it is by another key, was changed,
    or is of other files.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec

    public = _public(key)
    file = bundle / SIGNATURE
    if not file.is_file() or file.is_symlink():
        raise ValueError(f"{bundle} is not signed: {SIGNATURE} is missing; ask its sender to sign")
    if (length := file.stat().st_size) > SIGNATURE_BYTES:
        raise ValueError(f"{file} has {length:,} bytes, at most {SIGNATURE_BYTES:,} are read")

    # Whose it says it is, then whether it is.
    hint, payload, signed = _parts(read_json(file), file)
    if hint and hint != _hint(public):
        raise ValueError(
            f"{file} is by another key: its public key has the sha256 {hint[:16]}..., {key} has"
            f" {_hint(public)[:16]}...; ask its sender for the right one, and don't use the bundle"
        )
    try:
        public.verify(signed, _encoded(payload), ec.ECDSA(_hash(public)))
    except InvalidSignature as error:
        raise ValueError(
            f"{file} is no signature by {key}: it was changed, or made with another key"
        ) from error
    _check_files(_named(payload, file), digests, file)


def _check_files(signed: Mapping[str, str], digests: Mapping[str, str], file: Path) -> None:
    """ValueError where the files that were signed are not those of the bundle."""
    differing = sorted(
        name for name in signed.keys() | digests.keys() if signed.get(name) != digests.get(name)
    )
    if differing:
        raise ValueError(
            f"{file} is of other files: {', '.join(differing[:5])} differ from what was signed;"
            " copy the bundle again from its sender"
        )


def _statement(name: str, digests: Mapping[str, str]) -> dict[str, Any]:
    """What is signed."""
    resources = [
        {"name": file, "algorithm": "sha256", "digest": digests[file]} for file in sorted(digests)
    ]
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _root(resources)}}],
        "predicateType": PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE],
            },
            "resources": resources,
        },
    }


def _root(resources: list[dict[str, Any]]) -> str:
    """sha256 of all digests, one behind the other."""
    together = b"".join(bytes.fromhex(resource["digest"]) for resource in resources)
    return hashlib.sha256(together).hexdigest()


def _parts(document: Any, file: Path) -> tuple[str, bytes, bytes]:
    """The hint at the key, the statement and its signature. ValueError for another format."""
    try:
        if document["mediaType"] != MEDIA_TYPE:
            raise ValueError(f"it is a {document['mediaType']!r}")
        envelope = document["dsseEnvelope"]
        if envelope["payloadType"] != PAYLOAD_TYPE or len(envelope["signatures"]) != 1:
            raise ValueError("it is no in-toto statement with one signature")
        hint = str(document["verificationMaterial"]["publicKey"].get("hint") or "")
        payload = base64.b64decode(envelope["payload"], validate=True)
        return hint, payload, base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(
            f"{file} is no signature by a key in the format of OpenSSF Model Signing 1.0 ({error});"
            " ask its sender for one"
        ) from error


def _named(payload: bytes, file: Path) -> dict[str, str]:
    """The files that a statement names -> their sha256. ValueError for another statement, or one
    that contradicts itself.
    """
    try:
        statement = json.loads(payload)
        kinds = statement["_type"], statement["predicateType"]
        how = statement["predicate"]["serialization"]
        resources = statement["predicate"]["resources"]
        if kinds != (STATEMENT, PREDICATE) or (how["method"], how["hash_type"]) != (
            "files",
            "sha256",
        ):
            raise ValueError(f"a statement of {kinds[1]!r}, by {how['method']}")
        if _root(resources) != statement["subject"][0]["digest"]["sha256"]:
            raise ValueError("its files do not make its subject")
        return {str(one["name"]): str(one["digest"]) for one in resources}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} signs something else ({error}); ask its sender for a signature of the files"
        ) from error


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of a statement."""
    head = f"DSSEv1 {len(PAYLOAD_TYPE)} {PAYLOAD_TYPE} {len(payload)} "
    return head.encode() + payload


def _hint(public: Any) -> str:
    """sha256 of a public key as PEM."""
    from cryptography.hazmat.primitives import serialization

    pem = public.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(pem).hexdigest()


def _hash(public: Any) -> Any:
    """The hash that goes with a key's curve."""
    from cryptography.hazmat.primitives import hashes

    return getattr(hashes, CURVES[public.curve.name])()


def _pem(key: Path) -> bytes:
    """A key file's bytes. ConfigError where there is none."""
    if not key.is_file():
        raise ConfigError(f"key {key}: no such file; give a PEM file")
    if key.stat().st_size > KEY_BYTES:
        raise ConfigError(f"key {key} is no key: it has {key.stat().st_size:,} bytes")
    return key.read_bytes()


def private_key(key: Path) -> Any:
    """The private key in a PEM file, opened by PASSWORD where that is set. ConfigError for anything
    else; the file is not told.
    """
    from cryptography.hazmat.primitives import serialization

    password = os.environ.get(PASSWORD)
    try:
        secret = password.encode() if password else None
        private = serialization.load_pem_private_key(_pem(key), secret)
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"key {key} is no private key in PEM that opens without a password"
            f" ({type(error).__name__}); make one: openssl ecparam -name prime256v1 -genkey -noout"
            " -out key.pem"
        ) from error
    _check_curve(private.public_key(), key)
    return private


def _public(key: Path) -> Any:
    """The public key in a PEM file. ConfigError for anything else."""
    from cryptography.hazmat.primitives import serialization

    try:
        public = serialization.load_pem_public_key(_pem(key))
    except (ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"key {key} is no public key in PEM; the sender makes it: openssl ec -in key.pem"
            " -pubout -out public.pem"
        ) from error
    _check_curve(public, key)
    return public


def _check_curve(public: Any, key: Path) -> None:
    """ConfigError for a key that the format has no place for."""
    curve = getattr(getattr(public, "curve", None), "name", type(public).__name__)
    if curve not in CURVES:
        raise ConfigError(f"key {key} is on {curve}; allowed: {', '.join(CURVES)}")
