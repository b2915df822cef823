"""A page that compares runs, or weights: rewards, curves, and images of the same prompts and seeds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from markupsafe import Markup

from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.run_folder import (
    CAPTIONS,
    EVALUATION_TABLE,
    IMAGES,
    REPORT,
    RUN_INFO,
    image_grid,
    read_captions,
    read_config,
    read_evaluation_table,
    read_run_info,
)
from rlhf_t2i.report.images import embed_grid
from rlhf_t2i.report.paired import Scores, paired_difference, read_scores
from rlhf_t2i.report.svg import colour, draw_runs
from rlhf_t2i.report.templating import TEMPLATES, VIEWER, load_template, script_digest, typeset
from rlhf_t2i.training.changes import compare, diversity_of
from rlhf_t2i.training.metrics import (
    ERROR,
    Points,
    Row,
    by_step,
    evaluations_to_export,
    points,
    read_metrics,
    time_split,
    total,
    trained_rewards,
)

NUM_SHOWN = 8
"""Prompts and seeds whose images are visible at once; the others are in a closed section."""


@dataclass(frozen=True, slots=True)
class Column:
    """The weights at the start of a run, those that it exported, or evaluated by recipes/evaluate_policy.py."""

    name: str
    evaluation: Row
    """Mean and standard error of each reward, and the diversity."""
    grid: Path
    """Image grid."""
    captions: Row
    """Prompts and seeds of the grid, and its number of columns."""
    evaluations: list[Row]
    """All evaluations of a run; empty at its start and for weights without a run."""
    metadata: dict[str, str]
    """Rows of the table below the rewards."""
    trained_on: frozenset[str]
    is_before: bool
    """True for the start of a run."""
    folder: Path
    scores: Scores = field(default_factory=dict)
    """Score of each evaluation image; empty if unknown."""

    @property
    def rewards(self) -> list[str]:
        return [key.removesuffix(ERROR) for key in self.evaluation if key.endswith(ERROR)]


def read_columns(folder: Path, *, name: str) -> list[Column]:
    """Return two columns for a training run, start and end, or one for each of the weights of an evaluation.

    Raises FileNotFoundError for any other folder, and for a run without evaluations.
    """
    if not (folder / IMAGES / CAPTIONS).is_file():
        raise FileNotFoundError(
            f"{folder} contains no images of an evaluation. Name the folder of a run that trains a diffusion model, or "
            f"of recipes/evaluate_policy.py."
        )
    captions = read_captions(folder)
    if (folder / EVALUATION_TABLE).is_file():
        metadata = {"evaluation images": f"{len(captions['prompts']):,}"}
        bases = read_run_info(folder).get("other_bases", {}) if (folder / RUN_INFO).is_file() else {}
        table, into = read_evaluation_table(folder), read_config(folder)["model"] if bases else ""
        facts = {w: metadata | ({"LoRA of": bases[w], "loaded into": into} if w in bases else {}) for w in table}
        return [
            Column(
                name,
                row,
                folder / IMAGES / f"{i}.png",
                captions,
                [],
                facts[name],
                frozenset(),
                is_before=False,
                folder=folder,
            )
            for i, (name, row) in enumerate(table.items())
        ]
    rows = read_metrics(folder)
    evaluations, ends = by_step(rows, "evaluation"), evaluations_to_export(rows)
    if not ends:
        raise FileNotFoundError(f"{folder} has images and no measurements of them: it ended in its first evaluation.")
    first, last = (image_grid(folder, ends[i]["step"]) for i in (0, -1))
    counts = [{"evaluation images": f"{ends[i]['num_images']:,}"} for i in (0, -1)]
    metadata = {**counts[1], **_metadata(folder, rows)}
    trained_on, scores = frozenset(trained_rewards(rows)), [read_scores(folder, ends[i]["step"]) for i in (0, -1)]
    return [
        Column(f"before {name}", ends[0], first, captions, [], counts[0], frozenset(), True, folder, scores[0]),
        Column(name, ends[-1], last, captions, evaluations, metadata, trained_on, False, folder, scores[1]),
    ]


def _metadata(folder: Path, rows: Sequence[Row]) -> dict[str, str]:
    run, config = read_run_info(folder), read_config(folder)
    return {
        "recipe": run["recipe"],
        "updates": f"{len(by_step(rows, 'train')):,}",
        "training images": f"{total(rows, 'images'):,}",
        "minutes": f"{sum(time_split(rows).values()) / 60:.1f}",
        "learning rate": f"{config['learning_rate']:g}",
        "LoRA rank": str(config["lora_rank"] or "-"),
        "seed": str(config["seed"]),
    }


def side_by_side(folders: Sequence[Path]) -> list[Column]:
    """Return the columns of all folders; runs with the same images at the start share that column.

    Raises ValueError if no prompt and seed is in all image grids, and what `read_columns` does.
    """
    short = [folder.name for folder in folders]
    columns: list[Column] = []
    for folder in folders:
        own = read_columns(folder, name=folder.name if short.count(folder.name) == 1 else str(folder))
        columns += [one for one in own if not (one.is_before and any(_same_images(one, other) for other in columns))]
    if not shared_cells(columns):
        raise ValueError(
            f"{', '.join(map(str, folders))} have no prompt and seed in common. Sample the same images from all of "
            f"them with recipes/evaluate_policy.py --weights FOLDER,FOLDER, and compare that folder."
        )
    return columns


def _same_images(one: Column, other: Column) -> bool:
    return one.captions == other.captions and one.grid.read_bytes() == other.grid.read_bytes()


def shared_cells(columns: Sequence[Column]) -> list[tuple[str, int]]:
    """Return the prompts and seeds that are in all image grids, in the order of the first."""
    cells = [_cells(one) for one in columns]
    sets = [set(own) for own in cells]
    return [cell for cell in cells[0] if all(cell in own for own in sets)] if cells else []


def write_comparison(columns: Sequence[Column], path: Path) -> None:
    """Write the page."""
    page = _PAGE.render(
        run={"recipe": "comparison"},
        started=", ".join(one.name for one in columns),
        columns=columns,
        names=list(dict.fromkeys(name for one in columns for name in one.rewards)),
        metadata=list(dict.fromkeys(key for one in columns for key in one.metadata)),
        cells=shared_cells(columns),
        grids=[
            embed_grid(one.grid, columns=one.captions["columns"], num_cells=len(one.captions["prompts"]))
            for one in columns
        ],
        places=[{cell: i for i, cell in enumerate(_cells(one))} for one in columns],
        runs=[one for one in columns if one.evaluations],
        links=[_link(one, path) for one in columns],
        set_sizes=[len(one.scores or one.captions["prompts"]) for one in columns],
        differs=differing_sets(columns),
        num_shown=NUM_SHOWN,
        script=Markup(VIEWER),
        script_digest=script_digest(VIEWER),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page)


def cell_text(column: Column, first: Column, name: str) -> tuple[str, str]:
    """Return the mean of a reward, and its difference from the first column with z; empty if there is none."""
    if name not in column.rewards:
        return "not measured", ""
    change = compare(name, first.evaluation if name in first.rewards else column.evaluation, column.evaluation)
    differs = column is not first and name in first.rewards
    return change.after, f"{change.difference}, z = {change.z_text}" if differs else ""


def difference_text(column: Column, first: Column, name: str) -> str:
    """Return the difference from the first column: paired where both have scores of the same images."""
    paired = paired_difference(first.scores, column.scores, name) if column is not first else None
    if paired is None:
        return cell_text(column, first, name)[1]
    return f"{paired} on {paired.count:,} shared images"


def differing_sets(columns: Sequence[Column]) -> bool:
    """Return True if not all columns were evaluated on the same prompts and seeds."""
    sets = [
        frozenset(one.scores or zip(one.captions["prompts"], one.captions["seeds"], strict=True)) for one in columns
    ]
    return len(set(sets)) > 1


def _link(column: Column, page: Path) -> str:
    """Return the address of a run's report, relative to the page; empty if the run has none."""
    report = column.folder / REPORT
    return quote(Path(os.path.relpath(report, page.parent)).as_posix()) if report.is_file() else ""


def curves(runs: Sequence[Column], name: str) -> dict[str, Points]:
    """Return a reward, or the diversity, at all evaluations of each run that measured it, by the name of the run."""
    lines = {one.name: points(one.evaluations, name) for one in runs}
    return {run: line for run, line in lines.items() if line}


def _cells(column: Column) -> list[tuple[str, int]]:
    """Return the prompt and seed of each image of the column's grid."""
    return list(zip(column.captions["prompts"], column.captions["seeds"], strict=True))


_PAGE = load_template(
    TEMPLATES / "comparison.html",
    (cell_text, difference_text, diversity_of, draw_runs, curves, colour),
    typeset=typeset,
)
