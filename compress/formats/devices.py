"""Where a runtime computes what is scored and timed: on the CPU, or on the first GPU
(`eval.device`).

torch scores on a GPU wherever there is one, and is timed where it is asked to be. llama.cpp puts
all layers of a file on a GPU if it was built for one: the xllamacpp of the package index is not,
its own index has wheels for CUDA, ROCm and Vulkan. Directories for ONNX Runtime GenAI are written
for the CPU.
"""

from __future__ import annotations

from enum import StrEnum

from compress.errors import ConfigError

Device = StrEnum("Device", ["cpu", "gpu"])
ALL_LAYERS = 999  # of a file: more than any has


def check_device(runtime: str, device: str) -> None:
    """ConfigError, naming what lacks, where a runtime can't compute on a device here."""
    if device == Device.cpu:
        return
    lacks = {
        "torch": _torch_lacks,
        "llama.cpp": _llama_lacks,
        "onnxruntime": lambda: "an onnx directory is written for the CPU",
    }[runtime]()
    if lacks:
        raise ConfigError(
            f"eval.device={device} for {runtime}: {lacks}; set eval.device=cpu, or measure on a"
            " machine that has one"
        )


def gpu_layers(device: str) -> int:
    """Layers that llama.cpp puts on the GPU. ConfigError as `check_device`: it would quietly put
    them on the CPU.
    """
    check_device("llama.cpp", device)
    return ALL_LAYERS if device == Device.gpu else 0


def _torch_lacks() -> str:
    """What torch needs for a GPU; empty where nothing lacks."""
    import torch

    return "" if torch.cuda.is_available() else "torch sees no GPU"


def _llama_lacks() -> str:
    """What llama.cpp needs for a GPU; empty where nothing lacks."""
    import xllamacpp

    names = [entry["type"].name for entry in xllamacpp.get_device_info()]
    if any("GPU" in name for name in names):
        return ""
    return "the installed xllamacpp sees no GPU (its own package index has wheels that do)"
