"""Compiling a layer's kernels side by side: which kernels, by whom, and what happens without it."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import sonicmoe
from sonicmoe import layer, ops
from sonicmoe.cute_kernels.aggregate import AggregateSpec
from sonicmoe.jit import ahead, cache, compile, kernels, target
from sonicmoe.ops import _cute, _gemm
from sonicmoe.ops import ahead as layer_kernels

SPECS = [AggregateSpec(width, "bf16", 2, weighted=True) for width in (64, 72, 80)]
T, E, K, H, I = 6, 8, 2, 64, 32  # noqa: E741


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, two jobs, and nothing asked for yet; no worker outlives the test."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    monkeypatch.setenv(ahead.VARIABLE, "2")
    monkeypatch.setattr(ahead, "_asked", {})
    monkeypatch.setattr(ahead, "_workers", [])
    monkeypatch.setattr(kernels, "_functions", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    yield tmp_path
    ahead._stop()


def _wait() -> None:
    for worker in ahead._workers:
        assert worker.wait(120) == 0


def _there(folder: Path) -> list[bool]:
    return [cache.is_there(spec, folder) for spec in SPECS]


def test_a_worker_compiles_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead.compile_ahead(SPECS)
    assert len(ahead._workers) == 1
    _wait()
    assert _there(folder) == [True, True, True]
    monkeypatch.setattr(compile, "compile_spec", lambda *_: pytest.fail("compiled again"))
    for spec in SPECS:
        kernels.kernel(spec)


def test_the_caller_waits_for_its_worker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "compile_spec", lambda *_: pytest.fail("compiled here too"))
    start = time.perf_counter()
    ahead.compile_ahead(SPECS)
    assert time.perf_counter() - start < 1
    for spec in SPECS:
        kernels.kernel(spec)
    _wait()
    assert len([f for f in folder.iterdir() if f.suffix != ".lock"]) == 3


def test_a_worker_that_ends_without_a_kernel_leaves_it_to_the_caller(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "RUN_BY_PATH", "import sys; sys.stdin.buffer.read()")
    ahead.compile_ahead(SPECS)
    kernels.kernel(SPECS[0])
    assert _there(folder) == [True, False, False]


def test_a_worker_that_hangs_is_not_waited_for_for_ever(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "RUN_BY_PATH", "import time; time.sleep(600)")
    monkeypatch.setattr(ahead, "_PATIENCE", 0.1)
    ahead.compile_ahead(SPECS)
    with pytest.warns(UserWarning, match="compiles aggregate_sm_90a itself"):
        kernels.kernel(SPECS[0])
    assert _there(folder) == [True, False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor for its other kernels
        kernels.kernel(SPECS[1])


def test_nothing_is_asked_for_twice_nor_what_is_there(folder: Path) -> None:
    ahead.compile_ahead(SPECS[:2])
    ahead.compile_ahead(SPECS[:2])
    assert len(ahead._workers) == 1
    _wait()
    ahead._asked.clear()
    for form in cache.forms(cache.path_of(SPECS[1], folder)):
        form.unlink(missing_ok=True)
    ahead.compile_ahead(SPECS[:2])
    assert len(ahead._workers) == 1, "one is there, a single one is left to the caller"


@pytest.mark.parametrize("variable", [cache.VARIABLE, ahead.VARIABLE])
def test_it_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "0" if variable == ahead.VARIABLE else "")
    ahead.compile_ahead(SPECS)
    assert ahead._workers == []


def test_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ahead.VARIABLE, "3")
    assert ahead.jobs() == 3
    for nothing in ("", "many"):
        monkeypatch.setenv(ahead.VARIABLE, nothing)
        monkeypatch.setattr(ahead.os, "cpu_count", lambda: 128)
        assert ahead.jobs() == ahead.MOST_JOBS
        monkeypatch.setattr(ahead.os, "cpu_count", lambda: None)
        assert ahead.jobs() == 0


def test_no_process_to_be_had_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead.sys, "executable", str(folder / "nothing"))
    ahead.compile_ahead(SPECS)
    assert ahead._workers == []


def test_filling_does_not_wait_for_another_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile, "compile_spec", lambda *_: pytest.fail("another process is at it"))
    with cache._locked(cache.path_of(SPECS[0], folder).with_suffix(".lock")):
        cache.fill(SPECS[0])
    assert _there(folder) == [False, False, False]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The specs of a layer's launches, for tensors on the CPU that are taken as on an H200; nothing is computed."""
    found: list[Any] = []

    def recorder(spec: Any) -> Callable[..., None]:
        return lambda *arguments: found.append(spec)

    for module in [m for name, m in sys.modules.items() if name.startswith("sonicmoe.")]:
        if hasattr(module, "is_hopper"):
            monkeypatch.setattr(module, "is_hopper", lambda device: True)
    monkeypatch.setattr(target, "capability", lambda device: target.HOPPER)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(kernels, "_functions", {})
    monkeypatch.setattr(cache, "function_of", recorder)
    monkeypatch.setattr(layer, "_kinds", {})
    for found_before in (_gemm._spec, _gemm._kernel, _cute._kernel, layer_kernels.compile_layer):
        found_before.cache_clear()
    return found


@pytest.mark.parametrize(
    ("activation", "w1_layout"), [("swiglu", "concat"), ("swiglu", "interleaved"), ("relu2", "concat")]
)
@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("routing", ["topk", "topk, renormalized", "token_rounding"])
@pytest.mark.parametrize("with_loss", [False, True])
def test_what_is_compiled_ahead_is_what_a_layer_launches(
    launched: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
    w1_layout: str,
    add_bias: bool,
    training: bool,
    routing: str,
    with_loss: bool,
) -> None:
    asked: dict[Any, None] = {}
    monkeypatch.setattr(layer_kernels, "compile_ahead", lambda specs: asked.update(dict.fromkeys(specs)))
    how = {
        "topk": {"scoring": "sigmoid"},
        "topk, renormalized": {"scoring": "softmax_topk", "renormalize": True},
        "token_rounding": {"routing": "token_rounding", "tile_m": 4, "rule": "up"},
    }[routing]
    moe = sonicmoe.MoE(E, K, H, I, activation, add_bias, w1_layout=w1_layout, dtype=torch.bfloat16, **how)
    x = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    with torch.set_grad_enabled(training):
        o, loss = moe(x)
    if training:
        torch.autograd.grad(o.sum() + loss if with_loss else o.sum(), [x, *moe.parameters()])
        moe.w2.requires_grad_(False)
        torch.autograd.grad(moe(x)[0].sum(), x)
    assert set(launched) <= set(asked)
    # What does not wait for the launch before it comes right after the GEMM that leaves it SMs, and nowhere else.
    before = [launched[i - 1].name for i, spec in enumerate(launched) if getattr(spec, "beside", False)]
    assert before == ["down_wgrad_sm_90a"] * training
    # Of a routing's two backward kernels one is launched; that of the loss, if it is used.
    idle = {s.name.removesuffix("_sm_90a") for s in set(asked) - set(launched)}
    assert idle <= {"topk_backward", "token_rounding_backward", "balance_backward"} if training else not idle
    assert "balance_backward" not in idle or not with_loss


def test_the_layer_asks_once_and_only_for_dtypes_with_kernels(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(layer_kernels, "compile_ahead", asked.append)
    form = ops.Experts((E, H, I), torch.bfloat16, "swiglu", "concat", (False, False), K, True)
    for _ in range(3):
        ops.compile_layer(None, form)
    assert len(asked) == 1
    ops.compile_layer(None, form._replace(dtype=torch.float32))
    assert len(asked) == 1
