"""`--what first-call`: the first call of a new layer, cold and from the disk cache, and of a new number of tokens.

Each in a process of its own: an empty cache folder, then the same folder again. Imports, the start of CUDA and of
cuBLAS, and the tensors are before the clock starts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from perf import layers, tables
from perf.environment import ROOT
from perf.problem import Form, Problem
from perf.protocol import clock_of
from perf.session import Options, Session
from perf.shapes import Shape

CACHE = "SONICMOE_CACHE_DIR"
TIMEOUT = 240
HEADER = ("shape", "variant", "first ms", "second ms", "first - second")


def child(shape: Shape, form: Form) -> dict[str, tuple[float, float]]:
    """Milliseconds of the first and second forward and backward of a new layer, then with another number of tokens."""
    problem, other = (Problem(s, form) for s in (shape, shape._replace(T=max(1, shape.T - 77))))
    clock = clock_of(form.device)
    a = problem.normal(256, 256).requires_grad_()
    torch.autograd.grad((a @ a).sum(), a)  # starts cuBLAS and autograd's thread
    found = {}
    for name, p in (("first-call", problem), ("new-token-count", other)):
        times = []
        for _ in range(2):
            layer = layers.module(p, "topk")
            clock.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(layer.forward(), layer.leaves, p.do)
            clock.synchronize()
            times.append(1e3 * (time.perf_counter() - start))
        found[name] = (times[0], times[1])
    return found


def run(session: Session, shape: Shape, form: Form, options: Options) -> None:
    request = json.dumps({"shape": shape, "form": dataclasses.asdict(form)})
    rows, lines = [], []
    with tempfile.TemporaryDirectory() as folder, session.bar(2, f"{shape.name} first call") as bar:
        for cache in ("cold", "disk"):
            done = subprocess.run(
                [sys.executable, "-m", "perf.what.first_call", request],
                cwd=ROOT,
                env={**os.environ, CACHE: folder},
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
            )
            if done.returncode:
                session.fail(f"{shape.name} first call, {cache}: {done.stderr.strip().splitlines()[-1:]}")
                return
            for name, (first, second) in json.loads(done.stdout.splitlines()[-1]).items():
                variant = f"{name}-{cache}"
                protocol = "sonicmoe.MoE, forward and backward, one process per row"
                cells = {"ms_p50": first, "setup_s": (first - second) / 1e3, "router": True, "protocol": protocol}
                rows.append(session.row(shape, form, "sonicmoe.MoE", variant, **cells))
                lines.append([shape.name, variant, *(tables.cell(ms, 4) for ms in (first, second, first - second))])
            bar.update()
    session.emit(rows)
    session.say(f"\n{tables.text(HEADER, lines)}")


def main() -> None:
    request = json.loads(sys.argv[1])
    print(json.dumps(child(Shape(*request["shape"]), Form(**request["form"]))))


if __name__ == "__main__":
    main()
