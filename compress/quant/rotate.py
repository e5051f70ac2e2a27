"""Rotations folded into the weights where they cost nothing at inference: outliers spread, blocks
of weights round better.

Hidden vectors x become x Q with orthogonal Q, writers take W -> Q^T W, readers W -> W Q, and logits
stay what they are. Two places need no operation at run time (QuaRot, arXiv 2404.00456, section 4,
stage 1; R1 and R2 of SpinQuant, arXiv 2405.16406, section 3.1):

  values    inside every head, between v_proj and o_proj: attention averages values and Q is the
            same for all positions. All heads that share a value head turn alike, so grouped-query
            attention is no obstacle. Q is a Hadamard matrix.
  residual  the stream between blocks. Norms without weights commute with Q, so their weights are
            first multiplied into the readers; the last norm's goes into the head. A tied head is
            the embedding too, which must not take that weight: left as it is, like a stream with
            norms on blocks' outputs (Gemma 3).

Hadamard matrices are Sylvester's, of order 2^k; other widths m 2^k take the product of a random
orthogonal m x m matrix and one, with random signs (a randomized Hadamard transform). Left out:
learned rotations, and those that need a transform at run time.
"""

from typing import Any

import scipy.linalg
import torch
from torch import Tensor, nn

from compress.quant.balance import gain, groups_of


def hadamard(order: int) -> Tensor:
    """float64 (order, order), orthogonal, entries +-1 / sqrt(order); `order` is a power of two."""
    return torch.from_numpy(scipy.linalg.hadamard(order, float)) / order**0.5


def rotation(width: int, seed: int) -> Tensor:
    """float64 (width, width): a randomized Hadamard transform, its odd factor a random orthogonal
    matrix.
    """
    generator, power = torch.Generator().manual_seed(seed), width & -width
    odd = torch.linalg.qr(
        torch.randn(width // power, width // power, dtype=torch.float64, generator=generator)
    )[0]
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return torch.kron(odd.contiguous(), hadamard(power)) * signs


def _turn(layer: nn.Module, q: Tensor, *, rows: bool) -> None:
    """W -> Q^T W (with its bias) or W -> W Q, in pieces as long as Q."""
    weight: Any = layer.weight
    w = weight.double()
    turned = (
        (q.T @ w.view(-1, len(q), w.shape[1])).view(w.shape)
        if rows
        else (w.view(w.shape[0], -1, len(q)) @ q).view(w.shape)
    )
    weight.copy_(turned)
    bias: Any = getattr(layer, "bias", None)
    if rows and bias is not None:
        bias.copy_((bias.double().view(-1, len(q)) @ q).flatten())


@torch.no_grad()
def rotate_values(model: Any) -> None:
    """Turn the values of every head, in place."""
    for block in model.model.layers:
        q = hadamard(block.self_attn.head_dim & -block.self_attn.head_dim)
        _turn(block.self_attn.v_proj, q, rows=True)
        _turn(block.self_attn.o_proj, q, rows=False)


def residual_obstacle(model: Any) -> str:
    """Why the residual stream can't be turned for free; empty where it can."""
    if model.get_input_embeddings().weight is model.get_output_embeddings().weight:
        return "its embeddings are the head's, which would have to take the last norm's weight"
    if hasattr(model.model.layers[0], "pre_feedforward_layernorm"):
        return "its blocks have norms on their outputs, whose weights don't commute with a rotation"
    return ""


@torch.no_grad()
def rotate(model: Any, seed: int) -> str:
    """Turn in place whatever can be turned, norms of the residual stream folded away; why that
    can't be, empty where it was.
    """
    rotate_values(model)
    if obstacle := residual_obstacle(model):
        return obstacle
    q = rotation(model.config.hidden_size, seed)
    norms = [(model.model.norm, [model.get_output_embeddings()])]
    for block in model.model.layers:
        norms += [
            (group.maker, list(group.readers.values()))
            for group in groups_of(block)
            if not isinstance(group.maker, nn.Linear)
        ]
        _turn(block.self_attn.o_proj, q, rows=True)
        _turn(block.mlp.down_proj, q, rows=True)
    for norm, readers in norms:
        whole = gain(norm).clone()
        norm.weight.add_(1 - whole)
        for reader in readers:
            reader.weight.mul_(whole)
            _turn(reader, q, rows=False)
    _turn(model.get_input_embeddings(), q, rows=False)
    return ""
