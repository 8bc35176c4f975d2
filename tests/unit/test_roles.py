"""The roles of a CTA of the grouped GEMM, as they are written, run on the host in random orders of their steps.

Twelve threads stand for the warps of a CTA; mbarriers, named barriers, copies and products are simulated and take any
time they like. A stage that is overwritten while a product reads it, a product of a wrong k tile, one arrival too many,
a barrier that never completes, a CTA of a cluster that leaves too early: each fails. Not simulated: what is inside a
copy, a product or an epilogue.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from as_written import compiled_methods
from lockstep import Deadlock
from machine import BYTES, FED, LANES, PARTS_OF_K, WARPS, Address, Machine, Stage

pytest.importorskip("cutlass")
from sonicmoe.cute_kernels import grouped_gemm, mainloop, pipelines, scheduler
from sonicmoe.cute_kernels.grouped_gemm import GroupedGemm
from sonicmoe.cute_kernels.groups import Tile
from sonicmoe.cute_kernels.mainloop import Mainloop
from sonicmoe.cute_kernels.operands import Load
from sonicmoe.cute_kernels.pipelines import Ring
from sonicmoe.cute_kernels.scheduler import Cooperative, PingPong


class Fragment:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, at: tuple[Any, ...]) -> tuple[str, int]:
        return self.name, int(at[3])


class Mma:
    accumulate = True

    def set(self, field: str, value: bool) -> None:
        self.accumulate = value


class Accumulators(list):
    def fill(self, value: float) -> None:
        self.clear()


@dataclass(frozen=True)
class Operand:
    machine: Machine
    name: str
    gathers: bool
    boxes: int = 1  # of a tile; where the CTAs of a cluster share the tile, one for each

    @property
    def tma_bytes(self) -> int:
        return 0 if self.gathers else BYTES * self.boxes

    def open(self, args: Any, smem: Any, tile: Tile, tid: int, rank: int) -> Load:
        machine, mine = self.machine, self.machine.cta

        def bulk(k: int, stage: int, barrier: Address) -> None:
            if not self.gathers:
                for cta in range(self.boxes) if self.boxes > 1 else (mine,):
                    machine.bulk(cta, stage, (self.name, rank), (tile.group, k), barrier)

        def gather(k: int, stage: int, carry: int) -> int:
            if self.gathers:
                assert carry == k
                machine.gather(stage, (tile.group, k))
            return carry + 1

        return Load(bulk, gather, 0)


@dataclass(frozen=True)
class Tiles:
    """Turn i, of group i, has sizes[i] k steps."""

    sizes: tuple[int, ...]

    @property
    def k_steps(self) -> int:
        return max(self.sizes, default=0)

    def count(self, table: Any) -> int:
        return len(self.sizes)

    def tile(self, turn: int, rank: int, *_: Any) -> Tile:
        return Tile(turn, 0, 0, 0, 0, 0, self.sizes[turn])


@dataclass(frozen=True)
class Results:
    """An epilogue that takes note of the accumulators, and of inputs in ring steps of its own."""

    machine: Machine
    ring_steps: int
    found: dict[int, list[Any]]  # thread -> (tile, contents of its accumulators, its inputs)

    ring_bytes = BYTES

    def feed(self, outputs: Any, tile: Tile, *_: Any) -> Callable[[int, int, Address], None]:
        cta = self.machine.cta
        return lambda i, stage, barrier: self.machine.bulk(cta, stage, (FED, 0), (tile.group, FED, i), barrier)

    def open(self, *_: Any) -> None:
        return None

    def run(self, outputs: Any, state: None, smem: Any, feed: Any, tile: Tile, lane: Any, accumulators: Any) -> None:
        inputs: list[Any] = []
        held: list[Stage] = []
        for i in range(self.ring_steps):
            stage = self.machine.cta, feed.wait(i).stage
            self.machine.readers[stage] += 1
            self.machine.lockstep.wait()
            inputs.append(self.machine.read(stage))
            held.append(stage)
            # As in down_dgrad: the warp that issues the stores keeps a stage until those of the next are issued.
            if self.machine.warp % 4 > 0 or len(held) > 1:
                self.release(feed, held.pop(0), i - len(held))
        self.machine.lockstep.wait()
        if held:
            self.release(feed, held.pop(0), self.ring_steps - 1)
        self.found[self.machine.thread].append((tile.group, [list(a) for a in accumulators], inputs))

    def release(self, feed: Any, stage: Stage, index: int) -> None:
        self.machine.readers[stage] -= 1
        feed.release(index)

    def drain(self, lane: Any) -> None:
        pass


AS_WRITTEN = {owner: compiled_methods(owner) for owner in (GroupedGemm, Mainloop, Ring, PingPong)}


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Let the kernels' modules talk to a machine, and take their functions as they are written."""
    language = SimpleNamespace(range=lambda n, unroll: range(n), range_constexpr=range, min=min)
    for owner, methods in AS_WRITTEN.items():
        for name, method in methods.items():
            monkeypatch.setattr(owner, name, method)

    def fragments(self: Mainloop, *_: Any) -> Any:
        return [Fragment("a")] * 2, Fragment("b"), [Accumulators(), Accumulators()]

    monkeypatch.setattr(Mainloop, "fragments", fragments)

    def on(machine: Machine) -> None:
        stand_ins = {"cute": machine, "cutlass": language, "warpgroup": machine, "Int32": int, "Uint32": int}
        for module in (grouped_gemm, mainloop, pipelines, scheduler):
            for name, stand_in in stand_ins.items():
                monkeypatch.setattr(module, name, stand_in, raising=False)

    return on


def run_ctas(
    emulate: Callable[[Machine], None], schedule: Any, stages: int, sizes: tuple[int, ...], gathers: bool, seed: int,
    inputs: int = 0, cluster: int = 1, **ring: int,
) -> None:  # fmt: skip
    """One cluster that does all turns; checks what each consumer warp has accumulated, and read in its epilogues."""
    machine = Machine(seed, cluster)
    emulate(machine)
    queue = replace(Ring(stages, gathers, 4 * schedule.stage_readers, cluster), **ring)
    operands = Operand(machine, "a", gathers), Operand(machine, "b", False, cluster)
    main = Mainloop(*operands, queue, schedule, 128, 128, zero_first=0 in sizes)
    results = Results(machine, inputs, defaultdict(list))
    gemm = GroupedGemm("test", cluster, Tiles(sizes), main, results)
    bars = queue.barriers(Address(0))
    queue.init(bars)
    memory = SimpleNamespace(data_ptr=lambda: None)
    storage = SimpleNamespace(a=memory, b=memory, out=memory)

    def body(warp: int) -> None:
        """As in GroupedGemm.kernel"""
        if warp < 4:
            gemm.produce(None, None, None, None, storage, bars, None, warp * LANES, warp, 0)
        else:
            gemm.consume(None, None, Mma(), storage, bars, None, warp * LANES, warp // 4 - 1)
        gemm.meet()
        machine.left[machine.cta] += 1

    machine.lockstep.run([partial(body, warp) for _ in range(cluster) for warp in range(WARPS)])
    assert not any(machine.groups.values()) and not any(machine.readers.values())
    for cta, warp in itertools.product(range(cluster), range(4, WARPS)):
        mine = [i for i in range(len(sizes)) if i % schedule.turns == (warp // 4 - 1) % schedule.turns]
        for (tile, accumulators, read), i in zip(results.found[cta * WARPS + warp], mine, strict=True):
            assert tile == i and read == [(i, FED, j) for j in range(inputs)]
            assert accumulators == [[(i, k) for k in range(sizes[i]) for _ in range(PARTS_OF_K)]] * 2


@pytest.mark.parametrize("schedule", [Cooperative("m"), Cooperative("n"), PingPong()], ids=str)
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_every_order_of_steps_gives_the_products(emulate: Any, schedule: Any, gathers: bool, stages: int) -> None:
    seed = 0
    for k_steps in (1, stages - 1, stages, 2 * stages + 1):
        for tiles in (0, 1, 2, 5):
            run_ctas(emulate, schedule, stages, (k_steps,) * tiles, gathers, seed)
            seed += 1


@pytest.mark.parametrize("inputs", [1, 2, 4])
@pytest.mark.parametrize("stages", [2, 3, 5])
def test_inputs_of_the_epilogue_come_through_the_ring(emulate: Any, inputs: int, stages: int) -> None:
    for seed in range(4):
        for k_steps in (1, 4, 9):
            run_ctas(emulate, Cooperative(), stages, (k_steps,) * 5, True, seed, inputs=inputs)


@pytest.mark.parametrize("schedule", [Cooperative("m"), PingPong()], ids=str)
@pytest.mark.parametrize("gathers", [False, True])
def test_clusters(emulate: Any, schedule: Any, gathers: bool) -> None:
    for seed, (stages, k_steps) in enumerate(((2, 1), (2, 5), (3, 3), (5, 7))):
        run_ctas(emulate, schedule, stages, (k_steps,) * 5, gathers, seed, cluster=2)
        run_ctas(emulate, Cooperative(), stages, (k_steps,) * 4, gathers, seed, inputs=2, cluster=2)


def test_a_cta_of_a_cluster_that_leaves_too_early_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedGemm, "meet", lambda self: None)
    monkeypatch.setattr(Ring, "drain", lambda *_: None)
    fails(emulate, AssertionError, cluster=2)


def test_a_stage_that_is_released_to_one_cta_only_is_noticed(emulate: Any) -> None:
    fails(emulate, AssertionError, cluster=2, consumer_warps=4)


@pytest.mark.parametrize("seed", range(4))
def test_tiles_of_different_lengths(emulate: Any, seed: int) -> None:
    """As of the weight gradients: an empty group has a tile without k steps."""
    run_ctas(emulate, Cooperative(), 4, (0, 5, 0, 0, 1, 9, 3, 0), True, seed)


def fails(emulate: Any, error: type[AssertionError], **changed: Any) -> None:
    """In some order of steps."""
    given = {"schedule": Cooperative(), "stages": 3, "sizes": (5,) * 4, "gathers": True} | changed
    with pytest.raises(error):
        for seed in range(20):
            run_ctas(emulate, seed=seed, **given)


def test_a_wrong_count_of_arrivals_is_noticed(emulate: Any) -> None:
    fails(emulate, Deadlock, consumer_warps=9)
    fails(emulate, AssertionError, consumer_warps=7)


def test_a_stage_released_too_early_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "wait_group", lambda self, pending: None)
    fails(emulate, AssertionError)


def test_pingpong_needs_its_order(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PingPong, "wait_turn", lambda *_: None)
    monkeypatch.setattr(PingPong, "pass_turn", lambda *_: None)
    fails(emulate, AssertionError, schedule=PingPong(), sizes=(7,) * 6)


def test_pingpong_cannot_have_inputs_in_the_ring(emulate: Any) -> None:
    """The turn passes before they have landed: the other warpgroup waits for a stage two laps ahead."""
    fails(emulate, AssertionError, schedule=PingPong(), sizes=(6,) * 6, inputs=4)


def test_a_missing_fence_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "fence_proxy", lambda *_, **__: None)
    fails(emulate, AssertionError)
