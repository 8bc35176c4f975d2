"""Compiling what a layer will need side by side, by other processes, while the layer's first call is on its way.

One worker imports the compiler and forks a child for each kernel, so many at once: importing takes longer than most
kernels do. The caller, who would import it at the same time and slow both down, waits for the worker and loads what its
children leave in the cache on disk. Nothing depends on them: without them, without a cache on disk, or when a worker
ends without a kernel, the kernel is compiled when it is first called.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

from sonicmoe.jit import cache
from sonicmoe.jit.spec import Spec

VARIABLE = "SONICMOE_COMPILE_JOBS"
MOST_JOBS = 12
_WORKER = Path(__file__).parent / "worker.py"
# Unlike python PATH this leaves the file's folder out of sys.path, where our inspect.py would hide Python's.
RUN_BY_PATH = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='__main__')"
_POLL, _PATIENCE = 0.002, 300  # seconds
_workers: list[subprocess.Popen[bytes]] = []
# What has been asked for, and the worker that compiles it; None for what was there or is left to the caller.
_asked: dict[Spec, subprocess.Popen[bytes] | None] = {}


def jobs() -> int:
    """SONICMOE_COMPILE_JOBS, else half of the processors; 0: no processes are started."""
    given = os.environ.get(VARIABLE, "")
    return int(given) if given.isdigit() else min(MOST_JOBS, (os.cpu_count() or 1) // 2)


def compile_ahead(specs: Iterable[Spec]) -> None:
    """Have what of these is not in the cache on disk compiled by other processes. Returns at once.

    A single one is left to the caller. None is asked for twice.
    """
    root = cache.folder()
    # Without an interpreter of its own, as in a frozen program, there is nothing to start.
    if root is None or jobs() == 0 or not sys.executable or hasattr(sys, "frozen") or not hasattr(os, "fork"):
        return
    new = [s for s in dict.fromkeys(specs) if s not in _asked and s.why_invalid() is None]
    missing = [s for s in new if not cache.is_there(s, root)]
    _asked.update(dict.fromkeys(new))
    if len(missing) > 1 and (worker := _start(missing)):
        _asked.update(dict.fromkeys(missing, worker))


def await_worker(spec: Spec) -> None:
    """Wait until a kernel is in the cache or nobody is compiling it any more; not for ever."""
    worker, root = _asked.get(spec), cache.folder()
    if worker is None or root is None:
        return
    until = time.monotonic() + _PATIENCE
    while worker.poll() is None and not cache.is_there(spec, root):
        if time.monotonic() > until:
            warnings.warn(f"sonicmoe compiles {spec.name} itself: process {worker.pid} takes too long", stacklevel=2)
            _asked.update({s: None for s, by in list(_asked.items()) if by is worker})  # once for all of its kernels
            return
        time.sleep(_POLL)


def _start(specs: list[Spec]) -> subprocess.Popen[bytes] | None:
    try:
        worker = subprocess.Popen(
            [sys.executable, "-c", RUN_BY_PATH, str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own, which its children belong to
        )
        assert worker.stdin is not None
        with worker.stdin as pipe:
            pickle.dump((jobs(), specs), pipe)
    except OSError:
        return None  # no process to be had: the kernels are compiled here
    _workers.append(worker)
    return worker


@atexit.register
def _stop() -> None:
    for worker in _workers:
        if worker.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGTERM)
        worker.wait()
