"""Damage to a bundle, connections of a run, and secrets that were near it."""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import fault_forks
import fault_saves
from fault_forks import CANARY, Figure

from compress.ship.sums import SUMS, verify_bundle


def _verdict(bundle: Path) -> str:
    """What `verify` says of a bundle: "refused", or what is wrong with how it ends."""
    try:
        verify_bundle(bundle)
    except ValueError as error:
        return "refused" if "\n" not in str(error) else f"no sentence: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "passed as unchanged"


def flips(bundle: Path, work: Path, draw: random.Random, count: int) -> Figure:
    """Single bits flipped over all files of a bundle, files cut short, emptied, removed, added,
    renamed, swapped: all of it must be noticed.
    """
    failures = []
    tried = Counter[str]()
    if (before := _verdict(bundle)) != "passed as unchanged":
        return Figure(1, 0, 1000, "the bundle itself does not verify", [before])
    files = sorted(path for path in bundle.rglob("*") if path.is_file())

    # A bit of a random place of a random file: small files, the sums among them, as often as large.
    for _ in range(count):
        file = draw.choice(files)
        size = file.stat().st_size
        place, bit = draw.randrange(max(1, size)), draw.randrange(8)
        if not size:
            continue
        tried["bits"] += 1
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 1 << bit]))
            opened.flush()
            verdict = _verdict(bundle)
            opened.seek(place)
            opened.write(bytes([byte]))
        if verdict != "refused":
            failures.append(f"bit {bit} of byte {place} of {file.relative_to(bundle)}: {verdict}")

    for what, verdict in _other_damage(bundle, files, work, few=count < 100):
        tried[what.partition(" ")[0]] += 1
        if verdict != "refused":
            failures.append(f"{what}: {verdict}")
    if (after := _verdict(bundle)) != "passed as unchanged":
        failures.append(f"put back, the bundle does not verify: {after}")
    about = f"bit flips and other damage of a bundle of {len(files)} files noticed by verify"
    total = sum(tried.values())
    return Figure(total, total - len(failures), 1000, about, failures, {"by kind": dict(tried)})


def _other_damage(
    bundle: Path, files: list[Path], work: Path, *, few: bool
) -> Iterator[tuple[str, str]]:
    """Each file cut short in several places and removed; names added, changed and swapped. The
    bundle is put back after each.
    """
    ends = [at for at, byte in enumerate((bundle / SUMS).read_bytes(), 1) if byte == 10]
    for file in files[:: 8 if few else 1]:
        data = file.read_bytes()
        name = str(file.relative_to(bundle))
        lengths = {0, 1, len(data) // 2, len(data) - 2, len(data) - 1}
        lengths |= {*ends[:-1]} if file.name == SUMS else set()
        for length in sorted(n for n in lengths if 0 <= n < len(data)):
            file.write_bytes(data[:length])
            yield f"cut {name} to {length} bytes", _verdict(bundle)
        file.write_bytes(data + b"\n")
        yield f"longer {name}", _verdict(bundle)
        file.write_bytes(data)

        aside = work / "aside"
        file.rename(aside)
        yield f"removed {name}", _verdict(bundle)
        file.symlink_to(aside)
        yield f"linked {name}", _verdict(bundle)
        file.unlink()
        aside.rename(file)
    for name in ("extra", "hf/extra", ".hidden", "SHA256SUMS2"):
        (bundle / name).write_bytes(b"")
        yield f"added {name}", _verdict(bundle)
        (bundle / name).unlink()

    # The same bytes under each other's names.
    first, second = files[0], files[-1]
    kept = first.read_bytes(), second.read_bytes()
    first.write_bytes(kept[1])
    second.write_bytes(kept[0])
    yield "swapped two files", _verdict(bundle)
    first.write_bytes(kept[0])
    second.write_bytes(kept[1])


def sockets(runs: Sequence[fault_saves.Made]) -> Figure:
    """Connections that whole runs, and the processes that they started, attempted outside this
    machine.
    """
    failures = sorted({where for run in runs for where in run.outcome.outside})
    programs = Counter(
        words.split()[0].rsplit("/", 1)[-1] if words else ""
        for run in runs
        for words in run.outcome.started
    )
    about = "runs without a connection outside loopback attempted, child processes included"
    passed = sum(not run.outcome.outside for run in runs)
    more = {"attempted": len(failures), "started": dict(programs)}
    return Figure(len(runs), passed, 1, about, failures, more)


def _holding(folder: Path) -> list[str]:
    """Files below a folder in whose bytes or name the canary is."""
    needle = CANARY.encode()
    return [
        str(file.relative_to(folder))
        for file in sorted(folder.rglob("*"))
        if CANARY in file.name or (file.is_file() and needle in file.read_bytes())
    ]


def canaries(work: Path, short: Path, told: str, *, quick: bool) -> Figure:
    """Secrets in the environment, in URLs and in overrides: no file of a run, its store, its
    bundle or tracker, and no line of the log may hold one. `short`: the folder of a run that had
    them in its environment, and `told` what it said.
    """
    from test_credentials import COMMANDS

    failures = []
    searched = {"a run": (short, told)}
    if not quick and importlib.util.find_spec("wandb") is not None:
        folder = fault_saves.folder_for(work / "wandb", work.parent)
        ended = fault_forks.run([*fault_saves.SHORT, "track=wandb"], folder)
        searched["a run tracked by W&B"] = folder, ended.text
        if ended.code or not [*folder.rglob("*.wandb")]:
            failures.append(f"the run tracked by W&B ended with {ended.code}: {ended.told}")

    # Whole runs with secrets all around them.
    files = 0
    for name, (folder, text) in searched.items():
        files += sum(path.is_file() for path in folder.rglob("*"))
        if leaked := [*_holding(folder), *(["the log"] if CANARY in text else [])]:
            failures.append(f"{name} with secrets in its environment leaks into {leaked}")

    # Each way to give one in a URL is refused without repeating it.
    names = sorted(COMMANDS)[:: 6 if quick else 1]
    for number, name in enumerate(names):
        folder = work / f"url-{number}"
        (folder / "recipes").mkdir(parents=True)
        recipe = "defaults: [/base, _self_]\nteacher: {source: 's3://KEY:PLACE@bucket/p'}\n"
        (folder / "recipes" / "mine.yaml").write_text(recipe.replace("PLACE", CANARY))
        ended = fault_forks.run(COMMANDS[name], folder)
        (folder / "recipes" / "mine.yaml").unlink()
        if ended.code not in (2, 3) or CANARY in ended.text or _holding(folder):
            failures.append(f"{name}: exit {ended.code}, {ended.told}; {_holding(folder)}")
    tried = len(searched) + len(names)
    about = "runs and commands with secrets near them, none in a file or a line"
    more = {"files searched": files, "runs": [*searched], "leaked": len(failures)}
    return Figure(tried, tried - len(failures), 18, about, failures, more)
