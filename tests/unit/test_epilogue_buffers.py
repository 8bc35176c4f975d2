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
from sonicmoe.cute_kernels.epilogue.dact_reduce import DActReduce
from sonicmoe.cute_kernels.epilogue.driver import Buffers
from sonicmoe.cute_kernels.epilogue.ring import RingEpilogue

BEGIN = as_written(RingEpilogue.begin)
FINISH_SUBTILE = as_written(RingEpilogue.finish_subtile)
TILES = 4
MOST_BOXES = 12


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


def walk_buffers(buffers: Buffers) -> None:
    stores = Stores()
    for tile in range(TILES):
        for use in range(buffers.uses):
            written = buffers.index(use)
            assert written < buffers.count
            pending = buffers.pending(use)
            one_more = stores.would_be_reading(pending)
            # The first tile follows none, but waits as if it did.
            assert tile == 0 or one_more in (None, written), "one more store might have been under way"
            stores.wait(pending)
            assert written not in stores.reading()
            stores.sources.append(written)


def test_buffers() -> None:
    for count, uses in itertools.product(range(1, 9), range(1, MOST_BOXES + 1)):
        walk_buffers(Buffers(None, count, uses))


@pytest.mark.parametrize("change", [-1, 1])
def test_one_store_more_or_less_would_be_noticed(change: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Buffers.pending
    monkeypatch.setattr(Buffers, "pending", lambda *a: max(0, right(*a) + change))
    with pytest.raises(AssertionError):
        walk_buffers(Buffers(None, 4, 12))


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
        form, act = (1, subtiles, 3, boxes), Activation(name)
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
