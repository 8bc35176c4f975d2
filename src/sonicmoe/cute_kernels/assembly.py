"""From a GemmSpec to the kernel object and the fake tensors it is compiled with."""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from cutlass.cute.runtime import make_fake_compact_tensor

from .epilogue.act_store import ActStore
from .epilogue.add_weight import AddWeight
from .epilogue.dact_reduce import DActReduce
from .epilogue.store import StoreRows, StoreWeight, StoreWeightTransposed
from .grouped_gemm import GroupedGemm
from .groups import GroupedK, GroupedM, ceil_div
from .mainloop import Mainloop
from .operands import GatherColumns, GatherRows, RaggedColumns, Rows, Weight, WeightTransposed
from .pace import Paced, Unpaced
from .pipelines import Ring
from .scheduler import Cooperative, PingPong
from .variants import GemmSpec

DTYPES = {"bf16": cutlass.BFloat16, "fp16": cutlass.Float16}
SCHEDULES = {"cooperative": Cooperative(), "pingpong": PingPong()}
INDEX_ALIGNMENT = 4


def kernel(spec: GemmSpec) -> GroupedGemm:
    tile, schedule = spec.tile, SCHEDULES[spec.tile.schedule]
    groups, a, b = PARTS[spec.variant](spec)
    gathers = a.gathers or b.gathers
    ring = Ring(tile.stages, gathers, 4 * schedule.stage_readers, tile.cluster)
    mainloop = Mainloop(a, b, ring, schedule, tile.tile_m, tile.tile_n, groups.reduces_rows)
    end = epilogue(spec)
    pace = Paced(groups.k_steps, end.ring_steps) if spec.paced else Unpaced()
    return GroupedGemm(spec.name, tile.cluster, groups, mainloop, end, pace)


def sources(spec: GemmSpec) -> tuple:
    """(dtype, extent, tile_k, stages) of A and of B"""
    tile, dtype = spec.tile, DTYPES[spec.dtype]
    a, b = ((dtype, extent, tile.tile_k, tile.stages) for extent in (tile.tile_m, tile.tile_n))
    return a, b


def grouped_m(spec: GemmSpec, columns: int, k_halves: int) -> GroupedM:
    steps = k_halves * ceil_div(spec.k, spec.tile.tile_k)
    n_tiles = ceil_div(spec.n, columns)
    splits = SCHEDULES[spec.tile.schedule].splits
    return GroupedM(spec.groups, spec.tile.tile_m, n_tiles, steps, spec.band(n_tiles), splits)


def up_proj(spec: GemmSpec):
    a, b = sources(spec)
    groups = grouped_m(spec, spec.tile.tile_n // spec.halves, 1)
    return groups, GatherRows(*a, spec.k), Weight(*b, spec.halves, spec.interleaved)


def down_proj(spec: GemmSpec):
    a, b = sources(spec)
    return grouped_m(spec, spec.tile.tile_n, 1), Rows(*a, spec.k, 1), Weight(*b, 1, False)


def down_dgrad(spec: GemmSpec):
    a, b = sources(spec)
    return (
        grouped_m(spec, spec.tile.tile_n, 1),
        GatherRows(*a, spec.k),
        WeightTransposed(*b, spec.k, 1, False),
    )


def up_dgrad(spec: GemmSpec):
    a, b = sources(spec)
    return (
        grouped_m(spec, spec.tile.tile_n, spec.halves),
        Rows(*a, spec.k, spec.halves),
        WeightTransposed(*b, spec.k, spec.halves, spec.interleaved),
    )


def wgrad(spec: GemmSpec):
    a, b = sources(spec)
    tile = spec.tile
    m_tiles, n_tiles = ceil_div(spec.k, tile.tile_m), ceil_div(spec.n, tile.tile_n)
    groups = GroupedK(spec.groups, m_tiles, n_tiles, spec.halves, tile.tile_k, tile.cluster)
    return groups, GatherColumns(*a, spec.k), RaggedColumns(*b, spec.halves, tile.cluster)


PARTS = {
    "up_proj": up_proj,
    "down_proj": down_proj,
    "down_dgrad": down_dgrad,
    "up_dgrad": up_dgrad,
    "down_wgrad": wgrad,
    "down_wgrad_add": wgrad,
    "up_wgrad": wgrad,
    "up_wgrad_add": wgrad,
}


def epilogue(spec: GemmSpec):
    tile = spec.tile
    columns = tile.tile_n // (spec.halves if spec.variant == "up_proj" else 1)
    dtype, blocks, subtiles = DTYPES[spec.dtype], tile.warpgroup_rows // 64, columns // 64
    base = (dtype, tile.buffers, blocks, subtiles)
    by_boxes = (*base, SCHEDULES[tile.schedule].defers)
    if spec.variant == "up_proj":
        return ActStore(*by_boxes, spec.act, tile.tile_n // spec.halves, spec.n, spec.interleaved, spec.keep_h)
    if spec.variant == "down_dgrad":
        boxes = (tile.tile_n // 64, tile.tile_m // 64)
        return DActReduce(*base, tile.stages, boxes, spec.act, tile.tile_n, spec.n)
    if spec.variant in ("down_proj", "up_dgrad"):
        return StoreRows(*by_boxes, tile.tile_n, spec.n)
    transposed = spec.variant.startswith("up")
    if spec.adds:
        layout = (spec.k, spec.n, spec.halves, spec.interleaved, transposed)
        return AddWeight(dtype, blocks, subtiles, tile.tile_m, tile.tile_n, *layout)
    store = StoreWeightTransposed if transposed else StoreWeight
    return store(*by_boxes, tile.tile_m, tile.tile_n, spec.halves, spec.interleaved)


def fake(dtype, *shape, alignment: int = 16):
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=alignment)


def fake_arguments(spec: GemmSpec) -> tuple:
    """(A tensors), (B tensors), (outputs), cu_rows, the pace's counter, num_ctas: row and token counts are symbols"""
    dtype, i32, f32 = DTYPES[spec.dtype], cutlass.Int32, cutlass.Float32
    rows, tokens, slots = cute.sym_int(), cute.sym_int(), cute.sym_int()
    g, n, k, halves = spec.groups, spec.n, spec.k, spec.halves
    cu_rows = fake(i32, g + 1, alignment=INDEX_ALIGNMENT)
    index = fake(i32, rows, alignment=INDEX_ALIGNMENT)
    gathered = (fake(dtype, tokens, k), index)

    def bias(columns):
        return fake(dtype, g, columns) if spec.bias else None

    if spec.variant == "up_proj":
        h = fake(dtype, rows, halves * n) if spec.keep_h else None
        a, b, out = gathered, (fake(dtype, g, halves * n, k),), (h, fake(dtype, rows, n), bias(halves * n))
    elif spec.variant == "down_proj":
        a, b, out = (fake(dtype, rows, k),), (fake(dtype, g, n, k),), (fake(dtype, rows, n), bias(n))
    elif spec.variant == "down_dgrad":
        scores, row_slot = fake(f32, slots, alignment=4), fake(i32, rows, alignment=INDEX_ALIGNMENT)
        parts = fake(f32, rows, spec.part_columns, alignment=4)
        h, dh, a_s = fake(dtype, rows, halves * n), fake(dtype, rows, halves * n), fake(dtype, rows, n)
        a, b, out = gathered, (fake(dtype, g, k, n),), (h, dh, a_s, scores, row_slot, parts)
    elif spec.variant == "up_dgrad":
        a, b = (fake(dtype, rows, halves * k),), (fake(dtype, g, halves * k, n),)
        out = (fake(dtype, rows, n), None)
    else:
        weight = (halves * n, k) if spec.variant.startswith("up") else (k, n)
        target = fake(f32 if spec.adds else dtype, g, *weight)
        a, b, out = gathered, (fake(dtype, rows, halves * n),), (target,)
    counter = fake(i32, 1, alignment=INDEX_ALIGNMENT) if spec.paced else None
    return a, b, out, cu_rows, counter, cutlass.Int32(1)
