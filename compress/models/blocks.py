"""The blocks of a decoder: where they are, and what goes through them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a causal language model. ValueError when it has no list of that many
    modules.
    """
    depth = model.config.num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} blocks, where features and adapters are"
        " placed; distill without features"
    )


@contextmanager
def tapped(
    model: Any, layers: Sequence[int], projections: Sequence[int] = ()
) -> Iterator[dict[str, Tensor]]:
    """Collect, while `model` runs, outputs (R, L, H) of `layers` as "layer<i>" and Q, K, V of
    `projections` as "q<i>". ValueError when a block has no q_proj, k_proj, v_proj.
    """
    seen: dict[str, Tensor] = {}
    blocks = blocks_of(model)

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, out: Any) -> None:
            seen[name] = out[0] if isinstance(out, tuple) else out

        return hook

    # Hooks are taken away again, whatever happens meanwhile.
    with ExitStack() as hooks:
        for i in layers:
            hooks.enter_context(blocks[i].register_forward_hook(keep(f"layer{i}")))
        for i in projections:
            for name in "qkv":
                projection = getattr(getattr(blocks[i], "self_attn", None), f"{name}_proj", None)
                if projection is None:
                    raise ValueError(
                        f"{type(blocks[i]).__name__} has no self_attn.{name}_proj: set"
                        " features.relations=0"
                    )
                hooks.enter_context(projection.register_forward_hook(keep(f"{name}{i}")))
        yield seen
