"""up_wgrad: w1's gradient, over each expert's rows of gathered x and dh."""

from __future__ import annotations

from torch import Tensor

from sonicmoe import reference
from sonicmoe.ops import _gemm
from sonicmoe.ops._cute import aligned
from sonicmoe.ops._op import define


def _fake(x: Tensor, dh: Tensor, cu_rows: Tensor, row_token: Tensor, w1_layout: str, backend: str) -> Tensor:
    return x.new_empty(cu_rows.shape[0] - 1, dh.shape[1], x.shape[1])


def _fake_add(
    dw1: Tensor, x: Tensor, dh: Tensor, cu_rows: Tensor, row_token: Tensor, w1_layout: str, backend: str
) -> None:
    return None


def _launch(variant: str, dw1: Tensor, x: Tensor, dh: Tensor, cu_rows: Tensor, row_token: Tensor, layout: str) -> None:
    # In the order of concatenated rows, gate and up are one long n axis.
    halves = 2 if layout == "interleaved" else 1
    form = (None, halves == 2, halves)
    _gemm.check_gathered("x", x)
    _gemm.launch(variant, (x, row_token), aligned(dh), (dw1,), cu_rows, dh.shape[1] // halves, x.shape[1], *form)


def _cute(x: Tensor, dh: Tensor, cu_rows: Tensor, row_token: Tensor, w1_layout: str) -> Tensor:
    dw1 = _fake(x, dh, cu_rows, row_token, w1_layout, "cute")
    if not dh.shape[0]:
        return dw1.zero_()
    _launch("up_wgrad", dw1, x, dh, cu_rows, row_token, w1_layout)
    return dw1


def _cute_add(dw1: Tensor, x: Tensor, dh: Tensor, cu_rows: Tensor, row_token: Tensor, w1_layout: str) -> None:
    if dh.shape[0]:
        _launch("up_wgrad_add", dw1, x, dh, cu_rows, row_token, w1_layout)


up_wgrad = define(
    "up_wgrad(Tensor x, Tensor dh, Tensor cu_rows, Tensor row_token, str w1_layout, str backend) -> Tensor",
    fake=_fake,
    reference=reference.up_wgrad,
    cute=_cute,
)

up_wgrad_add_ = define(
    "up_wgrad_add_(Tensor(a!) dw1, Tensor x, Tensor dh, Tensor cu_rows, Tensor row_token, str w1_layout, "
    "str backend) -> ()",
    fake=_fake_add,
    reference=reference.up_wgrad_add_,
    cute=_cute_add,
)
