"""How many stores an epilogue lets be under way: never one that reads what is written, and no fewer than that.

The worst device is simulated: of the stores, each a commit group, all that may be under way are.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from as_written import as_written

pytest.importorskip("cutlass")
from sonicmoe.activations import Activation
from sonicmoe.cute_kernels.epilogue import dact_reduce
from sonicmoe.cute_kernels.epilogue.dact_reduce import DActReduce
from sonicmoe.cute_kernels.epilogue.driver import Buffers

FINISH_SUBTILE = as_written(DActReduce.finish_subtile)
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


class Releases:
    """Stands for the ring steps of one tile."""

    def __init__(self, stores: Stores) -> None:
        self.stores, self.released = stores, []

    def release(self, index: int) -> None:
        assert ("stage", index) not in self.stores.reading(), "a stage goes back while a store reads it"
        self.released.append(index)


def walk_dact_reduce(epilogue: DActReduce, stores: Stores) -> None:
    """Warp 0 of one warpgroup, and a warp that stores nothing: dh leaves from the ring, a_s from the buffers."""
    for _ in range(TILES):
        steps, of_another = Releases(stores), Releases(Stores())
        for index in range(epilogue.ring_steps):
            a_s = "buffer", epilogue.buffers.index(index)
            pending = epilogue.pending(index)
            one_more = stores.would_be_reading(pending)
            assert one_more is None or one_more == a_s, "one more store might have been under way"
            stores.wait(pending)
            assert a_s not in stores.reading()
            stores.sources += [("stage", index)] * epilogue.halves + [a_s]
            for warp, feed in enumerate((steps, of_another)):
                FINISH_SUBTILE(epilogue, feed, SimpleNamespace(warp=warp), index)
        assert steps.released == of_another.released == list(range(epilogue.ring_steps))


@pytest.mark.parametrize("act", ["swiglu", "silu"])
def test_dh_leaves_from_the_ring(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for buffers, blocks, subtiles in itertools.product((1, 2, 3, 4), (1, 2), (1, 2, 4)):
        epilogue = DActReduce(None, buffers, blocks, subtiles, Activation(act), 256, 256, 2, 3, (4, 2))
        stores = Stores()
        monkeypatch.setattr(dact_reduce, "wait_stores", stores.wait)
        walk_dact_reduce(epilogue, stores)
