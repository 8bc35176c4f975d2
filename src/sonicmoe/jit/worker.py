"""A process that compiles specs into the cache on disk; started by ahead.py, which pickles them to its input.

Run by its path, with the packages above its modules in name only: importing torch, which compiling does not need, would
take longer than a kernel. What goes wrong is left to the process that needs the kernel: it compiles it and says so.
"""

import pickle
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
    from sonicmoe.jit import cache

    for spec in pickle.load(sys.stdin.buffer):
        cache.fill(spec)


if __name__ == "__main__":
    main()
