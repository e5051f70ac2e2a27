"""What goes through the blocks of a model while it runs, taken out by hooks: states behind blocks,
and queries, keys and values, whichever projections make them.

Legend: R rows (sequences), L positions, H hidden, K outputs of a projection that are meant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from compress.models.blocks import ROWS, blocks_of, qkv_of, row_of
from compress.models.checkpoint import head_dim


@contextmanager
def tapped(
    model: Any, layers: Sequence[int], projections: Sequence[int] = ()
) -> Iterator[dict[str, Tensor]]:
    """Collect, while `model` runs, outputs (R, L, H) of `layers` as "layer<i>" and Q, K, V of
    `projections` as "q<i>". ValueError when a block has no projections of q, k, v.
    """
    seen: dict[str, Tensor] = {}
    blocks = blocks_of(model)
    row = row_of(model) or ROWS[0]

    def keep_states(name: str, module: nn.Module, arguments: Any, out: Any) -> None:
        seen[name] = out[0] if isinstance(out, tuple) else out

    def keep_rows(name: str, rows_K: Tensor, module: nn.Module, arguments: Any, out: Any) -> None:
        seen[name] = out if len(rows_K) == out.shape[-1] else out[..., rows_K.to(out.device)]

    # Hooks are taken away again, whatever happens meanwhile.
    with ExitStack() as hooks:
        for i in layers:
            hook = partial(keep_states, f"layer{i}")
            hooks.enter_context(blocks[i].register_forward_hook(hook))
        for i in projections:
            try:
                parts = qkv_of(row, blocks[i], head_dim(model.config))
            except ValueError as error:
                raise ValueError(f"{error}; set features.relations=0") from error
            for name, part in zip("qkv", parts, strict=True):
                hook = partial(keep_rows, f"{name}{i}", part.rows_K)
                hooks.enter_context(part.linear.register_forward_hook(hook))
        yield seen
