"""bias_grad: sums over each expert's rows, contiguous (db1) or gathered and weighted (db2)."""

from __future__ import annotations

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.bias_grad import BiasGradSpec
from sonicmoe.ops._cute import aligned, dtype_name, kernel
from sonicmoe.ops._op import define


def _fake(
    rows: Tensor,
    cu_rows: Tensor,
    row_token: Tensor | None,
    scores: Tensor | None,
    row_slot: Tensor | None,
    backend: str,
) -> Tensor:
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return rows.new_empty(cu_rows.shape[0] - 1, rows.shape[1], dtype=dtype)


def _cute(
    rows: Tensor, cu_rows: Tensor, row_token: Tensor | None, scores: Tensor | None, row_slot: Tensor | None
) -> Tensor:
    out = _fake(rows, cu_rows, row_token, scores, row_slot, "cute")
    num_rows = rows.shape[0] if row_token is None else row_token.shape[0]
    if num_rows == 0 or rows.shape[0] == 0:
        return out.zero_()
    form = (dtype_name("rows", rows), row_token is not None, scores is not None)
    _, function = kernel(rows, BiasGradSpec, rows.shape[1], *form)
    function(aligned(rows), cu_rows, row_token, scores, row_slot, out)
    return out


bias_grad = define(
    "bias_grad(Tensor rows, Tensor cu_rows, Tensor? row_token, Tensor? scores, Tensor? row_slot, str backend) "
    "-> Tensor",
    fake=_fake,
    reference=reference.bias_grad,
    cute=_cute,
)
