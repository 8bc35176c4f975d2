"""The load balancing loss and its gradient, in one pass over the logits each.

The loss is linear in the mean probabilities, E / (T T K) * sum over t and e of rows_e * p_te, so that a token adds one
number, the mean of rows_e under its own softmax, and no column has to be summed. A warp takes every so many-th token,
its row in registers and the experts' rows in shared memory; a CTA leaves one part, and a second launch of one warp adds
the parts. Every sum has an order that follows from T alone.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from .access import address, load_or, reinterpret
from .logits import LARGEST, Row, choose, load_row, softmax_terms, warp_sum
from .team import WARP, shared
from .words import load_words

WARPS = 8
MAX_CTAS = 1024


@dataclass(frozen=True)
class Tokens:
    """What forward and backward do with a token. top: experts per token."""

    row: Row
    top: int
    warps: int = WARPS

    @property
    def columns(self) -> int:
        """Of all pieces of a row, past its end too"""
        return self.row.pieces * WARP * self.row.together

    def factor(self, logits: cute.Tensor) -> Float32:
        tokens = Float32(logits.shape[0])
        return Float32(self.row.size / self.top) / tokens / tokens

    @cute.jit
    def load_counts(self, cu_rows: cute.Tensor):
        """The experts' rows in shared memory, 0 past the last expert."""
        tid, _, _ = cute.arch.thread_idx()
        counts = shared(Float32, self.columns)
        for e in cutlass.range(tid, self.columns, self.warps * WARP, unroll=1):
            valid = Boolean(e < self.row.size)
            first = load_or(address(cu_rows, e, 4), valid, 0, Int32)
            end = load_or(address(cu_rows, e + 1, 4), valid, 0, Int32)
            counts[e] = Float32(end - first)
        cute.arch.sync_threads()
        return counts

    def token(self, logits: cute.Tensor, counts: cute.Tensor, token: Int32, lane: Int32) -> tuple:
        """(terms of the softmax, reciprocal of their sum, the lane's part of sum of terms * rows, greatest logit)"""
        terms, top, rest = softmax_terms(load_row(self.row, logits, token, lane))
        part = Float32(0.0)
        for piece in range(self.row.pieces):
            for term, rows in zip(self.row.piece_of(terms, piece), self.rows(counts, piece, lane), strict=True):
                part = part + term * rows
        return terms, rest, part, top

    def rows(self, counts: cute.Tensor, piece: int, lane: Int32) -> list:
        """Those of the experts of a lane's piece; not kept, because registers hold one row of 4096 and not two."""
        source = Int32(counts.iterator.toint()) + self.row.first(piece, lane) * 4
        return [reinterpret(word, Float32) for word in load_words(source, self.row.together, anew=True)]


@dataclass(frozen=True)
class Balance:
    tokens: Tokens

    @cute.jit
    def __call__(self, logits: cute.Tensor, cu_rows: cute.Tensor, parts: cute.Tensor, loss: cute.Tensor, stream):
        threads = const_expr(self.tokens.warps * WARP)
        self.sum_tokens(logits, cu_rows, parts).launch(
            grid=[parts.shape[0], 1, 1], block=[threads, 1, 1], stream=stream, use_pdl=True
        )
        self.sum_parts(parts, loss).launch(grid=[1, 1, 1], block=[WARP, 1, 1], stream=stream, use_pdl=True)

    @cute.kernel
    def sum_tokens(self, logits: cute.Tensor, cu_rows: cute.Tensor, parts: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        warps = const_expr(self.tokens.warps)
        await_earlier()
        counts = self.tokens.load_counts(cu_rows)
        sums = shared(Float32, warps)
        mine = Float32(0.0)
        for token in cutlass.range(cta * warps + warp, logits.shape[0], ctas * warps, unroll=1):
            _, rest, part, _ = self.tokens.token(logits, counts, token, lane)
            mine = mine + part * rest
        mine = warp_sum(mine)
        if lane == 0:
            sums[warp] = mine
        cute.arch.sync_threads()
        if tid == 0:
            total = Float32(0.0)
            for w in cutlass.range_constexpr(warps):
                total = total + sums[w]
            parts[cta] = total * self.tokens.factor(logits)

    @cute.kernel
    def sum_parts(self, parts: cute.Tensor, loss: cute.Tensor):
        lane, _, _ = cute.arch.thread_idx()
        await_earlier()
        mine = Float32(0.0)
        for i in cutlass.range_constexpr(MAX_CTAS // WARP):
            part = i * WARP + lane
            mine = mine + load_or(address(parts, part, 4), Boolean(part < parts.shape[0]), 0.0, Float32)
        total = warp_sum(mine)
        if lane == 0:
            loss[0] = total


@dataclass(frozen=True)
class BalanceBackward:
    tokens: Tokens

    @cute.jit
    def __call__(self, dloss: cute.Tensor, logits: cute.Tensor, cu_rows: cute.Tensor, dlogits: cute.Tensor, stream):
        warps = const_expr(self.tokens.warps)
        ctas = cutlass.min(ceil_div(logits.shape[0], warps), MAX_CTAS)
        self.kernel(dloss, logits, cu_rows, dlogits).launch(
            grid=[ctas, 1, 1], block=[warps * WARP, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, dloss: cute.Tensor, logits: cute.Tensor, cu_rows: cute.Tensor, dlogits: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        warps = const_expr(self.tokens.warps)
        await_earlier()
        counts = self.tokens.load_counts(cu_rows)
        factor = self.tokens.factor(logits) * dloss[0]
        for token in cutlass.range(cta * warps + warp, logits.shape[0], ctas * warps, unroll=1):
            terms, rest, part, top = self.tokens.token(logits, counts, token, lane)
            mean = warp_sum(part) * rest
            # A logit of +inf has no gradient, and leaves no probability to any that is less.
            scale = choose(top < Float32(LARGEST), factor * rest, Float32(0.0))
            self.store(dlogits, token, lane, terms, mean, scale, counts)

    def store(self, dlogits, token: Int32, lane: Int32, terms: list, mean: Float32, scale: Float32, counts) -> None:
        row = self.tokens.row
        for piece in range(row.pieces):
            rows = self.tokens.rows(counts, piece, lane)
            values = [term * (r - mean) * scale for term, r in zip(row.piece_of(terms, piece), rows, strict=True)]
            row.store(dlogits, token, piece, lane, values)
