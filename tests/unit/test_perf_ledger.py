"""The ledger and the comparison of two."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from perf import compare, environment, ledger
from perf.ledger import COLUMNS, Row
from perf.problem import Form
from perf.protocol import HostClock, Settings
from perf.roofline import Ceilings
from perf.session import Session
from perf.shapes import SHAPES

DEMANDED = (
    "date,gpu,driver,torch,dsl,commit,impl,variant,T,H,I,E,K,dtype,routing,ms_p20,ms_p50,ms_p80,tflops,gbps,roofline"
)


def row(**cells: object) -> Row:
    base = Row(
        date="2026-01-01T00:00:00Z",
        gpu="NVIDIA H200",
        driver="580",
        torch="2.11",
        dsl="4.8.1",
        commit="abc",
        impl="sonicmoe",
        variant="up_proj",
        T=24576,
        H=1536,
        I=256,
        E=128,
        K=8,
        dtype="bf16",
        routing="topk",
        ms_p50=0.5,
        shape="7b",
    )
    return dataclasses.replace(base, **cells)  # type: ignore[arg-type]


def test_the_columns_begin_as_the_format_says() -> None:
    assert ",".join(COLUMNS).startswith(DEMANDED)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    rows = [
        row(tflops=123.5, bias=True, rows=7, host_us=None),
        row(date="2026-01-02T00:00:00Z", shape='a, "b"', router=True, error=1e-9),
    ]
    path = tmp_path / "gpu" / "x.csv"
    ledger.append(path, rows[:1])
    ledger.append(path, rows[1:])
    assert ledger.read(path) == rows
    assert ledger.read(tmp_path) == rows
    assert path.read_text().count("date,gpu") == 1


def test_another_header_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("date,gpu\n")
    with pytest.raises(ValueError, match="other columns"):
        ledger.append(path, [row()])
    assert path.read_text() == "date,gpu\n"


def test_newest_row_of_each_measurement() -> None:
    old, new = row(ms_p50=1.0), row(date="2026-01-03T00:00:00Z", ms_p50=2.0)
    other = row(variant="down_proj")
    found = ledger.newest([new, other, old])
    assert len(found) == 2 and any(r is new for r in found) and any(r is other for r in found)


UNUSUAL = ({"skew": 3.0}, {"dtype": "fp16"}, {"bias": True}, {"activation": "geglu"}, {"backend": "torch"})
ROUNDED = ({"tile_m": 64}, {"rule": "down"})


@pytest.mark.parametrize("cells", [*UNUSUAL, *({"routing": "token_rounding", **c} for c in ROUNDED)], ids=str)
def test_another_form_takes_no_row_s_place(tmp_path: Path, cells: dict[str, object]) -> None:
    usual = row(ms_p50=1.0, backend="cute", routing=cells.get("routing", "topk"))
    other = dataclasses.replace(usual, ms_p50=9.0, date="2026-01-03T00:00:00Z", **cells)  # type: ignore[arg-type]
    ledger.append(tmp_path / "a.csv", [usual, other])
    found = ledger.read(tmp_path)
    assert len(ledger.newest(found)) == 2 and ledger.usual(found) == [usual]
    assert compare.changes([usual], [other]) == []


def test_a_run_writes_its_form(tmp_path: Path) -> None:
    form = Form(device="cpu", backend="torch", skew=0.5, tile_m=64, rule="down")
    where = environment.Environment("cpu", "", "", "", "")
    session = Session(where, HostClock(), Settings(), tmp_path / "a.csv", Ceilings(1.0, 1.0))
    rounded = session.row(SHAPES["7b"], form, "sonicmoe", "both", routing="token_rounding")
    topk = session.row(SHAPES["7b"], form, "sonicmoe", "both")
    assert (rounded.skew, rounded.tile_m, rounded.rule) == (0.5, 64, "down")
    assert (topk.skew, topk.tile_m, topk.rule) == (0.5, 128, "nearest")


def test_what_is_compared_is_of_one_run() -> None:
    def at(day: int, impl: str, ms: float, **cells: object) -> Row:
        date = f"2026-01-{day:02}T00:00:00Z"
        return row(impl=impl, ms_p50=ms, variant="both", router=impl != "cublas", date=date, run=date, **cells)

    both = [at(1, "sonicmoe", 5.0), at(1, "peer", 9.0), at(1, "cublas", 4.0)]
    again = [at(2, "sonicmoe", 3.0), at(2, "peer", 8.0)]
    alone, others = at(3, "sonicmoe", 1.0), [at(4, "peer", 7.0), at(4, "cublas", 2.0)]
    elsewhere = at(3, "sonicmoe", 6.0, T=7)

    def found(rows: list[Row]) -> set[float | None]:
        return {r.ms_p50 for r in ledger.layers_side_by_side(rows, ("both",))}

    assert found([*both, *again, alone, *others]) == {3.0, 8.0}
    assert found([*both, alone, elsewhere]) == {5.0, 9.0, 4.0, 6.0}
    assert found([alone]) == {1.0} and found(others) == set()


@pytest.mark.parametrize(("after_ms", "status"), [(0.5, 0), (0.514, 0), (0.516, 1), (0.4, 0)])
def test_compare_fails_at_three_percent(
    tmp_path: Path, after_ms: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    ledger.append(a, [row(ms_p50=0.7, date="2025-01-01T00:00:00Z"), row(ms_p50=0.5)])
    ledger.append(b, [row(ms_p50=after_ms, commit="def"), row(impl="cublas", ms_p50=9.0)])
    assert compare.main([str(a), str(b)]) == status
    out = capsys.readouterr().out
    assert ("SLOWER" in out) == bool(status) and "abc" in out and "def" in out


def test_compare_keeps_gpus_and_dtypes_apart(tmp_path: Path) -> None:
    before = [row(ms_p50=0.5), row(ms_p50=0.5, dtype="fp16")]
    after = [row(ms_p50=5.0, gpu="NVIDIA H100"), row(ms_p50=0.5, dtype="fp16")]
    found = compare.changes(before, after)
    assert [(c.after.dtype, c.speed) for c in found] == [("fp16", 0.0)]
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    ledger.append(a, before[:1])
    ledger.append(b, after[:1])
    assert compare.main([str(a), str(b)]) == 2


@pytest.mark.parametrize("options", [["nowhere.csv"], ["a.csv", "--limit", "nan"], ["a.csv", "--limit", "-3"]])
def test_compare_tells_what_it_cannot_read(
    tmp_path: Path, options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ledger.append(Path("a.csv"), [row(ms_p50=0.5)])
    with pytest.raises(SystemExit) as stopped:
        compare.main(["a.csv", *options])
    assert stopped.value.code == 2
    assert ("nowhere.csv" if len(options) == 1 else "accepted a finite") in capsys.readouterr().err.splitlines()[-1]


def test_compare_keeps_protocols_apart() -> None:
    before = [row(ms_p50=0.5, protocol="settled"), row(ms_p50=0.7, protocol="alone", variant="down_proj")]
    after = [row(ms_p50=0.6, protocol="settled"), row(ms_p50=0.7, protocol="settled", variant="down_proj")]
    assert [c.after.variant for c in compare.changes(before, after)] == ["up_proj"]


def test_commit_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SONICMOE_COMMIT", "1234567")
    assert environment.commit() == "1234567"
    monkeypatch.delenv("SONICMOE_COMMIT")
    assert environment.commit()


def test_slug() -> None:
    described = environment.Environment("NVIDIA H100 80GB HBM3", "", "", "", "")
    assert described.slug == "nvidia-h100-80gb-hbm3"
