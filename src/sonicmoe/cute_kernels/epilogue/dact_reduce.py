"""DActReduce: the activation's backward, with p = the accumulators (the gradient of a before its score).

Reads h; with a = act(h) and s = the row's score it stores dh = act'(h) * s * p and a_s = s * a, and writes for each row
of a tile the sum of p * a: its part of dscore.

h comes through the ring, in steps that follow the tile's k steps, so it is under way while the last products run. dh
takes its place in the stage, and a_s what is left of it, or buffers where that is too little.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32

from ..copies import halved_rows, ragged_rows
from ..groups import Tile
from ..operands import TmaTensor
from ..ptx import ldmatrix_x4, pack, unpack
from ..scheduler import CONSUMERS
from . import math
from .base import box_of_rows
from .driver import BOX, BUFFER_BYTES, Lane, load_box, registers_of, tma_load, tma_store
from .ring import RingEpilogue


class DActReduceArgs(NamedTuple):
    h: TmaTensor
    dh: TmaTensor
    a_s: TmaTensor
    scores: cute.Tensor  # (slots,)
    row_slot: cute.Tensor
    parts: cute.Tensor  # (rows, parts)


class DActReduceState(NamedTuple):
    scores: list  # [block][row index]
    sums: list  # of the block at hand, by row index; replaced while tracing
    ahead: list  # registers of h loaded for the next quarter, while tracing


@dataclass(frozen=True)
class DActReduce(RingEpilogue):
    act: object
    columns: int  # of the tile
    n: int  # columns of one half

    @property
    def halves(self) -> int:
        return 2 if self.act.gated else 1

    @property
    def outs(self) -> int:
        return self.halves + 1

    @property
    def in_ring(self) -> int:
        """dh, in the place of h, and a_s unless it has buffers"""
        return self.halves if self.buffer_count else self.outs

    @property
    def ring_bytes(self) -> int:
        return CONSUMERS * self.halves * BUFFER_BYTES

    def describe(self, tensors) -> DActReduceArgs:
        h, dh, a_s, scores, row_slot, parts = tensors
        return DActReduceArgs(
            tma_load(halved_rows(h, self.halves), self.dtype),
            tma_store(ragged_rows(dh, self.halves), self.dtype),
            tma_store(ragged_rows(a_s, 1), self.dtype),
            scores,
            row_slot,
            parts,
        )

    def feed(self, args: DActReduceArgs, tile: Tile, ring_smem, schedule, tile_m: int):
        """load(step, stage, barrier), called by one warp of the producer."""

        def load(step: int, stage: Int32, bar: cute.Pointer):
            mb, nb = divmod(step, self.subtiles)
            for half in range(self.halves):
                region, first = self.box(half)
                for consumer in range(CONSUMERS):
                    block = schedule.first_block(consumer, tile_m) + mb
                    column = tile.n * self.columns + nb * BOX
                    box = stage * self.boxes[region] + first + consumer
                    start = (tile.row + block * BOX, column, half)
                    load_box(args.h, ring_smem[region], self.ring_layout(region), box, start, bar)

        return load

    def open(self, args: DActReduceArgs, tile: Tile, lane: Lane, first_block) -> DActReduceState:
        scores = []
        for mb in range(self.blocks):
            rows = [cutlass.min((first_block + mb) * BOX + 8 * r + lane.row, tile.rows - 1) for r in range(2)]
            scores.append([args.scores[args.row_slot[tile.row + row]] for row in rows])
        return DActReduceState(scores, [Float32(0.0), Float32(0.0)], [])

    def h_registers(self, lane: Lane, fed, q: int):
        places = self.ring_places(fed, lane.consumer, range(self.halves))
        return [ldmatrix_x4(lane.matrix_address(place.address(), q, False)) for place in places]

    def visit(self, args, state: DActReduceState, lane: Lane, fed, acc: cute.Tensor, mb: int, nb: int, q: int):
        loaded = self.h_registers(lane, fed, 0) if q == 0 else state.ahead.pop()
        if q < 3:  # the next quarter, ahead of this one's stores
            state.ahead.append(self.h_registers(lane, fed, q + 1))
        dh = [[] for _ in range(self.halves)]

        def element(r, j, lo, hi):
            score = state.scores[mb][r]
            i = 2 * (j % 2) + r
            h = [unpack(self.dtype, registers[i]) for registers in loaded]
            weighted, slopes = [], []
            for side, p in enumerate((lo, hi)):
                a, slope = math.backward(self.act, self.dtype is BFloat16, tuple(pair[side] for pair in h))
                state.sums[r] = state.sums[r] + p * a
                weighted.append(score * a)
                slopes.append([s * (score * p) for s in slope])
            for half in range(self.halves):
                dh[half].append(pack(self.dtype, slopes[0][half], slopes[1][half]))
            return pack(self.dtype, *weighted)

        a_s = registers_of(acc, nb * (BOX // 8) + 2 * q, element)
        return (*dh, a_s)

    def targets(self, args: DActReduceArgs, tile: Tile, block, nb: int):
        column = tile.n * self.columns + nb * BOX
        return (
            *(box_of_rows(args.dh, tile, block, column, half) for half in range(self.halves)),
            box_of_rows(args.a_s, tile, block, column),
        )

    def finish_block(self, args: DActReduceArgs, state: DActReduceState, tile: Tile, lane: Lane, first_block, mb: int):
        for r in range(2):
            total = state.sums[r]
            for distance in (1, 2):
                total = total + cute.arch.shuffle_sync_bfly(total, distance)
            state.sums[r] = Float32(0.0)
            self.write_part(args, tile, lane, (first_block + mb) * BOX + 8 * r + lane.row, total)

    @cute.jit
    def write_part(self, args: DActReduceArgs, tile: Tile, lane: Lane, row: Int32, total: Float32):
        if lane.lane % 4 == 0:
            if row < tile.rows:
                args.parts[tile.row + row, tile.n] = total
