"""From a spec to a file that can be loaded, by the DSL. Needs neither a GPU nor a driver nor a CUDA toolkit.

Where there is a C compiler the file is a shared library, which is loaded without the DSL, whose import takes longer
than all kernels of a layer do; elsewhere it is the DSL's object file.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
from functools import lru_cache
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


@lru_cache(maxsize=1)
def _linker() -> str | None:
    """The C compiler, if there is one."""
    return next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)


def suffix() -> str:
    """Of the files that `export` writes."""
    return ".so" if _linker() else ".o"


def export(compiled: Any, path: Path) -> None:
    """Write a compiled function as a file of `suffix`. Raises OSError."""
    with _compiling, tempfile.TemporaryDirectory() as folder:
        object_file = Path(folder, "kernel.o")
        compiled.export_to_c(str(object_file), function_name=SYMBOL)
        if path.suffix == ".so":
            _link(object_file, path)
        else:
            shutil.move(object_file, path)


def _link(object_file: Path, path: Path) -> None:
    """The libraries that the kernel calls are found again where they are now."""
    from cutlass.cute.runtime import find_runtime_libraries

    libraries = [Path(library) for library in find_runtime_libraries(enable_tvm_ffi=True)]
    paths = [f"-Wl,-rpath,{folder}" for folder in dict.fromkeys(library.parent for library in libraries)]
    files = [str(file) for file in (path, object_file, *libraries)]
    command = [str(_linker()), "-shared", "-Wl,-Bsymbolic", "-o", *files, *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{_linker()} cannot link a kernel: {done.stderr.strip()[-500:]}")


def load(path: Path) -> Any:
    """The function in a file of `export`."""
    with _compiling:
        if path.suffix == ".so":
            import tvm_ffi

            return getattr(tvm_ffi.load_module(path.resolve()), SYMBOL)
        import cutlass.cute as cute

        return getattr(cute.runtime.load_module(str(path.resolve()), enable_tvm_ffi=True), SYMBOL)
