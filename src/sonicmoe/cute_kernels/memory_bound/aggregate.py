"""Sums of gathered rows: o[t] = sum over token t's slots s of scores[s] * rows[slot_row[s]], in fp32, in slot order.

A thread owns 16 bytes of one token's row and reads them from all of the token's rows, `unroll` at a time, all of whose
loads are in flight together while the indices of the next ones come. Nothing is shared between threads. A row that is
wider than THREADS chunks is cut into equal pieces, each worked on by its own CTA; short rows share a CTA. The CTAs
after those of the tokens sum the parts of the scores' gradients, one slot per thread.

beside: it needs nothing of the launch before it and begins as soon as all CTAs of that have, on the SMs that they
leave. Its last CTA outlasts that launch, so that whatever comes after this kernel comes after both.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from .access import CHUNK, DTYPES, address, chunk_of, load_once, load_or, numbers, store_chunk

THREADS = 256
FIXED_UNROLL = 8
# With a variable number of rows per token, often few, unused predicated loads would cost more than they hide.
RAGGED_UNROLL = 4


@dataclass(frozen=True)
class Aggregate:
    width: int
    dtype: str
    slots_per_token: int | None
    weighted: bool
    parts: int
    beside: bool

    @property
    def chunks(self) -> int:
        return self.width * 2 // CHUNK

    @property
    def pieces(self) -> int:
        return ceil_div(self.chunks, THREADS)

    @property
    def lanes(self) -> int:
        """Threads of a piece of a row"""
        return ceil_div(self.chunks, self.pieces)

    @property
    def tokens(self) -> int:
        """Of a CTA"""
        return max(1, THREADS // self.lanes)

    @property
    def unroll(self) -> int:
        if self.slots_per_token is None:
            return RAGGED_UNROLL
        return ceil_div(self.slots_per_token, ceil_div(self.slots_per_token, FIXED_UNROLL))

    @cute.jit
    def __call__(
        self,
        rows: cute.Tensor,
        scores: cute.Tensor | None,
        parts: cute.Tensor | None,
        slot_row: cute.Tensor,
        cu_slots: cute.Tensor | None,
        o: cute.Tensor,
        dscores: cute.Tensor | None,
        stream,
    ):
        row_ctas = ceil_div(o.shape[0], self.tokens) * self.pieces
        threads = const_expr(self.tokens * self.lanes)
        score_ctas = ceil_div(slot_row.shape[0], threads) if const_expr(self.parts) else 0
        self.kernel(rows, scores, parts, slot_row, cu_slots, o, dscores, row_ctas).launch(
            grid=[row_ctas + score_ctas, 1, 1], block=[threads, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        rows: cute.Tensor,
        scores: cute.Tensor | None,
        parts: cute.Tensor | None,
        slot_row: cute.Tensor,
        cu_slots: cute.Tensor | None,
        o: cute.Tensor,
        dscores: cute.Tensor | None,
        row_ctas: Int32,
    ):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        if const_expr(not self.beside):
            await_earlier()
        if cta < row_ctas:
            piece = cta % self.pieces
            token = cta // self.pieces * self.tokens + tid // self.lanes
            chunk = piece * self.lanes + tid % self.lanes
            if token < o.shape[0] and chunk < self.chunks:
                self.sum_rows(rows, scores, slot_row, cu_slots, o, token, chunk)
        if const_expr(self.parts):
            slot = (cta - row_ctas) * (self.tokens * self.lanes) + tid
            if cta >= row_ctas and slot < slot_row.shape[0]:
                self.sum_parts(parts, slot_row, dscores, slot)
        if const_expr(self.beside):
            if cta == cute.arch.grid_dim()[0] - 1:
                await_earlier()

    @cute.jit
    def sum_rows(self, rows, scores, slot_row, cu_slots, o, token, chunk):
        row_bytes = const_expr(self.width * 2)
        column = Int32(chunk * CHUNK)
        total = cute.make_rmem_tensor(cute.make_layout(8), Float32)
        total.fill(0.0)
        index = cute.make_rmem_tensor(cute.make_layout(self.unroll), Int32)
        weight = cute.make_rmem_tensor(cute.make_layout(self.unroll), Float32)
        if const_expr(self.slots_per_token is None):
            first, last = cu_slots[token], cu_slots[token + 1]
            self.load_slots(slot_row, scores, index, weight, first, last)
            slot = first
            while slot < last:
                slot += self.unroll
                self.add_rows(rows, slot_row, scores, index, weight, total, column, slot, last)
        else:
            first = token * self.slots_per_token
            last = first + self.slots_per_token
            self.load_slots(slot_row, scores, index, weight, first, last)
            for done in cutlass.range_constexpr(0, self.slots_per_token, self.unroll):
                slot = first + (done + self.unroll)
                self.add_rows(rows, slot_row, scores, index, weight, total, column, slot, last)
        store_chunk(address(o, token, row_bytes) + column, chunk_of(DTYPES[self.dtype], total))

    @cute.jit
    def load_slots(self, slot_row, scores, index, weight, slot, last):
        for i in cutlass.range_constexpr(self.unroll):
            index[i] = load_or(address(slot_row, slot + i, 4), slot + i < last, -1, Int32)
            if const_expr(self.weighted):
                weight[i] = load_or(address(scores, slot + i, 4), slot + i < last, 0.0, Float32)

    @cute.jit
    def add_rows(self, rows, slot_row, scores, index, weight, total, column, next_slot, last):
        """Adds the rows whose indices and weights are at hand; leaves there those of the slots from next_slot on."""
        row_bytes = const_expr(self.width * 2)
        chunks, weights = [], []
        for i in cutlass.range_constexpr(self.unroll):
            chunks.append(load_once(address(rows, index[i], row_bytes) + column, index[i] >= 0))
            weights.append(weight[i])
        if next_slot < last:
            self.load_slots(slot_row, scores, index, weight, next_slot, last)
        for i in cutlass.range_constexpr(self.unroll):
            for j, value in enumerate(numbers(DTYPES[self.dtype], chunks[i])):
                total[j] += value * weights[i] if const_expr(self.weighted) else value

    @cute.jit
    def sum_parts(self, parts, slot_row, dscores, slot):
        row = slot_row[slot]
        total = Float32(0.0)
        for j in cutlass.range(self.parts, unroll=8):
            total += load_or(address(parts, row, self.parts * 4) + j * 4, row >= 0, 0.0, Float32)
        dscores[slot] = total
