"""The protocol, with a clock that counts instead of measuring."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from perf import protocol
from perf.protocol import CALLS_PER_TURN, TOTAL, Case, Settings, measure, percentiles, untimed


class Fake:
    """A clock that advances when the cases say so, and writes down what happens."""

    settles = True

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


@pytest.mark.parametrize("state", ["busy", "settled", "idle"])
def test_flush_spin_and_settling_are_not_timed(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_cost", lambda case, clock: protocol._Cost(issue=1e-5, period=1e-5))
    clock = Fake()
    cases = {"a": case(clock, "a", 7.0), "b": case(clock, "b", 2.0, 3.0)}
    results = measure(cases, clock, Settings(repeats=7, warm_seconds=0, state=state, settle_seconds=1e-4))
    assert results["a"].ms == {TOTAL: [7.0] * 7}
    assert results["b"].ms == {TOTAL: [5.0] * 7, "b0": [2.0] * 7, "b1": [3.0] * 7}
    assert results["b"].times("b1") == (3.0, 3.0, 3.0)
    assert clock.log.count("spin") == {"busy": 7, "settled": 14, "idle": 0}[state]


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


@pytest.mark.parametrize("settles", [True, False])
def test_a_settled_turn_is_behind_calls_of_its_own(settles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_cost", lambda case, clock: protocol._Cost(issue=0.5, period=2.0))
    clock, done = Fake(), []
    clock.settles = settles
    cases = {name: case(clock, name, 1.0) for name in "ab"}
    repeats = CALLS_PER_TURN + 2
    settings = Settings(repeats, warm_seconds=0, state="settled", settle_seconds=5.0)
    results = measure(cases, clock, settings, lambda: done.append(1))
    assert len(done) == repeats and all(len(samples.ms[TOTAL]) == repeats for samples in results.values())
    # three calls of 2 s are at least 5 s; behind them the host is ahead, so nothing spins
    own, before = (3, []) if settles else (0, ["spin"])
    entries = [entry for entry in clock.log if entry != "sync"][2:]  # without the first calls
    expected = []
    for calls in (CALLS_PER_TURN, 2):
        for name in sorted("ab", key=entries[len(expected) :].index):
            expected += [name] * own + ["flush", *before, "mark", name, "mark"] * calls
    assert entries == expected


def test_the_device_waits_for_a_slow_host_also_when_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_cost", lambda case, clock: protocol._Cost(issue=0.9, period=1.0))
    clock = Fake()
    measure({"a": case(clock, "a", 1.0)}, clock, Settings(repeats=3, warm_seconds=0, state="settled"))
    timed = [entry for entry in clock.log if entry != "sync"][-15:]
    assert timed == ["flush", "spin", "mark", "a", "mark"] * 3


@pytest.mark.parametrize(("device_s", "issue_s", "ahead"), [(3.0, 1.0, True), (1.1, 1.0, False), (0.2, 1.0, False)])
def test_the_cost_of_a_case(monkeypatch: pytest.MonkeyPatch, device_s: float, issue_s: float, ahead: bool) -> None:
    """A device that works a call off after the calls before it, and tells so half a second late."""
    clock, now, free = Fake(), [0.0], [0.0]

    def run(lap: Callable[[], None]) -> None:
        now[0] += issue_s
        free[0] = max(free[0], now[0]) + device_s

    def synchronize() -> None:
        now[0] = max(now[0], free[0] + 0.5)

    monkeypatch.setattr(clock, "synchronize", synchronize)
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: now[0])
    cost = protocol._cost(Case(run), clock)
    assert cost == pytest.approx((issue_s, max(device_s, issue_s))) and cost.host_is_ahead == ahead


def test_calls_that_are_not_timed_can_be_told() -> None:
    clock, laps = Fake(), []
    measure({"a": Case(laps.append)}, clock, Settings(repeats=3, warm_seconds=0, state="settled", settle_seconds=1e-9))
    assert len([lap for lap in laps if lap is not untimed]) == 3 and untimed in laps


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
