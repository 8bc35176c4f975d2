"""The protocol, with a clock that counts instead of measuring."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from perf import protocol
from perf.protocol import TOTAL, Case, Settings, measure, percentiles


class Fake:
    """A clock that advances when the cases say so, and writes down what happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def mark(self) -> float:
        self.log.append("mark")
        return self.now

    def elapsed_ms(self, start: float, end: float) -> float:
        return end - start

    def flush(self) -> None:
        self.now += 1000
        self.log.append("flush")

    def spin(self, seconds: float) -> None:
        self.now += 1000
        self.log.append("spin")

    def synchronize(self) -> None:
        self.log.append("sync")


def case(clock: Fake, name: str, *ms: float) -> Case:
    def run(lap: Callable[[], None]) -> None:
        clock.log.append(name)
        for position, part in enumerate(ms):
            if position:
                lap()
            clock.now += part

    return Case(run, laps=tuple(f"{name}{i}" for i in range(len(ms))) if len(ms) > 1 else ())


def test_percentiles() -> None:
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([5, 1, 4, 2, 3]) == pytest.approx((1.8, 3.0, 4.2))


@pytest.mark.parametrize("spin", ["round", "call", "none"])
def test_flush_and_spin_are_not_timed(spin: str) -> None:
    clock = Fake()
    cases = {"a": case(clock, "a", 7.0), "b": case(clock, "b", 2.0, 3.0)}
    results = measure(cases, clock, Settings(repeats=4, warm_seconds=0, spin=spin))
    assert results["a"].ms == {TOTAL: [7.0] * 4}
    assert results["b"].ms == {TOTAL: [5.0] * 4, "b0": [2.0] * 4, "b1": [3.0] * 4}
    assert results["b"].times("b1") == (3.0, 3.0, 3.0)
    assert clock.log.count("spin") == {"round": 4, "call": 8, "none": 0}[spin]


def test_cases_take_turns_and_each_is_flushed_before() -> None:
    clock, repeats = Fake(), 40
    cases = {name: case(clock, name, 1.0) for name in "abc"}
    done: list[int] = []
    measure(cases, clock, Settings(repeats=repeats, warm_seconds=0), lambda: done.append(1))
    assert len(done) == repeats
    timed = clock.log[clock.log.index("spin") :]
    order = [entry for entry in timed if entry in "abc"]
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == repeats and all(sorted(r) == list("abc") for r in rounds)
    # Any case follows any other, and another run has the same orders.
    assert {tuple(r) for r in rounds} == set(itertools.permutations("abc"))
    again = Fake()
    measure({name: case(again, name, 1.0) for name in "abc"}, again, Settings(repeats=repeats, warm_seconds=0))
    assert [entry for entry in again.log[again.log.index("spin") :] if entry in "abc"] == order
    for position, entry in enumerate(timed):
        if entry in "abc":
            assert timed[position - 2 : position] == ["flush", "mark"]
            assert timed[position + 1] == "mark"


def test_first_call_is_outside_the_timing() -> None:
    clock = Fake()
    cost = [100.0, 1.0]

    def run(lap: Callable[[], None]) -> None:
        clock.now += cost[0] if len(cost) == 2 else cost[-1]
        if len(cost) == 2:
            cost.pop(0)

    results = measure({"a": Case(run)}, clock, Settings(repeats=3, warm_seconds=0))
    assert results["a"].ms[TOTAL] == [1.0] * 3
    assert results["a"].first_s > 0


def test_nothing_to_measure() -> None:
    assert measure({}, Fake(), Settings()) == {}


def test_issue_times_synchronise_only_between_rounds() -> None:
    clock, calls = Fake(), []
    seconds = protocol.issue_times(lambda: calls.append(len(clock.log)), clock, calls=5, rounds=2)
    assert len(seconds) == 2 and all(s >= 0 for s in seconds)
    assert len(calls) == 3 + 2 * 5
    assert clock.log == ["sync"] * 3


def test_host_clock_measures() -> None:
    results = measure({"sum": protocol.simple(lambda: sum(range(20000)))}, protocol.HostClock(), Settings(5, 0.0))
    assert 0 < results["sum"].times().p50 < 1000
