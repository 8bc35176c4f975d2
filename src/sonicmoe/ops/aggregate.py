"""aggregate: sum each token's rows, weighted by their scores or not; and the scores' gradients from their parts."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.aggregate import AggregateSpec
from sonicmoe.ops._cute import dtype_name, kernel
from sonicmoe.ops._op import define


def _fake(
    rows: Tensor,
    scores: Tensor | None,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
    num_tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    o = rows.new_empty(num_tokens, rows.shape[1])
    num_scores = 0 if parts is None else slot_row.shape[0]
    return o, rows.new_empty(num_scores, dtype=torch.promote_types(rows.dtype, torch.float32))


def _cute(
    rows: Tensor,
    scores: Tensor | None,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    o, dscores = _fake(rows, scores, parts, slot_row, cu_slots, num_tokens, "cute")
    if num_tokens == 0 or rows.shape[0] == 0:
        return o.zero_(), dscores.zero_()
    per_token = slot_row.shape[0] // num_tokens if cu_slots is None else None
    form = (per_token, scores is not None, 0 if parts is None else parts.shape[1])
    _, function = kernel(rows, AggregateSpec, rows.shape[1], dtype_name("rows", rows), *form)
    function(rows, scores, parts, slot_row, cu_slots, o, None if parts is None else dscores)
    return o, dscores


aggregate = define(
    "aggregate(Tensor rows, Tensor? scores, Tensor? parts, Tensor slot_row, Tensor? cu_slots, SymInt num_tokens, "
    "str backend) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.aggregate,
    cute=_cute,
)
