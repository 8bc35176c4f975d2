"""up_proj: gather each row's token, multiply by its expert's w1, activate."""

from __future__ import annotations

from torch import Tensor

from sonicmoe import reference
from sonicmoe.activations import Activation
from sonicmoe.ops import _gemm
from sonicmoe.ops._op import define


def _fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    cu_rows: Tensor,
    row_token: Tensor,
    activation: str,
    w1_layout: str,
    keep_h: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    num_rows, width = row_token.shape[0], w1.shape[1]
    inter = width // 2 if Activation.parse(activation).gated else width
    return x.new_empty(num_rows if keep_h else 0, width), x.new_empty(num_rows, inter)


def _cute(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    cu_rows: Tensor,
    row_token: Tensor,
    activation: str,
    w1_layout: str,
    keep_h: bool,
) -> tuple[Tensor, Tensor]:
    h, a = _fake(x, w1, b1, cu_rows, row_token, activation, w1_layout, keep_h, "cute")
    inter = a.shape[1]
    if a.shape[0]:
        outputs = (h if keep_h else None, a, b1)
        form = (activation, w1_layout == "interleaved", w1.shape[1] // inter, b1 is not None, keep_h)
        _gemm.launch("up_proj", (x, row_token), w1, outputs, cu_rows, inter, x.shape[1], *form)
    return h, a


up_proj = define(
    "up_proj(Tensor x, Tensor w1, Tensor? b1, Tensor cu_rows, Tensor row_token, str activation, str w1_layout, "
    "bool keep_h, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.up_proj,
    cute=_cute,
)
