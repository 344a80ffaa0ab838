"""Draws the picture of docs/evidence.md: final losses against a tuned AdamW, a dot for each seed. SVG, light and dark.

It is readable at the width of a phone, and has the same bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from evidence.earlier import of_demo
from evidence.rows import Row, masked_rows
from evidence.runs import Record, Results
from evidence.setups import CONTROL
from evidence.table import Comparison, said
from selective.compare.intervals import Interval, t_interval
from selective.compare.race import final

WIDTH = 420
FEWEST = 3  # seeds of a row
TITLE, UNIT = "Final loss against a tuned AdamW", "nats, below 0 is better; a dot for each seed, bars are 95 %"
_LEFT, _ROW, _HEAD, _TOP, _BOTTOM = 12, 40, 30, 48, 34
_FIRST, _LAST, _LOW, _HIGH = 30, 390, -0.28, 0.12  # pixels, and what they stand for
_TICKS = (-0.2, -0.1, 0.0, 0.1)
ROTATED = {"AdamW in Soap": "Soap()", "Cautious on AdamW in Soap": "Cautious() in Soap()"}
OF_TWO_RATES = {
    **ROTATED,
    "AdamW, norm controlled": "norm control",
    "AdamW in Soap, norm controlled": "norm control in Soap()",
    "Muon": "Muon",
    "Cautious on AdamW in Soap, norm controlled": "Cautious(), Soap(), norm control",
}
_STYLE = """
  .card { fill: #ffffff; stroke: #d8dee4; }
  text { fill: #1f2328; font: 14px system-ui, sans-serif; }
  .title, .head { font-weight: 600; }
  .unit, .tick { fill: #59636e; font-size: 12px; }
  .dot { fill: #1f5f8b; fill-opacity: 0.65; }
  .bar { stroke: #1f5f8b; stroke-width: 2; }
  .grid { stroke: #d8dee4; }
  .zero { stroke: #b31d28; stroke-dasharray: 4 3; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #131416; stroke: #3d444d; }
    text { fill: #e6e8eb; }
    .unit, .tick { fill: #a9b3bd; }
    .dot { fill: #7fc1ec; }
    .bar { stroke: #7fc1ec; }
    .grid { stroke: #3d444d; }
    .zero { stroke: #ff8a80; }
  }
"""


@dataclass(frozen=True)
class Shown:
    """A row: the final losses of its seeds less those of AdamW with the same seeds."""

    label: str
    differences: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        return t_interval(self.differences)


def _shown(label: str, mine: Mapping[int, Record], base: Mapping[int, Record]) -> list[Shown]:
    """The row, unless it has too few seeds, or one that diverged."""
    both = [(final(mine[seed]), final(base[seed])) for seed in sorted(mine.keys() & base.keys())]
    differences = tuple(a - b for a, b in both)
    finite = len(both) >= FEWEST and all(abs(value) < float("inf") for value in differences)
    return [Shown(label, differences)] if finite else []


def _rows(measurements: Path, rows: Sequence[Row], label: Callable[[Row], str]) -> list[Shown]:
    """The rows of the model with 34M parameters that have enough seeds at their best rate, against AdamW's there."""
    comparison = Comparison(Results.read(measurements / "evidence"), "python-34m")
    by_seed = [(row, comparison.by_seed(row), comparison.by_seed(row.baseline)) for row in rows]
    return [shown for row, mine, base in by_seed for shown in _shown(label(row), mine, base)]


def _masks(measurements: Path) -> list[Shown]:
    rows = [row for row in masked_rows("AdamW")[2:] if not row.setup.startswith(CONTROL)]
    return _rows(measurements, rows, lambda row: row.setup.removesuffix(" on AdamW"))


def _rotations(measurements: Path) -> list[Shown]:
    return _rows(measurements, [Row(setup, "AdamW") for setup in ROTATED], lambda row: ROTATED[row.setup])


def _two_rates(measurements: Path) -> list[Shown]:
    """The rows with a rate of its own for embeddings, head and vectors, against AdamW with two rates as well."""
    rows = [Row(setup, "AdamW", apart=True, base_apart=True) for setup in OF_TWO_RATES]
    return _rows(measurements, rows, lambda row: OF_TWO_RATES[row.setup])


def _demo(measurements: Path) -> list[Shown]:
    runs = of_demo(measurements / "2026-11-30-demo.json")
    return [s for index, label in ((1, "Cautious()"), (3, "Soap()")) for s in _shown(label, runs[index], runs[0])]


SECTIONS: dict[str, Callable[[Path], list[Shown]]] = {
    "34M parameters, a mask alone": _masks,
    "34M parameters, a rotation": _rotations,
    "34M parameters, two learning rates, as AdamW has": _two_rates,
    "0.47M parameters, the demo": _demo,
}


def draw(measurements: Path) -> str:
    """The picture as SVG, from the files of this folder."""
    parts, y = [], _TOP
    for head, rows_of in SECTIONS.items():
        if rows := rows_of(measurements):
            parts.append(f'<text class="head" x="{_LEFT}" y="{y + 18}">{escape(head)}</text>')
            y += _HEAD
            for row in rows:
                parts += _row(row, y)
                y += _ROW
    height = y + _BOTTOM
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        f'<text class="title" x="{_LEFT}" y="22">{TITLE}</text>',
        f'<text class="unit" x="{_LEFT}" y="40">{UNIT}</text>',
        *_axis(y), *parts, "</svg>", "",
    ])  # fmt: skip


def _x(value: float) -> str:
    inside = min(max(value, _LOW), _HIGH)
    return f"{_FIRST + (inside - _LOW) / (_HIGH - _LOW) * (_LAST - _FIRST):.1f}"


def _axis(bottom: int) -> list[str]:
    parts = []
    for tick in _TICKS:
        kind, at = "zero" if tick == 0 else "grid", _x(tick)
        parts.append(f'<line class="{kind}" x1="{at}" y1="{_TOP}" x2="{at}" y2="{bottom}"/>')
        text = f"{tick:+.1f}".replace("-", "−") if tick else "AdamW"
        parts.append(f'<text class="tick" x="{at}" y="{bottom + 18}" text-anchor="middle">{text}</text>')
    return parts


def _row(row: Shown, top: int) -> list[str]:
    """The label and the figures above the bar and the dots."""
    interval, y = row.interval, top + 28
    half = interval.half or 0.0
    low, high = _x(interval.mean - half), _x(interval.mean + half)
    return [
        f'<text class="label" x="{_LEFT + 8}" y="{top + 16}">{escape(row.label)}</text>',
        f'<text class="figures" x="{WIDTH - _LEFT}" y="{top + 16}" text-anchor="end">{said(interval, sign="+")}</text>',
        f'<line class="bar" x1="{low}" y1="{y}" x2="{high}" y2="{y}"/>',
        *(f'<circle class="dot" cx="{_x(value)}" cy="{y}" r="4"/>' for value in row.differences),
    ]
