"""From a spec to an object file, by the DSL. Needs neither a GPU nor a driver nor a CUDA toolkit."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

from sonicmoe.errors import InvalidArgument
from sonicmoe.jit.spec import Spec

ARCH = "sm_90a"
SYMBOL = "sonicmoe_kernel"
_OPTIONS = f"--enable-tvm-ffi --gpu-arch {ARCH}"
# The DSL traces in module-wide state, and backward passes come from threads of their own.
_compiling = threading.Lock()


def check(spec: Spec) -> None:
    """Raise InvalidArgument unless the spec can be compiled."""
    reason = spec.why_invalid()
    if reason:
        raise InvalidArgument(spec.name, spec, reason)


def compile_spec(spec: Spec, options: str = "") -> Any:
    """The DSL's compiled function, whose calls take the current stream from torch."""
    check(spec)
    with _compiling:
        import cutlass.cute as cute
        from cutlass.cute.runtime import make_fake_stream

        function, arguments = spec.build()
        stream = make_fake_stream(use_tvm_ffi_env_stream=True)
        return cute.compile(function, *arguments, stream, options=f"{_OPTIONS} {options}")


def compile_for_inspection(spec: Spec) -> Any:
    """Likewise, with the machine code in `artifacts.CUBIN`."""
    with tempfile.TemporaryDirectory() as folder:
        return compile_spec(spec, f"--keep-cubin --keep-ptx --dump-dir={folder}")


def export(compiled: Any, path: Path) -> None:
    """Write the object file of a compiled function."""
    with _compiling:
        compiled.export_to_c(str(path), function_name=SYMBOL)


def load(path: Path) -> Any:
    """The function in an object file of `export`."""
    with _compiling:
        import cutlass.cute as cute

        return getattr(cute.runtime.load_module(str(path.resolve()), enable_tvm_ffi=True), SYMBOL)
