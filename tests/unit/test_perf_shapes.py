"""The shapes that the benchmark knows by name."""

from __future__ import annotations

import pytest

from perf import shapes
from perf.shapes import SHAPES, named, parse_thiek
from sonicmoe import InvalidArgument


def test_the_twelve_keep_what_the_paper_says() -> None:
    kept_mib = {"1.4b": 380, "7b": 264, "30b": 768, "120b": 1280}
    assert len(shapes.TWELVE) == 12
    for shape in shapes.TWELVE:
        kept = 2 * shape.T * shape.H + 4 * shape.rows * shape.I
        assert round(kept / (1 << 20)) == pytest.approx(kept_mib[shape.name.split("-")[0]], abs=5)


def test_granularity_does_not_change_flops() -> None:
    for size in ("1.4b", "7b", "30b", "120b"):
        flops = {s.rows * s.I * s.H for s in (*shapes.TWELVE, *shapes.FINE) if s.name.split("-")[0] == size}
        assert len(flops) == 1, size


def test_names() -> None:
    assert SHAPES["7b"].thiek == (24576, 1536, 256, 128, 8)
    assert SHAPES["7b-512"].thiek == (24576, 1536, 512, 64, 4)
    assert SHAPES["120b-2048"].thiek == (32768, 4096, 2048, 64, 4)
    assert SHAPES["tr-4096-1024-256"].thiek == (16384, 4096, 1024, 256, 4)
    assert SHAPES["deepseek-v3.2"].thiek == (32768, 7168, 2048, 256, 8)
    assert len(shapes.OPEN) == 6 and len(shapes.TOKEN_ROUNDING) == 16
    assert named(["main", "7B", "twelve"])[:4] == [*shapes.MAIN, SHAPES["1.4b"]]
    with pytest.raises(InvalidArgument, match="shape: got 'nothing'"):
        named(["nothing"])


def test_thiek() -> None:
    assert parse_thiek("24576,1536,256,128,8") is SHAPES["7b"]
    assert parse_thiek("5,8,16,4,2").thiek == (5, 8, 16, 4, 2)
    assert parse_thiek("5,8,16,4,2").with_tokens(9).thiek == (9, 8, 16, 4, 2)
    for text in ("1,2,3", "1,2,3,4,x", "5,8,16,4,8", "0,8,16,4,2"):
        with pytest.raises(InvalidArgument, match="thiek"):
            parse_thiek(text)
