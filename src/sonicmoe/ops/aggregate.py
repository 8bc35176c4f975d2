"""aggregate: sum each token's rows, weighted by their scores or not; and the scores' gradients from their parts."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.aggregate import AggregateSpec
from sonicmoe.ops._cute import aligned, dtype_name, kernel
from sonicmoe.ops._op import define


def outputs(
    rows: Tensor,
    scores: Tensor | None,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
    num_tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """o and dscores, not yet written."""
    o = rows.new_empty(num_tokens, rows.shape[1])
    num_scores = 0 if parts is None else slot_row.shape[0]
    return o, rows.new_empty(num_scores, dtype=torch.promote_types(rows.dtype, torch.float32))


def launch(
    rows: Tensor,
    scores: Tensor | None,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
    o: Tensor,
    dscores: Tensor,
    beside: bool = False,
) -> None:
    """Into o and dscores. beside: right after a launch that leaves SMs, and whose results it does not read."""
    num_tokens, width = o.shape
    if num_tokens == 0 or rows.shape[0] == 0:
        o.zero_()
        dscores.zero_()
        return
    per_token = slot_row.shape[0] // num_tokens if cu_slots is None else None
    form = (per_token, scores is not None, 0 if parts is None else parts.shape[1], beside)
    _, function = kernel(rows, AggregateSpec, width, dtype_name("rows", rows), *form)
    function(rows, scores, parts, slot_row, cu_slots, o, None if parts is None else dscores)


def _cute(
    rows: Tensor,
    scores: Tensor | None,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    o, dscores = outputs(rows, scores, parts, slot_row, cu_slots, num_tokens, "cute")
    launch(aligned(rows), scores, parts, slot_row, cu_slots, o, dscores)
    return o, dscores


aggregate = define(
    "aggregate(Tensor rows, Tensor? scores, Tensor? parts, Tensor slot_row, Tensor? cu_slots, SymInt num_tokens, "
    "str backend) -> (Tensor, Tensor)",
    fake=outputs,
    reference=reference.aggregate,
    cute=_cute,
)
