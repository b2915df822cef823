"""Charts as inline SVG: one run with its evaluations, or the same quantity of several runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from rlhf_t2i.report.charts import Chart
from rlhf_t2i.training.metrics import Points

COLOURS = ("#2a9d8f", "#d08a2e", "#8f7fd6", "#d6566c", "#4f97d0", "#8fa53a", "#b07a5e", "#8a929c")
"""Colours of the runs in a comparison, repeated if there are more runs."""


def colour(index: int) -> str:
    """Return the colour of a run in a comparison."""
    return COLOURS[index % len(COLOURS)]


@dataclass(frozen=True, slots=True)
class _Axes:
    """Map data to the plot: x to 50 ... 350, y to 166 ... 16."""

    left: float
    right: float
    low: float
    high: float

    @classmethod
    def around(cls, points: Sequence[tuple[float, float, float]]) -> _Axes:
        """Return axes that hold all points with their error bars."""
        xs = [x for x, _, _ in points]
        return cls(min(xs), max(xs), min(y - e for _, y, e in points), max(y + e for _, y, e in points))

    def at(self, x: float, y: float) -> str:
        width, height = self.right - self.left or 1.0, self.high - self.low or 1.0
        return f"{50 + 300 * (x - self.left) / width:.1f} {166 - 150 * (y - self.low) / height:.1f}"

    def opening(self, description: str, labels: Sequence[tuple[float, str]], unit: str) -> str:
        """Return the start of the SVG: a horizontal line for each label of the y axis, and both ends of the x axis."""
        lines = [
            f'<path d="M{self.at(self.left, y)}h300"/><text x="44" y="{self.at(self.left, y).split()[1]}">{text}</text>'
            for y, text in labels
        ]
        right = self.left + (self.right - self.left or 1.0)
        return (
            f'<svg viewBox="0 0 360 190" role="img" aria-label="{escape(description)}">{"".join(lines)}'
            f'<text x="58" y="180">{self.left:,.0f}</text><text x="350" y="180">{unit} {right:,.0f}</text>'
        )


def draw(chart: Chart, unit: str = "update") -> Markup:
    """Return a chart as SVG: a line for each series, and evaluations with error bars of one standard error."""
    axes = _Axes.around(chart.training + chart.evaluation)
    if axes.low == axes.high:  # put a flat line in the middle of an axis that starts or ends at 0
        low, high = min(0.0, 2 * axes.low), max(0.0, 2 * axes.high) or (0.0 if axes.low else 1.0)
        axes = _Axes(axes.left, axes.right, low, high)
    svg = [axes.opening(_description(chart, unit), ticks(axes.low, axes.high), unit)]
    for kind, series in (("training", chart.training), ("evaluation", chart.evaluation)):
        line = "L".join(axes.at(x, y) for x, y, _ in series)
        svg.append(f'<path class="{kind}" d="M{line}h0"/>' if line else "")
    for x, y, error in chart.evaluation:
        svg.append(f'<path class="evaluation" d="M{axes.at(x, y - error)}L{axes.at(x, y + error)}"/>')
        hint = f"{unit} {x:g}: {y:.4g} ± {error:.2g}" if error else f"{unit} {x:g}: {y:.4g}"
        svg.append(f'<path class="evaluation dot" d="M{axes.at(x, y)}h0"><title>{hint}</title></path>')
    return Markup("".join(svg) + "</svg>")


def draw_runs(series: Mapping[str, Points], title: str) -> Markup:
    """Return an SVG with a line for each run, with error bars of one standard error."""
    axes = _Axes.around([point for line in series.values() for point in line])
    middle = axes.low + (axes.high - axes.low or 1.0) / 2
    top = axes.low + (axes.high - axes.low or 1.0)
    svg = [axes.opening(title, [(y, f"{y:.3g}") for y in (axes.low, middle, top)], "update")]
    for i, (name, line) in enumerate(series.items()):
        bars = "".join(f"M{axes.at(x, y - e)}L{axes.at(x, y + e)}" for x, y, e in line)
        path = "L".join(axes.at(x, y) for x, y, _ in line)
        svg.append(f'<path style="stroke:{colour(i)}" d="M{path}{bars}"><title>{escape(name)}</title></path>')
    return Markup("".join(svg) + "</svg>")


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return two to five round numbers in [low, high] with their labels; low < high."""
    rough = (high - low) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough * (1 - 1e-9))
    places = max(0, -math.floor(math.log10(step * (1 + 1e-9))))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)]
    plain = places <= 5 and max(abs(low), abs(high)) < 1e5
    texts = [f"{value:,.{places}f}" if plain else f"{value:.2g}" for value in values]
    return [(value, text.replace("-", "\N{MINUS SIGN}")) for value, text in zip(values, texts, strict=True)]


def _description(chart: Chart, unit: str) -> str:
    """Return the first and last value of each line as text, for screen readers."""
    lines = zip(chart.names, (chart.training, chart.evaluation), strict=True)
    texts = [
        f"{name} from {line[0][1]:.3g} at {unit} {line[0][0]:g} to {line[-1][1]:.3g} at {line[-1][0]:g}"
        for name, line in lines
        if line
    ]
    return f"{chart.title}: {'; '.join(texts)}"
