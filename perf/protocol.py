"""How anything here is timed. Imports torch alone, so that another environment's Python can load it by its path.

All cases of a measurement run in one process and in turns, in an order drawn anew each round. Before each timed call
the L2 cache is flushed by writing a buffer larger than twice its size, in the stream and outside the timing. On a GPU
the times are those of the device: the queue is filled before the calls are timed, so that launch gaps are not.

Power settles the clocks only after some 100 ms, and a layer that draws the power limit runs up to a sixth faster after
something that does not. So kernels, which are short, are timed in the company of all others, after seconds under load;
layers behind calls of their own, several in a turn, as a training step follows another.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

TOTAL = "total"
CALLS_PER_TURN = 3  # that are timed, where the state is "settled"


class Times(NamedTuple):
    """Percentiles in milliseconds."""

    p20: float
    p50: float
    p80: float


def percentiles(samples: list[float]) -> Times:
    """p20, p50, p80 of the samples, interpolated linearly between neighbours."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    return Times(at(0.2), at(0.5), at(0.8))


class Clock(Protocol):
    settles: bool  # whether calls run at another speed after some of them than at first

    def mark(self) -> Any: ...
    def elapsed_ms(self, start: Any, end: Any) -> float: ...
    def flush(self) -> None: ...
    def spin(self, seconds: float) -> None: ...
    def synchronize(self) -> None: ...


class CudaClock:
    """Events in the current stream."""

    settles = True

    def __init__(self, device: str = "cuda") -> None:
        properties = torch.cuda.get_device_properties(device)
        size = max(3 * properties.L2_cache_size, 128 << 20)
        self._buffer = torch.empty(size, dtype=torch.int8, device=device)
        self._cycles_per_second = 1e3 * getattr(properties, "clock_rate", 1_980_000)
        self.name = "device time, L2 flushed"

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_ms(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return start.elapsed_time(end)

    def flush(self) -> None:
        self._buffer.zero_()

    def spin(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self._cycles_per_second))

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class HostClock:
    """Wall time, for a CPU."""

    settles = False
    name = "host time"

    def mark(self) -> float:
        return time.perf_counter()

    def elapsed_ms(self, start: float, end: float) -> float:
        return 1e3 * (end - start)

    def flush(self) -> None:
        pass

    def spin(self, seconds: float) -> None:
        pass

    def synchronize(self) -> None:
        pass


def clock_of(device: str) -> CudaClock | HostClock:
    return CudaClock(device) if device.startswith("cuda") else HostClock()


@dataclass(frozen=True)
class Settings:
    """How often, and in what state of the device a call is timed.

    repeats         timed calls of each case
    warm_seconds    of load by all cases before the first
    state           "busy": each round times each case once, behind one spin, for short kernels that follow each other
                    closely; "settled": each round times CALLS_PER_TURN calls of each case, behind more of its own, for
                    cases that may synchronise; "idle": each call starts when the device is idle, so what the host does
                    not hide counts
    settle_seconds  of a turn's own calls before those that are timed
    max_spin        seconds
    """

    repeats: int = 20
    warm_seconds: float = 1.0
    state: str = "busy"
    settle_seconds: float = 0.2
    max_spin: float = 0.02


@dataclass(frozen=True)
class Case:
    """Something to time. `laps` names its parts in their order; run(lap) calls lap() between two of them.

    Without laps, run(lap) is timed as a whole, under the name "total".
    """

    run: Callable[[Callable[[], None]], object]
    laps: tuple[str, ...] = ()


@dataclass
class Samples:
    """Milliseconds of each repeat, by lap; `TOTAL` is the whole. first_s: seconds of the very first call."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    first_s: float = 0.0

    def times(self, lap: str = TOTAL) -> Times:
        return percentiles(self.ms[lap])


def simple(call: Callable[[], object]) -> Case:
    """A case without laps."""
    return Case(lambda lap: call())


def untimed() -> None:
    """The lap of calls that are not timed."""


def first_call(case: Case, clock: Clock) -> Samples:
    """Run a case once, to the end: it compiles and tunes here, outside every timing."""
    clock.synchronize()
    start = time.perf_counter()
    case.run(untimed)
    clock.synchronize()
    return Samples(first_s=time.perf_counter() - start)


class _Cost(NamedTuple):
    """Seconds that the host takes to issue a call, and from the end of one call to that of the next."""

    issue: float
    period: float

    @property
    def host_is_ahead(self) -> bool:
        """Behind some calls"""
        return self.period > 1.2 * self.issue


def _cost(case: Case, clock: Clock) -> _Cost:
    """By calls back to back: the end of a single one comes late after it is issued, and says little."""

    def seconds(calls: int) -> tuple[float, float]:
        clock.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            case.run(untimed)
        issued = time.perf_counter()
        clock.synchronize()
        return issued - start, time.perf_counter() - start

    (_, one), (issued, five) = seconds(1), seconds(5)
    return _Cost(issued / 5, max(five - one, 0.0) / 4)


class _Round:
    """The marks of one round, read after it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._marks: list[tuple[str, list[Any]]] = []

    def time(self, name: str, case: Case) -> None:
        marks = [self._clock.mark()]
        case.run(lambda: marks.append(self._clock.mark()))
        marks.append(self._clock.mark())
        self._marks.append((name, marks))

    def read(self, cases: Mapping[str, Case], results: dict[str, Samples]) -> None:
        for name, marks in self._marks:
            ms = results[name].ms
            ms.setdefault(TOTAL, []).append(self._clock.elapsed_ms(marks[0], marks[-1]))
            if cases[name].laps:
                for lap, start, end in zip(cases[name].laps, marks[:-1], marks[1:], strict=True):
                    ms.setdefault(lap, []).append(self._clock.elapsed_ms(start, end))


def _warm_up(cases: Mapping[str, Case], clock: Clock, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for case in cases.values():
            case.run(untimed)
            clock.flush()
        clock.synchronize()


def _settle(case: Case, clock: Clock, cost: _Cost, settings: Settings) -> float:
    """Run a case for settle_seconds. Returns how long the device has to spin before each call that is timed."""
    calls = math.ceil(settings.settle_seconds / max(cost.period, cost.issue, 1e-6)) if clock.settles else 0
    for _ in range(calls):
        case.run(untimed)
    return 0.0 if calls and cost.host_is_ahead else min(1.3 * cost.issue + 1e-4, settings.max_spin)


def measure(
    cases: Mapping[str, Case],
    clock: Clock,
    settings: Settings,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, Samples]:
    """Time the cases against each other; `progress` is called after each repeat. Compiles in the first calls."""
    results = {name: first_call(case, clock) for name, case in cases.items()}
    if not cases:
        return results
    _warm_up(cases, clock, settings.warm_seconds)
    costs = {name: _cost(case, clock) for name, case in cases.items()}
    names, draw = list(cases), random.Random(0)
    in_a_turn = CALLS_PER_TURN if settings.state == "settled" else 1
    gc.collect()
    for done in range(0, settings.repeats, in_a_turn):
        calls = min(in_a_turn, settings.repeats - done)
        # Not one that rotates: each case would follow the same other one, and inherit its heat, every time.
        order = draw.sample(names, len(names))
        timed = _Round(clock)
        clock.synchronize()
        if settings.state == "busy":
            clock.spin(min(1.2 * sum(cost.issue for cost in costs.values()) + 1e-4, settings.max_spin))
        for name in order:
            spin = _settle(cases[name], clock, costs[name], settings) if settings.state == "settled" else 0.0
            for _ in range(calls):
                clock.flush()
                if spin:
                    clock.spin(spin)
                elif settings.state == "idle":
                    clock.synchronize()
                timed.time(name, cases[name])
        clock.synchronize()
        timed.read(cases, results)
        for _ in range(calls):
            progress()
    return results


def issue_times(call: Callable[[], object], clock: Clock, calls: int = 50, rounds: int = 3) -> list[float]:
    """Seconds the host takes per call, without synchronising within a round of `calls`; one value per round."""
    for _ in range(3):
        call()
    seconds = []
    gc.collect()
    for _ in range(rounds):
        clock.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
    clock.synchronize()
    return seconds
