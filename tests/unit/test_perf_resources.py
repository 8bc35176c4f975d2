"""The table of configurations in docs/grouped_gemm.md is what the kernels are."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("cutlass")
from perf import resources


def test_the_page_is_up_to_date() -> None:
    assert resources.main(["--check"]) == 0, "python -m perf.resources writes it"


def test_a_stale_page_is_noticed_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    fresh = resources.FILE.read_text()
    page.write_text(fresh.replace("| 56 / 224 |", "| 57 / 224 |"))
    assert resources.main(["--file", str(page), "--check"]) == 1
    assert "python -m perf.resources" in capsys.readouterr().out
    assert resources.main(["--file", str(page)]) == 0
    assert page.read_text() == fresh
