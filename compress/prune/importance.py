"""What a network would miss least: blocks by their influence, and FFNs cut as text reaches them.
Pure torch.

Blocks (ShortGPT, arXiv 2403.03853, section 3). A block that hardly turns its input does little:
    BI = 1 - E_tokens[cos(h_in, h_out)].
The least influential block goes, every later block is scored again on what it now receives, and so
on.

FFN channels go by `compress.prune.compensation`.

Letters: B sequences, L tokens of one, N tokens, H hidden, F channels, K kept channels.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from compress.prune.compensation import damp as damp  # where compress.quant.gptq looks for it
from compress.prune.compensation import error_fraction, keep_channels, reconstruct


def block_influence(h_in_NH: Tensor, h_out_NH: Tensor) -> float:
    """1 - mean cosine between what enters and what leaves a block: 0 does nothing, 2 turns every
    token round.
    """
    cosine_N = torch.nn.functional.cosine_similarity(h_in_NH.float(), h_out_NH.float(), dim=-1)
    return 1.0 - cosine_N.double().mean().item()


def drop_blocks(
    blocks: Sequence[Callable[[Tensor], Tensor]],
    entering: Sequence[Tensor],
    count: int,
    keep_first: int,
    keep_last: int,
) -> list[tuple[int, float]]:
    """The `count` blocks to drop as (index in `blocks`, influence when it went),
    in the order they go.

    `entering[i]` (B, L, H) enters block i of the whole model; only what follows a dropped block is
    computed again.
    """
    kept = list(range(len(blocks)))
    states = list(entering)
    dropped = []
    for _ in range(count):
        # What the blocks behind the last one dropped now receive.
        for index in kept[len(states) - 1 :]:
            states.append(blocks[index](states[-1]))

        # The least influential of those that may go.
        influence = {
            at: block_influence(states[at], states[at + 1])
            for at in range(keep_first, len(kept) - keep_last)
        }
        at = min(influence, key=influence.__getitem__)
        dropped.append((kept.pop(at), influence[at]))
        del states[at + 1 :]
    return dropped


def cut_ffns(model: Any, ids_BL: Tensor, keep: int, damping: float) -> list[float]:
    """Cut every FFN to `keep` channels in place as the calibration text reaches it, and fit it;
    what each one's output lost, as a fraction.
    """
    import torch_pruning

    # Which matrices hang together; the trace follows grad_fn.
    graph = torch_pruning.DependencyGraph()
    errors: list[float] = []
    with torch.enable_grad():
        two_BL = torch.zeros(1, 2, dtype=torch.long)
        graph.build_dependency(
            model,
            two_BL,
            lambda traced, ids_BL: traced(ids_BL, use_cache=False).logits,
            verbose=False,
        )

    def cut_here(down: torch.nn.Linear, args: tuple[Tensor]) -> tuple[Tensor]:
        # Which channels stay, and the projection fitted to them.
        x_NF = args[0].flatten(0, -2)
        weight_HF = down.weight.detach()
        gram_FF = x_NF.T @ x_NF
        keep_K = keep_channels(weight_HF, gram_FF, keep, damping)
        fitted_HK = reconstruct(weight_HF, gram_FF, keep_K, damping)
        errors.append(error_fraction(weight_HF, gram_FF, keep_K, fitted_HK))

        # The cut reaches this FFN's three matrices, and no more.
        mlp = mlps[down]
        gone = sorted(set(range(len(gram_FF))) - set(keep_K.tolist()))
        group: Any = graph.get_pruning_group(
            mlp.up_proj, torch_pruning.prune_linear_out_channels, gone
        )
        linears = {
            item.dep.target.module
            for item in group
            if isinstance(item.dep.target.module, torch.nn.Linear)
        }
        expected = {mlp.gate_proj, mlp.up_proj, down}
        assert linears == expected, f"the dependency graph found {group}"
        group.prune()
        assert mlp.gate_proj.out_features == mlp.up_proj.out_features == down.in_features == keep, (
            mlp
        )

        # The projection itself goes on with the fitted columns and what stays of its input.
        down.weight.copy_(fitted_HK)
        return (args[0][..., keep_K],)

    mlps = {layer.mlp.down_proj: layer.mlp for layer in model.model.layers}
    with ExitStack() as hooks:
        for down in mlps:
            hooks.enter_context(down.register_forward_pre_hook(cut_here))
        model.model(ids_BL, use_cache=False)
    return errors
