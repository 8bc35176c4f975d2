"""Tables and plots from a ledger made up for the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perf import ledger, plots, quality, report, tables
from perf.ledger import Row
from perf.roofline import KERNELS, PARTS
from perf.shapes import SHAPES

GPU = "NVIDIA Test"


def row(name: str, impl: str, variant: str, ms: float | None, **cells: object) -> Row:
    shape = SHAPES[name.partition("@")[0]]
    thiek = dict(zip("THIEK", shape.thiek, strict=True))
    told = {"date": "2026-01-01T00:00:00Z", "gpu": GPU, "driver": "1", "torch": "2", "dsl": "3", "commit": "abc"}
    told |= {"dtype": "bf16", "routing": "topk", "shape": name, "ms_p50": ms}
    return Row(impl=impl, variant=variant, **{**thiek, **told, **cells})  # type: ignore[arg-type]


def synthetic() -> list[Row]:
    rows = []
    for name, scale in (("7b", 1.0), ("30b", 8.0)):
        for impl, ms in (("sonicmoe", 2.5), ("scattermoe", 7.0), ("cublas", 2.0)):
            router = impl != "cublas"
            rows.append(row(name, impl, "forward", scale * ms / 3, tflops=400 / ms, router=router))
            rows.append(row(name, impl, "both", scale * ms, tflops=1000 / ms, router=router))
            rows.append(row(name, impl, "memory", None, saved_mib=264.0 * ms, peak_mib=1000.0, bound_mib=264.0))
        rows += [
            row(name, "sonicmoe", k, scale * 0.25, tflops=600.0, gbps=3000.0, of_bound=0.97, roofline=0.8)
            for k in KERNELS
        ]
    # The experts alone; the second run has no bound, and the bound of a run with routers is none of theirs.
    rows.append(row("7b", "sonicmoe", "backward", 1.6, tflops=500.0, run="a"))
    rows.append(row("7b", "cublas", "backward", 1.5, tflops=400.0, run="a"))
    rows.append(row("7b", "sonicmoe", "backward", 9.0, tflops=1.0, run="b"))
    rows.append(row("7b", "cublas", "backward", 9.0, tflops=1.0, run="c", date="2026-01-02T00:00:00Z"))
    rows.append(row("7b", "sonicmoe", "backward", 9.0, tflops=1.0, run="c", router=True))
    for count in (256, 4096, 131072):
        rows.append(row(f"7b@{count}", "sonicmoe", "both", count / 1e4, T=count, router=True, tflops=1.0))
    for routing, speed in (("topk", 500.0), ("token_rounding", 600.0)):
        for name in ("tr-1536-1024-64", "tr-1536-1024-128"):
            for variant in ("forward", "backward", "both"):
                rows.append(row(name, "sonicmoe", variant, 1000 / speed, tflops=speed, routing=routing))
    rows.append(row("7b", "sonicmoe", "router-topk", 0.02))
    rows.append(row("7b", "torch", "router-topk", 0.2))
    rows.append(row("7b", "sonicmoe.MoE", "host-forward", 0.12, host_us=120.0))
    rows.append(row("7b", "sonicmoe.MoE", "first-call-cold", 3000.0, setup_s=2.9))
    for count in (256, 131072):
        rows.append(row(f"7b@{count}", "loop", "both", count / 5e3, T=count, router=True))
        rows.append(row(f"7b@{count}", "sonicmoe", "both-from-idle", count / 5e3, T=count, router=True))
    rows += [row("7b", "sonicmoe.MoE", f"breakdown-{part}", 0.3, router=True) for part in (*PARTS, "rest")]
    rows.append(row("7b", "sonicmoe.MoE", "breakdown-layer", 3.0, router=True))
    return rows


def test_every_table_has_its_numbers() -> None:
    text = {name: make(synthetic()) or "" for name, make in report.TABLES.items()}
    assert (
        "| 7b | (24576, 1536, 256, 128, 8) | 0.833 / 2.500 | 2.333 / 7.000 | 0.667 / 2.000 | 400 | 2.80x | 80.0% |"
        in (text["layers"])
    )
    assert text["experts"].split("\n", 2)[2] == "| 7b | (24576, 1536, 256, 128, 8) | 1.600 | 1.500 | 125.0% |"
    assert "up_proj | 0.25 | 600 | 3000 | 97.0% | 80.0% |" in text["kernels"]
    assert text["kernels"].count("\n") == 1 + 2 * len(KERNELS)
    assert "660 / 1000" in text["memory"]
    assert "| topk | 20 | 200 | 10.0x |" in text["router"]
    assert "120 µs" in text["host"] and "3000 ms, 2900 more than the second" in text["host"]
    assert text["breakdown"].endswith("| 7b | 3.000 |" + " 10.0% |" * len(PARTS) + " - | 10.0% |")
    assert "| 256 | 0.026 / 0.051 | 0.051 / - | - | 100 | 2.00x | - |" in text["tokens"]
    assert "| 24576 | 2.500 / - | - | 7.000 / - | 102 | 2.80x | - |" in text["tokens"]
    assert "| 1/32 | 2.000 → 1.667 (+20.0%) |" in text["rounding"]
    assert "abc" in text["provenance"]
    for name, make in report.TABLES.items():
        assert make([]) is None, name


def test_files_are_written_between_marks_only(tmp_path: Path) -> None:
    results, readme = tmp_path / "results" / "x.csv", tmp_path / "README.md"
    ledger.append(results, synthetic())
    before = "# Title\n<!-- perf:begin layers -->\nold\n<!-- perf:end layers -->\nmiddle\n"
    before += "<!-- perf:begin memory -->\n<!-- perf:end memory -->\n"
    readme.write_text(before + "<!-- perf:begin plot-tokens -->\n<!-- perf:end plot-tokens -->\nend\n")
    arguments = ["--ledger", str(results), "--files", str(readme), "--plots", str(tmp_path / "plots")]
    assert report.main([*arguments, "--check"]) == 1
    assert "old" in readme.read_text()
    assert report.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n") and "\nmiddle\n" in text and text.endswith("end\n")
    assert "old" not in text and "2.80x" in text and "660 / 1000" in text
    assert "](plots/tokens.png)" in text
    assert report.main([*arguments, "--check"]) == 0
    drawn = {p.name for p in (tmp_path / "plots").iterdir()}
    assert drawn == {f"{name}.{suffix}" for name in plots.PLOTS for suffix in ("png", "svg")}
    # They are committed.
    assert all(1000 < p.stat().st_size < 80_000 for p in (tmp_path / "plots").iterdir())


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ledger", "{}/resluts"], "ledger: got"),
        (["--ledger", "{}/README.md"], "README.md, line 2: no row of a ledger"),
        (["--ledger", "{}/results", "--gpu", "NVIDIA Tset"], "gpu: got 'NVIDIA Tset'"),
        (["--ledger", "{}/results", "--gpu", "unusual"], "gpu: got 'unusual'"),
        (["--ledger", "{}/empty"], "there is none"),
    ],
    ids=["no ledger", "not a ledger", "no such GPU", "nothing that tables show", "no rows"],
)
def test_tables_are_kept_where_there_is_nothing_to_put_there(
    tmp_path: Path, options: list[str], said: str, check: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*synthetic(), row("7b", "sonicmoe", "both", 1.0, gpu="unusual", dtype="fp16")]
    ledger.append(tmp_path / "results" / "x.csv", rows)
    (tmp_path / "empty").mkdir()
    readme, drawn = tmp_path / "README.md", tmp_path / "plots"
    before = "<!-- perf:begin layers -->\npublished\n<!-- perf:end layers -->\n"
    readme.write_text(before)
    arguments = [*(o.format(tmp_path) for o in options), "--files", str(readme), "--plots", str(drawn)]
    with pytest.raises(SystemExit) as stopped:
        report.main([*arguments, *["--check"][: int(check)]])
    assert stopped.value.code == 2 and readme.read_text() == before and not drawn.exists()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error:" in line)
    assert said in line


def test_without_measurements_it_says_so(tmp_path: Path) -> None:
    text = "<!-- perf:begin layers -->\n<!-- perf:end layers -->\n"
    assert "Not measured on a GPU yet." in report.filled(text, [], "a GPU")
    assert "Not measured on a GPU yet." in report.filled(text.replace("layers", "plot-memory"), [], "a GPU")
    with pytest.raises(ValueError, match="no such table or plot"):
        report.filled(text.replace("layers", "nothing"), [], "a GPU")
    assert plots.draw_all([], tmp_path, GPU) == []


def test_the_gpu_with_the_most_measurements_is_shown(tmp_path: Path) -> None:
    rows = [row("7b", "sonicmoe", v, 9.0) for v in ("up_proj", "down_proj")]
    rows += [row("7b", "sonicmoe", "up_proj", 1.0, gpu="other", date="2027-01-01T00:00:00Z")] * 3
    assert report.most_measured(rows) == GPU and report.most_measured([]) == "a GPU"


def test_cells() -> None:
    assert [tables.cell(v, 3) for v in (0.12345, 1.234, 123.4, 12345.0, None, 7, float("inf"))] == [
        "0.123",
        "1.23",
        "123",
        "12345",
        "-",
        "7",
        "inf",
    ]
    assert tables.markdown(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --: |\n| 1 | 2 |"
    assert tables.text(["a", "bb"], [["xyz", "1"]]) == "a    bb\nxyz   1"


def training(routing: str, seed: int, held_out: float, **pairs: int) -> dict[str, Any]:
    history = [{"held_out": 5.0}, {"held_out": held_out}]
    return {"routing": routing, "seed": seed, "history": history, "pairs": {"chosen": 1000, **pairs}}


def test_losses_are_those_of_the_newest_trainings_on_the_gpu(tmp_path: Path) -> None:
    runs = [
        training("token_rounding", 0, 0.75, dropped=20, padded=10),
        training("topk", 0, 0.7, dropped=0, padded=0),
        training("topk", 1, 0.8, dropped=0, padded=0),
    ]
    for day, gpu, of in (("01", GPU, runs[:1]), ("02", GPU, runs), ("03", "another", runs[:2])):
        folder = tmp_path / "gpu" / f"2026-01-{day}-quality"
        folder.mkdir(parents=True)
        for i, run in enumerate(of):
            (folder / f"{i}.json").write_text(json.dumps({"setting": {"device": gpu}, "runs": [run]}))
    table = quality.losses(quality.read(tmp_path, GPU))
    assert table is not None and table.splitlines()[2:] == [
        "| topk | 0.7000 | 0.8000 | 0.7500 | 0.1000 | 0.0% | 0.0% |",
        "| token_rounding (nearest) | 0.7500 | - | 0.7500 | 0.0000 | 2.0% | 1.0% |",
    ]
    assert quality.losses(quality.read(tmp_path, "no such GPU")) is None
    marked = "<!-- perf:begin quality -->\n<!-- perf:end quality -->\n"
    assert table in report.filled(marked, [], GPU, losses=table)
