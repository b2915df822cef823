"""The report of a training run, `report.html`: written at every evaluation, or later from the run folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from markupsafe import Markup, escape

from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import CONFIG, REPORT, RUN_INFO, read_config, read_run_info
from rlhf_t2i.report.charts import at_a_glance, charts
from rlhf_t2i.report.checks import findings
from rlhf_t2i.report.images import best_and_worst, image_history, most_changed
from rlhf_t2i.report.svg import draw
from rlhf_t2i.report.templating import TEMPLATES, VIEWER, load_template, script_digest, typeset
from rlhf_t2i.training.changes import diversity_change, diversity_of, headline, reward_changes, reward_hacking_gap
from rlhf_t2i.training.metrics import (
    Row,
    by_step,
    evaluations_to_export,
    read_metrics,
    time_split,
    total,
    trained_rewards,
)

NUM_PAIRS = 12
"""Pairs of images that are visible at once; the others are in a closed section."""


def write_report(folder: Path) -> Path:
    """Write `report.html` from the files of a run folder, finished or not; returns its path.

    Raises FileNotFoundError if the folder holds no run.
    """
    if not (folder / RUN_INFO).is_file():
        raise FileNotFoundError(f"{folder} is not the folder of a run: it holds no {RUN_INFO}.")
    write_atomically(folder / REPORT, render_report(folder))
    return folder / REPORT


def render_report(folder: Path) -> str:
    """Return the page of a run folder, finished or not."""
    run, rows, config = read_run_info(folder), read_metrics(folder), read_config(folder)
    return _PAGE.render(
        run=run,
        title=title(folder, run, rows, config),
        state=state(rows, config),
        started=f"{datetime.fromisoformat(run['started']):%d %B %Y, %H:%M %Z}",
        rows=rows,
        train=by_step(rows, "train"),
        trained=trained_rewards(rows),
        evaluations=by_step(rows, "evaluation"),
        exported=evaluations_to_export(rows),
        findings=findings(rows, config),
        history=image_history(folder, rows),
        extremes=best_and_worst(folder, rows),
        num_pairs=NUM_PAIRS,
        config=(folder / CONFIG).read_text(encoding="utf-8"),
        script=Markup(_SCRIPT),  # files of this package
        script_digest=script_digest(_SCRIPT),
    )


def title(folder: Path, run: Row, rows: Sequence[Row], config: Row) -> str:
    """Return what was trained on which reward, and the name of the run."""
    rewards = ", ".join(trained_rewards(rows)) or str(config.get("rewards") or "")
    model = f": {config['model']}" if config.get("model") else ""
    return f"{run['recipe']}{model}{f' trained on {rewards}' if rewards else ''}, run {folder.resolve().name}"


def state(rows: Sequence[Row], config: Row) -> str:
    """Return "Finished", or how far the run is."""
    train, evaluations, num_steps = by_step(rows, "train"), by_step(rows, "evaluation"), config.get("num_steps")
    step = train[-1]["step"] if train else 0
    if any(row["kind"] == "export" for row in rows):
        return "Finished" if step == num_steps else f"Finished early, after update {step:,}"
    if step == num_steps and evaluations and evaluations[-1]["step"] == step:
        return "Finished"
    return f"Update {step:,} of {num_steps:,}" if isinstance(num_steps, int) else "So far"


def flags(text: str) -> Markup:
    """Return escaped text with options such as --kl_weight as code, so that they do not break at hyphens."""
    return Markup(re.sub(r"--[a-z_]+", r"<code>\g<0></code>", str(escape(text))))


_SCRIPT = VIEWER + (TEMPLATES / "slider.js").read_text(encoding="utf-8")
_PAGE = load_template(
    TEMPLATES / "run.html",
    (
        headline,
        reward_hacking_gap,
        reward_changes,
        diversity_change,
        diversity_of,
        charts,
        at_a_glance,
        most_changed,
        draw,
        time_split,
        total,
    ),
    typeset=typeset,
    flags=flags,
)
