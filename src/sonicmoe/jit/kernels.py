"""The kernels of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from sonicmoe.jit import ahead, cache
from sonicmoe.jit.spec import Spec

_functions: dict[tuple[Spec, int], Callable[..., None]] = {}
_loading = threading.Lock()


def kernel(spec: Spec) -> Callable[..., None]:
    """The kernel of a spec on torch's current device, compiled if it is nowhere yet. Raises InvalidArgument.

    Its calls take the tensors that the spec names, check them, and launch on torch's current stream; they never wait.
    """
    key = (spec, torch.cuda.current_device())
    function = _functions.get(key)
    if function is None:
        with _loading:
            if key not in _functions:
                ahead.await_worker(spec)
                _functions[key] = cache.function_of(spec)
            function = _functions[key]
    return function


def launch(spec: Spec, *arguments: Any) -> None:
    """Call the kernel of a spec."""
    kernel(spec)(*arguments)
