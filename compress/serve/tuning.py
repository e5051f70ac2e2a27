"""How llama.cpp is run on one machine: settings, and the file that `compress tune` writes of them.

A file holds an entry for each pair of a model and a machine; `compress serve --tuning FILE` takes
the one of its own. A bundle is sealed by its sums, so the file lies beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from compress import machine
from compress.doors import FLAG, NUMBER, TABLE, TEXT, Kind, check_object, read_json, whole
from compress.errors import ConfigError
from compress.formats.llamacpp import SERVED_BATCH
from compress.store import write_whole
from compress.threads import available_threads

SCHEMA = 1
MOST_THREADS, MOST_TOKENS = 1024, 65_536

Attention = StrEnum("Attention", ["auto", "on", "off"])
CacheType = StrEnum("CacheType", ["f16", "q8_0", "f32"])


@dataclass(frozen=True)
class Tuning:
    """What may be chosen by time; without arguments what llama.cpp itself does.

    `threads`: None for the CPUs of this process; `poll`: how eagerly a thread that waits looks for
    work, 0 (sleeps) to 100; `repack`: weights laid out anew for this CPU's kernels, where it has
    some; `attention`: fused or not; `cache_type`: of keys and values; `batch`: tokens of prompts
    computed together, after which llama.cpp looks who has hung up.
    """

    threads: int | None = None
    poll: int = 50
    repack: bool = True
    attention: Attention = Attention.auto
    cache_type: CacheType = CacheType.f16
    batch: int = SERVED_BATCH

    def words(self) -> str:
        """What is not as llama.cpp does it, for a person."""
        changed = [
            f"{field.name} {getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ", ".join(changed) or "llama.cpp's own settings"


def _one_of(kind: type[StrEnum]) -> Kind:
    return Kind(f"one of {', '.join(kind)}", lambda value: value in list(kind))


def _or_none(kind: Kind) -> Kind:
    return Kind(f"null or {kind.means}", lambda value: value is None or kind.holds(value))


KINDS = {
    "threads": _or_none(whole(1, MOST_THREADS)),
    "poll": whole(0, 100),
    "repack": FLAG,
    "attention": _one_of(Attention),
    "cache_type": _one_of(CacheType),
    "batch": whole(1, MOST_TOKENS),
}
TABLES = Kind("a list", lambda value: isinstance(value, list))
# Of an entry: for which model (its digest) on which machine; what was found.
ENTRY_KINDS = {
    "model": TEXT,
    "file": TEXT,
    "machine": TABLE,
    "settings": TABLE,
    "verdict": TEXT,
    "faster": TABLES,  # times as fast as llama.cpp's own settings, with its 95% interval
    "answers": TABLE,
    "clients": whole(1, 1024),
    "tokens": whole(1, MOST_TOKENS),
    "others_share": _or_none(NUMBER),  # of the CPUs' time, used by other processes meanwhile
    "tried": TABLES,
}


def from_plain(plain: Mapping[str, Any], where: object) -> Tuning:
    """Settings as `asdict` wrote them. ValueError naming `where` and the key that is wrong."""
    checked = check_object(dict(plain), KINDS, where)
    return Tuning(
        threads=checked["threads"],
        poll=checked["poll"],
        repack=checked["repack"],
        attention=Attention(checked["attention"]),
        cache_type=CacheType(checked["cache_type"]),
        batch=checked["batch"],
    )


def apply(tuning: Mapping[str, Any], params: Any) -> None:
    """Into llama.cpp's parameters (`xllamacpp.CommonParams`); `threads` is the door's to say."""
    import gguf
    import xllamacpp

    kinds = xllamacpp.llama_flash_attn_type
    params.flash_attn_type = {
        Attention.auto: kinds.LLAMA_FLASH_ATTN_TYPE_AUTO,
        Attention.on: kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED,
        Attention.off: kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED,
    }[Attention(tuning["attention"])]
    cache = gguf.GGMLQuantizationType[tuning["cache_type"].upper()]
    params.cache_type_k = params.cache_type_v = int(cache)
    params.no_extra_bufts = not tuning["repack"]
    params.cpuparams.poll = params.cpuparams_batch.poll = tuning["poll"]


def machine_here() -> dict[str, Any]:
    """What makes times on another machine other times: processor, CPUs of this process, version of
    llama.cpp.
    """
    flags = hashlib.sha256(" ".join(machine.cpu_flags()).encode()).hexdigest()[:12]
    return {
        "cpu": machine.cpu_name(),
        "cpu_flags_sha256": flags,
        "threads": available_threads(),
        "llama_cpp": machine.versions().get("xllamacpp"),
    }


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of a file. ValueError: it is malformed."""
    content = read_json(path)
    entries = content.get("entries")
    if content.get("schema") != SCHEMA or not isinstance(entries, list):
        raise ValueError(
            f"{path} has no `entries` of schema {SCHEMA}; write it again with: compress tune MODEL"
            " --out FILE"
        )
    for number, entry in enumerate(entries, 1):
        check_object(entry, ENTRY_KINDS, f"{path}, entry {number}")
        from_plain(entry["settings"], f"{path}, entry {number}, settings")
    return entries


def written(path: Path, entry: dict[str, Any]) -> bool:
    """Puts an entry into a file, in the place of the one of the same model and machine. False where
    that one stays, as the new one is withheld.
    """
    entries = read_entries(path) if path.is_file() else []
    others = [old for old in entries if not _is_of(old, entry["model"], entry["machine"])]
    if len(others) < len(entries) and entry["verdict"] == "withheld":
        return False
    content = {"schema": SCHEMA, "entries": [*others, entry]}
    write_whole(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    return True


def tuning_in(path: Path, model: str) -> Tuning:
    """The settings that a file has for the model with this digest, on this machine. ConfigError:
    none, or they were not shown to be faster. ValueError: the file is malformed.
    """
    if not path.is_file():
        raise ConfigError(f"--tuning {path} is no file; `compress tune MODEL --out FILE` writes it")
    entries, here = read_entries(path), machine_here()
    for entry in entries:
        if _is_of(entry, model, here):
            if entry["verdict"] != "faster":
                raise ConfigError(
                    f"--tuning {path}: for this model and machine the verdict is"
                    f" {entry['verdict']!r}; serve without it, or tune again while nothing else"
                    " runs"
                )
            return from_plain(entry["settings"], path)
    of_model = [entry["machine"] for entry in entries if entry["model"] == model]
    machines = "; ".join(", ".join(map(str, where.values())) for where in of_model)
    has = f"; it has: {machines}" if machines else ""
    raise ConfigError(
        f"--tuning {path}: nothing of this model on this machine"
        f" ({', '.join(map(str, here.values()))}){has}; write it here with: compress tune MODEL"
        " --out FILE"
    )


def _is_of(entry: Mapping[str, Any], model: str, where: Mapping[str, Any]) -> bool:
    return entry["model"] == model and entry["machine"] == where
