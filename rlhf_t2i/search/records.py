"""Records of finished searches: their scores and costs beside those of plain best-of-N."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reward_model.text_files import read_object
from rlhf_t2i.output.run_folder import search_records
from rlhf_t2i.output.text_table import align
from rlhf_t2i.search.candidates import expected_best
from rlhf_t2i.training.changes import fixed_with_error
from rlhf_t2i.training.metrics import Points

Row = dict[str, Any]
COSTS = {"denoiser_calls": "denoiser calls", "reward_calls": "reward calls", "seconds": "seconds"}
"""Kinds of cost, with their units."""


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """The record of one finished search, from its `search_0000.json`."""

    folder: Path
    search: int
    row: Row

    @property
    def prompt(self) -> str:
        return self.row["prompt"]

    @property
    def is_baseline(self) -> bool:
        """True if the search is plain best-of-N and so its own baseline."""
        return self.row["is_baseline"]

    @property
    def has_baseline(self) -> bool:
        """True if there is plain best-of-N from the same seeds, without which no curve can be drawn."""
        return self.is_baseline or self.row["baseline"] is not None

    @property
    def baseline(self) -> Row:
        """The entry of plain best-of-N from the same seeds."""
        return self.row["searched"] if self.is_baseline else self.row["baseline"]

    def selected_score(self, name: str) -> float:
        """Return the score of the selected image by a reward."""
        return scores_of(self.row["searched"], name)[self.row["searched"]["selected"]]


def scores_of(entry: Row, name: str) -> list[float]:
    """Return the scores of all candidates of an entry by a reward; NaN for a score that was not finite."""
    values: list[float | None] = entry["scores"].get(name) or entry["evaluation_scores"][name]
    return [math.nan if value is None else value for value in values]


def read_records(folder: Path) -> list[SearchRecord]:
    """Read the records of all finished searches of a run, ordered by prompt and search."""
    return [SearchRecord(path.parent, int(path.stem[7:]), read_object(path)) for path in search_records(folder)]


def reward_names(records: Sequence[SearchRecord]) -> list[str]:
    """Return the names of the selecting reward, the rewards it is a sum of, and the evaluation rewards."""
    entry = records[0].row["searched"]
    return list(dict.fromkeys([*entry["scores"], *entry["evaluation_scores"]]))


def curve(records: Sequence[SearchRecord], name: str, cost: str) -> Points:
    """Return (cost, mean, standard error) of plain best-of-n for n = 1 ... N, estimated from the same N images.

    The error of a single search is NaN. Empty without a baseline.
    """
    if not records[0].has_baseline:
        return []
    rank = torch.tensor([record.baseline["rank"] for record in records])
    values = torch.tensor([scores_of(record.baseline, name) for record in records])
    expected = expected_best(-rank.float(), values)
    num = values.shape[1]
    cost_per_image = math.fsum(record.baseline["cost"][cost] for record in records) / len(records) / num
    return [(cost_per_image * (n + 1), *_mean_and_error(expected[:, n].tolist())) for n in range(num)]


def point(records: Sequence[SearchRecord], name: str, cost: str) -> tuple[float, float, float]:
    """Return (cost, mean, standard error) of the images that the search selected; the error of a single one is NaN."""
    spent = math.fsum(record.row["searched"]["cost"][cost] for record in records) / len(records)
    return (spent, *_mean_and_error([record.selected_score(name) for record in records]))


def summary(records: Sequence[SearchRecord]) -> str:
    """Return a text table of one plain sample, plain best-of-n for n = 2, 4, 8 ..., and the search."""
    header = ("", "denoiser", "reward", "seconds", *reward_names(records))
    rows = [
        (
            row["name"],
            f"{row['denoiser_calls']:.0f}",
            f"{row['reward_calls']:.0f}",
            f"{row['seconds']:.2f}",
            *row["texts"],
        )
        for row in table(records)
    ]
    num = len(records)
    note = f"{num} searches; ± is one standard error" if num > 1 else "1 search, which has no standard error"
    return "\n".join([*align([header, *rows]), note])


def table(records: Sequence[SearchRecord]) -> list[Row]:
    """Return the rows of `summary`: a name, the costs, and the scores as texts."""
    names = reward_names(records)
    curves = {(name, cost): curve(records, name, cost) for name in names for cost in COSTS}
    num = len(curves[names[0], "seconds"])
    rows: list[Row] = []
    for n in sorted({*(1 << i for i in range(num.bit_length())), num}):
        if 1 <= n <= num:
            costs = {cost: curves[names[0], cost][n - 1][0] for cost in COSTS}
            texts = [formatted(*curves[name, "seconds"][n - 1][1:]) for name in names]
            rows.append({"name": "one image" if n == 1 else f"best of {n}", **costs, "texts": texts})
    if not records[0].is_baseline:
        costs = {cost: point(records, names[0], cost)[0] for cost in COSTS}
        texts = [formatted(*point(records, name, "seconds")[1:]) for name in names]
        rows.append({"name": "this search", **costs, "texts": texts})
    return rows


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    error = numbers.std().item() / len(numbers) ** 0.5 if len(numbers) > 1 else math.nan
    return numbers.mean().item(), error


def formatted(mean: float, error: float) -> str:
    """Return a mean and its standard error as text, such as 0.375 ± 0.125; without an error if it is unknown (NaN)."""
    return fixed_with_error(mean, error) if math.isfinite(mean) else "not finite"
