"""Third step of token rounding: the kept pairs as slots in the tokens' order and rows in the experts'.

A CTA takes 32 tokens. The masks of an expert's tokens, transposed in a warp, are the masks of a token's experts: their
running counts are the slots. The rows are known already: where the expert's begin, and how many of it are kept before
these 32 tokens. What is left over, slots and rows past the last pair, is cleared.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from .access import address, load_or
from .rounding_choose import Softmax, TokenRow, load_softmax, lowest_bit, score_of
from .team import WARP, count_bits, lanes_below, scan_in_place, shared, team_sum, transpose_bits, warp_scan

WARPS = 8
THREADS = WARPS * WARP


def load_pair(source, valid: Boolean):
    """Two neighbouring words; zeros, and no access, where not valid."""
    return cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r1}, 0; mov.b32 {$w0}, 0; mov.b32 {$w1}, 0;"
        " @p ld.global.v2.b32 {{$w0}, {$w1}}, [{$r0}];}",
        write_only_types=[Uint32, Int32],
        read_only_args=[source, Int32(valid)],
    )


class Group(NamedTuple):
    """A lane's pairs with 32 experts."""

    number: Int32  # of the group
    experts: Uint32  # a bit for each that keeps the lane's token
    slot: Int32  # of the first
    softmax: Softmax  # of the token


@dataclass(frozen=True)
class Pairs:
    row: TokenRow

    @property
    def experts(self) -> int:
        return self.row.experts

    @property
    def groups(self) -> int:
        """Of 32 experts"""
        return ceil_div(self.experts, WARP)

    @cute.kernel
    def kernel(
        self,
        logits: cute.Tensor,
        softmax: cute.Tensor,
        chosen: cute.Tensor,
        state: cute.Tensor,
        marks: cute.Tensor,
        scores: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor,
        row_slot: cute.Tensor,
        slot_row: cute.Tensor,
        cu_slots: cute.Tensor,
        kept: cute.Tensor,
    ):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        groups = const_expr(self.groups)
        rows, masks = shared(Int32, groups * WARP), shared(Uint32, groups * WARP)
        of_token, slots = shared(Uint32, groups, WARP), shared(Int32, groups, WARP)
        sums, scan = shared(Int32, 2, WARPS), shared(Int32, WARPS)
        await_earlier()
        for e in cutlass.range(tid, groups * WARP, THREADS):
            rows[e] = 0
            if e < self.experts:
                rows[e] = state[self.experts + e]
        total = Int32(0)
        for j in cutlass.range(tid, cta, THREADS):
            total += state[2 * self.experts + j]
        first_slot = team_sum(total, sums, Int32(0), WARPS)
        used = scan_in_place(rows, groups * WARP, scan, THREADS)
        if cta == 0:
            for e in cutlass.range(tid, self.experts, THREADS):
                cu_rows[e] = rows[e]
            if tid == 0:
                cu_rows[self.experts] = used
                cu_slots[cu_slots.shape[0] - 1] = used
            cute.arch.sync_threads()
        for g in cutlass.range(warp, groups, WARPS, unroll=1):
            e = g * WARP + lane
            source = address(marks, cta, self.experts * 8) + e * 8
            mask, before = load_pair(source, Boolean(e < self.experts))
            masks[e] = mask
            rows[e] += before
            of_token[g, lane] = transpose_bits(mask, lane)
        cute.arch.sync_threads()
        if warp == 0:
            self.number_slots(cu_slots, kept, of_token, slots, first_slot)
        cute.arch.sync_threads()
        softmax_of_token = load_softmax(softmax, cta * WARP + lane, Boolean(cta * WARP + lane < logits.shape[0]))
        for g in cutlass.range(warp, groups, WARPS, unroll=1):
            pairs = Group(g, of_token[g, lane], slots[g, lane], softmax_of_token)
            self.write_pairs(logits, chosen, scores, row_token, row_slot, slot_row, rows, masks, pairs)
        ctas, _, _ = cute.arch.grid_dim()
        for i in cutlass.range(used + cta * THREADS + tid, scores.shape[0], ctas * THREADS, unroll=1):
            scores[i] = Float32(0.0)
            slot_row[i] = -1
            row_token[i] = 0
            row_slot[i] = 0

    @cute.jit
    def number_slots(self, cu_slots, kept, of_token, slots, first_slot: Int32):
        """One warp, a token per lane: the first slot of each group of experts."""
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        lane = tid % WARP
        token = cta * WARP + lane
        tokens = kept.shape[0]
        count = Int32(0)
        for g in cutlass.range(self.groups, unroll=4):
            slots[g, lane] = count
            count += count_bits(of_token[g, lane])
            if token < tokens:
                kept[token, g] = Int32(of_token[g, lane])
        first = first_slot + warp_scan(count, lane) - count
        if token < tokens:
            cu_slots[token] = first
        for g in cutlass.range(self.groups, unroll=4):
            slots[g, lane] += first

    @cute.jit
    def write_pairs(self, logits, chosen, scores, row_token, row_slot, slot_row, rows, masks, pairs: Group):
        """A lane: the pairs of its token with the experts of a group, in their order."""
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        lane = tid % WARP
        token = cta * WARP + lane
        experts, slot = pairs.experts, pairs.slot
        word = address(chosen, token, self.groups * 4) + 4 * pairs.number
        chosen_experts = Uint32(load_or(word, Boolean(experts != 0), 0, Int32))
        while experts != 0:
            place = lowest_bit(experts)
            expert = pairs.number * WARP + place
            experts = experts & (experts - Uint32(1))
            logit = self.row.load_one(logits, token, expert, Boolean(True))
            is_chosen = Boolean(((chosen_experts >> Uint32(place)) & Uint32(1)) != 0)
            row = rows[expert] + count_bits(masks[expert] & lanes_below(lane))
            scores[slot] = score_of(logit, pairs.softmax, is_chosen)
            slot_row[slot] = row
            row_token[row] = token
            row_slot[row] = slot
            slot += 1
