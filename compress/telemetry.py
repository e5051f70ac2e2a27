"""Nothing here reports that it is used: the switch of every dependency that would, in one place.

`off` runs when the package is imported, so before any of them is, and in every process that is
started from here, which inherits the environment. It does not stop what was asked for: a hub that
a recipe names, a tracker that it chooses.
"""

import os

# Package -> the variables that switch its reports off; an empty entry is a package that was looked
# through and has none. tests/test_telemetry.py holds this to pyproject.toml and to their sources.
SWITCHES: dict[str, dict[str, str]] = {
    "huggingface_hub": {"HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"},
    "datasets": {"HF_UPDATE_DOWNLOAD_COUNTS": "0"},
    "onnxruntime": {"ORT_DISABLE_TELEMETRY": "1"},
    "onnxruntime-genai": {"ORT_DISABLE_TELEMETRY": "1"},
    "wandb": {"WANDB_ERROR_REPORTING": "false"},
    # They report through huggingface_hub, if at all.
    "transformers": {},
    "accelerate": {},
    "peft": {},
    "lm-eval": {},
    "tokenizers": {},
    "safetensors": {},
    "auto-round": {},
    # No report of any kind.
    "torch": {},
    "torch-pruning": {},
    "compressed-tensors": {},
    "bitsandbytes": {},
    "hydra-core": {},
    "gguf": {},
    "xllamacpp": {},
    "onnx": {},
    "numpy": {},
    "aiohttp": {},
    "prometheus-client": {},
    "uvloop": {},
    "scipy": {},
    "pyarrow": {},
    "more-itertools": {},
    "fsspec": {},
    "rich": {},
    "matplotlib": {},
    "jinja2": {},
    "psutil": {},
    "regex": {},
    "tqdm": {},
    "pyyaml": {},
    "cryptography": {},
    "cyclonedx-python-lib": {},
    "jsonschema": {},
    # Of whoever serves a bundle with it.
    "vllm": {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
}


def off() -> None:
    """Set every switch, whatever the environment says."""
    for variables in SWITCHES.values():
        os.environ.update(variables)
