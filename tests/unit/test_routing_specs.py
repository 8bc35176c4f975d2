"""The specs of the routing kernels: what is refused, and that the largest compile without spills."""

from __future__ import annotations

import pytest

from sonicmoe.cute_kernels import balance, topk
from sonicmoe.cute_kernels.balance import BalanceBackwardSpec, BalanceSpec
from sonicmoe.cute_kernels.topk import TopKBackwardSpec, TopKSpec
from sonicmoe.jit.spec import Spec
from sonicmoe.routing import SCORINGS

LARGEST = (
    TopKSpec(4096, 128, "fp32", "softmax_topk", True, 2.5, biased=True, num_groups=32, top_groups=5),
    TopKSpec(4095, 128, "bf16", "sigmoid", True, 2.5, biased=True, num_groups=15, top_groups=5),
    TopKBackwardSpec(4096, 128, "fp16", "softmax_topk", True, 2.5),
    TopKBackwardSpec(4095, 128, "fp32", "softmax_topk", True, 2.5),
    BalanceBackwardSpec(4096, 8, "bf16"),
    BalanceBackwardSpec(4095, 8, "fp32"),
)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TopKSpec(4097, 8, "fp32"), "experts = 4097 must be 1 to 4096"),
        (TopKSpec(64, 65, "fp32"), "top = 65 must be 1 to 64"),
        (TopKBackwardSpec(256, 129, "fp32"), "top = 129 must be 1 to 128"),
        (TopKSpec(64, 8, "fp64"), "dtype = 'fp64' must be one of bf16, fp16, fp32"),
        (TopKBackwardSpec(64, 8, "fp32", "softmax"), "kind = 'softmax' must be one of topk_softmax"),
        (TopKSpec(64, 8, "fp32", num_groups=64, top_groups=9), "num_groups = 64 must be at most 32"),
        (BalanceSpec(0, 8, "fp32"), "experts = 0 must be 1 to 4096"),
        (BalanceBackwardSpec(64, 8, "fp8"), "dtype = 'fp8' must be one of"),
    ],
)
def test_what_is_refused(spec: Spec, message: str) -> None:
    assert message in str(spec.why_invalid())
    with pytest.raises(ValueError, match="must be"):
        spec.build()


def test_specs_to_cross_compile() -> None:
    specs = [*topk.aot_specs(), *balance.aot_specs()]
    assert len(set(specs)) == len(specs) and not any(s.why_invalid() for s in specs)
    assert {s.kind for s in specs if isinstance(s, TopKSpec)} == set(topk.KINDS) == set(SCORINGS)
    assert {s.dtype for s in specs} == set(topk.DTYPES)


def test_number_of_parts() -> None:
    parts = [BalanceSpec(64, 8, "fp32").num_parts(t) for t in (0, 1, 8, 9, 1 << 20)]
    assert parts == [1, 1, 1, 2, balance.MAX_PARTS]
    memory_bound = pytest.importorskip("sonicmoe.cute_kernels.memory_bound.balance", exc_type=ImportError)
    assert (memory_bound.MAX_CTAS, memory_bound.WARPS) == (balance.MAX_PARTS, balance.TOKENS_AT_ONCE)


@pytest.mark.parametrize("spec", LARGEST, ids=repr)
def test_the_largest_compile_without_spills(spec: Spec) -> None:
    pytest.importorskip("cutlass", exc_type=ImportError)
    from sonicmoe.jit import compile as compiler
    from sonicmoe.jit import inspect

    found = inspect.resources(compiler.compile_for_inspection(spec))
    assert not found.faults() and found.registers <= 255 and found.opcodes["LDG"] > 0
