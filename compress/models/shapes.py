"""Shapes of tensors from the headers of safetensors files: no tensor is loaded."""

from pathlib import Path

from safetensors import safe_open

from compress.doors import tensor_places


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a safetensors file's floating-point tensors, and of what compressed-tensors
    packed. ValueError when it is damaged.
    """
    places = tensor_places(file)
    plain = {
        name: place.shape
        for name, place in places.items()
        if "F" in place.dtype and not name.endswith(".weight_scale")
    }
    # Of a packed matrix the shape is a tensor by itself, and scales are no parameters.
    packed: dict[str, tuple[int, ...]] = {}
    if shapes := [name for name in places if name.endswith(".weight_shape")]:
        with safe_open(file, "pt") as tensors:
            packed = {name: tuple(tensors.get_tensor(name).tolist()) for name in shapes}
    return packed | plain
