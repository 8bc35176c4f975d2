"""Cross-compilation: what is listed, what is read off a cubin, and that the record is compared with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sonicmoe.activations import Activation
from sonicmoe.configs.choice import SPEEDS, candidates, family
from sonicmoe.configs.tile import TileConfig
from sonicmoe.cute_kernels.aggregate import AggregateSpec
from sonicmoe.cute_kernels.variants import GemmSpec
from sonicmoe.errors import InvalidArgument
from sonicmoe.jit import aot, compile, inspect

ROOT = Path(__file__).parents[2]
VARIANTS = "up_proj down_proj down_dgrad down_wgrad up_dgrad up_wgrad down_wgrad_add up_wgrad_add".split()
SMALL = AggregateSpec(64, "bf16", 2, weighted=True)


def test_every_variant_with_every_schedule_and_width_is_listed() -> None:
    listed = {(s.variant, s.tile) for s in aot.specs(["variants"]) if isinstance(s, GemmSpec)}
    assert {variant for variant, _ in listed} == set(VARIANTS)
    for variant in VARIANTS[:6]:
        forms = {(t.schedule, t.tile_n, t.cluster) for v, t in listed if v == variant}
        assert forms == set(SPEEDS[family(variant)]), variant


def test_specs_are_valid_named_and_each_listed_once() -> None:
    specs = aot.specs()
    assert len({repr(s) for s in specs}) == len(specs) > 100
    for spec in specs:
        assert spec.why_invalid() is None and spec.name.endswith(f"_{compile.ARCH}")


def test_the_record_has_what_is_listed() -> None:
    record = json.loads((ROOT / aot.RECORD).read_text())
    assert set(record["kernels"]) == {aot.label(s) for s in aot.specs()}
    for name, resources in record["kernels"].items():
        assert resources["stack"] == 0 and "LDL" not in resources["opcodes"], name
        assert resources["shared"] <= inspect.SHARED_MEMORY_IN_ALL, name
        if name.startswith("GemmSpec"):
            assert resources["opcodes"]["HGMMA"] >= 4 and len(resources["setmaxnreg"]) == 2, name


def test_resources_of_a_gemm() -> None:
    tile = candidates("down_proj", 8, 256, 1)[0]
    spec = GemmSpec("down_proj", 8, 256, 128, "bf16", tile)
    found = inspect.resources(compile.compile_for_inspection(spec))
    table = 32 + 4
    assert found.shared == tile.shared_memory(table) + inspect.RESERVED
    assert found.opcodes["UTMALDG"] > 0 and found.opcodes["UTMASTG"] > 0 and "LDGSTS" not in found.opcodes
    assert found.setmaxnreg == (24, 240) and found.registers == 168
    assert found.faults() == []


@pytest.mark.parametrize("variant", ["up_proj", "down_dgrad", "down_wgrad", "up_wgrad"])
def test_no_wide_multiply_add_in_a_gathers_loop(variant: str) -> None:
    """Eight a k step would cost the products 3 to 6%: docs/notes/2026-11-24-gathers.md. One finds a step's indices."""
    halves, act = (2, Activation("swiglu")) if variant in ("up_proj", "down_dgrad") else (1, None)
    tile = candidates(variant, 8, 256, halves)[0]
    spec = GemmSpec(variant, 8, 256, 1536, "bf16", tile, halves, act=act)
    lines = inspect.disassembled(compile.compile_for_inspection(spec))[1].splitlines()
    gathers = [i for i, line in enumerate(lines) if "LDGSTS.E.BYPASS" in line]
    begin = max(i for i in range(gathers[0]) if "TRYWAIT" in lines[i])
    end = min(i for i in range(gathers[-1], len(lines)) if "ARRIVES.LDGSTSBAR" in lines[i])
    loop = lines[begin:end]
    assert len(gathers) == 8 and any("UTMALDG" in line for line in loop)
    assert sum("IMAD.WIDE" in line for line in loop) <= ("wgrad" in variant), "\n".join(loop)


def test_accesses_before_the_wait_for_earlier_launches_are_counted() -> None:
    """Only the plan reads before it, ids that the launch before its first has left; and what runs beside a launch."""
    recorded = json.loads(Path(__file__).with_name("resources.json").read_text())["kernels"]
    early = {name for name, found in recorded.items() if found["early"]}
    beside = {name for name in recorded if "beside=True" in name}
    assert len(beside) == 2 and beside <= early
    assert {name.partition("(")[0] for name in early - beside} == {"PlanSpec"}
    kernel = "\t.section\t.text.%s\n  LDG.E R2, [R4] ;\n  ACQBULK ;\n  STG.E [R4], R2 ;\n"
    assert inspect.early(kernel % "a" + (kernel % "b").replace("LDG.E", "S2R")) == 1


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"opcodes": {"STL": 3, "ACQBULK": 2}}, "STL 3"),
        ({"opcodes": {"ACQBULK": 1}}, "does not wait"),
        ({"stack": 8}, "stack frame of 8"),
        ({"shared": inspect.SHARED_MEMORY_IN_ALL + 8}, "shared memory"),
        ({"setmaxnreg": (48, 232)}, "waits for ever"),
    ],
)
def test_faults(change: dict[str, Any], fault: str) -> None:
    fine: dict[str, Any] = {"kernels": 2, "registers": 168, "stack": 0, "shared": 1024, "setmaxnreg": (56, 224)}
    fine["early"] = 0
    fine["opcodes"] = {"LDG": 1, "ACQBULK": 2}
    assert inspect.Resources(**fine).faults() == []
    (found,) = inspect.Resources(**{**fine, **change}).faults()
    assert fault in found


def _result(**change: Any) -> dict[str, Any]:
    resources: dict[str, Any] = {"registers": 40, "stack": 0, "shared": 1024, "setmaxnreg": [], "opcodes": {"LDG": 2}}
    return {"resources": {**resources, **change}, "faults": []}


def test_verdicts() -> None:
    record = {"dsl": aot.dsl_version(), "kernels": {"a": _result()["resources"], "b": _result()["resources"]}}
    same = {"a": _result(), "b": _result()}
    assert aot.verdicts(same, record, complete=True) == []
    assert aot.verdicts({"a": _result()}, record, complete=True) == ["b: in the record, but no longer compiled"]
    assert aot.verdicts({"a": _result()}, record, complete=False) == []
    changed = {"a": _result(registers=48, opcodes={"LDG": 3, "STL": 1}), "b": _result()}
    assert aot.verdicts(changed, record, complete=True) == ["a: registers 40 -> 48, LDG 2 -> 3, STL 0 -> 1"]
    assert aot.verdicts({**same, "c": _result()}, record, complete=True) == ["c: not in the record"]
    broken = {**same, "b": {"faults": ["no"]}}
    assert aot.verdicts(broken, record, complete=True) == ["b: no"]


def test_another_compilers_record_is_not_compared(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"dsl": "0.0", "kernels": {"a": _result(registers=1)["resources"]}}
    assert aot.verdicts({"a": _result()}, record, complete=True) == []
    assert "counts are not compared" in capsys.readouterr().out


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(aot, "specs", lambda families: [SMALL])
    path = tmp_path / "record.json"
    only = ["--record", str(path), "--jobs", "1", "--only", "aggregate"]
    assert aot.main([*only, "--update"]) == 0
    assert list(json.loads(path.read_text())["kernels"]) == [repr(SMALL)]
    assert aot.main(only) == 0
    path.write_text(path.read_text().replace('"registers": ', '"registers": 9'))
    assert aot.main(only) == 1
    assert "registers" in capsys.readouterr().out


def test_another_compilers_entries_are_not_kept_under_this_ones_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A record has one version for all of its kernels."""
    monkeypatch.setattr(aot, "compile_all", lambda *a: {"a": _result()})
    path = tmp_path / "record.json"
    before = json.dumps({"dsl": "0.0", "kernels": {"a": _result()["resources"], "b": _result()["resources"]}})
    path.write_text(before)
    update = ["--record", str(path), "--update"]
    with pytest.raises(SystemExit) as stopped:
        aot.main([*update, "--only", "topk"])
    assert stopped.value.code == 2 and path.read_text() == before
    assert "the record is of DSL 0.0" in capsys.readouterr().err.splitlines()[-1]
    assert aot.main(update) == 0
    assert list(json.loads(path.read_text())["kernels"]) == ["a"]
    path.write_text(json.dumps({"dsl": "0.0", "kernels": {}}))
    assert aot.main([*update, "--only", "topk"]) == 0


def test_all_families_in_any_order_are_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "compile_all", lambda *a: {"a": _result()})
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"dsl": aot.dsl_version(), "kernels": {"old": _result()["resources"]}}))
    every = ["--record", str(path), "--only", *reversed(aot.FAMILIES), "topk"]
    assert aot.main(every) == 1, "one that is no longer compiled"
    assert aot.main([*every, "--update"]) == 0
    assert list(json.loads(path.read_text())["kernels"]) == ["a"]


def test_a_spec_that_cannot_be_compiled_raises_before_the_compiler() -> None:
    spec = GemmSpec("down_proj", 8, 250, 128, "bf16", TileConfig("pingpong", 128, 4, 2))
    with pytest.raises(InvalidArgument, match="multiples of 8"):
        compile.compile_spec(spec)
