"""`--what host`: time the host takes to issue a call, without synchronisation, eager."""

from __future__ import annotations

from collections.abc import Callable

import torch

import sonicmoe.ops as ops
from perf import layers, tables
from perf.layers import Layer
from perf.problem import Form, Problem
from perf.protocol import issue_times, percentiles
from perf.session import Options, Session, brief, time_cells
from perf.shapes import Shape
from perf.what.layers import available, built

CALLS = {"host-launches": 50, "host-forward": 50, "host-inference": 50}
# A queue of a thousand launches is full after 50 calls, and the host would wait for it.
GRAPH = "host-both-graph"
CALLS |= {"host-both": 25, "host-both-one-thread": 25, GRAPH: 25}
LINEAR = "torch.nn.Linear"
HEADER = ("layer", "what", "µs per call", "p20", "p80")


def launches(problem: Problem) -> Callable[[], object]:
    """The three kernels of the forward as ops, one after the other: no checks, no autograd, no router."""
    form, plan = problem.form, problem.routing("topk")
    x, w1, w2, b1, b2 = (None if t is None else t.detach() for t in problem_tensors(problem))
    activation, backend = str(form.kind), form.backend

    def call() -> object:
        run = ops.steps(plan.cu_rows)
        _, a = run.up_proj(x, w1, b1, plan.cu_rows, plan.row_token, activation, "concat", True, backend)
        y = run.down_proj(a, w2, b2, plan.cu_rows, backend)
        return run.aggregate(y, plan.scores, None, plan.slot_row, plan.cu_slots, problem.shape.T, backend)

    return call


def problem_tensors(problem: Problem) -> tuple[torch.Tensor | None, ...]:
    return problem.x, problem.w1, problem.w2, problem.b1, problem.b2


def _calls(layer: Layer, problem: Problem) -> dict[str, Callable[[], object]]:
    def inference() -> object:
        with torch.no_grad():
            return layer.forward()

    def both() -> object:
        return torch.autograd.grad(layer.forward(), layer.leaves, problem.do)

    def one_thread() -> object:
        with torch.autograd.set_multithreading_enabled(False):
            return both()

    return {
        "host-forward": layer.forward,
        "host-inference": inference,
        "host-both": both,
        # autograd's thread of the device has to be woken, and takes Python's lock in turns with its caller's
        "host-both-one-thread": one_thread,
    }


def linear(problem: Problem) -> Layer:
    """One product under autograd, for scale: what this host takes where there is next to nothing to issue."""
    weight = torch.nn.Parameter(problem.normal(problem.shape.H, problem.shape.H))
    return Layer(lambda: torch.nn.functional.linear(problem.x, weight), [problem.x, weight], None)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a call in a CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def run(session: Session, shape: Shape, form: Form, options: Options) -> None:
    """sonicmoe's forward launches, sonicmoe.MoE, the peers, and a single linear layer."""
    problem = Problem(shape, form)
    options = available(session, problem, options)
    found: dict[tuple[str, str], Layer | Exception] = {("sonicmoe.MoE", "topk"): layers.module(problem, "topk")}
    found |= built(problem, options)
    found[LINEAR, "topk"] = linear(problem)
    work = {("sonicmoe", "topk", "host-launches"): launches(problem)}
    for (name, routing), layer in found.items():
        if isinstance(layer, Exception):
            (session.fail if name.startswith("sonicmoe") else session.skip)(f"{shape.name} {name}: {brief(layer)}")
            continue
        work |= {(name, routing, variant): call for variant, call in _calls(layer, problem).items()}
    if form.device.startswith("cuda"):
        work["sonicmoe.MoE", "topk", GRAPH] = work["sonicmoe.MoE", "topk", "host-both"]
    rows = []
    with session.bar(len(work), f"{shape.name} host") as bar:
        for (name, routing, variant), call in work.items():
            try:
                seconds = issue_times(captured(call) if variant == GRAPH else call, session.clock, CALLS[variant])
            except Exception as error:
                note = session.fail if name.startswith("sonicmoe") else session.skip
                note(f"{shape.name} {name} {variant}: {brief(error)}")
                continue
            times = percentiles([1e3 * s for s in seconds])
            rows.append(
                session.row(
                    shape,
                    form,
                    name,
                    variant,
                    routing=routing,
                    **time_cells(times),
                    host_us=1e3 * times.p50,
                    router=variant != "host-launches" and name != LINEAR and options.router,
                    repeats=len(seconds) * CALLS[variant],
                    protocol=f"issue time of {CALLS[variant]} calls without synchronisation",
                )
            )
            bar.update()
    session.emit(rows)
    lines = [
        [r.impl, r.variant, *(tables.cell(1e3 * ms, 4) for ms in (r.ms_p50, r.ms_p20, r.ms_p80) if ms is not None)]
        for r in rows
    ]
    session.say(f"\n{shape.name} {shape.thiek}\n{tables.text(HEADER, lines)}")
