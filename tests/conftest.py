"""What every test has: poisoned instead of uninitialised memory, and GPU tests that say why they are skipped. And what
several tests of launches have: a GPU that notes them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, wraps
from typing import Any

import pytest
import torch

# Dynamo notes torch's functions by identity when it is first imported: that must be before any of them is patched.
import torch._dynamo

# Tests of many shapes in many processes would start many more, for kernels that most of them never call.
os.environ.setdefault("SONICMOE_COMPILE_JOBS", "0")

_ALLOCATORS = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(allocate)
    def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        t = allocate(*args, **kwargs)
        if t.is_floating_point() and not t.is_meta and t.layout is torch.strided:
            with torch.no_grad():
                t.fill_(float("nan"))
        return t

    return allocate_nan


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill what torch.empty and its kin return with NaN, so that reading what nobody wrote shows.

    A test marked `unpoisoned` goes without: one that compiles (tracing would record the fill) or measures.
    """
    if request.node.get_closest_marker("unpoisoned") is None:
        for owner, name in _ALLOCATORS:
            monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
    yield


@pytest.fixture
def gemm_launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...]]]:
    """(spec, arguments) of each grouped GEMM that is launched from then on: as on a GPU of 132 SMs that has no table.

    What launches find once is forgotten before and after.
    """
    from sonicmoe.ops import _gemm

    found: list[tuple[Any, tuple[Any, ...]]] = []
    for name in ("_spec", "_kernel"):
        monkeypatch.setattr(_gemm, name, cache(getattr(_gemm, name).__wrapped__))
    monkeypatch.setattr(_gemm.jit, "kernel", lambda spec: lambda *arguments: found.append((spec, arguments)))
    monkeypatch.setattr(_gemm, "processors", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "another")
    return found


@lru_cache(maxsize=1)
def _why_no_hopper() -> str | None:
    if not torch.cuda.is_available():
        return "needs a Hopper GPU: torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return "needs a Hopper GPU (compute capability 9.0): this one has {}.{}".format(*capability)
    return None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU (compute capability 9.0); skipped elsewhere")
    config.addinivalue_line("markers", "unpoisoned: torch.empty stays as it is")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything under tests/gpu is a GPU test, and is skipped with the reason where it cannot run."""
    for item in items:
        if "gpu" in item.path.relative_to(config.rootpath).parts:
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") is not None and (reason := _why_no_hopper()) is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was skipped and why: the GPU tests in one line, all others by their reasons."""
    gpu, reasons, no_hopper = 0, Counter[str](), _why_no_hopper()
    for report in terminalreporter.getreports("skipped"):
        # A module that is skipped as a whole leaves a report of its collection, which has no keywords.
        if no_hopper is not None and "gpu" in getattr(report, "keywords", ()):
            gpu += 1
        else:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            reasons[f"{report.nodeid.partition('::')[0]}: {reason.removeprefix('Skipped: ')}"] += 1
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count} skipped in {reason}")
    if gpu:
        terminalreporter.write_line(f"{gpu} GPU tests skipped: {no_hopper}")
