"""First step of token rounding: every token's top-K, and what each expert has to know of 32 tokens at a time.

A warp takes a token, whose logits it keeps in registers, expert e in lane e % 32. The K-th greatest logit is found by
bisecting the integers that are ordered as floats: a count over the warp says on which side it is, and a count of
exactly K ends the search. That needs about as many steps as it takes bits to tell the K-th from the next one, whatever
K is.

A pair's key is the bits of its score, which lies in [0, 1], with the second highest bit set if top-K chose the pair.
Keys are not written: of each expert and 32 tokens, a tile, only which tokens chose the expert, the greatest key of the
others, and the least key of those. These tell the next step in which few tiles its threshold lies, and there it
computes the keys again, from the logits and three numbers of each token, by the same instructions.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from ..ptx import exp2, reciprocal
from .access import DTYPES, address, load_chunk, reinterpret, store_chunk
from .logits import LOWEST_KEY, choose, exp, finite, key_of, load_number, number_of, warp_greatest, warp_sum, working
from .team import WARP, change_shared, count_bits, lanes_below, shared, transpose_bits
from .words import ballot

CHOSEN = 1 << 30
ABSENT = -1
LOG2_E = math.log2(math.e)
WARPS = 8
THREADS = WARPS * WARP


def magnitude(number: Float32) -> Float32:
    return cute.arch.inline_ptx("abs.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[number])


def score_bits(score: Float32) -> Int32:
    """Of a score that may have a sign."""
    return reinterpret(score, Int32) & (CHOSEN - 1)


def one_more_if_reached(count: Int32, number: Float32, least: Float32) -> Int32:
    """In two instructions."""
    return cute.arch.inline_ptx(
        "{.reg .pred p; mov.b32 {$w0}, {$r2}; setp.ge.f32 p, {$r0}, {$r1}; @p add.s32 {$w0}, {$w0}, 1;}",
        write_only_types=[Int32],
        read_only_args=[number, least, count],
    )


def lowest_bit(mask: Uint32) -> Int32:
    """The number of the lowest bit that is set, 32 if there is none."""
    return count_bits((mask & (Uint32(0) - mask)) - Uint32(1))


def add_global_int(target: Int64, value: Int32):
    """Atomically add to an Int32 of global memory. The order does not matter."""
    cute.arch.inline_ptx("red.global.add.s32 [{$r0}], {$r1};", read_only_args=[target, value])


def exp_for_scores(x: Float32) -> Float32:
    """Of a number that is at most 0: exactly 1 of 0, 0 of -inf; a relative error of 6e-8 for each unit of -x. One
    instruction more than the function unit's own, where `exp` has seven."""
    return exp2(x * Float32(LOG2_E))


def share(sum_of_lane: Float32) -> Float32:
    """The reciprocal of the warp's sum, which is at least 1 unless all terms are 0."""
    return reciprocal(cute.arch.fmax(warp_sum(sum_of_lane), Float32(1.0)))


class Softmax(NamedTuple):
    """Of a token: its greatest logit, and the reciprocals of the sums over its chosen experts and over all."""

    top: Float32
    of_chosen: Float32
    of_all: Float32


SOFTMAX_BYTES = 16


def load_softmax(t: cute.Tensor, token: Int32, valid: Boolean) -> Softmax:
    words = load_chunk(address(t, token, SOFTMAX_BYTES), valid)
    return Softmax(*(reinterpret(word, Float32) for word in words[:3]))


def score_of(logit: Float32, softmax: Softmax, chosen: Boolean) -> Float32:
    """Of a pair. `Choose.of_token` has the same operations in the same order: the bits must be the same."""
    return exp_for_scores(working(logit) - softmax.top) * choose(chosen, softmax.of_chosen, softmax.of_all)


class Tile(NamedTuple):
    """What an expert has to know of 32 tokens."""

    chosen: Int32  # a bit for each token that chose it
    other: Int32  # the greatest key of those that did not, ABSENT if there is none
    weakest: Int32  # the greatest of key ^ 0x7FFFFFFF of those that did, ABSENT if there is none


TILE_BYTES = 16


def tile_address(tiles: cute.Tensor, expert: Int32, word: Int32) -> Int64:
    return address(tiles, expert, tiles.shape[1] * TILE_BYTES) + Int64(word) * TILE_BYTES


def load_tile(source: Int64, valid: Boolean) -> Tile:
    """Without a token, and no access, where not valid."""
    return Tile(
        *cute.arch.inline_ptx(
            "{.reg .pred p; .reg .b32 unused; setp.ne.s32 p, {$r1}, 0;"
            " mov.b32 {$w0}, 0; mov.b32 {$w1}, -1; mov.b32 {$w2}, -1;"
            " @p ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, unused}, [{$r0}];}",
            write_only_types=[Int32] * 3,
            read_only_args=[source, Int32(valid)],
        )
    )


@dataclass(frozen=True)
class TokenRow:
    """A token's logits over the lanes of a warp: expert e is number e // 32 of lane e % 32."""

    experts: int
    dtype: str

    @property
    def pieces(self) -> int:
        return ceil_div(self.experts, WARP)

    @property
    def number_bytes(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    def inside(self, piece: int, lane: Int32) -> Boolean:
        return Boolean(True) if self.whole(piece) else Boolean(piece * WARP + lane < self.experts)

    def whole(self, piece: int) -> bool:
        """Whether every lane has an expert"""
        return (piece + 1) * WARP <= self.experts

    def at(self, t: cute.Tensor, token: Int32, piece: int, lane: Int32) -> Int64:
        return address(t, token, self.experts * self.number_bytes) + (piece * WARP + lane) * self.number_bytes

    def load(self, logits: cute.Tensor, token: Int32, lane: Int32) -> list:
        """As they are; -inf past the last expert."""
        dtype = DTYPES[self.dtype]
        return [load_number(dtype, self.at(logits, token, i, lane), self.inside(i, lane)) for i in range(self.pieces)]

    def load_one(self, logits: cute.Tensor, token: Int32, expert: Int32, valid: Boolean) -> Float32:
        """One of them; -inf, and no access, where not valid."""
        row = address(logits, token, self.experts * self.number_bytes)
        return load_number(DTYPES[self.dtype], row + expert * self.number_bytes, valid)

    def terms(self, logits: list, top: Float32) -> list:
        """The exponentials: 0 past the last expert, as exp(-inf)."""
        return [exp(working(z) - top) for z in logits]

    def shares(self, terms: list, picked: cute.Tensor) -> tuple:
        """Reciprocals of the sums of (the chosen experts' terms, all experts' terms), each at least 1."""
        chosen, of_all = Float32(0.0), Float32(0.0)
        for i, term in enumerate(terms):
            chosen = chosen + choose(bit_of(picked, i), term, Float32(0.0))
            of_all = of_all + term
        return share(chosen), share(of_all)


def bits(pieces: int) -> cute.Tensor:
    """Room for one bit of a lane for each of its experts."""
    return cute.make_rmem_tensor(cute.make_layout(ceil_div(pieces, WARP)), Uint32)


def bit_of(words: cute.Tensor, i: int) -> Boolean:
    return Boolean((words[i // WARP] & Uint32(1 << (i % WARP))) != 0)


@dataclass(frozen=True)
class Choose:
    row: TokenRow
    top: int
    counted: bool  # whether the experts' counts are needed before the next step

    @cute.kernel
    def kernel(
        self, logits: cute.Tensor, chosen: cute.Tensor, softmax: cute.Tensor, tiles: cute.Tensor, state: cute.Tensor
    ):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        experts, places = const_expr(self.row.experts), const_expr(self.row.pieces * WARP)
        masks, others, least = shared(Int32, places), shared(Int32, places), shared(Int32, places)
        for e in cutlass.range(tid, places, THREADS):
            masks[e] = 0
            others[e] = ABSENT
            least[e] = ABSENT
        await_earlier()
        if tid == 0:
            # The next step adds to it, after it has waited for the end of this one.
            state[2 * experts + cta] = 0
        cute.arch.sync_threads()
        best = cute.make_rmem_tensor(cute.make_layout(self.row.pieces), Int32)
        for i in cutlass.range_constexpr(self.row.pieces):
            best[i] = ABSENT
        for t in cutlass.range(warp, WARP, WARPS, unroll=1):
            token = cta * WARP + t
            if token < logits.shape[0]:
                self.of_token(logits, softmax, masks, least, best, token, t, lane)
        for i in cutlass.range_constexpr(self.row.pieces):
            change_shared("max.s32", others, i * WARP + lane, best[i])
        cute.arch.sync_threads()
        for e in cutlass.range(tid, experts, THREADS):
            weakest = choose(least[e] == ABSENT, Int32(ABSENT), least[e] ^ (CHOSEN - 1))
            store_chunk(tile_address(tiles, e, cta), [masks[e], others[e], weakest, Int32(0)])
            if const_expr(self.counted):
                if masks[e] != 0:
                    add_global_int(address(state, e, 4), count_bits(masks[e]))
        for g in cutlass.range(warp, self.row.pieces, WARPS, unroll=1):
            of_token = transpose_bits(Uint32(masks[g * WARP + lane]), lane)
            if cta * WARP + lane < logits.shape[0]:
                chosen[cta * WARP + lane, g] = Int32(of_token)

    @cute.jit
    def of_token(self, logits, softmax, masks, least, best: cute.Tensor, token: Int32, t: Int32, lane: Int32):
        """One warp: a token's chosen experts and their least scores to shared memory, the best other ones to `best`."""
        row = self.row
        numbers = [working(z) for z in row.load(logits, token, lane)]
        dropped = bits(row.pieces)
        top, threshold, surplus = self.pick(numbers, dropped, lane)
        # The exponentials, with a sign, also of a zero, where top-K chose the pair.
        terms = cute.make_rmem_tensor(cute.make_layout(row.pieces), Float32)
        for i, z in enumerate(numbers):
            term = exp_for_scores(z - top)
            terms[i] = choose(self.reaches(z, threshold, i, lane), -term, term)
        if surplus > 0:
            for i in cutlass.range_constexpr(row.pieces):
                terms[i] = choose(bit_of(dropped, i), magnitude(terms[i]), terms[i])
        of_chosen, of_all = Float32(0.0), Float32(0.0)
        for i in cutlass.range_constexpr(row.pieces):
            of_chosen = of_chosen + cute.arch.fmax(-terms[i], Float32(0.0))
            of_all = of_all + magnitude(terms[i])
        of_chosen, of_all = share(of_chosen), share(of_all)
        for i in cutlass.range_constexpr(row.pieces):
            # As an integer, a number with a sign is less than ABSENT.
            best[i] = cutlass.max(best[i], reinterpret(terms[i] * of_all, Int32))
            is_chosen = Boolean(reinterpret(terms[i], Int32) < 0)
            # ABSENT is the greatest unsigned number.
            change_shared("min.u32", least, i * WARP + lane, score_bits(terms[i] * of_chosen), is_chosen)
            change_shared("or.b32", masks, i * WARP + lane, Int32(1) << t, is_chosen)
        if lane == 0:
            numbers_of_token = [reinterpret(v, Int32) for v in (top, of_chosen, of_all)]
            store_chunk(address(softmax, token, SOFTMAX_BYTES), [*numbers_of_token, Int32(0)])

    def reaches(self, z: Float32, least: Float32, piece: int, lane: Int32) -> Boolean:
        """Whether a number is an expert's, and at least so great."""
        reached = Boolean(z >= least)
        return reached if self.row.whole(piece) else reached & self.row.inside(piece, lane)

    @cute.jit
    def pick(self, numbers: list, dropped: cute.Tensor, lane: Int32):
        """(the greatest number, the K-th greatest, how many more than K reach it).

        The latter, the last experts among the equals of the K-th greatest, have their bits set.
        """
        greatest = numbers[0]
        for z in numbers[1:]:
            greatest = cute.arch.fmax(greatest, z)
        mine = key_of(greatest)
        high = warp_greatest(mine)
        top = finite(number_of(high))
        low, reach = Uint32(LOWEST_KEY), Int32(0)
        if const_expr(self.top <= WARP <= self.row.experts):
            # Each of 32 lanes has a number at least as great.
            low = cute.arch.warp_redux_sync(mine, "min")
        if const_expr(self.looks_at_two):
            low = self.among_two(numbers, low, high)
            reach = self.count(numbers, number_of(low), lane)
        searching = Boolean(low < high) & Boolean(reach != self.top)
        while searching:
            middle = low + ((high - low + Uint32(1)) >> Uint32(1))
            count = self.count(numbers, number_of(middle), lane)
            if count >= self.top:
                low = middle
                reach = count
            else:
                high = middle - Uint32(1)
            searching = Boolean(low < high) & Boolean(reach != self.top)
        least = number_of(low)
        if reach == 0:
            reach = self.count(numbers, least, lane)
        for i in cutlass.range_constexpr(ceil_div(self.row.pieces, WARP)):
            dropped[i] = Uint32(0)
        surplus = reach - self.top
        if surplus > 0:
            self.drop_ties(numbers, dropped, least, surplus, lane)
        return top, least, surplus

    @property
    def looks_at_two(self) -> bool:
        """Whether the two greatest numbers of each lane are looked at first.

        Three of the K greatest in the same lane are rare if K is small: in one token of nine with K = 10. The more
        numbers a lane has, the more is saved.
        """
        return self.row.pieces >= 12 and self.top <= 12

    @cute.jit
    def among_two(self, numbers: list, low: Uint32, high: Uint32) -> Uint32:
        """A bound that at least K numbers reach, mostly no more.

        It is the K-th greatest of the two greatest numbers of each lane, or `low` if that is greater.
        """
        first, second = numbers[0], Float32(-math.inf)
        for z in numbers[1:]:
            second = cute.arch.fmax(second, cute.arch.fmin(first, z))
            first = cute.arch.fmax(first, z)
        key, key_of_second = key_of(first), key_of(second)
        count = Int32(0)
        searching = Boolean(low < high)
        while searching:
            middle = low + ((high - low + Uint32(1)) >> Uint32(1))
            count = count_bits(ballot(key >= middle)) + count_bits(ballot(key_of_second >= middle))
            if count >= self.top:
                low = middle
            else:
                high = middle - Uint32(1)
            searching = Boolean(low < high) & Boolean(count != self.top)
        return low

    def count(self, numbers: list, least: Float32, lane: Int32) -> Int32:
        """Of the token's numbers that are at least so great"""
        total = Int32(0)
        for i, z in enumerate(numbers):
            if self.row.whole(i):
                total = one_more_if_reached(total, z, least)
            else:
                total = total + Int32(self.reaches(z, least, i, lane))
        return cute.arch.warp_redux_sync(total, "add")

    @cute.jit
    def drop_ties(self, numbers: list, dropped: cute.Tensor, least: Float32, surplus: Int32, lane: Int32):
        """Set the bits of the `surplus` last ones among the numbers equal to the least."""
        left = surplus
        for j in cutlass.range_constexpr(self.row.pieces):
            i = const_expr(self.row.pieces - 1 - j)
            equal = Boolean(numbers[i] == least) & self.row.inside(i, lane)
            lanes = ballot(equal)
            last = cutlass.min(left, count_bits(lanes))
            is_last = equal & Boolean(count_bits(lanes & lanes_below(lane)) >= count_bits(lanes) - last)
            dropped[i // WARP] = dropped[i // WARP] | choose(is_last, Uint32(1 << (i % WARP)), Uint32(0))
            left -= last
