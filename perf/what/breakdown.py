"""`--what breakdown`: where a layer's forward and backward spend their time, measured inside the layer.

Marks are put around each op where the layer calls it. The router's three products are timed alone in the same rounds.
What is left is routing, plan, autograd, the load balancing loss, and gaps between launches.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch

from perf import layers, roofline, tables
from perf.ledger import Row
from perf.problem import Form, Problem
from perf.protocol import TOTAL, Case, Clock, measure, percentiles, simple, untimed
from perf.session import Options, Session, time_cells
from perf.shapes import Shape
from sonicmoe import ops

HEADER = ("part", "ms p50", "p20", "p80", "share", "of floor")
LAYER, PRODUCTS, REST = "layer", "router products", "rest"
# The op that computes a part, where it is not called as the part is.
OPS = {"down_dgrad": "down_dgrad_", "down_wgrad+aggregate_dx": "down_wgrad_aggregate_"}


class Marks:
    """The marks around the ops of one call of the layer at a time, by the part of its time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pairs: list[tuple[str, Any, Any]] = []
        self._calls: list[list[tuple[str, Any, Any]]] = []

    def wrap(self, part: str, op: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*arguments: Any) -> Any:
            start = self._clock.mark()
            result = op(*arguments)
            self._pairs.append((part, start, self._clock.mark()))
            return result

        return marked

    def end_of_call(self, timed: bool) -> None:
        if timed:
            self._calls.append(self._pairs)
        self._pairs = []

    def ms(self) -> list[dict[str, float]]:
        """Milliseconds by part of each timed call; after a synchronisation."""
        return [{part: self._clock.elapsed_ms(start, end) for part, start, end in call} for call in self._calls]


@contextlib.contextmanager
def marked_ops(marks: Marks) -> Iterator[None]:
    names = {part: OPS.get(part, part) for part in roofline.PARTS}
    # A layer calls the ops or, where torch's dispatcher has nothing to do, their bodies.
    originals = [(h, part, name, getattr(h, name)) for h in (ops, ops.bodies) for part, name in names.items()]
    try:
        for holder, part, name, op in originals:
            setattr(holder, name, marks.wrap(part, op))
        yield
    finally:
        for holder, _, name, op in originals:
            setattr(holder, name, op)


def _router_products(problem: Problem) -> Case:
    """Logits, and the products of their gradient with x and with the router's weight."""
    x, router = problem.x.detach(), problem.router.detach()
    dlogits = problem.normal(problem.shape.T, problem.shape.E)
    return simple(lambda: (x @ router.T, dlogits @ router, dlogits.T @ x))


def run(session: Session, shape: Shape, form: Form, options: Options) -> None:
    for routing in options.routings:
        _run(session, shape, form, routing)


def _run(session: Session, shape: Shape, form: Form, routing: str) -> None:
    problem = Problem(shape, form)
    layer, marks = layers.module(problem, routing), Marks(session.clock)

    def training(lap: Callable[[], None]) -> object:
        result = torch.autograd.grad(layer.forward(), layer.leaves, problem.do)
        marks.end_of_call(timed=lap is not untimed)
        return result

    cases = {LAYER: Case(training), PRODUCTS: _router_products(problem)}
    settings = dataclasses.replace(session.settings, state="settled")
    with marked_ops(marks), session.bar(settings.repeats, f"{shape.name} breakdown") as bar:
        results = measure(cases, session.clock, settings, bar.update)
    samples = {LAYER: results[LAYER].ms[TOTAL], PRODUCTS: results[PRODUCTS].ms[TOTAL]}
    inside = marks.ms()
    for part in roofline.PARTS:
        samples[part] = [call[part] for call in inside]
    samples[REST] = [
        whole - products - sum(call.values())
        for whole, products, call in zip(samples[LAYER], samples[PRODUCTS], inside, strict=True)
    ]
    rows = [_row(session, problem, routing, part, ms) for part, ms in samples.items()]
    session.emit(rows)
    session.say(_table(shape, routing, rows))


def _row(session: Session, problem: Problem, routing: str, part: str, ms: list[float]) -> Row:
    shape, form, times = problem.shape, problem.form, percentiles(ms)
    rows = int(problem.routing(routing).cu_rows[-1])
    share_of_floor = None
    if part in roofline.PARTS and times.p50 > 0:
        works = [roofline.work(k, shape, rows=rows, gated=form.gated, item=form.item) for k in roofline.PARTS[part]]
        work = roofline.Work(*map(sum, zip(*works, strict=True)))
        share_of_floor = roofline.floor_ms(work, session.ceilings) / times.p50
    return session.row(
        shape,
        form,
        "sonicmoe.MoE",
        f"breakdown-{part.replace(' ', '-')}",
        routing=routing,
        **time_cells(times),
        roofline=share_of_floor,
        router=True,
        rows=rows,
        repeats=len(ms),
        protocol=f"marks inside the layer, forward and backward, settled, {session.clock.name}",
    )


def _table(shape: Shape, routing: str, rows: list[Row]) -> str:
    whole = next(r.ms_p50 for r in rows if r.variant == f"breakdown-{LAYER}") or float("nan")
    lines = [
        [
            r.variant.removeprefix("breakdown-"),
            *(tables.cell(v, 4) for v in (r.ms_p50, r.ms_p20, r.ms_p80)),
            tables.percent(r.ms_p50 / whole if r.ms_p50 is not None else None),
            tables.percent(r.roofline),
        ]
        for r in rows
    ]
    return f"\n{shape.name} {shape.thiek} {routing}: sonicmoe.MoE, forward and backward\n{tables.text(HEADER, lines)}"
