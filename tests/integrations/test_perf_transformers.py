"""Qwen3-MoE's experts in the benchmark: by backends of transformers, and by sonicmoe through its adapter."""

from __future__ import annotations

from pathlib import Path

import pytest

from perf import ledger, run

pytest.importorskip("transformers", minversion="5.8", reason="needs the extra `transformers`")

TINY = ["--device", "cpu", "--thiek", "48,32,16,8,2", "--repeats", "2", "--warm-seconds", "0", "--quiet"]
PEERS = ["transformers-grouped_mm", "transformers-eager", "sonicmoe.transformers"]


@pytest.mark.parametrize("router", [True, False])
def test_each_is_right_and_measured(router: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if router else ["--no-router"]
    assert run.main([*TINY, "--out", str(tmp_path), "--what", "both", "--peer", *PEERS, *more]) == 0
    rows = ledger.read(tmp_path)
    assert {(r.impl, r.variant) for r in rows} >= {(peer, "both") for peer in PEERS}, capsys.readouterr().out
    assert all(r.error is not None and 0 < r.error < 0.02 for r in rows if r.impl in PEERS)


def test_the_adapter_is_ours_and_takes_torchs_choice_of_experts() -> None:
    from perf.layers import OWN_ROUTER
    from perf.peers import PEERS as ALL

    assert "sonicmoe.transformers" in ALL and "sonicmoe.transformers" not in OWN_ROUTER
    assert ALL["sonicmoe.transformers"].name.startswith("sonicmoe"), "a failure of it is a failure of the run"
