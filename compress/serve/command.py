"""`compress serve`: options, and what they mean together."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from compress.command_line import Parser
from compress.errors import EXIT_OK, ConfigError, printable
from compress.packages import EXTRAS, install_line

if TYPE_CHECKING:
    import asyncio

    from compress.serve.settings import Price, Settings, TeacherSettings
    from compress.serve.target import Target

USAGE = (
    "compress serve BUNDLE|FILE.gguf|DIRECTORY [--host 127.0.0.1] [--port 8080]"
    " [--key-file FILE | --no-key] [--parallel N] [--context N] [--queue N] [--timeout S]"
    " [--max-tokens N] [--file NAME] [--tuning FILE] [--teacher URL] [--calibrate FILE]"
)
FASTER = "uvloop"  # not on every system
KEY, TEACHER_KEY = "COMPRESS_KEY", "COMPRESS_TEACHER_KEY"
OF_TEACHER = ("key_file", "model", "timeout", "budget", "price")


def _parser() -> Parser:
    parser = Parser(prog="compress serve", usage=USAGE)
    add = parser.add_argument
    add("target", type=Path, metavar="BUNDLE|FILE.gguf|DIRECTORY")
    add("--file", metavar="NAME", help="of a bundle: another than the file that was judged")
    add("--host", default="127.0.0.1", help="the address to listen at")
    add("--port", type=int, default=8080, help="0 for any that is free")
    add("--key-file", type=Path, metavar="FILE", help=f"holds the key; else in {KEY}")
    add("--no-key", action="store_true", help="on loopback: whoever is on this machine may ask")
    add("--parallel", type=int, metavar="N", help="requests answered at once; 4 with llama.cpp")
    add("--context", type=int, metavar="N", help="tokens of a prompt with its answer")
    add("--queue", type=int, default=16, metavar="N", help="requests that may wait")
    add("--timeout", type=float, default=120.0, metavar="S", help="of a request, waiting included")
    add("--max-tokens", type=int, default=1024, metavar="N", help="of an answer, at most")
    add("--threads", type=int, metavar="N", help="to compute on; else the CPUs of this process")
    add("--tuning", type=Path, metavar="FILE", help="what `compress tune` found for this machine")
    price = "money for a million tokens of prompts and of answers, for the metrics"
    add("--price", metavar="IN:OUT", help=price)

    teacher = parser.add_argument_group("a larger model behind it")
    add = teacher.add_argument
    add("--teacher", metavar="URL", help="OpenAI-compatible, up to /v1")
    add("--teacher-key-file", type=Path, metavar="FILE", help=f"its key; else in {TEACHER_KEY}")
    add("--teacher-model", metavar="NAME", help="else the first one that it lists")
    add("--teacher-timeout", type=float, metavar="S", help="of a whole answer of it; 30")
    add("--teacher-budget", type=int, metavar="N", help="calls within any hour; no limit")
    add("--teacher-price", metavar="IN:OUT", help=price)
    threshold = "certainty in nats a token, or a file that --calibrate wrote; else the bundle's"
    add("--threshold", metavar="NUMBER|FILE", help=threshold)
    add("--calibrate", type=Path, metavar="FILE", help="choose it, write it, and serve nothing")
    return parser


def serve(arguments: list[str]) -> int:
    """Serve a model by OpenAI's interface until SIGTERM, or choose the threshold of a cascade."""
    options = _parser().parse_args(arguments)
    need_packages("serve")

    # What can't be meant like this is refused before the bundle's bytes are read.
    settings = _settings(options)
    _check_together(options)
    key = _teacher_key(options)
    import asyncio

    from compress.serve.target import target_of

    target = target_of(options.target, options.file)
    if options.calibrate is not None:
        return asyncio.run(_calibrate(target, settings, options.calibrate))
    teacher = _teacher(options, target, key)
    if options.tuning is not None:
        from compress.serve.tuning import tuning_in

        settings = replace(settings, tuning=tuning_in(options.tuning, model_digest(target)))

    from compress.serve.service import run, warnings_of

    for remark in warnings_of(settings, teacher):
        print(f"compress: warning: {printable(remark)}", file=sys.stderr)
    with asyncio.Runner(loop_factory=_fast_loop()) as runner:
        return runner.run(run(target, settings, teacher))


def need_packages(verb: str) -> None:
    """ConfigError for a package of the door that is not installed."""
    for module, distribution in EXTRAS["serve"].items():
        if module != FASTER and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{verb} needs the package {distribution}, which is not installed:"
                f" {install_line('serve')}"
            )


def check_outside(out: Path, bundle: Path | None, option: str) -> None:
    """ConfigError: no folder to write it to, or it would lie in the bundle."""
    inside = bundle is not None and out.absolute().is_relative_to(bundle)
    if not out.absolute().parent.is_dir() or inside:
        raise ConfigError(
            f"{option} {os.fspath(out)}: name a file in a folder that exists, outside the bundle,"
            " whose sums it would break"
        )


def _fast_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's event loop where that is installed: a token costs the door less. None for asyncio's
    own.
    """
    if importlib.util.find_spec(FASTER) is None:
        return None
    return importlib.import_module(FASTER).new_event_loop


def _settings(options: argparse.Namespace) -> Settings:
    from compress.serve.keys import read_key
    from compress.serve.settings import Settings

    # Whoever says that there is no key has given none.
    key = None if options.no_key else read_key(options.key_file, KEY, "--key-file")
    if options.no_key and options.key_file is not None:
        raise ConfigError("--no-key and --key-file can't both be meant; leave one of them out")
    if key is None and not options.no_key and options.calibrate is None:
        raise ConfigError(
            f"a key is needed: give --key-file FILE or the environment's {KEY} (make one with"
            " `openssl rand -hex 32`), or on this machine alone --no-key"
        )
    return Settings(
        host=options.host,
        port=options.port,
        key=key,
        parallel=options.parallel,
        context=options.context,
        queue=options.queue,
        timeout=options.timeout,
        max_tokens=options.max_tokens,
        threads=options.threads,
        price=_price(options.price, "--price"),
    )


def _price(text: str | None, option: str) -> Price:
    """IN:OUT as a price. ConfigError."""
    from compress.serve.settings import Price

    if text is None:
        return Price()
    if not re.fullmatch(r"\d+(\.\d+)?:\d+(\.\d+)?", text):
        raise ConfigError(
            f"{option} {text!r} is no IN:OUT, money for a million tokens, as in 0.15:0.60"
        )
    prompt, answer = map(float, text.split(":"))
    return Price(prompt, answer)


def _check_together(options: argparse.Namespace) -> None:
    """ConfigError for options that another one lacks, or excludes."""
    if options.tuning is not None and (options.threads or options.calibrate):
        raise ConfigError(
            "--tuning says how a model is served, and on how many threads; give it without"
            " --threads and --calibrate"
        )
    if options.calibrate is not None and (options.teacher or options.threshold):
        raise ConfigError("--calibrate chooses a threshold and serves nothing; give it alone")
    if options.teacher is not None:
        seconds = 30.0 if options.teacher_timeout is None else options.teacher_timeout
        if seconds >= options.timeout:
            raise ConfigError(
                f"--teacher-timeout {seconds:g} leaves the student no time to answer within"
                f" --timeout {options.timeout:g}; lower the first or raise the second"
            )
        return
    given = [name for name in OF_TEACHER if getattr(options, f"teacher_{name}") is not None]
    names = [f"--teacher-{name.replace('_', '-')}" for name in given]
    names += ["--threshold"] if options.threshold is not None else []
    if names:
        raise ConfigError(f"{names[0]} says something of a teacher; name it with --teacher URL")


def _teacher_key(options: argparse.Namespace) -> str | None:
    from compress.serve.keys import read_key

    if options.teacher is None:
        return None
    return read_key(options.teacher_key_file, TEACHER_KEY, "--teacher-key-file")


def _teacher(
    options: argparse.Namespace, target: Target, key: str | None
) -> TeacherSettings | None:
    """The teacher, with the rule by which it is asked. ConfigError: nothing says which."""
    if options.teacher is None:
        return None
    from compress.serve.calibration import FILE, read_rule, rule_in
    from compress.serve.settings import TeacherSettings

    model = model_digest(target)
    bundled = target.bundle / FILE if target.bundle else None
    if options.threshold is not None:
        rule = read_rule(options.threshold, model)
    elif bundled is not None and bundled.is_file():
        rule = rule_in(bundled, model)
    else:
        raise ConfigError(
            f"nothing says where {target.name} is unsure: give --threshold NUMBER, or a file that"
            " `compress serve BUNDLE --calibrate FILE` writes"
        )

    return TeacherSettings(
        url=options.teacher,
        rule=rule,
        key=key,
        model=options.teacher_model,
        timeout=30.0 if options.teacher_timeout is None else options.teacher_timeout,
        budget=options.teacher_budget,
        price=_price(options.teacher_price, "--teacher-price"),
    )


def model_digest(target: Target) -> str:
    """sha256 of the file that is served, or over the files of a directory."""
    from compress.store import files_digest, sha256_file

    if target.path.is_file():
        return sha256_file(target.path)
    files = sorted(file for file in target.path.rglob("*") if file.is_file())
    return files_digest(target.path, files)


async def _calibrate(target: Target, settings: Settings, out: Path) -> int:
    """Writes a cascade's rule for a bundle's student to `out`, and says what it promises."""
    from compress.serve.backend import Backend
    from compress.serve.calibration import calibrate, written
    from compress.serve.student import Student
    from compress.store import write_whole

    if target.bundle is None:
        raise ConfigError(
            f"--calibrate needs a bundle, whose open answers it is chosen by; {target.path} is none"
        )
    check_outside(out, target.bundle, "--calibrate")

    backend = Backend(target, settings)
    student = Student(backend)
    try:
        await backend.start()
        chosen = await calibrate(student, target.bundle, model_digest(target))
    finally:
        await student.close()
        await backend.stop()
    write_whole(out, written(chosen).encode())
    print(
        f"{chosen['verdict']}: {chosen['sentence']}\nthreshold {chosen['threshold']:.4f} in {out}"
    )
    return EXIT_OK
