"""A process that has specs compiled into the cache on disk; started by ahead.py, which pickles them to its input.

Run by its path, with the packages above its modules in name only: importing torch, which compiling does not need, would
take longer than a kernel. It imports the compiler and the kernels' sources, and a child forked from it compiles each
kernel: nothing of the compiler runs before the fork. What goes wrong is left to the process that needs the kernel: it
compiles it and says so.
"""

import importlib
import os
import pickle
import pkgutil
import sys
import types
from pathlib import Path


def main() -> None:
    package = Path(__file__).parent.parent
    for name, folder in (("sonicmoe", package), ("sonicmoe.jit", package / "jit")):
        module = types.ModuleType(name)
        module.__path__ = [str(folder)]
        sys.modules[name] = module
    sys.modules["torch"] = None  # type: ignore[assignment]  # the DSL takes that for absent
    jobs, specs = pickle.load(sys.stdin.buffer)

    import cutlass.cute  # noqa: F401

    from sonicmoe import cute_kernels
    from sonicmoe.jit import cache

    for found in pkgutil.walk_packages(cute_kernels.__path__, f"{cute_kernels.__name__}."):
        importlib.import_module(found.name)

    alive = 0
    for spec in specs:
        if alive == jobs:
            os.wait()
            alive -= 1
        if os.fork() == 0:
            try:
                cache.fill(spec)
            finally:
                os._exit(0)
        alive += 1
    for _ in range(alive):
        os.wait()


if __name__ == "__main__":
    main()
