"""The tuner: what it times, what it takes, and that the table it writes is the one that is looked up."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from perf import commandline, kernels, tune
from perf.problem import Form
from perf.protocol import HostClock, Settings, Times
from perf.roofline import GEMMS
from perf.shapes import SHAPES, parse_thiek
from perf.tune import Candidate
from sonicmoe import ops
from sonicmoe.configs import choice
from sonicmoe.configs.tile import TileConfig
from sonicmoe.ops import _gemm

SHAPE = parse_thiek("70,64,32,8,2")
CPU = Form(device="cpu", backend="torch")


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_specs_are_those_that_the_ops_launch(activation: str, gemm_launches: list[tuple[Any, tuple[Any, ...]]]) -> None:
    form = dataclasses.replace(CPU, activation=activation, backend="cute")
    # The inputs are made by the torch backend: nothing is launched here.
    i = kernels.inputs(SHAPE, dataclasses.replace(form, backend="torch"), "topk")._replace(form=form)
    by_name, specs = tune.calls(i), tune.specs(SHAPE, form)
    assert set(by_name) == set(specs) == {*GEMMS, tune.INFERENCE}
    for name, call in by_name.items():
        gemm_launches.clear()
        call()
        assert [spec for spec, _ in gemm_launches] == [specs[name]], name


def test_the_fastest_is_taken_but_not_for_noise() -> None:
    spec = tune.specs(SHAPE, CPU)["down_proj"]
    found = tune.candidates("down_proj", spec)
    assert len(found) > 2 and len({c.spec.tile for c in found}) == len(found)
    assert [c.spec.why_invalid() for c in found] == [None] * len(found)

    def with_times(*ms: float, present: TileConfig | None = None) -> Candidate:
        return tune.chosen([(c, Times(t, t, t)) for c, t in zip(found, ms, strict=False)], present)

    assert with_times(1.0, 0.9, 0.8) is found[2]
    assert with_times(1.0, 0.999, 1.1) is found[0]
    assert with_times(1.0, 0.98, 0.979) is found[1]
    last = found[2].spec.tile
    assert with_times(1.0, 1.0, 1.019, present=last) is found[2]
    assert with_times(1.0, 1.0, 1.021, present=last) is found[0]
    assert with_times(1.0, 0.9, present=last) is found[1], "the present one was not timed"


def test_a_shape_is_tuned_and_what_is_wrong_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (wanted,) = tune.untuned([SHAPE], CPU, ["down_proj", "up_proj"]).values()
    winners, wrong = tune.tune(SHAPE, CPU, wanted, {}, HostClock(), Settings(2, 0.0))
    assert wrong == [] and set(winners) == {tune.key_of(c.spec) for c in wanted}
    assert capsys.readouterr().out.count("chosen") == len(winners) == 3

    right, calls = ops.down_proj, []

    def sometimes_wrong(*arguments: Any) -> torch.Tensor:
        calls.append(_gemm._forced["down_proj"])
        return right(*arguments) * (-1 if calls[-1] is first.spec.tile else 1)

    first = next(c for c in wanted if c.gemm == "down_proj")
    monkeypatch.setattr(ops, "down_proj", sometimes_wrong)
    winners, wrong = tune.tune(SHAPE, CPU, wanted, {}, HostClock(), Settings(2, 0.0))
    assert len(wrong) == 1 and first.name in wrong[0] and "y: relative error" in wrong[0]
    assert winners[tune.key_of(first.spec)] != first.spec.tile

    present = {tune.key_of(c.spec): c.spec.tile for c in wanted}  # of each GEMM the last one
    monkeypatch.setattr(tune, "STAYS", 1e9)
    monkeypatch.setattr(ops, "down_proj", right)
    assert tune.tune(SHAPE, CPU, wanted, present, HostClock(), Settings(2, 0.0)) == (present, [])


def test_what_was_timed_is_not_timed_again() -> None:
    # Another number of tokens or experts asks the table for the same.
    again = [SHAPES["7b"], SHAPES["7b"].with_tokens(256), SHAPES["tr-1536-256-64"]]
    assert list(tune.untuned(again, CPU, [])) == [SHAPES["7b"]]
    assert len(tune.untuned([SHAPES["7b"], SHAPES["30b"]], CPU, [])) == 2


def test_the_table_is_the_one_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = tune.specs(SHAPES["7b"], CPU)
    table = {tune.key_of(s): tune.candidates(name, s)[-1].spec.tile for name, s in specs.items()}
    assert len(table) == 7
    path = tmp_path / "tuned" / "h100.json"
    tune.write(path, table)
    assert tune.read(path) == table and tune.read(tmp_path / "none.json") == {}
    assert list(tune.read(path)) == sorted(table)
    assert path.read_text().count("\n") == 2 + len(table)

    monkeypatch.setattr(choice.resources, "files", lambda package: tmp_path)
    choice.tuned.cache_clear()
    for name, s in specs.items():
        key = s.variant, s.groups, s.n, s.k, s.outs, s.halves
        assert choice.choose(*key, "h100") == table[tune.key_of(s)], name
        assert choice.choose(*key, "") == s.tile
    choice.tuned.cache_clear()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of what is said."""
    with pytest.raises(SystemExit) as stopped:
        tune.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "GPU: got none" in refused(capsys)


def test_bad_options_are_told_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commandline, "check_gpu", lambda: None)
    monkeypatch.setattr(tune, "run", lambda a: pytest.fail("it times"))
    other = tmp_path / "other.json"
    other.write_text('[{"variant": "up_proj"}]')
    for options, said in (
        (["nosuch"], "shape: got 'nosuch'"),
        (["--thiek", "1,2"], "thiek: got '1,2'"),
        (["--activation", "foo"], "activation: got 'foo'"),
        (["--repeats", "0"], "--repeats: got 0"),
        (["--jobs", "0"], "--jobs: got 0"),
        (["--out", "/proc/xx/table.json"], "out: got [Errno"),
        (["--out", str(tmp_path)], "out: got [Errno"),
        (["--out", str(other)], "a table of tile configurations"),
    ):
        assert said in refused(capsys, *options), options
