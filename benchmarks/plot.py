"""Draw results as an SVG: a panel for each work, a bar for each server.

Written by hand rather than by a plotting library: a hundred rectangles need none, and the file is
small, sharp, and legible on a light and on a dark page.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH = 920.0
MARGIN = 28.0
GUTTER = 44.0  # between the two columns
LABELS = 178.0  # the part of a panel where servers are named
VALUES = 64.0  # the part right of the longest bar
HEAD = 76.0  # title and subtitle
PANEL_HEAD = 30.0
PANEL_GAP = 30.0
ROW = 23.0
BAR = 13.0
PANEL_WIDTH = (WIDTH - 2 * MARGIN - GUTTER) / 2

STYLE = """
text {
  font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
  fill: #59636e;
}
.page { fill: #ffffff; }
.title { font-size: 19px; font-weight: 600; fill: #1f2328; }
.head { font-size: 14px; font-weight: 600; fill: #1f2328; }
.own { font-weight: 600; fill: #1f2328; }
.value { font-variant-numeric: tabular-nums; }
.bar { fill: #c4cbd3; }
.bar-reference { fill: #8b96a2; }
.bar-own { fill: #1a7f6b; }
.range { stroke: #1f2328; stroke-opacity: 0.5; }
.rule { stroke: #d9dee3; }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1; }
  .page { fill: #0d1117; }
  .title, .head, .own { fill: #e6edf3; }
  .bar { fill: #3d444d; }
  .bar-reference { fill: #6e7681; }
  .bar-own { fill: #2ea88a; }
  .range { stroke: #e6edf3; }
  .rule { stroke: #2a313c; }
}
"""


@dataclass(frozen=True)
class Bar:
    """One server in a panel.

    Attributes:
        label: What it is called.
        kind: ``own``, ``reference`` or empty: what it is painted as.
        value: Its length.
        least: The lowest value that a round gave.
        most: The highest.
    """

    label: str
    kind: str
    value: float
    least: float
    most: float


@dataclass(frozen=True)
class Panel:
    """One diagram: bars that share a scale; shorter is better."""

    title: str
    digits: int
    bars: Sequence[Bar]

    @property
    def height(self) -> float:
        """Points from the top of the heading to the bottom of the last bar."""
        return PANEL_HEAD + ROW * len(self.bars)


def draw(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """Return an SVG with the panels in two columns."""
    parts: list[str] = []
    top = HEAD + MARGIN
    for left, right in _pairs(panels):
        parts += _panel(left, MARGIN, top)
        if right is not None:
            parts += _panel(right, MARGIN + PANEL_WIDTH + GUTTER, top)
        top += max(left.height, right.height if right else 0.0) + PANEL_GAP
    height = top - PANEL_GAP + MARGIN
    size = f'viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH:g}" height="{height:g}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH:g}" height="{height:g}" rx="8"/>',
            _text("title", MARGIN, MARGIN + 16, title),
            _text("note", MARGIN, MARGIN + 40, subtitle),
            *parts,
            "</svg>\n",
        ]
    )


def _pairs(panels: Sequence[Panel]) -> Iterator[tuple[Panel, Panel | None]]:
    for number in range(0, len(panels), 2):
        yield panels[number], panels[number + 1] if number + 1 < len(panels) else None


def _panel(panel: Panel, left: float, top: float) -> Iterator[str]:
    scale = (PANEL_WIDTH - LABELS - VALUES) / max(bar.value for bar in panel.bars)
    start = left + LABELS
    yield _text("head", left, top + 12, panel.title)
    for number, bar in enumerate(panel.bars):
        middle = top + PANEL_HEAD + ROW * (number + 0.5)
        name = "own" if bar.kind == "own" else "name"
        paint = f"bar-{bar.kind}" if bar.kind else "bar"
        yield _text(name, start - 10, middle + 4.5, bar.label, anchor="end")
        yield (
            f'<rect class="{paint}" x="{start:.1f}" y="{middle - BAR / 2:.1f}" '
            f'width="{max(1.0, bar.value * scale):.1f}" height="{BAR:g}" rx="2"/>'
        )
        # A round that was disturbed may lie beyond the longest bar: its end is cut.
        edge = PANEL_WIDTH - LABELS - VALUES + 12
        least, most = (min(value * scale, edge) for value in (bar.least, bar.most))
        yield _line("range", start + least, middle, start + most, middle)
        value = f"{bar.value:,.{panel.digits}f}"
        x = start + max(bar.value * scale, most) + 7
        yield _text(f"{name} value", x, middle + 4.5, value)
    bottom = top + panel.height
    yield _line("rule", start, top + PANEL_HEAD, start, bottom)


def _text(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
