"""Kernels by their specs: compiled at first use, kept in memory and on disk, launched on torch's current stream.

A spec is a frozen dataclass of `cute_kernels`: `name`, `why_invalid()` and `build()`. It holds all that a kernel is
compiled for, and no number of tokens or rows, so that neither these nor the routing ever compile anything.
"""

from sonicmoe.jit.kernels import kernel, launch
from sonicmoe.jit.spec import Spec

__all__ = ["Spec", "kernel", "launch"]
