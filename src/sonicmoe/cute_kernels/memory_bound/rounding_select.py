"""Second step of token rounding: how many tokens each expert keeps, and which. One CTA per expert.

Only the last tile changes, so `need` < tile_m tokens are looked for: the weakest of those that chose the expert, or the
best of those that did not. Both are the greatest of something: key ^ flip, with flip all 31 bits or none, puts the
tokens in question below LIMIT, the best candidates on top, and all others from LIMIT on, as unsigned numbers. Three
passes over the expert's keys, which mostly come from L2:

1. each thread's greatest candidate. Of these 512 the need-th greatest or one a little below is found by bisection: a
   bound that at least `need` candidates reach, and few more do;
2. those above the bound go to a list in shared memory, in which bisection finds the threshold. Where the list is too
   small (many equal scores, or many more candidates in one thread than in others), every step of it reads all keys;
3. the tokens that are kept, as a mask for each 32 of them with the number of those before.

Nothing depends on the order in which threads come: counts are sums of integers, and the list is only counted in.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint32, const_expr

from .access import address, load_or
from .logits import choose, warp_sum
from .rounding_keys import ABSENT, CHOSEN, add_global_int, ballot, score_of
from .team import WARP, count_bits, scan_in_place, shared, team_sum, warp_scan

WARPS = 16
THREADS = WARPS * WARP
FLIP = 0x7FFFFFFF
LIMIT = CHOSEN
LIST = 2048
FEW = 384  # of 512 threads that reach a bound: their keys that do are about 700, and fit on the list
SEGMENT = 1024  # masks in shared memory at once
UNROLL = 4  # of 16 bytes a thread has in flight
MASKS = 16  # of 32 tokens each that a warp has in flight
ALL = LIMIT - 1  # of the equals


class Memory(NamedTuple):
    """Shared memory of a CTA."""

    sums: cute.Tensor  # (2, WARPS) Int32, of team_sum
    scan: cute.Tensor  # (WARPS,) Int32, of scan_in_place
    floats: cute.Tensor  # (2, WARPS) Float32
    listed: cute.Tensor  # (1,) Int32: how many were put on the list
    entries: cute.Tensor  # (LIST,) Int32
    above: cute.Tensor  # (SEGMENT,) masks of the tokens above the threshold
    equal: cute.Tensor  # (SEGMENT,) of those that reach it
    before: cute.Tensor  # (SEGMENT,) counts of both, in 16 bits each


def load_keys(source: Int64, valid: Boolean):
    """Four keys; ABSENT, and no access, where not valid."""
    return cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r1}, 0;"
        " mov.b32 {$w0}, -1; mov.b32 {$w1}, -1; mov.b32 {$w2}, -1; mov.b32 {$w3}, -1;"
        " @p ld.global.v4.b32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];}",
        write_only_types=[Int32] * 4,
        read_only_args=[source, Int32(valid)],
    )


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


def ties_down(found: Found, need: Int32) -> Int32:
    """How many of the weakest threshold's equals are kept: as many as reach it without need."""
    return found.reach - need


def ties_up(found: Found, need: Int32) -> Int32:
    """How many of the best threshold's equals are kept: what those above it leave, or all."""
    return choose(found.reach > need, need - found.above, Int32(ALL))


@dataclass(frozen=True)
class Select:
    experts: int
    rule: str
    tile_m: int

    @cute.kernel
    def kernel(
        self, keys: cute.Tensor, draws: cute.Tensor | None, state: cute.Tensor, marks: cute.Tensor, tokens: Int32
    ):
        expert, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        memory = Memory(
            shared(Int32, 2, WARPS),
            shared(Int32, WARPS),
            shared(Float32, 2, WARPS),
            shared(Int32, 1),
            shared(Int32, LIST),
            shared(Uint32, SEGMENT),
            shared(Uint32, SEGMENT),
            shared(Int32, SEGMENT),
        )
        cute.arch.griddepcontrol_launch_dependents()
        cute.arch.griddepcontrol_wait()
        row = address(keys, expert, 4 * keys.shape[1])
        fours = keys.shape[1] // 4
        count = state[expert]
        floor = count // self.tile_m * self.tile_m
        over = count - floor
        can_rise = Boolean(over > 0) & Boolean(floor + self.tile_m <= tokens)
        # As they are for an expert whose count is a multiple: those that chose it are kept.
        threshold, ties, up = Int32(CHOSEN - 1), Int32(0), Boolean(False)
        if over > 0:
            if const_expr(self.rule == "stochastic_mass"):
                threshold, ties, up = self.by_mass(row, fours, draws[expert], over, can_rise, memory)
            else:
                up = can_rise & self.rises(state, draws, expert, over, tokens)
                threshold, ties = self.boundary(row, fours, over, up, memory)
        if tid == 0:
            state[self.experts + expert] = floor + choose(up, Int32(self.tile_m), Int32(0))
        self.mark(row, marks, state, expert, threshold, ties, memory)

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
    def boundary(self, row: Int64, fours: Int32, over: Int32, up: cutlass.Boolean, memory: Memory):
        """(threshold, ties): kept are keys above the threshold and the first `ties` of those equal to it."""
        need = choose(up, self.tile_m - over, over)
        found = self.find(row, fours, need, choose(up, Int32(0), Int32(FLIP)), memory)
        return found.key, choose(up, ties_up(found, need), ties_down(found, need))

    @cute.jit
    def by_mass(self, row: Int64, fours: Int32, draw: Float32, over: Int32, can_rise: cutlass.Boolean, memory: Memory):
        """(threshold, ties, up): up if the draw is below the chosen tokens' share of the last tile's mass."""
        weak = self.find(row, fours, over, Int32(FLIP), memory)
        threshold, ties, up = weak.key, ties_down(weak, over), Boolean(False)
        if can_rise:
            need = self.tile_m - over
            best = self.find(row, fours, need, Int32(0), memory)
            mass, other = self.masses(row, fours, weak, over, best, need, memory)
            up = Boolean(draw * (mass + other) < mass)
            if up:
                threshold, ties = best.key, ties_up(best, need)
        return threshold, ties, up

    @cute.jit
    def masses(self, row: Int64, fours: Int32, weak: Found, over: Int32, best: Found, need: Int32, memory: Memory):
        """Sums of the scores of the weakest that chose the expert, and of the best that did not.

        Where more reach a threshold than are needed, those are above it, and as many of its equals as are left.
        """
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid % WARP, tid // WARP
        least_weak = (weak.key ^ FLIP) + Int32(weak.reach > over)
        least_best = best.key + Int32(best.reach > need)
        chosen, other = register(Float32, 0.0), register(Float32, 0.0)

        def add(key):
            chosen[0] += choose(in_range(key ^ FLIP, least_weak), score_of(key), Float32(0.0))
            other[0] += choose(in_range(key, least_best), score_of(key), Float32(0.0))

        self.visit_keys(row, fours, add)
        of_warp, of_warp_other = warp_sum(chosen[0]), warp_sum(other[0])
        if lane == 0:
            memory.floats[0, warp] = of_warp
            memory.floats[1, warp] = of_warp_other
        cute.arch.sync_threads()
        mass, mass_other = Float32(0.0), Float32(0.0)
        for w in cutlass.range_constexpr(WARPS):
            mass += memory.floats[0, w]
            mass_other += memory.floats[1, w]
        if weak.reach > over:
            mass += Float32(over - weak.above) * score_of(weak.key)
        if best.reach > need:
            mass_other += Float32(need - best.above) * score_of(best.key)
        return mass, mass_other

    @cute.jit
    def visit_keys(self, row: Int64, fours: Int32, visit: cutlass.Constexpr):
        """Calls visit with every key of the expert, ABSENT past the last one."""
        tid, _, _ = cute.arch.thread_idx()
        for first in cutlass.range(tid, fours, THREADS * UNROLL, unroll=1):
            loaded = []
            for u in cutlass.range_constexpr(UNROLL):
                i = first + u * THREADS
                loaded.append(load_keys(row + Int64(i) * 16, Boolean(i < fours)))
            for four in loaded:
                for key in four:
                    visit(key)

    @cute.jit
    def find(self, row: Int64, fours: Int32, need: Int32, flip: Int32, memory: Memory):
        """The need-th greatest of key ^ flip among those below LIMIT; there are at least so many."""
        tid, _, _ = cute.arch.thread_idx()
        greatest, reached = register(Int32, ABSENT), register(Int32, 0)

        def note_greatest(key):
            value = key ^ flip
            greatest[0] = cutlass.max(greatest[0], choose(in_range(value, Int32(0)), value, Int32(ABSENT)))

        self.visit_keys(row, fours, note_greatest)
        low, turn = self.bound(greatest[0], need, memory)
        if tid == 0:
            memory.listed[0] = 0
        cute.arch.sync_threads()

        def list_above(key):
            value = key ^ flip
            reached[0] += Int32(in_range(value, low))
            list_if(in_range(value, low + 1), value, memory)

        self.visit_keys(row, fours, list_above)
        reach = team_sum(reached[0], memory.sums, turn, WARPS)
        above = memory.listed[0]
        if above >= need:
            low, reach, above = self.search(row, fours, need, flip, low + 1, above, turn ^ 1, memory)
        # The list is written again only after the next barrier.
        cute.arch.sync_threads()
        return Found(low ^ flip, reach, above)

    @cute.jit
    def bound(self, mine: Int32, need: Int32, memory: Memory):
        """(a number that at least `need` threads reach, if so many have one, and few more; the next turn)"""
        most = cutlass.max(need, cutlass.min(2 * need, FEW))
        searching = Boolean(team_sum(Int32(mine >= 0), memory.sums, Int32(0), WARPS) >= need)
        low, high, turn = Int32(0), Int32(LIMIT - 1), Int32(1)
        while searching:
            middle = low + ((high - low + 1) >> 1)
            count = team_sum(Int32(mine >= middle), memory.sums, turn, WARPS)
            turn = turn ^ 1
            if count >= need:
                low = middle
            else:
                high = middle - 1
            searching = Boolean(low < high) & (Boolean(count < need) | Boolean(count > most))
        return low, turn

    @cute.jit
    def search(self, row, fours, need: Int32, flip: Int32, low: Int32, listed: Int32, turn: Int32, memory: Memory):
        """(threshold, how many reach it, how many are above); `listed` reach low, and are on the list if they fit."""
        tid, _, _ = cute.arch.thread_idx()
        mine = cute.make_rmem_tensor(cute.make_layout(LIST // THREADS), Int32)
        for j in cutlass.range_constexpr(LIST // THREADS):
            mine[j] = ABSENT
            if tid + j * THREADS < listed:
                mine[j] = memory.entries[tid + j * THREADS]
        high, reach, above = Int32(LIMIT - 1), listed, Int32(0)
        searching = Boolean(low < high) & Boolean(reach != need)
        while searching:
            middle = low + ((high - low + 1) >> 1)
            counted = register(Int32, 0)

            def count(key, middle=middle, counted=counted):
                counted[0] += Int32(in_range(key ^ flip, middle))

            if listed <= LIST:
                for j in cutlass.range_constexpr(LIST // THREADS):
                    counted[0] += Int32(mine[j] >= middle)
            else:
                self.visit_keys(row, fours, count)
            found = team_sum(counted[0], memory.sums, turn, WARPS)
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
    def mark(self, row: Int64, marks, state, expert: Int32, threshold: Int32, ties: Int32, memory: Memory):
        """Write, for each 32 tokens, the mask of those kept and the number kept before; add to the tokens' totals."""
        tid, _, _ = cute.arch.thread_idx()
        words = marks.shape[0]
        kept_before, equal_before = Int32(0), Int32(0)
        for start in cutlass.range(0, words, SEGMENT, unroll=1):
            self.compare(row + Int64(start) * (WARP * 4), cutlass.min(words - start, SEGMENT), threshold, ties, memory)
            cute.arch.sync_threads()
            total = Uint32(scan_in_place(memory.before, SEGMENT, memory.scan, THREADS))
            for j in cutlass.range(tid, cutlass.min(words - start, SEGMENT), THREADS, unroll=1):
                above, equal, before = memory.above[j], memory.equal[j], Uint32(memory.before[j])
                passed = equal_before + Int32(before >> Uint32(16))
                rest = equal
                for _ in cutlass.range(cutlass.min(ties - passed, count_bits(equal)), unroll=1):
                    rest = rest & (rest - Uint32(1))
                kept = above | (equal ^ rest)
                rank = kept_before + Int32(before & Uint32(0xFFFF)) + cutlass.min(ties, passed)
                store_pair(address(marks, start + j, self.experts * 8) + expert * 8, Int32(kept), rank)
                add_global_int(address(state, 2 * self.experts + start + j, 4), count_bits(kept))
            kept_before += Int32(total & Uint32(0xFFFF))
            equal_before += Int32(total >> Uint32(16))
            cute.arch.sync_threads()

    @cute.jit
    def compare(self, row: Int64, words: Int32, threshold: Int32, ties: Int32, memory: Memory):
        """Masks of the keys above the threshold and equal to it, and the counts of both, for a segment of tokens."""
        tid, _, _ = cute.arch.thread_idx()
        lane, warp = tid % WARP, tid // WARP
        for first in cutlass.range(warp, SEGMENT, WARPS * MASKS, unroll=1):
            keys = []
            for u in cutlass.range_constexpr(MASKS):
                j = first + u * WARPS
                keys.append(load_or(row + Int64(j * WARP + lane) * 4, j < words, ABSENT, Int32))
            for u in cutlass.range_constexpr(MASKS):
                above, equal = ballot(Boolean(keys[u] > threshold)), ballot(Boolean(keys[u] == threshold))
                if lane == 0:
                    memory.above[first + u * WARPS] = above
                    memory.equal[first + u * WARPS] = equal
                    memory.before[first + u * WARPS] = count_bits(above) | (count_bits(equal) << 16)
