"""One run of the benchmark: where rows go, what failed, and how progress is shown."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from perf import ledger
from perf.environment import Environment, now
from perf.ledger import Row
from perf.peers import Peer
from perf.peers.outside import Outside
from perf.problem import Form
from perf.protocol import Clock, CudaClock, HostClock, Settings, Times, measure, simple
from perf.roofline import Ceilings, ceilings_of
from perf.shapes import Shape


@dataclass(frozen=True)
class Options:
    """What of the command line the measurements read. kernels: which of the eight, () for all."""

    what: str
    routings: tuple[str, ...] = ("topk",)
    peers: tuple[Peer, ...] = ()
    kernels: tuple[str, ...] = ()
    router: bool = True
    check: bool = True
    with_module: bool = False
    outside: tuple[Outside, ...] = ()
    from_idle: bool = False


@dataclass
class Session:
    environment: Environment
    clock: CudaClock | HostClock
    settings: Settings
    path: Path
    ceilings: Ceilings
    quiet: bool = False
    started: str = field(default_factory=now)
    failures: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def row(self, shape: Shape, form: Form, impl: str, variant: str, **cells: Any) -> Row:
        """A row of this run; cells are those of Row that are not told by shape, form and run."""
        environment = self.environment._asdict()
        thiek = dict(zip("THIEK", shape.thiek, strict=True))
        told = {"dtype": form.dtype, "activation": form.activation, "bias": form.bias, "skew": form.skew}
        if cells.get("routing") == "token_rounding":
            told |= {"tile_m": form.tile_m, "rule": form.rule}
        defaults = {"routing": "topk", "backend": form.backend if impl.startswith("sonicmoe") else ""}
        written = {"date": now(), "run": self.started, "impl": impl, "variant": variant, "shape": shape.name}
        return Row(**{**written, **environment, **thiek, **told, **defaults, **cells})

    def emit(self, rows: Sequence[Row]) -> None:
        ledger.append(self.path, rows)

    def fail(self, message: str) -> None:
        self.failures.append(message)
        self.say(f"FAIL {message}")

    def skip(self, message: str) -> None:
        self.skipped.append(message)
        self.say(f"skip {message}")

    def say(self, message: str) -> None:
        # To where the bar is not: a bar on the terminal is redrawn below.
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def bar(self, total: int, title: str) -> tqdm[None]:
        return tqdm(total=total, desc=title, file=sys.stderr, disable=self.quiet, leave=False)


def time_cells(times: Times) -> dict[str, float]:
    return {"ms_p20": times.p20, "ms_p50": times.p50, "ms_p80": times.p80}


def brief(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def measured_ceilings(device: str, clock: Clock) -> Ceilings:
    """A GPU's ceilings by its name, else by a large product and a large copy, now."""
    if device.startswith("cuda"):
        known = ceilings_of(torch.cuda.get_device_name(device))
        if known:
            return known
    size, dtype = (8192, torch.bfloat16) if device.startswith("cuda") else (256, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    source = torch.randn(16 * size, size, device=device, dtype=dtype)
    target = torch.empty_like(source)
    cases = {"product": simple(lambda: a @ a), "copy": simple(lambda: target.copy_(source))}
    results = measure(cases, clock, Settings(repeats=9, warm_seconds=0.2))
    product, copy = (1e-3 * results[name].times().p50 for name in ("product", "copy"))
    return Ceilings(2 * size**3 / product, 2 * source.nbytes / copy)
