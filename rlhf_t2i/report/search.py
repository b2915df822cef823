"""One HTML page per search: what it found beside plain sampling and best-of-N, and what each costs."""

from __future__ import annotations

import base64
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from rlhf_t2i.report import HEAD, Chart, Points, draw
from rlhf_t2i.search.best_of_n import expected_best

Row = dict[str, Any]
COSTS = {"denoiser_calls": "denoiser calls", "reward_calls": "judge calls", "seconds": "seconds"}
NUM_SHOWN = 24


@dataclass(frozen=True, slots=True)
class Found:
    """One finished search, as it was written down."""

    folder: Path
    search: int
    row: Row

    @property
    def prompt(self) -> str:
        return self.row["prompt"]

    @property
    def searched(self) -> bool:
        """Whether it is more than plain best-of-N."""
        return self.row["searched"]

    @property
    def compared(self) -> bool:
        """Whether there is plain best-of-N of the same seeds; without it no curve can be drawn."""
        return not self.searched or self.row["plain"] is not None

    @property
    def plain(self) -> Row:
        """Plain best-of-N of the same seeds, where there is one: of its own, or the search itself if it is that."""
        return self.row["plain"] if self.searched else self.row["found"]

    def picked(self, name: str) -> float:
        """What a reward says of the image that was picked."""
        return said(self.row["found"], name)[self.row["found"]["picked"]]


def said(row: Row, name: str) -> list[float]:
    """What a reward says of all candidates."""
    values: list[float | None] = row["scores"].get(name) or row["watched"][name]
    return [math.nan if value is None else value for value in values]


def read_found(images: Path) -> list[Found]:
    """All finished searches, prompt after prompt."""
    paths = sorted(images.glob("*/search_*.json"))
    return [Found(path.parent, int(path.stem[7:]), json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def reward_names(found: Sequence[Found]) -> list[str]:
    """What decided, then its parts, then what only watched."""
    row = found[0].row["found"]
    return list(dict.fromkeys([*row["scores"], *row["watched"]]))


def curve(found: Sequence[Found], name: str, cost: str) -> Points:
    """What plain best-of-n gives for n = 1 ... N, all from these images: (cost, mean, standard error).

    Empty where plain best-of-N was not painted.
    """
    if not found[0].compared:
        return []
    standing = torch.tensor([one.plain["standing"] for one in found])
    values = torch.tensor([said(one.plain, name) for one in found])
    expected = expected_best(standing, values)
    num = values.shape[1]
    each = math.fsum(one.plain["cost"][cost] for one in found) / len(found) / num
    return [(each * (n + 1), *_mean_and_error(expected[:, n].tolist())) for n in range(num)]


def point(found: Sequence[Found], name: str, cost: str) -> tuple[float, float, float]:
    """What the search itself gives: (cost, mean, standard error)."""
    spent = math.fsum(one.row["found"]["cost"][cost] for one in found) / len(found)
    return (spent, *_mean_and_error([one.picked(name) for one in found]))


def summary(found: Sequence[Found]) -> str:
    """A table: one plain image, plain best-of-n for n = 2, 4, 8 ..., and the search."""
    columns = {name: max(22, len(name) + 2) for name in reward_names(found)}
    header = f"{'':24}{'denoiser':>10}{'judge':>8}{'seconds':>9}" + "".join(f"{n:>{w}}" for n, w in columns.items())
    rows = [
        f"{row['name']:24}{row['denoiser_calls']:>10.0f}{row['reward_calls']:>8.0f}{row['seconds']:>9.2f}"
        + "".join(f"{text:>{width}}" for text, width in zip(row["texts"], columns.values(), strict=True))
        for row in table(found)
    ]
    return "\n".join([header, *rows, f"{len(found)} searches; what follows ± is one standard error"])


def table(found: Sequence[Found]) -> list[Row]:
    """The rows of `summary`."""
    names = reward_names(found)
    curves = {(name, cost): curve(found, name, cost) for name in names for cost in COSTS}
    num = len(curves[names[0], "seconds"])
    rows: list[Row] = []
    for n in sorted({*(1 << i for i in range(num.bit_length())), num}):
        if 1 <= n <= num:
            costs = {cost: curves[names[0], cost][n - 1][0] for cost in COSTS}
            texts = [_text(*curves[name, "seconds"][n - 1][1:]) for name in names]
            rows.append({"name": "one image" if n == 1 else f"best of {n}", **costs, "texts": texts})
    if found[0].searched:
        costs = {cost: point(found, names[0], cost)[0] for cost in COSTS}
        texts = [_text(*point(found, name, "seconds")[1:]) for name in names]
        rows.append({"name": "this search", **costs, "texts": texts})
    return rows


def charts(found: Sequence[Found]) -> list[tuple[Chart, str]]:
    """Every reward over every cost, with the unit of that cost."""
    searched, compared = found[0].searched, found[0].compared
    notes = {
        (False, True): "best-of-n for n = 1 ... N",
        (True, True): "plain best-of-n, and the search as a dot",
        (True, False): "the search; plain best-of-n was not painted",
    }
    return [
        (
            Chart(
                f"{name} by {unit}",
                notes[searched, compared],
                curve(found, name, cost) if searched else [],
                [point(found, name, cost)] if searched else curve(found, name, cost),
                names=("plain best-of-n", "the search" if searched else "best-of-n"),
            ),
            unit,
        )
        for name in reward_names(found)
        for cost, unit in COSTS.items()
    ]


def headline(found: Sequence[Found]) -> str:
    """One sentence: what the search was worth, by the last reward that only watched, or else by what decided."""
    name = next(reversed(found[0].row["found"]["watched"]), "reward")
    after, plain = point(found, name, "denoiser_calls"), curve(found, name, "denoiser_calls")
    picked = f"{name} of the picked images is {_text(*after[1:])}"
    if not plain:
        return f"{picked}, for {after[0]:.0f} denoiser calls each"
    return f"{picked}, of plain ones {_text(*plain[0][1:])}, for {after[0] / plain[0][0]:.1f} times the denoiser calls"


def shown(found: Sequence[Found]) -> list[Row]:
    """The first searches' images: plain, where there is one, and picked."""
    return [
        {
            "prompt": one.prompt,
            "plain": _embedded(one.folder / "plain" / f"{one.search:04d}.png") if one.compared else None,
            "picked": _embedded(one.folder / "samples" / f"{one.search:04d}.png"),
            "before": said(one.plain, "reward")[0] if one.compared else None,
            "after": one.picked("reward"),
        }
        for one in found[:NUM_SHOWN]
    ]


def write_report(folder: Path) -> Path:
    """Read a run folder, however young the run is, and write its `report.html`."""
    run: Row = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    found = read_found(folder / "images")
    page = _PAGE.render(
        run=run,
        started=f"{datetime.fromisoformat(run['started']):%d %B %Y, %H:%M %Z}",
        found=found,
        vetoed=sum(one.row["found"]["vetoed"][one.row["found"]["picked"]] for one in found),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        costs=COSTS,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    error = numbers.std().item() / len(numbers) ** 0.5 if len(numbers) > 1 else 0.0
    return numbers.mean().item(), error


def _text(mean: float, error: float) -> str:
    return f"{mean:.3f} ± {error:.3f}"


def _embedded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


_TEMPLATE = (
    HEAD
    + """.pair { display: flex; gap: 2px } .pair img { width: 50%; image-rendering: auto }
</style></head><body><h1>{{ run.recipe }}</h1><p class="quiet">Started {{ started }}. So far: searches
{{ found | length }}.</p>{% if found %}<p class="headline">{{ headline(found) }}.</p>
<p class="quiet">What follows ± is one standard error over searches. {% if found[0].compared %}Best-of-n is estimated
for every n from the same images: it is the mean over all sets of n of them.{% endif %}</p>
{% if vetoed %}<p>{{ vetoed }} of the picked images were vetoed: no other of their prompt passed.</p>{% endif %}
<h2>Quality and cost of one image</h2><div class="card"><table><tr><th></th>
{% for unit in costs.values() %}<th>{{ unit }}</th>{% endfor %}{% for name in reward_names(found) %}
<th>{{ name }}</th>{% endfor %}</tr>{% for row in table(found) %}<tr><td>{{ row.name }}</td>
{% for cost in costs %}<td>{{ "{:,.4g}".format(row[cost]) }}</td>{% endfor %}
{% for text in row.texts %}<td>{{ text }}</td>{% endfor %}</tr>{% endfor %}</table></div>
<h2>{{ "The same prompts: plain (left) and picked (right)" if found[0].compared else "Picked" }}</h2>
<div class="many" style="--w: 9rem">
{% for one in shown(found) %}<figure><div class="pair">
{% if one.plain %}<img alt="plain" src="data:image/png;base64,{{ one.plain }}">{% endif %}
<img alt="picked" src="data:image/png;base64,{{ one.picked }}"></div><figcaption>{{ one.prompt }}
({% if one.plain %}{{ "%.2f" | format(one.before) }} → {% endif %}{{ "%.2f" | format(one.after) }})</figcaption>
</figure>{% endfor %}</div>
<h2>Curves</h2><div class="many">{% for chart, unit in charts(found) %}<figure class="card"><figcaption>
<b>{{ chart.title }}</b>: {{ chart.note }}</figcaption>{{ draw(chart, unit) }}</figure>{% endfor %}</div>
{% endif %}<details><summary>Configuration</summary><pre>{{ config }}</pre></details>
<details><summary>Command, commit and versions</summary><pre>{{ run.command }}
commit {{ run.git_commit or "unknown" }}{% for name, version in run.versions.items() %}
{{ name }} {{ version }}{% endfor %}</pre></details></body></html>
"""
)

_PAGE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    _TEMPLATE, {f.__name__: f for f in (headline, table, reward_names, charts, draw, shown)}
)

if __name__ == "__main__":
    for folder in sys.argv[1:]:
        print(write_report(Path(folder)))  # noqa: T201
