"""The page of a run that trains a painter: written anew at every evaluation, however young the run is."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from rlhf_t2i.report.charts import charts, draw, grouped
from rlhf_t2i.report.checks import findings
from rlhf_t2i.report.head import HERE, head
from rlhf_t2i.report.images import best_and_worst, through_training
from rlhf_t2i.training.changes import diversity_of, hacking, headline, reward_changes, with_error
from rlhf_t2i.training.metrics import Row, by_step, read_metrics, time_split, total

NUM_PAIRS = 12
"""Pairs of images that are shown at once; the others wait behind a line to open."""


def write_report(folder: Path) -> Path:
    """Read a run folder, however young the run is, and write its `report.html`."""
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it holds no run.json.")
    run: Row = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    rows, config = read_metrics(folder), (folder / "config.yaml").read_text(encoding="utf-8")
    page = _PAGE.render(
        run=run,
        started=f"{datetime.fromisoformat(run['started']):%d %B %Y, %H:%M %Z}",
        rows=rows,
        train=by_step(rows, "train"),
        evaluations=by_step(rows, "evaluation"),
        found=findings(rows, yaml.safe_load(config) or {}),
        through=through_training(folder / "images", rows),
        utmost=best_and_worst(folder / "images", rows),
        num_pairs=NUM_PAIRS,
        config=config,
        script=_SCRIPT,
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return folder / "report.html"


def typeset(text: str) -> str:
    """With real minus signs, and no line that ends before a ±."""
    return re.sub(r"(?<!\w)-(?=[\d.])", "\N{MINUS SIGN}", text).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def flags(text: str) -> Markup:
    """With the names of settings set apart, so that none is broken at its dashes."""
    return Markup(re.sub(r"--[a-z_]+", r"<code>\g<0></code>", str(escape(text))))


_FUNCTIONS = (
    headline, hacking, reward_changes, diversity_of, with_error, charts, grouped, draw, time_split, total,
)  # fmt: skip
"""What the template calls."""
_SCRIPT = (HERE / "page.js").read_text(encoding="utf-8")
_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {"typeset": typeset, "flags": flags}
_PAGE = _ENVIRONMENT.from_string(
    head(script=_SCRIPT) + (HERE / "page.html").read_text(encoding="utf-8"),
    {f.__name__: f for f in _FUNCTIONS},
)
