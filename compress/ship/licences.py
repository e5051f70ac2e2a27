"""Under which terms a student stays: its teacher's licence, and whether that limits what may be
done with models made of it.

A student is a derived work. What is warned of is what the licence itself says of derived models;
whether it binds somebody is for lawyers, and the terms are in the bundle where the teacher brought
them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compress.doors import parse_yaml, read_text

LANGUAGES = "general.languages"
CARD, CARD_BYTES = "README.md", 1_000_000


class Licence(NamedTuple):
    """What is known of a licence: `id` as the hub's model cards name it; `restricts` says what its
    terms ask of derived models, "" where they ask no more than to keep the notice.
    """

    id: str
    name: str
    restricts: str = ""


GEMMA = Licence(
    "gemma",
    "Gemma Terms of Use",
    "models made of Gemma, by distilling too, stay under its terms and its Prohibited Use Policy;"
    " pass both on to whoever receives them",
)
LLAMA = Licence(
    "llama",
    "Llama Community License",
    "say 'Built with Llama', begin the model's name with Llama where it was trained on what Llama"
    " wrote, and pass its Acceptable Use Policy on; above 700 million users a licence of its own is"
    " needed",
)
UNKNOWN = Licence("unknown", "unknown", "nobody said what the teacher is under; ask its publisher")
# What a licence or a teacher is called -> what it is.
KNOWN: tuple[tuple[str, Licence], ...] = (
    (r"gemma", GEMMA),
    (r"llama[ -]?2|llama2", LLAMA._replace(id="llama2", name="Llama 2 Community License")),
    (r"llama[ -]?3\.1", LLAMA._replace(id="llama3.1", name="Llama 3.1 Community License")),
    (r"llama[ -]?3\.2", LLAMA._replace(id="llama3.2", name="Llama 3.2 Community License")),
    (r"llama[ -]?3\.3", LLAMA._replace(id="llama3.3", name="Llama 3.3 Community License")),
    (r"llama[ -]?3|llama3", LLAMA._replace(id="llama3", name="Llama 3 Community License")),
    (r"apache", Licence("apache-2.0", "Apache-2.0")),
    (r"^mit$|mit licen", Licence("mit", "MIT")),
    (r"bsd-3|bsd 3", Licence("bsd-3-clause", "BSD-3-Clause")),
    (r"none needed", Licence("other", "none needed")),
)
# Of teachers whose files name no licence: whose name says it.
BY_SOURCE: tuple[tuple[str, Licence], ...] = tuple(
    (pattern, licence) for pattern, licence in KNOWN if licence.restricts
)


def own_words(checkpoint: Path, gguf: Path | None) -> dict[str, Any]:
    """{"licence", "languages"} as far as a teacher's GGUF, or the model card in its directory, says
    them.
    """
    said: dict[str, Any] = {}
    if gguf is not None and gguf.is_file():
        from compress.models.gguf_header import read_metadata

        fields = read_metadata(gguf)
        said = {"licence": fields.get("general.license"), "languages": fields.get(LANGUAGES)}
    elif (card := checkpoint / CARD).is_file() and card.stat().st_size <= CARD_BYTES:
        said = _front_matter(card)
    languages = said.get("languages")
    named = [languages] if isinstance(languages, str) else languages
    words: dict[str, Any] = {}
    if isinstance(said.get("licence"), str):
        words["licence"] = said["licence"]
    if isinstance(named, list) and named and all(isinstance(one, str) for one in named):
        words["languages"] = [str(one) for one in named]
    return words


def _front_matter(card: Path) -> dict[str, Any]:
    """Licence and languages of a model card; nothing of one that can't be read."""
    try:
        _, opening, rest = read_text(card).partition("---\n")
        fields = parse_yaml(rest.partition("\n---")[0], card) if opening else {}
    except ValueError:
        return {}
    if not isinstance(fields, dict):
        return {}
    licence = fields.get("license_name") or fields.get("license")
    return {"licence": licence, "languages": fields.get("language")}


def licence_of(teacher: Mapping[str, Any], terms: list[str]) -> Licence:
    """The licence of a teacher: of what its file says (`licence`), else of what it is called
    (`source`) and of the names of the `terms` that it brought.
    """
    said = str(teacher.get("licence") or "").strip()
    for pattern, licence in KNOWN:
        if re.search(pattern, said, re.IGNORECASE):
            return licence

    # A licence that is not known here is carried over as it is called.
    if said and said.lower() != "unknown":
        return Licence(
            "other", said, "its terms are not known here; read them before you pass it on"
        )
    called = " ".join([str(teacher.get("source", "")), *terms])
    for pattern, licence in BY_SOURCE:
        if re.search(pattern, called, re.IGNORECASE):
            return licence
    return UNKNOWN


def as_record(licence: Licence) -> dict[str, Any]:
    """What the manifest keeps."""
    sentence = licence.restricts or "keep its notice"
    return {
        "id": licence.id,
        "name": licence.name,
        "restricts": bool(licence.restricts),
        "sentence": sentence,
    }
