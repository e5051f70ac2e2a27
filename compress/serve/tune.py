"""`compress tune`: options, and the file that is written."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from compress.command_line import Parser
from compress.errors import EXIT_OK, EXIT_RESOURCES, ConfigError, printable
from compress.serve.command import check_outside, model_digest, need_packages

if TYPE_CHECKING:
    from compress.serve.target import Target

USAGE = (
    "compress tune BUNDLE|FILE.gguf [--out FILE] [--file NAME] [--clients N] [--tokens N]"
    " [--blocks N]"
)


def tune(arguments: list[str]) -> int:
    """Find the settings for this machine, and write them. Returns the exit code: 5 where the
    machine was too busy for a verdict.
    """
    options = _options(arguments)
    need_packages("tune")
    import asyncio

    from compress.serve.trials import Journal, sentence, tuned
    from compress.serve.tuning import machine_here, written

    # The same command goes on behind an interruption.
    target, out = _target_and_file(options)
    here = machine_here()
    print(f"tuning {target.name} on {', '.join(map(str, here.values()))}", flush=True)
    of = {"model": model_digest(target), "file": target.path.name, "machine": here}
    how = (options.clients, options.tokens, options.blocks)
    journal = Journal(out.with_name(f".{out.name}.part"), of | {"how": list(how)})
    work = tuned(target, journal, *how, lambda line: print(f"  {line}", flush=True))
    entry = of | asyncio.run(work)

    print(printable(sentence(entry)))
    if not written(out, entry):
        print(f"{out} keeps what was found here before")
    journal.close()
    if entry["verdict"] == "withheld":
        return EXIT_RESOURCES
    if entry["verdict"] == "faster":
        print(f"serve with: compress serve {options.target} --tuning {out}")
    return EXIT_OK


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="compress tune", usage=USAGE)
    parser.add_argument("target", type=Path, metavar="BUNDLE|FILE.gguf")
    parser.add_argument("--out", type=Path, help="the file to write; else beside the model")
    parser.add_argument("--file", metavar="NAME", help="of a bundle: another than was judged")
    parser.add_argument("--clients", type=int, default=1, metavar="N", help="asking at once; 1")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="of an answer; 32")
    parser.add_argument("--blocks", type=int, default=4, metavar="N", help="of A B B A; 4")
    options = parser.parse_args(arguments)
    for name, least in (("clients", 1), ("tokens", 2), ("blocks", 2)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name} {getattr(options, name)}: allowed is {least} or more")
    return options


def _target_and_file(options: argparse.Namespace) -> tuple[Target, Path]:
    """What is tuned, and the file to write, which can be added to. ConfigError, ValueError."""
    from compress.serve.target import target_of
    from compress.serve.tuning import read_entries

    target = target_of(options.target, options.file)
    if target.runtime != "llama.cpp":
        raise ConfigError(
            f"tune measures GGUF files in llama.cpp; {target.name} runs in {target.runtime}: give a"
            " GGUF file, or of a bundle one with --file NAME"
        )
    sealed = target.bundle or target.path
    out = options.out or sealed.with_name(f"{sealed.name}.tuning.json")
    check_outside(out, target.bundle, "--out")
    if out.is_file():
        read_entries(out)
    return target, out
