"""Products of gathered rows with their group's bias: <dO[row_token[r]], b2[e]>, a row's part of its score's gradient.

CTAS CTAs share a group's rows; a warp takes one row at a time, 16 bytes a lane, and the lanes' sums meet by shuffles.
The order of every addition is fixed by the width alone.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from ..dependent import await_earlier
from .access import CHUNK, DTYPES, address, load_chunk, numbers
from .team import WARP

CTAS = 16
WARPS = 8


@dataclass(frozen=True)
class BiasDot:
    width: int
    dtype: str
    groups: int
    columns: int

    @property
    def chunks(self) -> int:
        return self.width * 2 // CHUNK

    @cute.jit
    def __call__(
        self,
        tokens: cute.Tensor,
        bias: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor,
        parts: cute.Tensor,
        stream,
    ):
        self.kernel(tokens, bias, cu_rows, row_token, parts).launch(
            grid=[CTAS, self.groups, 1], block=[WARPS * WARP, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        tokens: cute.Tensor,
        bias: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor,
        parts: cute.Tensor,
    ):
        cta, group, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        await_earlier()
        row = cu_rows[group] + cta * WARPS + tid // WARP
        last = cu_rows[group + 1]
        while row < last:
            self.dot(tokens, bias, row_token, parts, group, row, tid % WARP)
            row += CTAS * WARPS

    @cute.jit
    def dot(self, tokens, bias, row_token, parts, group: Int32, row: Int32, lane: Int32):
        """One warp: one row."""
        row_bytes = const_expr(self.width * 2)
        token, of_group = address(tokens, row_token[row], row_bytes), address(bias, group, row_bytes)
        total = Float32(0.0)
        for first in cutlass.range_constexpr(0, self.chunks, WARP):
            inside = Boolean(first + lane < self.chunks)
            byte = (first + lane) * CHUNK
            left = numbers(DTYPES[self.dtype], load_chunk(token + byte, inside))
            right = numbers(DTYPES[self.dtype], load_chunk(of_group + byte, inside))
            for j in cutlass.range_constexpr(8):
                total += left[j] * right[j]
        for i in cutlass.range_constexpr(5):
            total += cute.arch.shuffle_sync_bfly(total, 1 << i)
        if lane == 0:
            parts[row, self.columns - 1] = total
