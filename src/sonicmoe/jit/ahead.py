"""Compiling what a layer will need side by side, by other processes, while the layer's first call is on its way.

One worker imports the compiler and forks a child for each kernel, so many at once: importing takes longer than most
kernels do. The cache on disk is where the processes meet: whoever needs a kernel that a child has in hand waits for
its lock and loads what the child left. Nothing depends on them: without them, or without a cache on disk, each kernel
is compiled when it is first called.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
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
    """Have what of these is not in the cache on disk compiled by other processes. Returns at once.

    The first one missing is left to the caller, who is about to need it. None is asked for twice.
    """
    root = cache.folder()
    # Without an interpreter of its own, as in a frozen program, there is nothing to start.
    if root is None or jobs() == 0 or not sys.executable or hasattr(sys, "frozen") or not hasattr(os, "fork"):
        return
    new = [s for s in dict.fromkeys(specs) if s not in _asked and s.why_invalid() is None]
    _asked.update(new)
    missing = [s for s in new if not cache.path_of(s, root).exists()][1:]
    if missing:
        _start(missing)


def _start(specs: list[Spec]) -> None:
    try:
        worker = subprocess.Popen(
            [sys.executable, "-c", _RUN, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, which its children belong to
        )
        assert worker.stdin is not None
        with worker.stdin as pipe:
            pickle.dump((jobs(), specs), pipe)
    except OSError:
        return  # no process to be had: the kernels are compiled here
    _workers.append(worker)


@atexit.register
def _stop() -> None:
    for worker in _workers:
        if worker.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGTERM)
        worker.wait()
