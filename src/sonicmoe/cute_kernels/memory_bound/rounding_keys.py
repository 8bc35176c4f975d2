"""First step of token rounding: every token's top-K, and for every pair a key that its expert will order it by.

A warp takes a token, whose logits it keeps in registers, expert e in lane e % 32. The K-th greatest logit is found by
bisecting the integers that are ordered as floats: a count over the warp says on which side it is, and a count of
exactly K ends the search. That needs about as many steps as it takes bits to tell the K-th from the next one, whatever
K is.

A key is the bits of the pair's score, which lies in [0, 1], with the second highest bit set if top-K chose the pair.
Keys leave transposed, (E, T), through shared memory, so that an expert's keys lie side by side; tokens past the last
one get ABSENT, so that nothing after this has to know where they end.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr

from ..groups import ceil_div
from ..ptx import reciprocal
from .access import DTYPES, address, reinterpret
from .logits import LOWEST_KEY, choose, exp, finite, key_of, load_number, number_of, warp_greatest, warp_sum, working
from .team import WARP, add_shared, count_bits, lanes_below, shared

CHOSEN = 1 << 30
ABSENT = -1
WARPS = 8
MAX_TILE = 32
STAGE_BYTES = 132 * 1024


def ballot(condition: Boolean) -> Uint32:
    return Uint32(cute.arch.vote_ballot_sync(condition))


def add_global_int(target: Int64, value: Int32):
    """Atomically add to an Int32 of global memory. The order does not matter."""
    cute.arch.inline_ptx("red.global.add.s32 [{$r0}], {$r1};", read_only_args=[target, value])


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
        return Boolean(piece * WARP + lane < self.experts)

    def whole(self, piece: int) -> bool:
        """Whether every lane has an expert"""
        return (piece + 1) * WARP <= self.experts

    def at(self, t: cute.Tensor, token: Int32, piece: int, lane: Int32) -> Int64:
        return address(t, token, self.experts * self.number_bytes) + (piece * WARP + lane) * self.number_bytes

    def load(self, logits: cute.Tensor, token: Int32, lane: Int32) -> list:
        """As they are; -inf past the last expert."""
        dtype = DTYPES[self.dtype]
        return [load_number(dtype, self.at(logits, token, i, lane), self.inside(i, lane)) for i in range(self.pieces)]

    def terms(self, logits: list, top: Float32) -> list:
        """The exponentials: 0 past the last expert, as exp(-inf)."""
        return [exp(working(z) - top) for z in logits]

    def shares(self, terms: list, picked: cute.Tensor) -> tuple:
        """Reciprocals of the sums of (the chosen experts' terms, all experts' terms), each at least 1."""
        chosen, of_all = Float32(0.0), Float32(0.0)
        for i, term in enumerate(terms):
            chosen = chosen + choose(bit_of(picked, i), term, Float32(0.0))
            of_all = of_all + term
        one = Float32(1.0)
        return (
            reciprocal(cute.arch.fmax(warp_sum(chosen), one)),
            reciprocal(cute.arch.fmax(warp_sum(of_all), one)),
        )


def bits(pieces: int) -> cute.Tensor:
    """Room for one bit of a lane for each of its experts."""
    return cute.make_rmem_tensor(cute.make_layout(ceil_div(pieces, WARP)), Uint32)


def bit_of(words: cute.Tensor, i: int) -> Boolean:
    return Boolean((words[i // WARP] & Uint32(1 << (i % WARP))) != 0)


@dataclass(frozen=True)
class Keys:
    row: TokenRow
    top: int

    @property
    def stride(self) -> int:
        """Of a token's keys in shared memory: odd, so that a column of them meets every bank once"""
        return self.row.experts | 1

    @property
    def tile(self) -> int:
        """Tokens of a CTA, a power of two"""
        tile = MAX_TILE
        while tile > 1 and tile * self.stride * 4 > STAGE_BYTES:
            tile //= 2
        return tile

    @cute.kernel
    def kernel(self, logits: cute.Tensor, keys: cute.Tensor, chosen: cute.Tensor, state: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        experts, tile, threads = const_expr(self.row.experts), const_expr(self.tile), const_expr(WARPS * WARP)
        cute.arch.griddepcontrol_launch_dependents()
        stage, counts = shared(Int32, tile, self.stride), shared(Int32, experts)
        for e in cutlass.range(tid, experts, threads):
            counts[e] = 0
        cute.arch.sync_threads()
        for t in cutlass.range(warp, tile, WARPS, unroll=1):
            token = cta * tile + t
            if token < logits.shape[0]:
                self.of_token(logits, chosen, stage, counts, token, t, lane)
            else:
                for e in cutlass.range(lane, experts, WARP):
                    stage[t, e] = ABSENT
        cute.arch.sync_threads()
        for i in cutlass.range(tid, experts * tile, threads, unroll=4):
            e = i // tile
            t = i - e * tile
            keys[e, cta * tile + t] = stage[t, e]
        for e in cutlass.range(tid, experts, threads):
            if counts[e] > 0:
                add_global_int(address(state, e, 4), counts[e])

    @cute.jit
    def of_token(self, logits, chosen, stage, counts, token: Int32, t: Int32, lane: Int32):
        """One warp: a token's keys to shared memory, its chosen experts to global memory and to their counts."""
        row = self.row
        numbers = [working(z) for z in row.load(logits, token, lane)]
        picked = bits(row.pieces)
        top = self.pick(numbers, picked, lane)
        terms = row.terms(numbers, top)
        of_chosen, of_all = row.shares(terms, picked)
        for i in cutlass.range_constexpr(row.pieces):
            is_chosen = bit_of(picked, i)
            score = terms[i] * choose(is_chosen, of_chosen, of_all)
            expert = i * WARP + lane
            if expert < row.experts:
                stage[t, expert] = reinterpret(score, Int32) | choose(is_chosen, Int32(CHOSEN), Int32(0))
                if is_chosen:
                    add_shared(counts, expert, 1)
        for start in cutlass.range_constexpr(0, row.pieces, WARP):
            mine = Uint32(0)
            for i in range(start, min(start + WARP, row.pieces)):
                mine = choose(lane == i - start, ballot(bit_of(picked, i)), mine)
            if start + lane < row.pieces:
                chosen[token, start + lane] = Int32(mine)

    @cute.jit
    def pick(self, numbers: list, picked: cute.Tensor, lane: Int32) -> Float32:
        """Set the bits of the K greatest numbers, the lower expert first among equals; return the greatest of all."""
        greatest = numbers[0]
        for z in numbers[1:]:
            greatest = cute.arch.fmax(greatest, z)
        mine = key_of(greatest)
        high = warp_greatest(mine)
        top = finite(number_of(high))
        low = Uint32(LOWEST_KEY)
        if const_expr(self.top <= WARP <= self.row.experts):
            # Each of 32 lanes has a number at least as great.
            low = cute.arch.warp_redux_sync(mine, "min")
        searching = Boolean(low < high)
        while searching:
            middle = low + ((high - low + Uint32(1)) >> Uint32(1))
            count = self.count(numbers, number_of(middle), lane)
            if count >= self.top:
                low = middle
            else:
                high = middle - Uint32(1)
            searching = Boolean(low < high) & Boolean(count != self.top)
        least = number_of(low)
        for i in cutlass.range_constexpr(ceil_div(self.row.pieces, WARP)):
            picked[i] = Uint32(0)
        for i, z in enumerate(numbers):
            is_in = Boolean(z >= least) if self.row.whole(i) else Boolean(z >= least) & self.row.inside(i, lane)
            picked[i // WARP] = picked[i // WARP] | choose(is_in, Uint32(1 << (i % WARP)), Uint32(0))
        surplus = self.count(numbers, least, lane) - self.top
        if surplus > 0:
            self.drop_ties(numbers, picked, least, surplus, lane)
        return top

    def count(self, numbers: list, least: Float32, lane: Int32) -> Int32:
        """Of the token's numbers that are at least so great"""
        total = Int32(0)
        for i, z in enumerate(numbers):
            is_in = Boolean(z >= least) if self.row.whole(i) else Boolean(z >= least) & self.row.inside(i, lane)
            total = total + Int32(is_in)
        return cute.arch.warp_redux_sync(total, "add")

    @cute.jit
    def drop_ties(self, numbers: list, picked: cute.Tensor, least: Float32, surplus: Int32, lane: Int32):
        """Clear the bits of the `surplus` last ones among the numbers equal to the least."""
        left = surplus
        for j in cutlass.range_constexpr(self.row.pieces):
            i = const_expr(self.row.pieces - 1 - j)
            equal = Boolean(numbers[i] == least) & self.row.inside(i, lane)
            lanes = ballot(equal)
            dropped = cutlass.min(left, count_bits(lanes))
            is_last = equal & Boolean(count_bits(lanes & lanes_below(lane)) >= count_bits(lanes) - dropped)
            mask = choose(is_last, Uint32(1 << (i % WARP)), Uint32(0))
            picked[i // WARP] = picked[i // WARP] & (mask ^ Uint32(0xFFFFFFFF))
            left -= dropped


def score_of(key: Int32) -> Float32:
    return reinterpret(key & (CHOSEN - 1), Float32)
