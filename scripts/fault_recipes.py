"""Recipes and command lines with something wrong in them, and headers with bytes changed."""

from __future__ import annotations

import random
import shutil
import signal
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_forks
from fault_forks import Figure, Plan

from compress.models.gguf_header import read_header
from compress.models.shapes import tensor_places
from compress.ship.manifest import read_manifest
from compress.ship.sums import read_sums

MOST_SECONDS = 2.0  # of computing that a refusal may take
HANG_SECONDS = 5  # of computing, for one header

# Where a recipe has a number, a word of a list or a table, and what can't stand there.
NUMBERS = (
    "seed", "data.seq_len", "eval.limit", "eval.batch_size", "eval.num_fewshot", "eval.new_tokens",
    "eval.heldout_sequences", "trainer.threads", "stages.heal.tokens", "stages.heal.lr",
    "stages.heal.temperature", "stages.heal.batch_sequences", "stages.heal.warmup",
    "stages.chat.rank", "stages.qat.tokens", "stages.qat.grad_clip", "stages.depth.blocks",
    "stages.width.ffn", "stages.width.calibration_sequences", "stages.heads.kv_groups",
    "stages.vocab.ids", "stages.heal.signal.threshold",
)  # fmt: skip
NO_NUMBERS = ("nan", "-inf", "abc", "-1", "[1]", "{a:1}", "1e999", "''", "99999999999999999999")
CHOICES = ("teacher", "data", "eval", "budget", "export", "track", "trainer")
NO_CHOICES = ("nothing_of_it", "'../x'", "5", "null", "[a]", "{a:1}", "..", "a/b", "''")
TABLES = ("data", "eval", "budget", "export", "track", "trainer", "stages.heal", "stages.qat")
LISTS = ("pipeline", "data.train", "data.heldout", "eval.tasks", "export.files", "track.sinks")
NO_ENTRIES = (
    "[nothing_of_it]",
    "5",
    "[5]",
    "[null]",
    "{a:1}",
    "[[a]]",
    "['']",
    "nothing",
    "['a b']",
)
SLOTS = ("heal@nowhere", "heal@heal", "nowhere", "teacher", "heal,heal", "'../x'", "'a b'")
FLAGS = ("--config-name=x", "--config-path=x", "--cfgg", "--experimental-rerun=x", "-x", "--plann")
SYNTAX = (
    "a=[",
    "a={b",
    "=5",
    "a b",
    "~",
    "++",
    "a=${oc.env:HOME}",
    "hydra.job.chdir=true",
    "a..b=1",
)


def command_lines(draw: random.Random, count: int) -> list[tuple[list[str], str]]:
    """(arguments behind `run`, what a refusal must name), each with one thing wrong."""
    makers: list[Callable[[], tuple[list[str], str]]] = [
        lambda: _assigned(draw, NUMBERS, NO_NUMBERS),
        lambda: _assigned(draw, CHOICES, NO_CHOICES),
        lambda: _assigned(draw, LISTS, NO_ENTRIES),
        lambda: _misspelt(draw, NUMBERS),
        lambda: _new_key(draw),
        lambda: (["smoke", f"pipeline=[{draw.choice(SLOTS)}]"], "pipeline"),
        lambda: (["smoke", flag := draw.choice(FLAGS)], flag.partition("=")[0]),
        lambda: (["smoke", text := draw.choice(SYNTAX)], text[:1]),
        lambda: ([_changed(draw, "smoke")], "recipe"),
    ]
    return [makers[number % len(makers)]() for number in range(count)]


def _assigned(
    draw: random.Random, keys: tuple[str, ...], values: tuple[str, ...]
) -> tuple[list[str], str]:
    key = draw.choice(keys)
    return ["smoke", f"{key}={draw.choice(values)}"], key


def _misspelt(draw: random.Random, keys: tuple[str, ...]) -> tuple[list[str], str]:
    """A key with a letter too many, which a refusal names as it was given."""
    key = draw.choice(keys)
    wrong = f"{key}{draw.choice('abcxyz_')}"
    return ["smoke", f"{wrong}={draw.choice(('1', 'x', '[1]'))}"], wrong.rpartition(".")[2]


def _new_key(draw: random.Random) -> tuple[list[str], str]:
    """A table with a key that it does not know."""
    table = draw.choice(TABLES)
    key = _changed(draw, "quality")
    return ["smoke", f"+{table}.{key}={draw.choice(('1', 'x', '{a:1}'))}"], key


def _changed(draw: random.Random, word: str) -> str:
    """A word with one letter doubled."""
    place = draw.randrange(len(word))
    return word[:place] + word[place] + word[place:]


def recipe_files(draw: random.Random, folder: Path, count: int) -> list[tuple[list[str], str]]:
    """The same in files: recipes of a user's own folder with one thing wrong."""
    base = "# Mine.\ndefaults:\n  - /base\n  - /stage/ptq@stages.a\n  - _self_\npipeline: [a]\n"
    wrong: list[tuple[str, str]] = [
        (base.replace("pipeline: [a]", "pipeline: [b]"), "pipeline"),
        (base.replace("[a]", "a"), "pipeline"),
        (base.replace("/stage/ptq", "/stage/ptqq"), "ptqq"),
        (base + "stages: {a: {gird: int4}}\n", "gird"),
        (base + "stages: {a: {grid: int5}}\n", "grid"),
        (base + "seed: -1\n", "seed"),
        (base + "eval: {limitt: 5}\n", "limitt"),
        (base + "budget: {limits: {size_bytes: {mx: 5}}}\n", "size_bytes"),
        (base + "budget: {limits: {sise_bytes: {max: 5}}}\n", "sise_bytes"),
        (base + "teacher: {source: 5}\n", "teacher"),
        (base + "data: {train: 5}\n", "train"),
        (base + "x: 1\n", "x"),
        (base.replace("defaults:", "default:"), "default"),
        (base.replace("  - _self_", "\t- _self_"), ".yaml"),
        ("", ".yaml"),
        ("5\n", ".yaml"),
        (base + "stages: [a]\n", "stages"),
        (base + "trainer: {moments: int7}\n", "moments"),
    ]
    lines = []
    for number in range(count):
        text, key = wrong[number % len(wrong)]
        name = f"r{number}"
        place = folder / name
        place.mkdir(parents=True)
        (place / f"{name}.yaml").write_text(text)
        lines.append(([name, f"--config-dir={place}"], name if key == ".yaml" else key))
    draw.shuffle(lines)
    return lines


def recipes(work: Path, draw: random.Random, count: int) -> Figure:
    """Each is refused with exit 2 in under two seconds, by the name of what is wrong; a teacher
    that is not there with exit 3, once the run looks for it.
    """
    work.mkdir(parents=True)
    from_files = recipe_files(draw, work / "own", count // 4)
    lines = [*command_lines(draw, count - len(from_files)), *from_files]
    failures, codes = [], Counter[int]()
    slowest = 0.0

    # Where the machine is slow, a refusal may take as long as three right recipes.
    right = fault_forks.run(["run", "smoke"], work, Plan(compose_only=True))
    most = max(MOST_SECONDS, 3 * right.computed)
    for arguments, key in lines:
        looked_for = key == "teacher"
        plan = Plan(compose_only=not looked_for)
        ended = fault_forks.run(["run", *arguments], work, plan)
        codes[ended.code] += 1
        slowest = max(slowest, ended.computed)
        problem = ""
        if ended.code not in ((2, 3) if looked_for else (2,)) or ended.has_traceback:
            problem = f"exit {ended.code}"
        elif ended.computed > most:
            problem = f"after {ended.computed:.1f} s"
        elif not (looked_for and ended.code == 3) and not all(
            part in ended.told for part in key.split(".")
        ):
            problem = f"{key!r} is not named"
        if problem or right.code:
            failures.append(f"{' '.join(arguments)}: {problem}: {ended.told}")
    about = f"wrong recipes and command lines: exit 2 below {MOST_SECONDS:g} s, the key named"
    more = {
        "slowest seconds": round(slowest, 2),
        "right recipe": round(right.computed, 2),
        "codes": {str(k): n for k, n in codes.items()},
    }
    return Figure(len(lines), len(lines) - len(failures), 200, about, failures, more)


def mutated(data: bytes, draw: random.Random, lengths: tuple[int, ...]) -> bytes:
    """Bytes with one to four changes: bits, bytes, runs, and numbers that are too large where the
    format has lengths.
    """
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(max(1, len(changed)))
        kind = draw.randrange(7)
        if kind == 0 and changed:
            changed[place % len(changed)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            changed[place : place + 1] = bytes([draw.randrange(256)])
        elif kind == 2:
            del changed[place : place + draw.randint(1, 64)]
        elif kind == 3:
            changed[place:place] = draw.randbytes(draw.randint(1, 64))
        elif kind == 4:
            value = draw.choice((0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1))
            changed[place : place + 8] = struct.pack("<Q", value)
        elif kind == 5:
            changed[place : place + 8] = draw.choice(TOKENS)
        elif lengths:
            start = draw.choice(lengths)
            changed[start : start + 8] = struct.pack("<Q", draw.randrange(1 << 40))
    return bytes(changed)


TOKENS = (
    b"[" * 2000,
    b'{"a":' * 500,
    b"1e999",
    b"-1",
    b"null",
    b"NaN",
    b'"\\ud800"',
    b"9" * 5000,
    b"",
)


def fuzz(bundle: Path, work: Path, draw: random.Random, count: int) -> Figure:
    """Headers with bytes changed: each is read, or refused in one sentence; nothing else comes up,
    and none takes long.
    """
    shutil.copytree(bundle, work)
    sums = read_sums(bundle)

    def manifest(file: Path) -> Any:
        return read_manifest(file.parent, sums)

    gguf = next(bundle.glob("*.gguf")).read_bytes()
    weights = (bundle / "hf" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", weights[:8])

    # The header alone changes; what it speaks of lies behind it.
    doors: dict[str, tuple[bytes, bytes, tuple[int, ...], Callable[[Path], Any]]] = {
        "manifest.json": ((bundle / "manifest.json").read_bytes(), b"", (), manifest),
        "m.gguf": (gguf[:6000], gguf[6000:], (8, 16, 24), read_header),
        "m.safetensors": (weights[: 8 + length], weights[8 + length :], (0,), tensor_places),
    }
    failures, ends = [], Counter[str]()
    signal.signal(signal.SIGVTALRM, _too_long)
    for number in range(count):
        name = [*doors][number % len(doors)]
        head, rest, lengths, read = doors[name]
        file = work / name
        file.write_bytes(mutated(head, draw, lengths) + rest)
        signal.setitimer(signal.ITIMER_VIRTUAL, HANG_SECONDS, 1)
        try:
            read(file)
            ends[f"{name} read"] += 1
        except ValueError as error:
            ends[f"{name} refused"] += 1
            if "\n" in str(error) or file.name not in str(error):
                failures.append(f"{name} {number}: no sentence with the file: {error}")
        except Exception as error:
            failures.append(f"{name} {number}: {type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    shutil.rmtree(work)
    about = "changed manifests and headers of GGUF and safetensors: read, or one sentence"
    return Figure(count, count - len(failures), 10_000, about, failures, {"ends": dict(ends)})


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"not read after computing for {HANG_SECONDS} s")
