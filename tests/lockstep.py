"""Runs functions as threads of which one runs at a time, so that code for the device can be run on the host.

Wherever a thread waits, the next one, or an event that nobody waits for (a copy that lands), is chosen at random: each
seed is another order in which things happen. If nothing can happen any more, that is a deadlock.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any


class Deadlock(AssertionError):
    pass


class _Abandoned(BaseException):
    """Ends the threads of a run that has failed."""


def _always() -> bool:
    return True


class _Thread:
    def __init__(self, number: int, body: Callable[[], Any]) -> None:
        self.number, self.body = number, body
        self.ready: Callable[[], bool] = _always
        self.result: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.turn = threading.Semaphore(0)


class Lockstep:
    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._threads: list[_Thread] = []
        self._events: list[tuple[Callable[[], bool], Callable[[], None]]] = []
        self._running: _Thread | None = None
        self._back = threading.Semaphore(0)
        self._abandoned = False

    @property
    def current(self) -> int:
        """The number of the thread that calls."""
        assert self._running is not None
        return self._running.number

    def wait(self, ready: Callable[[], bool] = _always) -> None:
        """Of a thread: let others run, and come back when `ready()`."""
        thread = self._running
        assert thread is not None
        thread.ready = ready
        self._back.release()
        thread.turn.acquire()
        if self._abandoned:
            raise _Abandoned

    def later(self, event: Callable[[], None], ready: Callable[[], bool] = _always) -> None:
        """Let `event` happen at any time when `ready()`."""
        self._events.append((ready, event))

    def run(self, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run all bodies and events to their ends; the bodies' results. Raises what a body raises, and Deadlock."""
        self._threads = [_Thread(i, body) for i, body in enumerate(bodies)]
        started = [threading.Thread(target=self._live, args=(t,), daemon=True) for t in self._threads]
        for s in started:
            s.start()
        try:
            while self._step():
                pass
        finally:
            self._abandoned = True
            for t in self._threads:
                t.turn.release()
            for s in started:
                s.join()
            self._abandoned, self._running = False, None
            self._events.clear()
        return [t.result for t in self._threads]

    def _live(self, thread: _Thread) -> None:
        thread.turn.acquire()
        try:
            if not self._abandoned:
                thread.result = thread.body()
        except _Abandoned:
            return
        except BaseException as error:
            thread.error = error
        thread.done = True
        self._back.release()

    def _step(self) -> bool:
        """Let one thing happen. Returns whether anything is left."""
        threads = [t for t in self._threads if not t.done]
        events = [e for e in self._events if e[0]()]
        able = [t for t in threads if t.ready()]
        if not threads and not self._events:
            return False
        if not able and not events:
            raise Deadlock(f"threads {[t.number for t in threads]} and {len(self._events)} events wait for ever")
        chosen = self._random.choice([*able, *events])
        if isinstance(chosen, _Thread):
            self._running = chosen
            chosen.turn.release()
            self._back.acquire()
            self._running = None
            if chosen.error is not None:
                raise chosen.error
        else:
            self._events.remove(chosen)
            chosen[1]()
        return True
