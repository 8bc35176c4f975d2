"""From a tile's number to what it covers. The rows of group g are [cu_rows[g], cu_rows[g + 1]) of the sorted rows.

GroupedM: rows are the M axis; an empty group has no tile. GroupedK: rows are the reduction axis; every group has the
same number of tiles, an empty one with no k step, so that its result is written as zero.

A number is that of a turn: one tile for each CTA of a cluster. In GroupedK these are neighbours along m, with the same
columns of B; a tile past the end of m, which an odd number leaves over, reads zeros and stores nothing.

Tiles of a group lie in bands of n tiles. Within a band n is the fastest axis, so that CTAs side by side share rows of
A; one band ends before the next begins, so that a round needs few columns of B where the group's B is large.

Turns are taken in rounds, one by each cluster. What GroupedM has left for a last round it may give out by halves, the
upper and the lower 64 rows of a tile, if there are CTAs enough: that round is then shorter. Of a tile with fewer rows
the lower half has none.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

WARP = 32
BLOCK_M = 64  # rows of one wgmma


def ceil_div(a, b):
    return (a + b - 1) // b


class Turns(NamedTuple):
    count: Int32
    halves: Int32  # from this one on they are half tiles, two after another of the same tile


class Tile(NamedTuple):
    group: Int32
    row: Int32  # GroupedM: first row of the tile; GroupedK: of the group
    rows: Int32  # rows of the group from there on
    m: Int32  # GroupedK: tile index along m
    n: Int32  # tile index along n, within its half
    half: Int32  # GroupedK: which half of n (0 in GroupedM)
    k_steps: Int32


@dataclass(frozen=True)
class GroupedM:
    groups: int
    tile_m: int
    n_tiles: int
    k_steps: int
    band: int  # n tiles of a band; the last one may be narrower
    splits: bool  # whether half a tile takes less time

    reduces_rows = False

    @property
    def segments(self) -> int:
        return ceil_div(self.groups, WARP)

    @property
    def table_size(self) -> int:
        """Tiles before each group, padded to whole warps, and a closing entry."""
        return self.segments * WARP + 4

    @cute.jit
    def build_table(self, cu_rows: cute.Tensor, table: cute.Tensor, lane: Int32):
        """One warp: table[g] = number of m tiles before group g."""
        carry = Int32(0)
        for base in cutlass.range_constexpr(0, self.segments * WARP, WARP):
            g = base + lane
            rows = cu_rows[cutlass.min(g + 1, self.groups)] - cu_rows[cutlass.min(g, self.groups)]
            tiles = (rows + (self.tile_m - 1)) // self.tile_m
            before = tiles
            for i in cutlass.range_constexpr(5):
                below = cute.arch.shuffle_sync_up(before, 1 << i, mask_and_clamp=0)
                if lane >= (1 << i):
                    before = before + below
            table[g] = carry + before - tiles
            carry = carry + cute.arch.shuffle_sync(before, WARP - 1)
        if lane == 0:
            table[self.segments * WARP] = carry

    def turns(self, table: cute.Tensor, clusters: Int32) -> Turns:
        tiles = table[self.segments * WARP] * self.n_tiles
        rest = tiles % clusters
        if not self.splits:
            return Turns(tiles, tiles)
        rest = cutlass.select_(2 * rest <= clusters, rest, Int32(0))
        return Turns(tiles + rest, tiles - rest)

    def has_rows(self, tile: Tile, first_block):
        """Whether the tile has rows from its 64-row block `first_block` on. All have where tiles are not split."""
        return not self.splits or first_block * BLOCK_M < tile.rows

    @cute.jit
    def tile(self, turn: Int32, halves: Int32, rank: Int32, cu_rows: cute.Tensor, table: cute.Tensor, lane: Int32):
        """Whole warp: each lane first looks at a segment of the table, then at one group of the segment found."""
        lower = Int32(0)
        if const_expr(self.splits):
            of_halves = cutlass.max(turn - halves, 0)
            lower = of_halves % 2
            turn = turn - (of_halves + 1) // 2
        m = turn // self.n_tiles
        segments = const_expr(self.segments)
        segment = cute.arch.popc(cute.arch.vote_ballot_sync(table[(lane + 1) * segments] <= m))
        before = Boolean(False)
        if lane < segments:
            before = table[segment * segments + lane + 1] <= m
        group = segment * segments + cute.arch.popc(cute.arch.vote_ballot_sync(before))
        n = turn - m * self.n_tiles
        m = m - table[group]
        if const_expr(self.band < self.n_tiles):
            m, n = self.in_bands(turn - table[group] * self.n_tiles, table[group + 1] - table[group])
        row = cu_rows[group] + m * self.tile_m + lower * (self.tile_m // 2)
        rows = cu_rows[group + 1] - row
        if const_expr(self.splits):
            rows = cutlass.select_(turn >= halves, cutlass.min(rows, self.tile_m // 2), rows)
        return Tile(group, row, rows, Int32(0), n, Int32(0), Int32(self.k_steps))

    def in_bands(self, number: Int32, m_tiles: Int32):
        """(m, n) of the tile of that number in a group of m_tiles rows of tiles."""
        first_n = number // (m_tiles * self.band) * self.band
        number = number - first_n * m_tiles
        width = cutlass.min(self.band, self.n_tiles - first_n)
        m = number // width
        return m, first_n + number - m * width


@dataclass(frozen=True)
class GroupedK:
    groups: int
    m_tiles: int
    n_tiles: int  # of one half
    halves: int
    tile_k: int
    cluster: int

    reduces_rows = True
    table_size = 4

    def build_table(self, cu_rows: cute.Tensor, table: cute.Tensor, lane: Int32):
        pass

    def has_rows(self, tile: Tile, first_block) -> bool:
        return True

    def turns(self, table: cute.Tensor, clusters: Int32) -> Turns:
        count = Int32(self.groups * ceil_div(self.m_tiles, self.cluster) * self.n_tiles * self.halves)
        return Turns(count, count)

    @cute.jit
    def tile(self, turn: Int32, halves: Int32, rank: Int32, cu_rows: cute.Tensor, table: cute.Tensor, lane: Int32):
        of_half = const_expr(self.n_tiles)
        of_m = const_expr(of_half * self.halves)
        of_group = const_expr(of_m * ceil_div(self.m_tiles, self.cluster))
        group = turn // of_group
        rest = turn - group * of_group
        m = rest // of_m
        rest = rest - m * of_m
        half = rest // of_half
        row = cu_rows[group]
        rows = cu_rows[group + 1] - row
        k_steps = (rows + (self.tile_k - 1)) // self.tile_k
        m = m * self.cluster + rank
        return Tile(group, row, rows, m, rest - half * of_half, half, k_steps)
