"""`compress gc`: empty a store of what no run directory names, and of nothing else.

A run directory that still exists keeps every entry that its run.json names and every score of the
weights that its records name. Known are the directories that the store lists, wherever they are,
and those below `--runs`. Teacher signals and packed text are made again when they are needed;
they stay while a known run has unfinished work. Files that are not named as this program names
its own are left where they are.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from compress.doors import read_json
from compress.errors import ConfigError, ResourceError
from compress.store import ROOMS, STAGE_JSON, STORE_JSON, Store, left_over

KEY = r"[0-9a-f]{64}"
# What lies in each room, by name: as store.py, score/scorer.py, distill/signals.py, text/packing.py
# and text/written.py write it.
NAMES = {room: re.compile(form) for room, form in {
    "entries": rf"(?P<key>{KEY})|\.(?P<part>{KEY})\.part", "work": rf"(?P<key>{KEY})",
    "notes": rf"(?P<key>{KEY})\.json",
    "scores": r"(?P<digest>[0-9a-f]{16})-[\w.-]+\.(json|safetensors)", "signals": r"[0-9a-f]{32}",
    "data": r"([a-z]+-)?[0-9a-f]{32,64}(\.[a-z_]+)+", "locks": rf"{KEY}|store",
    "runs": r"[0-9a-f]{32}\.json",
}.items()}  # fmt: skip
IN_A_SIGNAL = re.compile(r"meta\.json|\d{5,}-[0-9a-f]{16}\.safetensors")
RUN_FILES = re.compile(
    r"run\.json|record\.json|records\.jsonl|(items|steps|open)\.jsonl|report\.html|model\.sig"
)
SLOT_FOLDER = re.compile(r"\d{2,3}-")
RUN_DIRECTORIES = (".", "*", "*/*")  # below --runs


class Known(NamedTuple):
    """What the run directories that still exist name."""

    listed: set[Path]  # in the store
    below: set[Path]  # the folder that holds runs
    keys: set[str]
    digests: set[str]  # of weights
    gone: list[Path]  # notes in the store of directories that are gone


class Collected(NamedTuple):
    """What was removed, or would be."""

    things: int
    bytes: int
    strangers: list[Path]  # left, because this program does not name its files so


def known_runs(store: Store, below: Path) -> Known:
    """Read the run directories that the store lists and those below a folder. ValueError naming
    one that can't be read.
    """
    listed, gone = _listed_runs(store)
    below_folder: set[Path] = set()
    for folder in RUN_DIRECTORIES:
        below_folder.update(file.parent.resolve() for file in below.glob(f"{folder}/run.json"))

    # What each of them needs.
    keys: set[str] = set()
    digests: set[str] = set()
    for run in sorted(listed | below_folder):
        about = read_json(run / "run.json")
        run_keys = about.get("keys")
        if about.get("schema") != 1 or not isinstance(run_keys, list):
            raise ValueError(
                f"{run / 'run.json'} does not say which keys it needs; mend it, or move it away, "
                "before the store is emptied"
            )
        keys.update(map(str, run_keys))
        records = (
            file for file in run.glob("*/record.json") if SLOT_FOLDER.match(file.parent.name)
        )
        digests.update(str(read_json(record).get("digest")) for record in records)
    return Known(listed, below_folder, keys, digests, gone)


def _listed_runs(store: Store) -> tuple[set[Path], list[Path]]:
    """The run directories that a store lists and that are there, and its notes of those that are
    gone. ValueError naming a note without a directory.

    A directory is looked for where it was, and where it was as seen from the store: both may have
    been moved together.
    """
    listed: set[Path] = set()
    gone = []
    for note in sorted((store.root / "runs").iterdir()):
        if not NAMES["runs"].fullmatch(note.name):
            continue
        here = {place for place in _places(store, note) if (place / "run.json").is_file()}
        listed.update(here)
        if not here:
            gone.append(note)
    return listed, gone


def _places(store: Store, note: Path) -> tuple[Path, Path]:
    """Where the run directory of a note was, and where it stands to the store. ValueError when the
    note names none.
    """
    about = read_json(note)
    path = about.get("run")
    beside = about.get("from_store", ".")
    if not isinstance(path, str) or not isinstance(beside, str):
        raise ValueError(
            f"{note} names no run directory; delete it, and name the folder that holds its run "
            "with --runs DIR"
        )
    return Path(path), (store.root.resolve() / beside).resolve()


def collect(store: Store, keep: set[str], digests: set[str], *, dry_run: bool) -> Collected:
    """Remove entries, notes and work whose key is not in `keep`, scores of weights not in
    `digests`, and what killed processes left.

    Signals and packed text go too, unless work on a key in `keep` is unfinished. A key whose lock
    is held is never touched.
    """
    # What decides: keys of finished and unfinished work, and digests as scores are named by them.
    doomed: list[Path] = []
    doomed += _torn_marks(store)
    known = {*(store.root / name for name in (*ROOMS, STORE_JSON)), *doomed}
    strangers = [path for path in store.root.iterdir() if path not in known]
    finished = {path.name for path in (store.root / "entries").iterdir()}
    unfinished = any(path.name in keep - finished for path in (store.root / "work").iterdir())
    kept_scores = {digest[:16] for digest in digests}

    # Each room, by the names in it.
    for room, form in NAMES.items():
        for path in sorted((store.root / room).iterdir()):
            match = form.fullmatch(left_over(path) or path.name)
            if not match or path.is_symlink():
                strangers.append(path)
                continue
            named = match.groupdict()
            key = named.get("key") or named.get("part")
            digest = named.get("digest")
            torn = left_over(path) or named.get("part") or (room == "work" and key in finished)
            unnamed = room in ("signals", "data") and not unfinished
            if key or digest:
                unnamed = key not in keep if key else digest not in kept_scores
            if (torn or unnamed) and not (key and _held(store, key)):
                doomed.append(path)

    # A folder that holds somebody else's file stays whole.
    foreign = {path: file for path in doomed if (file := _foreign(path))}
    strangers += foreign.values()
    doomed = [path for path in doomed if path not in foreign]
    size = sum(
        file.stat().st_size
        for path in doomed
        for file in (path, *path.rglob("*"))
        if file.is_file()
    )
    for path in doomed if not dry_run else ():
        _remove(path)
    return Collected(len(doomed), size, strangers)


def _foreign(path: Path) -> Path | None:
    """The first file in a finished entry or a signal that was not written with it: what holds
    one stays whole.
    """
    # Where its list of files is damaged, somebody should look at it.
    table = None
    try:
        if (path / STAGE_JSON).is_file():
            table = read_json(path / STAGE_JSON).get("files", {})
    except ValueError:
        return path / STAGE_JSON

    # An entry's files are listed; a signal's have names of their kind.
    for file in sorted(path.rglob("*")) if path.parent.name in ("entries", "signals") else ():
        name = str(file.relative_to(path))
        if path.parent.name == "signals":
            ours = IN_A_SIGNAL.fullmatch(left_over(file) or name) is not None
        else:
            ours = (
                table is None
                or name in (STAGE_JSON, *table)
                or (file.is_dir() and not file.is_symlink())
            )
        if not ours:
            return file
    return None


def _remove(path: Path) -> None:
    """Remove a file or a folder; an entry loses its name first, for half of one must not be
    taken for a whole.
    """
    if path.parent.name == "entries" and not path.name.startswith("."):
        part = path.with_name(f".{path.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        path = path.rename(part)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _held(store: Store, key: str) -> bool:
    if not (store.root / "locks" / key).is_file():
        return False
    with suppress(ResourceError), store.lock(key):
        return False
    return True


def _tidy(run: Path) -> None:
    """Remove what a killed process was writing in a run directory, which nobody works in: the
    store is ours alone.
    """
    for path in _torn_in(run):
        _remove(path)


def _torn_in(run: Path) -> list[Path]:
    """What is unfinished in a run directory."""
    torn = [run / name for name in (".bundle.part", ".bundle.old") if (run / name).is_dir()]
    for file in [*run.glob(".*"), *run.glob("*/.*")]:
        folder = file.parent.name
        here = file.parent == run or folder == "bundle" or SLOT_FOLDER.match(folder)
        if here and RUN_FILES.fullmatch(left_over(file)):
            torn.append(file)
    return torn


def sweep(store: Store) -> int:
    """Remove what killed processes have left in a store and in the run directories that it lists:
    unfinished files and folders, and work beside its finished entry. Returns how many there were.

    Nothing happens while somebody else works in the store: it may be theirs.
    """
    if not _torn(store):
        return 0
    with suppress(ResourceError), store.alone():
        torn = _torn(store)
        for path in torn:
            _remove(path)
        return len(torn)
    return 0


def _torn(store: Store) -> list[Path]:
    """What no live process can be writing in a store that is ours alone."""
    finished = {path.name for path in (store.root / "entries").iterdir()}
    torn = [path for path in (store.root / "work").iterdir() if path.name in finished]
    torn += _torn_marks(store)
    for room, form in NAMES.items():
        for path in (store.root / room).iterdir():
            match = form.fullmatch(left_over(path) or path.name)
            part = match is not None and match.groupdict().get("part")
            if match and not path.is_symlink() and (left_over(path) or part):
                torn.append(path)
    for path in (store.root / "signals").glob("*/.*"):
        if IN_A_SIGNAL.fullmatch(left_over(path)):
            torn.append(path)

    # A damaged list of runs is for `compress gc` to complain about.
    with suppress(ValueError):
        notes = [n for n in (store.root / "runs").iterdir() if NAMES["runs"].fullmatch(n.name)]
        runs = {place for note in notes for place in _places(store, note) if place.is_dir()}
        torn += [path for run in sorted(runs) for path in _torn_in(run)]
    return torn


def _torn_marks(store: Store) -> list[Path]:
    """What was to become the mark of the store."""
    return [path for path in store.root.glob(".*") if left_over(path) == STORE_JSON]


def empty(
    root: str, runs: str | None, *, everything: bool, dry_run: bool
) -> tuple[Collected, list[str]]:
    """Empty the store at `root`; `everything` allows that nothing finished stays. Returns what
    went, and sentences to print.

    ValueError: no store, or a run directory can't be read; ConfigError: all would go because no
    run that needs it is known; ResourceError: somebody works in the store.
    """
    below = Path("runs" if runs is None else runs)
    if runs is not None and not below.is_dir():
        raise ConfigError(
            f"there is no folder {runs}; name the one that holds the run directories, as in "
            "--runs runs"
        )

    # Nobody else works in the store meanwhile.
    store = Store(root, create=False)
    with store.alone():
        needed = known_runs(store, below)

        # Where no run needs anything, the folder of runs is not the right one.
        finished = {
            path.name for path in (store.root / "entries").iterdir() if re.fullmatch(KEY, path.name)
        }
        if finished and not finished & needed.keys and not everything:
            raise ConfigError(
                f"all {len(finished)} finished entries of {store.root} would go: of the "
                f"{len(needed.listed | needed.below)} run directories that are known none names "
                "any. "
                "Name the folder that holds them with --runs DIR, or repeat with --all to empty "
                "the store"
            )

        collected = collect(store, needed.keys, needed.digests, dry_run=dry_run)
        if not dry_run:
            for note in needed.gone:
                note.unlink()
            for run in needed.listed:
                _tidy(run)
        older = bool(read_json(store.root / STORE_JSON).get("older"))

    sentences = _about_strangers(collected.strangers)
    if older:
        sentences.append(_about_older(store, below))
    return collected, sentences


def _about_strangers(strangers: list[Path]) -> list[str]:
    if not strangers:
        return []
    more = f" and {len(strangers) - 10} more" if len(strangers) > 10 else ""
    shown = ", ".join(map(str, strangers[:10]))
    why = "because this program does not name its files so"
    return [f"left where they are, {why}: {shown}{more}"]


def _about_older(store: Store, below: Path) -> str:
    runs = f"of the runs made before, those below {below} alone are known"
    return f"{store.root} is older than its list of runs: {runs}"
