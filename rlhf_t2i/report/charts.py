"""The curves of a run, as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup, escape

from rlhf_t2i.training.changes import Gap, hacking
from rlhf_t2i.training.metrics import Points, Row, by_step, points, reward_names, trained_rewards

_IMAGES, _UPDATE = "The images", "The update"
_HEALTH = [
    (
        _IMAGES,
        "diversity",
        "diversity",
        "How unlike one another the images of one prompt are: a fall warns of a collapse.",
    ),
    (
        _IMAGES,
        "reward spread",
        "reward_std",
        "Standard deviation of all rewards of a step: images that all earn the same teach nothing.",
    ),
    (
        _IMAGES,
        "groups without variance",
        "degenerate_groups",
        "Prompts whose images all earned the same in a step, so that nothing could be learnt from them.",
    ),
    (
        _IMAGES,
        "saturated share",
        "saturated_share",
        "Part of the pixel gradient that lies on pixels beyond black or white: growth is a way to fool a judge.",
    ),
    (_UPDATE, "KL divergence", "kl", "How far the model has moved away from the one before training."),
    (
        _UPDATE,
        "distance from the reference",
        "reference_gap",
        "How differently the model before training answers, squared.",
    ),
    (
        _UPDATE,
        "ratio spread",
        "ratio_std",
        "How differently the model sees its own strokes after it has learned from them.",
    ),
    (_UPDATE, "clip fraction", "clip_fraction", "Share of strokes that were clipped: they had moved far enough."),
    (
        _UPDATE,
        "replay error",
        "replay_error",
        "How much a log-density changes when it is computed again, before any update: 0 is exact.",
    ),
    (
        _UPDATE,
        "gradient norm",
        "gradient_norm",
        "Before it is cut off at max_gradient_norm; 0 where it was not finite and the update was left out.",
    ),
    (_UPDATE, "updates left out", "skipped_updates", "Those of each step whose gradient was not finite."),
    (
        _UPDATE,
        "implicit accuracy",
        "accuracy",
        "Share of pairs that the model now sees as it was told to; 0.5 is no opinion.",
    ),
    (
        _UPDATE,
        "winner's error",
        "winner_error",
        "Against the model before training: above 0, preferred images got unlikelier.",
    ),
    (
        _UPDATE,
        "loser's error",
        "loser_error",
        "Against the model before training: above 0, rejected images got unlikelier.",
    ),
]
_ONLY_IF_NOT_ZERO = {"replay_error", "skipped_updates"}
"""Keys that are zero all along where all is well, of which the checks tell."""
_ERRORS = {"diversity": "diversity_error"}
"""Keys whose standard error is elsewhere than that of rewards."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Numbers to draw, and a sentence that helps to read them."""

    title: str
    note: str
    training: Points
    evaluation: Points
    group: str = "Rewards"
    names: tuple[str, str] = ("training images", "evaluations")
    """Of the two lines."""


def charts(rows: Sequence[Row]) -> list[Chart]:
    """What can be drawn of these rows: each reward, then the signs of health that the recipe logs, then the speed."""
    train, evaluations = by_step(rows, "train"), by_step(rows, "evaluation")
    trained = trained_rewards(rows)
    weighted_sum = ["reward"] if len(trained) > 1 else []
    names = dict.fromkeys(weighted_sum + trained + reward_names(evaluations))
    gap = hacking(rows)
    drawn = _gap_charts(gap) if gap else []
    for name in names:
        learnt = points(train, f"rewards/{name}") or points(train, name)
        drawn.append(Chart(name, "What the images earn: higher is better.", learnt, points(evaluations, name)))
    for group, title, key, note in _HEALTH:
        seen = points(evaluations, key, error=_ERRORS.get(key))
        learnt = points(train, key)
        if key not in _ONLY_IF_NOT_ZERO or any(y for _, y, _ in learnt):
            drawn.append(Chart(title, note, learnt, seen, group))
    speed = "Images that are painted, judged and learnt from in a second, evaluations not counted."
    drawn.append(Chart("images per second", speed, _speed(train), [], _UPDATE))
    return [chart for chart in drawn if chart.training or chart.evaluation]


def grouped(drawn: Sequence[Chart]) -> dict[str, list[Chart]]:
    """The charts under their headings, in the order in which these come."""
    return {group: [c for c in drawn if c.group == group] for group in dict.fromkeys(c.group for c in drawn)}


def _speed(train: Sequence[Row]) -> Points:
    """Of each step with a known time."""
    spent = [math.fsum(value for key, value in row.items() if key.startswith("seconds/")) for row in train]
    rates = [{**row, "rate": row["images"] / s} for row, s in zip(train, spent, strict=True) if s > 0]
    return points(rates, "rate")


def _gap_charts(gap: Gap) -> list[Chart]:
    """Both gains in one image, and their difference."""
    unit = "in standard deviations of the first images"
    both = f"Grey is {gap.trained}, which is trained on, green {gap.held_out}, which is not; {unit}."
    note = f"How much more {gap.trained} rose than {gap.held_out}, {unit}: growth is reward hacking."
    gains = Chart(f"gain of {gap.trained} and {gap.held_out}", both, gap.trained_gains, gap.held_out_gains)
    return [replace(gains, names=(gap.trained, gap.held_out)), Chart("gap", note, [], gap.points)]


def ticks(low: float, high: float) -> list[tuple[float, str]]:
    """Two to five round numbers in [low, high], low < high, and how they are written."""
    rough = (high - low) / 4
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= rough * (1 - 1e-9))
    places = max(0, -math.floor(math.log10(step * (1 + 1e-9))))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    values = [i * step for i in range(first, last + 1)]
    plain = places <= 5 and max(abs(low), abs(high)) < 1e5
    texts = [f"{value:,.{places}f}" if plain else f"{value:.2g}" for value in values]
    return [(value, text.replace("-", "\N{MINUS SIGN}")) for value, text in zip(values, texts, strict=True)]


def draw(chart: Chart, unit: str = "update") -> Markup:
    """An inline SVG: lines, and at each evaluation a whisker of one standard error to both sides."""
    seen = chart.training + chart.evaluation
    left, right = min(x for x, _, _ in seen), max(x for x, _, _ in seen)
    low, high = min(y - e for _, y, e in seen), max(y + e for _, y, e in seen)
    if low == high:  # a flat line lies in the middle of an axis that begins or ends at zero
        low, high = min(0.0, 2 * low), max(0.0, 2 * high) or (0.0 if low else 1.0)
    width, height = right - left or 1.0, high - low

    def at(x: float, y: float) -> str:
        return f"{50 + 300 * (x - left) / width:.1f} {166 - 150 * (y - low) / height:.1f}"

    svg = [f'<svg viewBox="0 0 360 190" role="img" aria-label="{escape(_in_words(chart, unit))}">']
    for y, text in ticks(low, low + height):
        svg.append(f'<path d="M{at(left, y)}h300"/><text x="44" y="{at(left, y).split()[1]}">{text}</text>')
    svg.append(f'<text x="58" y="180">{left:,.0f}</text><text x="350" y="180">{unit} {left + width:,.0f}</text>')
    for kind, series in (("training", chart.training), ("evaluation", chart.evaluation)):
        line = "L".join(at(x, y) for x, y, _ in series)
        svg.append(f'<path class="{kind}" d="M{line}h0"/>' if line else "")
    for x, y, error in chart.evaluation:
        svg.append(f'<path class="evaluation" d="M{at(x, y - error)}L{at(x, y + error)}"/>')
        hint = f"{unit} {x:g}: {y:.4g} ± {error:.2g}" if error else f"{unit} {x:g}: {y:.4g}"
        svg.append(f'<path class="evaluation dot" d="M{at(x, y)}h0"><title>{hint}</title></path>')
    return Markup("".join(svg) + "</svg>")


def _in_words(chart: Chart, unit: str) -> str:
    """For those who cannot see a curve: where each line begins and where it ends."""
    lines = zip(chart.names, (chart.training, chart.evaluation), strict=True)
    told = [
        f"{name} from {line[0][1]:.3g} at {unit} {line[0][0]:g} to {line[-1][1]:.3g} at {line[-1][0]:g}"
        for name, line in lines
        if line
    ]
    return f"{chart.title}: {'; '.join(told)}"
