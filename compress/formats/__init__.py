"""Every file that can ship beside the Hugging Face directory: what it holds, what runs it, which
module writes it and reads it back.

`export.files` names them as FORMAT:TYPE, or FORMAT where there is one type. A format is an entry of
FORMATS and a module with three names, imported when it is used, since reading the configuration
comes here:

    write(checkpoint, out, type)    and rows (R, L) of token ids and where to tell progress, where
                                    the type is calibrated
    reload(file, threads)           -> a `Reloaded` of score/parity.py
    check_architecture(config)      ValueError when an architecture, as a transformers config, has
                                    no place in it
    check_teacher(path)             optional: ValueError when a teacher's tokenizer or tensors have
                                    none
"""

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import ConfigError, nearest
from compress.quant.settings import GridName


class Type(NamedTuple):
    """What one type of a format holds."""

    bits_per_weight: float  # on disk, at most
    grids: tuple[str, ...]  # of quantized checkpoints
    rounds: bool = True  # it takes unquantized weights too
    # its runtime computes with these weights in floats, without rounding activations to integers
    exact: bool = False
    calibrated: bool = False  # training text decides how its runtime computes


@dataclass(frozen=True)
class Format:
    """One kind of file."""

    file: str  # its name in the bundle, as `place` fills it; without a suffix it is a directory
    # what scores it: "llama.cpp", or "torch" for a directory that transformers opens, "onnxruntime"
    runtime: str
    about: str  # for whoever receives it
    packages: dict[str, str]  # module -> what pip installs
    source: str  # our module
    types: dict[str, Type]
    optional: tuple[str, ...] = ()  # packages that decide bytes where they are installed

    def place(self, type: str) -> str:
        """The name of a type's file or directory in the bundle."""
        return self.file.format(type=type, dash="-" if type else "")

    @property
    def module(self) -> Any:
        """`source`, imported. ConfigError naming the pip line when a package that writes or reads
        the format is missing.
        """
        for package, requirement in self.packages.items():
            if importlib.util.find_spec(package) is None:
                raise ConfigError(
                    f"a file of export.files needs {package}, which is not installed: pip install"
                    f" '{requirement}'"
                )
        return importlib.import_module(self.source)


# Bits a weight.
_ROUNDED = {
    "Q4_0": 4.5,
    "IQ4_NL": 4.5,
    "Q4_1": 5.0,
    "Q8_0": 8.5,
    "Q5_0": 5.5,
    "Q4_K": 4.5,
    "Q6_K": 6.5625,
    "MXFP4": 4.25,
    "NVFP4": 4.5,
}
_INTEGERS = ("q4_0", "q8_0", *(grid.value for grid in GridName if grid.startswith("int")))
FORMATS: dict[str, Format] = {
    "gguf": Format(
        "model-{type}.gguf",
        "llama.cpp",
        "one file for llama.cpp and what is built on it: `llama-server -m {file}`",
        {"gguf": "gguf>=0.19,<0.20", "xllamacpp": "xllamacpp>=2026.10"},
        "compress.formats.gguf",
        {"F16": Type(16, (), exact=True)}
        | {name: Type(bits, (name.lower(),)) for name, bits in _ROUNDED.items()}
        | {"MIXED": Type(8.5, ("mixed",), rounds=False)},
        ("auto-round",),
    ),
    "compressed_tensors": Format(
        "compressed_tensors",
        "torch",
        'a packed directory for transformers, `AutoModelForCausalLM.from_pretrained("{file}")` with'
        " the package compressed-tensors, in the layout that vLLM documents (not run in vLLM here)",
        {"compressed_tensors": "compressed-tensors>=0.20,<0.21"},
        "compress.formats.compressed_tensors",
        {"": Type(9.0, _INTEGERS, rounds=False, exact=True)},
    ),
    "onnx": Format(
        "onnx{dash}{type}",
        "onnxruntime",
        'a directory for ONNX Runtime GenAI: `onnxruntime_genai.Model("{file}")`',
        {
            "onnx": "onnx>=1.23,<2",
            "onnxruntime": "onnxruntime>=1.31,<2",
            "onnxruntime_genai": "onnxruntime-genai>=0.18,<0.19",
        },
        "compress.formats.onnx",
        {
            "": Type(32.0, ("q4_0", "q8_0"), exact=True),
            "A8": Type(4.5, ("q4_0",), rounds=False, calibrated=True),
        },
    ),
}
# All that export.files may hold.
NAMES = [
    f"{kind}:{type}" if type else kind for kind, format in FORMATS.items() for type in format.types
]


def parse(name: str) -> tuple[Format, str, Type]:
    """What an entry of `export.files` means: format, name of the type, type. ConfigError naming
    the nearest that exists.
    """
    if name not in NAMES:
        raise ConfigError(f"export.files={name!r} is no format; {nearest(name, NAMES)}")
    kind, _, type = name.partition(":")
    return FORMATS[kind], type, FORMATS[kind].types[type]


def check_config(config: Any, kind: str, instead: str, **allowed: tuple[Any, ...]) -> None:
    """ValueError when a transformers config says what a file of `kind` can't, naming what is
    allowed and what to do `instead`.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for key, values in allowed.items():
        got = rope.get(key, "default") if key == "rope_type" else getattr(config, key, None)
        if got not in values:
            raise ValueError(
                f"{key} {got!r} can't be written as {kind}; allowed: {', '.join(map(str, values))};"
                f" {instead}"
            )


def slot_of(name: str) -> tuple[str, str]:
    """Slot and technique of its record: gguf_q4_0, export_gguf for gguf:Q4_0."""
    return name.lower().replace(":", "_"), f"export_{name.partition(':')[0]}"


def check_grid(name: str, what: str, grid: str | None) -> None:
    """ConfigError when weights on `grid` (None: on no grid) can't be written as they are; `what`
    they are weights of.
    """
    type = parse(name)[2]
    if grid is None and not type.rounds:
        raise ConfigError(
            f"export.files={name} writes codes, and {what} has none; ship a ptq or qat slot on"
            f" {', '.join(type.grids)}"
        )

    # Codes on a grid are written as they are, never rounded again.
    if grid is not None and grid not in type.grids:
        raise ConfigError(
            f"export.files={name} would re-round {what}, which is on the grid {grid}, and holds"
            f" only {', '.join(type.grids) or 'no grid'}; export it as"
            f" {', '.join(other for other in NAMES if grid in parse(other)[2].grids)}"
        )


def codes_of(checkpoint: Path, name: str) -> dict[str, Any]:
    """Every `Quantized` of a checkpoint that is to be written as `name`, {} where it has none.
    ConfigError as `check_grid`.
    """
    from compress.quant.codes import is_quantized, load_quantized

    quantized = load_quantized(checkpoint) if is_quantized(checkpoint) else {}
    grids = sorted({q.grid for q in quantized.values()})
    grid = grids[0] if grids else None
    if grids and (len(grids) > 1 or name == "gguf:MIXED"):
        grid = "mixed"
    check_grid(name, str(checkpoint), grid)
    return quantized
