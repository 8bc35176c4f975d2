"""Kernels of several source trees: each compiles its own, and a measurement launches the one that it was given."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass")
from perf import environment, layers, versus
from perf.problem import Form
from perf.protocol import Case, Settings
from perf.shapes import Shape
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


def test_each_tree_says_whether_its_kernel_takes_a_counter(trees: tuple[Path, Path]) -> None:
    long = Shape("long", 64, 4096, 64, 4, 2)
    file = trees[1] / "src" / "sonicmoe" / "cute_kernels" / "variants.py"
    file.write_text(file.read_text().replace("PACED_K = 4096", "PACED_K = 7168"))
    specs = list(versus.gemms(long, FORM, ["up_proj"]).values())
    built = [versus.compile_tree(tree, specs, "h200", jobs=1)[0] for tree in trees]
    assert [b.paced for b in built] == [True, False]


def test_what_cannot_be_compiled_is_told(trees: tuple[Path, Path], tmp_path: Path) -> None:
    odd = Shape("odd", 64, 60, 64, 4, 2)
    ((file, reason, _),) = versus.compile_tree(trees[0], list(versus.gemms(odd, FORM, ["down_proj"]).values()), "", 1)
    assert file is None and "multiples of 8" in reason
    with pytest.raises(RuntimeError, match="nothing"):
        empty = tmp_path / "nothing"
        (empty / "src" / "sonicmoe").mkdir(parents=True)
        (empty / "src" / "sonicmoe" / "__init__.py").touch()
        versus.compile_tree(empty, [], "", 1)


def test_shares_and_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tree whose kernel leaves zeros: on a CPU each `kernel` says by which body the op is computed."""

    def by(kernels: Any, call: Any) -> Any:
        (kernel,) = kernels.values()
        return lambda: kernel(call())

    monkeypatch.setattr(versus, "by", by)
    right, zeros = (lambda out: out), (lambda out: tuple(torch.zeros_like(t) for t in out))
    found: dict[str, Any] = {name: {"a": right, "b": zeros} for name in ("down_proj", "up_wgrad")}
    lines = versus.compare(SHAPE, FORM, found, Settings(2, 0.0))
    assert [line[0] for line in lines] == ["small down_proj", "small up_wgrad"]
    assert all(line[2].endswith("%") and line[3] == "WRONG" for line in lines)
    assert [versus.is_wrong(line) for line in lines] == [True, True]


def test_a_layer_runs_by_each_trees_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose turn it is says what is in the place of the layer's own kernels, as a launch would find it."""
    launched: list[dict[str, Any]] = []
    training = layers.training

    def noting(*arguments: Any) -> Case:
        case = training(*arguments)

        def run(lap: Any) -> Any:
            launched.append(dict(_gemm._replaced))
            return case.run(lap)

        return Case(run, case.laps)

    monkeypatch.setattr(layers, "training", noting)
    found: dict[str, Any] = {
        name: {"a": (f"{name} of a", False), "b": (f"{name} of b", True)} for name in ("up_proj", "down_dgrad")
    }
    lines = versus.compare_layers(SHAPE, FORM, found, Settings(2, 0.0))
    assert [line[0] for line in lines] == ["small layer forward", "small layer backward", "small layer total"]
    assert all(cell.endswith("%") for line in lines for cell in line[2:]) and {len(line) for line in lines} == {4}
    turns = [launched.count({name: of[tree] for name, of in found.items()}) for tree in "ab"]
    assert min(turns) >= 3 and sum(turns) == len(launched) and not _gemm._replaced


def test_bad_options_are_told_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(versus, "run", lambda a: pytest.fail("it compiles"))
    tree = str(environment.ROOT)
    for options, said in (
        ([tree], "GPU: got none"),
        ([tree, "--shape", "nosuch"], "shape: got 'nosuch'"),
        ([tree, "--thiek", "1,2"], "thiek: got '1,2'"),
        ([tree, "--repeats", "0"], "--repeats: got 0"),
        ([tree, str(tmp_path)], f"tree: got '{tmp_path}'"),
    ):
        with pytest.raises(SystemExit) as stopped:
            versus.main(options)
        assert stopped.value.code == 2 and said in capsys.readouterr().err.splitlines()[-1], options
