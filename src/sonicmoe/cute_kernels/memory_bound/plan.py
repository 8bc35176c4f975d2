"""From the experts of the slots to the rows in the experts' order: a stable counting sort in two launches.

Slots are cut into chunks, one per CTA. The first launch counts each chunk's slots per expert. In the second, each CTA
counts what each of its warps has, sums the counts of all chunks and of those before its own, so that every warp knows
its first row of every expert; then ranks its slots and writes. A warp owns consecutive slots and a column of counters,
and its lanes of one expert find each other by a match: the order of the slots is kept at every level, and nothing
depends on timing.

Slots without an expert are counted as those of one more, number `experts`, whose rows are the padding. The second
launch starts while the first one runs, and waits for it before it reads counts; it reads the slots' experts earlier,
since what ran before the first one had ended when the second began (`await_earlier`).
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from ..dependent import await_earlier
from ..groups import ceil_div
from .access import address, load_chunk
from .team import WARP, change_shared, count_bits, lanes_below, scan_in_place, shared

COUNT_THREADS = 512
MAX_WARPS = 32
# The second launch's counters, and its two sums over chunks
COUNTER_BYTES = 200 * 1024


@dataclass(frozen=True)
class Plan:
    experts: int
    columns: int  # of the counts of a chunk: at least experts + 1, in whole 16-byte chunks
    slots_per_token: int | None  # None: the tokens of the slots are given

    @property
    def buckets(self) -> int:
        return self.experts + 1

    @property
    def warps(self) -> int:
        """Of the second launch: as many as have room for their counters, a power of two"""
        warps = MAX_WARPS
        while warps > 1 and (warps + 2) * self.columns * 4 > COUNTER_BYTES:
            warps //= 2
        return warps

    @cute.jit
    def __call__(
        self,
        ids: cute.Tensor,
        slot_token: cute.Tensor | None,
        counts: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor,
        row_slot: cute.Tensor,
        slot_row: cute.Tensor,
        stream,
    ):
        chunks = counts.shape[0]
        self.count(ids, counts).launch(grid=[chunks, 1, 1], block=[COUNT_THREADS, 1, 1], stream=stream, use_pdl=True)
        self.scatter(ids, slot_token, counts, cu_rows, row_token, row_slot, slot_row).launch(
            grid=[chunks, 1, 1], block=[self.warps * WARP, 1, 1], stream=stream, use_pdl=True, min_blocks_per_mp=1
        )

    @cute.jit
    def bucket(self, ids: cute.Tensor, slot: Int32) -> Int32:
        expert = ids[slot]
        bucket = Int32(self.experts)
        if expert >= 0 and expert < self.experts:
            bucket = Int32(expert)
        return bucket

    @cute.jit
    def chunk(self, ids: cute.Tensor):
        """(first slot, end) of this CTA's chunk"""
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        slots = ids.shape[0]
        size = ceil_div(slots, ctas)
        return cutlass.min(cta * size, slots), cutlass.min((cta + 1) * size, slots)

    @cute.kernel
    def count(self, ids: cute.Tensor, counts: cute.Tensor):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        counters = shared(Int32, self.columns)
        for e in cutlass.range(tid, self.columns, COUNT_THREADS):
            counters[e] = 0
        cute.arch.sync_threads()
        await_earlier()
        first, end = self.chunk(ids)
        for slot in cutlass.range(first + tid, end, COUNT_THREADS, unroll=4):
            change_shared("add.s32", counters, self.bucket(ids, slot), 1)
        cute.arch.sync_threads()
        for e in cutlass.range(tid, self.columns, COUNT_THREADS):
            counts[cta, e] = counters[e]

    @cute.kernel
    def scatter(
        self,
        ids: cute.Tensor,
        slot_token: cute.Tensor | None,
        counts: cute.Tensor,
        cu_rows: cute.Tensor,
        row_token: cute.Tensor,
        row_slot: cute.Tensor,
        slot_row: cute.Tensor,
    ):
        cta, _, _ = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        threads = const_expr(self.warps * WARP)
        counters = shared(Int32, self.warps, self.columns)
        totals, before, sums = shared(Int32, self.columns), shared(Int32, self.columns), shared(Int32, MAX_WARPS)
        for e in cutlass.range(tid, self.columns, threads):
            totals[e] = 0
            before[e] = 0
            for w in cutlass.range_constexpr(self.warps):
                counters[w, e] = 0
        cute.arch.sync_threads()

        first, end = self.chunk(ids)
        of_warp = ceil_div(end - first, self.warps)
        first = first + warp * of_warp
        end = cutlass.min(first + of_warp, end)
        for slot in cutlass.range(first + lane, end, WARP, unroll=4):
            change_shared("add.s32", counters, warp * self.columns + self.bucket(ids, slot), 1)
        await_earlier()
        self.sum_chunks(counts, totals, before, cta, tid)
        cute.arch.sync_threads()

        scan_in_place(totals, self.buckets, sums, threads)
        for e in cutlass.range(tid, self.buckets, threads):
            if cta == 0:
                cu_rows[e] = totals[e]
            row = totals[e] + before[e]
            for w in cutlass.range_constexpr(self.warps):
                count = counters[w, e]
                counters[w, e] = row
                row += count
        cute.arch.sync_threads()
        self.rank(ids, slot_token, counters, row_token, row_slot, slot_row, first, end)

    @cute.jit
    def sum_chunks(self, counts: cute.Tensor, totals: cute.Tensor, before: cute.Tensor, cta: Int32, tid: Int32):
        """Adds the counts of all chunks to `totals`, and those of chunks before this one to `before`.

        A thread takes four experts of every `groups`-th chunk; groups is 1 where there are more fours than threads.
        """
        fours, threads = const_expr(self.columns // 4), const_expr(self.warps * WARP)
        groups = const_expr(max(1, threads // fours))
        for part in cutlass.range(tid, fours * groups, threads, unroll=1):
            group = part // fours
            first = (part - group * fours) * 4
            total = cute.make_rmem_tensor(cute.make_layout(4), Int32)
            mine = cute.make_rmem_tensor(cute.make_layout(4), Int32)
            total.fill(0)
            mine.fill(0)
            for c in cutlass.range(group, counts.shape[0], groups, unroll=8):
                found = load_chunk(address(counts, c, self.columns * 4) + first * 4, Boolean(True))
                for j in cutlass.range_constexpr(4):
                    total[j] += found[j]
                    if c < cta:
                        mine[j] += found[j]
            for j in cutlass.range_constexpr(4):
                change_shared("add.s32", totals, first + j, total[j])
                change_shared("add.s32", before, first + j, mine[j])

    @cute.jit
    def rank(self, ids, slot_token, counters, row_token, row_slot, slot_row, first: Int32, end: Int32):
        """One warp: the rows of its slots, from the next row of each expert, which it keeps up to date."""
        tid, _, _ = cute.arch.thread_idx()
        warp, lane = tid // WARP, tid % WARP
        slot = first + lane
        while slot - lane < end:
            # A lane past the end has no expert in common with any other.
            bucket = Int32(self.buckets)
            if slot < end:
                bucket = self.bucket(ids, slot)
            peers = cute.arch.match_sync(-1, bucket)
            below = peers & lanes_below(lane)
            row = Int32(0)
            if slot < end:
                row = counters[warp, bucket] + count_bits(below)
            cute.arch.sync_warp()
            if slot < end:
                if below == 0:
                    counters[warp, bucket] += count_bits(peers)
                self.write(slot_token, row_token, row_slot, slot_row, bucket, row, slot)
            cute.arch.sync_warp()
            slot += WARP

    @cute.jit
    def write(self, slot_token, row_token, row_slot, slot_row, bucket: Int32, row: Int32, slot: Int32):
        if bucket < self.experts:
            if const_expr(self.slots_per_token is None):
                row_token[row] = slot_token[slot]
            else:
                row_token[row] = slot // self.slots_per_token
            row_slot[row] = slot
            slot_row[slot] = row
        else:
            row_token[row] = 0
            row_slot[row] = 0
            slot_row[slot] = -1
