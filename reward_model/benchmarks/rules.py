"""The same answers under several rules, side by side, each with an interval over whole prompts.

Published accuracies of one judge on one test set differ by points: by what counts as a tie, and by what is averaged. So
each rule has a name of its own here. Resamples draw prompts, not pairs, for pairs of one prompt share images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy.typing import ArrayLike

from reward_model.benchmarks.metrics import Metric, bootstrapped
from reward_model.benchmarks.statistics import (
    Floats,
    TieSearch,
    UndefinedMetricError,
    columns_of,
    item_pairs,
    kendall,
    pearson,
    require_values,
    spearman,
)

MAX_RESAMPLED_PAIRS = 1_000_000
"""Beyond, accuracy over all pairs of a benchmark's images is stated without an interval, which would take hours."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Pairs as a judge and people see them, row by row; both signs say which of the two is better."""

    differences: Floats
    """Score of the first minus score of the second."""
    outcomes: Floats
    """+1 people prefer the first, 0 tie, -1 they prefer the second."""
    groups: Int[np.ndarray, " P"]
    """From 0 on without gaps: whose pairs are drawn together."""
    threshold: float = 0.0
    """|difference| <= threshold is a tie of the judge."""

    @property
    def num_groups(self) -> int:
        return int(self.groups.max()) + 1

    @property
    def verdicts(self) -> Floats:
        """+1, 0 or -1."""
        return np.where(np.abs(self.differences) <= self.threshold, 0.0, np.sign(self.differences))

    def count(self, which: Bool[np.ndarray, " P"] | Float64[np.ndarray, " P"]) -> Float64[np.ndarray, " G"]:
        """How many pairs of each group are such, or the sum of their credits."""
        return np.bincount(self.groups, weights=which, minlength=self.num_groups)


def compared(differences: ArrayLike, outcomes: ArrayLike, groups: Sequence[str], *, threshold: float = 0.0) -> Compared:
    """Check and number; ValueError for what is no pair."""
    difference, outcome = columns_of(differences=differences, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    if len(groups) != len(difference):
        raise ValueError(f"groups has {len(groups)} names; it must name one group for each of {len(difference)} pairs.")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold}; it must be a finite number >= 0.")
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    return Compared(difference, outcome, numbers, threshold)


def comparison_metrics(
    pairs: Compared, *, band: float | None = None, num_resamples: int = 2000, seed: int = 0
) -> list[Metric]:
    """How well a judge's comparisons agree with people's, under every rule in use.

    Of pairs that people do not tie:
        accuracy_ties_wrong        right / all
        accuracy_ties_dropped      right / decided by the judge
        accuracy_ties_half         (right + tied by the judge / 2) / all
        accuracy_per_prompt        the first one for each prompt, averaged over prompts
        accuracy_first_wins, accuracy_second_wins, accuracy_order_balanced
                                   the first one where the first image is better, where the second is, and their mean
    Of all pairs:
        agreement_per_prompt       1 - inversions / all for each prompt, averaged; only a reversed pair is an inversion
        agreement_half_ties        1 if both say the same, 0.5 if just one of them ties, else 0
        agreement_half_ties_tuned  the same with the judge's ties within `band`, chosen elsewhere (see `best_band`)
        agreement_tie_optimised    both say the same, with the band that does best on these very pairs

    Those of all pairs need people's ties to differ, and but for the first are left out where there are none.
    """
    measure = partial(_by_group, pairs.num_groups, num_resamples=num_resamples, seed=seed)
    strict = pairs.outcomes != 0
    verdict = pairs.verdicts
    right, tied = pairs.count(strict & (verdict == pairs.outcomes)), pairs.count(strict & (verdict == 0))
    total, everything = pairs.count(strict), pairs.count(np.ones_like(strict))
    agreed = everything - pairs.count(verdict * pairs.outcomes < 0)
    num, num_tied = int(total.sum()), int(tied.sum())
    ties = f"{num_tied} ties of the judge"
    found = [
        measure("accuracy_ties_wrong", _ratio(right, total), count=num, note=ties),
        measure("accuracy_ties_dropped", _ratio(right, total - tied), count=num - num_tied, note=ties),
        measure("accuracy_ties_half", _ratio(right + tied / 2, total), count=num, note=ties),
        measure("accuracy_per_prompt", _mean(right, total), count=int((total > 0).sum()), note="mean over prompts"),
        measure("agreement_per_prompt", _mean(agreed, everything), count=pairs.num_groups, note="mean over prompts"),
        *_by_order(pairs, strict & (verdict == pairs.outcomes), measure),
    ]
    if strict.all():
        return found
    note = f"{int((~strict).sum())} ties of people"
    half = pairs.count(_credits(verdict, pairs.outcomes))
    found.append(measure("agreement_half_ties", _ratio(half, everything), count=len(strict), note=note))
    if band is not None:
        tuned = pairs.count(_credits(np.where(np.abs(pairs.differences) <= band, 0.0, verdict), pairs.outcomes))
        where = f"{note}, band {band:.4g} chosen on the validation pairs"
        found.append(measure("agreement_half_ties_tuned", _ratio(tuned, everything), count=len(strict), note=where))
    search = TieSearch(pairs.differences, pairs.outcomes)
    groups = pairs.groups[search.order]
    epsilon = search.best(np.ones(len(groups), np.int64)).epsilon
    best = measure(
        "agreement_tie_optimised", lambda drawn: search.best(drawn[groups]).accuracy, count=len(strict),
        note=f"{note}, epsilon {epsilon:.4g} chosen on these pairs",
    )  # fmt: skip
    return [*found, best]


def best_band(differences: ArrayLike, outcomes: ArrayLike) -> float:
    """The narrowest band of ties with which a judge agrees best with people, half a point where just one of them ties.

    PickScore's rule (arXiv:2305.01569, Section 4) over every band there is; the width is in units of the score.
    """
    difference, outcome = columns_of(differences=differences, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    order = np.argsort(np.abs(difference), kind="stable")
    width = np.abs(difference)[order]
    without = _credits(np.sign(difference), outcome)
    gain = np.cumsum((_credits(np.zeros_like(outcome), outcome) - without)[order])
    last = np.flatnonzero(np.append(width[1:] != width[:-1], True))  # equal widths are tied all or none
    best = int(np.argmax(gain[last]))
    return float(width[last[best]]) if gain[last[best]] > 0 else 0.0


def rated_metrics(
    scores: ArrayLike, ratings: ArrayLike, groups: Sequence[str], *, num_resamples: int = 2000, seed: int = 0
) -> list[Metric]:
    """How well scores follow ratings: correlations, and pairs of all and of each prompt's images."""
    score, rating = columns_of(scores=scores, ratings=ratings)
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    if numbers.shape != score.shape:
        raise ValueError(f"groups has {len(groups)} names; it must name one group for each of {len(score)} items.")
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
    measure = partial(_by_group, len(names), num_resamples=num_resamples, seed=seed)

    def over_rows(statistic: Callable[[Floats, Floats], float]) -> Callable[[Int[np.ndarray, " G"]], float]:
        def of_drawn(drawn: Int[np.ndarray, " G"]) -> float:
            rows = np.concatenate([np.tile(members[group], drawn[group]) for group in np.flatnonzero(drawn)])
            return statistic(score[rows], rating[rows])

        return of_drawn

    note = "over all images"
    found = [
        measure(name, over_rows(statistic), count=len(score), note=note)
        for name, statistic in (("pearson", pearson), ("spearman", spearman), ("kendall_tau_b", kendall))
    ]
    for name, kept in (("pairwise_accuracy_tie_optimised", None), ("pairwise_accuracy_within_prompts", numbers)):
        found.append(_pairwise(name, score, rating, numbers, kept, measure))
    return found


def _pairwise(
    name: str,
    score: Floats,
    rating: Floats,
    numbers: Int[np.ndarray, " N"],
    kept: Int[np.ndarray, " N"] | None,
    measure: Callable[..., Metric],
) -> Metric:
    """Tie-optimised accuracy over pairs of items; an image drawn twice is not compared with itself."""
    try:
        pairs = item_pairs(score, rating, groups=kept)
    except UndefinedMetricError as error:
        return Metric(name, math.nan, None, None, len(score), f"undefined: {error}")
    search = TieSearch(pairs.differences, pairs.outcomes)
    first, second = (numbers[side[search.order]] for side in (pairs.first, pairs.second))
    best = search.best(np.ones(len(first), np.int64))
    note = f"{int((pairs.outcomes == 0).sum())} ties of people, epsilon {best.epsilon:.4g} chosen on these pairs"
    if len(first) > MAX_RESAMPLED_PAIRS:
        return Metric(name, best.accuracy, None, None, len(first), f"{note}; no interval: too many pairs")
    return measure(name, lambda drawn: search.best(drawn[first] * drawn[second]).accuracy, count=len(first), note=note)


def _by_order(pairs: Compared, right: Bool[np.ndarray, " P"], measure: Callable[..., Metric]) -> list[Metric]:
    """Whether a judge is better where the first image wins: it is not, if it cannot know the order."""
    first, second = (pairs.count(pairs.outcomes == side) for side in (1, -1))
    right_first, right_second = (pairs.count(right & (pairs.outcomes == side)) for side in (1, -1))

    def balanced(drawn: Int[np.ndarray, " G"]) -> float:
        return (_ratio(right_first, first)(drawn) + _ratio(right_second, second)(drawn)) / 2

    num_first, num_second = int(first.sum()), int(second.sum())
    share = f"people prefer the first in {num_first} of {num_first + num_second}"
    return [
        measure("accuracy_first_wins", _ratio(right_first, first), count=num_first, note=share),
        measure("accuracy_second_wins", _ratio(right_second, second), count=num_second, note=share),
        measure("accuracy_order_balanced", balanced, count=num_first + num_second, note=share),
    ]


def _by_group(
    num_groups: int,
    name: str,
    statistic: Callable[[Int[np.ndarray, " G"]], float],
    *,
    count: int,
    note: str,
    num_resamples: int,
    seed: int,
) -> Metric:
    """A statistic of how often each group was drawn, with its interval over resampled groups."""

    def of_groups(drawn: Int[np.ndarray, " D"]) -> float:
        return statistic(np.bincount(drawn, minlength=num_groups))

    groups = np.arange(num_groups)
    return bootstrapped(name, of_groups, groups, num_resamples=num_resamples, seed=seed, count=count, note=note)


def _ratio(
    part: Float64[np.ndarray, " G"], whole: Float64[np.ndarray, " G"]
) -> Callable[[Int[np.ndarray, " G"]], float]:
    """Every pair counts alike."""

    def of_drawn(drawn: Int[np.ndarray, " G"]) -> float:
        if not (total := float(drawn @ whole)):
            raise UndefinedMetricError("No pair is left.")
        return float(drawn @ part) / total

    return of_drawn


def _mean(
    part: Float64[np.ndarray, " G"], whole: Float64[np.ndarray, " G"]
) -> Callable[[Int[np.ndarray, " G"]], float]:
    """Every group that has pairs counts alike."""
    has = (whole > 0).astype(np.float64)
    shares = np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
    return _ratio(shares, has)


def _credits(verdicts: Floats, outcomes: Floats) -> Floats:
    """1 where both say the same, 0.5 where just one of them ties, else 0: 1 - |verdict - outcome| / 2."""
    return 1 - np.abs(verdicts - outcomes) / 2
