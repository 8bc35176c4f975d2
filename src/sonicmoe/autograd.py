"""The layer's one autograd Function: three ops forward, five backward, and the biases' sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sonicmoe import ops
from sonicmoe.ops._once import once
from sonicmoe.reference.forward import scores_grad


class Form(NamedTuple):
    """What of a layer is not a tensor."""

    activation: str
    w1_layout: str
    backend: str


def forward_steps(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    scores: Tensor,
    plan: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None],
    form: Form,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """o (T, H), and h (R, G*I) if kept. plan: cu_rows, row_token, row_slot, slot_row, cu_slots of a Routing."""
    cu_rows, row_token, _, slot_row, cu_slots = plan
    run = ops.steps(x, w1, w2, b1, b2, scores, *plan)
    h, a = run.up_proj(x, w1, b1, cu_rows, row_token, form.activation, form.w1_layout, keep_h, form.backend)
    y = run.down_proj(a, w2, b2, cu_rows, form.backend)
    del a  # before o is allocated
    o, _ = run.aggregate(y, scores, None, slot_row, cu_slots, x.shape[0], form.backend)
    return o, h


class MoEExperts(torch.autograd.Function):
    """Experts of a MoE layer, from routed tokens to their weighted sum.

    Keeps x and h (2*T*H + 4*R*I bytes in bf16 with a gated activation), the weights and the routing; a, y and every
    gathered copy are recomputed or never exist. What no argument requires is neither kept nor computed. With w1_grad or
    w2_grad, an fp32 buffer, the weight's gradient is added to the buffer and autograd sees none.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        scores: Tensor,
        cu_rows: Tensor,
        row_token: Tensor,
        row_slot: Tensor,
        slot_row: Tensor,
        cu_slots: Tensor | None,
        w1_grad: Tensor | None,
        w2_grad: Tensor | None,
        form: Form,
    ) -> Tensor:
        plan = (cu_rows, row_token, row_slot, slot_row, cu_slots)
        o, h = forward_steps(x, w1, w2, b1, b2, scores, plan, form, keep_h=True)
        needs_x, needs_w1 = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_w1 else None, w1 if needs_x else None, w2, b2, h, scores, *plan)
        ctx.form, ctx.w1_grad, ctx.w2_grad = form, w1_grad, w2_grad
        ctx.num_tokens, ctx.dtype = x.shape[0], x.dtype
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = MoEExperts._gradients(ctx, do)
        return once("moe_experts", gradients)

    @staticmethod
    def _gradients(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing they are computed anew each time
        x, w1, w2, b2, h, scores, cu_rows, row_token, row_slot, slot_row, cu_slots = saved
        needs_x, needs_w1, needs_w2, needs_b1, needs_b2, needs_scores = ctx.needs_input_grad[:6]
        activation, w1_layout, backend = ctx.form
        do = do.contiguous()
        run = ops.steps(do, *saved, ctx.w1_grad, ctx.w2_grad)
        dx = dw1 = dw2 = db1 = db2 = dscores = None

        if needs_b2:
            db2 = run.bias_grad(do, cu_rows, row_token, scores, row_slot, backend).to(ctx.dtype)
        if not (needs_x or needs_w1 or needs_w2 or needs_b1 or needs_scores):
            return (None, None, None, None, db2) + (None,) * 9
        dh, a_s, parts = run.down_dgrad(do, w2, b2, h, scores, cu_rows, row_token, row_slot, activation, backend)
        if needs_w2 and ctx.w2_grad is not None:
            run.down_wgrad_add_(ctx.w2_grad, do, a_s, cu_rows, row_token, backend)
        elif needs_w2:
            dw2 = run.down_wgrad(do, a_s, cu_rows, row_token, backend)
        del a_s  # the peak of memory is in the next step
        if needs_x:
            dx_rows = run.up_dgrad(dh, w1, cu_rows, w1_layout, backend)
            dx, dscores = run.aggregate(
                dx_rows, None, parts if needs_scores else None, slot_row, cu_slots, ctx.num_tokens, backend
            )
            del dx_rows
        elif needs_scores:
            dscores = scores_grad(parts, slot_row)
        if needs_w1 and ctx.w1_grad is not None:
            run.up_wgrad_add_(ctx.w1_grad, x, dh, cu_rows, row_token, w1_layout, backend)
        elif needs_w1:
            dw1 = run.up_wgrad(x, dh, cu_rows, row_token, w1_layout, backend)
        if needs_b1:
            db1 = run.bias_grad(dh, cu_rows, None, None, None, backend).to(ctx.dtype)
            if w1_layout == "interleaved":
                db1 = db1.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        return (dx, dw1, dw2, db1, db2, dscores if needs_scores else None) + (None,) * 8
