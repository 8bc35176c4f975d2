"""How a warpgroup stores boxes, piece by piece: the functions as they are written, four warps in random orders.

Shared memory, the named barrier and the stores are simulated; a store reads its box at any time after it was issued,
or, on the slowest device, not before it is waited for. A buffer that is written while a store reads it, a box of which
a warp's quarter is missing, or written but not fenced: each fails.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from as_written import compiled_methods
from lockstep import Lockstep

pytest.importorskip("cutlass")
from sonicmoe.activations import Activation
from sonicmoe.cute_kernels.epilogue import base
from sonicmoe.cute_kernels.epilogue.act_store import ActStore
from sonicmoe.cute_kernels.epilogue.base import PLACE, REGISTERS, BoxEpilogue, Held
from sonicmoe.cute_kernels.epilogue.driver import Buffers
from sonicmoe.cute_kernels.epilogue.store import StoreRows, StoreWeight
from sonicmoe.cute_kernels.groups import Tile

WARPS, TILES, FIRST_BLOCK = 4, 4, 1
AS_WRITTEN = compiled_methods(BoxEpilogue)


class Warpgroup:
    """Stands for `cute.arch` and what `base` takes from the driver."""

    def __init__(self, seed: int, slow: bool) -> None:
        self.lockstep, self.slow = Lockstep(seed), slow
        self.content: dict[int, dict[Any, Any]] = defaultdict(dict)  # buffer -> (warp, quarter) -> (tile, store)
        self.unfenced: dict[int, set[Any]] = defaultdict(set)  # warp -> (buffer, quarter)
        self.reading: dict[int, int] = defaultdict(int)  # buffer -> stores
        self.groups: list[list[Any]] = [[]]  # stores of warp 0 under way, by commit group; the last one is open
        self.awaited = 0  # of the groups, the first ones
        self.arrived, self.generation = 0, 0
        self.stored: list[Any] = []
        self.arch = self

    def barrier(self, consumer: int) -> None:
        self.arrived += 1
        before = self.generation
        if self.arrived == WARPS:
            self.arrived, self.generation = 0, before + 1
        self.lockstep.wait(lambda: self.generation > before)

    def fence_proxy(self, kind: str, space: str) -> None:
        self.unfenced[self.lockstep.current].clear()

    def stmatrix(self, address: tuple[int, int], values: list[Any], transpose: bool) -> None:
        self.lockstep.wait()
        (buffer, q), warp = address, self.lockstep.current
        assert not self.reading[buffer], f"buffer {buffer} is written while a store reads it"
        assert {v[2] for v in values} == {q} and len({v[:2] for v in values}) == 1
        self.content[buffer][warp, q] = values[0][:2]
        self.unfenced[warp].add((buffer, q))

    def store_box(self, target: Any, place: Any, start: Any) -> None:
        self.lockstep.wait()
        box, group = target, self.groups[-1]
        self.reading[place.box] += 1
        group.append(box)

        def read() -> None:
            found = self.content[place.box]
            assert len(found) == WARPS * 4 and set(found.values()) == {box}, f"{found} is stored as {box}"
            assert not any(place.box == buffer for of in self.unfenced.values() for buffer, _ in of), "no fence"
            self.reading[place.box] -= 1
            group.remove(box)
            self.stored.append(box)

        def may_read() -> bool:
            """In order, as one engine does."""
            number = next(i for i, g in enumerate(self.groups) if g is group)
            return not any(self.groups[i] for i in range(number)) and (number < self.awaited or not self.slow)

        self.lockstep.later(read, may_read)

    def cp_async_bulk_commit_group(self) -> None:
        self.groups.append([])

    def wait_stores(self, pending: int) -> None:
        self.awaited = max(self.awaited, len(self.groups) - 1 - pending)
        gone = [self.groups[i] for i in range(self.awaited)]
        self.lockstep.wait(lambda: not any(gone))


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Warpgroup], None]:
    for name, method in AS_WRITTEN.items():
        monkeypatch.setattr(BoxEpilogue, name, method)
    language = SimpleNamespace(range_constexpr=range, const_expr=bool)

    def place(smem: Any, layout: Any, box: int) -> Any:
        return SimpleNamespace(box=box, address=lambda: box)

    def on(group: Warpgroup) -> None:
        stand_ins = {
            "cute": group, "cutlass": language, "barrier": group.barrier, "wait_stores": group.wait_stores,
            "stmatrix_x4": group.stmatrix, "store_box": group.store_box, "Place": place,
        }  # fmt: skip
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(base, name, stand_in)
        monkeypatch.setattr(Buffers, "layout", lambda self: None)

    return on


def run(emulate: Callable[[Warpgroup], None], epilogue: BoxEpilogue, seed: int, past: tuple[int, ...] = ()) -> None:
    """TILES tiles; of those in `past` nothing lies inside of the group. Every second seed has the slowest device."""
    group = Warpgroup(seed, slow=bool(seed % 2))
    emulate(group)
    form = type(epilogue)

    class Told(form):  # type: ignore[misc, valid-type]
        def values(self, held: Any, subtile: int, out: int, q: int) -> list[Any]:
            return [(held.tile(), subtile * self.outs + out, q)] * 4

        def target(self, args: Any, tile: int, block: int, nb: int, out: int) -> Any:
            subtile = (block - FIRST_BLOCK) * self.subtiles + nb
            return (tile, subtile * self.outs + out), None, tile not in past

    told = Told(*(getattr(epilogue, name) for name in epilogue.__dataclass_fields__))

    def body(warp: int) -> None:
        lane = SimpleNamespace(warp=warp, consumer=0, matrix_address=lambda address, q, transpose: (address, q))
        nothing = SimpleNamespace(there=lambda: False)
        for index in range(len(told.pieces)):
            told.piece(None, nothing, None, lane, FIRST_BLOCK, index)
        for tile in range(TILES):
            held = SimpleNamespace(there=lambda: True, tile=lambda t=tile: t)
            if told.deferred:
                for index in range(len(told.pieces)):
                    told.piece(None, held, None, lane, FIRST_BLOCK, index)
            else:
                told.finish(None, None, None, None, None, tile, lane, FIRST_BLOCK, None)
        told.drain(lane)

    group.lockstep.run([lambda warp=warp: body(warp) for warp in range(WARPS)])
    assert group.stored == [(tile, store) for tile in range(TILES) if tile not in past for store in range(told.stores)]


def epilogues(deferred: bool) -> Iterator[BoxEpilogue]:
    for count in (1, 2, 3, 4):
        yield StoreRows(None, count, 1, 4, deferred, 256, 4096)
        yield StoreRows(None, count, 2, 3, deferred, 192, 4096)
        yield StoreWeight(None, count, 1, 2, deferred, 128, 128, 1, False)
        yield ActStore(None, count, 1, 2, deferred, Activation("swiglu"), 128, 4096, False, True)
        yield ActStore(None, count, 1, 4, deferred, Activation("silu"), 256, 4096, False, False)


@pytest.mark.parametrize("deferred", [True, False])
def test_every_box_is_stored_once_and_whole(emulate: Any, deferred: bool) -> None:
    for seed, epilogue in enumerate(epilogues(deferred)):
        run(emulate, epilogue, 2 * seed)
        run(emulate, epilogue, 2 * seed + 1)
        run(emulate, epilogue, 2 * seed + 1, past=(1, 2))


@pytest.mark.parametrize("missing", ["wait_stores", "fence_proxy"])
def test_what_is_missing_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(Warpgroup, missing, lambda *_, **__: None)
    fails(emulate)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_barrier_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    """That before a box is written, and that before it is stored."""
    right, calls = Warpgroup.barrier, defaultdict(int)

    def barrier(self: Warpgroup, consumer: int) -> None:
        warp = self, self.lockstep.current
        calls[warp] += 1
        if calls[warp] % 2 == missing:
            right(self, consumer)

    monkeypatch.setattr(Warpgroup, "barrier", barrier)
    fails(emulate)


def test_what_is_held_is_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "Int32", int)
    held = Held([0] * 3 * REGISTERS, [0] * (PLACE + 1))
    assert not held.there()
    held.keep(Tile(1, 2, 3, 4, 5, 6, 7), 3, lambda box, q: [(box, q, i) for i in range(4)])
    assert held.there() and held.tile() == Tile(1, 2, 3, 4, 5, 6, 0)
    for box, q in itertools.product(range(3), range(4)):
        assert held.quarter(box, q) == [(box, q, i) for i in range(4)]


def test_the_pieces_are_all_quarters_of_all_boxes_in_order() -> None:
    for epilogue in epilogues(deferred=True):
        quarters = [(piece.store, q) for piece in epilogue.pieces for q in range(piece.first, piece.end)]
        assert quarters == [(store, q) for store in range(epilogue.stores) for q in range(4)]
        assert all(piece.first < piece.end for piece in epilogue.pieces)
    assert not any(epilogue.pieces for epilogue in epilogues(deferred=False))


GATED = {True: ["h0", "h1", (0, 1), "h2", "h3", (2, 3)], False: [(0, 1), (2, 3)]}
PLAIN = {True: ["h0", (0,), "h1", (1,)], False: [(0,), (1,)]}


@pytest.mark.parametrize(("name", "stored"), [("swiglu", GATED), ("silu", PLAIN)])
@pytest.mark.parametrize("keep_h", [True, False])
def test_what_a_stored_box_is_made_of(
    monkeypatch: pytest.MonkeyPatch, name: str, stored: dict[bool, list[Any]], keep_h: bool
) -> None:
    """Of two sub-tiles: a box of h from the registers of one held box, an activation from those of each half's."""
    monkeypatch.setattr(ActStore, "activation", lambda self, of_halves: tuple(of_halves))
    held = SimpleNamespace(quarter=lambda box, q: [(box, q, i) for i in range(4)])
    epilogue = ActStore(None, 2, 1, 2, True, Activation(name), 128, 4096, False, keep_h)
    assert epilogue.stores == len(stored[keep_h])
    for store, of in enumerate(stored[keep_h]):
        for q in range(4):
            h = [(int(of[1:]), q, i) for i in range(4)] if isinstance(of, str) else None
            a = [tuple((box, q, i) for box in of) for i in range(4)]
            assert epilogue.values(held, *divmod(store, epilogue.outs), q) == (h or a)


def test_a_store_too_many_under_way_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Buffers.pending
    monkeypatch.setattr(Buffers, "pending", lambda *a: right(*a) + 1)
    fails(emulate)


def fails(emulate: Any) -> None:
    """In some order of steps."""
    with pytest.raises(AssertionError):
        for seed in range(20):
            run(emulate, StoreRows(None, 2, 1, 4, True, 256, 4096), seed)
