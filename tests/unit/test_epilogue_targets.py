"""Where epilogues say that a box goes: the functions as they are written, with numbers for a tile's registers."""

from __future__ import annotations

import itertools
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from as_written import as_written

pytest.importorskip("cutlass")
from sonicmoe.activations import Activation
from sonicmoe.cute_kernels.copies import RAGGED
from sonicmoe.cute_kernels.epilogue.act_store import ActStore
from sonicmoe.cute_kernels.epilogue.dact_reduce import DActReduce
from sonicmoe.cute_kernels.epilogue.store import StoreRows, StoreWeight, StoreWeightTransposed
from sonicmoe.cute_kernels.groups import Tile

RING = 3, (4, 2)
ARGS = SimpleNamespace(h="h", a="a", dh="dh", a_s="a_s", target="target")
WRITE_PART = as_written(DActReduce.write_part)
# (first row of the tile, rows of the group from there on, tile along n, first 64-row block of the warpgroup)
PLACES = list(itertools.product((0, 1000), (1, 64, 65, 300), (0, 3), (0, 1)))


def tile(row: int, rows: int, n: int, m: int = 0, half: int = 0, group: int = 0) -> Tile:
    return Tile(group, row, rows, m, n, half, 1)


def box(row: int, last: int, column: int, half: int = 0) -> tuple[int, int, int]:
    """(first row, column, half) of a 64-row box, and how many of its rows lie before `last`."""
    return row, last - row, column * 2 + half


def box_of(at: Tile, row: int, nb: int, name: str, columns: int, half: int = 0) -> Any:
    """As `seen`: what a box is to be stored to, from this row of the tile on."""
    return name, box(at.row + row, at.row + at.rows, at.n * columns + 64 * nb, half), row < at.rows


def seen(target: tuple[Any, Any, Any]) -> tuple[str, tuple[int, int, int], bool]:
    """A name, the box that the coordinates of a ragged view address, and whether it is stored."""
    name, (before, column, half, wrap, end), stored = target
    assert wrap == RAGGED
    rows = RAGGED - before  # of the group, from the box on
    return name, box(end - rows, end, column, half), stored


@pytest.mark.parametrize(("row", "rows", "n", "first_block"), PLACES)
def test_rows(row: int, rows: int, n: int, first_block: int) -> None:
    at = tile(row, rows, n)
    form = Activation("swiglu"), 128, 4096, False
    up, without_h = (ActStore(None, 2, 2, 2, True, *form, keep_h) for keep_h in (True, False))
    down = DActReduce(None, 0, 1, 4, *RING, Activation("swiglu"), 256, 4096)
    for mb, nb in itertools.product((0, 1), (0, 1)):
        expected = partial(box_of, at, 64 * (first_block + mb), nb)
        found = [up.target(ARGS, at, first_block + mb, nb, out) for out in range(3)]
        assert list(map(seen, found)) == [expected("h", 128), expected("h", 128, 1), expected("a", 128)]
        assert seen(without_h.target(ARGS, at, first_block + mb, nb, 0)) == expected("a", 128)
        found = down.targets(ARGS, at, first_block + mb, nb)
        assert list(map(seen, found)) == [expected("dh", 256), expected("dh", 256, 1), expected("a_s", 256)]
        rows_of_192 = StoreRows(None, 1, 2, 3, True, 192, 4096)
        assert seen(rows_of_192.target(ARGS, at, first_block + mb, nb, 0)) == expected("target", 192)


@pytest.mark.parametrize("first_block", [0, 1])
def test_weights(first_block: int) -> None:
    for m, n, half, group, nb in itertools.product((0, 2), (0, 1), (0, 1), (0, 5), (0, 3)):
        at = tile(0, 100, n, m, half, group)
        row, column = 128 * m + 64 * first_block, 256 * n + 64 * nb
        form = (None, 2, 1, 4, True, 128, 256, 2, False)
        assert StoreWeight(*form).target(ARGS, at, first_block, nb, 0) == ("target", (row, column, half, group), True)
        transposed = StoreWeightTransposed(*form).target(ARGS, at, first_block, nb, 0)
        assert transposed == ("target", (column, row, half, group), True)


@pytest.mark.parametrize(("row", "rows", "n", "first_block"), PLACES)
def test_parts(row: int, rows: int, n: int, first_block: int) -> None:
    """One for each row that the group has, by the first of the four lanes that share it."""
    down = DActReduce(None, 0, 1, 4, *RING, Activation("swiglu"), 256, 4096)
    parts: dict[Any, int] = {}
    for in_block, lane in itertools.product(range(64), range(4)):
        WRITE_PART(
            down,
            SimpleNamespace(parts=parts),
            tile(row, rows, n),
            SimpleNamespace(lane=lane),
            64 * first_block + in_block,
            lane,
        )
    last = min(rows, 64 * first_block + 64)
    assert parts == {(row + r, n): 0 for r in range(64 * first_block, last)}
