"""Regular expressions that somebody else wrote, tried in a process of its own before they are used.

`regex` gives a search a time limit, but nothing limits what compiling takes:
((a{1000}){1000}){1000} asks for more memory than there is. So every pattern is first compiled, and
searched for in short texts, by a process that may take MEMORY_BYTES and SECONDS in all:

    python -m compress.score.patterns < a JSON list of [pattern, prompt]     one line of JSON each:
    "" or what is wrong with it
"""

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import regex

PATTERN_SECONDS = 0.2  # of one search
CHARACTERS = 2000  # of one pattern
SECONDS = 60  # of all patterns of a file on the short texts; the package's own take one
MEMORY_BYTES = 1 << 30  # of the process's address space
SHORT_TEXTS = ("a" * 2000, "1" * 2000, " " * 2000, "a b" * 700 + "!")
FLAGS = regex.IGNORECASE | regex.MULTILINE


def problems(patterns: Sequence[tuple[str, str]]) -> list[str]:
    """What is wrong with each pattern, "" where it can be used; tried on its prompt as well."""
    command = [sys.executable, "-m", "compress.score.patterns"]
    root = str(Path(__file__).resolve().parents[2])
    stopped = False
    try:
        done = subprocess.run(
            command,
            input=json.dumps(list(patterns)),
            capture_output=True,
            text=True,
            timeout=2 * SECONDS,
            cwd=root,
        )
        lines = done.stdout.splitlines()
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode().splitlines()
        stopped = True
    answers = [str(json.loads(line)) for line in lines[: len(patterns)]]

    # Where the process ended, it was at the first without an answer.
    if len(answers) < len(patterns) and stopped:
        answers.append("takes too long")
    elif len(answers) < len(patterns):
        answers.append("takes too much time or memory to compile; use smaller counts")
    return answers + [""] * (len(patterns) - len(answers))


def _problem(pattern: str, prompt: str) -> str:
    """What is wrong with one pattern, in this process."""
    if len(pattern) > CHARACTERS:
        return f"has {len(pattern):,} characters; at most {CHARACTERS:,} are read"

    # It must compile, and end on its own prompt and on runs that make a pattern backtrack.
    try:
        compiled = regex.compile(pattern, FLAGS)
        for text in (prompt, prompt * 20, *SHORT_TEXTS):
            compiled.search(text, timeout=PATTERN_SECONDS)
    except regex.error as error:
        return f"does not compile ({error})"
    except TimeoutError:
        return "runs away; take nested repeats such as (a+)+ out of it"
    except (RecursionError, OverflowError, ValueError) as error:
        return f"can't be used ({error})"
    return ""


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for one in json.load(sys.stdin):
        print(json.dumps(_problem(*one)), flush=True)
