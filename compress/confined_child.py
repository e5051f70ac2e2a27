"""What `confined.py` starts: reads requests, a JSON line each, and answers with a line an item. It
imports nothing of this package.

The timer counts the time that the process computes; its signal ends the process, whatever Python or
a library is doing at that moment. Memory beyond the limit is refused by the operating system, where
that knows limits of the address space (Linux does).
"""

import importlib
import json
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

MODULES = {"render": "transformers.utils.chat_template_utils", "tokenize": "tokenizers"}


def bytes_taken() -> int:
    """The address space of this process; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def limit_memory(more: int) -> None:
    """Let this process take so many bytes more than now."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = bytes_taken() + more
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))


def renderer(module: Any, special: dict[str, str], generation: bool) -> Callable[[Any], str]:
    """{"template", "turns", "tools"} -> text, as transformers' `apply_chat_template` renders it."""

    def render(item: dict[str, Any]) -> str:
        texts, _ = module.render_jinja_template(
            conversations=[item["turns"]],
            tools=item["tools"],
            chat_template=item["template"],
            add_generation_prompt=generation,
            **special,
        )
        return texts[0]

    return render


def counter(module: Any, file: str) -> Callable[[Any], int]:
    """A text -> how many tokens it has by a tokenizer.json, or normalised characters if more."""
    tokenizer = module.Tokenizer.from_file(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def count(text: str) -> int:
        normal = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else ""
        tokens = len(tokenizer.encode(text, add_special_tokens=False).ids)
        return max(tokens, len(normal))

    return count


WORK: dict[str, Callable[..., Callable[[Any], Any]]] = {"render": renderer, "tokenize": counter}


def answers(module: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """{"value"} or {"error"} of every item."""
    limits, items = request["limits"], request["items"]
    try:
        work = WORK[request["task"]](module, **request["given"])
    except BaseException as error:  # a panic of tokenizers is no Exception
        yield from ({"error": told(error, limits)} for _ in items)
        return

    # An item that fails leaves the next its turn.
    for item in items:
        try:
            value = work(item)
        except BaseException as error:
            yield {"error": told(error, limits)}
            continue

        if isinstance(value, str) and len(value) > limits["characters"]:
            size, most = f"{len(value):,}", f"{limits['characters']:,}"
            yield {"error": f"it gives {size} characters, at most {most} are allowed"}
        else:
            yield {"value": value}


def told(error: BaseException, limits: dict[str, Any]) -> str:
    """An error in a line."""
    if isinstance(error, MemoryError):
        return f"it needs more than {limits['memory_bytes'] / 1e9:.1f} GB of memory"
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def main() -> None:
    """Serve until nobody asks any more. What is imported is outside the limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks
    for line in sys.stdin.buffer:
        request = json.loads(line)
        module = importlib.import_module(MODULES[request["task"]])
        limit_memory(request["limits"]["memory_bytes"])
        signal.setitimer(signal.ITIMER_PROF, request["limits"]["seconds"])
        for answer in answers(module, request):
            sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
            sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
