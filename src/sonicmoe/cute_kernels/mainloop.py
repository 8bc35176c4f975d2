"""The two loops over k: producers fill the ring, a consumer warpgroup multiplies out of it."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32, Uint32, const_expr
from cutlass.cute.nvgpu import warpgroup

from .operands import Load, smem_tensor
from .pipelines import Ring, RingBarriers

BLOCK_M = 64  # rows of one wgmma


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
            tiler_mn=(BLOCK_M, self.schedule.columns(self.tile_n)),
        )

    @cute.jit
    def produce(self, bars: RingBarriers, a: Load, b: Load, k_steps: Int32, step: Uint32, warp: Int32):
        """All producer threads: one tile's k steps. Returns the step after the last."""
        bulk_a, gather_a, carry_a = a
        bulk_b, gather_b, carry_b = b
        for k in cutlass.range(k_steps, unroll=1):
            self.ring.wait_empty(bars, step)
            stage = self.ring.stage(step)
            if warp == 0:
                with cute.arch.elect_one():
                    self.ring.expect(bars, step, self.a.tma_bytes + self.b.tma_bytes)
                bulk_a(k, stage, bars.full + stage)
                bulk_b(k, stage, bars.full + stage)
            carry_a = gather_a(k, stage, carry_a)
            carry_b = gather_b(k, stage, carry_b)
            self.ring.gathered(bars, step)
            step += 1
        return step

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
        columns = self.schedule.columns(self.tile_n)
        thread = tiled_mma.get_slice(0)
        blocks_a = cute.flat_divide(smem_tensor(smem_a, self.a.layout()), (BLOCK_M, self.a.tile_k))
        parts_b = cute.flat_divide(smem_tensor(smem_b, self.b.layout()), (columns, self.b.tile_k))
        first, part = self.schedule.first_block(consumer, self.tile_m), self.schedule.part_n(consumer)
        count = self.schedule.blocks(self.tile_m)
        fragments_a = [
            tiled_mma.make_fragment_A(thread.partition_A(blocks_a[None, None, first + i, 0, None]))
            for i in range(count)
        ]
        fragment_b = tiled_mma.make_fragment_B(thread.partition_B(parts_b[None, None, part, 0, None]))
        accumulators = [
            cute.make_rmem_tensor(tiled_mma.partition_shape_C((BLOCK_M, columns)), Float32) for _ in range(count)
        ]
        return fragments_a, fragment_b, accumulators

    @cute.jit
    def consume(
        self,
        tiled_mma: cute.TiledMma,
        bars: RingBarriers,
        fragments,
        k_steps: Int32,
        step: Uint32,
        consumer: Int32,
    ):
        """One consumer warpgroup: one tile's products. Each k step releases the stage of the step before it, whose
        products are then complete. Returns the step after the last."""
        fragments_a, fragment_b, accumulators = fragments
        self.schedule.wait_turn(consumer)
        tiled_mma.set(warpgroup.Field.ACCUMULATE, self.zero_first)
        if const_expr(self.zero_first):
            for i in cutlass.range_constexpr(len(accumulators)):
                accumulators[i].fill(0.0)
        for k in cutlass.range(k_steps, unroll=1):
            self.ring.wait_full(bars, step)
            if const_expr(self.ring.gathers):  # cp.async wrote through the generic proxy, wgmma reads through async
                cute.arch.fence_proxy("async.shared", space="cta")
            stage = self.ring.stage(step)
            warpgroup.fence()
            for kb in cutlass.range_constexpr(cute.size(fragment_b, mode=[2])):
                for i in cutlass.range_constexpr(len(accumulators)):
                    cute.gemm(
                        tiled_mma,
                        accumulators[i],
                        fragments_a[i][None, None, kb, stage],
                        fragment_b[None, None, kb, stage],
                        accumulators[i],
                    )
                tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
            warpgroup.commit_group()
            if k > 0:
                warpgroup.wait_group(1)
                self.ring.release(bars, step - 1)
            step += 1
        self.schedule.pass_turn(consumer)
        warpgroup.wait_group(0)
        if k_steps > 0:
            self.ring.release(bars, step - 1)
        return step
