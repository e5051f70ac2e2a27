"""The verbs of the hand-off: `verify`, `accept` and `sign` a bundle."""

import re
from pathlib import Path

from compress.command_line import Parser
from compress.errors import EXIT_OK, ConfigError


def verify(arguments: list[str]) -> int:
    """Check every byte of a bundle, and that its manifest agrees with itself."""
    from compress.ship.sums import SUMS, sums_digest, verify_bundle

    parser = Parser(prog="compress verify")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--sha256", metavar="HEX", help=f"of {SUMS}, as its sender said over another channel"
    )
    parser.add_argument(
        "--key", type=Path, metavar="PUBLIC_PEM", help="refuse it unless this key signed it"
    )
    options = parser.parse_args(arguments)

    manifest = verify_bundle(options.bundle, _digest(options.sha256), options.key)
    print(
        f"{options.bundle}: {len(manifest['files']) + 2} files verified; run {manifest['run']},"
        f" budget {manifest['budget']}"
    )

    # Whoever wrote the files wrote their sums too; only the sender can vouch for these.
    if options.key:
        print(f"unchanged since it was signed by the owner of {options.key}")
    else:
        print("unchanged since it was written; this does not prove who wrote it")
    digest = sums_digest(options.bundle)
    advice = (
        "as was given"
        if options.sha256
        else "compare it with what its sender says over another channel, or give it as --sha256"
    )
    print(f"sha256 of {SUMS}: {digest} ({advice})")
    return EXIT_OK


def _digest(text: str | None) -> str | None:
    """A sha256 in hex as it was given. ConfigError when it is none."""
    if text is not None and not re.fullmatch("[0-9a-fA-F]{64}", text):
        raise ConfigError(f"--sha256 {text!r} is not a sha256: 64 hexadecimal digits are needed")
    return text


def accept(arguments: list[str]) -> int:
    """Measure a bundle's budget again on this machine."""
    parser = Parser(prog="compress accept")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--store",
        default="runs/.store",
        help="where scores and a teacher made of a package are kept",
    )
    parser.add_argument(
        "--hub", action="store_true", help="ask the hub for teacher and text that the bundle names"
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="open files and folders of this machine that the bundle names",
    )
    parser.add_argument(
        "--sha256", metavar="HEX", help="of SHA256SUMS, as its sender said over another channel"
    )
    parser.add_argument(
        "--key", type=Path, metavar="PUBLIC_PEM", help="refuse it unless this key signed it"
    )
    options = parser.parse_args(arguments)
    digest = _digest(options.sha256)

    # A wrong command line is refused before the runtimes are imported.
    from compress.accept import accept

    return accept(
        options.bundle,
        options.store,
        hub=options.hub,
        local=options.local,
        sha256=digest,
        key=options.key,
    )


def sign(arguments: list[str]) -> int:
    """Sign a bundle that verifies."""
    from compress.ship.signature import PASSWORD
    from compress.ship.sums import sign_bundle

    parser = Parser(prog="compress sign")
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--key",
        type=Path,
        required=True,
        metavar="PEM",
        help=f"a private key on P-256, P-384 or P-521; its password in {PASSWORD}",
    )
    options = parser.parse_args(arguments)

    file, count = sign_bundle(options.bundle, options.key)
    print(f"{file}: {count} files signed; receivers: compress verify BUNDLE --key PUBLIC_PEM")
    return EXIT_OK
