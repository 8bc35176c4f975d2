"""The K greatest of each row of logits and their scores: one warp per token, a tournament in shared memory.

Experts form 32 groups of neighbours, one per lane, which keeps the greatest key of its group. A round is one integer
reduction over the lanes for the greatest key; a ballot for the first lane, so the lowest group, that has it; a read of
that group's keys by all lanes; a ballot for the first of them, which is the winner, and which that lane notes and
removes; and a second reduction for what is then the group's greatest key. Some 25 instructions, whatever the number of
experts, and ties go to the lower expert without a comparison of ids. No order depends on timing.

Predicted: 70 + 25 K + 8 N instructions a token, with N = E / 32 experts in a group, and 15 N more for a softmax over
all E. At 4 instructions a cycle and SM an H200 needs 8, 19, 7 and 16 µs for (T,E,K) = (24576,128,8), (32768,256,16),
(32768,64,4), (32768,512,10), where the bytes take 3, 8, 2 and 16; expect half as much again.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Uint32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from ..ptx import reciprocal
from .access import address, load_chunk, numbers
from .logits import (
    ABSENT,
    LOWEST_KEY,
    Row,
    choose,
    exp,
    finite,
    greater,
    key_of,
    less,
    load_number,
    number_of,
    sigmoid,
    store_number,
    warp_greatest,
    warp_sum,
    without_nan,
    working,
)
from .scores import Scores
from .team import WARP, lanes_below, shared
from .words import ballot, first_lane, load_words, store_words

BATCH = 8  # pieces of a row whose loads are in flight together
UNROLL = 8  # rounds


@dataclass(frozen=True)
class TopK:
    row: Row
    top: int
    scores: Scores
    biased: bool
    num_groups: int
    top_groups: int

    @property
    def entries(self) -> int:
        """Experts of a lane's group, a power of two"""
        return 1 << (ceil_div(self.row.size, WARP) - 1).bit_length()

    @property
    def spread(self) -> int:
        """Words of shared memory between groups: lanes that read 16 bytes of theirs meet in no bank"""
        return self.entries if self.entries <= 4 else self.entries + 4

    @property
    def words(self) -> int:
        """Of a warp: keys, then (key, expert) of each round"""
        return ceil_div(WARP * self.spread + 2 * self.top, 4) * 4

    @property
    def warps(self) -> int:
        return 8 if self.entries <= WARP else 4

    @property
    def slots(self) -> int:
        """Of a lane"""
        return ceil_div(self.top, WARP)

    @cute.jit
    def __call__(self, logits: cute.Tensor, bias: cute.Tensor | None, scores: cute.Tensor, ids: cute.Tensor, stream):
        self.kernel(logits, bias, scores, ids).launch(
            grid=[ceil_div(logits.shape[0], self.warps), 1, 1],
            block=[self.warps * WARP, 1, 1],
            stream=stream,
            use_pdl=True,
        )

    @cute.kernel
    def kernel(self, logits: cute.Tensor, bias: cute.Tensor | None, scores: cute.Tensor, ids: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        memory = shared(Uint32, self.warps, self.words)
        table = Int32(memory.iterator.toint()) + warp * (self.words * 4)
        token = cta * self.warps + warp
        await_earlier()
        if token < logits.shape[0]:
            self.fill(logits, token, table, lane)
            cute.arch.sync_warp()
            greatest = self.greatest(table, lane)
            top, rest = Float32(0.0), Float32(1.0)
            if const_expr(self.scores.over_all):
                top, rest = self.softmax(table, lane, greatest)
            if const_expr(self.biased):
                greatest = self.compare_biased(table, lane, bias, top, rest)
                cute.arch.sync_warp()
            if const_expr(self.top_groups < self.num_groups):
                self.drop_groups(table, lane)
                cute.arch.sync_warp()
                greatest = self.greatest(table, lane)
            self.rounds(table, lane, greatest)
            cute.arch.sync_warp()
            self.write(logits, scores, ids, token, table, lane, top, rest)

    def at(self, table: Int32, expert) -> Int32:
        """The address of an expert's key"""
        if self.spread == self.entries:
            return table + expert * 4
        shift = self.entries.bit_length() - 1
        return table + (expert + (expert >> shift) * (self.spread - self.entries)) * 4

    def fill(self, logits: cute.Tensor, token: Int32, table: Int32, lane: Int32) -> None:
        """Write the keys of the token's logits, ABSENT past the last expert."""
        row = self.row
        pieces = ceil_div(self.entries, row.together)
        for start in range(0, pieces, BATCH):
            batch = range(start, min(start + BATCH, pieces))
            loaded = [row.load(logits, token, piece, lane) if piece < row.pieces else [] for piece in batch]
            for piece, values in zip(batch, loaded, strict=True):
                expert = row.first(piece, lane)
                keys = [key_of(working(v)) for v in values] or [Uint32(ABSENT)] * row.together
                past_end = (piece + 1) * WARP * row.together > row.size
                if values and past_end and row.size < WARP * self.entries:
                    keys = [choose(expert < row.size, key, Uint32(ABSENT)) for key in keys]
                inside = Boolean(expert < WARP * self.entries)
                for i in range(0, row.together, 4):
                    store_words(self.at(table, expert) + i * 4, keys[i : i + 4], inside)

    def group(self, table: Int32, lane: Int32) -> list:
        """The keys of a lane's group."""
        first = table + lane * (self.spread * 4)
        step = min(self.entries, 4)
        return [key for i in range(0, self.entries, step) for key in load_words(first + i * 4, step)]

    def greatest(self, table: Int32, lane: Int32) -> Uint32:
        return greatest_of(self.group(table, lane))

    def softmax(self, table: Int32, lane: Int32, greatest: Uint32) -> tuple:
        """(greatest logit, reciprocal of the sum) of the softmax over all experts"""
        top = finite(number_of(warp_greatest(greatest)))
        total = Float32(0.0)
        for key in self.group(table, lane):
            total = total + exp(number_of(greater(key, Uint32(LOWEST_KEY))) - top)
        return top, reciprocal(cute.arch.fmax(warp_sum(total), Float32(1.0)))

    def compare_biased(self, table: Int32, lane: Int32, bias: cute.Tensor, top: Float32, rest: Float32) -> Uint32:
        """Replace the keys of a lane's group by those of score + bias, -inf where the logit is; return the greatest."""
        step = min(self.entries, 4)
        greatest = Uint32(ABSENT)
        for i in range(0, self.entries, step):
            expert = lane * self.entries + i
            source = self.at(table, expert)
            biases, changed = self.bias_of(bias, expert, step), []
            for j, (key, b) in enumerate(zip(load_words(source, step), biases, strict=True)):
                z = number_of(greater(key, Uint32(LOWEST_KEY)))
                if self.scores.kind == "sigmoid":
                    score = sigmoid(z)
                elif self.scores.over_all:
                    score = exp(z - top) * rest
                else:
                    score = z
                compared = choose(key > LOWEST_KEY, key_of(without_nan(score + b)), Uint32(LOWEST_KEY))
                changed.append(choose(expert + j < self.row.size, compared, Uint32(ABSENT)))
            store_words(source, changed, Boolean(True))
            greatest = greater(greatest, greatest_of(changed))
        return greatest

    def bias_of(self, bias: cute.Tensor, expert: Int32, count: int) -> list:
        source = address(bias, expert, 4)
        if count == 4 and self.row.size % 4 == 0:
            return numbers(Float32, load_chunk(source, Boolean(expert < self.row.size)))
        return [load_number(Float32, source + 4 * j, Boolean(expert + j < self.row.size)) for j in range(count)]

    @cute.jit
    def drop_groups(self, table: Int32, lane: Int32):
        """Make the experts outside the token's best groups ABSENT. Lane q keeps the worth of group q."""
        worths = Uint32(ABSENT)
        for g in cutlass.range(self.num_groups, unroll=1):
            worths = choose(lane == g, self.worth(table, lane, g), worths)
        kept = Uint32(0)
        for _ in cutlass.range(self.top_groups, unroll=1):
            best = warp_greatest(worths)
            holder = first_lane(worths == best)
            kept = kept | (Uint32(1) << Uint32(holder))
            worths = choose(lane == holder, Uint32(ABSENT), worths)
        size = const_expr(self.row.size // self.num_groups)
        for q in cutlass.range(self.num_groups, unroll=1):
            dropped = ((kept >> Uint32(q)) & Uint32(1)) == Uint32(0)
            for i in cutlass.range_constexpr(0, size, WARP):
                store_words(self.at(table, q * size + (i + lane)), [Uint32(ABSENT)], dropped & (i + lane < size))

    def worth(self, table: Int32, lane: Int32, q: Int32) -> Uint32:
        """The key of a group's worth: its greatest value, or the sum of its two greatest for sigmoid."""
        size = self.row.size // self.num_groups
        first, second = Uint32(ABSENT), Uint32(ABSENT)
        for i in range(0, size, WARP):
            (key,) = load_words(self.at(table, q * size + (i + lane)), 1, Boolean(i + lane < size))
            second = greater(second, less(first, key))
            first = greater(first, key)
        best = warp_greatest(first)
        if self.scores.kind != "sigmoid":
            return best
        holder = lane == first_lane(first == best)
        runner_up = warp_greatest(choose(holder, second, first))
        value, other = number_of(best), number_of(runner_up)
        if not self.biased:
            value, other = sigmoid(value), sigmoid(other)
        both = key_of(value + choose(runner_up > LOWEST_KEY, other, Float32(0.0)))
        return choose(best > LOWEST_KEY, both, Uint32(LOWEST_KEY))

    @cute.jit
    def rounds(self, table: Int32, lane: Int32, greatest: Uint32):
        """Note the key and the expert of each round's winner, and remove it."""
        width = const_expr(max(1, self.entries // WARP))
        readers = const_expr(self.entries // width)
        below = lanes_below(lane)
        for r in cutlass.range(self.top, unroll=UNROLL):
            best = warp_greatest(greatest)
            holder = first_lane(greatest == best)
            source = table + holder * (self.spread * 4) + lane * (width * 4)
            keys = load_words(source, width, Boolean(lane < readers))
            equal = greatest_of(keys) == best
            wins = equal & ((ballot(equal) & below) == Uint32(0))
            left = Uint32(ABSENT)
            for i in cutlass.range_constexpr(width):
                this = wins & (keys[i] == best)
                wins = wins & (keys[i] != best)
                expert = Uint32(holder * self.entries + lane * width + i)
                store_words(source + i * 4, [Uint32(ABSENT)], this)
                store_words(self.noted(table, r), [best, expert], this)
                left = greater(left, choose(this, Uint32(ABSENT), keys[i]))
            greatest = choose(lane == holder, warp_greatest(left), greatest)

    def noted(self, table: Int32, r) -> Int32:
        """The address of what round r noted"""
        return table + WARP * self.spread * 4 + r * 8

    def write(self, logits, scores, ids, token, table, lane, top, rest) -> None:
        chosen, experts = [], []
        for i in range(self.slots):
            valid = Boolean(i * WARP + lane < self.top)
            key, expert = load_words(self.noted(table, i * WARP + lane), 2, valid)
            if self.biased:
                z = working(self.row.load_one(logits, token, expert, valid))
            else:
                z = number_of(greater(key, Uint32(LOWEST_KEY)))
            chosen.append(z)
            experts.append(expert)
        values = self.scores.scores(self.scores.terms(chosen, top, rest))
        for i, (score, expert) in enumerate(zip(values, experts, strict=True)):
            slot = i * WARP + lane
            valid = Boolean(slot < self.top)
            store_number(Float32, address(scores, token, self.top * 4) + slot * 4, score, valid)
            store_index(address(ids, token, self.top * 4) + slot * 4, expert, valid)


def greatest_of(keys) -> Uint32:
    greatest = keys[0]
    for key in keys[1:]:
        greatest = greater(greatest, key)
    return greatest


def store_index(target, value, valid: Boolean) -> None:
    cute.arch.inline_ptx(
        "{.reg .pred p; setp.ne.s32 p, {$r1}, 0; @p st.global.b32 [{$r0}], {$r2};}",
        read_only_args=[target, Int32(valid), value],
    )
