"""`--what kernels`: each kernel beside the batched product by cuBLAS of the same FLOPs, in the same rounds."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from perf import kernels, roofline, tables
from perf.ledger import Row
from perf.problem import Form
from perf.protocol import Samples, measure, simple
from perf.session import Options, Session, brief, time_cells
from perf.shapes import Shape

HEADER = ("kernel", "ms p50", "p20", "p80", "TFLOP/s", "GB/s", "cublas ms", "of cublas", "of floor", "error", "setup s")


def _checked(
    session: Session, shape: Shape, name: str, call: Callable[[], tuple[Tensor, ...]], i: kernels.Inputs, check: bool
) -> tuple[float, float] | None:
    """(seconds of the first call, worst error) of a kernel that runs and is right, else None."""
    try:
        session.clock.synchronize()
        start = time.perf_counter()
        out = call()
        session.clock.synchronize()
        setup = time.perf_counter() - start
        found = kernels.errors(name, i, out) if check else {}
    except Exception as error:
        session.fail(f"{shape.name} {name}: {brief(error)}")
        return None
    wrong = kernels.wrong(found, i.x.dtype)
    if wrong:
        session.fail(f"{shape.name} {name} is wrong, its speed is not reported: {'; '.join(wrong)}")
        return None
    return setup, max(found.values(), default=float("nan"))


def run(session: Session, shape: Shape, form: Form, options: Options) -> None:
    for routing in options.routings:
        _run(session, shape, form, options, routing)


def _run(session: Session, shape: Shape, form: Form, options: Options, routing: str) -> None:
    i = kernels.inputs(shape, form, routing)
    ours = {n: c for n, c in kernels.calls(i).items() if not options.kernels or n in options.kernels}
    bounds = kernels.bounds(i)
    good: dict[str, tuple[float, float]] = {}
    with session.bar(len(ours), f"{shape.name} check") as bar:
        for name, call in ours.items():
            result = _checked(session, shape, name, call, i, options.check)
            if result:
                good[name] = result
            bar.update()
    cases = {}
    for name in good:
        cases[name] = simple(ours[name])
        bound = kernels.COPY if name not in bounds else name
        cases[f"cublas {bound}"] = simple(bounds[bound])
    if not cases:
        return
    with session.bar(session.settings.repeats, f"{shape.name} {routing}") as bar:
        results = measure(cases, session.clock, session.settings, bar.update)
    rows = _rows(session, shape, form, routing, i, good, results)
    session.emit(rows)
    session.say(_table(shape, form, routing, rows))


def _rows(
    session: Session,
    shape: Shape,
    form: Form,
    routing: str,
    i: kernels.Inputs,
    good: dict[str, tuple[float, float]],
    results: dict[str, Samples],
) -> list[Row]:
    rows = []
    shared = {
        "routing": routing,
        "rows": i.rows,
        "repeats": session.settings.repeats,
        "protocol": f"kernels interleaved, {session.clock.name}",
    }
    bound_speed: dict[str, float] = {}
    for name, samples in results.items():
        if not name.startswith("cublas "):
            continue
        kernel, times = name.removeprefix("cublas "), samples.times()
        flops = 0 if kernel == kernels.COPY else kernels.bound_flops(kernel, i)
        moved = kernels.copied_bytes(i) if kernel == kernels.COPY else None
        bound_speed[kernel] = (moved or flops) / times.p50
        cells = {
            "tflops": flops / times.p50 / 1e9 if flops else None,
            "gbps": moved / times.p50 / 1e6 if moved else None,
        }
        impl = "copy" if kernel == kernels.COPY else "cublas"
        rows.append(session.row(shape, form, impl, kernel, **time_cells(times), **cells, **shared))
    for name, (setup, error) in good.items():
        times = results[name].times()
        work = roofline.work(name, shape, rows=i.rows, gated=form.gated, item=form.item)
        speed, bound = (
            (work.flops / times.p50, bound_speed[name])
            if work.flops
            else (work.bytes / times.p50, bound_speed[kernels.COPY])
        )
        rows.append(
            session.row(
                shape,
                form,
                "sonicmoe",
                name,
                **time_cells(times),
                tflops=work.flops / times.p50 / 1e9 if work.flops else None,
                gbps=work.bytes / times.p50 / 1e6,
                roofline=roofline.floor_ms(work, session.ceilings) / times.p50,
                of_bound=speed / bound,
                error=error,
                setup_s=setup,
                **shared,
            )
        )
    return rows


def _table(shape: Shape, form: Form, routing: str, rows: list[Row]) -> str:
    bound = {r.variant: r.ms_p50 for r in rows if r.impl != "sonicmoe"}
    lines = [
        [
            r.variant,
            *(tables.cell(v, 4) for v in (r.ms_p50, r.ms_p20, r.ms_p80)),
            tables.cell(r.tflops, 4),
            tables.cell(r.gbps, 4),
            tables.cell(bound.get(r.variant), 4),
            tables.percent(r.of_bound),
            tables.percent(r.roofline),
            tables.cell(r.error, 2),
            tables.cell(r.setup_s, 2),
        ]
        for r in rows
        if r.impl == "sonicmoe"
    ]
    copies = [r for r in rows if r.impl == "copy"]
    copy = f"; copy {copies[0].gbps:.0f} GB/s (bound of aggregate)" if copies and copies[0].gbps else ""
    return f"\n{shape.name} {shape.thiek} {form.dtype} {routing}{copy}\n{tables.text(HEADER, lines)}"
