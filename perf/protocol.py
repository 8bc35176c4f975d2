"""How anything here is timed. Imports torch alone, so that another environment's Python can load it by its path.

All cases of a measurement run in one process and in turns: every repeat times each case once, in an order drawn anew.
Before each timed call the L2 cache is flushed by writing a buffer larger than twice its size, in the stream and outside
the timing. On a GPU the times are those of the device: a short spin lets the queue fill before the calls are timed, so
that launch gaps are not. Repeats begin after seconds under load, when power has settled the clocks.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

TOTAL = "total"


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
    def mark(self) -> Any: ...
    def elapsed_ms(self, start: Any, end: Any) -> float: ...
    def flush(self) -> None: ...
    def spin(self, seconds: float) -> None: ...
    def synchronize(self) -> None: ...


class CudaClock:
    """Events in the current stream."""

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
    """repeats: timed rounds. warm_seconds: of load before them. spin: "round", one spin before a round of short kernels
    that follow each other closely; "call", one before each call, for cases that may synchronise; "none", none, and each
    call starts when the device is idle: the time then includes what the host does not hide."""

    repeats: int = 20
    warm_seconds: float = 1.0
    spin: str = "round"
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
    issue_s: list[float] = field(default_factory=list)

    def times(self, lap: str = TOTAL) -> Times:
        return percentiles(self.ms[lap])


def simple(call: Callable[[], object]) -> Case:
    """A case without laps."""
    return Case(lambda lap: call())


def first_call(case: Case, clock: Clock) -> Samples:
    """Run a case once, to the end: it compiles and tunes here, outside every timing."""
    clock.synchronize()
    start = time.perf_counter()
    case.run(lambda: None)
    clock.synchronize()
    return Samples(first_s=time.perf_counter() - start)


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


def _warm_up(cases: Mapping[str, Case], clock: Clock, settings: Settings, results: dict[str, Samples]) -> None:
    """Seconds of load; notes how long the host takes to issue each case."""
    end = time.perf_counter() + settings.warm_seconds
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        for name, case in cases.items():
            start = time.perf_counter()
            case.run(lambda: None)
            results[name].issue_s.append(time.perf_counter() - start)
            clock.flush()
        clock.synchronize()
        rounds += 1


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
    _warm_up(cases, clock, settings, results)
    issue = {name: percentiles(samples.issue_s).p50 for name, samples in results.items()}
    names, draw = list(cases), random.Random(0)
    gc.collect()
    for _ in range(settings.repeats):
        # Not one that rotates: each case would follow the same other one, and inherit its heat, every time.
        order = draw.sample(names, len(names))
        timed = _Round(clock)
        clock.synchronize()
        if settings.spin == "round":
            clock.spin(min(1.2 * sum(issue.values()) + 1e-4, settings.max_spin))
        for name in order:
            clock.flush()
            if settings.spin == "call":
                clock.spin(min(1.3 * issue[name] + 1e-4, settings.max_spin))
            elif settings.spin == "none":
                clock.synchronize()
            timed.time(name, cases[name])
        clock.synchronize()
        timed.read(cases, results)
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
