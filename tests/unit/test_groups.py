"""From a tile's number to its group and rows: the kernels' own search, run by 32 lanes on the host, against a loop."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import pytest
from as_written import as_written
from lockstep import Lockstep

pytest.importorskip("cutlass")
from sonicmoe.cute_kernels import groups
from sonicmoe.cute_kernels.groups import GroupedK, GroupedM, Tile

WARP = 32
TILE_M = 128


class Warp:
    """Stands for `cute.arch` while 32 lanes run."""

    def __init__(self) -> None:
        self.lockstep = Lockstep()
        self.rounds: list[dict[int, Any]] = []
        self.taken = [0] * WARP

    def run(self, body: Callable[[int], Any]) -> list[Any]:
        self.rounds, self.taken = [], [0] * WARP
        return self.lockstep.run([lambda lane=lane: body(lane) for lane in range(WARP)])

    def exchange(self, value: Any) -> dict[int, Any]:
        """What each lane gave to the same instruction."""
        lane = self.lockstep.current
        number = self.taken[lane]
        self.taken[lane] += 1
        if number == len(self.rounds):
            self.rounds.append({})
        given = self.rounds[number]
        given[lane] = value
        self.lockstep.wait(lambda: len(given) == WARP)
        return given

    def vote_ballot_sync(self, predicate: Any) -> int:
        return sum(1 << lane for lane, p in self.exchange(predicate).items() if p)

    def popc(self, bits: int) -> int:
        return bits.bit_count()

    def shuffle_sync(self, value: Any, source: int) -> Any:
        return self.exchange(value)[source]

    def shuffle_sync_up(self, value: Any, distance: int, mask_and_clamp: int) -> Any:
        assert mask_and_clamp == 0  # else lanes below the distance of a segment would be clamped
        lane = self.lockstep.current
        return self.exchange(value)[lane - distance if lane >= distance else lane]


class Python(types.SimpleNamespace):
    """Stands for `cutlass`: the parts of the language that only its compiler knows."""

    min = staticmethod(min)
    max = staticmethod(max)
    select_ = staticmethod(lambda condition, then, otherwise: then if condition else otherwise)
    range_constexpr = staticmethod(range)


@pytest.fixture
def warp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Warp]:
    emulated = Warp()
    monkeypatch.setattr(groups, "cute", types.SimpleNamespace(arch=emulated))
    monkeypatch.setattr(groups, "cutlass", Python())
    yield emulated


BUILD_TABLE = {form: as_written(form.build_table) for form in (GroupedM, GroupedK)}
SEARCH = {form: as_written(form.tile) for form in (GroupedM, GroupedK)}


def build_table(warp: Warp, form: GroupedM | GroupedK, sizes: Sequence[int]) -> tuple[list[int], list[Any]]:
    cu_rows, table = [0, *accumulate(sizes)], [None] * form.table_size
    warp.run(lambda lane: BUILD_TABLE[type(form)](form, cu_rows, table, lane))
    return cu_rows, table


def tiles(
    warp: Warp,
    form: GroupedM | GroupedK,
    sizes: Sequence[int],
    turns: Sequence[int] | None = None,
    cluster: int = 1,
    clusters: int = 1,
) -> list[list[Tile]]:
    """For every turn, or the given ones, the tile of each CTA of the cluster, once all lanes are shown to agree."""
    cu_rows, table = build_table(warp, form, sizes)
    count, halves = map(int, form.turns(table, clusters))
    chosen = range(count) if turns is None else turns
    search = SEARCH[type(form)]

    def body(lane: int) -> list[list[Tile]]:
        def found(turn: int) -> list[Tile]:
            return [plain(search(form, turn, halves, rank, cu_rows, table, lane)) for rank in range(cluster)]

        return [found(turn) for turn in chosen]

    lanes = warp.run(body)
    assert all(found == lanes[0] for found in lanes)
    return lanes[0]


def plain(tile: Tile) -> Tile:
    """Without the DSL's numbers"""
    return Tile(*map(int, tile))


def grouped_m(groups: int, n_tiles: int, k_steps: int, splits: bool, band: int | None = None) -> GroupedM:
    return GroupedM(groups, TILE_M, n_tiles, k_steps, band or n_tiles, splits)


def expected_m(form: GroupedM, sizes: Sequence[int]) -> list[list[Tile]]:
    found, first = [], 0
    for g, size in enumerate(sizes):
        for band in range(0, form.n_tiles, form.band):
            columns = range(band, min(band + form.band, form.n_tiles))
            for row in range(0, size, TILE_M):
                found += [[Tile(g, first + row, size - row, 0, n, 0, form.k_steps)] for n in columns]
        first += size
    return found


SIZES = {
    "one group": [300],
    "one row": [1],
    "whole tiles": [128, 256, 384],
    "one row more": [129, 1, 257],
    "empty at both ends": [0, 0, 5, 0, 130, 0],
    "one takes all": [0] * 20 + [1000] + [0] * 20,
    "one warp of groups": [(7 * g) % 150 for g in range(32)],
    "one more than a warp": [(7 * g) % 150 for g in range(33)],
    "segments of three, most of them empty": [90 if g % 9 == 4 else 0 for g in range(70)],
    "nothing": [0] * 40,
}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("n_tiles", "band"), [(1, 1), (3, 3), (3, 2), (5, 1), (6, 3), (7, 3)])
def test_every_tile_of_grouped_m(warp: Warp, name: str, n_tiles: int, band: int) -> None:
    sizes = SIZES[name]
    form = grouped_m(len(sizes), n_tiles, 5, splits=False, band=band)
    assert tiles(warp, form, sizes) == expected_m(form, sizes)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(("n_tiles", "band"), [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("clusters", [1, 2, 5, 132])
def test_what_is_left_for_a_last_round_is_split_if_there_are_ctas_enough(
    warp: Warp, name: str, n_tiles: int, band: int, clusters: int
) -> None:
    sizes = SIZES[name]
    form = grouped_m(len(sizes), n_tiles, 5, splits=True, band=band)
    whole = expected_m(form, sizes)
    rest = len(whole) % clusters
    expected = whole
    if rest and 2 * rest <= clusters:
        halves = [
            [t._replace(row=t.row + lower * 64, rows=min(t.rows - lower * 64, 64))]
            for (t,) in whole[-rest:]
            for lower in (0, 1)
        ]
        expected = whole[:-rest] + halves
    found = tiles(warp, form, sizes, clusters=clusters)
    assert found == expected
    assert sum(max(t.rows, 0) if t.rows < TILE_M else TILE_M for (t,) in found) == n_tiles * sum(sizes)


@pytest.mark.parametrize("count", [256, 500, 1000, 1024])
def test_many_groups(warp: Warp, count: int) -> None:
    sizes = [0 if g % 3 else (41 * g) % 400 for g in range(count)]
    form = grouped_m(count, 2, 1, splits=True)
    expected = expected_m(form, sizes)
    chosen = sorted({0, 1, len(expected) - 1, *range(0, len(expected), 41)})
    assert tiles(warp, form, sizes, chosen) == [expected[i] for i in chosen]


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("cluster", [1, 2])
def test_every_tile_of_grouped_k(warp: Warp, halves: int, cluster: int) -> None:
    """Every group has all tiles, an empty one too, which then has no k step. A cluster takes neighbours along m."""
    sizes = [0, 1, 64, 65, 0, 200]
    form = GroupedK(len(sizes), m_tiles=3, n_tiles=2, halves=halves, tile_k=64, cluster=cluster)
    cu_rows = [0, *accumulate(sizes)]
    expected = [
        [Tile(g, cu_rows[g], size, m + i, n, half, -(-size // 64)) for i in range(cluster)]
        for g, size in enumerate(sizes)
        for m in range(0, 3, cluster)
        for half in range(halves)
        for n in range(2)
    ]
    assert tiles(warp, form, sizes, cluster=cluster) == expected
