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
from sonicmoe.cute_kernels import grouped_gemm, mainloop, pace, pipelines, scheduler
from sonicmoe.cute_kernels.epilogue import driver, ring
from sonicmoe.cute_kernels.epilogue.ring import RingEpilogue
from sonicmoe.cute_kernels.grouped_gemm import GroupedGemm
from sonicmoe.cute_kernels.groups import BLOCK_M, Tile, Turns
from sonicmoe.cute_kernels.mainloop import BLOCK_K, Mainloop
from sonicmoe.cute_kernels.operands import Load
from sonicmoe.cute_kernels.pace import TICK, Paced, Unpaced
from sonicmoe.cute_kernels.pipelines import Late, Ring
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
    """Turn i, of group i, has sizes[i] k steps; of those in `short` only the first consumer has rows, in `none` no one.

    parts: if given, rows are what is reduced, and the last k step of turn i has so many blocks.
    """

    sizes: tuple[int, ...]
    short: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    none: tuple[int, ...] = ()

    @property
    def k_steps(self) -> int:
        return max(self.sizes, default=0)

    def turns(self, table: Any, clusters: int) -> Turns:
        return Turns(len(self.sizes), len(self.sizes))

    def tile(self, turn: int, halves: int, rank: int, *_: Any) -> Tile:
        rows = 0 if turn in self.none else BLOCK_M if turn in self.short else BLOCK_M + 1
        if self.parts:
            rows = max(0, ((self.sizes[turn] - 1) * PARTS_OF_K + self.parts[turn]) * BLOCK_K - 1)
        return Tile(turn, 0, rows, 0, 0, 0, self.sizes[turn])

    def has_rows(self, tile: Tile, first_block: int) -> bool:
        return bool(self.parts) or first_block * BLOCK_M < tile.rows

    def products(self, turn: int) -> list[tuple[int, int]]:
        """(turn, k step) of each block along k"""
        found = [(turn, k) for k in range(self.sizes[turn]) for _ in range(PARTS_OF_K)]
        return found[: len(found) - PARTS_OF_K + self.parts[turn]] if self.parts and found else found


class InStage(tuple[int, int]):
    """Any place in a stage"""

    def __add__(self, other: Any) -> InStage:  # type: ignore[override]
        return self


@dataclass(frozen=True)
class Results(RingEpilogue):
    """Takes note of the accumulators, and of what the ring steps that it works in bring it; what it leaves for later
    does so too."""

    machine: Machine
    count: int  # of outputs
    left: int  # pieces that are left for later
    found: dict[int, list[Any]]  # thread -> (tile, contents of its accumulators, its inputs)
    inputs: dict[int, list[Any]]  # thread -> what its tile's ring steps have brought
    later: dict[int, list[Any]]  # thread -> (tile, piece, the products begun since that tile's end)

    @property
    def pieces(self) -> tuple[int, ...]:
        return tuple(range(self.left))

    @property
    def outs(self) -> int:
        return self.count

    @property
    def in_ring(self) -> int:
        """As of down_dgrad: with buffers all but the last"""
        return self.outs - 1 if self.buffer_count else self.outs

    @property
    def ring_bytes(self) -> int:
        return BYTES

    def feed(self, outputs: Any, tile: Tile, *_: Any) -> Callable[[int, int, Address], None]:
        def load(i: int, stage: int, barrier: Address) -> None:
            self.machine.bulk(self.machine.cta, stage, (FED, 0), (tile.group, FED, i), barrier)

        return load

    def open(self, *_: Any) -> None:
        return None

    def nothing(self) -> list[Any]:
        return []

    def piece(self, outputs: Any, held: list[Any], smem: Any, lane: Any, first_block: int, index: int) -> None:
        self.machine.lockstep.wait()
        if held:
            tile, before = held[-1]
            self.later[self.machine.thread].append((tile, index, self.machine.committed[self.machine.thread] - before))

    def visit(self, args: Any, state: None, lane: Any, fed: Any, accumulators: Any, mb: int, nb: int, q: int) -> Any:
        if q == 0:
            self.inputs[self.machine.thread].append(self.machine.inputs((self.machine.cta, fed.stage)))
        return [None] * self.outs

    def targets(self, args: Any, tile: Tile, block: int, nb: int) -> list[Any]:
        return [(4 * self.outs, None, True)] * self.outs

    def places(self, smem: Any, fed: Any, consumer: int, index: int) -> list[Any]:
        stage = InStage((self.machine.cta, fed.stage))
        return [SimpleNamespace(address=lambda: stage, stage=stage)] * self.outs

    def finish(self, *given: Any) -> None:
        *_, held, smem, feed, tile, lane, first_block, accumulators = given
        thread = self.machine.thread
        super().finish(*given)
        held.append((tile.group, self.machine.committed[thread]))
        self.found[thread].append((tile.group, [list(a) for a in accumulators], self.inputs.pop(thread, [])))

    def drain(self, lane: Any) -> None:
        pass


COMPILED = (GroupedGemm, Mainloop, Ring, Late, PingPong, RingEpilogue, Paced)
AS_WRITTEN = {owner: compiled_methods(owner) for owner in COMPILED}


@pytest.fixture
def emulate(monkeypatch: pytest.MonkeyPatch) -> Callable[[Machine], None]:
    """Let the kernels' modules talk to a machine, and take their functions as they are written."""
    language = SimpleNamespace(
        range=lambda *n, unroll: range(*n), range_constexpr=range, min=min, const_expr=lambda x: x
    )
    for owner, methods in AS_WRITTEN.items():
        for name, method in methods.items():
            monkeypatch.setattr(owner, name, method)

    def fragments(self: Mainloop, *_: Any) -> Any:
        return [Fragment("a")] * 2, Fragment("b"), [Accumulators(), Accumulators()]

    monkeypatch.setattr(Mainloop, "fragments", fragments)

    def on(machine: Machine) -> None:
        stand_ins = {"cute": machine, "cutlass": language, "warpgroup": machine, "Int32": int, "Uint32": int}
        stand_ins["wait_stores"] = partial(machine.cp_async_bulk_wait_group, read=True)
        stand_ins["stmatrix_x4"] = lambda stage, values: machine.write(stage)
        stand_ins["store_box"] = lambda quarters, place, start: machine.store(place.stage, quarters)
        for module in (grouped_gemm, mainloop, pace, pipelines, scheduler, ring, driver):
            for name, stand_in in stand_ins.items():
                monkeypatch.setattr(module, name, stand_in, raising=False)

    return on


def run_ctas(
    emulate: Callable[[Machine], None], schedule: Any, stages: int, sizes: tuple[int, ...], gathers: bool, seed: int,
    works: int = 0, outs: int = 3, buffers: int = 0, cluster: int = 1,
    short: tuple[int, ...] = (), parts: tuple[int, ...] = (), none: tuple[int, ...] = (), counter: Any = None,
    pieces: int = 0, **ring_form: int,
) -> None:  # fmt: skip
    """One cluster that does all turns; checks what each consumer warp has accumulated, and read in its epilogues.

    works: sub-tiles whose inputs come and `outs` outputs leave in the ring, the last one from buffers if there are any;
    pieces: how many are left for later.
    """
    machine = Machine(seed, cluster)
    emulate(machine)
    queue = replace(Ring(stages, gathers, 4 * schedule.stage_readers, cluster), **ring_form)
    operands = Operand(machine, "a", gathers), Operand(machine, "b", False, cluster)
    main = Mainloop(*operands, queue, schedule, 128, 128, zero_first=bool(parts))
    notes = (defaultdict(list) for _ in range(3))
    results = Results(None, buffers, 1, works, stages, (4, 2), machine, outs, pieces, *notes)
    tiles = Tiles(sizes, short, parts, none)
    pace = Paced(tiles.k_steps, results.ring_steps) if counter else Unpaced()
    gemm = GroupedGemm("test", cluster, tiles, main, results, pace)
    bars = queue.barriers(Address(0))
    queue.init(bars)
    memory = SimpleNamespace(data_ptr=lambda: None)
    storage = SimpleNamespace(a=memory, b=memory, out=memory)

    def body(warp: int) -> None:
        """As in GroupedGemm.kernel"""
        if warp < 4:
            gemm.produce(None, None, None, None, counter, storage, bars, None, warp * LANES, warp, 0)
        else:
            gemm.consume(None, None, Mma(), storage, bars, None, warp * LANES, warp // 4 - 1)
        gemm.meet()
        machine.left[machine.cta] += 1

    machine.lockstep.run([partial(body, warp) for _ in range(cluster) for warp in range(WARPS)])
    assert not any(machine.groups.values()) and not any(machine.readers.values()) and not any(machine.stores.values())
    for cta, warp in itertools.product(range(cluster), range(4, WARPS)):
        consumer = warp // 4 - 1
        mine = [i for i in range(len(sizes)) if i % schedule.teams == consumer % schedule.teams]
        mine = [i for i in mine if i not in none and not (i in short and schedule.first_block(consumer, 128))]
        for (tile, accumulators, read), i in zip(results.found[cta * WARPS + warp], mine, strict=True):
            assert tile == i and read == [(i, FED, j) for j in range(results.ring_steps)]
            assert accumulators == [tiles.products(i)] * 2
        # Each piece of a tile once, in order, beside a whole k step of the next as long as there are any.
        of_next = [max(0, sizes[i] - bool(parts)) for i in mine[1:]] + [0]
        expected = [(i, p, min(p + 1, n)) for i, n in zip(mine, of_next, strict=False) for p in range(pieces)]
        assert results.later[cta * WARPS + warp] == expected


@pytest.mark.parametrize("schedule", [Cooperative(), PingPong()], ids=str)
@pytest.mark.parametrize("gathers", [False, True])
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_every_order_of_steps_gives_the_products(emulate: Any, schedule: Any, gathers: bool, stages: int) -> None:
    seed = 0
    for k_steps in (1, stages - 1, stages, 2 * stages + 1):
        for tiles in (0, 1, 2, 5):
            run_ctas(emulate, schedule, stages, (k_steps,) * tiles, gathers, seed)
            seed += 1


@pytest.mark.parametrize(("works", "outs", "buffers"), [(1, 2, 0), (2, 3, 0), (4, 3, 0), (4, 3, 1), (2, 2, 2)])
@pytest.mark.parametrize("stages", [2, 3, 6])
def test_an_epilogue_in_the_ring(emulate: Any, works: int, outs: int, buffers: int, stages: int) -> None:
    given = {"works": works, "outs": outs, "buffers": buffers}
    for seed, short in enumerate(((), (0,), (1, 2, 4), (4,))):
        for k_steps in (1, 4, 9):
            sizes = (k_steps,) * 5
            run_ctas(emulate, Cooperative(), stages, sizes, True, seed, short=short, **given)
            run_ctas(emulate, Cooperative(), stages, sizes, True, seed, none=short, **given)


@pytest.mark.parametrize("pieces", [1, 4, 9])
def test_pieces_beside_the_next_tile(emulate: Any, pieces: int) -> None:
    for seed, short in enumerate(((), (0,), (1, 2, 4), (4,), (0, 1, 2, 3, 4))):
        for k_steps in (1, 4, 12):
            run_ctas(emulate, Cooperative(), 3, (k_steps,) * 5, True, seed, pieces=pieces, short=short)
            run_ctas(emulate, Cooperative(), 3, (k_steps,) * 5, False, seed, pieces=pieces, none=short)
    sizes = (0, 5, 0, 0, 1, 12, 3, 0)
    run_ctas(emulate, Cooperative(), 4, sizes, True, 0, pieces=pieces, parts=(2,) * 8)
    run_ctas(emulate, Cooperative(), 4, sizes, True, 0, pieces=pieces, parts=(2,) * 8, cluster=2)


@pytest.mark.parametrize("schedule", [Cooperative(), PingPong()], ids=str)
def test_tiles_that_a_warpgroup_has_no_rows_of(emulate: Any, schedule: Any) -> None:
    for seed, short in enumerate(((0,), (1, 2), (0, 1, 2, 3, 4))):
        run_ctas(emulate, schedule, 3, (5,) * 5, True, seed, short=short)


def test_a_stage_given_back_while_stores_read_it_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device whose stores take for ever, unless they are waited for."""
    stores = Machine.store

    def never(self: Machine, stage: Stage, quarters: int) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(self.lockstep, "later", lambda *_: None)
            stores(self, stage, quarters)

    monkeypatch.setattr(Machine, "store", never)
    monkeypatch.setattr(Machine, "cp_async_bulk_wait_group", lambda *_, **__: None)
    fails(emulate, AssertionError, works=2)


@pytest.mark.parametrize("name", ["fence_proxy", "barrier"])
def test_a_store_of_what_is_not_written_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Machine, name, lambda *_, **__: None)
        fails(emulate, AssertionError, works=2, gathers=False)


def test_a_stage_that_is_never_given_back_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Late, "release", lambda *_: None)
    fails(emulate, Deadlock, works=2)


@pytest.mark.parametrize("schedule", [Cooperative(), PingPong()], ids=str)
@pytest.mark.parametrize("gathers", [False, True])
def test_clusters(emulate: Any, schedule: Any, gathers: bool) -> None:
    for seed, (stages, k_steps) in enumerate(((2, 1), (2, 5), (3, 3), (5, 7))):
        run_ctas(emulate, schedule, stages, (k_steps,) * 5, gathers, seed, cluster=2)


def test_a_cta_of_a_cluster_that_leaves_too_early_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedGemm, "meet", lambda self: None)
    monkeypatch.setattr(Ring, "drain", lambda *_: None)
    fails(emulate, AssertionError, cluster=2)


def test_a_stage_that_is_released_to_one_cta_only_is_noticed(emulate: Any) -> None:
    fails(emulate, AssertionError, cluster=2, consumer_warps=4)


@pytest.mark.parametrize("seed", range(4))
def test_tiles_of_different_lengths(emulate: Any, seed: int) -> None:
    """As of the weight gradients: an empty group has a tile without k steps."""
    sizes = (0, 5, 0, 0, 1, 9, 3, 0)
    run_ctas(emulate, Cooperative(), 4, sizes, True, seed, parts=(2, 2, 1, 2, 1, 1, 2, 2))
    run_ctas(emulate, Cooperative(), 4, sizes, True, seed, parts=(1,) * 8, cluster=2)


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
    fails(emulate, AssertionError, schedule=PingPong(), sizes=(6,) * 6, works=4)


def test_a_missing_fence_is_noticed(emulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "fence_proxy", lambda *_, **__: None)
    fails(emulate, AssertionError)


@pytest.mark.parametrize(("schedule", "works"), [(Cooperative(), 0), (Cooperative(), 4), (PingPong(), 0)], ids=str)
def test_the_roles_at_one_pace(emulate: Any, monkeypatch: pytest.MonkeyPatch, schedule: Any, works: int) -> None:
    """Every step is counted once, those of the epilogue too."""
    counted, counter = [], SimpleNamespace(iterator=SimpleNamespace(toint=lambda: 7))
    monkeypatch.setattr(pace, "add_count", lambda address, steps: counted.append((address, steps)))
    monkeypatch.setattr(pace, "read_relaxed", lambda address: 0)
    monkeypatch.setattr(pace, "sleep", lambda nanoseconds: None)
    run_ctas(emulate, schedule, 3, (2 * TICK + 3,) * 6, True, 0, works=works, outs=3, counter=counter)
    of_epilogue = 4 if works else 0
    assert counted == [(7, steps) for _ in range(6) for steps in (3 + of_epilogue, TICK, TICK)] + [(7, 0)]
