"""`compress VERB ...`: verbs to functions. Heavy imports happen inside the verb that needs them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from compress import __version__, verbs
from compress.errors import EXIT_OK, EXIT_SIGTERM, ConfigError, Interrupted, exit_code, is_disk, is_memory, nearest

HELP = """compress: turn a teacher language model into a student that fits a budget, and prove it on the files that ship.

  compress run RECIPE [KEY=VALUE ...]   run a recipe; repeat the command to resume. --plan shows time, disk and memory first
                                        Hydra's flags work: --cfg job, -m (sweep), --config-dir DIR (your own recipes), --help
  compress list                         recipes, stages and every option, with one line each
  compress score MODEL [--budget NAME] [--teacher T] [KEY=VALUE ...]
                                        score any checkpoint directory or GGUF file, also one made elsewhere
  compress compare RUN [RUN ...] [--html FILE]
                                        stages of one run, or runs side by side; writes one HTML page
  compress verify BUNDLE                check every byte of a bundle
  compress accept BUNDLE                measure the bundle's budget again, on this machine
  compress gc [--store DIR] [--yes]     empty the store of what no run names

exit codes: 0 ok, 2 configuration, 3 input or integrity, 4 budget violated, 5 memory, disk or lock, 130/143 signals
"""


def _run(arguments: list[str]) -> int:
    from compress.launch import launch

    if not arguments or arguments[0].startswith("-"):
        if arguments[:1] in (["--help"], ["-h"]):
            print(HELP + "\n" + _listing())
            return EXIT_OK
        raise ConfigError("run needs a recipe: compress run RECIPE; `compress list` names them")
    plan = "--plan" in arguments
    rest = [a for a in arguments[1:] if a != "--plan"]

    def task(recipe: Any, run_dir: Path, command: list[str]) -> int:
        from compress import pipeline

        return pipeline.plan(recipe) if plan else pipeline.run(recipe, run_dir, command)

    return launch(arguments[0], rest, task)


def _listing() -> str:
    from compress.assets import configs_dir, recipes_dir

    def line(path: Path) -> str:
        return f"  {path.stem:<22} {path.read_text().partition(chr(10))[0].removeprefix('#').strip()}"

    parts = [("recipes", recipes_dir())]
    for group in sorted(path for path in configs_dir().iterdir() if path.is_dir() and any(path.glob("*.yaml"))):
        how = "- /stage/NAME@stages.SLOT in a recipe" if group.name == "stage" else f"{group.name}=NAME"
        parts.append((f"{group.name}  ({how})", group))
    return "\n\n".join("\n".join([title, *map(line, sorted(folder.glob("*.yaml")))]) for title, folder in parts)


def _list(arguments: list[str]) -> int:
    if arguments:
        raise ConfigError(f"list takes no arguments, got {' '.join(arguments)}")
    print(_listing())
    return EXIT_OK


VERBS: dict[str, Callable[[list[str]], int]] = {
    "run": _run, "list": _list, "score": verbs.score, "compare": verbs.compare, "verify": verbs.verify, "accept": verbs.accept,
    "gc": verbs.gc,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a verb and turn what went wrong into one sentence and an exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        print(HELP)
        return EXIT_OK
    if arguments[0] == "--version":
        print(__version__)
        return EXIT_OK
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_SIGTERM))
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about their own next versions: noise to our users
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # says at import which faster kernels it lacks; peft imports it always
    try:
        if arguments[0] not in VERBS:
            raise ConfigError(f"unknown verb {arguments[0]!r}; {nearest(arguments[0], VERBS)}")
        return VERBS[arguments[0]](arguments[1:])
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (lives until the process ends)
        return EXIT_OK
    except BaseException as error:
        code = exit_code(error)
        if code == 1 or isinstance(error, SystemExit):
            raise
        print(f"compress: {_sentence(error)}", file=sys.stderr)
        return code


def _sentence(error: BaseException) -> str:
    if is_disk(error):
        return f"the disk refuses ({error}); free space or set store=DIR, then repeat the command to go on"
    if is_memory(error):
        return f"out of memory ({str(error).partition(chr(10))[0] or 'MemoryError'}); lower micro_batch_sequences or eval.batch_size"
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return "interrupted; repeat the command to go on"
    return str(error)


if __name__ == "__main__":
    sys.exit(main())
