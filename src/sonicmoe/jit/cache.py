"""Compiled kernels on disk, shared by processes.

One file per kernel, named by its spec's name and a hash of spec and fingerprint: sources of the kernels, versions and
place of the compiler, version of the interpreter. A digest follows the kernel's bytes, where no reader of ELF looks; a
file whose digest is wrong is a miss. Writers take a lock per kernel and rename into place, so of many ranks that start
at once one compiles and the others load, and nobody reads half a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from sonicmoe.jit import compile as compiler
from sonicmoe.jit.spec import Spec

try:
    import fcntl
except ImportError:  # elsewhere than on POSIX: ranks may compile the same kernel twice
    fcntl = None  # type: ignore[assignment]

VARIABLE = "SONICMOE_CACHE_DIR"
_PACKAGE = Path(__file__).parent.parent
_SOURCES = ("cute_kernels", "configs", "activations.py", "jit/compile.py")
_DISTRIBUTIONS = (
    "nvidia-cutlass-dsl",
    "nvidia-cutlass-dsl-libs-core",
    "nvidia-cutlass-dsl-libs-cu12",
    "nvidia-cutlass-dsl-libs-cu13",
    "apache-tvm-ffi",
)
_DIGEST = hashlib.sha256


def folder() -> Path | None:
    """SONICMOE_CACHE_DIR, else the user's cache folder; None, no cache on disk, if the variable is empty or the user
    has no home."""
    given = os.environ.get(VARIABLE)
    if given == "":
        return None
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "sonicmoe"
    expanded = os.path.expanduser(given or usual)
    return None if expanded.startswith("~") else Path(expanded)


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """A hash of all that decides what a spec is compiled to."""
    digest = _DIGEST()
    for source in _SOURCES:
        path = _PACKAGE / source
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(_PACKAGE).as_posix()}\0".encode())
            digest.update(file.read_bytes())
    for distribution in _DISTRIBUTIONS:
        digest.update(f"{distribution}={_installed(distribution)}\0".encode())
    digest.update(f"{platform.python_version()} {platform.machine()} {compiler.ARCH}".encode())
    return digest.hexdigest()


def _installed(distribution: str) -> str:
    """Version and place of an installed package: a linked kernel finds the libraries that it needs where they were."""
    try:
        found = importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"{found.version} {Path(str(found.locate_file(''))).resolve()}"


def path_of(spec: Spec, root: Path) -> Path:
    key = _DIGEST(f"{fingerprint()} {spec!r}".encode()).hexdigest()[:32]
    return root / f"{spec.name}-{key}{compiler.LIBRARY}"


def forms(path: Path) -> tuple[Path, Path]:
    """The files that a kernel may be in: the library, and the object that there is where none could be linked."""
    return path, path.with_suffix(compiler.OBJECT)


def is_there(spec: Spec, root: Path) -> bool:
    """Whether a kernel is in the cache; not whether it is intact. In a folder that may not be searched, none is."""
    with contextlib.suppress(OSError):
        return any(form.exists() for form in forms(path_of(spec, root)))
    return False


def function_of(spec: Spec) -> Any:
    """The kernel's function, from disk if it is there, else compiled and left there."""
    compiler.check(spec)
    root = folder()
    if root is None:
        return compiler.compile_spec(spec)
    path = path_of(spec, root)
    try:
        found = _intact(path) or _made(spec, path)
    except OSError as error:
        return _by_itself(spec, root, error)
    try:
        return compiler.load(found)
    except (OSError, RuntimeError) as error:  # a folder that nothing may be run from, another machine's C library
        return _by_itself(spec, root, error)


def _made(spec: Spec, path: Path) -> Path:
    """The form that another process has left by now, or that this one writes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        return _intact(path) or _write(compiler.compile_spec(spec), path)


def _by_itself(spec: Spec, root: Path, error: Exception) -> Any:
    warnings.warn(f"sonicmoe compiles without its cache on disk, {root}: {error}", stacklevel=4)
    return compiler.compile_spec(spec)


def fill(spec: Spec) -> None:
    """Compile a spec into the cache, unless it is there or another process is at it."""
    root = folder()
    if root is None or spec.why_invalid():
        return
    path = path_of(spec, root)
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(BlockingIOError), _locked(path.with_suffix(".lock"), wait=False):
        if not _intact(path):
            _write(compiler.compile_spec(spec), path)


def _write(compiled: Any, path: Path) -> Path:
    """Kernel and digest, under another name first. Returns the form that it has."""
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        part = compiler.export(compiled, Path(folder))
        with part.open("ab") as file:
            file.write(_DIGEST(part.read_bytes()).digest())
        part.chmod(0o644)
        return part.replace(path.with_suffix(part.suffix))


def _intact(path: Path) -> Path | None:
    """The first form whose digest is right."""
    size = _DIGEST().digest_size
    for form in forms(path):
        with contextlib.suppress(OSError):
            content = form.read_bytes()
            if len(content) > size and _DIGEST(content[:-size]).digest() == content[-size:]:
                return form
    return None


@contextlib.contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time; BlockingIOError if another has it and not to wait. A holder that dies lets it go."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
