"""Second step of token rounding: how many tokens each expert keeps, and which. One CTA per expert.

Only the last tile_m rows change, so `need` < tile_m tokens are looked for: the weakest of those that chose the expert,
or the best of those that did not. Both are the greatest of something: key ^ flip, with flip all 31 bits or none, puts
the tokens in question below LIMIT, the best candidates on top, and all others from LIMIT on, as unsigned numbers. A
tile is 32 tokens here, of which the first step has left who chose the expert and the best candidate of either kind.
Three passes over the expert's tiles, of which the last two compute keys only where the best candidate is good enough:

1. the tokens that chose the expert are counted, and each thread notes its tiles' best candidate. Of these the need-th
   greatest or one a little below is found by bisection: a bound that at least `need` candidates reach, and few more;
2. those above the bound go to a list in shared memory, in which bisection finds the threshold. Where the list is too
   small (many more candidates in some tiles than in others), every step of it computes the keys again;
3. the tokens that are kept, as a mask for each tile with the number of those before.

Nothing depends on the order in which threads come: counts are sums of integers, the list is only counted in, and which
warp takes which tiles, in which order, follows from their numbers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr

from ..dependent import await_earlier
from .access import address, load_or, reinterpret
from .logits import choose, warp_sum
from .rounding_choose import (
    ABSENT,
    CHOSEN,
    TILE_BYTES,
    Tile,
    TokenRow,
    add_global_int,
    ballot,
    load_softmax,
    load_tile,
    lowest_bit,
    score_of,
    tile_address,
)
from .team import WARP, count_bits, scan_in_place, shared, team_sum, warp_scan

MAX_WARPS = 16
AT_ONCE = 264  # CTAs of 16 warps that an H200 runs side by side
FLIP = 0x7FFFFFFF
LIMIT = CHOSEN
LIST = 4096  # all pairs of 128 tiles
SEGMENT = 1024  # masks in shared memory at once
BATCH = 4  # tiles of which a warp has the logits in flight
ALL = LIMIT - 1  # of the equals


class Memory(NamedTuple):
    """Shared memory of a CTA."""

    sums: cute.Tensor  # (2, warps) Int32, of team_sum
    scan: cute.Tensor  # (warps,) Int32, of scan_in_place
    floats: cute.Tensor  # (warps,) Float32
    listed: cute.Tensor  # (1,) Int32: how many were put on the list
    entries: cute.Tensor  # (LIST,) Int32
    above: cute.Tensor  # (SEGMENT,) masks of the tokens above the threshold
    equal: cute.Tensor  # (SEGMENT,) of those that reach it
    before: cute.Tensor  # (SEGMENT,) counts of both, in 16 bits each


class Column(NamedTuple):
    """The pairs of an expert."""

    tiles: Int64  # the address of its first
    words: Int32  # how many tiles
    logits: cute.Tensor
    softmax: cute.Tensor
    expert: Int32


def in_range(value: Int32, least: Int32) -> Boolean:
    """Whether least <= value < LIMIT, for value as an unsigned number."""
    return Boolean(Uint32(value - least) < Uint32(LIMIT - least))


def list_if(condition: Boolean, value: Int32, memory: Memory):
    """Put a value on the list, or only count it if the list is full."""
    cute.arch.inline_ptx(
        "{.reg .pred p, q; .reg .b32 n, a; mov.b32 n, 0; setp.ne.s32 p, {$r2}, 0;"
        " @p atom.shared.add.u32 n, [{$r0}], 1; setp.lt.u32 q, n, %d; and.pred p, p, q;"
        " mad.lo.u32 a, n, 4, {$r1}; @p st.shared.b32 [a], {$r3};}" % LIST,
        read_only_args=[memory.listed.iterator.toint(), memory.entries.iterator.toint(), Int32(condition), value],
    )


def store_pair(target: Int64, first: Int32, second: Int32):
    cute.arch.inline_ptx("st.global.v2.b32 [{$r0}], {{$r1}, {$r2}};", read_only_args=[target, first, second])


def register(dtype, value) -> cute.Tensor:
    """A number that a visit of all keys changes."""
    t = cute.make_rmem_tensor(cute.make_layout(1), dtype)
    t[0] = dtype(value)
    return t


class Found(NamedTuple):
    """A threshold: how many candidates reach it, and how many are above; the latter is only known if more than needed
    reach it."""

    key: Int32
    reach: Int32
    above: Int32


def best_of(tile: Tile, flip: Int32) -> Int32:
    """The greatest of key ^ flip of a tile's candidates."""
    return choose(flip == 0, tile.other, tile.weakest)


def flip_of(up: Boolean) -> Int32:
    return choose(up, Int32(0), Int32(FLIP))


def score_of_key(key: Int32) -> Float32:
    return reinterpret(key & (CHOSEN - 1), Float32)


def ties_down(found: Found, need: Int32) -> Int32:
    """How many of the weakest threshold's equals are kept: as many as reach it without need."""
    return found.reach - need


def ties_up(found: Found, need: Int32) -> Int32:
    """How many of the best threshold's equals are kept: what those above it leave, or all."""
    return choose(found.reach > need, need - found.above, Int32(ALL))


@dataclass(frozen=True)
class Select:
    row: TokenRow
    rule: str
    tile_m: int

    @property
    def experts(self) -> int:
        return self.row.experts

    @property
    def warps(self) -> int:
        """Half as many where all CTAs then run side by side"""
        return MAX_WARPS if self.experts <= AT_ONCE else MAX_WARPS // 2

    @property
    def threads(self) -> int:
        return self.warps * WARP

    @cute.kernel
    def kernel(
        self,
        logits: cute.Tensor,
        softmax: cute.Tensor,
        tiles: cute.Tensor,
        draws: cute.Tensor | None,
        state: cute.Tensor,
        marks: cute.Tensor,
    ):
        expert, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        memory = Memory(
            shared(Int32, 2, self.warps),
            shared(Int32, self.warps),
            shared(Float32, self.warps),
            shared(Int32, 1),
            shared(Int32, LIST),
            shared(Uint32, SEGMENT),
            shared(Uint32, SEGMENT),
            shared(Int32, SEGMENT),
        )
        await_earlier()
        column = Column(tile_address(tiles, expert, Int32(0)), tiles.shape[1], logits, softmax, expert)
        tokens = logits.shape[0]
        count, best_other, best_weak = self.survey(column, memory)
        floor = count // self.tile_m * self.tile_m
        over = count - floor
        can_rise = Boolean(over > 0) & Boolean(floor + self.tile_m <= tokens)
        # As they are for an expert whose count is a multiple: those that chose it are kept, and no tile is looked into.
        threshold, ties, up = Int32(CHOSEN - 1), Int32(0), Boolean(False)
        if over > 0:
            if const_expr(self.rule == "stochastic_mass"):
                threshold, ties, up = self.by_mass(column, draws[expert], over, can_rise, best_other, best_weak, memory)
            else:
                up = can_rise & self.rises(state, draws, expert, over, tokens)
                need, flip = choose(up, self.tile_m - over, over), flip_of(up)
                found = self.find(column, need, flip, choose(up, best_other, best_weak), memory)
                threshold, ties = found.key, choose(up, ties_up(found, need), ties_down(found, need))
        if tid == 0:
            state[self.experts + expert] = floor + choose(up, Int32(self.tile_m), Int32(0))
        self.mark(column, marks, state, threshold, ties, flip_of(up), memory)

    @cute.jit
    def survey(self, column: Column, memory: Memory):
        """(tokens that chose the expert, the thread's best candidates: of those that did not, and the weakest)"""
        tid, _, _ = cute.arch.thread_idx()
        chosen, other, weakest = Int32(0), Int32(ABSENT), Int32(ABSENT)
        for i in cutlass.range(tid, column.words, self.threads, unroll=2):
            tile = load_tile(column.tiles + Int64(i) * TILE_BYTES, Boolean(True))
            chosen += count_bits(tile.chosen)
            other = cutlass.max(other, tile.other)
            weakest = cutlass.max(weakest, tile.weakest)
        count = team_sum(chosen, memory.sums, Int32(0), self.warps)
        # The next sum takes the same turn.
        cute.arch.sync_threads()
        return count, other, weakest

    @cute.jit
    def rises(self, state: cute.Tensor, draws: cute.Tensor | None, expert: Int32, over: Int32, tokens: Int32):
        """Whether the count of an expert that can rise does, by a rule that needs no scores."""
        up = Boolean(self.rule == "up")
        if const_expr(self.rule == "nearest"):
            up = Boolean(2 * over > self.tile_m)
        elif const_expr(self.rule == "stochastic"):
            up = Boolean(draws[expert] * Float32(self.tile_m) < Float32(over))
        elif const_expr(self.rule == "balanced"):
            up = self.rises_balanced(state, expert, tokens)
        return up

    @cute.jit
    def rises_balanced(self, state: cute.Tensor, expert: Int32, tokens: Int32):
        """In closed form, for an expert that can rise; see `reference.token_rounding`. Every warp finds it out."""
        tid, _, _ = cute.arch.thread_idx()
        lane = tid % WARP
        counted, tiles, could, least, least_before = Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)
        for first in cutlass.range(0, expert + 1, WARP, unroll=1):
            e = first + lane
            count = load_or(address(state, e, 4), e <= expert, 0, Int32)
            full = count // self.tile_m
            can = Boolean(count > full * self.tile_m) & Boolean((full + 1) * self.tile_m <= tokens)
            counted += warp_scan(count, lane)
            tiles += warp_scan(full, lane)
            could += warp_scan(Int32(can), lane)
            # Experts up to e that would have to rise, less those that could.
            excess = (2 * counted + (self.tile_m - 1)) // (2 * self.tile_m) - tiles - could
            least = cutlass.min(least, cute.arch.warp_redux_sync(choose(e <= expert, excess, Int32(0)), "min"))
            before = choose(e < expert, excess, Int32(0))
            least_before = cutlass.min(least_before, cute.arch.warp_redux_sync(before, "min"))
            counted = cute.arch.shuffle_sync(counted, WARP - 1)
            tiles = cute.arch.shuffle_sync(tiles, WARP - 1)
            could = cute.arch.shuffle_sync(could, WARP - 1)
        return Boolean(least + 1 > least_before)

    @cute.jit
    def by_mass(
        self,
        column: Column,
        draw: Float32,
        over: Int32,
        can_rise: cutlass.Boolean,
        best_other: Int32,
        best_weak: Int32,
        memory: Memory,
    ):
        """(threshold, ties, up): up if the draw is below the chosen tokens' share of the last tile's mass."""
        weak = self.find(column, over, Int32(FLIP), best_weak, memory)
        threshold, ties, up = weak.key, ties_down(weak, over), Boolean(False)
        if can_rise:
            need = self.tile_m - over
            best = self.find(column, need, Int32(0), best_other, memory)
            mass = self.mass(column, Int32(FLIP), weak, over, memory)
            other = self.mass(column, Int32(0), best, need, memory)
            up = Boolean(draw * (mass + other) < mass)
            if up:
                threshold, ties = best.key, ties_up(best, need)
        return threshold, ties, up

    @cute.jit
    def mass(self, column: Column, flip: Int32, found: Found, need: Int32, memory: Memory):
        """Sum of the scores of the candidates that were looked for, in an order that follows from the tiles.

        Where more reach the threshold than are needed, those are above it, and as many of its equals as are left.
        """
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid % WARP, tid // WARP
        least = (found.key ^ flip) + Int32(found.reach > need)
        total = register(Float32, 0.0)

        def add(key, place):
            total[0] += choose(in_range(key ^ flip, least), score_of_key(key), Float32(0.0))

        self.visit_from(column, flip, least, add)
        of_warp = warp_sum(total[0])
        if lane == 0:
            memory.floats[warp] = of_warp
        cute.arch.sync_threads()
        mass = Float32(0.0)
        for w in cutlass.range_constexpr(self.warps):
            mass += memory.floats[w]
        if found.reach > need:
            mass += Float32(need - found.above) * score_of_key(found.key)
        # Written again by the next sum.
        cute.arch.sync_threads()
        return mass

    @cute.jit
    def visit_from(self, column: Column, flip: Int32, least: Int32, visit: cutlass.Constexpr):
        """Visits all tiles of which a candidate's key ^ flip is at least so great."""
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid % WARP, tid // WARP
        for first in cutlass.range(warp * WARP, column.words, self.threads, unroll=1):
            tile = load_tile(column.tiles + Int64(first + lane) * TILE_BYTES, Boolean(first + lane < column.words))
            self.visit(column, first, tile, Boolean(best_of(tile, flip) >= least), visit)

    @cute.jit
    def visit(self, column: Column, first: Int32, tile: Tile, wanted: cutlass.Boolean, visit: cutlass.Constexpr):
        """A warp, a tile per lane from `first` on, a token per lane then: calls visit(key, place) with the keys of each
        wanted tile and the number of the lane whose tile it is; with ABSENT past the last token, and, where the tiles
        do not fill a batch, with ABSENT and no lane's number."""
        tid, _, _ = cute.arch.thread_idx()
        lane = tid % WARP
        left = ballot(wanted)
        while left != 0:
            loaded = []
            for _ in cutlass.range_constexpr(BATCH):
                # WARP, and then no token's, if nothing is left.
                place = lowest_bit(left)
                token = (first + place) * WARP + lane
                valid = Boolean(left != 0) & Boolean(token < column.logits.shape[0])
                chosen = Uint32(cute.arch.shuffle_sync(tile.chosen, place % WARP))
                logit = self.row.load_one(column.logits, token, column.expert, valid)
                loaded.append((place, valid, chosen, logit, load_softmax(column.softmax, token, valid)))
                left = left & (left - Uint32(1))
            for place, valid, chosen, logit, softmax in loaded:
                is_chosen = Boolean(((chosen >> Uint32(lane)) & Uint32(1)) != 0)
                score = reinterpret(score_of(logit, softmax, is_chosen), Int32)
                key = score | choose(is_chosen, Int32(CHOSEN), Int32(0))
                visit(choose(valid, key, Int32(ABSENT)), place)

    @cute.jit
    def find(self, column: Column, need: Int32, flip: Int32, mine: Int32, memory: Memory):
        """The need-th greatest of key ^ flip among those below LIMIT; there are at least so many. mine: the greatest of
        the thread's tiles."""
        tid, _, _ = cute.arch.thread_idx()
        reached = register(Int32, 0)
        low, turn = self.bound(mine, need, memory)
        if tid == 0:
            memory.listed[0] = 0
        cute.arch.sync_threads()

        def list_above(key, place):
            value = key ^ flip
            reached[0] += Int32(in_range(value, low))
            list_if(in_range(value, low + 1), value, memory)

        self.visit_from(column, flip, low, list_above)
        reach = team_sum(reached[0], memory.sums, turn, self.warps)
        above = memory.listed[0]
        if above >= need:
            low, reach, above = self.search(column, need, flip, low + 1, above, turn ^ 1, memory)
        # The list and the sums are written again only after the next barrier.
        cute.arch.sync_threads()
        return Found(low ^ flip, reach, above)

    @cute.jit
    def bound(self, mine: Int32, need: Int32, memory: Memory):
        """(a number that at least `need` threads reach, if so many have one, and few more; the next turn)"""
        most = cutlass.max(need, cutlass.min(need + need // 4, 3 * self.threads // 4))
        searching = Boolean(team_sum(Int32(mine >= 0), memory.sums, Int32(0), self.warps) >= need)
        low, high, turn = Int32(0), Int32(LIMIT - 1), Int32(1)
        while searching:
            middle = low + ((high - low + 1) >> 1)
            count = team_sum(Int32(mine >= middle), memory.sums, turn, self.warps)
            turn = turn ^ 1
            if count >= need:
                low = middle
            else:
                high = middle - 1
            searching = Boolean(low < high) & (Boolean(count < need) | Boolean(count > most))
        return low, turn

    @cute.jit
    def search(self, column, need: Int32, flip: Int32, low: Int32, listed: Int32, turn: Int32, memory: Memory):
        """(threshold, how many reach it, how many are above); `listed` reach low, and are on the list if they fit."""
        tid, _, _ = cute.arch.thread_idx()
        mine = cute.make_rmem_tensor(cute.make_layout(LIST // self.threads), Int32)
        for j in cutlass.range_constexpr(LIST // self.threads):
            mine[j] = ABSENT
            if tid + j * self.threads < listed:
                mine[j] = memory.entries[tid + j * self.threads]
        high, reach, above = Int32(LIMIT - 1), listed, Int32(0)
        searching = Boolean(low < high) & Boolean(reach != need)
        while searching:
            middle = low + ((high - low + 1) >> 1)
            counted = register(Int32, 0)

            def count(key, place, middle=middle, counted=counted):
                counted[0] += Int32(in_range(key ^ flip, middle))

            if listed <= LIST:
                for j in cutlass.range_constexpr(LIST // self.threads):
                    counted[0] += Int32(mine[j] >= middle)
            else:
                self.visit_from(column, flip, middle, count)
            found = team_sum(counted[0], memory.sums, turn, self.warps)
            turn = turn ^ 1
            if found >= need:
                low = middle
                reach = found
            else:
                high = middle - 1
                above = found
            searching = Boolean(low < high) & Boolean(reach != need)
        return low, reach, above

    @cute.jit
    def mark(self, column: Column, marks, state, threshold: Int32, ties: Int32, flip: Int32, memory: Memory):
        """Write, for each tile, the mask of the tokens kept and the number kept before; add to the tokens' totals.

        Kept are the keys above the threshold and the first `ties` of those equal to it.
        """
        tid, _, _ = cute.arch.thread_idx()
        words = column.words
        kept_before, equal_before = Int32(0), Int32(0)
        for start in cutlass.range(0, words, SEGMENT, unroll=1):
            self.compare(column, start, threshold, flip, memory)
            cute.arch.sync_threads()
            total = Uint32(scan_in_place(memory.before, SEGMENT, memory.scan, self.threads))
            for j in cutlass.range(tid, cutlass.min(words - start, SEGMENT), self.threads, unroll=1):
                above, equal, before = memory.above[j], memory.equal[j], Uint32(memory.before[j])
                passed = equal_before + Int32(before >> Uint32(16))
                rest = equal
                for _ in cutlass.range(cutlass.min(ties - passed, count_bits(equal)), unroll=1):
                    rest = rest & (rest - Uint32(1))
                kept = above | (equal ^ rest)
                rank = kept_before + Int32(before & Uint32(0xFFFF)) + cutlass.min(ties, passed)
                store_pair(address(marks, start + j, self.experts * 8) + column.expert * 8, Int32(kept), rank)
                add_global_int(address(state, 2 * self.experts + start + j, 4), count_bits(kept))
            kept_before += Int32(total & Uint32(0xFFFF))
            equal_before += Int32(total >> Uint32(16))
            cute.arch.sync_threads()

    @cute.jit
    def compare(self, column: Column, start: Int32, threshold: Int32, flip: Int32, memory: Memory):
        """Masks of the keys above the threshold and equal to it, and the counts of both, for a segment of tiles.

        Where the best candidate does not reach the threshold, those that chose the expert are above it, and no others.
        """
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid % WARP, tid // WARP
        for first in cutlass.range(warp * WARP, SEGMENT, self.threads, unroll=1):
            i = start + first + lane
            tile = load_tile(column.tiles + Int64(i) * TILE_BYTES, Boolean(i < column.words))
            above, equal = register(Uint32, tile.chosen), register(Uint32, 0)

            def note(key, place, above=above, equal=equal):
                mask, same = ballot(Boolean(key > threshold)), ballot(Boolean(key == threshold))
                above[0] = choose(lane == place, mask, above[0])
                equal[0] = choose(lane == place, same, equal[0])

            wanted = Boolean(best_of(tile, flip) >= (threshold ^ flip))
            self.visit(column, start + first, tile, wanted, note)
            memory.above[first + lane] = above[0]
            memory.equal[first + lane] = equal[0]
            memory.before[first + lane] = count_bits(above[0]) | (count_bits(equal[0]) << 16)
