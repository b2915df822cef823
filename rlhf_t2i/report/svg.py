"""Charts as inline SVG: one run with its evaluations, or the same quantity of several runs."""

from __future__ import annotations

import json
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
        low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
        if low == high:  # put a flat line in the middle of an axis that starts or ends at 0
            low, high = min(0.0, 2 * low), max(0.0, 2 * high) or (0.0 if low else 1.0)
        return cls(min(xs), max(xs), low, high)

    def at(self, x: float, y: float) -> str:
        width, height = self.right - self.left or 1.0, self.high - self.low or 1.0
        return f"{50 + 300 * (x - self.left) / width:.1f} {166 - 150 * (y - self.low) / height:.1f}"

    def opening(self, description: str, y_labels: Sequence[tuple[float, str]], unit: str, data: object) -> str:
        """Return the start of the SVG: a horizontal line for each label of the y axis, and labels of the x axis.

        `data` has the names and points of all series, for the values that a script shows under the pointer.
        """
        lines = [
            f'<path d="M{self.at(self.left, y)}h300"/><text x="44" y="{self.at(self.left, y).split()[1]}">{text}</text>'
            for y, text in y_labels
        ]
        x_labels = [
            f'<text class="x" x="{self.at(x, self.low).split()[0]}" y="181">{text}</text>' for x, text in self.x_ticks()
        ]
        span = json.dumps([self.left, self.right - self.left or 1.0])
        return (
            f'<svg viewBox="0 0 360 206" role="img" tabindex="0" aria-label="{escape(description)}" '
            f'data-unit="{escape(unit)}" data-span="{span}" data-series="{escape(json.dumps(data))}">'
            f'{"".join(lines)}{"".join(x_labels)}<text x="350" y="199">{escape(unit)}</text>'
        )

    def x_ticks(self) -> list[tuple[float, str]]:
        """Return round numbers on the x axis; its only number if all points have the same."""
        if self.left == self.right:
            return [(self.left, f"{self.left:,g}")]
        found = ticks(self.left, self.right)
        whole = self.left == int(self.left) and self.right == int(self.right)
        return [(x, text.partition(".")[0] if whole else text) for x, text in found if not whole or x == round(x)]


def draw(chart: Chart, unit: str = "update") -> Markup:
    """Return a chart as SVG: a line for each series, and evaluations with error bars of one standard error."""
    axes = _Axes.around(chart.training + chart.evaluation)
    both = list(zip(chart.names, chart.kinds, (chart.training, chart.evaluation), strict=True))
    data = [_rounded(name, series) for name, _, series in both if series]
    svg = [axes.opening(_description(chart, unit), ticks(axes.low, axes.high), unit, data)]
    for _, kind, series in both:
        line = "L".join(axes.at(x, y) for x, y, _ in series)
        svg.append(f'<path class="{kind}" d="M{line}h0"/>' if line else "")
    for kind, series in zip(chart.kinds, (chart.training, chart.evaluation), strict=True):
        svg += _dots(axes, kind, series, unit=unit) if kind != "training" else []
    return Markup("".join(svg) + "</svg>")


def _dots(axes: _Axes, kind: str, series: Points, *, unit: str) -> list[str]:
    """Return a dot with an error bar, and its numbers as a hint, for each point."""
    svg: list[str] = []
    for x, y, error in series:
        svg.append(f'<path class="{kind}" d="M{axes.at(x, y - error)}L{axes.at(x, y + error)}"/>')
        hint = f"{unit} {x:g}: {y:.4g} ± {error:.2g}" if error else f"{unit} {x:g}: {y:.4g}"
        svg.append(f'<path class="{kind} dot" d="M{axes.at(x, y)}h0"><title>{hint}</title></path>')
    return svg


def draw_runs(series: Mapping[str, Points], title: str, *, first: Mapping[str, int] | None = None) -> Markup:
    """Return an SVG with a line for each run, with error bars of one standard error.

    `first` has the number of each run's colour, by default its place in `series`.
    """
    numbers = first or {name: i for i, name in enumerate(series)}
    axes = _Axes.around([point for line in series.values() for point in line])
    data = [_rounded(name, line) for name, line in series.items()]
    svg = [axes.opening(title, ticks(axes.low, axes.high), "update", data)]
    for name, line in series.items():
        bars = "".join(f"M{axes.at(x, y - e)}L{axes.at(x, y + e)}" for x, y, e in line)
        path = "L".join(axes.at(x, y) for x, y, _ in line)
        dots = "".join(f"M{axes.at(x, y)}h0" for x, y, _ in line)
        style = f'style="stroke:{colour(numbers[name])}"'
        svg.append(f'<path {style} d="M{path}{bars}"><title>{escape(name)}</title></path>')
        svg.append(f'<path class="small dot" {style} d="{dots}"/>')
    return Markup("".join(svg) + "</svg>")


def _rounded(name: str, series: Points) -> list[object]:
    return [name, [[x, float(f"{y:.4g}"), float(f"{e:.2g}")] for x, y, e in series]]


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Return two to six round numbers in [low, high] with their labels; low < high."""
    rough = (high - low) / 5
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
