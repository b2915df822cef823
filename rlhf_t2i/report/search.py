"""The HTML report of a search run: its result beside plain sampling and best-of-N, and the cost of each."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from markupsafe import Markup

from reward_model.image_files import open_image
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import (
    CONFIG,
    REPORT,
    SEARCH_BASELINE,
    SEARCH_SAMPLES,
    read_config,
    read_run_info,
    search_image,
)
from rlhf_t2i.report.charts import Chart
from rlhf_t2i.report.images import LOSSLESS_SIDE
from rlhf_t2i.report.svg import draw
from rlhf_t2i.report.templating import TEMPLATES, VIEWER, load_template, script_digest, typeset
from rlhf_t2i.search.records import (
    COSTS,
    Row,
    SearchRecord,
    curve,
    formatted,
    point,
    read_records,
    reward_names,
    scores_of,
    table,
)
from rlhf_t2i.training.changes import Z_THRESHOLD
from rlhf_t2i.training.metrics import Points

NUM_SHOWN = 24
"""Number of searches whose images are shown."""


def charts(records: Sequence[SearchRecord]) -> list[tuple[Chart, str]]:
    """Return a chart of every reward over every cost, each with the unit of the cost."""
    is_baseline, has_baseline = records[0].is_baseline, records[0].has_baseline
    if is_baseline:
        note = "best-of-n for n = 1 ... N"
    else:
        note = "plain best-of-n, and the search as a dot" if has_baseline else "the search; there is no baseline"
    return [
        (
            Chart(
                f"{name} by {unit}",
                note,
                [] if is_baseline else _drawn(curve(records, name, cost)),
                _drawn(curve(records, name, cost) if is_baseline else [point(records, name, cost)]),
                names=("plain best-of-n", "best-of-n" if is_baseline else "the search"),
            ),
            unit,
        )
        for name in reward_names(records)
        for cost, unit in COSTS.items()
        if any(math.isfinite(y) for _, y, _ in [*curve(records, name, cost), point(records, name, cost)])
    ]


def _drawn(points: Points) -> Points:
    """Return the points that can be drawn, with an error of 0 where it is unknown."""
    return [(x, y, e if math.isfinite(e) else 0.0) for x, y, e in points if math.isfinite(y)]


def headline(records: Sequence[SearchRecord]) -> str:
    """Return a sentence on the gain of the search by the last evaluation reward, if any, and by the one that chose."""
    held_out = next(reversed(records[0].row["searched"]["evaluation_scores"]), None)
    return "; ".join(_gain(records, name) for name in (held_out, "reward") if name)


def _gain(records: Sequence[SearchRecord], name: str) -> str:
    """Return the gain by one reward; "reward" is the one that chose."""
    after, baseline = point(records, name, "denoiser_calls"), curve(records, name, "denoiser_calls")
    selected = f"{name}{', which chose,' if name == 'reward' else ''} of the selected images is {formatted(*after[1:])}"
    if not baseline:
        return f"{selected}, at {after[0]:.0f} denoiser calls per image"
    (calls, mean, error), spread = baseline[0], math.hypot(after[2], baseline[0][2])
    times, z = after[0] / calls, (after[1] - mean) / spread if spread > 0 else math.nan
    noise = " (within noise)" if abs(z) < Z_THRESHOLD else ""
    return f"{selected}, of plain samples {formatted(mean, error)}{noise}, at {times:.1f} times the denoiser calls"


def shown(records: Sequence[SearchRecord]) -> list[Row]:
    """Return the images of the first searches and their scores: the selected one and the first of the baseline."""
    return [
        {
            "prompt": record.prompt,
            "baseline": (
                _embedded(search_image(record.folder, SEARCH_BASELINE, record.search)) if record.has_baseline else None
            ),
            "selected": _embedded(search_image(record.folder, SEARCH_SAMPLES, record.search)),
            "before": _score(scores_of(record.baseline, "reward")[0]) if record.has_baseline else None,
            "after": _score(record.selected_score("reward")),
            "is_small": _width(search_image(record.folder, SEARCH_SAMPLES, record.search)) <= LOSSLESS_SIDE,
        }
        for record in records[:NUM_SHOWN]
    ]


def _score(value: float) -> str:
    return typeset(f"{value:z.2f}") if math.isfinite(value) else "not finite"


def write_report(folder: Path) -> Path:
    """Write the `report.html` of a search run, finished or not, and return its path."""
    run, records = read_run_info(folder), read_records(folder)
    page = _PAGE.render(
        run=run,
        started=f"{datetime.fromisoformat(run['started']):%d %B %Y, %H:%M %Z}",
        records=records,
        vetoed=sum(record.row["searched"]["vetoed"][record.row["searched"]["selected"]] for record in records),
        config=(folder / CONFIG).read_text(encoding="utf-8"),
        costs=COSTS,
        title=_title(folder, run),
        script=Markup(VIEWER),
        script_digest=script_digest(VIEWER),
    )
    write_atomically(folder / REPORT, page)
    return folder / REPORT


def _title(folder: Path, run: Row) -> str:
    """Return what was searched with which reward, and the name of the run."""
    config = read_config(folder)
    searched = " by ".join(str(config[key]) for key in ("model", "rewards") if config.get(key))
    return f"{run['recipe']}{f': {searched}' if searched else ''}, run {folder.resolve().name}"


def _width(path: Path) -> int:
    with open_image(path) as image:
        return image.width


def _embedded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


_PAGE = load_template(TEMPLATES / "search.html", (headline, table, reward_names, charts, draw, shown), typeset=typeset)
