"""Gradients of the logits from those of the kept pairs' scores, a token per warp; see `rounding_choose` for its lanes.

A chosen pair's score is a softmax over the token's chosen experts, any other pair's one over all, so that of logit j is

    [j kept] d_j s_j - [j chosen] p_j Σ d s over kept chosen - q_j Σ d s over kept others

with d the scores' gradients, s the scores, p and q the two softmaxes. The row stays in registers as exponentials, and
the few gradients of scores are read twice. They may be added to others.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from .access import DTYPES, address, load_or, reinterpret
from .logits import LARGEST, choose, finite, key_of, number_of, store_number, warp_greatest, warp_sum, working
from .rounding_choose import TokenRow, bit_of, bits
from .team import WARP, count_bits, lanes_below

WARPS = 8


@dataclass(frozen=True)
class RoundingBackward:
    row: TokenRow
    adds: bool

    @cute.jit
    def __call__(
        self,
        dscores: cute.Tensor,
        logits: cute.Tensor,
        cu_slots: cute.Tensor,
        chosen: cute.Tensor,
        kept: cute.Tensor,
        dlogits: cute.Tensor,
        stream,
    ):
        self.kernel(dscores, logits, cu_slots, chosen, kept, dlogits).launch(
            grid=[ceil_div(logits.shape[0], WARPS), 1, 1], block=[WARPS * WARP, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(
        self,
        dscores: cute.Tensor,
        logits: cute.Tensor,
        cu_slots: cute.Tensor,
        chosen: cute.Tensor,
        kept: cute.Tensor,
        dlogits: cute.Tensor,
    ):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        token = cta * WARPS + tid // WARP
        await_earlier()
        if token < logits.shape[0]:
            self.of_token(dscores, logits, cu_slots, chosen, kept, dlogits, token, tid % WARP)

    @cute.jit
    def of_token(self, dscores, logits, cu_slots, chosen, kept, dlogits, token: Int32, lane: Int32):
        row = self.row
        pieces = range(row.pieces)
        numbers = row.load(logits, token, lane)
        is_chosen, is_number = bits(row.pieces), bits(row.pieces)
        for i in cutlass.range_constexpr(ceil_div(row.pieces, WARP)):
            is_chosen[i] = Uint32(0)
            is_number[i] = Uint32(0)
        top = working(numbers[0])
        for i in pieces:
            mask, place = self.mask(chosen, token, i), Uint32(1 << (i % WARP))
            number = Boolean(numbers[i] >= Float32(-LARGEST)) & Boolean(numbers[i] <= Float32(LARGEST))
            is_chosen[i // WARP] = is_chosen[i // WARP] | choose(has(mask, lane), place, Uint32(0))
            is_number[i // WARP] = is_number[i // WARP] | choose(number, place, Uint32(0))
            top = cute.arch.fmax(top, working(numbers[i]))
        for i in cutlass.range_constexpr(ceil_div(row.pieces, WARP)):
            # Opaque: else the compiler would find what the bits are of, and keep that instead.
            is_chosen[i] = reinterpret(is_chosen[i], Uint32)
            is_number[i] = reinterpret(is_number[i], Uint32)
        top = finite(number_of(warp_greatest(key_of(top))))
        terms = row.terms(numbers, top)
        share_chosen, share_all = row.shares(terms, is_chosen)

        common, common_all = Float32(0.0), Float32(0.0)
        slot = cu_slots[token]
        for i in pieces:
            mask = self.mask(kept, token, i)
            product = self.gradient(dscores, slot, mask, lane) * terms[i]
            common = common + choose(bit_of(is_chosen, i), product, Float32(0.0))
            common_all = common_all + choose(bit_of(is_chosen, i), Float32(0.0), product)
            slot = slot + count_bits(mask)
        common = warp_sum(common) * share_chosen
        common_all = warp_sum(common_all) * share_all

        slot = cu_slots[token]
        for i in pieces:
            mask = self.mask(kept, token, i)
            d = self.gradient(dscores, slot, mask, lane)
            slot = slot + count_bits(mask)
            of_chosen = choose(bit_of(is_chosen, i), share_chosen, Float32(0.0))
            own = choose(bit_of(is_chosen, i), share_chosen, share_all)
            result = terms[i] * (d * own - of_chosen * common - share_all * common_all)
            result = choose(bit_of(is_number, i), result, Float32(0.0))
            if const_expr(self.adds):
                result = result + row.load_one(dlogits, token, i * WARP + lane, row.inside(i, lane))
            store_number(DTYPES[row.dtype], row.at(dlogits, token, i, lane), result, row.inside(i, lane))

    def mask(self, t: cute.Tensor, token: Int32, i: int) -> Uint32:
        """Of 32 experts. Read where it is needed, again if need be: the compiler would keep them all in registers."""
        return Uint32(load_or(address(t, token, self.row.pieces * 4) + 4 * i, Boolean(True), 0, Int32))

    def gradient(self, dscores: cute.Tensor, slot: Int32, mask: Uint32, lane: Int32) -> Float32:
        """Of a lane's pair; 0 where it is not kept. mask: of the kept ones; slot: the first of them."""
        own = slot + count_bits(mask & lanes_below(lane))
        return load_or(address(dscores, own, 4), has(mask, lane), 0.0, Float32)


def has(mask: Uint32, lane: Int32) -> Boolean:
    return Boolean(((mask >> Uint32(lane)) & Uint32(1)) != 0)
