"""The cache of compiled kernels on disk: hits, misses, damage, and many processes at once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from sonicmoe.cute_kernels.aggregate import AggregateSpec
from sonicmoe.errors import InvalidArgument
from sonicmoe.jit import cache, compile, kernels

SPEC = AggregateSpec(64, "bf16", 2, weighted=True)


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with SPEC in it."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.VARIABLE, str(folder))
        cache.function_of(SPEC)
    return folder


@pytest.fixture
def folder(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the process's cache."""
    for file in filled.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The specs that are compiled in the test."""
    found: list[Any] = []
    original = compile.compile_spec

    def counted(spec: Any, options: str = "") -> Any:
        found.append(spec)
        return original(spec, options)

    monkeypatch.setattr(compile, "compile_spec", counted)
    return found


def _arguments() -> tuple[Any, ...]:
    scores, slots = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    rows = torch.zeros(4, 64, dtype=torch.bfloat16)
    return rows, scores, None, slots, None, rows[:2], None


def test_a_loaded_kernel_checks_its_arguments(folder: Path, compiled: list[Any]) -> None:
    function = cache.function_of(SPEC)
    assert compiled == []
    with pytest.raises(ValueError, match="rows: Tensor.*expected device_type=cuda"):
        function(*_arguments())


def _kernels(folder: Path) -> list[Path]:
    return [f for f in folder.iterdir() if f.suffix != ".lock"]


def test_one_file_per_kernel_named_by_its_spec(folder: Path) -> None:
    (file,) = _kernels(folder)
    assert file in cache.forms(cache.path_of(SPEC, folder)) and file.name.startswith("aggregate_sm_90a-")
    assert cache.path_of(AggregateSpec(72, "bf16", 2, weighted=True), folder) != file


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "gone"])
def test_a_damaged_file_is_a_miss_and_is_replaced(folder: Path, compiled: list[Any], damage: str) -> None:
    (path,) = _kernels(folder)
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": whole[:middle], "flipped": flipped}[damage])
    cache.function_of(SPEC)
    assert compiled == [SPEC]
    cache.function_of(SPEC)
    assert compiled == [SPEC]
    assert _kernels(folder) == [path], "no part is left behind"


def test_other_sources_or_versions_are_other_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cache.path_of(SPEC, folder)
    cache.fingerprint.cache_clear()
    monkeypatch.setattr(cache, "_installed", lambda distribution: "another")
    try:
        assert cache.path_of(SPEC, folder) != before
    finally:
        monkeypatch.undo()
        cache.fingerprint.cache_clear()
    assert cache.path_of(SPEC, folder) == before


def test_without_a_folder_or_where_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Any]
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    assert cache.folder() is None
    cache.function_of(SPEC)
    assert compiled == [SPEC]
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="without its cache on disk"):
        cache.function_of(SPEC)
    assert compiled == [SPEC, SPEC]


def test_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "sonicmoe"
    monkeypatch.setenv(cache.VARIABLE, "~/elsewhere")
    assert cache.folder() == Path.home() / "elsewhere"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.fspath(path))  # as it does then
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.folder() is None
    monkeypatch.setenv(cache.VARIABLE, "/somewhere")
    assert cache.folder() == Path("/somewhere")


def test_a_folder_that_may_not_be_searched_has_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(path)

    monkeypatch.setattr(Path, "exists", refuse)
    assert not cache.is_there(SPEC, tmp_path)


def _start(folder: str, counter: str, barrier: Any) -> None:
    """A rank: wait for the others, then ask for the kernel, and note if it was this rank that compiled it."""
    os.environ[cache.VARIABLE] = folder
    original = compile.compile_spec

    def noted(spec: Any, options: str = "") -> Any:
        Path(counter, str(os.getpid())).touch()
        time.sleep(0.2)
        return original(spec, options)

    compile.compile_spec = noted
    barrier.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.function_of(SPEC)


def test_of_many_ranks_that_start_at_once_one_compiles(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ranks, counter = 4, tmp_path / "compiled"
    counter.mkdir()
    barrier = context.Barrier(ranks)
    arguments = (str(tmp_path / "cache"), str(counter), barrier)
    processes = [context.Process(target=_start, args=arguments) for _ in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    assert len(list(counter.iterdir())) == 1


def test_a_lock_whose_holder_died_is_free(folder: Path, compiled: list[Any]) -> None:
    (path,) = _kernels(folder)
    path.unlink()
    path.with_suffix(".lock").write_text("")
    cache.function_of(SPEC)
    assert compiled == [SPEC] and path.exists()


def test_in_memory_a_kernel_is_made_once_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    device = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device[0])
    monkeypatch.setattr(cache, "function_of", lambda spec: made.append(spec) or (lambda *arguments: None))
    monkeypatch.setattr(kernels, "_functions", {})
    first = kernels.kernel(SPEC)
    assert kernels.kernel(AggregateSpec(64, "bf16", 2, weighted=True)) is first and made == [SPEC]
    device[0] = 1
    assert kernels.kernel(SPEC) is not first
    kernels.launch(SPEC, 1, 2)
    assert len(made) == 2


def test_an_invalid_spec_leaves_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    with pytest.raises(InvalidArgument, match="width = 12"):
        cache.function_of(AggregateSpec(12, "bf16", 2, weighted=True))
    assert sorted(folder.iterdir()) == before


_LOADS = """
import sys
from sonicmoe.jit import cache
from sonicmoe.cute_kernels.aggregate import AggregateSpec
cache.function_of(AggregateSpec(64, "bf16", 2, weighted=True))
print("cutlass" in sys.modules)
"""


@pytest.mark.skipif(compile._linker() is None, reason="needs a C compiler")
def test_a_linked_kernel_is_loaded_without_the_compiler(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _LOADS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"] and done.stderr == ""


@pytest.mark.parametrize("linker", [None, "false"])
def test_what_cannot_be_linked_is_kept_as_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Any], linker: str | None
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setattr(compile, "_linker", lambda: linker)
    for _ in range(2):
        with pytest.warns(UserWarning, match="load through the compiler"):
            function = cache.function_of(SPEC)
    assert compiled == [SPEC] and [f.suffix for f in _kernels(tmp_path)] == [".o"]
    with pytest.raises(ValueError, match="rows: Tensor.*expected device_type=cuda"):
        function(*_arguments())


def test_a_linked_kernel_goes_before_an_object(folder: Path) -> None:
    path = cache.path_of(SPEC, folder)
    library, object_file = cache.forms(path)
    whole = _kernels(folder)[0].read_bytes()
    for form in (library, object_file):
        form.write_bytes(whole)
    assert cache._intact(path) == library and cache.is_there(SPEC, folder)
    library.write_bytes(b"damaged")
    assert cache._intact(path) == object_file


def test_a_library_that_cannot_be_loaded_costs_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, compiled: list[Any]
) -> None:
    """As from a folder that nothing may be run from, or linked against a newer C library."""
    path = cache.path_of(SPEC, folder)
    content = b"no library"
    path.write_bytes(content + cache._DIGEST(content).digest())
    with pytest.warns(UserWarning, match="without its cache on disk"):
        cache.function_of(SPEC)
    assert compiled == [SPEC]
