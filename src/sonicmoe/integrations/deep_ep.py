"""DeepEP as the dispatcher of expert parallelism, by its `ElasticBuffer`.

    buffer = deep_ep.ElasticBuffer(mesh["ep"].get_group(), num_max_tokens_per_rank=T, hidden=H, num_topk=K)
    parallelize_module(model, mesh["ep"], {"layers.*.moe": ExpertParallel(DeepEP(buffer, num_experts, K))})

A token travels once to each rank that has one of its experts, whatever their number, and its result there comes back as
one row: fewer bytes than `AllToAll`, which sends a row for each expert. One buffer can serve all layers.

Nothing of DeepEP is imported: the caller makes the buffer, and this file relies on four facts of its two calls.
`dispatch` takes expert ids with -1 for none, and returns those of each received token with -1 for experts elsewhere,
counted from the rank's first. `combine` returns to each token the sum of its results over the ranks, and of the weights
that are given with them. A dispatch with a handle repeats an earlier one with other rows. So each is the other's
gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from sonicmoe.errors import InvalidArgument
from sonicmoe.integrations.distributed import Received
from sonicmoe.ops._once import once
from sonicmoe.routing import Routing


class Buffer(Protocol):
    """What is used of `deep_ep.ElasticBuffer`."""

    group: Any

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        *,
        num_experts: int | None = None,
        handle: Any = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any, Any]:
        """-> received x, expert ids, weights, handle, event."""
        ...

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None) -> tuple[Tensor, Tensor | None, Any]:
        """-> sums of x, sums of the weights, event."""
        ...


class DeepEP:
    """A `Dispatcher` for routings with as many slots for every token, as of top-K; bf16.

    Args:
        buffer: a `deep_ep.ElasticBuffer` over the group of the experts.
        num_experts: E, a multiple of the group's ranks.
        num_experts_per_tok: K.
    """

    dtype = torch.bfloat16

    def __init__(self, buffer: Buffer, num_experts: int, num_experts_per_tok: int) -> None:
        ranks = buffer.group.size()
        if num_experts % ranks:
            raise InvalidArgument("num_experts", num_experts, f"a multiple of {ranks} ranks, for DeepEP")
        self.buffer, self.num_experts, self.per_token = buffer, num_experts, num_experts_per_tok

    def dispatch(self, x: Tensor, routing: Routing, backend: str) -> Received:
        if x.dtype != self.dtype:
            raise InvalidArgument("x.dtype", x.dtype, f"{self.dtype}, which DeepEP sends")
        if routing.cu_slots is not None or routing.scores.shape[0] != routing.num_tokens * self.per_token:
            got = f"{routing.scores.shape[0]} slots of {routing.num_tokens} tokens"
            raise InvalidArgument("routing", got, f"{self.per_token} for every token, as of top-K, for DeepEP")
        expert = torch.searchsorted(routing.cu_rows[1:].contiguous(), routing.slot_row, right=True)
        ids = expert.masked_fill(routing.slot_row < 0, -1).view(-1, self.per_token)
        rows, scores, ids, handle = _Dispatch.apply(x, routing.scores.view(ids.shape), ids, self)
        return Received(rows, ids, scores, handle.value)

    def combine(self, results: Tensor, handle: Any) -> Tensor:
        return _Combine.apply(results, handle, self)


class _Opaque:
    """Something that passes through an autograd Function as it is."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Dispatch(torch.autograd.Function):
    """Tokens and scores to the ranks of their experts; their gradients are combined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, ids: Tensor, of: DeepEP) -> tuple[Tensor, Tensor, Tensor, _Opaque]:
        rows, local, weights, handle, _ = of.buffer.dispatch(x.contiguous(), ids, scores, num_experts=of.num_experts)
        assert local is not None and weights is not None
        ctx.mark_non_differentiable(local)
        ctx.handle, ctx.of = handle, of
        return rows, weights, local, _Opaque(handle)

    @staticmethod
    def backward(ctx: Any, drows: Tensor, dscores: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return once("integrations.deep_ep.DeepEP", _Dispatch._gradients, ctx, drows, dscores)

    @staticmethod
    def _gradients(ctx: Any, _: list[Tensor], drows: Tensor, dscores: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweights, _ = ctx.of.buffer.combine(drows.contiguous(), ctx.handle, dscores.contiguous())
        return dx, dweights, None, None


class _Combine(torch.autograd.Function):
    """Results to where their tokens came from, summed; their gradients go the way of the tokens."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, handle: Any, of: DeepEP) -> Tensor:
        ctx.handle, ctx.of = handle, of
        return of.buffer.combine(results.contiguous(), handle)[0]

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return once("integrations.deep_ep.DeepEP", _Combine._gradients, ctx, do)

    @staticmethod
    def _gradients(ctx: Any, _: list[Tensor], do: Tensor) -> tuple[Tensor | None, ...]:
        rows, *_ = ctx.of.buffer.dispatch(do.contiguous(), num_experts=ctx.of.num_experts, handle=ctx.handle)
        return rows, None, None
