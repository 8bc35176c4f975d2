"""Whether CTAs at one pace stay together: the kernels' own `keep`, run by threads of different speeds on the host."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from as_written import as_written
from lockstep import Lockstep

pytest.importorskip("cutlass")
from sonicmoe.cute_kernels import pace
from sonicmoe.cute_kernels.pace import FAR, LEAD, TICK, Paced

KEEP = as_written(Paced.keep)
REST = 40  # turns of others


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`device(ctas, add, read, sleep)`: what the module does on it from then on."""
    monkeypatch.setattr(Paced, "keep", KEEP)
    monkeypatch.setattr(pace, "Int32", int)

    def on(ctas: int, add: Any, read: Any, sleep: Any) -> None:
        arch = SimpleNamespace(elect_one=nullcontext, grid_dim=lambda: (ctas, 1, 1))
        stand_ins = {"cute": SimpleNamespace(arch=arch), "add_count": add, "read_relaxed": read, "sleep": sleep}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(pace, name, stand_in)

    return on


def run(device: Any, speeds: Sequence[int], turns: int, form: Paced) -> tuple[float, list[int]]:
    """(most steps that a CTA was ever ahead of the mean, rests of each). speeds: the time of each CTA for a step."""
    lockstep, ctas = Lockstep(), len(speeds)
    counted, rests, steps, ahead = [0] * ctas, [0] * ctas, [0] * ctas, [0.0]

    def add(address: int, value: int) -> None:
        counted[lockstep.current] += value

    def sleep(nanoseconds: int) -> None:
        rests[lockstep.current] += 1
        for _ in range(REST):
            lockstep.wait()

    device(ctas, add, lambda address: sum(counted), sleep)
    counter: Any = SimpleNamespace(iterator=SimpleNamespace(toint=lambda: 0))

    def body() -> None:
        me, seen, keep = lockstep.current, 0, form.open(counter)
        turn = me
        while turn < turns:
            for k in range(form.k_steps):
                seen = keep(k, steps[me], seen)
                steps[me] += 1
                ahead[0] = max(ahead[0], steps[me] - sum(steps) / ctas)
                for _ in range(speeds[me]):
                    lockstep.wait()
            steps[me] += form.ring_steps
            turn += ctas
        form.leave(counter, turn, turns)

    lockstep.run([body] * ctas)
    assert counted == [-(-turns // ctas) * (form.k_steps + form.ring_steps)] * ctas
    return ahead[0], rests


@pytest.mark.parametrize(("turns", "k_steps", "ring_steps"), [(1200, 1, 0), (180, TICK, 2), (60, 3 * TICK + 1, 4)])
def test_no_cta_is_far_ahead_of_the_mean(
    device: Any, monkeypatch: pytest.MonkeyPatch, turns: int, k_steps: int, ring_steps: int
) -> None:
    """As the fast ones would be, if they did not rest. The slow one never does."""
    form, speeds, most = Paced(k_steps, ring_steps), (1, 1, 2), LEAD + 2 * TICK + ring_steps
    ahead, rests = run(device, speeds, turns, form)
    assert ahead <= most and rests[0] and rests[1] and not rests[2]
    monkeypatch.setattr(pace, "LEAD", FAR)
    ahead, rests = run(device, speeds, turns, form)
    assert ahead > most and not any(rests)


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_nobody_rests_for_ctas_without_a_tile(device: Any, turns: int) -> None:
    """As these count the round at once, the others are never ahead of the mean."""
    _, rests = run(device, (1,) * 6, turns, Paced(20 * TICK, 3))
    assert not any(rests)


@pytest.mark.parametrize(("ahead", "rests"), [(-50, 0), (LEAD, 0), (LEAD + 1, 1), (FAR - 1, 1), (FAR, 0), (10**6, 0)])
def test_a_cta_rests_where_the_mean_says_something(device: Any, ahead: int, rests: int) -> None:
    """Not where others do not run, of which it would come to be as far ahead as can be. And only at a tick."""
    ctas, step, taken = 5, 1000, []
    device(ctas, lambda *_: None, lambda address: 77, taken.append)
    form, seen = Paced(64, 0), (step - ahead) * ctas
    assert KEEP(form, 0, TICK + 1, step, seen) == seen and not taken
    assert KEEP(form, 0, TICK, step, seen) == 77 and len(taken) == rests
