"""Problems to test the layer with: routings built by a naive loop, unit-scale weights, an independent dense oracle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from sonicmoe import Activation, Routing

# Rows of padding hold what a kernel must never read as a row: valid indices, by the plan's contract.
PADDING_INDEX = 0


def build_routing(
    assigned: Sequence[Sequence[int]],
    num_experts: int,
    *,
    padding: int = 0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Routing:
    """The plan of `assigned[t]` = experts of token t's slots, built row by row; ids >= num_experts get no row.

    Tokens with equally many slots and no padding give a plan without cu_slots, as top-K; others one with it, whose
    buffers are `padding` rows and slots longer than needed, as token rounding.
    """
    slots = [(t, e) for t, experts in enumerate(assigned) for e in experts]
    rows = sorted((e, t, s) for s, (t, e) in enumerate(slots) if e < num_experts)
    num_slots = len(slots) + padding
    num_rows = len(rows) + padding + sum(e >= num_experts for _, e in slots)
    row_token, row_slot = [PADDING_INDEX] * num_rows, [PADDING_INDEX] * num_rows
    slot_row = [-1] * num_slots
    counts = [0] * num_experts
    for r, (e, t, s) in enumerate(rows):
        row_token[r], row_slot[r], slot_row[s] = t, s, r
        counts[e] += 1
    uniform = padding == 0 and len({len(experts) for experts in assigned}) <= 1
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_slots, generator=generator, dtype=torch.float64) + 0.1

    def index(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    def running(sizes: Sequence[int]) -> Tensor:
        return index([sum(sizes[:i]) for i in range(len(sizes) + 1)])

    return Routing(
        scores=scores.to(device=device, dtype=dtype),
        cu_rows=running(counts),
        row_token=index(row_token),
        row_slot=index(row_slot),
        slot_row=index(slot_row),
        cu_slots=None if uniform else running([len(experts) for experts in assigned]),
        num_tokens=len(assigned),
    )


def top_k_assigned(num_tokens: int, num_experts: int, k: int, seed: int = 0) -> list[list[int]]:
    """k different experts per token, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num_experts, generator=generator)[:k].tolist() for _ in range(num_tokens)]


def ragged_assigned(num_tokens: int, num_experts: int, seed: int = 0) -> list[list[int]]:
    """0 to num_experts different experts per token, as after token rounding; with two experts or more, one is empty."""
    generator = torch.Generator().manual_seed(seed)
    used = max(1, num_experts - 1)
    assigned = []
    for t in range(num_tokens):
        count = (0, used)[t] if t < 2 else int(torch.randint(0, used + 1, (1,), generator=generator))
        assigned.append(torch.randperm(used, generator=generator)[:count].tolist())
    return assigned


@st.composite
def assignments(draw: st.DrawFn, max_tokens: int = 6, max_experts: int = 4) -> tuple[list[list[int]], int]:
    """(assigned, num_experts): any number of different experts per token, sentinel ids among them."""
    num_experts = draw(st.integers(1, max_experts))
    ids = st.lists(st.integers(0, num_experts), unique=True, max_size=num_experts)
    return draw(st.lists(ids, max_size=max_tokens)), num_experts


class Weights(NamedTuple):
    """A layer's tensors, leaves of autograd."""

    x: Tensor
    w1: Tensor
    w2: Tensor
    b1: Tensor | None
    b2: Tensor | None


def build_weights(
    num_tokens: int,
    num_experts: int,
    hidden: int,
    inter: int,
    activation: str,
    *,
    bias: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Weights:
    """Unit-scale x, and weights scaled so that h and y are at unit scale too."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 * inter if Activation.parse(activation).gated else inter

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        values = std * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device=device, dtype=dtype).requires_grad_()

    return Weights(
        x=normal(num_tokens, hidden),
        w1=normal(num_experts, width, hidden, std=1 / math.sqrt(hidden)),
        w2=normal(num_experts, hidden, inter, std=1 / math.sqrt(inter)),
        b1=normal(num_experts, width) if bias else None,
        b2=normal(num_experts, hidden) if bias else None,
    )


def oracle_activation(activation: Activation, h: Tensor, w1_layout: str) -> Tensor:
    functions = {"geglu": F.gelu, "gelu": F.gelu, "reglu": F.relu, "relu": F.relu, "silu": F.silu}
    functions["relu2"] = lambda z: F.relu(z) ** 2
    functions["geglu_tanh"] = functions["gelu_tanh"] = lambda z: F.gelu(z, approximate="tanh")
    if not activation.gated:
        return functions[activation.name](h)
    gate, up = (h[:, 0::2], h[:, 1::2]) if w1_layout == "interleaved" else h.chunk(2, dim=1)
    if activation.name != "swiglu":
        return functions[activation.name](gate) * up
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.up_offset)


def oracle(
    weights: Weights, routing: Routing, assigned: Sequence[Sequence[int]], activation: str, w1_layout: str = "concat"
) -> Tensor:
    """The layer without any plan: every expert on every token, then each token's weighted sum, one slot at a time."""
    x, w1, w2, b1, b2 = weights
    kind = Activation.parse(activation)
    of_expert = []
    for e in range(w1.shape[0]):
        h = x @ w1[e].T if b1 is None else x @ w1[e].T + b1[e]
        y = oracle_activation(kind, h, w1_layout) @ w2[e].T
        of_expert.append(y if b2 is None else y + b2[e])
    outputs, slot = [], 0
    for t, experts in enumerate(assigned):
        total = torch.zeros_like(x[t])
        for e in experts:
            if e < w1.shape[0]:
                total = total + routing.scores[slot] * of_expert[e][t]
            slot += 1
        outputs.append(total)
    return torch.stack(outputs) if outputs else torch.zeros_like(x)
