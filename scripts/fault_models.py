"""Hostile models: checkpoints, tokenizers, chat templates and GGUF files that try to run something
or to take all time and memory.

A maker gets an empty folder and a whole tiny checkpoint (or GGUF), and leaves the hostile one there
under the name that it returns.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# What must never run: its mark is a file.
MARK = "EXECUTED"
Maker = Callable[[Path, Path], str]


def code_for(folder: Path) -> str:
    """Python that leaves the mark in a folder."""
    return f"open({str(folder / MARK)!r}, 'w').close()\n"


class Payload:
    """A pickle of this leaves the mark where it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.code = code_for(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (self.code,)


def copied(folder: Path, base: Path) -> Path:
    """The whole checkpoint, to be changed."""
    shutil.copytree(base, folder / "m", symlinks=False)
    for part in (folder / "m").rglob("*"):
        part.chmod(0o755 if part.is_dir() else 0o644)
    return folder / "m"


def edited(name: str, **changes: Any) -> Maker:
    """One of its JSON files with other values."""

    def make(folder: Path, base: Path) -> str:
        file = copied(folder, base) / name
        about = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(about | changes))
        return "m"

    return make


def written(name: str, data: bytes) -> Maker:
    """One of its files with other bytes."""

    def make(folder: Path, base: Path) -> str:
        file = copied(folder, base) / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        return "m"

    return make


def in_place(name: str, put: Callable[[Path], object]) -> Maker:
    """Something that is no plain file in the place of one."""

    def make(folder: Path, base: Path) -> str:
        file = copied(folder, base) / name
        file.unlink(missing_ok=True)
        put(file)
        return "m"

    return make


def pickled(name: str, *, alone: bool = False) -> Maker:
    """A pickle beside its files, or in the place of its weights."""

    def make(folder: Path, base: Path) -> str:
        model = copied(folder, base)
        if alone:
            (model / "model.safetensors").unlink()
        (model / name).write_bytes(pickle.dumps(Payload(folder)))
        return "m"

    return make


def _code(config: str, about: dict[str, Any], module: str, folder: Path, base: Path) -> str:
    """A checkpoint that brings a module and names it."""
    edited(config, **about)(folder, base)
    (folder / "m" / module).parent.mkdir(exist_ok=True)
    text = "class Evil:\n    pass\n\ndef generate(*a, **k):\n    pass\n"
    (folder / "m" / module).write_text(code_for(folder) + text)
    return "m"


def _adapter(folder: Path, base: Path) -> str:
    model = folder / "m"
    model.mkdir()
    about = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4}
    (model / "adapter_config.json").write_text(json.dumps(about))
    (model / "adapter_model.bin").write_bytes(pickle.dumps(Payload(folder)))
    return "m"


def _index(shard: str, folder: Path, base: Path) -> str:
    model = copied(folder, base)
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "m"


def _cut(name: str, share: float, folder: Path, base: Path) -> str:
    file = copied(folder, base) / name
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    return "m"


def _pattern(pattern: str, folder: Path, base: Path) -> str:
    file = copied(folder, base) / "tokenizer.json"
    told = json.loads(file.read_text())
    regex = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [regex, told["pre_tokenizer"]]}
    file.write_text(json.dumps(told))
    return "m"


DEEP = b"[" * 100_000
CHECKPOINTS: dict[str, Maker] = {
    "a pickle of weights": pickled("pytorch_model.bin", alone=True),
    "a pickle called safetensors": pickled("model.safetensors"),
    "a pickle of training state": pickled("training_args.bin"),
    "auto_map of a model": partial(
        _code,
        "config.json",
        {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}},
        "evil.py",
    ),
    "auto_map of an unknown type": partial(
        _code,
        "config.json",
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
        "evil.py",
    ),
    "auto_map of a tokenizer": partial(
        _code,
        "tokenizer_config.json",
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        "evil.py",
    ),
    "custom_generate": partial(_code, "generation_config.json", {}, "custom_generate/generate.py"),
    "an adapter's pickle": _adapter,
    "a kernel of the hub": edited("config.json", attn_implementation="owner/kernel"),
    "a hidden kernel of the hub": edited("config.json", _attn_implementation="owner/kernel"),
    "experts of a kernel": edited("config.json", experts_implementation="owner/kernel"),
    "a type that is code": edited("config.json", dtype="__import__('os')", torch_dtype="ops"),
    "architectures that are code": edited("config.json", architectures=["os.system"]),
    "a model type that is a path": edited("config.json", model_type="../../evil"),
    "an unknown quantization": edited("config.json", quantization_config={"quant_method": "evil"}),
    "weights cut short": partial(_cut, "model.safetensors", 0.6),
    "a header cut short": partial(_cut, "model.safetensors", 0.001),
    "a header of 2^60 bytes": written("model.safetensors", struct.pack("<Q", 1 << 60) + b"{}"),
    "a deep header": written("model.safetensors", struct.pack("<Q", len(DEEP)) + DEEP),
    "a shard above": partial(_index, "../evil.safetensors"),
    "a shard anywhere": partial(_index, "/etc/passwd"),
    "a shard without end": partial(_index, "/dev/zero"),
    "weights without end": in_place("model.safetensors", lambda f: f.symlink_to("/dev/zero")),
    "weights that are a pipe": in_place("model.safetensors", os.mkfifo),
    "a config that is a pipe": in_place("config.json", os.mkfifo),
    "a config that is itself": in_place("config.json", lambda f: f.symlink_to(f)),
    "a deep config": written("config.json", b'{"a":' * 50_000),
    "a config that is a list": written("config.json", b"[]"),
    "a thousand million layers": edited("config.json", num_hidden_layers=10**9),
    "a width of 10^30": edited("config.json", hidden_size=10**30),
    "no heads": edited("config.json", num_attention_heads=0),
    "a vocabulary of 10^12": edited("config.json", vocab_size=10**12),
    "a million beams": edited("generation_config.json", num_beams=10**6),
    "an epsilon that is none": edited("config.json", rms_norm_eps=float("nan")),
}  # fmt: skip
TOKENIZERS: dict[str, Maker] = {
    "a pattern that backtracks": partial(_pattern, "(a+)+$"),
    "another pattern that backtracks": partial(_pattern, r"(\w+\s?)+$"),
    "a deep tokenizer": written("tokenizer.json", b'{"a":' * 50_000),
    "a tokenizer cut short": partial(_cut, "tokenizer.json", 0.7),
    "a tokenizer that is a pipe": in_place("tokenizer.json", os.mkfifo),
    "a tokenizer that is a pickle": written("tokenizer.json", pickle.dumps({"a": 1})),
    "a normalizer that multiplies": edited(
        "tokenizer.json",
        normalizer={"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 100_000},
    ),
    "a class that is code": edited("tokenizer_config.json", tokenizer_class="os.system"),
    "a file of the machine": edited("tokenizer_config.json", tokenizer_file="/etc/passwd"),
    "half a character": written("tokenizer_config.json", b'{"bos_token": "\\ud800"}'),
}


def template(text: str) -> Maker:
    """A chat template."""

    def make(folder: Path, base: Path) -> str:
        model = copied(folder, base)
        (model / "chat_template.jinja").write_text(text.replace("MARK", str(folder / MARK)))
        return "m"

    return make


TEMPLATES: dict[str, Maker] = {
    "a class": template("{{ messages.__class__.__mro__[1].__subclasses__() }}"),
    "globals of cycler": template(
        "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}"
    ),
    "globals of lipsum": template(
        "{{ lipsum.__globals__['os'].popen('touch MARK').read() }}"
    ),
    "attr of a filter": template("{{ messages|attr('__class__')|attr('__base__') }}"),
    "format of a class": template("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}"),
    "a function of ours": template(
        "{{ raise_exception.__globals__['__builtins__']['open']('MARK', 'w') }}"
    ),
    "loops without end": template(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}"
    ),
    "a thousand million letters": template("{{ 'a' * 1000000000 }}"),
    "a number without end": template("{{ 10 ** (messages | length * 1000000000) }}"),
    "a file of the machine": template("{% include '/etc/passwd' %}"),
    "itself": template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    "no template": template("{% for m in messages %}"),
    "one that refuses": template("{{ raise_exception('no') }}"),
}  # fmt: skip


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def _header(tensors: int, keys: int, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def gguf_bytes(data: bytes) -> Maker:
    """A file of these bytes."""

    def make(folder: Path, base: Path) -> str:
        (folder / "m.gguf").write_bytes(data)
        return "m.gguf"

    return make


def _gguf_cut(share: float, folder: Path, base: Path) -> str:
    data = base.read_bytes()
    (folder / "m.gguf").write_bytes(data[: int(len(data) * share)])
    return "m.gguf"


def _gguf_swapped(old: bytes, new: bytes, folder: Path, base: Path) -> str:
    """A whole file with one name in it changed for another of the same length."""
    data = base.read_bytes()
    assert len(old) == len(new) and old in data
    (folder / "m.gguf").write_bytes(data.replace(old, new, 1))
    return "m.gguf"


GGUFS: dict[str, Maker] = {
    "2^60 tensors": gguf_bytes(_header(1 << 60, 0)),
    "2^60 keys": gguf_bytes(_header(0, 1 << 60)),
    "an array of 2^60": gguf_bytes(
        _header(0, 1, _text("general.list") + struct.pack("<IIQ", 9, 4, 1 << 60))
    ),
    "arrays of arrays": gguf_bytes(
        _header(0, 1, _text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 1000)
    ),
    "a name of 2^62 bytes": gguf_bytes(_header(0, 1, struct.pack("<Q", 1 << 62))),
    "99 dimensions": gguf_bytes(_header(1, 0, _text("t") + struct.pack("<I", 99))),
    "a pickle called gguf": gguf_bytes(pickle.dumps({"a": 1}) * 9),
    "a file cut short": partial(_gguf_cut, 0.7),
    "a header cut short in a gguf": partial(_gguf_cut, 0.01),
    "another architecture": partial(
        _gguf_swapped, b"general.architecture", b"general.architectur3"
    ),
    "no tokens": partial(_gguf_swapped, b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_"),
    "nothing": gguf_bytes(b""),
}
