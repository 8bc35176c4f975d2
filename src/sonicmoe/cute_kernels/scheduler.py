"""Which tiles a warpgroup of a persistent CTA works on, and whose turn it is. Knows counts, no tensor.

Tiles go round-robin: CTA b takes b, b + ctas, b + 2 ctas, ... Cooperative consumers all work on each of them; ping-pong
consumers take them in turns, and their main loops alternate by a pair of named barriers: without the order the second
warpgroup would wait two laps ahead on a parity that is already satisfied.
"""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Int32

from .ptx import WARPGROUP

EPILOGUE_BARRIER = 1  # + consumer index
ORDER_BARRIER = 3  # + consumer index
CONSUMERS = 2


@dataclass(frozen=True)
class Cooperative:
    """Both consumer warpgroups share a tile, half of its rows each."""

    stage_readers = CONSUMERS  # warpgroups that read a stage
    teams = 1  # of warpgroups, which take the CTA's tiles in turns
    splits = True  # half a tile takes less time: the other warpgroup has nothing to do
    defers = True  # epilogues: nobody would multiply meanwhile

    def blocks(self, tile_m: int) -> int:
        """64-row blocks of a warpgroup"""
        return tile_m // 64 // CONSUMERS

    def first_block(self, consumer: Int32, tile_m: int):
        return consumer * self.blocks(tile_m)

    def first(self, consumer: Int32) -> Int32:
        return Int32(0)

    def start(self, consumer: Int32):
        pass

    def wait_turn(self, consumer: Int32):
        pass

    def pass_turn(self, consumer: Int32):
        pass


@dataclass(frozen=True)
class PingPong:
    """Each consumer warpgroup owns a whole tile; one multiplies while the other is in its epilogue."""

    stage_readers = 1
    teams = CONSUMERS
    splits = False
    defers = False

    def blocks(self, tile_m: int) -> int:
        return tile_m // 64

    def first_block(self, consumer: Int32, tile_m: int):
        return 0

    def first(self, consumer: Int32) -> Int32:
        return Int32(consumer)

    @cute.jit
    def start(self, consumer: Int32):
        if consumer == 1:
            self.pass_turn(consumer)

    def wait_turn(self, consumer: Int32):
        cute.arch.barrier(barrier_id=ORDER_BARRIER + consumer, number_of_threads=CONSUMERS * WARPGROUP)

    def pass_turn(self, consumer: Int32):
        cute.arch.barrier_arrive(barrier_id=ORDER_BARRIER + 1 - consumer, number_of_threads=CONSUMERS * WARPGROUP)
