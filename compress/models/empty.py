"""A model without its weights, and weights read into it piece by piece: under fsdp2 each process
reads the rows that it has of every matrix, and none ever holds a whole model.

accelerate's `init_empty_weights` builds the modules, with parameters that have a shape and no
memory (torch's device meta) and tables such as rotary frequencies as they are. `fully_shard` cuts
them, each process makes room for its rows, and `read` takes those out of the safetensors files,
which are mapped: what is not asked for is not read.

For some families transformers renames, splits or stacks tensors as it loads. Where the files don't
hold exactly the parameters, under their names, the model is opened whole instead (`empty_model`
gives None). Left out: a table by family of what it does, which would have to follow transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from compress.models.loading import names_in_files, tensor_table
from compress.models.model_config import config_object, quiet, read_config

WHOLE = slice(None)


class WeightPlace(NamedTuple):
    """Where the values of a parameter are."""

    file: Path
    name: str


def empty_model(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a checkpoint that `check` has found whole, in eval mode, its parameters without
    memory and with a `place` each; None where the files don't hold them one by one.
    """
    config = config_object(read_config(path), path / "config.json")
    sdpa = getattr(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], "_supports_sdpa", False)
    attention = "sdpa" if sdpa else "eager"
    with quiet(), torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention
        )
    model.tie_weights()

    # Every parameter under a name of its own in the files, and nothing besides.
    table = tensor_table(path)
    names = names_in_files(model, table)
    if names is None:
        return None
    for name, parameter in model.named_parameters():
        parameter.place = WeightPlace(table[names[name]][0], names[name])
    return model.eval()


def is_empty(model: nn.Module) -> bool:
    """Whether its parameters have no memory yet."""
    return any(p.is_meta for p in model.parameters())


def read(place: WeightPlace, rows: slice = WHOLE) -> Tensor:
    """These rows of a tensor in a checkpoint, in the file's type."""
    with safe_open(place.file, framework="pt") as file:
        values: Tensor = file.get_slice(place.name)[rows]
    return values


def places_of(model: nn.Module) -> dict[str, WeightPlace]:
    """The place of each parameter of an empty model; {} of any other."""
    return {name: p.place for name, p in model.named_parameters() if hasattr(p, "place")}


@torch.no_grad()
def fill_head(model: Any, device: torch.device) -> None:
    """Read the whole output weight, and its bias, of an empty model; a tied embedding with it."""
    output = model.get_output_embeddings()
    places = {id(p): p.place for p in output.parameters()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in places:
                values = read(places[id(p)]).to(device, p.dtype)
                module._parameters[name] = nn.Parameter(values, p.requires_grad)
    model.tie_weights()
