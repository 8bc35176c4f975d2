"""up_dgrad: multiply dh by each row's expert's w1."""

from __future__ import annotations

from torch import Tensor

from sonicmoe import reference
from sonicmoe.ops import _gemm
from sonicmoe.ops._op import define


def _fake(dh: Tensor, w1: Tensor, cu_rows: Tensor, w1_layout: str, backend: str) -> Tensor:
    return dh.new_empty(dh.shape[0], w1.shape[2])


def _cute(dh: Tensor, w1: Tensor, cu_rows: Tensor, w1_layout: str) -> Tensor:
    dx_rows = _fake(dh, w1, cu_rows, w1_layout, "cute")
    if dx_rows.shape[0]:
        # In the order of concatenated rows, gate and up are one long reduction axis.
        halves = 2 if w1_layout == "interleaved" else 1
        form = (None, halves == 2, halves)
        _gemm.launch("up_dgrad", (dh,), w1, (dx_rows, None), cu_rows, w1.shape[2], w1.shape[1] // halves, *form)
    return dx_rows


up_dgrad = define(
    "up_dgrad(Tensor dh, Tensor w1, Tensor cu_rows, str w1_layout, str backend) -> Tensor",
    fake=_fake,
    reference=reference.up_dgrad,
    cute=_cute,
)
