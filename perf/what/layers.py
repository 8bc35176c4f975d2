"""`--what forward|backward|both|inference`: layers of sonicmoe and its peers, in the same rounds."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

from perf import layers, roofline, tables
from perf.check import Truth
from perf.layers import Layer
from perf.ledger import Row
from perf.peers.cublas import Cublas
from perf.problem import Form, Problem
from perf.protocol import TOTAL, Case, Samples, measure
from perf.session import Options, Session, brief, time_cells
from perf.shapes import Shape

LAPS = {
    "forward": {"forward": "forward"},
    "backward": {"backward": "backward"},
    "both": {"forward": "forward", "backward": "backward", "both": TOTAL},
    "inference": {"inference": TOTAL},
}
TRAINING = ("backward", "both")
IDLE = "-from-idle"  # of a variant's name: host time counts
HEADER = ("layer", "routing", "variant", "ms p50", "p20", "p80", "TFLOP/s", "of cublas", "of floor", "error", "setup s")


class Entry(NamedTuple):
    impl: str
    routing: str
    case: Case
    rows: int
    error: float | None
    setup_s: float | None


def case_of(what: str, layer: Layer, problem: Problem) -> Case:
    if what == "inference":
        return layers.inference(layer)
    if what == "forward":
        return Case(lambda lap: layer.forward(), laps=("forward",))
    return layers.training(layer, problem.do)


def built(problem: Problem, options: Options) -> dict[tuple[str, str], Layer | Exception]:
    """Each implementation by (name, routing); an exception where building failed."""
    found: dict[tuple[str, str], Layer | Exception] = {}

    def add(name: str, routing: str, make: Callable[[], Layer]) -> None:
        try:
            found[name, routing] = make()
        except Exception as error:
            found[name, routing] = error

    for routing in options.routings:
        add("sonicmoe", routing, functools.partial(layers.ours, problem, options.router, routing))
        if options.with_module and options.router:
            add("sonicmoe.MoE", routing, functools.partial(layers.module, problem, routing))
    for peer in options.peers:
        if peer.checked:
            add(peer.name, "topk", functools.partial(peer.build, problem, options.router))
    return found


def available(session: Session, problem: Problem, options: Options) -> Options:
    """The options with the peers that can run this problem here."""
    peers = []
    for peer in options.peers:
        reason = peer.why_not(problem)
        if reason:
            session.skip(f"{problem.shape.name} {peer.name}: {reason}")
        else:
            peers.append(peer)
    return dataclasses.replace(options, peers=tuple(peers))


def _entry(
    session: Session,
    problem: Problem,
    options: Options,
    name: str,
    routing: str,
    layer: Layer | Exception,
    true: Truth | None,
) -> Entry | None:
    """A layer that runs and is right; one that does not is a failure of this run if it is ours, else skipped."""
    title = f"{problem.shape.name} {name} {routing}"
    note = session.fail if name.startswith("sonicmoe") else session.skip
    if isinstance(layer, Exception):
        note(f"{title}: {brief(layer)}")
        return None
    case = case_of(options.what, layer, problem)
    try:
        session.clock.synchronize()
        start = time.perf_counter()
        case.run(lambda: None)
        session.clock.synchronize()
        setup = time.perf_counter() - start
        found = layers.errors(layer, problem, true, options.what in TRAINING) if true else {}
    except Exception as error:
        note(f"{title}: {brief(error)}")
        return None
    wrong = layers.wrong(found, problem.form.torch_dtype)
    if wrong:
        note(f"{title} is wrong, its speed is not reported: {'; '.join(wrong)}")
        return None
    rows = int(problem.routing(routing).cu_rows[-1])
    return Entry(name, routing, case, rows, max(found.values(), default=None), setup)


def run(session: Session, shape: Shape, form: Form, options: Options) -> None:
    problem = Problem(shape, form)
    options = available(session, problem, options)
    entries: dict[str, Entry] = {}
    candidates = built(problem, options)
    truths: dict[tuple[str, bool], Truth] = {}
    with session.bar(len(candidates), f"{shape.name} check") as bar:
        for (name, routing), layer in candidates.items():
            key = routing, name in layers.OWN_ROUTER
            if options.check and key not in truths:
                truths[key] = layers.truth(problem, *key, options.router, options.what in TRAINING)
            entry = _entry(session, problem, options, name, routing, layer, truths.get(key))
            if entry:
                entries[f"{name} {routing}"] = entry
            bar.update()
    bound = next((p for p in options.peers if isinstance(p, Cublas)), None)
    if bound:
        case = bound.case(problem, shape.rows, options.what)
        entries["cublas topk"] = Entry("cublas", "topk", case, shape.rows, None, None)
    if not entries:
        return
    settings = dataclasses.replace(session.settings, state="idle" if options.from_idle else "settled")
    with session.bar(settings.repeats, f"{shape.name} {options.what}") as bar:
        cases = {name: entry.case for name, entry in entries.items()}
        results = measure(cases, session.clock, settings, bar.update)
    rows = _rows(session, problem, options, entries, results)
    rows += _outside(session, problem, options)
    session.emit(rows)
    session.say(_table(shape, form, options, rows))


def _rows(
    session: Session, problem: Problem, options: Options, entries: dict[str, Entry], results: dict[str, Samples]
) -> list[Row]:
    shape, form = problem.shape, problem.form
    state = "from idle" if options.from_idle else f"settled, {session.clock.name}"
    rows = []
    for variant, lap in LAPS[options.what].items():
        speed_of_bound = None
        for name, entry in sorted(entries.items(), key=lambda item: item[1].impl != "cublas"):
            times = results[name].times(lap)
            work = roofline.total(variant, shape, rows=entry.rows, gated=form.gated, item=form.item)
            floor = roofline.layer_floor_ms(
                variant, shape, session.ceilings, rows=entry.rows, gated=form.gated, item=form.item
            )
            flops = work.flops
            if entry.impl == "cublas":
                flops = Cublas().flops(problem, entry.rows)[variant]
                speed_of_bound = flops / times.p50
            rows.append(
                session.row(
                    shape,
                    form,
                    entry.impl,
                    f"{variant}{IDLE}" if options.from_idle else variant,
                    routing=entry.routing,
                    **time_cells(times),
                    tflops=flops / times.p50 / 1e9,
                    gbps=None if entry.impl == "cublas" else work.bytes / times.p50 / 1e6,
                    roofline=None if entry.impl == "cublas" else floor / times.p50,
                    of_bound=flops / times.p50 / speed_of_bound if speed_of_bound else None,
                    rows=entry.rows,
                    router=options.router and entry.impl != "cublas",
                    error=entry.error,
                    setup_s=entry.setup_s,
                    repeats=session.settings.repeats,
                    protocol=f"layers in turns, {state}",
                )
            )
    return rows


def _outside(session: Session, problem: Problem, options: Options) -> list[Row]:
    """The same command's measurements in other environments: after ours, since two processes share a GPU badly."""
    shape, form = problem.shape, problem.form
    rows = []
    for other in options.outside:
        if options.what == "inference" or not options.router or form.activation != "swiglu" or form.bias:
            session.skip(f"{shape.name} {other.name}: only training with its router, swiglu, no bias")
            continue
        try:
            answer = other.measure(shape, form.dtype, form.device, session.settings)
        except Exception as error:
            session.skip(f"{shape.name} {other.name}: {brief(error)}")
            continue
        for variant in LAPS[options.what]:
            times = answer["times"][variant]
            flops = roofline.total(variant, shape, gated=True, item=form.item).flops
            cells = {k: answer[k] for k in ("error", "setup_s")} | {"tflops": flops / times.p50 / 1e9}
            protocol = f"alone in its own process, settled, {session.clock.name}"
            row = session.row(
                shape, form, other.name, variant, **time_cells(times), **cells, router=True, protocol=protocol
            )
            rows.append(row)
    return rows


def _table(shape: Shape, form: Form, options: Options, rows: list[Row]) -> str:
    lines = [
        [
            r.impl,
            r.routing,
            r.variant,
            *(tables.cell(v, 4) for v in (r.ms_p50, r.ms_p20, r.ms_p80, r.tflops)),
            tables.percent(r.of_bound),
            tables.percent(r.roofline),
            tables.cell(r.error, 2),
            tables.cell(r.setup_s, 2),
        ]
        for r in rows
    ]
    router = "with router" if options.router else "without router"
    title = f"{shape.name} {shape.thiek} {form.dtype} {form.activation}, {router}"
    return f"\n{title}\n{tables.text(HEADER, lines)}"
