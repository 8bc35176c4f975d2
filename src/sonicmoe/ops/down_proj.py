"""down_proj: multiply the activated rows by their expert's w2."""

from __future__ import annotations

from torch import Tensor

from sonicmoe import reference
from sonicmoe.ops import _gemm
from sonicmoe.ops._op import define


def _fake(a: Tensor, w2: Tensor, b2: Tensor | None, cu_rows: Tensor, backend: str) -> Tensor:
    return a.new_empty(a.shape[0], w2.shape[1])


def _cute(a: Tensor, w2: Tensor, b2: Tensor | None, cu_rows: Tensor) -> Tensor:
    y = _fake(a, w2, b2, cu_rows, "cute")
    if y.shape[0]:
        form = (None, False, 1, b2 is not None)
        _gemm.launch("down_proj", (a,), w2, (y, b2), cu_rows, w2.shape[1], w2.shape[2], *form)
    return y


down_proj = define(
    "down_proj(Tensor a, Tensor w2, Tensor? b2, Tensor cu_rows, str backend) -> Tensor",
    fake=_fake,
    reference=reference.down_proj,
    cute=_cute,
)
