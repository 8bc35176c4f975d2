"""The ledger: one row per measurement, written by the program and never by hand."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """A measurement. An empty cell is None: not measured or without meaning here.

    impl       "sonicmoe", or a peer's name; "cublas" is the bound of equal-sized batched products
    variant    a kernel's name, or "forward", "backward", "both", "inference", "kept", "host-forward", ...
    ms_p*      percentiles of the repeats; tflops model FLOPs over ms_p50; gbps distinct bytes over ms_p50
    roofline   the floor over ms_p50: 1 is as fast as the GPU's ceilings allow
    router     whether the router (product, top-K, plan) is in the measurement
    rows       routed rows; differs from T*K with token rounding
    skew       deviation of a bias per expert on the logits
    tile_m     of token rounding, as is rule
    saved_mib  kept from forward to backward; bound_mib what the paper keeps, 2*T*H + 4*R*I bytes in bf16
    peak_mib   of forward and backward, beside x, dO and weights; peak_bound_mib what is alive in the paper's steps
    of_bound   speed relative to `cublas` (aggregate: to a copy) of the same run
    setup_s    seconds of compilation, tuning and first call, outside the timing; of a first call, what the second one
               does not take
    run        when the run began that the row is of: rows of one run and shape were measured in turns
    """

    date: str
    gpu: str
    driver: str
    torch: str
    dsl: str
    commit: str
    impl: str
    variant: str
    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int
    dtype: str
    routing: str
    ms_p20: float | None = None
    ms_p50: float | None = None
    ms_p80: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    roofline: float | None = None
    shape: str = ""
    activation: str = "swiglu"
    bias: bool = False
    router: bool = False
    backend: str = ""
    rows: int | None = None
    of_bound: float | None = None
    error: float | None = None
    saved_mib: float | None = None
    peak_mib: float | None = None
    bound_mib: float | None = None
    peak_bound_mib: float | None = None
    host_us: float | None = None
    setup_s: float | None = None
    repeats: int | None = None
    protocol: str = ""
    run: str = ""
    skew: float = 0.0
    tile_m: int = 128
    rule: str = "nearest"

    @property
    def key(self) -> tuple[object, ...]:
        """What two rows must share to be compared: everything that says what was measured, not when and on what."""
        return (self.impl, self.backend, self.routing, self.tile_m, self.rule, self.router, *self.subject)

    @property
    def subject(self) -> tuple[object, ...]:
        """What implementations and routings are compared on."""
        thiek = (self.T, self.H, self.I, self.E, self.K)
        return (self.variant, *thiek, self.dtype, self.activation, self.bias, self.skew)


COLUMNS = tuple(f.name for f in fields(Row))
_TYPES = get_type_hints(Row)
_FORM = {f.name: f.default for f in fields(Row) if f.name in ("activation", "bias", "skew", "tile_m", "rule")}


def _text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _value(column: str, text: str) -> Any:
    kind = _TYPES[column]
    if kind is str:
        return text
    if kind is bool:
        return text == "yes"
    if text == "":
        return None
    return int(text) if kind in (int, int | None) else float(text)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to a ledger, with its header if the file is new.

    Raises ValueError if the file has other columns: an older ledger is left as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    check_columns(path)
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        writer.writerows([_text(v) for v in asdict(row).values()] for row in rows)


def check_columns(path: Path) -> None:
    """Raises ValueError for a file to which no rows can be appended, as its columns are others."""
    if path.exists():
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != list(COLUMNS):
            raise ValueError(f"{path} has other columns than this version writes; choose another --out")


def read(path: Path) -> list[Row]:
    """The rows of a ledger, or of every *.csv below a folder, oldest first. Columns that it lacks take defaults.

    Raises ValueError for a file with anything else.
    """
    files = sorted(path.rglob("*.csv")) if path.is_dir() else [path]
    return sorted((row for name in files for row in _rows(name)), key=lambda r: r.date)


def _rows(path: Path) -> list[Row]:
    rows = []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                known = {c: _value(c, t) for c, t in record.items() if c in _TYPES and t is not None}
                rows.append(Row(**known))
        except (TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {reader.line_num}: no row of a ledger") from error
    return rows


def newest(rows: Iterable[Row]) -> list[Row]:
    """The last row of each key."""
    return list({row.key: row for row in sorted(rows, key=lambda r: r.date)}.values())


def side_by_side(rows: Iterable[Row], ours: Callable[[Row], bool]) -> list[Row]:
    """Of each variant of each layer the rows of one run, so that they can be compared with each other.

    The run is the newest that measured ours beside something else, or the newest of ours where none did. What was
    measured without ours is left out.
    """
    runs: dict[tuple[object, ...], dict[str, list[Row]]] = {}
    for row in rows:
        runs.setdefault(row.subject, {}).setdefault(row.run, []).append(row)
    chosen: list[Row] = []
    for of_run in runs.values():
        mine = [r for r in of_run.values() if any(map(ours, r))]
        beside = [r for r in mine if not all(map(ours, r))] or mine
        if beside:
            chosen += newest(max(beside, key=lambda r: max(row.date for row in r)))
    return chosen


def usual(rows: Iterable[Row]) -> list[Row]:
    """What tables and plots show without saying so: the kernels on a GPU, in bf16 (logits in fp32), swiglu, no biases,
    no skew, token rounding to the nearest 128.
    """

    def is_usual(r: Row) -> bool:
        by = r.dtype in ("bf16", "fp32") and (r.backend != "torch" or r.gpu == "cpu")
        return by and all(getattr(r, name) == default for name, default in _FORM.items())

    return [r for r in rows if is_usual(r)]


def layers_side_by_side(rows: Iterable[Row], variants: Sequence[str]) -> list[Row]:
    """Layers with their router and top-K, and the bound, of one run for each layer and variant."""
    topk = [r for r in rows if r.routing == "topk"]
    mine = [r for r in topk if r.variant in variants and (r.router or r.impl == "cublas")]
    return side_by_side(mine, lambda r: r.impl.startswith("sonicmoe") and r.router)


def experts_side_by_side(rows: Iterable[Row]) -> list[Row]:
    """Backward of the experts alone, by top-K, and the bound, of one run for each layer."""
    alone = [r for r in rows if r.routing == "topk" and r.variant == "backward" and not r.router]
    return side_by_side([r for r in alone if r.impl in ("sonicmoe", "cublas")], lambda r: r.impl == "sonicmoe")


def rounding_side_by_side(rows: Iterable[Row]) -> list[Row]:
    """The experts alone by both routings, of one run for each layer and variant."""
    mine = [r for r in rows if r.impl == "sonicmoe" and not r.router and r.variant in ("forward", "backward", "both")]
    return side_by_side(mine, lambda r: r.routing == "token_rounding")
