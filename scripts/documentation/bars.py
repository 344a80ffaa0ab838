"""Bar charts as SVG: readable at the width of a phone, in the light and the dark, and the same bytes on every machine.

A row has a label above its bar, so that no label is cut off, and its figures behind the bar as text. Two figures are
two runs: the bar ends at the larger one, and a mark shows the smaller one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape, unescape

WIDTH = 420  # of the picture, in pixels: a phone shows it at about nine tenths of that
_LEFT, _ROW, _BAR, _TOP = 12, 42, 14, 50
_LONGEST = 290  # of a bar; behind it is room for two figures
_STYLE = """
  .card { fill: #ffffff; stroke: #d8dee4; }
  text { fill: #1f2328; font: 14px system-ui, sans-serif; }
  .title { font-weight: 600; }
  .unit { fill: #59636e; font-size: 12px; }
  .ours { fill: #1f5f8b; }
  .other { fill: #9aa4ae; }
  .line { stroke: #b31d28; stroke-dasharray: 4 3; }
  .mark { stroke: #ffffff; stroke-width: 2; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #131416; stroke: #3d444d; }
    text { fill: #e6e8eb; }
    .unit { fill: #a9b3bd; }
    .ours { fill: #7fc1ec; }
    .other { fill: #6e7781; }
    .line { stroke: #ff8a80; }
    .mark { stroke: #131416; }
  }
"""


@dataclass(frozen=True)
class Bar:
    label: str
    figures: Sequence[float]  # of one run, or of two
    ours: bool = True  # or somebody else's, in grey

    def text(self, digits: int) -> str:
        """The figures as the chart shows them."""
        return " and ".join(f"{figure:,.{digits}f}" for figure in self.figures)


def chart(title: str, unit: str, bars: Sequence[Bar], *, digits: int, line: float | None = None) -> str:
    """An SVG with a bar a row.

    Args:
        title: the chart's first line.
        unit: the second line: of what the figures are, in which unit.
        digits: of the figures, behind the point.
        line: where a dashed line crosses the bars, such as 1 for "as long as the other one".

    Raises:
        ValueError: a figure is not positive, or there is no bar.
    """
    if not bars or min(min(bar.figures) for bar in bars) <= 0:
        raise ValueError(f"{title}: a chart needs bars of positive figures")
    scale = _LONGEST / max(max(bar.figures) for bar in bars)
    height = _TOP + _ROW * len(bars) + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6"/>',
        f'<text class="title" x="{_LEFT}" y="22">{escape(title)}</text>',
        f'<text class="unit" x="{_LEFT}" y="40">{escape(unit)}</text>',
    ]
    for number, bar in enumerate(bars):
        parts += _row(bar, _TOP + _ROW * number, scale, digits, line)
    return "\n".join([*parts, "</svg>", ""])


def _row(bar: Bar, top: int, scale: float, digits: int, line: float | None) -> list[str]:
    low, high = min(bar.figures) * scale, max(bar.figures) * scale
    y = top + 22
    behind = max(high, 0 if line is None else line * scale)  # so that figures stand beside the dashed line
    colour = "ours" if bar.ours else "other"
    parts = [
        f'<text class="label" x="{_LEFT}" y="{top + 17}">{escape(bar.label)}</text>',
        f'<rect class="{colour}" x="{_LEFT}" y="{y}" width="{high:.1f}" height="{_BAR}"/>',
        f'<text class="figures" x="{_LEFT + behind + 6:.1f}" y="{y + 12}">{bar.text(digits)}</text>',
    ]
    if low < high:
        x = _LEFT + low
        parts.insert(2, f'<line class="mark" x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + _BAR}"/>')
    if line is not None:
        x = _LEFT + line * scale
        parts.append(f'<line class="line" x1="{x:.1f}" y1="{y - 3}" x2="{x:.1f}" y2="{y + _BAR + 3}"/>')
    return parts


def figures_in(svg: str) -> dict[str, str]:
    """Return what a chart says: the text of the figures by the label of their row."""
    labels = re.findall(r'<text class="label"[^>]*>(.*?)</text>', svg)
    figures = re.findall(r'<text class="figures"[^>]*>(.*?)</text>', svg)
    return dict(zip(map(unescape, labels), map(unescape, figures), strict=True))
