"""down_wgrad: w2's gradient, over each expert's rows of gathered dO and weighted activations."""

from __future__ import annotations

from torch import Tensor

from sonicmoe import reference
from sonicmoe.ops import _gemm
from sonicmoe.ops._op import define


def _fake(do: Tensor, a_s: Tensor, cu_rows: Tensor, row_token: Tensor, backend: str) -> Tensor:
    return do.new_empty(cu_rows.shape[0] - 1, do.shape[1], a_s.shape[1])


def _fake_add(dw2: Tensor, do: Tensor, a_s: Tensor, cu_rows: Tensor, row_token: Tensor, backend: str) -> None:
    return None


def launch(
    dw2: Tensor, adds: bool, do: Tensor, a_s: Tensor, cu_rows: Tensor, row_token: Tensor, spare: int = 0
) -> None:
    """Into dw2, or added to it; but for `spare` of the device's SMs."""
    if a_s.shape[0]:
        variant = "down_wgrad_add" if adds else "down_wgrad"
        _gemm.check_gathered("do", do)
        _gemm.launch(variant, (do, row_token), a_s, (dw2,), cu_rows, a_s.shape[1], do.shape[1], spare=spare)
    elif not adds:
        dw2.zero_()


def _cute(do: Tensor, a_s: Tensor, cu_rows: Tensor, row_token: Tensor) -> Tensor:
    dw2 = _fake(do, a_s, cu_rows, row_token, "cute")
    launch(dw2, False, do, a_s, cu_rows, row_token)
    return dw2


def _cute_add(dw2: Tensor, do: Tensor, a_s: Tensor, cu_rows: Tensor, row_token: Tensor) -> None:
    launch(dw2, True, do, a_s, cu_rows, row_token)


down_wgrad = define(
    "down_wgrad(Tensor do, Tensor a_s, Tensor cu_rows, Tensor row_token, str backend) -> Tensor",
    fake=_fake,
    reference=reference.down_wgrad,
    cute=_cute,
)

down_wgrad_add_ = define(
    "down_wgrad_add_(Tensor(a!) dw2, Tensor do, Tensor a_s, Tensor cu_rows, Tensor row_token, str backend) -> ()",
    fake=_fake_add,
    reference=reference.down_wgrad_add_,
    cute=_cute_add,
)
