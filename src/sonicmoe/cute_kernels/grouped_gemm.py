"""The grouped GEMM: one warp-specialised, persistent kernel for every variant.

Groups say which rows a tile covers, two operand sources say what is loaded, an epilogue says what happens to the
accumulators, a schedule says when the consumer warpgroups run, a pace whether CTAs keep together. This class is the
only place that knows all five, and it knows nothing else: roles, set-up, and the order of things.

Roles: warpgroup 0 loads (warp 0 issues TMA, all four warps gather), warpgroups 1 and 2 multiply and run the epilogue.
Barriers: `full`/`empty` per stage (pipelines.py), named barriers 1, 2 (epilogue, one per consumer) and 3, 4
(ping-pong order).
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr

from .dependent import await_earlier
from .epilogue.driver import Lane
from .mainloop import Mainloop
from .operands import prefetch_descriptors
from .pipelines import Feed, Late
from .ptx import WARPGROUP
from .scheduler import CONSUMERS

THREADS = (1 + CONSUMERS) * WARPGROUP
# Registers per thread after the split; over the three warpgroups 504 at most: what the launch has given, 3 x 168.
GATHER_REGISTERS = (56, 224)
BULK_REGISTERS = (24, 240)


@dataclass(frozen=True)
class GroupedGemm:
    name: str
    cluster: int  # CTAs that share what they load of B
    groups: object
    mainloop: Mainloop
    epilogue: object
    pace: object

    @cute.jit
    def __call__(self, a: tuple, b: tuple, outputs: tuple, cu_rows: cute.Tensor, counter, num_ctas: Int32, stream):
        """a, b, outputs: the global tensors that the operand sources and the epilogue describe; counter: the pace's."""
        self.kernel(
            self.mainloop.a.describe(a),
            self.mainloop.b.describe(b),
            self.epilogue.describe(outputs),
            cu_rows,
            counter,
            self.mainloop.tiled_mma(),
        ).launch(
            grid=[cutlass.max(num_ctas // self.cluster, 1) * self.cluster, 1, 1],
            # A cluster of one is not the same as none: see docs/grouped_gemm.md.
            cluster=[self.cluster, 1, 1] if self.cluster > 1 else None,
            block=[THREADS, 1, 1],
            min_blocks_per_mp=1,
            stream=stream,
        )

    def storage(self):
        main, epilogue = self.mainloop, self.epilogue

        @cute.struct
        class Storage:
            ring: cute.struct.MemRange[Int64, 2 * main.ring.stages]
            table: cute.struct.MemRange[Int32, self.groups.table_size]
            a: cute.struct.Align[cute.struct.MemRange[main.a.dtype, cute.cosize(main.a.layout())], 1024]
            b: cute.struct.Align[cute.struct.MemRange[main.b.dtype, cute.cosize(main.b.layout())], 1024]
            out: cute.struct.Align[cute.struct.MemRange[epilogue.dtype, epilogue.buffer_elements], 1024]

        return Storage

    @cute.kernel
    def kernel(self, a: tuple, b: tuple, outputs: tuple, cu_rows: cute.Tensor, counter, tiled_mma: cute.TiledMma):
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        lane = cute.arch.lane_idx()
        group = cute.arch.make_warp_uniform(tid // WARPGROUP)
        storage = cutlass.memory.SmemAllocator().allocate(self.storage())
        bars = self.mainloop.ring.barriers(storage.ring.data_ptr())
        table = storage.table.get_tensor(cute.make_layout(self.groups.table_size))
        self.set_up(a, b, outputs, cu_rows, bars, table, warp, lane)
        if group == 0:
            self.produce(a, b, outputs, cu_rows, counter, storage, bars, table, tid, warp, lane)
        if group > 0:
            self.consume(outputs, cu_rows, tiled_mma, storage, bars, table, tid, group - 1)
        self.meet()  # no CTA may leave while another of its cluster can still write into its shared memory

    @cute.jit
    def set_up(self, a, b, outputs, cu_rows, bars, table, warp, lane):
        if warp == 0:
            prefetch_descriptors(a, b, *outputs)
            with cute.arch.elect_one():
                self.mainloop.ring.init(bars)
            cute.arch.mbarrier_init_fence()
        await_earlier()
        if warp == 1:
            self.groups.build_table(cu_rows, table, lane)
        cute.arch.sync_threads()
        self.meet()

    def meet(self):
        """All threads of the cluster."""
        if self.cluster > 1:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def produce(self, a, b, outputs, cu_rows, counter, storage, bars, table, tid, warp, lane):
        main, epilogue = self.mainloop, self.epilogue
        smem_a, smem_b = storage.a.data_ptr(), storage.b.data_ptr()
        cute.arch.setmaxregister_decrease(self.registers[0])
        if warp < (4 if main.ring.gathers else 1):
            step, seen = Uint32(0), Int32(0)
            turn, clusters, rank = self.first_turn()
            turns = self.groups.turns(table, clusters)
            keep = self.pace.open(counter)
            while turn < turns.count:
                tile = self.groups.tile(turn, turns.halves, rank, cu_rows, table, lane)
                load_a = main.a.open(a, smem_a, tile, tid, rank)
                load_b = main.b.open(b, smem_b, tile, tid, rank)
                step, seen = main.produce(bars, load_a, load_b, keep, tile.k_steps, step, seen, warp)
                load = epilogue.feed(outputs, tile, (smem_b, smem_a), main.schedule, main.tile_m)
                step = main.feed(bars, load, epilogue.ring_steps, epilogue.ring_bytes, step, warp)
                turn += clusters
            if warp == 0:
                self.pace.leave(counter, turn, turns.count)
            main.ring.drain(bars, step)

    @cute.jit
    def consume(self, outputs, cu_rows, tiled_mma, storage, bars, table, tid, consumer):
        main, schedule, epilogue = self.mainloop, self.mainloop.schedule, self.epilogue
        cute.arch.setmaxregister_increase(self.registers[1])
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx() % 4)
        lane = Lane(consumer, warp, cute.arch.lane_idx())
        smem_a, smem_b = storage.a.data_ptr(), storage.b.data_ptr()
        fragments = main.fragments(tiled_mma, smem_a, smem_b, consumer)
        first_block = schedule.first_block(consumer, main.tile_m)
        turn, clusters, rank = self.first_turn()
        turn += schedule.first(consumer) * clusters
        step = Uint32(0)
        if const_expr(schedule.teams > 1):  # every tile has the same number of k steps
            step = Uint32(consumer * (self.groups.k_steps + epilogue.ring_steps))
        turns = self.groups.turns(table, clusters)
        schedule.start(consumer)
        late = Late(main.ring, warp, epilogue.ring_steps > 0)
        held, smem, pieces = epilogue.nothing(), storage.out.data_ptr(), len(epilogue.pieces)

        def piece(index):
            epilogue.piece(outputs, held, smem, lane, first_block, index)

        while turn < turns.count:
            tile = self.groups.tile(turn, turns.halves, rank, cu_rows, table, lane.lane)
            if self.groups.has_rows(tile, first_block):
                state = epilogue.open(outputs, tile, lane, first_block)
                step = main.consume(tiled_mma, bars, fragments, tile, step, consumer, late, piece, pieces)
                feed = Feed(main.ring, bars, step, (smem_b, smem_a))
                epilogue.finish(outputs, state, held, smem, feed, tile, lane, first_block, fragments[2])
                step += epilogue.ring_steps
            else:
                step = main.pass_by(bars, tile.k_steps + epilogue.ring_steps, step, late)
            step += (schedule.teams - 1) * (tile.k_steps + epilogue.ring_steps)
            turn += schedule.teams * clusters
        late.release(bars, step)
        for i in cutlass.range_constexpr(pieces):  # of the last tile
            piece(i)
        epilogue.drain(lane)

    def first_turn(self):
        """(the cluster's first turn, clusters, rank of this CTA in the cluster)"""
        cta, ctas = Int32(cute.arch.block_idx()[0]), Int32(cute.arch.grid_dim()[0])
        return cta // self.cluster, ctas // self.cluster, cta % self.cluster

    @property
    def registers(self):
        return GATHER_REGISTERS if self.mainloop.ring.gathers else BULK_REGISTERS
