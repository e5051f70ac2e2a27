"""`compress VERB ...`: the verbs, and what went wrong as one sentence and an exit code. Heavy
imports happen inside the verb that needs them.
"""

import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

from compress import __version__
from compress.doctor import doctor
from compress.errors import (
    EXIT_OK,
    EXIT_SIGTERM,
    ConfigError,
    Interrupted,
    ResourceError,
    exit_code,
    is_disk,
    is_full,
    is_memory,
    nearest,
    room_words,
    shown,
)
from compress.handing import accept, sign, verify
from compress.packages import extra_of, install_line
from compress.serve.command import serve
from compress.serve.tune import tune
from compress.solving import solve
from compress.verbs import HELP, ask, compare, gc, list_all, run, score, sync

VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "solve": solve,
    "list": list_all,
    "score": score,
    "ask": ask,
    "compare": compare,
    "sync": sync,
    "verify": verify,
    "accept": accept,
    "serve": serve,
    "tune": tune,
    "sign": sign,
    "doctor": doctor,
    "gc": gc,
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb and turn what went wrong into one sentence and an exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(HELP)
        return EXIT_OK
    if arguments[0] == "--version":
        print(__version__)
        return EXIT_OK
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGTERM))

    # Noise to our users: libraries warn about their own next versions, and bitsandbytes, which peft
    # imports always, says which faster kernels it lacks.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        if not arguments:
            raise ConfigError("name a verb; see `compress --help`")
        if arguments[0] not in VERBS:
            raise ConfigError(f"unknown verb {arguments[0]!r}; {nearest(arguments[0], VERBS)}")
        return VERBS[arguments[0]](arguments[1:])
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives until the process ends)
        return EXIT_OK
    except SystemExit:
        raise
    except BaseException as error:
        if debug:
            traceback.print_exc()
        error = _named(error)
        print(f"compress: {shown(_sentence(error))}", file=sys.stderr)
        return exit_code(error)


def _named(error: BaseException) -> BaseException:
    """Of a package that is not installed, a ConfigError with the line that installs it; any other
    error as it is.
    """
    extra = extra_of(error.name or "") if isinstance(error, ModuleNotFoundError) else None
    if extra is None:
        return error
    return ConfigError(
        f"this needs {getattr(error, 'name', None)}, which is not installed:"
        f" {install_line(extra)}; `compress doctor` says what is here"
    )


def _sentence(error: BaseException) -> str:
    """What went wrong, and what to do next."""
    text = str(error)
    if is_disk(error) and not isinstance(error, ResourceError):
        where = getattr(error, "filename", None)
        place = Path(where if isinstance(where, str) else ".")
        needs = f"; {room_words(place)}" if is_full(error) else ""
        return (
            f"the disk refuses ({error}){needs}; free space or set store=DIR, then repeat the"
            " command to go on"
        )
    if is_memory(error):
        return (
            f"out of memory ({text.partition(chr(10))[0] or 'MemoryError'}); lower"
            " micro_batch_sequences or eval.batch_size"
        )
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return "interrupted; repeat the command to go on"
    if isinstance(error, RecursionError):
        return (
            "something that was given is nested too deep to be read, or goes round in a circle;"
            " flatten it (--debug shows where)"
        )

    # A library's message can be a page long.
    line = " ".join(text.split())[:500]
    if exit_code(error) == 1:
        return (
            f"this is a bug of compress: {type(error).__name__}: {line}; run again with --debug and"
            " report it"
        )
    sentences_of_ours = ValueError | ResourceError | OSError | FloatingPointError
    if not isinstance(error, sentences_of_ours):
        return (
            f"what was given can't be read ({type(error).__name__}: {line}); copy it again, or give"
            " another (--debug shows where)"
        )
    return text or f"{type(error).__name__} without a word; run again with --debug and report it"


if __name__ == "__main__":
    sys.exit(main())
