"""What a directory for ONNX Runtime may hold, read before ONNX Runtime reads it.

genai_config.json can name a shared library to load, other providers, other files; a graph can name
operators of a library and tensors anywhere on the disk. `check_folder` takes neither on trust: both
files may say only what formats/onnx.py writes. The graph is walked as plain protobuf, so nothing is
loaded or computed for the check.
"""

import importlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compress.doors import FLAG, TABLE, Kind, check_object, optional, parse_json, read_text, whole

# formats/onnx.py's ARCHITECTURES; of other types GenAI looks for other files.
MODEL, CONFIG = "model.onnx", "genai_config.json"
MODEL_TYPES = ("llama", "mistral", "qwen2")
MODEL_BYTES = 64_000_000  # of model.onnx without its large tensors; ours have some hundred thousand
SIZE = whole(1, 2**31 - 1)
TOKEN_ID = whole(0, 2**31 - 1)
NAME = Kind(
    "a name of letters, digits, '_', '.' and '%d'",
    lambda value: isinstance(value, str) and bool(re.fullmatch(r"[\w.]+(%d[\w.]*)?", value)),
)
ENDS = Kind(
    "a token id or a list of them",
    lambda value: (
        all(map(TOKEN_ID.holds, value)) and bool(value)
        if isinstance(value, list)
        else TOKEN_ID.holds(value)
    ),
)
# What genai_config.json may say: table -> key -> value.
TABLES: dict[str, dict[str, Kind]] = {
    "": {"model": TABLE, "search": TABLE},
    "search": {"do_sample": FLAG, "max_length": SIZE, "past_present_share_buffer": FLAG},
    "model": {
        "type": Kind(f"one of {', '.join(MODEL_TYPES)}", lambda value: value in MODEL_TYPES),
        "context_length": SIZE,
        "vocab_size": whole(1, 2**22),  # the largest known has 262,144; GenAI allocates by it
        "decoder": TABLE,
        "bos_token_id": optional(TOKEN_ID),
        "eos_token_id": ENDS,
        "pad_token_id": TOKEN_ID,
    },
    "model.decoder": {
        "filename": Kind(MODEL, lambda value: value == MODEL),
        "session_options": TABLE,
        "inputs": TABLE,
        "outputs": TABLE,
        **dict.fromkeys(
            (
                "head_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
            ),
            SIZE,
        ),
    },
    "model.decoder.session_options": {},
    "model.decoder.inputs": dict.fromkeys(
        ("input_ids", "attention_mask", "past_key_names", "past_value_names"), NAME
    ),
    "model.decoder.outputs": dict.fromkeys(
        ("logits", "present_key_names", "present_value_names"), NAME
    ),
}
# Of formats/onnx.py's graphs.
OPERATORS = (
    "Add",
    "Cast",
    "Cos",
    "Gather",
    "GatherBlockQuantized",
    "GroupQueryAttention",
    "MatMul",
    "MatMulNBits",
    "Mul",
    "Range",
    "ReduceSum",
    "Reshape",
    "Shape",
    "Sigmoid",
    "SimplifiedLayerNormalization",
    "Sin",
    "Sub",
    "Transpose",
    "Unsqueeze",
)
DOMAINS = ("", "com.microsoft")
# Field numbers of onnx.proto3 that such a graph has: message -> number -> (name, message below
# or "").
FIELDS: dict[str, dict[int, tuple[str, str]]] = {
    "model": {
        1: ("ir_version", ""),
        2: ("producer_name", ""),
        3: ("producer_version", ""),
        7: ("graph", "graph"),
        8: ("opset_import", "opset"),
    },
    "opset": {1: ("domain", ""), 2: ("version", "")},
    "graph": {
        1: ("node", "node"),
        2: ("name", ""),
        5: ("initializer", "tensor"),
        11: ("input", ""),
        12: ("output", ""),
    },
    "node": {
        1: ("input", ""),
        2: ("output", ""),
        3: ("name", ""),
        4: ("op_type", ""),
        5: ("attribute", "attribute"),
        7: ("domain", ""),
    },
    "attribute": {
        1: ("name", ""),
        2: ("f", ""),
        3: ("i", ""),
        7: ("floats", ""),
        8: ("ints", ""),
        20: ("type", ""),
    },
    "tensor": {
        1: ("dims", ""),
        2: ("data_type", ""),
        8: ("name", ""),
        9: ("raw_data", ""),
        13: ("external_data", "entry"),
        14: ("data_location", ""),
    },
    "entry": {1: ("key", ""), 2: ("value", "")},
}


def genai_config(folder: Path) -> dict[str, Any]:
    """genai_config.json, which holds what formats/onnx.py writes and nothing else. ValueError
    naming the file and the key.
    """
    file = folder / CONFIG
    text = read_text(file)
    config = parse_json(text, file)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """GenAI reads every one of two equal keys, Python the last."""
        if len(table := dict(pairs)) < len(pairs):
            names = ", ".join(list(table)[:5])
            raise ValueError(f"{file}: of {names} one is there twice; export the model again")
        return table

    # One of each key, none but these, each of its kind.
    json.loads(text, object_pairs_hook=once)
    for name, kinds in TABLES.items():
        table = config
        for key in filter(None, name.split(".")):
            table = table[key]
        check_object(table, kinds, f"{file}{name and f', {name}'}")

    # Ids within the vocabulary.
    model = config["model"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = model.get(key, 0)
        if max(ids if isinstance(ids, list) else [ids]) >= model["vocab_size"]:
            raise ValueError(
                f"{file}, model: {key} is {ids}, and vocab_size {model['vocab_size']:,}; export the"
                " model again"
            )
    return dict(config)


def _fields(
    data: memoryview, message: str, where: str
) -> Iterator[tuple[str, str, int | memoryview]]:
    """(name, message below or "", value) of a protobuf message's fields, each one that `FIELDS`
    knows. ValueError for any other.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError(f"{where} is no ONNX model, or cut short; export it again")

            # Seven bits a byte, the lowest first; the eighth says that more follow.
            byte = data[at]
            value |= (byte & 127) << shift
            at += 1
            shift += 7
            if byte < 128:
                return value

    # A tag holds the number of a field and how its value is written.
    while at < len(data):
        tag = varint()
        number = tag >> 3
        wire = tag & 7
        if number not in FIELDS[message] or wire not in (0, 1, 2, 5):
            names = ", ".join(name for name, _ in FIELDS[message].values())
            raise ValueError(
                f"{where}: {message} has field {number}, which compress never writes (only"
                f" {names}); export the model with compress"
            )

        # Wire 0 is a number, 2 begins with its length, 1 and 5 are of 8 and 4 bytes.
        name, below = FIELDS[message][number]
        if wire == 0:
            yield name, below, varint()
            continue
        length = varint() if wire == 2 else 8 if wire == 1 else 4
        if at + length > len(data):
            raise ValueError(f"{where} is no ONNX model, or cut short; export it again")
        at += length
        yield name, below, data[at - length : at]


def _check_message(data: memoryview, message: str, folder: Path) -> None:
    """Refuses what a graph of formats/onnx.py does not hold, in one message and all below it.
    ValueError.
    """
    where = str(folder / MODEL)
    texts: dict[str, str] = {}
    for name, below, value in _fields(data, message, where):
        if below:
            if not isinstance(value, memoryview):
                raise ValueError(
                    f"{where} is no ONNX model: {message}.{name} is a number; export it again"
                )
            _check_message(value, below, folder)
        elif name in ("op_type", "domain", "key", "value"):
            # A number where a text belongs is refused as a text.
            is_text = isinstance(value, memoryview)
            texts[name] = bytes(value).decode(errors="replace") if is_text else str(value)
            _check_text(message, name, texts, folder)


def _check_text(message: str, name: str, texts: Mapping[str, str], folder: Path) -> None:
    """Refuses an operator of others, a domain of others and tensors outside the
    directory. ValueError.
    """
    where = folder / MODEL
    text = texts[name]

    # What would run.
    if name == "op_type" and text not in OPERATORS:
        raise ValueError(
            f"{where} has the operator {text!r}; read are graphs of compress's own export, with"
            f" {', '.join(OPERATORS)}"
        )
    if name == "domain" and text not in DOMAINS:
        raise ValueError(
            f"{where} has operators of the domain {text!r}, which needs a library of others;"
            " allowed: ONNX's and com.microsoft"
        )

    # What would be read.
    if name == "key" and text not in ("location", "offset", "length"):
        raise ValueError(
            f"{where}: a tensor is kept outside with the key {text!r}; allowed: location, offset,"
            " length"
        )
    if message != "entry" or name != "value" or text.isdecimal():
        return
    if not re.fullmatch(r"\w[\w.-]*", text) or not (folder / text).is_file():
        raise ValueError(
            f"{where} keeps tensors in {text!r}, which is no file of this directory; copy the whole"
            " directory again"
        )


def check_folder(folder: Path) -> dict[str, Any]:
    """Returns genai_config.json of a directory that formats/onnx.py could have written. ValueError,
    before any other code reads it.
    """
    config = genai_config(folder)
    file = folder / MODEL
    if not file.is_file():
        raise ValueError(f"{file} does not exist; copy the whole directory again")

    # As a whole it is small: it can be read, and walked before it is parsed by others.
    if (length := file.stat().st_size) > MODEL_BYTES:
        raise ValueError(
            f"{file} has {length:,} bytes, at most {MODEL_BYTES:,} are read: large tensors belong"
            " beside it; export it again"
        )
    _check_message(memoryview(file.read_bytes()), "model", folder)
    return config


def wheel(name: str) -> Any:
    """Import onnx, onnxruntime or onnxruntime_genai. ValueError with the install line when it is
    missing.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"ONNX files need the package {error.name}, which is not installed: pip install"
            " 'compress-lm[onnx]'"
        ) from error
