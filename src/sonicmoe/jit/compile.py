"""From a spec to a file that can be loaded, by the DSL. Needs neither a GPU nor a driver nor a CUDA toolkit.

The file is a shared library where a C compiler can link one: it is loaded without the DSL, whose import takes longer
than all kernels of a layer do. Elsewhere it is the DSL's object file.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import threading
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from sonicmoe.errors import InvalidArgument
from sonicmoe.jit.spec import Spec

ARCH = "sm_90a"
SYMBOL = "sonicmoe_kernel"
LIBRARY, OBJECT = ".so", ".o"
NOT_LINKED = (
    "sonicmoe's kernels load through the compiler, which takes seconds: there was no C compiler (cc, gcc or clang) "
    "that links when they were compiled; with one, empty the cache on disk"
)
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


def export(compiled: Any, folder: Path) -> Path:
    """Write a compiled function into a folder: a shared library, .so, if it can be linked, else an object file, .o."""
    object_file, library = (folder / f"kernel{suffix}" for suffix in (OBJECT, LIBRARY))
    with _compiling:
        compiled.export_to_c(str(object_file), function_name=SYMBOL)
    return library if _link(object_file, library) else object_file


def _link(object_file: Path, library: Path) -> bool:
    """Whether it could be done. The libraries that a kernel calls are found again where they are now."""
    from cutlass.cute.runtime import find_runtime_libraries

    called = [Path(path) for path in find_runtime_libraries(enable_tvm_ffi=True)]
    paths = [f"-Wl,-rpath,{folder}" for folder in dict.fromkeys(path.parent for path in called)]
    files = [str(file) for file in (library, object_file, *called)]
    linker = _linker()
    command = ["-shared", "-Wl,-Bsymbolic", "-o", *files, *paths]
    return linker is not None and subprocess.run([linker, *command], capture_output=True).returncode == 0


def load(path: Path) -> Any:
    """The function in a file of `export`."""
    if path.suffix == LIBRARY:
        import tvm_ffi

        return getattr(tvm_ffi.load_module(path.resolve()), SYMBOL)
    warnings.warn(NOT_LINKED, stacklevel=2)
    with _compiling:
        import cutlass.cute as cute

        return getattr(cute.runtime.load_module(str(path.resolve()), enable_tvm_ffi=True), SYMBOL)
