"""`--what memory`: bytes kept from forward to backward, and the peak of both, by the allocator."""

from __future__ import annotations

import torch
from torch import Tensor

from perf import roofline, tables
from perf.layers import Layer
from perf.ledger import Row
from perf.problem import Form, Problem
from perf.session import Options, Session, brief
from perf.shapes import Shape
from perf.what.layers import available, built

MIB = 1 << 20
HEADER = ("layer", "shape", "T", "H", "I", "E", "K", "kept MiB", "2TH+4RI", "ratio", "peak MiB", "paper's", "ratio")


def kept_and_peak(layer: Layer, x: Tensor, do: Tensor) -> tuple[int, int]:
    """(bytes alive after the forward beside weights and o, largest number of bytes allocated by forward and backward).

    x and the routing count as kept though they are given.
    """
    _both(layer, do)  # allocates workspaces, which stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    o = layer.forward()
    after = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(o, layer.leaves, do)
    peak = torch.cuda.max_memory_allocated() - before
    kept = after - before - o.nbytes + x.nbytes + sum(t.nbytes for t in layer.given)
    del gradients
    return kept, peak


def kept_by_hooks(layer: Layer, x: Tensor) -> int:
    """The same count of kept bytes from what autograd packs, for a device whose allocator does not count."""
    storages: dict[int, int] = {}
    weights = {t.untyped_storage().data_ptr() for t in layer.leaves if t is not x}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        alive.append(layer.forward())
    given = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (x, *layer.given)}
    return sum(({p: n for p, n in storages.items() if p not in weights} | given).values())


def _both(layer: Layer, do: Tensor) -> None:
    torch.autograd.grad(layer.forward(), layer.leaves, do)


def run(session: Session, shape: Shape, form: Form, options: Options) -> None:
    """The experts without a router, from a given routing: what the router keeps is its own."""
    problem = Problem(shape, form)
    options = available(session, problem, Options(options.what, options.routings, options.peers, router=False))
    rows, candidates = [], built(problem, options)
    with session.bar(len(candidates), f"{shape.name} memory") as bar:
        for (name, routing), layer in candidates.items():
            try:
                if isinstance(layer, Exception):
                    raise layer
                rows.append(_row(session, problem, name, routing, layer))
            except Exception as error:
                note = session.fail if name == "sonicmoe" else session.skip
                note(f"{shape.name} {name} {routing}: {brief(error)}")
            bar.update()
    session.emit(rows)
    if rows:
        session.say(_table(rows))


def _row(session: Session, problem: Problem, name: str, routing: str, layer: Layer) -> Row:
    shape, form = problem.shape, problem.form
    routed = int(problem.routing(routing).cu_rows[-1])
    kept_bound = roofline.kept_bytes(shape, rows=routed, gated=form.gated, item=form.item)
    peak_bound = roofline.peak_bytes(shape, rows=routed, gated=form.gated, item=form.item)
    if form.device.startswith("cuda"):
        kept, peak = kept_and_peak(layer, problem.x, problem.do)
        peak_mib, protocol = peak / MIB, "allocator"
    else:
        kept, peak_mib, protocol = kept_by_hooks(layer, problem.x), None, "saved tensors"
    return session.row(
        shape,
        form,
        name,
        "memory",
        routing=routing,
        rows=routed,
        saved_mib=kept / MIB,
        bound_mib=kept_bound / MIB,
        peak_mib=peak_mib,
        peak_bound_mib=peak_bound / MIB,
        protocol=protocol,
    )


def _table(rows: list[Row]) -> str:
    def ratio(a: float | None, b: float | None) -> str:
        return f"{a / b:.3f}" if a and b else "-"

    lines = [
        [
            r.impl,
            r.shape,
            *(str(n) for n in (r.T, r.H, r.I, r.E, r.K)),
            tables.cell(r.saved_mib, 4),
            tables.cell(r.bound_mib, 4),
            ratio(r.saved_mib, r.bound_mib),
            tables.cell(r.peak_mib, 4),
            tables.cell(r.peak_bound_mib, 4),
            ratio(r.peak_mib, r.peak_bound_mib),
        ]
        for r in rows
    ]
    return tables.text(HEADER, lines)
