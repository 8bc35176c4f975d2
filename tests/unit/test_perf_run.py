"""The command line, whole, on a CPU with the torch backend and tiny shapes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perf import environment, ledger, run, shapes
from perf.ledger import Row
from perf.peers import scattermoe
from perf.problem import Form
from perf.roofline import KERNELS, PARTS
from perf.what import breakdown, host, kernels, layers, router
from sonicmoe import InvalidArgument, ops

TINY = ["--device", "cpu", "--thiek", "48,32,16,8,2", "--repeats", "2", "--warm-seconds", "0", "--quiet"]


def rows_of(tmp_path: Path, *arguments: str, status: int = 0) -> list[Row]:
    assert run.main([*TINY, "--out", str(tmp_path), *arguments]) == status
    return ledger.read(tmp_path) if tmp_path.exists() and list(tmp_path.rglob("*.csv")) else []


def test_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(tmp_path, "--what", "kernels")
    ours = {r.variant: r for r in rows if r.impl == "sonicmoe"}
    assert tuple(ours) == KERNELS
    for r in ours.values():
        assert r.ms_p20 and r.ms_p50 and r.ms_p80 and r.ms_p20 <= r.ms_p50 <= r.ms_p80
        assert r.of_bound and r.roofline and r.gbps and r.error is not None and r.rows == 96
        assert (r.tflops is None) == r.variant.startswith("aggregate")
        assert (r.gpu, r.T, r.H, r.I, r.E, r.K, r.dtype) == ("cpu", 48, 32, 16, 8, 2, "bf16")
    assert {r.variant for r in rows if r.impl == "cublas"} == {k for k in KERNELS if "aggregate" not in k}
    assert "of cublas" in capsys.readouterr().out


def test_layers_beside_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ["--peer", "cublas", "loop", "scattermoe"]
    rows = rows_of(tmp_path, "--what", "both", "--module", *peers)
    assert {(r.impl, r.variant) for r in rows} == {
        (impl, variant)
        for impl in ("sonicmoe", "sonicmoe.MoE", "cublas", "loop")
        for variant in ("forward", "backward", "both")
    }
    by = {(r.impl, r.variant): r for r in rows}
    assert all(r.router == (r.impl != "cublas") for r in rows)
    both, parts = by["sonicmoe", "both"], (by["sonicmoe", "forward"], by["sonicmoe", "backward"])
    assert both.ms_p50 and both.ms_p50 == pytest.approx(sum(p.ms_p50 or 0 for p in parts), rel=0.5)
    assert "scattermoe: " in capsys.readouterr().out


@pytest.mark.parametrize("what", ["forward", "backward", "inference"])
def test_one_lap_of_a_layer(tmp_path: Path, what: str) -> None:
    rows = rows_of(tmp_path, "--what", what, "--no-router", "--routing", "topk", "token_rounding", "--tile-m", "8")
    assert [(r.variant, r.routing, r.router) for r in rows] == [
        (what, "topk", False),
        (what, "token_rounding", False),
    ]


@pytest.mark.parametrize(
    ("what", "more", "state"),
    [
        ("both", ["--module"], "settled"),
        ("inference", ["--from-idle"], "idle"),
        ("breakdown", [], "settled"),
        ("router", [], "settled"),
        ("kernels", [], "busy"),
    ],
)
def test_the_state_in_which_a_call_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, more: list[str], state: str
) -> None:
    states: list[str] = []
    for module in (layers, breakdown, router, kernels):

        def spied(cases: Any, clock: Any, settings: Any, *rest: Any, measure: Any = module.measure) -> Any:
            states.append(settings.state)
            return measure(cases, clock, settings, *rest)

        monkeypatch.setattr(module, "measure", spied)
    rows = rows_of(tmp_path, "--what", what, *more)
    assert rows and states == [state]
    assert all((state == "busy") or (state in r.protocol) for r in rows)


def test_memory(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, "--what", "memory")
    assert row.variant == "memory" and row.saved_mib and row.bound_mib
    # x, h and the plan: at this size the plan is a sixth.
    assert 1.0 <= row.saved_mib / row.bound_mib < 1.3


def test_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "CALLS", dict.fromkeys(host.CALLS, 3))
    rows = rows_of(tmp_path, "--what", "host")
    assert {"host-launches", "host-forward", "host-both"} <= {r.variant for r in rows}
    assert all(r.host_us and r.host_us > 0 for r in rows)
    assert {r.router for r in rows if r.impl == host.LINEAR} == {False} != {r.router for r in rows}


def test_a_wrong_kernel_has_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.down_proj
    monkeypatch.setattr(ops, "down_proj", lambda *a: -right(*a))
    rows = rows_of(tmp_path, "--what", "kernels", "--kernel", "down_proj", "up_proj", status=1)
    assert "down_proj" not in {r.variant for r in rows}
    assert "down_proj is wrong, its speed is not reported: y: relative error" in capsys.readouterr().out
    rows = rows_of(tmp_path, "--what", "kernels", "--kernel", "down_proj", "--no-check")
    assert "down_proj" in {r.variant for r in rows}


def test_another_python(tmp_path: Path) -> None:
    factory = tmp_path / "factory.py"
    factory.write_text(FACTORY)
    out = tmp_path / "out"
    rows = rows_of(out, "--what", "both", "--outside", "other", sys.executable, str(factory))
    assert [r.variant for r in rows if r.impl == "other"] == ["forward", "backward", "both"]
    factory.write_text(FACTORY.replace("return o", "return -o"))
    rows = rows_of(tmp_path / "wrong", "--what", "both", "--outside", "other", sys.executable, str(factory))
    assert not [r for r in rows if r.impl == "other"]


def test_the_first_implementation(tmp_path: Path) -> None:
    """Its factory, with our module of the same constructor and call in the place of the package."""
    factory = tmp_path / "factory.py"
    for place, runs in ((FIRST, True), (FIRST.replace("interleaved", "concat"), False)):
        factory.write_text(place)
        rows = rows_of(tmp_path / str(runs), "--what", "both", "--outside", "first", sys.executable, str(factory))
        assert bool([r for r in rows if r.impl == "first"]) == runs


FIRST = f"""
import importlib.util
import sys
import types

from sonicmoe import compat


class MoE(compat.MoE):
    def __init__(self, **options):
        super().__init__(**options)
        self.w1_layout = "interleaved"


package, enums = types.ModuleType("sonicmoe"), types.ModuleType("sonicmoe.enums")
package.MoE, package.KernelBackendMoE, enums.ActivationType = MoE, compat.KernelBackendMoE, compat.ActivationType
spec = importlib.util.spec_from_file_location("first", {str(environment.ROOT / "perf/peers/first_implementation.py")!r})
first = importlib.util.module_from_spec(spec)
spec.loader.exec_module(first)


def make(*arguments):
    ours = {{name: module for name, module in sys.modules.items() if name.split(".")[0] == "sonicmoe"}}
    sys.modules.update({{"sonicmoe": package, "sonicmoe.enums": enums}})
    try:
        return first.make(*arguments)
    finally:
        sys.modules.update(ours)
"""

FACTORY = """
import torch
import torch.nn.functional as F

def make(x, T, H, I, E, K):
    draw = lambda *size: (torch.randn(*size) * size[-1] ** -0.5).to(x).requires_grad_()
    router, w1, w2 = draw(E, H), draw(E, 2 * I, H), draw(E, H, I)
    def forward():
        top, ids = F.linear(x, router).topk(K, dim=1)
        scores, o = top.float().softmax(1), torch.zeros_like(x)
        for e in range(E):
            t, p = torch.where(ids == e)
            h = x[t] @ w1[e].T
            y = (F.silu(h[:, :I]) * h[:, I:]) @ w2[e].T
            o = o.index_add(0, t, (scores[t, p, None] * y).to(x.dtype))
        return o
    return forward, [x, router, w1, w2], (router, w1, w2)
"""


def test_arguments() -> None:
    parse = run.parser().parse_args
    chosen = run.chosen_shapes(parse(["7b", "--thiek", "5,8,16,4,2", "--tokens", "256", "512"]))
    assert [s.thiek[0] for s in chosen] == [256, 512, 256, 512] and chosen[0].name == "7b@256"
    assert run.chosen_shapes(parse([])) == [shapes.SHAPES["7b"]]
    assert run.chosen_shapes(parse(["--what", "memory"])) == shapes.TWELVE
    assert {p.name for p in run.options_of(parse(["--peer", "all"])).peers} == set(run.PEERS)
    assert run.form_of(parse(["--device", "cpu"])).backend == "torch"
    assert run.form_of(parse(["--device", "cuda"])).backend == "cute"
    with pytest.raises(SystemExit):
        parse(["--what", "nothing"])


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The last line of what is said."""
    with pytest.raises(SystemExit) as stopped:
        run.main([*TINY, *arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--thiek", "64,32,16,8"], "thiek: got '64,32,16,8'"),
        (["--activation", "foo"], "activation: got 'foo'"),
        (["--device", "foo"], "device: got 'foo'"),
        (["--device", "meta"], "device: got 'meta'"),
        (["--device", "cuda:99"], "device: got 'cuda:99'"),
        (["--repeats", "0"], "--repeats: got 0"),
        (["--repeats", "two"], "--repeats: invalid count value: 'two'"),
        (["--tokens", "256", "0"], "--tokens: got 0"),
        (["--tile-m", "-8"], "--tile-m: got -8"),
        (["--warm-seconds", "inf"], "--warm-seconds: got inf"),
        (["--skew", "nan"], "--skew: got nan"),
        (["--out", "/proc/xx"], "out: got [Errno"),
        (["--out", __file__], "out: got [Errno"),
    ],
)
def test_bad_options_are_told_before_anything_is_measured(
    tmp_path: Path,
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "run", lambda a: pytest.fail("it measures"))
    assert said in refused(capsys, "--out", str(tmp_path), *options)


def test_an_unknown_shape_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["nosuch"])
    assert stopped.value.code == 2 and "shape: got 'nosuch'" in capsys.readouterr().err.splitlines()[-1]


def test_rows_that_could_not_be_appended_are_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run.path_of(run.parser().parse_args([*TINY, "--out", str(tmp_path)]))
    path.parent.mkdir()
    path.write_text("other,columns\n")
    assert "other columns" in refused(capsys, "--out", str(tmp_path))
    assert path.read_text() == "other,columns\n"


def test_only_options_are_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a measurement does not accept is a failure of that measurement."""

    def refuse(*arguments: Any) -> Any:
        raise InvalidArgument("x", 1, "2")

    monkeypatch.setattr(ops, "down_proj", refuse)
    assert rows_of(tmp_path, "--what", "kernels", "--kernel", "down_proj", status=1) == []


def test_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(tmp_path, "--what", "router", "--tile-m", "8")
    steps = {(r.impl, r.variant) for r in rows}
    assert {("sonicmoe", f"router-{s}") for s in ("topk", "plan", "route_topk", "token_rounding")} <= steps
    assert ("torch", "router-topk") in steps and ("torch", "router-plan") in steps
    assert "FAIL" not in capsys.readouterr().out


@pytest.mark.parametrize("step", ["topk", "plan", "route_topk", "token_rounding"])
def test_a_wrong_routing_is_found(step: str) -> None:
    logits = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    values, ids = logits.topk(4, dim=1)
    form = Form(device="cpu", backend="torch", tile_m=8)

    def why(logits_used: torch.Tensor, k: int = 4) -> str | None:
        out = router.our_steps(logits_used, logits_used.topk(k, dim=1).indices.int(), values, k, form)[step]()
        return router.why_wrong(step, out, logits, ids, 4, form)

    assert why(logits) is None
    assert why(-logits) and why(logits.roll(1, 0))
    if step != "topk":
        assert "pairs of" in str(why(logits + 0.3 * torch.randn(300, 16)))


def test_breakdown_adds_up(tmp_path: Path) -> None:
    before = ops.up_proj
    rows = rows_of(tmp_path, "--what", "breakdown")
    assert ops.up_proj is before
    parts = {r.variant.removeprefix("breakdown-"): r.ms_p50 or 0.0 for r in rows}
    assert set(parts) == {"layer", "router-products", "rest", *PARTS}
    assert sorted(k for kernels in PARTS.values() for k in kernels) == sorted(KERNELS)
    assert all(parts[p] > 0 for p in PARTS)
    inner = sum(ms for part, ms in parts.items() if part != "layer")
    assert inner == pytest.approx(parts["layer"], rel=0.3)


def test_scattermoe_is_left_out_where_its_addresses_would_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an illegal access, after which no other peer of the process can run."""
    monkeypatch.setattr(scattermoe.importlib.util, "find_spec", lambda name: True)

    def why_not(experts: int) -> str | None:
        w1, w2 = (torch.empty(experts, *size, device="meta") for size in ((4096, 7168), (7168, 2048)))
        problem: Any = SimpleNamespace(w1=w1, w2=w2, form=Form(device="cuda"))
        return scattermoe.ScatterMoE().why_not(problem)

    assert "addresses weights" in (why_not(256) or "")
    assert why_not(64) is None
