"""How many stores an epilogue lets be under way: never one that reads what is written, and no fewer than that.

The worst device is simulated: of the stores, each a commit group, all that may be under way are.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from as_written import as_written

pytest.importorskip("cutlass")
from sonicmoe.activations import Activation
from sonicmoe.cute_kernels.epilogue import ring
from sonicmoe.cute_kernels.epilogue.act_store import ActStore
from sonicmoe.cute_kernels.epilogue.base import BoxEpilogue
from sonicmoe.cute_kernels.epilogue.dact_reduce import DActReduce
from sonicmoe.cute_kernels.epilogue.driver import Buffers
from sonicmoe.cute_kernels.epilogue.ring import RingEpilogue
from sonicmoe.cute_kernels.epilogue.store import StoreRows, StoreWeight

BEGIN = as_written(RingEpilogue.begin)
FINISH_SUBTILE = as_written(RingEpilogue.finish_subtile)
TILES = 4
MOST_SUBTILES = 8


class Stores:
    """What the committed stores read, the oldest first."""

    def __init__(self) -> None:
        self.sources: list[Any] = []
        self.waited = 0  # of the oldest, how many have surely left

    def wait(self, pending: int) -> None:
        self.waited = max(self.waited, len(self.sources) - pending)

    def reading(self) -> set[Any]:
        return set(self.sources[self.waited :])

    def would_be_reading(self, pending: int) -> Any:
        """What the one store more reads that could be under way if one more was allowed; None if there is none."""
        oldest = len(self.sources) - pending - 1
        return self.sources[oldest] if oldest >= self.waited else None


def walk_ring(buffers: Buffers, outs: int) -> None:
    stores = Stores()
    for tile in range(TILES):
        for first in range(0, buffers.uses, outs):
            written = [buffers.index(first + i) for i in range(outs)]
            assert len(set(written)) == outs and max(written) < buffers.count
            pending = buffers.pending(first, outs)
            one_more = stores.would_be_reading(pending)
            # The first tile follows none, but waits as if it did.
            assert tile == 0 or one_more is None or one_more in written, "one more store might have been under way"
            stores.wait(pending)
            assert not stores.reading() & set(written)
            stores.sources += written


@pytest.mark.parametrize("outs", [1, 2, 3])
def test_ring(outs: int) -> None:
    for count, subtiles in itertools.product(range(outs, 9), range(1, MOST_SUBTILES + 1)):
        walk_ring(Buffers(None, count, subtiles * outs), outs)


@pytest.mark.parametrize("change", [-1, 1])
def test_one_store_more_or_less_would_be_noticed(change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Buffers.pending
    monkeypatch.setattr(Buffers, "pending", lambda *a: max(0, right(*a) + change))
    with pytest.raises(AssertionError):
        walk_ring(Buffers(None, 4, 12), 3)


class Feed:
    """Stands for the ring steps of one tile, as one warp has them."""

    def __init__(self, stores: Stores) -> None:
        self.stores, self.released = stores, []

    def release(self, step: int) -> None:
        assert ("stage", step) not in self.stores.reading(), "a stage goes back while a store reads it"
        self.released.append(step)


def walk_ring_epilogue(epilogue: RingEpilogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warp 0 of one warpgroup, and a warp that stores nothing."""
    stores = Stores()
    own, last = epilogue.outs - epilogue.in_ring, epilogue.ring_steps - 1
    for _ in range(TILES):
        feed, of_another = Feed(stores), Feed(Stores())
        stores.wait(0)  # as `Late` does while the first products run
        for index in range(epilogue.blocks * epilogue.subtiles):
            buffers = [("buffer", epilogue.buffers.index(index * own + i)) for i in range(own)]

            def wait(pending: int, buffers: Any = buffers) -> None:
                one_more = stores.would_be_reading(pending)
                assert one_more is None or one_more in buffers, "one more store might have been under way"
                stores.wait(pending)

            monkeypatch.setattr(ring, "wait_stores", wait)
            BEGIN(epilogue, SimpleNamespace(warp=0, consumer=0))
            assert not stores.reading() & set(buffers)
            stores.sources += [("stage", index)] * epilogue.in_ring + buffers
            monkeypatch.setattr(ring, "wait_stores", stores.wait)
            for warp, of_warp in enumerate((feed, of_another)):
                FINISH_SUBTILE(epilogue, of_warp, SimpleNamespace(warp=warp), index)
        assert feed.released == list(range(last)) and of_another.released == list(range(last + 1))


def ring_epilogues(boxes: tuple[int, int]) -> Iterator[RingEpilogue]:
    for subtiles, name in itertools.product((1, 2, 4), ("swiglu", "silu")):
        form, act = (1, subtiles, 2, 3, boxes), Activation(name)
        found = (DActReduce(None, buffers, *form, act, 256, 256) for buffers in range(5))
        yield from (e for e in found if e.buffer_count or 2 * e.outs <= sum(boxes))


def test_outputs_that_leave_from_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "barrier", lambda consumer: None)
    for epilogue in ring_epilogues((4, 2)):
        assert epilogue.ring_steps == epilogue.blocks * epilogue.subtiles
        walk_ring_epilogue(epilogue, monkeypatch)


@pytest.mark.parametrize("boxes", [(4, 2), (2, 2)])
def test_boxes_of_a_stage_are_apart(boxes: tuple[int, int]) -> None:
    for epilogue in ring_epilogues(boxes):
        found = [(region, first + i) for region, first in map(epilogue.box, range(epilogue.in_ring)) for i in (0, 1)]
        assert len(set(found)) == 2 * epilogue.in_ring and all(box < boxes[region] for region, box in found)


def box_epilogues(deferred: bool) -> Iterator[BoxEpilogue]:
    for blocks, subtiles in itertools.product((1, 2), (1, 2, 3, 4)):
        form = None, 2, blocks, subtiles, deferred
        yield StoreRows(*form, 64 * subtiles, 4096)
        yield StoreWeight(*form, 128, 64 * subtiles, 1, False)
        for name, keep_h in itertools.product(("swiglu", "silu"), (True, False)):
            yield ActStore(*form, Activation(name), 64 * subtiles, 4096, False, keep_h)


def test_the_pieces_are_all_quarters_of_all_boxes_in_order() -> None:
    for epilogue in box_epilogues(deferred=True):
        quarters = [(piece.store, q) for piece in epilogue.pieces for q in range(piece.first, piece.end)]
        assert quarters == [(store, q) for store in range(epilogue.stores) for q in range(4)]
        assert all(piece.first < piece.end for piece in epilogue.pieces)
    assert not any(epilogue.pieces for epilogue in box_epilogues(deferred=False))


def test_what_a_stored_box_is_made_of() -> None:
    """h from its own box of the registers, an activation from those of the same columns."""
    held = SimpleNamespace(quarter=lambda box, q: [(box, q, i) for i in range(4)])
    for epilogue in box_epilogues(deferred=True):
        for store, q in itertools.product(range(epilogue.stores), range(4)):
            if isinstance(epilogue, ActStore):
                halves, (subtile, out) = epilogue.halves, divmod(store, epilogue.outs)
                is_a = out == epilogue.outs - 1
                h = [[subtile * halves + half, q] for half in (range(halves) if is_a else (out,))]
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(ActStore, "activation", lambda self, of_halves: of_halves)
                    found = epilogue.values(held, store, q)
                expected: Any = [tuple((*of, i) for of in h) if is_a else (*h[0], i) for i in range(4)]
            else:
                found, expected = epilogue.values(held, store, q), [(store, q, i) for i in range(4)]
            assert found == expected
