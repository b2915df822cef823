"""One HTML page per run: what rose, by how much, how sure that is, and what it cost.

The page needs nothing but itself: pictures are embedded, curves are inline SVG, and its security policy lets
the browser fetch and run nothing. `python -m rlhf_t2i.report FOLDER` writes it afresh.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

Row = dict[str, Any]
Points = list[tuple[float, float, float]]
"""(step, value, standard error or 0), from left to right."""

_ERROR = "/standard_error"
_HEALTH = [
    ("KL divergence", "kl", "How far the model has moved away from the one before training."),
    (
        "distance from the reference",
        "reference_gap",
        "How differently the model before training predicts the noise, squared.",
    ),
    (
        "saturated share",
        "saturated_share",
        "Part of the pixel gradient that lies on pixels beyond black or white: growth is a way to fool a judge.",
    ),
    (
        "ratio spread",
        "ratio_std",
        "How differently the model sees its own strokes after it has learned from them.",
    ),
    ("clip fraction", "clip_fraction", "Share of strokes that were clipped: they had moved far enough."),
    ("implicit accuracy", "accuracy", "Share of pairs that the model now sees as it was told to; 0.5 is no opinion."),
    (
        "winner's error",
        "winner_error",
        "Against the model before training: above 0, preferred pictures got unlikelier.",
    ),
    ("loser's error", "loser_error", "Against the model before training: above 0, rejected pictures got unlikelier."),
    (
        "diversity",
        "diversity",
        "How unlike one another the pictures of one prompt are: a fall warns of a collapse.",
    ),
]


@dataclass(frozen=True, slots=True)
class Change:
    """One reward before and after, in the words in which it is printed."""

    name: str
    verb: str
    before: str
    after: str
    difference: str
    certainty: str


@dataclass(frozen=True, slots=True)
class Gap:
    """What a reward that is trained on gained beside one that is not: where they part, the first is being hacked."""

    trained: str
    held_out: str
    trained_gains: Points
    held_out_gains: Points
    """Of the same steps, in standard deviations that the pictures of the first evaluation had."""

    @property
    def points(self) -> Points:
        """How much more the trained reward gained than the held-out one."""
        both = zip(self.trained_gains, self.held_out_gains, strict=True)
        return [(step, a - b, math.hypot(e, f)) for (step, a, e), (_, b, f) in both]

    @property
    def sentence(self) -> str:
        """The last gains in words."""
        trained, held_out = self.trained_gains[-1][1], self.held_out_gains[-1][1]
        return (
            f"{self.trained}, which is trained on, gained {trained:+.2f} standard deviations of the first pictures, "
            f"{self.held_out}, which is not, {held_out:+.2f}: a gap of {self.points[-1][1]:+.2f}"
        )


@dataclass(frozen=True, slots=True)
class Chart:
    """Numbers to draw, and a sentence that helps to read them."""

    title: str
    note: str
    training: Points
    evaluation: Points


def write_report(folder: Path) -> Path:
    """Read a run folder, however young the run is, and write its `report.html`."""
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it holds no run.json.")
    run: Row = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    started = f"{datetime.fromisoformat(run['started']):%d %B %Y, %H:%M %Z}"
    rows, pictures = read_metrics(folder), _pictures(folder / "pictures")
    config = (folder / "config.yaml").read_text(encoding="utf-8")
    page = _PAGE.render(run=run, started=started, rows=rows, pictures=pictures, config=config)
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def read_metrics(folder: Path) -> list[Row]:
    """The rows of a run so far, without a last line that a killed process left half-written.

    Raises ValueError for a broken line anywhere else.
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}:{number} is not JSON: {line[:80]}") from error
    return rows


def compare(name: str, before: Row, after: Row) -> Change:
    """How one reward differs between two evaluations, taken as independent; under three errors it is noise.

    error = sqrt(before_error^2 + after_error^2), and numbers are printed to its second digit
    """
    means = _number(before, name), _number(after, name)
    errors = _number(before, name + _ERROR), _number(after, name + _ERROR)
    difference, error = means[1] - means[0], math.hypot(*errors)
    num_errors = abs(difference) / error if error > 0 else math.nan
    decimals = max(0, 1 - math.floor(math.log10(error))) if error > 0 else 3
    first, last = (f"{m:.{decimals}f} ± {e:.{decimals}f}" for m, e in zip(means, errors, strict=True))
    verb, certainty = "rose" if difference > 0 else "fell", f"{num_errors:.1f} standard errors"
    if math.isnan(num_errors):
        verb, certainty = "went", "error unknown"
    elif num_errors < 3:
        verb, certainty = "went", f"{certainty}: within noise"
    return Change(name, verb, first, last, f"{difference:+.{decimals}f}", certainty)


def reward_changes(rows: Sequence[Row]) -> list[Change]:
    """The last evaluation against the first, for every reward that both hold."""
    ends = by_step(rows, "evaluation")
    return [compare(name, ends[0], ends[-1]) for name in _reward_names(ends[:1]) if name in ends[-1]]


def headline(rows: Sequence[Row]) -> str:
    """One sentence: what became of the first reward between the first and the last evaluation."""
    evaluations, changes = by_step(rows, "evaluation"), reward_changes(rows)
    if not changes:
        return "Nothing has been evaluated yet, so nothing can be said about this run"
    change, last = changes[0], evaluations[-1]
    subject = f"{change.name} on the evaluation prompts"
    if len(evaluations) == 1:
        return f"{subject} is {change.before} at update {last['step']}, with nothing to compare it to yet"
    spent = rows[: rows.index(last) + 1]
    num_updates, minutes = len(by_step(spent, "train")), sum(time_split(spent).values()) / 60
    return (
        f"{subject} {change.verb} from {change.before} to {change.after} ({change.difference}, "
        f"{change.certainty}) in {num_updates:,} update{'s' * (num_updates != 1)}, "
        f"{total(spent, 'images'):,} pictures and {minutes:.1f} minutes"
    )


def hacking(rows: Sequence[Row]) -> Gap | None:
    """The first evaluated reward that is trained on against the first that is not; None unless there are both.

    gain = (mean - first mean) / standard deviation of the first evaluation's pictures
    """
    evaluations = by_step(rows, "evaluation")
    keys = [key for row in by_step(rows, "train")[:1] for key in row]
    trained_on = {key.removeprefix("rewards/") for key in keys if key.startswith("rewards/")}
    evaluated = _reward_names(evaluations[:1])
    trained = next((name for name in evaluated if name in trained_on), None)
    held_out = next((name for name in evaluated if name not in trained_on), None)
    if trained is None or held_out is None:
        return None

    def gains(name: str) -> Points:
        first = evaluations[0]
        deviation = _number(first, name + _ERROR) * first["num_images"] ** 0.5 or math.nan
        found: Points = [(float(first["step"]), 0.0, 0.0)]
        for row in evaluations[1:]:
            error = math.hypot(_number(first, name + _ERROR), _number(row, name + _ERROR))
            found.append(
                (float(row["step"]), (_number(row, name) - _number(first, name)) / deviation, error / deviation)
            )
        return found

    gap = Gap(trained, held_out, gains(trained), gains(held_out))
    return gap if all(math.isfinite(y) for _, y, _ in gap.points) else None


def time_split(rows: Sequence[Row]) -> dict[str, float]:
    """Seconds of each activity; what no training row claims is evaluation, start-up and logging."""
    names = dict.fromkeys(key for row in rows for key in row if key.startswith("seconds/"))
    split = {key.removeprefix("seconds/"): math.fsum(row.get(key, 0.0) for row in rows) for key in names}
    elapsed = max((float(row["elapsed"]) for row in rows), default=0.0)
    return {**split, "evaluation and the rest": max(0.0, elapsed - sum(split.values()))}


def total(rows: Sequence[Row], key: str) -> int:
    """The sum over all rows that know `key`."""
    return sum(row.get(key, 0) for row in rows)


def charts(rows: Sequence[Row]) -> list[Chart]:
    """What can be drawn of these rows: each reward, then the signs of health that the recipe logs."""
    train, evaluations = by_step(rows, "train"), by_step(rows, "evaluation")
    trained = [key.removeprefix("rewards/") for row in train for key in row if key.startswith("rewards/")]
    weighted_sum = ["reward"] if len(set(trained)) > 1 else []
    names = dict.fromkeys(weighted_sum + trained + _reward_names(evaluations))
    rewards = [(name, name, "What the pictures earn: higher is better.") for name in names]
    gap = hacking(rows)
    drawn = _gap_charts(gap) if gap else []
    drawn += [
        Chart(title, note, _points(train, f"rewards/{key}") or _points(train, key), _points(evaluations, key))
        for title, key, note in rewards + _HEALTH
    ]
    return [chart for chart in drawn if chart.training or chart.evaluation]


def _gap_charts(gap: Gap) -> list[Chart]:
    """Both gains in one picture, and their difference."""
    unit = "in standard deviations of the first pictures"
    both = f"The first colour is {gap.trained}, which is trained on, the second {gap.held_out}, which is not; {unit}."
    note = f"How much more {gap.trained} rose than {gap.held_out}, {unit}: growth is reward hacking."
    return [
        Chart(f"gain of {gap.trained} and {gap.held_out}", both, gap.trained_gains, gap.held_out_gains),
        Chart("gap", note, [], gap.points),
    ]


def draw(chart: Chart, unit: str = "update") -> Markup:
    """An inline SVG: lines, and at each evaluation a whisker of one standard error to both sides."""
    points = chart.training + chart.evaluation
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
    width, height = right - left or 1.0, high - low or abs(high) or 1.0

    def at(x: float, y: float) -> str:
        return f"{50 + 300 * (x - left) / width:.1f} {166 - 150 * (y - low) / height:.1f}"

    svg = [f'<svg viewBox="0 0 360 190" role="img" aria-label="{escape(chart.title)}">']
    for y in (low, low + height / 2, low + height):
        svg.append(f'<path d="M{at(left, y)}h300"/><text x="44" y="{at(left, y).split()[1]}">{y:.3g}</text>')
    svg.append(f'<text x="58" y="180">{left:,.0f}</text><text x="350" y="180">{unit} {left + width:,.0f}</text>')
    for kind, series in (("training", chart.training), ("evaluation", chart.evaluation)):
        line = "L".join(at(x, y) for x, y, _ in series)
        svg.append(f'<path class="{kind}" d="M{line}h0"/>' if line else "")
    for x, y, error in chart.evaluation:
        svg.append(f'<path class="evaluation" d="M{at(x, y - error)}L{at(x, y + error)}"/>')
        hint = f"{unit} {x:g}: {y:.4g} ± {error:.2g}" if error else f"{unit} {x:g}: {y:.4g}"
        svg.append(f'<path class="evaluation dot" d="M{at(x, y)}h0"><title>{hint}</title></path>')
    return Markup("".join(svg) + "</svg>")


def _pictures(folder: Path) -> Row | None:
    """The first and the last strip, and where on them each captioned cell lies, in percent."""
    strips = sorted(folder.glob("step_*.png"))
    if not strips:
        return None
    captions: Row = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    ends = [path.read_bytes() for path in dict.fromkeys([strips[0], strips[-1]])]
    width, height = struct.unpack(">II", ends[0][16:24])  # where a PNG keeps its size
    num_rows = -(-len(captions["prompts"]) // captions["columns"])
    columns = round(width * num_rows / height)
    cells = [
        (100 * (i % columns) / max(1, columns - 1), 100 * (i // columns) / max(1, num_rows - 1), prompt, seed)
        for i, (prompt, seed) in enumerate(zip(captions["prompts"], captions["seeds"], strict=True))
    ]
    data = [base64.b64encode(png).decode() for png in ends]
    return {"data": data, "columns": columns, "rows": num_rows, "cells": cells, "cell_width": width / columns}


def by_step(rows: Sequence[Row], kind: str) -> list[Row]:
    """Rows of one kind in order; where a resumed run has repeated a step, the repetition counts."""
    of_step = {row["step"]: row for row in rows if row["kind"] == kind}
    return [of_step[step] for step in sorted(of_step)]


def _reward_names(evaluations: Sequence[Row]) -> list[str]:
    return [key.removesuffix(_ERROR) for row in evaluations for key in row if key.endswith(_ERROR)]


def _number(row: Row, key: str) -> float:
    return float(value) if isinstance(value := row.get(key), int | float) else math.nan


def _points(rows: Sequence[Row], key: str) -> Points:
    found = ((float(row["step"]), _number(row, key), _number(row, key + _ERROR)) for row in rows)
    return [(x, y, e if math.isfinite(e) else 0.0) for x, y, e in found if math.isfinite(y)]


STYLES = """:root { color-scheme: light dark; --page: #faf9f6; --card: #fff; --ink: #24282d; --quiet: #62676f;
  --rule: #e5e2db; --new: #23716b; --old: #a8722f; --third: #7567a8; --rest: #a3a8ae }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1d2024; --ink: #e7e4de;
  --quiet: #9ca1a9; --rule: #32363c; --new: #6fc7be; --old: #d9a465; --third: #a99ddf; --rest: #666c74 } }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1rem; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: anywhere; font-variant-numeric: tabular-nums }
h1, h2 { font-size: 1.1rem; margin: 2.5rem 0 1rem } figure { margin: 0 } pre { white-space: pre-wrap }
.headline { font: clamp(1.35rem, 4.5vw, 2rem)/1.3 Georgia, serif; margin: 1rem 0 } b { color: var(--ink) }
.quiet, figcaption, th { color: var(--quiet); font-size: .875rem; font-weight: 400 }
.card, details { background: var(--card); border: 1px solid var(--rule); border-radius: .75rem;
  padding: .75rem 1rem; overflow-x: auto } details { margin-top: .75rem } svg { overflow: visible }
.many { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(var(--w, 17rem), 1fr)) }
table { border-collapse: collapse; width: 100% } tr + tr { border-top: 1px solid var(--rule) }
th, td { text-align: left; padding: .45rem 1rem .45rem 0; white-space: nowrap } svg { display: block }
text { font-size: 11px; fill: var(--quiet); text-anchor: end; dominant-baseline: middle } svg { width: 100% }
path { fill: none; stroke: var(--rule); stroke-linecap: round; stroke-linejoin: round; stroke-width: 1.5 }
.training { stroke: var(--old) } .evaluation { stroke: var(--new) } .dot { stroke-width: 7 }
.bar { display: flex; height: 1.5rem; border-radius: .5rem; overflow: hidden; margin-bottom: .75rem }
.key { display: inline-block; width: .75em; height: .75em; border-radius: 50%; margin-right: .4em }
"""
"""The colours and shapes of every page, light and dark."""

HEAD = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ run.recipe }}, {{ started }}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
style-src 'unsafe-inline'"><meta name="viewport" content="width=device-width, initial-scale=1"><style>
"""
    + STYLES
)
"""How every report begins, up to styles of its own."""

_TEMPLATE = (
    HEAD
    + """{% if pictures %}.cells { display: flex; gap: 2px } .cells i { flex: 1; aspect-ratio: 1; background-size:
  {{ 100 * pictures.columns }}% {{ 100 * pictures.rows }}%; print-color-adjust: exact;
  image-rendering: {{ "pixelated" if pictures.cell_width < 128 else "auto" }} }
{% for strip in pictures.data %}.strip{{ loop.index }} { background-image: url(data:image/png;base64,
{{- strip }}) } {% endfor %}{% endif %}</style></head><body>
{% set train, evaluations = by_step(rows, "train"), by_step(rows, "evaluation") %}
{% set split, changes, both = time_split(rows), reward_changes(rows), evaluations | length > 1 %}
{% set seconds = split.values() | sum or 1e-9 %}<h1>{{ run.recipe }}</h1><p class="quiet">Started
{{ started }}. So far: updates {{ train | length }}, evaluations {{ evaluations | length }}, minutes
{{ "%.1f" | format(seconds / 60) }}.</p><p class="headline">{{ headline(rows) }}.</p>
<p class="quiet">What follows ± is one standard error: how far a mean typically moves with other random
pictures. Changes under three of them are called noise. The error of a change treats the two evaluations as
independent although they share prompts and seeds, which makes it cautious.</p>
{% set gap = hacking(rows) %}{% if gap and both %}<p>{{ gap.sentence }}. A gap that grows while the held-out
reward stands still is reward hacking.</p>{% endif %}
{% if changes %}<h2>Before and after</h2><div class="card"><table><tr>
{% for head in ("reward", "before", "after", "change", "certainty") %}<th>{{ head }}</th>{% endfor %}</tr>
{% for c in changes %}<tr><td>{{ c.name }}</td><td>{{ c.before }}</td>{% if both %}
<td>{{ c.after }}</td><td>{{ c.difference }}</td><td>{{ c.certainty }}</td>{% endif %}</tr>
{% endfor %}{% set first, last = evaluations[0].diversity, evaluations[-1].diversity %}
<tr><td>diversity</td><td>{{ "%.3f" | format(first) }}</td>{% if both %}<td>{{ "%.3f" | format(last) }}</td>
<td>{{ "%+.3f" | format(last - first) }}</td>{% endif %}</tr></table></div>{% endif %}
<h2>The same prompts and seeds, before (left) and after (right)</h2>{% if pictures %}
<div class="many" style="--w: 9rem">{% for x, y, prompt, seed in pictures.cells %}<figure>
<div class="cells">{% for word in ("before", "after")[: pictures.data | length] %}<i role="img"
class="strip{{ loop.index }}" aria-label="{{ word }}" style="background-position: {{ x }}% {{ y }}%"></i>
{% endfor %}</div><figcaption>{{ prompt }} (seed {{ seed }})</figcaption></figure>{% endfor %}</div>
{% else %}<p class="quiet">No pictures yet.</p>{% endif %}
<h2>Curves</h2><p class="quiet"><i class="key" style="background: var(--old)"></i>training pictures
<i class="key" style="background: var(--new)"></i>evaluations, with whiskers of one standard error</p>
<div class="many">{% for chart in charts(rows) %}<figure class="card"><figcaption><b>{{ chart.title }}</b>:
{{ chart.note }}</figcaption>{{ draw(chart) }}</figure>{% else %}Nothing to draw yet.{% endfor %}</div>
<h2>Where the time went</h2><div class="card"><div class="bar">{% for s in split.values() %}<i style="width:
{{ 100 * s / seconds }}%; background: var({{ loop.cycle("--old", "--third", "--new", "--rest") }})"></i>
{% endfor %}</div>{% for name, s in split.items() %}<div><i class="key" style="background:
var({{ loop.cycle("--old", "--third", "--new", "--rest") }})"></i>{{ name }}
<span class="quiet">{{ "%.1f s, %.0f%%" | format(s, 100 * s / seconds) }}</span></div>{% endfor %}</div>
<h2>What it cost</h2><div class="card"><table>{% set painted = total(rows, "images") %}{% for name, value in {
  "pictures for training": painted, "and for evaluation": total(rows, "num_images"),
  "calls of the denoiser in training": total(rows, "denoiser_calls"), "minutes of wall time": seconds / 60,
  "training pictures per second of it": painted / seconds, "device": run.device, "processes": run.processes,
  "trainable parameters": run.trainable_parameters | default("not known yet")}.items() %}
<tr><th>{{ name }}</th><td>{{ value if value is string else
"{:,}".format(value | round(2) if value is float else value) }}</td></tr>{% endfor %}</table></div>
<details><summary>Configuration</summary><pre>{{ config }}</pre></details>
<details><summary>Command, commit and versions</summary><pre>{{ run.command }}
commit {{ run.git_commit or "unknown" }}{% for name, version in run.versions.items() %}
{{ name }} {{ version }}{% endfor %}</pre></details></body></html>
"""
)

_PAGE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    _TEMPLATE, {f.__name__: f for f in (by_step, headline, hacking, reward_changes, charts, draw, time_split, total)}
)

if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(write_report(Path(folder)))  # noqa: T201
