"""Differences between two columns of a comparison on the images that both have: the same prompts and seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, stdev

from reward_model.text_files import read_object
from rlhf_t2i.output.run_folder import evaluation_scores
from rlhf_t2i.training.changes import decimals

Scores = Mapping[tuple[str, int], Mapping[str, float]]
"""Score of each image by each reward, by prompt and seed."""
_TWO_SIDED = NormalDist().inv_cdf(0.975)
"""Half the width of a 95 % interval in standard errors."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of one reward on shared images, with its 95 % interval."""

    mean: float
    error: float
    """Standard error of the mean: stdev of the differences / sqrt(count)."""
    count: int

    @property
    def is_noise(self) -> bool:
        """True if the 95 % interval holds 0."""
        return not abs(self.mean) > _TWO_SIDED * self.error

    def __str__(self) -> str:
        places, half = min(decimals(self.error), 4), _TWO_SIDED * self.error
        ends = f"{self.mean - half:+z.{places}f} to {self.mean + half:+z.{places}f}"
        noise = ", within noise" if self.is_noise else ""
        return f"{self.mean:+z.{places}f} (95 %: {ends}{noise})"


def read_scores(folder: Path, step: int) -> Scores:
    """Return the scores of all images of a run's evaluation; empty if the run folder has none, or damaged ones."""
    try:
        record = read_object(evaluation_scores(folder, step))
        cells = zip(record["prompts"], record["seeds"], strict=True)
        rows = zip(*record["scores"].values(), strict=True)
        names = list(record["scores"])
        return {cell: dict(zip(names, map(float, row), strict=True)) for cell, row in zip(cells, rows, strict=True)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def paired_difference(first: Scores, other: Scores, reward: str) -> Difference | None:
    """Return the mean of other - first over the prompts and seeds that both scored; None if there are fewer than two.

    Pairing removes what prompts and seeds have in common, so its interval is narrower than that of two independent
    means.
    """
    shared = [cell for cell in first if cell in other and reward in first[cell] and reward in other[cell]]
    differences = [other[cell][reward] - first[cell][reward] for cell in shared]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    return Difference(fmean(differences), stdev(differences) / len(differences) ** 0.5, len(differences))
