"""Several runs side by side on one page that stands alone: what each earned, how it got there, the same images."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from rlhf_t2i.report import HEAD
from rlhf_t2i.training.changes import compare
from rlhf_t2i.training.metrics import Points, Row, by_step, read_metrics, time_split, total

_ERROR = "/standard_error"
_COLOURS = ("#2a9d8f", "#d08a2e", "#8f7fd6", "#d6566c", "#4f97d0", "#8fa53a", "#b07a5e", "#8a929c")


@dataclass(frozen=True, slots=True)
class Entry:
    """One column: the weights that a run ended with, or that it began with, or that an evaluation looked at."""

    name: str
    verdict: Row
    """Of its images: the mean and the standard error of each reward, and the diversity."""
    strip: Path
    """The images, row by row."""
    captions: Row
    evaluations: list[Row]
    """Of all steps; one for weights that only were evaluated."""
    facts: dict[str, str]
    trained_on: frozenset[str]
    before: bool
    """Whether it is what a run began with."""

    @property
    def rewards(self) -> list[str]:
        return [key.removesuffix(_ERROR) for key in self.verdict if key.endswith(_ERROR)]


def read_entries(folder: Path, *, name: str) -> list[Entry]:
    """The columns of a folder: before and after a tuning run, or each of the weights of recipes/evaluate_policy.py.

    Raises FileNotFoundError for a folder that is neither, or that has no evaluation yet.
    """
    if not (folder / "images" / "captions.json").is_file():
        raise FileNotFoundError(
            f"{folder} shows no images of an evaluation. Name the folder of a run that tunes a painter, or of "
            f"recipes/evaluate_policy.py."
        )
    captions: Row = json.loads((folder / "images" / "captions.json").read_text(encoding="utf-8"))
    if (folder / "table.json").is_file():
        table: dict[str, Row] = json.loads((folder / "table.json").read_text(encoding="utf-8"))
        return [
            Entry(
                weights, row, folder / "images" / f"{i}.png", captions, [],
                facts={"evaluation images": f"{len(captions['prompts']):,}"}, trained_on=frozenset(), before=False,
            )
            for i, (weights, row) in enumerate(table.items())
        ]  # fmt: skip
    rows, run = read_metrics(folder), json.loads((folder / "run.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    train, evaluations = by_step(rows, "train"), by_step(rows, "evaluation")
    trained_on = frozenset(key.removeprefix("rewards/") for row in train for key in row if key.startswith("rewards/"))
    facts = {
        "recipe": run["recipe"],
        "updates": f"{len(train):,}",
        "images for training": f"{total(rows, 'images'):,}",
        "minutes": f"{sum(time_split(rows).values()) / 60:.1f}",
        "learning rate": f"{config['learning_rate']:g}",
        "LoRA rank": str(config["lora_rank"] or "-"),
        "seed": str(config["seed"]),
    }

    first, last = (folder / "images" / f"step_{evaluations[i]['step']:06d}.png" for i in (0, -1))
    counts = [{"evaluation images": f"{evaluations[i]['num_images']:,}"} for i in (0, -1)]
    return [
        Entry(
            f"before {name}", evaluations[0], first, captions, [],
            facts=counts[0], trained_on=frozenset(), before=True,
        ),
        Entry(
            name, evaluations[-1], last, captions, evaluations,
            facts={**counts[1], **facts}, trained_on=trained_on, before=False,
        ),
    ]  # fmt: skip


def side_by_side(folders: Sequence[Path]) -> list[Entry]:
    """All columns, one "before" for all runs that began alike; ValueError where they have no image in common."""
    short = [folder.name for folder in folders]
    entries: list[Entry] = []
    for folder in folders:
        found = read_entries(folder, name=folder.name if short.count(folder.name) == 1 else str(folder))
        entries += [one for one in found if not (one.before and any(_same(one, other) for other in entries))]
    if not shared_cells(entries):
        raise ValueError(
            f"{', '.join(map(str, folders))} show no prompt with the same seed. Paint the same images with all of "
            f"them by recipes/evaluate_policy.py --weights FOLDER,FOLDER, and compare that folder."
        )
    return entries


def _same(one: Entry, other: Entry) -> bool:
    return one.captions == other.captions and one.strip.read_bytes() == other.strip.read_bytes()


def shared_cells(entries: Sequence[Entry]) -> list[tuple[str, int]]:
    """The prompts and seeds that all of them painted, in the order of the first."""
    painted = [list(zip(one.captions["prompts"], one.captions["seeds"], strict=True)) for one in entries]
    shown = [set(cells) for cells in painted]
    return [cell for cell in painted[0] if all(cell in cells for cells in shown)] if painted else []


def write_comparison(entries: Sequence[Entry], path: Path) -> None:
    """Write the page."""
    names = list(dict.fromkeys(name for one in entries for name in one.rewards))
    page = _PAGE.render(
        run={"recipe": "comparison"},
        started=", ".join(one.name for one in entries),
        entries=entries,
        names=names,
        facts=list(dict.fromkeys(key for one in entries for key in one.facts)),
        cells=shared_cells(entries),
        sheets=[_sheet(one) for one in entries],
        runs=[one for one in entries if one.evaluations],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def verdict_of(entry: Entry, first: Entry, name: str) -> tuple[str, str]:
    """A reward of a column in words, and how it differs from that of the first column."""
    if name not in entry.rewards:
        return "not measured", ""
    change = compare(name, first.verdict if name in first.rewards else entry.verdict, entry.verdict)
    differs = entry is not first and name in first.rewards
    return change.after, f"{change.difference}, {change.certainty}" if differs else ""


def overlay(series: Mapping[str, Points], title: str) -> Markup:
    """An inline SVG with a line for each run, and whiskers of one standard error."""
    points = [point for line in series.values() for point in line]
    left, right = min(x for x, _, _ in points), max(x for x, _, _ in points)
    low, high = min(y - e for _, y, e in points), max(y + e for _, y, e in points)
    width, height = right - left or 1.0, high - low or 1.0

    def at(x: float, y: float) -> str:
        return f"{50 + 300 * (x - left) / width:.1f} {166 - 150 * (y - low) / height:.1f}"

    svg = [f'<svg viewBox="0 0 360 190" role="img" aria-label="{escape(title)}">']
    for y in (low, low + height / 2, low + height):
        svg.append(f'<path d="M{at(left, y)}h300"/><text x="44" y="{at(left, y).split()[1]}">{y:.3g}</text>')
    svg.append(f'<text x="58" y="180">{left:,.0f}</text><text x="350" y="180">update {left + width:,.0f}</text>')
    for i, (name, line) in enumerate(series.items()):
        whiskers = "".join(f"M{at(x, y - e)}L{at(x, y + e)}" for x, y, e in line)
        drawn = "L".join(at(x, y) for x, y, _ in line)
        svg.append(f'<path style="stroke:{colour(i)}" d="M{drawn}{whiskers}"><title>{escape(name)}</title></path>')
    return Markup("".join(svg) + "</svg>")


def curves(runs: Sequence[Entry], name: str) -> dict[str, Points]:
    """A reward, or the diversity, of every run that measured it, by the name of the run."""
    lines = {
        one.name: [
            (float(row["step"]), float(row[name]), float(row.get(name + _ERROR, 0.0)))
            for row in one.evaluations
            if math.isfinite(row.get(name, math.nan))
        ]
        for one in runs
    }
    return {run: line for run, line in lines.items() if line}


def colour(index: int) -> str:
    """Of the line of a run."""
    return _COLOURS[index % len(_COLOURS)]


def _sheet(entry: Entry) -> dict[str, Any]:
    """A strip as data, and where on it, in percent, each prompt and seed lies."""
    prompts, seeds, columns = (entry.captions[key] for key in ("prompts", "seeds", "columns"))
    with Image.open(entry.strip) as strip:
        width, height = strip.size
    side = width // columns
    rows = height // side
    places = {
        cell: (100 * (i % columns) / max(1, columns - 1), 100 * (i // columns) / max(1, rows - 1))
        for i, cell in enumerate(zip(prompts, seeds, strict=True))
    }
    data = base64.b64encode(entry.strip.read_bytes()).decode()
    return {"data": data, "columns": columns, "rows": rows, "places": places, "side": side}


_TEMPLATE = (
    HEAD
    + """td .quiet { display: inline-block; max-width: 9rem; white-space: normal }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, {{
  entries | length * 5 }}rem), 1fr)) } .cells { display: flex; gap: 2px } .cells i { flex: 1; aspect-ratio: 1 }
{% for sheet in sheets %}.sheet{{ loop.index }} { background-size: {{ 100 * sheet.columns }}% {{ 100 * sheet.rows }}%;
  image-rendering: {{ "pixelated" if sheet.side < 128 else "auto" }}; print-color-adjust: exact;
  background-image: url(data:image/png;base64,{{ sheet.data }}) }
{% endfor %}</style></head><body><h1>Side by side</h1><p class="quiet">What follows ± is one standard error.
Below it: the difference from the first column; under three standard errors it is noise.</p>
<div class="card"><table><tr><th></th>{% for one in entries %}<th>{{ one.name }}</th>{% endfor %}</tr>
{% for name in names %}<tr><th>{{ name }}</th>{% for one in entries %}
{% set value, difference = verdict_of(one, entries[0], name) %}<td>{{ value }}
{{ "(trained on)" if name in one.trained_on else "" }}<br>
<span class="quiet">{{ difference }}</span></td>{% endfor %}</tr>{% endfor %}
<tr><th>diversity</th>{% for one in entries %}<td>{{ "%.3f" | format(one.verdict.diversity) }}</td>{% endfor %}</tr>
{% for fact in facts %}<tr><th>{{ fact }}</th>{% for one in entries %}<td>{{ one.facts[fact] | default("") }}</td>
{% endfor %}</tr>{% endfor %}</table></div>
{% if runs %}<h2>Curves</h2><p class="quiet">{% for one in runs %}<i class="key" style="background:
{{ colour(loop.index0) }}"></i>{{ one.name }} {% endfor %}</p><div class="many">
{% for name in names + ["diversity"] %}{% set lines = curves(runs, name) %}{% if lines %}<figure class="card">
<figcaption><b>{{ name }}</b></figcaption>{{ overlay(lines, name) }}</figure>{% endif %}{% endfor %}</div>{% endif %}
<h2>The same prompts and seeds</h2><p class="quiet">From left to right:
{% for one in entries %}{{ one.name }}{{ "" if loop.last else ", " }}{% endfor %}.</p><div class="grid">
{% for cell in cells %}<figure><div class="cells">{% for sheet in sheets %}{% set x, y = sheet.places[cell] %}
<i role="img" class="sheet{{ loop.index }}" aria-label="{{ entries[loop.index0].name }}" title="{{
entries[loop.index0].name }}" style="background-position: {{ x }}% {{ y }}%"></i>{% endfor %}</div>
<figcaption>{{ cell[0] }} (seed {{ cell[1] }})</figcaption></figure>{% endfor %}</div></body></html>
"""
)

_PAGE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    _TEMPLATE, {f.__name__: f for f in (verdict_of, overlay, curves, colour)}
)
