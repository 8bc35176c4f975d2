"""A tile configuration: the choices of a grouped GEMM that do not change its result, and whether they fit."""

from __future__ import annotations

from dataclasses import dataclass

RESERVED = 1024  # bytes of a block's shared memory that are the system's
SHARED_MEMORY = 232448 - RESERVED  # that a block may ask for on sm_90
ALIGNMENT = 1024  # of each buffer group: the swizzle repeats over it
BUFFER = 64 * 64 * 2  # bytes of an epilogue buffer
CONSUMERS = 2
MAX_GROUPS = 1024  # groups that the two-level search of the tile table covers
ACCUMULATORS = 128  # fp32 accumulators per thread that leave room for the epilogue
ACCUMULATORS_PLAIN_STORE = 192  # ping-pong, for an epilogue without registers of its own
TILE_M = 128  # rows of every GEMM's tile, and so what token rounding rounds to unless told otherwise

SCHEDULES = ("cooperative", "pingpong")


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@dataclass(frozen=True)
class TileConfig:
    """The choices of a grouped GEMM.

    schedule  "cooperative" (the consumer warpgroups split a tile's rows) or "pingpong" (they take whole tiles in turns)
    buffers   64x64 epilogue buffers of each consumer warpgroup; down_dgrad may have none, *_add needs none
    cluster   CTAs whose tiles have the same columns of B, which each loads a part of for all of them
    """

    schedule: str
    tile_n: int
    stages: int
    buffers: int
    tile_m: int = TILE_M
    tile_k: int = 64
    cluster: int = 1

    @property
    def warpgroup_rows(self) -> int:
        return self.tile_m // 2 if self.schedule == "cooperative" else self.tile_m

    @property
    def accumulators(self) -> int:
        """fp32 accumulators per thread"""
        return self.warpgroup_rows * self.tile_n // 128

    def shared_memory(self, table: int) -> int:
        """Bytes, for a table of `table` ints."""
        head = 8 * 2 * self.stages + 4 * table
        stage = (self.tile_m + self.tile_n) * self.tile_k * 2
        # A range cannot be empty: without buffers a few bytes, rounded up.
        return round_up(head, ALIGNMENT) + self.stages * stage + max(ALIGNMENT, CONSUMERS * self.buffers * BUFFER)

    def why_invalid(self, variant: str, groups: int, halves: int) -> str | None:
        """None if a kernel of this configuration can be built. halves: of n (gate and up)"""
        reduces_rows = "wgrad" in variant
        if self.tile_m != TILE_M or self.tile_k != 64:
            return f"tile_m must be {TILE_M} and tile_k 64"
        if self.schedule not in SCHEDULES:
            return f"unknown schedule {self.schedule}"
        if self.schedule == "pingpong" and reduces_rows:
            return "ping-pong needs the same number of k steps in every tile"
        if self.cluster not in (1, 2) or self.cluster > 1 and self.tile_n % (64 * self.cluster):
            return "cluster must be 1 or 2, and leave each CTA whole 64-column panels of B"
        if self.cluster > 1 and not reduces_rows:
            return "only the CTAs of a weight gradient share B"
        share = halves if variant == "up_proj" else 1
        if self.tile_n % (64 * share):
            return f"tile_n must be a multiple of {64 * share}"
        if self.tile_n > 256:
            return "a wgmma has at most 256 columns"
        plain = variant in ("down_proj", "up_dgrad") or reduces_rows
        if self.accumulators > (ACCUMULATORS_PLAIN_STORE if plain else ACCUMULATORS):
            return f"{self.accumulators} accumulators per thread do not fit beside the epilogue"
        if variant == "down_dgrad":  # h comes, and what has no buffer leaves, in stages of the ring
            in_ring = halves + (self.buffers == 0)
            if self.schedule == "pingpong":
                return "ping-pong would let a warpgroup wait two laps ahead of the ring, on steps that are the other's"
            if in_ring > self.tile_n // 64 // CONSUMERS + self.tile_m // 64 // CONSUMERS:
                return f"a stage has no room for {in_ring} boxes of each warpgroup"
        elif self.buffers == 0 and not variant.endswith("_add"):
            return "an epilogue needs a buffer"
        if self.stages < 2:
            return "two stages are the least"
        if groups > MAX_GROUPS and not reduces_rows:
            return f"more than {MAX_GROUPS} groups"
        table = 4 if reduces_rows else round_up(groups, 32) + 4
        used = self.shared_memory(table)
        if used > SHARED_MEMORY:
            return f"{used} bytes of shared memory, {SHARED_MEMORY} are there"
        return None
