"""Experts whose own functions run between the grouped matrix products: for what no kernel has fused.

    h = x[row_token] w1^T (+ b1);  a = function(h);  y = a w2^T (+ b2);  y = after_down(y);  o[t] = sum of score * y

The products, their gradients and the weighted sum are the ops of `sonicmoe.ops`; `function` and `after_down` are any
differentiable torch code that works row by row. Autograd keeps what that code keeps, so this costs the memory
and time that a fused activation saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sonicmoe import ops
from sonicmoe.errors import InvalidArgument
from sonicmoe.functional import check_alignment, check_operand, check_routing
from sonicmoe.ops._once import once
from sonicmoe.reference.forward import scores_grad
from sonicmoe.routing import Routing

RowFunction = Callable[[Tensor], Tensor]

# Whose second derivative an error says is missing.
_NAME = "integrations.between.experts_with"


def experts_with(
    function: RowFunction,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    routing: Routing,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    *,
    after_down: RowFunction | None = None,
    backend: str,
) -> Tensor:
    """`moe_experts` with a function of the caller.

    Args:
        function: h (R, N) -> a (R, I), where w1 is (E, N, H) in whatever order of rows the function expects.
        x, w1, w2, routing, b1, b2: of `moe_experts`, but for N, and x is (T, H).
        after_down: y (R, H) -> (R, H), before the scores.
        backend: "cute" or "torch".
    """
    _check_experts(x, w1, w2, routing, b1, b2, backend)
    h = up_rows(x, w1, b1, routing, backend)
    a = function(h)
    check_weight("w2", w2, a, backend)
    y = GroupedLinear.apply(a, w2, b2, routing.cu_rows, backend)
    if after_down is not None:
        y = after_down(y)
    return combine(y, routing, backend)


def _check_experts(
    x: Tensor, w1: Tensor, w2: Tensor, routing: Routing, b1: Tensor | None, b2: Tensor | None, backend: str
) -> None:
    """Everything but w2's I, which `function` decides."""
    if x.dim() != 2:
        raise InvalidArgument("x.shape", tuple(x.shape), "(T, H)")
    check_weight("w1", w1, x, backend)
    experts, width, hidden = w1.shape
    if w2.dim() != 3 or w2.shape[:2] != (experts, hidden):
        raise InvalidArgument("w2.shape", tuple(w2.shape), f"({experts}, {hidden}, I): E as w1, H as x.shape[-1]")
    for name, b, rows in (("b1", b1, width), ("b2", b2, hidden)):
        if b is not None:
            check_operand(name, b, (experts, rows), x.dtype, x.device)
            if backend == "cute":
                check_alignment(**{name: b})
    check_routing(routing, x, experts)


def check_weight(name: str, w: Tensor, rows: Tensor, backend: str) -> None:
    """Raise InvalidArgument unless rows (R, K) can be multiplied by w (E, N, K)."""
    if w.dim() != 3 or w.shape[2] != rows.shape[-1] or w.dtype != rows.dtype or w.device != rows.device:
        got = f"{tuple(w.shape)}, {w.dtype}, {w.device}"
        raise InvalidArgument(name, got, f"(E, N, {rows.shape[-1]}), {rows.dtype}, {rows.device}, as the rows")
    if backend == "cute":
        if not w.is_contiguous():
            raise InvalidArgument(f"{name}.stride()", w.stride(), "contiguous: a copy of it per call would be silent")
        if w.shape[1] % 8 or w.shape[2] % 8:
            raise InvalidArgument(f"{name}.shape", tuple(w.shape), "(E, N, K), N and K multiples of 8 for the kernels")
        check_alignment(**{name: w})


def up_rows(x: Tensor, w1: Tensor, b1: Tensor | None, routing: Routing, backend: str) -> Tensor:
    """h (R, N) of the routed rows; 0 in the padding."""
    _, cu_rows, row_token, _, slot_row, cu_slots, _ = routing
    return UpProjection.apply(x, w1, b1, cu_rows, row_token, slot_row, cu_slots, backend)


def gather_rows(x: Tensor, routing: Routing, num_rows: int, backend: str) -> Tensor:
    """x[row_token] (num_rows, H) of the first rows. Its gradient is summed row by row in order, not by atomics."""
    row_token = routing.row_token[:num_rows]
    return Gather.apply(x, row_token, routing.slot_row, routing.cu_slots, backend)


def sum_rows(rows: Tensor, routing: Routing, backend: str) -> Tensor:
    """o (T, H): the sum of each token's rows, of which the padding may be left away. The transpose of `gather_rows`."""
    row_token = routing.row_token[: rows.shape[0]]
    return Sum.apply(rows, row_token, routing.slot_row, routing.cu_slots, routing.num_tokens, backend)


def combine(y: Tensor, routing: Routing, backend: str) -> Tensor:
    """o (T, H): the weighted sum of each token's rows."""
    scores, cu_rows, row_token, row_slot, slot_row, cu_slots, num_tokens = routing
    return Combine.apply(y, scores, cu_rows, row_token, row_slot, slot_row, cu_slots, num_tokens, backend)


def _without_padding(rows: Tensor, cu_rows: Tensor) -> Tensor:
    """In place, for rows that only the caller holds: fill the padding with zeros.

    Kernels leave it unwritten, and the functions between may have parameters that sum over rows. Not in place where it
    is compiled, and fused: torch 2.11 takes the gradients of a Function that changes its own output there for zeros.
    """
    fill = rows.masked_fill if torch.compiler.is_compiling() else rows.masked_fill_
    row = torch.arange(rows.shape[0], dtype=torch.int32, device=rows.device)
    return fill((row >= cu_rows[-1]).unsqueeze(1), 0)


class UpProjection(torch.autograd.Function):
    """h[r] = x[row_token[r]] w1[e]^T (+ b1[e])."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        cu_rows: Tensor,
        row_token: Tensor,
        slot_row: Tensor,
        cu_slots: Tensor | None,
        backend: str,
    ) -> Tensor:
        x = ops.as_read(x)
        ctx.save_for_backward(x, w1, cu_rows, row_token, slot_row, cu_slots)
        ctx.backend = backend
        # The op has no plain product: its activated output is dropped.
        h, _ = ops.up_proj(x, w1, b1, cu_rows, row_token, "relu", "concat", True, backend)
        return _without_padding(h, cu_rows)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        return once(_NAME, UpProjection._gradients, ctx, dh)

    @staticmethod
    def _gradients(ctx: Any, saved: list[Any], dh: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, cu_rows, row_token, slot_row, cu_slots = saved
        dh, backend = ops.as_read(dh), ctx.backend
        dx = dw1 = db1 = None
        if ctx.needs_input_grad[0]:
            dx_rows = ops.up_dgrad(dh, w1, cu_rows, "concat", backend)
            dx, _ = ops.aggregate(dx_rows, None, None, slot_row, cu_slots, x.shape[0], backend)
        if ctx.needs_input_grad[1]:
            dw1 = ops.up_wgrad(x, dh, cu_rows, row_token, "concat", backend)
        if ctx.needs_input_grad[2]:
            db1 = ops.bias_grad(dh, cu_rows, None, None, None, backend).to(dh.dtype)
        return (dx, dw1, db1) + (None,) * 5


class GroupedLinear(torch.autograd.Function):
    """y[r] = a[r] w[e]^T (+ b[e]) for rows a (R, K), w (E, N, K); 0 in the padding."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, w: Tensor, b: Tensor | None, cu_rows: Tensor, backend: str) -> Tensor:
        a = ops.as_read(a)
        ctx.save_for_backward(a, w, cu_rows)
        ctx.backend = backend
        return _without_padding(ops.down_proj(a, w, b, cu_rows, backend), cu_rows)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return once("integrations.between.GroupedLinear", GroupedLinear._gradients, ctx, dy)

    @staticmethod
    def _gradients(ctx: Any, saved: list[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        a, w, cu_rows = saved
        dy, backend = ops.as_read(dy), ctx.backend
        da = dw = db = None
        # Grouped products alike, whatever their names: rows by a weight (E, N, K), and rows by rows.
        if ctx.needs_input_grad[0]:
            da = _without_padding(ops.up_dgrad(dy, w, cu_rows, "concat", backend), cu_rows)
        if ctx.needs_input_grad[1]:
            row = torch.arange(a.shape[0], dtype=torch.int32, device=a.device)
            dw = ops.up_wgrad(a, dy, cu_rows, row, "concat", backend)
        if ctx.needs_input_grad[2]:
            db = ops.bias_grad(dy, cu_rows, None, None, None, backend).to(dy.dtype)
        return da, dw, db, None, None


class Gather(torch.autograd.Function):
    """rows[r] = x[row_token[r]]. The transpose of `Sum`: each is the other's gradient, as often as is asked for."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, row_token: Tensor, slot_row: Tensor, cu_slots: Tensor | None, backend: str
    ) -> Tensor:
        ctx.save_for_backward(row_token, slot_row, cu_slots)
        ctx.num_tokens, ctx.backend = x.shape[0], backend
        return x.index_select(0, row_token)

    @staticmethod
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor | None, ...]:
        return (Sum.apply(drows, *ctx.saved_tensors, ctx.num_tokens, ctx.backend),) + (None,) * 4


class Sum(torch.autograd.Function):
    """o[t] = sum over the rows r of token t of rows[r]."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        row_token: Tensor,
        slot_row: Tensor,
        cu_slots: Tensor | None,
        num_tokens: int,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(row_token, slot_row, cu_slots)
        ctx.backend = backend
        o, _ = ops.aggregate(ops.as_read(rows), None, None, slot_row, cu_slots, num_tokens, backend)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return (Gather.apply(do, *ctx.saved_tensors, ctx.backend),) + (None,) * 5


class Combine(torch.autograd.Function):
    """o[t] = sum over the rows r of token t of score[r] * y[r]."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        scores: Tensor,
        cu_rows: Tensor,
        row_token: Tensor,
        row_slot: Tensor,
        slot_row: Tensor,
        cu_slots: Tensor | None,
        num_tokens: int,
        backend: str,
    ) -> Tensor:
        y = ops.as_read(y)
        ctx.save_for_backward(y, scores, cu_rows, row_token, row_slot, slot_row)
        o, _ = ops.aggregate(y, scores, None, slot_row, cu_slots, num_tokens, backend)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        return once(_NAME, Combine._gradients, ctx, do)

    @staticmethod
    def _gradients(ctx: Any, saved: list[Tensor], do: Tensor) -> tuple[Tensor | None, ...]:
        y, scores, cu_rows, row_token, row_slot, slot_row = saved
        dy = dscores = None
        do_rows = _without_padding(do.index_select(0, row_token), cu_rows).to(scores.dtype)
        if ctx.needs_input_grad[0]:
            dy = (do_rows * scores.index_select(0, row_slot).unsqueeze(1)).to(y.dtype)
        if ctx.needs_input_grad[1]:
            dscores = scores_grad((do_rows * y).sum(1, keepdim=True), slot_row)
        return (dy, dscores) + (None,) * 7
