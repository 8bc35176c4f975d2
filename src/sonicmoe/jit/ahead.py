"""Compiling what a layer will need side by side, by other processes, while the layer's first call is on its way.

The cache on disk is where the processes meet: whoever needs a kernel that a worker has in hand waits for its lock and
loads what the worker left. Nothing depends on the workers: without them, or without a cache on disk, each kernel is
compiled when it is first called.
"""

from __future__ import annotations

import atexit
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from sonicmoe.jit import cache
from sonicmoe.jit.spec import Spec

VARIABLE = "SONICMOE_COMPILE_JOBS"
MOST_JOBS = 12
_WORKER = Path(__file__).parent / "worker.py"
# Unlike python PATH this leaves the file's folder out of sys.path, where our inspect.py would hide Python's.
_RUN = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
_workers: list[subprocess.Popen[bytes]] = []
_asked: set[Spec] = set()


def jobs() -> int:
    """SONICMOE_COMPILE_JOBS, else half of the processors; 0: no processes are started."""
    given = os.environ.get(VARIABLE, "")
    return int(given) if given.isdigit() else min(MOST_JOBS, (os.cpu_count() or 1) // 2)


def compile_ahead(specs: Iterable[Spec]) -> None:
    """Start processes that compile what of these is not in the cache on disk. Returns at once.

    The first one missing is left to the caller, who is about to need it. None is asked for twice.
    """
    root = cache.folder()
    # Without an interpreter of its own, as in a frozen program, there is nothing to start.
    if root is None or jobs() == 0 or not sys.executable or hasattr(sys, "frozen"):
        return
    new = [s for s in dict.fromkeys(specs) if s not in _asked and s.why_invalid() is None]
    _asked.update(new)
    missing = [s for s in new if not cache.path_of(s, root).exists()][1:]
    workers = min(jobs(), len(missing))
    for first in range(workers):
        _start(missing[first::workers])


def _start(specs: list[Spec]) -> None:
    try:
        worker = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert worker.stdin is not None
        with worker.stdin as pipe:
            pickle.dump(specs, pipe)
    except OSError:
        return  # no process to be had: the kernels are compiled here
    _workers.append(worker)


@atexit.register
def _stop() -> None:
    for worker in _workers:
        if worker.poll() is None:
            worker.terminate()
        worker.wait()
