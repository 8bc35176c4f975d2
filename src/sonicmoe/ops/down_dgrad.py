"""down_dgrad: gather each row's dO, multiply by its expert's w2, and differentiate activation and score.

down_dgrad_ is the same with dh in the place of h, which it returns without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sonicmoe import reference
from sonicmoe.cute_kernels.bias_dot import BiasDotSpec
from sonicmoe.ops import _gemm
from sonicmoe.ops._cute import aligned, dtype_name, kernel
from sonicmoe.ops._op import define


def _buffers(do: Tensor, w2: Tensor, num_rows: int, parts_per_row: int) -> tuple[Tensor, Tensor]:
    """a_s, and the parts in which a row's score gradient leaves the body."""
    parts_dtype = torch.promote_types(do.dtype, torch.float32)
    return do.new_empty(num_rows, w2.shape[2]), do.new_empty(num_rows, parts_per_row, dtype=parts_dtype)


def _form(w2: Tensor, b2: Tensor | None, h: Tensor, dtype: str, activation: str) -> tuple[Any, ...]:
    """Arguments of `_gemm.spec_of`, without the device. Sizes of weights do not change: symbols of them are fixed."""
    experts, hidden, inter = map(int, w2.shape)
    return "down_dgrad", experts, inter, hidden, dtype, activation, False, int(h.shape[1]) // inter, b2 is not None


def _fake(
    do: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    h: Tensor,
    scores: Tensor,
    cu_rows: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    per_row = 1
    if backend == "cute":
        form = _form(w2, b2, h, dtype_name("do", do), activation)
        per_row = _gemm.spec_of(do.device.index or 0, *form).part_columns
    return do.new_empty(*h.shape), *_buffers(do, w2, row_token.shape[0], per_row)


def _fake_over_h(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _fake(*arguments)[1:]


def _cute(do: Tensor, w2: Tensor, b2: Tensor | None, h: Tensor, *of_rows: Any) -> tuple[Tensor, Tensor, Tensor]:
    dh = do.new_empty(*h.shape)
    return dh, *_launch(dh, do, w2, b2, h, *of_rows)


def _cute_over_h(do: Tensor, w2: Tensor, b2: Tensor | None, h: Tensor, *of_rows: Any) -> tuple[Tensor, Tensor]:
    return _launch(h, do, w2, b2, h, *of_rows)


def _launch(
    dh: Tensor,
    do: Tensor,
    w2: Tensor,
    b2: Tensor | None,
    h: Tensor,
    scores: Tensor,
    cu_rows: Tensor,
    row_token: Tensor,
    row_slot: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Into dh, which may be h: a CTA reads an element of h before it writes that of dh, and no other CTA needs it."""
    dtype = dtype_name("do", do)
    form = _form(w2, b2, h, dtype, activation)
    per_row = _gemm.spec_of(do.device.index, *form).part_columns
    a_s, parts = _buffers(do, w2, row_token.shape[0], per_row)
    if row_token.shape[0]:
        outputs = (h, dh, a_s, scores, row_slot, parts)
        variant, _, inter, hidden, _, *rest = form
        _gemm.launch(variant, (do, row_token), w2, outputs, cu_rows, inter, hidden, *rest)
        if b2 is not None:
            _, function = kernel(do, BiasDotSpec, do.shape[1], dtype, b2.shape[0], per_row)
            function(aligned(do), b2, cu_rows, row_token, parts)
    return a_s, parts


down_dgrad = define(
    "down_dgrad(Tensor do, Tensor w2, Tensor? b2, Tensor h, Tensor scores, Tensor cu_rows, Tensor row_token, "
    "Tensor row_slot, str activation, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    reference=reference.down_dgrad,
    cute=_cute,
)

down_dgrad_ = define(
    "down_dgrad_(Tensor do, Tensor w2, Tensor? b2, Tensor(a!) h, Tensor scores, Tensor cu_rows, Tensor row_token, "
    "Tensor row_slot, str activation, str backend) -> (Tensor, Tensor)",
    fake=_fake_over_h,
    reference=reference.down_dgrad_,
    cute=_cute_over_h,
)
