"""The forward's three steps (up_proj, down_proj, aggregate) in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe.activations import Activation
from sonicmoe.reference.activation import act
from sonicmoe.reference.rows import accumulator, row_buffer, rows_of_experts, to_concat


def up_proj(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    cu_rows: Tensor,
    row_token: Tensor,
    activation: str,
    w1_layout: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    """h[r] = x[row_token[r]] w1[e]^T (+ b1[e]);  a[r] = act(h[r]), from h as it is rounded, as in the backward.

    x (T, H); w1 (E, G*I, H); b1 (E, G*I); returns h (R, G*I), always [gate | up], and a (R, I), in x's dtype. Without
    keep_h, h is empty (0, G*I).
    """
    kind, acc = Activation.parse(activation), accumulator(x.dtype)
    num_rows, width = row_token.shape[0], w1.shape[1]
    experts = rows_of_experts(cu_rows, num_rows)
    h = row_buffer(x, width, num_rows, experts) if keep_h else x.new_empty((0, width))
    a = row_buffer(x, width // 2 if kind.gated else width, num_rows, experts)
    for e, rows in experts:
        pre = x.index_select(0, row_token[rows]).to(acc) @ to_concat(w1[e], w1_layout).to(acc).T
        if b1 is not None:
            pre += to_concat(b1[e], w1_layout).to(acc)
        pre = pre.to(x.dtype)
        if keep_h:
            h[rows] = pre
        a[rows] = act(kind, pre.to(acc))
    return h, a


def down_proj(a: Tensor, w2: Tensor, b2: Tensor | None, cu_rows: Tensor) -> Tensor:
    """y[r] = a[r] w2[e]^T (+ b2[e]). a (R, I); w2 (E, H, I); b2 (E, H); returns y (R, H) in a's dtype."""
    acc = accumulator(a.dtype)
    experts = rows_of_experts(cu_rows, a.shape[0])
    y = row_buffer(a, w2.shape[1], a.shape[0], experts)
    for e, rows in experts:
        product = a[rows].to(acc) @ w2[e].to(acc).T
        y[rows] = product if b2 is None else product + b2[e].to(acc)
    return y


def aggregate(
    rows: Tensor,
    scores: Tensor | None,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """o[t] = sum over t's slots s with slot_row[s] >= 0, in slot order, of scores[s] (or 1) * rows[slot_row[s]].

    rows (R, H); scores (S,); slot_row (S,); cu_slots (T+1,), or None where every token has S // T slots. Returns o
    (T, H) in rows' dtype, summed in at least fp32, and dscores (S,): the sums of parts (R, P) over P, 0 for a slot
    without a row; without parts, dscores is empty (0,). Both kinds of dscores are in fp32, or fp64 with rows.
    """
    acc = accumulator(rows.dtype)
    o = torch.zeros((num_tokens, rows.shape[1]), dtype=acc, device=rows.device)
    num_slots = slot_row.shape[0]
    if num_slots and num_tokens:
        if cu_slots is None:
            cu_slots = torch.arange(num_tokens + 1, dtype=torch.int32, device=rows.device) * (num_slots // num_tokens)
        first, count = cu_slots[:-1], cu_slots.diff()
        for position in range(int(count.max())):
            token = (count > position).nonzero().squeeze(1)
            slot = first[token] + position
            has_row = slot_row[slot] >= 0
            token, slot = token[has_row], slot[has_row]
            term = rows.index_select(0, slot_row[slot]).to(acc)
            # Each token occurs once here, so the order of the sum is the order of the slots.
            o[token] += term if scores is None else term * scores[slot].to(acc).unsqueeze(1)
    return o.to(rows.dtype), scores_grad(parts, slot_row) if parts is not None else o.new_empty((0,))


def scores_grad(parts: Tensor, slot_row: Tensor) -> Tensor:
    """dscores (S,): the sum of a row's parts (R, P) for each slot, 0 for a slot without a row. Never synchronises."""
    if parts.shape[0] == 0:
        return parts.new_zeros(slot_row.shape)
    of_row = parts.sum(1).index_select(0, slot_row.clamp(min=0))
    return torch.where(slot_row >= 0, of_row, 0.0)
