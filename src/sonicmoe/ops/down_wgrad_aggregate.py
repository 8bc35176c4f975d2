"""down_wgrad_aggregate_: w2's gradient and, beside it, the sum of each token's rows of x's.

The one is bound by products, the other by memory; neither reads what the other writes. The GEMM leaves some SMs, and
the sum takes those as soon as the GEMM has its own: by programmatic dependent launch, in one stream. One op, since a
launch in between would part them.
"""

from __future__ import annotations

from torch import Tensor

from sonicmoe import reference
from sonicmoe.ops import _gemm
from sonicmoe.ops._op import define
from sonicmoe.ops.aggregate import launch as launch_sum
from sonicmoe.ops.aggregate import outputs
from sonicmoe.ops.down_wgrad import launch as launch_gemm

# Both end together where the GEMM of I columns has I / 70 times as many SMs as the sum: measured on an H200
# (docs/notes/2026-11-28-beside.md). By their floors it would be I / 155, so 2.2 times fewer; the same factor is taken
# where rows are few and the GEMM's floor is to write dw2.
COLUMNS_OF_A_SUM = 70
MORE_THAN_FLOOR = 2.2


def spare_sms(sms: int, rows: int, experts: int, inter: int) -> int:
    """How many SMs the GEMM leaves, so that both end at the same time. Even: its CTAs may come in clusters of two."""
    gemm = inter * max(rows / COLUMNS_OF_A_SUM, MORE_THAN_FLOOR * experts)
    return int(sms * rows / (rows + gemm)) // 2 * 2


def _fake(
    dw2: Tensor,
    adds: bool,
    do: Tensor,
    a_s: Tensor,
    cu_rows: Tensor,
    row_token: Tensor,
    dx_rows: Tensor,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return outputs(dx_rows, None, parts, slot_row, cu_slots, do.shape[0], backend)


def _cute(
    dw2: Tensor,
    adds: bool,
    do: Tensor,
    a_s: Tensor,
    cu_rows: Tensor,
    row_token: Tensor,
    dx_rows: Tensor,
    parts: Tensor | None,
    slot_row: Tensor,
    cu_slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # Before the first launch: memory that is free only behind it must not be written beside it.
    dx, dscores = outputs(dx_rows, None, parts, slot_row, cu_slots, do.shape[0], "cute")
    spare = spare_sms(_gemm.processors(do.get_device()), a_s.shape[0], dw2.shape[0], a_s.shape[1])
    launch_gemm(dw2, adds, do, a_s, cu_rows, row_token, spare)
    launch_sum(dx_rows, None, parts, slot_row, cu_slots, dx, dscores, beside=True)
    return dx, dscores


down_wgrad_aggregate_ = define(
    "down_wgrad_aggregate_(Tensor(a!) dw2, bool adds, Tensor do, Tensor a_s, Tensor cu_rows, Tensor row_token, "
    "Tensor dx_rows, Tensor? parts, Tensor slot_row, Tensor? cu_slots, str backend) -> (Tensor, Tensor)",
    fake=_fake,
    reference=reference.down_wgrad_aggregate_,
    cute=_cute,
)
