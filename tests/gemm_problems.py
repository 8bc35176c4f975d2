"""Grouped GEMMs to run by their specs: inputs, guarded outputs, and what the reference makes of the same values.

What must not be read is NaN: rows of padding, the token and the score that padding points to. What must not be written
is NaN too, before and after every output, and must stay so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from sonicmoe import jit, reference
from sonicmoe.cute_kernels.variants import GemmSpec

DEVICE = "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PADDING = 70
NAN = float("nan")


class Batch:
    """Rows of each group, of random tokens and slots. Token `tokens` and slot `rows` are those that nobody may read."""

    def __init__(self, sizes: Sequence[int], tokens: int, seed: int = 0) -> None:
        self.rows, self.tokens = sum(sizes), tokens
        self.padded = self.rows + PADDING
        generator = torch.Generator().manual_seed(seed)

        def index(values: Tensor, padding: int) -> Tensor:
            return torch.cat((values, torch.full((PADDING,), padding))).int().to(DEVICE)

        self.cu_rows = torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=DEVICE)
        self.row_token = index(torch.randint(0, tokens, (self.rows,), generator=generator), tokens)
        self.row_slot = index(torch.randperm(self.rows, generator=generator), self.rows)
        self.scores = torch.rand(self.rows + 1, generator=generator).add(0.1).to(DEVICE)
        self.scores[-1] = NAN


class Output:
    """A tensor amid a larger one, all of it NaN until a kernel writes."""

    def __init__(self, name: str, *shape: int, dtype: torch.dtype, guard: int, written: int) -> None:
        self.name, self.written, self.guard = name, written, guard
        self.whole = torch.full((shape[0] + 2 * guard, *shape[1:]), NAN, dtype=dtype, device=DEVICE)
        self.view = self.whole[guard:-guard]
        self.initial: Tensor | None = None  # what is there before, where a kernel adds to it

    def reset(self) -> None:
        self.whole.fill_(NAN)
        if self.initial is not None:
            self.view.copy_(self.initial)

    def result(self) -> Tensor:
        """What has been written, once the rest is shown to be as it was."""
        for untouched in (self.whole[: self.guard], self.view[self.written :], self.whole[-self.guard :]):
            assert untouched.isnan().all(), f"{self.name}: written where nothing belongs"
        return self.view[: self.written].clone()


class Problem(NamedTuple):
    a: tuple[Tensor, ...]
    b: Tensor
    out: tuple[Output | Tensor | None, ...]
    reference: Callable[[torch.dtype], dict[str, Tensor]]  # results by name, computed in a dtype


class Inputs:
    """Unit-scale values of one spec and batch."""

    def __init__(self, spec: GemmSpec, batch: Batch, seed: int = 1) -> None:
        self.spec, self.batch, self.dtype = spec, batch, DTYPES[spec.dtype]
        self.generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        # In place and in its own dtype: some tests fill half of the GPU's memory.
        return torch.randn(shape, generator=self.generator, device=DEVICE, dtype=dtype or self.dtype).mul_(scale)

    def tokens(self, columns: int) -> Tensor:
        values = self.normal(self.batch.tokens + 1, columns)
        values[-1] = NAN
        return values

    def rows(self, columns: int) -> Tensor:
        """Amid NaN"""
        whole = self.normal(self.batch.padded + 2 * PADDING, columns)
        view = whole[PADDING:-PADDING]
        whole[:PADDING], view[self.batch.rows :], whole[-PADDING:] = NAN, NAN, NAN
        return view

    def weight(self, rows: int, columns: int, reduced: int) -> Tensor:
        return self.normal(self.spec.groups, rows, columns, scale=1 / math.sqrt(reduced))

    def row_output(self, name: str, columns: int, dtype: torch.dtype | None = None) -> Output:
        batch = self.batch
        return Output(name, batch.padded, columns, dtype=dtype or self.dtype, guard=PADDING, written=batch.rows)

    def weight_output(self, name: str, rows: int, columns: int) -> Output:
        groups, dtype = self.spec.groups, torch.float32 if self.spec.adds else self.dtype
        found = Output(name, groups, rows, columns, dtype=dtype, guard=1, written=groups)
        if self.spec.adds:
            found.initial = self.normal(groups, rows, columns, dtype=dtype)
        return found


def _layout(spec: GemmSpec) -> str:
    return "interleaved" if spec.interleaved else "concat"


def up_proj(spec: GemmSpec, batch: Batch, inputs: Inputs) -> Problem:
    x, w1 = inputs.tokens(spec.k), inputs.weight(spec.halves * spec.n, spec.k, spec.k)
    b1 = inputs.normal(spec.groups, spec.halves * spec.n) if spec.bias else None
    h = inputs.row_output("h", spec.halves * spec.n) if spec.keep_h else None

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        bias = None if b1 is None else b1.to(dtype)
        form = (batch.row_token, str(spec.act), _layout(spec), spec.keep_h)
        pre, a = reference.up_proj(x.to(dtype), w1.to(dtype), bias, batch.cu_rows, *form)
        return {"h": pre, "a": a} if spec.keep_h else {"a": a}

    return Problem((x, batch.row_token), w1, (h, inputs.row_output("a", spec.n), b1), results)


def down_proj(spec: GemmSpec, batch: Batch, inputs: Inputs) -> Problem:
    a, w2 = inputs.rows(spec.k), inputs.weight(spec.n, spec.k, spec.k)
    b2 = inputs.normal(spec.groups, spec.n) if spec.bias else None

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        bias = None if b2 is None else b2.to(dtype)
        return {"y": reference.down_proj(a.to(dtype), w2.to(dtype), bias, batch.cu_rows)}

    return Problem((a,), w2, (inputs.row_output("y", spec.n), b2), results)


def down_dgrad(spec: GemmSpec, batch: Batch, inputs: Inputs) -> Problem:
    do, w2, h = inputs.tokens(spec.k), inputs.weight(spec.k, spec.n, spec.k), inputs.rows(spec.halves * spec.n)
    dh, a_s = inputs.row_output("dh", spec.halves * spec.n), inputs.row_output("a_s", spec.n)
    parts = inputs.row_output("parts", spec.part_columns, torch.float32)

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        scores = batch.scores.to(torch.promote_types(dtype, torch.float32))
        given = (do.to(dtype), w2.to(dtype), None, h.to(dtype), scores)
        form = (batch.cu_rows, batch.row_token, batch.row_slot, str(spec.act))
        return dict(zip(("dh", "a_s", "parts"), reference.down_dgrad(*given, *form), strict=True))

    return Problem((do, batch.row_token), w2, (h, dh, a_s, batch.scores, batch.row_slot, parts), results)


def over_h(given: Problem) -> Problem:
    """down_dgrad's problem with dh in the place of h."""
    h, dh, *others = given.out
    assert isinstance(h, Tensor) and isinstance(dh, Output)
    dh = Output("dh", *h.shape, dtype=h.dtype, guard=PADDING, written=dh.written)
    dh.initial = h
    return given._replace(out=(dh, dh, *others))


def up_dgrad(spec: GemmSpec, batch: Batch, inputs: Inputs) -> Problem:
    reduced = spec.halves * spec.k
    dh, w1 = inputs.rows(reduced), inputs.weight(reduced, spec.n, reduced)

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        return {"dx_rows": reference.up_dgrad(dh.to(dtype), w1.to(dtype), batch.cu_rows, _layout(spec))}

    return Problem((dh,), w1, (inputs.row_output("dx_rows", spec.n), None), results)


def down_wgrad(spec: GemmSpec, batch: Batch, inputs: Inputs) -> Problem:
    do, a_s = inputs.tokens(spec.k), inputs.rows(spec.n)
    dw2 = inputs.weight_output("dw2", spec.k, spec.n)

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        given = (do.to(dtype), a_s.to(dtype), batch.cu_rows, batch.row_token)
        return {"dw2": _added(dw2, dtype, reference.down_wgrad, reference.down_wgrad_add_, given)}

    return Problem((do, batch.row_token), a_s, (dw2,), results)


def up_wgrad(spec: GemmSpec, batch: Batch, inputs: Inputs) -> Problem:
    x, dh = inputs.tokens(spec.k), inputs.rows(spec.halves * spec.n)
    dw1 = inputs.weight_output("dw1", spec.halves * spec.n, spec.k)

    def results(dtype: torch.dtype) -> dict[str, Tensor]:
        given = (x.to(dtype), dh.to(dtype), batch.cu_rows, batch.row_token, _layout(spec))
        return {"dw1": _added(dw1, dtype, reference.up_wgrad, reference.up_wgrad_add_, given)}

    return Problem((x, batch.row_token), dh, (dw1,), results)


def _added(
    out: Output, dtype: torch.dtype, plain: Callable[..., Tensor], add: Callable[..., None], given: tuple[object, ...]
) -> Tensor:
    if out.initial is None:
        return plain(*given)
    total = out.initial.to(torch.promote_types(dtype, torch.float32), copy=True)
    add(total, *given)
    return total


_PROBLEMS = {f.__name__: f for f in (up_proj, down_proj, down_dgrad, up_dgrad, down_wgrad, up_wgrad)}


def problem(spec: GemmSpec, batch: Batch) -> Problem:
    return _PROBLEMS[spec.variant.removesuffix("_add")](spec, batch, Inputs(spec, batch))


def steps_of_a_cta(spec: GemmSpec, batch: Batch, ctas: int) -> int:
    """Of a GEMM whose rows are not reduced: all rounds of tiles, each as many steps as the ring takes for a tile."""
    kernel, _ = spec.build()
    groups = kernel.groups
    tiles = groups.n_tiles * int(batch.cu_rows.diff().add(groups.tile_m - 1).floor_divide(groups.tile_m).sum())
    rest = tiles % ctas
    turns = tiles + (rest if groups.splits and 2 * rest <= ctas else 0)
    return -(-turns // ctas) * (groups.k_steps + kernel.epilogue.ring_steps)


def run(spec: GemmSpec, batch: Batch, given: Problem, ctas: int, count: int = 0) -> dict[str, Tensor]:
    """The kernel's results by name, by so many CTAs. count: what a pace's counter begins with."""
    outputs = [t for t in given.out if isinstance(t, Output)]
    for t in outputs:
        t.reset()
    out = tuple(t.view if isinstance(t, Output) else t for t in given.out)
    counter = torch.full((1,), count, dtype=torch.int32, device=DEVICE) if spec.paced else None
    jit.launch(spec, given.a, (given.b,), out, batch.cu_rows, counter, ctas)
    if counter is not None:
        assert int(counter) == count + ctas * steps_of_a_cta(spec, batch, ctas), "steps that the pace did not count"
    found = {t.name: t.result() for t in outputs}
    if "parts" in found and spec.bias:
        assert found["parts"][:, -1].isnan().all(), "the last part is bias_dot's"
        found["parts"] = found["parts"][:, :-1]
    return found
