"""Tables as text for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def cell(value: object, digits: int = 3) -> str:
    """A number with few digits, "-" for None, text as it is."""
    if value is None:
        return "-"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
    return str(value)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}%"


def text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned: the first to the left, the others to the right."""
    lines = [list(header), *(list(r) for r in rows)]
    widths = [max(len(line[c]) for line in lines) for c in range(len(header))]
    aligned = (
        [value.ljust(w) if c == 0 else value.rjust(w) for c, (value, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(values) + " |"

    rule = ["---"] + ["--:"] * (len(header) - 1)
    return "\n".join([line(header), line(rule), *(line(r) for r in rows)])
