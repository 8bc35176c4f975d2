"""No test is skipped in silence: the end of a run says how many and why."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CONFTEST = Path(__file__).parents[1] / "conftest.py"


def skipped(nodeid: str, reason: str, *keywords: str) -> Any:
    """A report of a test; without keywords it is one of a module's collection, which has none."""
    report = SimpleNamespace(nodeid=nodeid, longrepr=("file.py", 3, f"Skipped: {reason}"))
    if keywords:
        report.keywords = dict.fromkeys(keywords, 1)
    return report


def test_reasons_are_counted_and_modules_too() -> None:
    spec = importlib.util.spec_from_file_location("conftest_alone", CONFTEST)
    assert spec is not None and spec.loader is not None
    conftest: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    reports = [
        skipped("tests/a.py::test_x[1]", "no triton", "test_x"),
        skipped("tests/a.py::test_x[2]", "no triton", "test_x"),
        skipped("tests/b.py", "needs transformers"),
        skipped("tests/gpu/c.py::test_y", "no GPU", "gpu", "test_y"),
    ]
    lines: list[str] = []
    conftest.pytest_terminal_summary(SimpleNamespace(getreports=lambda kind: reports, write_line=lines.append))
    assert lines[:2] == ["2 skipped in tests/a.py: no triton", "1 skipped in tests/b.py: needs transformers"]
    assert len(lines) == 3 and lines[2].startswith("1 GPU tests skipped: ")
