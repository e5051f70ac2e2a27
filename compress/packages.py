"""What may be installed beside this package, and what for: the extras of pyproject.toml.

`pip install compress-lm` alone brings the verbs that need nothing but Python: verify, doctor, list,
gc. `accept` is what a deployment team installs; `train` is everything that makes a student. A verb
that misses a package says which extra brings it (`__main__.py`), and `compress doctor` which are
here (`doctor.py`).
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

NAME = "compress-lm"
# Extra -> module that is imported -> distribution that has it.
EXTRAS: dict[str, dict[str, str]] = {
    "accept": {
        "numpy": "numpy",
        "xllamacpp": "xllamacpp",
        "gguf": "gguf",
        "more_itertools": "more-itertools",
        "regex": "regex",
        "tqdm": "tqdm",
        "yaml": "PyYAML",
    },
    "train": {
        "torch": "torch",
        "transformers": "transformers",
        "tokenizers": "tokenizers",
        "safetensors": "safetensors",
        "accelerate": "accelerate",
        "datasets": "datasets",
        "pyarrow": "pyarrow",
        "peft": "peft",
        "torch_pruning": "torch-pruning",
        "lm_eval": "lm-eval",
        "hydra": "hydra-core",
        "omegaconf": "omegaconf",
        "compressed_tensors": "compressed-tensors",
        "fsspec": "fsspec",
        "rich": "rich",
        "matplotlib": "matplotlib",
        "jinja2": "Jinja2",
        "psutil": "psutil",
        "scipy": "scipy",
    },
    "onnx": {
        "onnx": "onnx",
        "onnxruntime": "onnxruntime",
        "onnxruntime_genai": "onnxruntime-genai",
    },
    "qlora": {"bitsandbytes": "bitsandbytes"},
    "wandb": {"wandb": "wandb"},
    "families": {"auto_round": "auto-round"},
    "serve": {"aiohttp": "aiohttp", "prometheus_client": "prometheus-client", "uvloop": "uvloop"},
    "sign": {"cryptography": "cryptography"},
    "bom": {"cyclonedx": "cyclonedx-python-lib"},
}


def extra_of(module: str) -> str | None:
    """The extra that brings a module, by its first name; None where no extra of ours does."""
    root = module.partition(".")[0]
    return next((extra for extra, modules in EXTRAS.items() if root in modules), None)


def install_line(extra: str) -> str:
    """What to type."""
    return f"pip install '{NAME}[{extra}]'"


def installed(modules: Mapping[str, str]) -> dict[str, str | None]:
    """Distribution -> its version, None where it is not installed, of an extra's modules."""
    versions: dict[str, str | None] = {}
    for distribution in modules.values():
        try:
            versions[distribution] = version(distribution)
        except PackageNotFoundError:
            versions[distribution] = None
    return versions
