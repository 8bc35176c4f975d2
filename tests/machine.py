"""Stands for a cluster of CTAs while their roles run on the host: barriers, copies, products, shared memory.

Everything that is asynchronous on the device happens here at any time, in an order drawn from the seed. What must
not be is an AssertionError, and what never ends a Deadlock.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from lockstep import Lockstep

LANES = 32
WARPS = 12
BYTES = 64  # of one TMA copy
PARTS_OF_K = 2  # products of a k step
Stage = tuple[int, int]  # CTA, number
GATHERED, FED = "gathered", "fed"  # an operand by cp.async; inputs of the epilogue


class Address(int):
    def __add__(self, other: int) -> Address:
        return Address(int(self) + int(other))

    def toint(self) -> Address:
        return self


class Mbarrier:
    def __init__(self, count: int) -> None:
        self.count = self.missing = count
        self.bytes = 0
        self.phase = 0

    def arrive(self, threads: int) -> None:
        self.missing -= threads
        assert self.missing >= 0, "one arrival too many"
        self._complete()

    def transfer(self, size: int) -> None:
        """Expect bytes, or, if negative, have received them."""
        self.bytes += size
        self._complete()

    def _complete(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class NamedBarrier:
    def __init__(self) -> None:
        self.arrived: set[int] = set()
        self.generation = 0

    def arrive(self, warp: int, threads: int) -> None:
        assert warp not in self.arrived, "a warp arrives twice"
        self.arrived.add(warp)
        if len(self.arrived) * LANES == threads:
            self.arrived, self.generation = set(), self.generation + 1


class Machine:
    """Stands for `cute.arch`, `cute`, `warpgroup` and the shared memories of a cluster."""

    def __init__(self, seed: int, ctas: int) -> None:
        self.lockstep = Lockstep(seed)
        self.ctas = ctas
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}  # by CTA and address
        self.named: dict[tuple[int, int], NamedBarrier] = defaultdict(NamedBarrier)  # by CTA and number
        self.elected: set[int] = set()
        self.stages: dict[Stage, dict[tuple[str, int], Any]] = defaultdict(
            dict
        )  # (what, part) -> content, None in flight
        self.readers: dict[Stage, int] = defaultdict(int)  # products that read a stage
        self.stores: dict[Stage, int] = defaultdict(int)  # likewise copies to global memory
        self.written: dict[Any, Counter[int]] = defaultdict(Counter)  # stage, what it brought -> warp -> quarters
        self.unfenced: dict[int, set[Stage]] = defaultdict(set)  # thread -> stages that it has written
        self.storing: dict[int, deque[Stage]] = defaultdict(deque)  # thread -> those under way
        self.copies: dict[int, int] = defaultdict(int)  # thread -> cp.async copies under way
        self.groups: dict[int, deque[list[Any]]] = defaultdict(deque)  # thread -> groups of products under way
        self.committed: dict[int, int] = defaultdict(int)  # thread -> groups of products so far
        self.issued: dict[int, list[Any]] = defaultdict(list)  # thread -> products not yet in a group
        self.fenced: set[int] = set()
        self.left: dict[int, int] = defaultdict(int)  # CTA -> warps that have ended
        self.arch = self
        self.Field = SimpleNamespace(ACCUMULATE="accumulate")

    @property
    def thread(self) -> int:
        return self.lockstep.current

    @property
    def cta(self) -> int:
        return self.thread // WARPS

    @property
    def warp(self) -> int:
        return self.thread % WARPS

    def mbarrier(self, cta: int, address: int) -> Mbarrier:
        assert self.left[cta] < WARPS, "a barrier of a CTA that has left"
        return self.mbarriers[cta, int(address)]

    # set-up

    def block_idx(self) -> tuple[int, int, int]:
        return self.cta, 0, 0

    def grid_dim(self) -> tuple[int, int, int]:
        return self.ctas, 1, 1

    def warp_idx(self) -> int:
        return self.warp

    def lane_idx(self) -> int:
        return 0

    def make_warp_uniform(self, value: int) -> int:
        return value

    def setmaxregister_increase(self, count: int) -> None:
        pass

    setmaxregister_decrease = setmaxregister_increase

    # barriers

    @contextlib.contextmanager
    def elect_one(self) -> Iterator[None]:
        self.elected.add(self.thread)
        yield
        self.elected.discard(self.thread)

    @property
    def active(self) -> int:
        return 1 if self.thread in self.elected else LANES

    def mbarrier_init(self, address: int, count: int) -> None:
        for cta in range(self.ctas):
            self.mbarriers[cta, int(address)] = Mbarrier(count)

    def mbarrier_arrive(self, address: int, peer_cta_rank_in_cluster: int | None = None) -> None:
        self.lockstep.wait()
        cta = self.cta if peer_cta_rank_in_cluster is None else peer_cta_rank_in_cluster
        self.mbarrier(cta, address).arrive(self.active)

    def mbarrier_arrive_and_expect_tx(self, address: int, size: int) -> None:
        self.lockstep.wait()
        barrier = self.mbarrier(self.cta, address)
        barrier.transfer(size * self.active)
        barrier.arrive(self.active)

    def mbarrier_wait(self, address: int, parity: int) -> None:
        barrier = self.mbarrier(self.cta, address)
        self.fenced.discard(self.thread)
        self.lockstep.wait(lambda: barrier.phase & 1 != parity)

    def cp_async_mbarrier_arrive_noinc(self, address: int) -> None:
        thread, barrier = self.thread, self.mbarrier(self.cta, address)
        self.lockstep.later(lambda: barrier.arrive(LANES), lambda: self.copies[thread] == 0)

    def fence_proxy(self, kind: str, space: str) -> None:
        self.fenced.add(self.thread)
        self.unfenced[self.thread].clear()

    def barrier(self, barrier_id: int, number_of_threads: int) -> None:
        named = self.named[self.cta, int(barrier_id)]
        before = named.generation
        named.arrive(self.thread, number_of_threads)
        self.lockstep.wait(lambda: named.generation > before)

    def barrier_arrive(self, barrier_id: int, number_of_threads: int) -> None:
        self.lockstep.wait()
        self.named[self.cta, int(barrier_id)].arrive(self.thread, number_of_threads)

    def cluster_arrive(self) -> None:
        self.named[-1, 0].arrive(self.thread, self.ctas * WARPS * LANES)

    def cluster_wait(self) -> None:
        self.lockstep.wait(lambda: self.named[-1, 0].generation > 0)

    # copies

    def overwrite(self, stage: Stage, key: tuple[str, int]) -> None:
        assert not self.readers[stage] + self.stores[stage], f"stage {stage} is overwritten while it is read"
        held = self.stages[stage]
        for other in [o for o in held if (o[0] == FED) != (key[0] == FED)]:
            del held[other]  # operands and inputs of the epilogue take the same memory
        held[key] = None

    def bulk(self, cta: int, stage: int, key: tuple[str, int], content: Any, address: int) -> None:
        self.lockstep.wait()
        self.overwrite((cta, stage), key)

        def lands() -> None:
            self.stages[cta, stage][key] = content
            self.mbarrier(cta, address).transfer(-BYTES)

        self.lockstep.later(lands)

    def gather(self, stage: int, content: Any) -> None:
        self.lockstep.wait()
        thread, place, key = self.thread, (self.cta, stage), (GATHERED, self.warp)
        self.overwrite(place, key)
        self.copies[thread] += 1

        def lands() -> None:
            self.stages[place][key] = content
            self.copies[thread] -= 1

        self.lockstep.later(lands)

    def write(self, stage: Stage) -> None:
        """A quarter of a box of results, into a stage that has brought inputs."""
        self.lockstep.wait()
        assert not self.readers[stage], f"results in stage {stage} while it is read"
        self.written[stage, self.inputs(stage)][self.warp] += 1
        self.unfenced[self.thread].add(stage)

    def inputs(self, stage: Stage) -> Any:
        """Of an epilogue, in a stage"""
        assert any(what == FED for what, _ in self.stages[stage]), f"stage {stage} is not the epilogue's any more"
        return self.read(stage)

    def store(self, stage: Stage, quarters: int) -> None:
        """Have results copied away from a stage, once each warp of the warpgroup has written so many quarters."""
        mates = range(self.warp // 4 * 4, self.warp // 4 * 4 + 4)
        assert all(self.written[stage, self.inputs(stage)][warp] == quarters for warp in mates), "stored too early"
        assert not any(stage in self.unfenced[self.cta * WARPS + warp] for warp in mates), "no fence before a store"
        queue = self.storing[self.thread]
        queue.append(stage)
        self.stores[stage] += 1

        def read() -> None:
            self.stores[queue.popleft()] -= 1

        self.lockstep.later(read)

    def cp_async_bulk_commit_group(self) -> None:
        """Each store is one."""

    def cp_async_bulk_wait_group(self, pending: int, read: bool) -> None:
        queue = self.storing[self.thread]
        self.lockstep.wait(lambda: len(queue) <= pending)

    def read(self, stage: Stage) -> Any:
        """A stage's content, which must be all there."""
        found = self.stages[stage]
        assert len(set(found.values())) == 1, f"what stage {stage} holds does not belong together: {found}"
        return next(iter(found.values()))

    # products

    def fence(self) -> None:
        self.lockstep.wait()

    def size(self, fragment: Any, mode: list[int]) -> int:
        return PARTS_OF_K

    def gemm(self, mma: Any, into: list[Any], a: tuple[str, int], b: tuple[str, int], _: Any) -> None:
        assert a[1] == b[1]
        stage = self.cta, a[1]
        self.readers[stage] += 1
        self.issued[self.thread].append((into, stage, mma.accumulate, self.thread in self.fenced))

    def commit_group(self) -> None:
        queue, group = self.groups[self.thread], self.issued.pop(self.thread)
        queue.append(group)
        self.committed[self.thread] += 1
        self.lockstep.later(lambda: self.multiply(queue), lambda: queue[0] is group)

    def multiply(self, queue: deque[list[Any]]) -> None:
        for into, stage, accumulate, fenced in queue.popleft():
            assert fenced or not any(what == GATHERED for what, _ in self.stages[stage]), "no fence before a product"
            if not accumulate:
                into.clear()
            into.append(self.read(stage))
            self.readers[stage] -= 1

    def wait_group(self, pending: int) -> None:
        queue = self.groups[self.thread]
        self.lockstep.wait(lambda: len(queue) <= pending)
