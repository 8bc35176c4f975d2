"""The logits' gradients from those of the scores: one warp per token.

The scores are computed anew from the logits, so that nothing but logits and ids is kept. A token's row is first written
as if nothing were chosen, zeros or the softmax's common term, in whole chunks; then the lanes of the chosen experts
overwrite theirs. Reads K logits of a token, all E for a softmax over all; keeps that row in registers. If it adds to
gradients that are there, it reads and writes those of the chosen experts alone, but for a softmax over all.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from .access import address, load_or
from .logits import Row, load_row, softmax_terms, working
from .scores import Scores
from .team import WARP

WARPS = 8


@dataclass(frozen=True)
class TopKBackward:
    row: Row
    top: int
    scores: Scores
    adds: bool

    @cute.jit
    def __call__(self, dscores: cute.Tensor, ids: cute.Tensor, logits: cute.Tensor, dlogits: cute.Tensor, stream):
        self.kernel(dscores, ids, logits, dlogits).launch(
            grid=[ceil_div(logits.shape[0], WARPS), 1, 1], block=[WARPS * WARP, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, dscores: cute.Tensor, ids: cute.Tensor, logits: cute.Tensor, dlogits: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        token, lane = cta * WARPS + tid // WARP, tid % WARP
        await_earlier()
        if token < logits.shape[0]:
            experts, dchosen, chosen = self.load_chosen(dscores, ids, logits, token, lane)
            weights, top, rest = [], Float32(0.0), Float32(1.0)
            if const_expr(self.scores.over_all):
                weights, top, rest = softmax_terms(load_row(self.row, logits, token, lane))
            gradients, common = self.scores.gradients(self.scores.terms(chosen, top, rest), dchosen)
            valid = [Boolean(i * WARP + lane < self.top) for i in range(len(experts))]
            if const_expr(self.adds):
                there = [self.row.load_one(dlogits, token, e, v) for e, v in zip(experts, valid, strict=True)]
                gradients = [t + g for t, g in zip(there, gradients, strict=True)]
                cute.arch.sync_warp()
            if const_expr(self.scores.over_all or not self.adds):
                self.store_others(dlogits, token, lane, weights, -common * rest)
                cute.arch.sync_warp()
            for expert, gradient, v in zip(experts, gradients, valid, strict=True):
                self.row.store_one(dlogits, token, expert, gradient, v)

    def load_chosen(self, dscores, ids, logits, token: Int32, lane: Int32) -> tuple:
        """(experts, gradients of their scores, their logits) of a lane's slots"""
        experts, dchosen, chosen = [], [], []
        for i in range(ceil_div(self.top, WARP)):
            slot = i * WARP + lane
            valid = Boolean(slot < self.top)
            expert = load_or(address(ids, token, self.top * 4) + slot * 4, valid, 0, Int32)
            experts.append(expert)
            dchosen.append(load_or(address(dscores, token, self.top * 4) + slot * 4, valid, 0.0, Float32))
            chosen.append(working(self.row.load_one(logits, token, expert, valid)))
        return experts, dchosen, chosen

    def store_others(self, dlogits, token: Int32, lane: Int32, weights: list, factor: Float32) -> None:
        for piece in range(self.row.pieces):
            values = [w * factor for w in self.row.piece_of(weights, piece)] or [Float32(0.0)] * self.row.together
            if self.adds:
                there = self.row.load(dlogits, token, piece, lane)
                values = [t + value for t, value in zip(there, values, strict=True)]
            self.row.store(dlogits, token, piece, lane, values)
