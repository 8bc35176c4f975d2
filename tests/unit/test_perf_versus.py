"""Kernels of several source trees: each compiles its own, and a measurement launches the one that it was given."""

from __future__ import annotations

import contextlib
import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass")
from perf import environment, versus
from perf.problem import Form
from perf.protocol import Settings
from perf.shapes import Shape
from sonicmoe.configs.choice import candidates
from sonicmoe.jit import cache, compile
from sonicmoe.ops import _gemm

SHAPE = Shape("small", 64, 64, 64, 4, 2)
FORM = Form(device="cpu", backend="torch")


@pytest.fixture
def trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """This tree, and a copy whose kernels have other sources; a cache for both."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    other = tmp_path / "other"
    shutil.copytree(environment.ROOT / "src", other / "src", ignore=shutil.ignore_patterns("__pycache__"))
    file = other / "src" / "sonicmoe" / "cute_kernels" / "grouped_gemm.py"
    file.write_text(file.read_text() + "\n# another kernel\n")
    return environment.ROOT, other


def test_each_tree_compiles_its_own(trees: tuple[Path, Path]) -> None:
    specs = list(versus.gemms(SHAPE, FORM, ["down_proj"]).values())
    files = []
    for tree in trees:
        ((file, tile, paced),) = versus.compile_tree(tree, specs, "h200", jobs=1)
        assert file is not None and "pingpong" in tile and not paced
        files.append(Path(file))
        with pytest.raises(ValueError, match="device_type=cuda"):
            a, b, out = (torch.zeros(*s, dtype=torch.bfloat16) for s in ((8, 64), (4, 64, 64), (8, 64)))
            compile.load(files[-1])((a,), (b,), (out, None), torch.zeros(5, dtype=torch.int32), None, 1)
    assert files[0] != files[1] and all(f.exists() for f in files)


def test_each_kernel_gets_the_counter_that_it_takes(trees: tuple[Path, Path]) -> None:
    long = Shape("long", 64, 2560, 64, 4, 2)
    file = trees[1] / "src" / "sonicmoe" / "cute_kernels" / "variants.py"
    file.write_text(file.read_text().replace("PACED_K = 2560", "PACED_K = 4096"))
    specs = list(versus.gemms(long, FORM, ["up_proj"]).values())
    built = [versus.compile_tree(tree, specs, "h200", jobs=1)[0] for tree in trees]
    assert [b.paced for b in built] == [True, False]
    given: list[Any] = []
    for b in built:
        versus.with_counter(lambda *arguments: given.append(arguments), b.paced)(
            (), (), (), torch.ones(5, dtype=torch.int32), "this tree's", 132
        )
    assert given[0][4].tolist() == [0] and given[0][4].dtype == torch.int32 and given[1][4] is None
    assert all(arguments[5] == 132 for arguments in given)


def test_what_cannot_be_compiled_is_told(trees: tuple[Path, Path], tmp_path: Path) -> None:
    odd = Shape("odd", 64, 60, 64, 4, 2)
    ((file, reason, _),) = versus.compile_tree(trees[0], list(versus.gemms(odd, FORM, ["down_proj"]).values()), "", 1)
    assert file is None and "multiples of 8" in reason
    with pytest.raises(RuntimeError, match="nothing"):
        empty = tmp_path / "nothing"
        (empty / "src" / "sonicmoe").mkdir(parents=True)
        (empty / "src" / "sonicmoe" / "__init__.py").touch()
        versus.compile_tree(empty, [], "", 1)


@pytest.fixture
def own_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that find nothing, and leave nothing behind, on a GPU that nothing was tuned for."""
    for name, value in (("_spec", _gemm._spec), ("_kernel", _gemm._kernel)):
        monkeypatch.setattr(_gemm, name, functools.cache(value.__wrapped__))
    monkeypatch.setattr(_gemm, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")


def test_a_replaced_kernel_is_launched(own_caches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    monkeypatch.setattr(_gemm.jit, "kernel", lambda spec: lambda *_: launched.append(f"own {spec.variant}"))
    b, cu_rows = torch.empty(0).bfloat16(), torch.zeros(5, dtype=torch.int32)
    with _gemm.replaced("down_proj", lambda *_: launched.append("another")):
        for variant in ("down_proj", "up_dgrad"):
            _gemm.launch(variant, (), b, (), cu_rows, 64, 64)
    _gemm.launch("down_proj", (), b, (), cu_rows, 64, 64)
    assert launched == ["another", "own up_dgrad", "own down_proj"]


def test_a_forced_configuration_is_launched(own_caches: None) -> None:
    launched: list[Any] = []
    b, cu_rows = torch.empty(0).bfloat16(), torch.zeros(5, dtype=torch.int32)
    first, other = candidates("down_proj", 4, 256, 1)[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gemm.jit, "kernel", lambda spec: lambda *_: launched.append(spec.tile))
        for tile in (other, first, None, other):
            with contextlib.nullcontext() if tile is None else _gemm.forced("down_proj", tile):
                _gemm.launch("down_proj", (), b, (), cu_rows, 256, 64)
                assert _gemm.spec_of(None, "down_proj", 4, 256, 64, "bf16").tile == launched[-1]
    assert launched == [other, first, first, other]


def test_shares_and_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tree whose kernel leaves zeros: on a CPU each `kernel` says by which body the op is computed."""

    def by(kernel: Any, variant: str, call: Any) -> Any:
        return lambda: kernel(call())

    monkeypatch.setattr(versus, "by", by)
    right, zeros = (lambda out: out), (lambda out: tuple(torch.zeros_like(t) for t in out))
    found = {name: {"a": right, "b": zeros} for name in ("down_proj", "up_wgrad")}
    lines = versus.compare(SHAPE, FORM, found, Settings(2, 0.0))
    assert [line[0] for line in lines] == ["small down_proj", "small up_wgrad"]
    assert all(line[2].endswith("%") and line[3] == "WRONG" for line in lines)
