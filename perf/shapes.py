"""The shapes that are measured, by name."""

from __future__ import annotations

from typing import NamedTuple

from sonicmoe.errors import InvalidArgument


class Shape(NamedTuple):
    """T tokens, H hidden, I intermediate (of one expert), E experts, K experts per token."""

    name: str
    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int

    @property
    def thiek(self) -> tuple[int, int, int, int, int]:
        return self[1:]

    @property
    def rows(self) -> int:
        """R of plain top-K."""
        return self.T * self.K

    def with_tokens(self, tokens: int) -> Shape:
        return self._replace(name=f"{self.name}@{tokens}", T=tokens)


def _sizes() -> list[Shape]:
    """The paper's twelve: one size in three granularities, the finest under the size's own name."""
    table = {
        "1.4b": (40960, 768, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        "7b": (24576, 1536, ((256, 128, 8), (512, 64, 4), (1024, 32, 2))),
        "30b": (32768, 4096, ((256, 256, 16), (512, 128, 8), (1024, 64, 4))),
        "120b": (32768, 4096, ((512, 256, 16), (1024, 128, 8), (2048, 64, 4))),
    }
    return [
        Shape(size if position == 0 else f"{size}-{iek[0]}", tokens, hidden, *iek)
        for size, (tokens, hidden, kinds) in table.items()
        for position, iek in enumerate(kinds)
    ]


def _token_rounding() -> list[Shape]:
    table = (
        (1536, 256, 8, (64, 128, 256, 512)),
        (1536, 1024, 2, (16, 32, 64, 128)),
        (4096, 512, 8, (64, 128, 256, 512)),
        (4096, 1024, 4, (32, 64, 128, 256)),
    )
    return [
        Shape(f"tr-{hidden}-{inter}-{experts}", 16384, hidden, inter, experts, k)
        for hidden, inter, k, counts in table
        for experts in counts
    ]


TWELVE = _sizes()
FINE = [
    Shape("7b-64", 24576, 1536, 64, 512, 32),
    Shape("7b-128", 24576, 1536, 128, 256, 16),
    Shape("30b-64", 32768, 4096, 64, 1024, 64),
    Shape("30b-128", 32768, 4096, 128, 512, 32),
]
OPEN = [
    Shape("olmoe", 32768, 2048, 1024, 64, 8),
    Shape("qwen3-235b", 32768, 4096, 1536, 128, 8),
    Shape("qwen3-next", 32768, 2048, 512, 512, 10),
    Shape("deepseek-v3.2", 32768, 7168, 2048, 256, 8),
    Shape("gpt-oss-20b", 32768, 2880, 2880, 32, 4),
    Shape("kimi-linear", 32768, 2304, 1024, 256, 8),
]
TOKEN_ROUNDING = _token_rounding()
SHAPES = {s.name: s for s in TWELVE + FINE + OPEN + TOKEN_ROUNDING}
MAIN = [SHAPES[name] for name in ("7b", "30b", "120b")]
GROUPS = {
    "main": MAIN,
    "twelve": TWELVE,
    "fine": FINE,
    "open": OPEN,
    "token-rounding": TOKEN_ROUNDING,
    "all": list(SHAPES.values()),
}


def named(names: list[str]) -> list[Shape]:
    """The shapes of these names and names of groups, each once, in the order asked for."""
    found: dict[str, Shape] = {}
    for name in names:
        if name.lower() not in GROUPS and name.lower() not in SHAPES:
            raise InvalidArgument("shape", repr(name), f"a group ({', '.join(GROUPS)}) or one of {', '.join(SHAPES)}")
        shapes = GROUPS.get(name.lower()) or [SHAPES[name.lower()]]
        found.update({s.name: s for s in shapes})
    return list(found.values())


def parse_thiek(text: str) -> Shape:
    """The shape that "T,H,I,E,K" says, under its own name if it has one."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
        tokens, hidden, inter, experts, k = numbers
    except ValueError:
        raise InvalidArgument("thiek", repr(text), "five integers T,H,I,E,K") from None
    if min(numbers) < 1 or k > experts:
        raise InvalidArgument("thiek", repr(text), "positive T,H,I,E,K with K <= E")
    for shape in SHAPES.values():
        if shape.thiek == numbers:
            return shape
    return Shape(text, tokens, hidden, inter, experts, k)
