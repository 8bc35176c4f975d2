"""The two loops over k: producers fill the ring, a consumer warpgroup multiplies out of it."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import warpgroup

from .groups import BLOCK_M, Tile, ceil_div
from .operands import Load, smem_tensor
from .pipelines import Late, Ring, RingBarriers

BLOCK_K = 16  # reduction length of one wgmma


@dataclass(frozen=True)
class Mainloop:
    a: object  # operand source
    b: object
    ring: Ring
    schedule: object
    tile_m: int
    tile_n: int
    zero_first: bool  # a tile may have no k step; otherwise the first product overwrites the accumulators

    def tiled_mma(self):
        return sm90.make_trivial_tiled_mma(
            self.a.dtype,
            self.b.dtype,
            self.a.major,
            self.b.major,
            Float32,
            (1, 1, 1),
            tiler_mn=(BLOCK_M, self.tile_n),
        )

    @cute.jit
    def produce(
        self, bars: RingBarriers, a: Load, b: Load, keep, k_steps: Int32, step: Uint32, seen: Int32, warp: Int32
    ):
        """All producer threads: one tile's k steps. keep, seen: of the pace. Returns the step after the last, and what
        is seen then."""
        bulk_a, gather_a, carry_a = a
        bulk_b, gather_b, carry_b = b
        for k in cutlass.range(k_steps, unroll=1):
            self.ring.wait_empty(bars, step)
            stage = self.ring.stage(step)
            if warp == 0:
                seen = keep(k, step, seen)
                with cute.arch.elect_one():
                    self.ring.expect(bars, step, self.a.tma_bytes + self.b.tma_bytes)
                bulk_a(k, stage, bars.full + stage)
                bulk_b(k, stage, bars.full + stage)
            carry_a = gather_a(k, stage, carry_a)
            carry_b = gather_b(k, stage, carry_b)
            self.ring.gathered(bars, step)
            step += 1
        return step, seen

    @cute.jit
    def feed(self, bars: RingBarriers, load, steps: cutlass.Constexpr, tma_bytes: cutlass.Constexpr, step: Uint32,
             warp: Int32):  # fmt: skip
        """All producer threads: the steps with a tile's inputs of the epilogue. Returns the step after the last."""
        for i in cutlass.range_constexpr(steps):
            self.ring.wait_empty(bars, step)
            stage = self.ring.stage(step)
            if warp == 0:
                with cute.arch.elect_one():
                    self.ring.expect(bars, step, tma_bytes)
                load(i, stage, bars.full + stage)
            self.ring.gathered(bars, step)
            step += 1
        return step

    def fragments(self, tiled_mma: cute.TiledMma, smem_a: cute.Pointer, smem_b: cute.Pointer, consumer: Int32):
        """Of one consumer warpgroup: A by 64-row block, B, and the fp32 accumulators by block."""
        thread = tiled_mma.get_slice(0)
        blocks_a = cute.flat_divide(smem_tensor(smem_a, self.a.layout()), (BLOCK_M, self.a.tile_k))
        parts_b = cute.flat_divide(smem_tensor(smem_b, self.b.layout()), (self.tile_n, self.b.tile_k))
        first = self.schedule.first_block(consumer, self.tile_m)
        count = self.schedule.blocks(self.tile_m)
        fragments_a = [
            tiled_mma.make_fragment_A(thread.partition_A(blocks_a[None, None, first + i, 0, None]))
            for i in range(count)
        ]
        fragment_b = tiled_mma.make_fragment_B(thread.partition_B(parts_b[None, None, 0, 0, None]))
        accumulators = [
            cute.make_rmem_tensor(tiled_mma.partition_shape_C((BLOCK_M, self.tile_n)), Float32) for _ in range(count)
        ]
        return fragments_a, fragment_b, accumulators

    @cute.jit
    def consume(
        self, tiled_mma: cute.TiledMma, bars: RingBarriers, fragments, tile: Tile, step: Uint32, consumer: Int32,
        late: Late, piece, pieces: cutlass.Constexpr,
    ):  # fmt: skip
        """One consumer warpgroup: one tile's products, of which those of one step stay under way. Beside the first
        whole k steps it calls piece(i), for each i less than `pieces`; what there are no steps for comes after the last
        of them. Returns the step after the last."""
        blocks = const_expr(cute.size(fragments[1], mode=[2]))
        k_steps = tile.k_steps
        self.schedule.wait_turn(consumer)
        tiled_mma.set(warpgroup.Field.ACCUMULATE, self.zero_first)
        if const_expr(self.zero_first):
            for accumulator in fragments[2]:
                accumulator.fill(0.0)
            k_steps = tile.rows // (blocks * BLOCK_K)  # whole ones
        for i in cutlass.range_constexpr(pieces):
            if i < k_steps:
                step = self.k_step(tiled_mma, bars, fragments, Int32(i), step, late)
                tiled_mma.set(warpgroup.Field.ACCUMULATE, True)  # that in k_step is not seen here
            piece(i)
        for k in cutlass.range(pieces, k_steps, unroll=1):
            step = self.k_step(tiled_mma, bars, fragments, k, step, late)
            tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        if const_expr(self.zero_first):
            rest = ceil_div(tile.rows, BLOCK_K) - k_steps * blocks
            if rest > 0:
                stage = self.arrived(bars, step)
                for block in cutlass.range_constexpr(blocks):
                    if block < rest:
                        self.multiply(tiled_mma, fragments, block, stage)
                warpgroup.commit_group()
                if k_steps > 0:
                    warpgroup.wait_group(1)
                    self.ring.release(bars, step - 1)
                step += 1
        self.schedule.pass_turn(consumer)
        warpgroup.wait_group(0)
        if tile.k_steps > 0:
            self.ring.release(bars, step - 1)
        return step

    @cute.jit
    def k_step(self, tiled_mma: cute.TiledMma, bars: RingBarriers, fragments, k: Int32, step: Uint32, late: Late):
        """The products of k step k, which stay under way. Releases the stage of the step before, whose products are
        then complete; the first one `late`'s, which there is only where every tile has a k step. Returns the step
        after."""
        stage = self.arrived(bars, step)
        for block in cutlass.range_constexpr(cute.size(fragments[1], mode=[2])):
            self.multiply(tiled_mma, fragments, block, stage)
            tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        warpgroup.commit_group()
        if k > 0:
            warpgroup.wait_group(1)
            self.ring.release(bars, step - 1)
        else:
            late.release(bars, step)
        return step + 1

    def arrived(self, bars: RingBarriers, step: Uint32) -> Int32:
        """The stage of a step, once its operands are there."""
        self.ring.wait_full(bars, step)
        if self.ring.gathers:  # cp.async wrote through the generic proxy, wgmma reads through async
            cute.arch.fence_proxy("async.shared", space="cta")
        warpgroup.fence()
        return self.ring.stage(step)

    def multiply(self, tiled_mma: cute.TiledMma, fragments, block: int, stage: Int32):
        """The products of one block along k."""
        fragments_a, fragment_b, accumulators = fragments
        b = fragment_b[None, None, block, stage]
        for a, accumulator in zip(fragments_a, accumulators, strict=True):
            cute.gemm(tiled_mma, accumulator, a[None, None, block, stage], b, accumulator)

    @cute.jit
    def pass_by(self, bars: RingBarriers, steps: Int32, step: Uint32, late: Late):
        """One consumer warpgroup: a tile that it has no rows of. Returns the step after the last."""
        for _ in cutlass.range(steps, unroll=1):
            self.ring.wait_full(bars, step)
            if late.keeps():
                late.release(bars, step)
            else:
                self.ring.release(bars, step)
            step += 1
        return step
