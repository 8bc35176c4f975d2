"""Sums over each expert's rows, in fp32: one CTA per expert and block of COLUMNS columns.

Eight threads read a row's block, 16 bytes each; GROUPS such groups take the expert's rows in turns, UNROLL rows at a
time in flight, and their sums meet in shared memory, added in the order of the groups. So the order of every addition
is fixed by the row numbers alone.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from .access import DTYPES, address, load_chunk, load_or, numbers

THREADS = 256
COLUMNS = 64
LANES = COLUMNS // 8
GROUPS = THREADS // LANES
UNROLL = 4


@dataclass(frozen=True)
class BiasGrad:
    width: int
    dtype: str
    gathered: bool
    weighted: bool

    @cute.jit
    def __call__(
        self,
        rows: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor | None,
        scores: cute.Tensor | None,
        row_slot: cute.Tensor | None,
        out: cute.Tensor,
        stream,
    ):
        self.kernel(rows, cu_rows, row_token, scores, row_slot, out).launch(
            grid=[ceil_div(self.width, COLUMNS), out.shape[0], 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        rows: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor | None,
        scores: cute.Tensor | None,
        row_slot: cute.Tensor | None,
        out: cute.Tensor,
    ):
        block, expert, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        group, lane = tid // LANES, tid % LANES
        column = block * COLUMNS + lane * 8
        total = cute.make_rmem_tensor(cute.make_layout(8), Float32)
        total.fill(0.0)
        await_earlier()
        if column < self.width:
            first, last = cu_rows[expert], cu_rows[expert + 1]
            self.sum_rows(rows, row_token, scores, row_slot, total, first + group, last, Int32(column * 2))
        sums = cute.make_tensor(
            cute.arch.alloc_smem(Float32, GROUPS * COLUMNS, alignment=16),
            cute.make_layout((GROUPS, COLUMNS), stride=(COLUMNS, 1)),
        )
        for j in cutlass.range_constexpr(8):
            sums[group, lane * 8 + j] = total[j]
        cute.arch.sync_threads()
        column = block * COLUMNS + tid
        if tid < COLUMNS and column < self.width:
            of_column = Float32(0.0)
            for i in cutlass.range_constexpr(GROUPS):
                of_column += sums[i, tid]
            out[expert, column] = of_column

    @cute.jit
    def sum_rows(self, rows, row_token, scores, row_slot, total, row, last, byte):
        """Adds 8 columns of every GROUPS-th row from `row` on; indices and weights come one batch ahead."""
        index = cute.make_rmem_tensor(cute.make_layout(UNROLL), Int32)
        weight = cute.make_rmem_tensor(cute.make_layout(UNROLL), Float32)
        self.load_indices(row_token, scores, row_slot, index, weight, row, last)
        while row < last:
            chunks, weights = [], []
            for i in cutlass.range_constexpr(UNROLL):
                valid = row + i * GROUPS < last
                chunks.append(load_chunk(address(rows, index[i], self.width * 2) + byte, valid))
                weights.append(weight[i])
            row += UNROLL * GROUPS
            self.load_indices(row_token, scores, row_slot, index, weight, row, last)
            for i in cutlass.range_constexpr(UNROLL):
                for j, value in enumerate(numbers(DTYPES[self.dtype], chunks[i])):
                    total[j] += value * weights[i] if const_expr(self.weighted) else value

    @cute.jit
    def load_indices(self, row_token, scores, row_slot, index, weight, row, last):
        for i in cutlass.range_constexpr(UNROLL):
            r = row + i * GROUPS
            if const_expr(self.gathered):
                index[i] = load_or(address(row_token, r, 4), r < last, 0, Int32)
            else:
                index[i] = r
            if const_expr(self.weighted):
                slot = load_or(address(row_slot, r, 4), r < last, 0, Int32)
                weight[i] = load_or(address(scores, slot, 4), r < last, 0.0, Float32)
