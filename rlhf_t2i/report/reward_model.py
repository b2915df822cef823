"""The report of a reward model's training: curves of its validations, and its metrics on every data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from markupsafe import Markup
from tqdm import tqdm

from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import (
    CONFIG,
    REPORT,
    REWARD_HISTORY,
    REWARD_METRICS,
    read_config,
    read_reward_history,
    read_reward_metrics,
    read_run_info,
)
from rlhf_t2i.output.secondary import report_or_warning
from rlhf_t2i.report.charts import Chart
from rlhf_t2i.report.svg import draw
from rlhf_t2i.report.templating import TEMPLATES, VIEWER, load_template, script_digest
from rlhf_t2i.training.metrics import Row, points

_NOTES = {"accuracy": "Fraction of pairs in the order of the labels.", "loss": "Lower is better."}


def history_charts(history: Sequence[Row]) -> list[Chart]:
    """Return accuracy and loss on the training and the validation records."""
    both = [
        Chart(name, note, points(history, name), points(history, f"eval_{name}"), names=("training", "validation"))
        for name, note in _NOTES.items()
    ]
    return [chart for chart in both if chart.training or chart.evaluation]


def headline(history: Sequence[Row]) -> str:
    """Return a sentence on the validation with the highest accuracy, whose weights are exported."""
    validations = points(history, "eval_accuracy")
    if not validations:
        return "No validation has finished yet"
    step, accuracy, _ = max(validations, key=lambda point: point[1])
    rank = "the only validation" if len(validations) == 1 else f"the highest of {len(validations)} validations"
    return f"Validation accuracy is {accuracy:.3f} after {step:,.0f} step{'s' * (step != 1)}, {rank}"


def record_history(folder: Path, history: Sequence[dict[str, Any]]) -> None:
    """Write the training log to the run folder and bring the report up to date.

    A damaged file of an earlier evaluation is said, and ends no training.
    """
    write_atomically(folder / REWARD_HISTORY, json.dumps(list(history), indent=1))
    report_or_warning(write_report, folder, say=tqdm.write)


def write_report(folder: Path) -> Path:
    """Write the `report.html` of a reward model's run, finished or not, and return its path."""
    run, history = read_run_info(folder), []
    if (folder / REWARD_HISTORY).is_file():
        history = read_reward_history(folder)
    page = _PAGE.render(
        run=run,
        started=f"{datetime.fromisoformat(run['started']):%d %B %Y, %H:%M %Z}",
        title=f"Reward model{_backbone(folder)}, run {folder.resolve().name}",
        headline=headline(history),
        script=Markup(VIEWER),
        script_digest=script_digest(VIEWER),
        charts=history_charts(history),
        metrics=read_reward_metrics(folder) if (folder / REWARD_METRICS).is_file() else {},
        config=(folder / CONFIG).read_text(encoding="utf-8"),
    )
    write_atomically(folder / REPORT, page)
    return folder / REPORT


def _backbone(folder: Path) -> str:
    backbone = read_config(folder).get("backbone")
    return f" on {backbone}" if backbone else ""


_PAGE = load_template(TEMPLATES / "reward_model.html", (draw,))
