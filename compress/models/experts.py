"""The FFN of a mixture: which experts a token is sent to, and what each makes of it.

    y(x) = sum over the top k experts e of  g_e(x) f_e(x),    f_e(x) = D_e (act(G_e x) * U_e x)

g is the router's softmax over all experts, in some families scaled so that those of the top k sum
to 1 (`norm_topk_prob`). The router itself is asked, so whatever its family does holds. Experts are
stacked as transformers 5 has them: all G and U in one tensor (E, 2 F, H), gates first, all D in
another (E, H, F). Left out: biases of experts, experts that every token sees besides, and
interleaved gates, which no row of `blocks.py` has.

Letters: E experts, A experts that see a token, N tokens, H hidden, F FFN channels.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.models.blocks import Row

MOST_NAMES = 8  # in a line of the log; files have all


class Routed(NamedTuple):
    """What a router says of tokens: logits (N, E), the gates of the chosen experts (N, A) and which
    they are (N, A).
    """

    logits_NE: Tensor
    gates_NA: Tensor
    chosen_NA: Tensor

    def of(self, expert: int) -> tuple[Tensor, Tensor]:
        """Which tokens are sent to an expert, ascending, and its gate for each."""
        tokens, places = torch.where(self.chosen_NA == expert)
        return tokens, self.gates_NA[tokens, places]


class Mixture(NamedTuple):
    """The FFN of one block, its router and its experts, with the names of their two tensors."""

    ffn: Any
    router: Any
    experts: Any
    makers_name: str
    downs_name: str

    @property
    def makers(self) -> nn.Parameter:
        """Gates and ups of all experts (E, 2 F, H)."""
        return getattr(self.experts, self.makers_name)

    @property
    def downs(self) -> nn.Parameter:
        """(E, H, F)."""
        return getattr(self.experts, self.downs_name)

    @property
    def size(self) -> int:
        """How many experts."""
        return len(self.downs)

    def routed(self, x_NH: Tensor) -> Routed:
        """Where tokens go."""
        return Routed(*self.router(x_NH))

    def inner(self, expert: int, x_NH: Tensor) -> Tensor:
        """What an expert's down projection receives (N, F)."""
        gate_NF, up_NF = nn.functional.linear(x_NH, self.makers[expert]).chunk(2, dim=-1)
        return self.experts.act_fn(gate_NF) * up_NF

    def output(self, expert: int, x_NH: Tensor) -> Tensor:
        """f_e(x) (N, H), not yet times its gate."""
        return nn.functional.linear(self.inner(expert, x_NH), self.downs[expert])

    def __call__(self, x_BLH: Tensor) -> Tensor:
        """y (B, L, H), past whoever listens to the FFN."""
        out = self.ffn.forward(x_BLH)
        return out[0] if isinstance(out, tuple) else out

    def put(self, makers: Tensor, downs: Tensor, router_EH: Tensor) -> None:
        """Other experts, perhaps fewer, in place; whoever counts them counts again."""
        for home, name, weight in (
            (self.experts, self.makers_name, makers),
            (self.experts, self.downs_name, downs),
            (self.router, "weight", router_EH),
        ):
            setattr(home, name, nn.Parameter(weight.contiguous(), requires_grad=False))
            home.num_experts = len(weight)


def mixture_of(row: Row, block: Any) -> Mixture | None:
    """The mixture of a block; None where its FFN is a plain one (`row_of_block`)."""
    if not row.router:
        return None
    path, _, makers_name = row.gate_up[0].rpartition(".")
    downs_name = row.down.rpartition(".")[2]
    return Mixture(
        block.get_submodule(ffn_path(row)),
        block.get_submodule(row.router),
        block.get_submodule(path),
        makers_name,
        downs_name,
    )


def ffn_path(row: Row) -> str:
    """Where a mixture's whole FFN is, below its block."""
    return row.down.rsplit(".", 2)[0]


def below(tokens_E: Tensor, floor_tokens: int) -> dict[int, int]:
    """The experts that fewer tokens reached than the floor, and how many did."""
    counts = tokens_E.tolist()
    return {expert: count for expert, count in enumerate(counts) if count < floor_tokens}


def sentence_of(index: int, tokens_E: Tensor, floor_tokens: int) -> str:
    """A line for the log that names those of a block, the rarest first; "" where there are none."""
    rare = sorted(below(tokens_E, floor_tokens).items(), key=lambda pair: pair[1])
    if not rare:
        return ""
    names = ", ".join(f"{expert} ({count})" for expert, count in rare[:MOST_NAMES])
    more = f" and {len(rare) - MOST_NAMES} others" if len(rare) > MOST_NAMES else ""
    reached = f"fewer than {floor_tokens:,} tokens of the calibration text reached"
    return f"block {index}: {reached} experts {names}{more}"
