"""Accuracies of one set of scores under several published rules, with intervals over resampled prompts.

Published accuracies of one model on one test set differ by percentage points, because papers count ties and average
over prompts differently. Each rule is a metric with a name of its own here. The bootstrap resamples prompts, not pairs,
as the pairs of one prompt share images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float64, Int
from numpy.typing import ArrayLike

from reward_model.benchmarks.columns import Floats, UndefinedMetricError, columns_of, require_values
from reward_model.benchmarks.metrics import Metric, with_interval
from reward_model.benchmarks.statistics import TieSearch, item_pairs, kendall, pearson, spearman

MAX_RESAMPLED_PAIRS = 1_000_000
"""With more pairs, accuracy over all pairs of a benchmark's images has no interval, which would take hours."""

GroupCounts = Int[np.ndarray, " G"]
"""Number of times that each group is drawn in a resample; all ones for the data themselves."""
Statistic = Callable[[GroupCounts], float]


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Score differences and preferences of pairs; both are positive where the first image is better."""

    differences: Floats
    """Score of the first minus score of the second."""
    outcomes: Floats
    """+1 annotators prefer the first, 0 tie, -1 they prefer the second."""
    groups: Int[np.ndarray, " P"]
    """Number of the prompt of each pair, from 0 without gaps."""
    threshold: float = 0.0
    """|difference| <= threshold is a tie of the model."""

    @property
    def num_groups(self) -> int:
        """Number of prompts, G."""
        return int(self.groups.max()) + 1

    @property
    def predictions(self) -> Floats:
        """Preference by the scores: +1, 0 or -1."""
        return np.where(np.abs(self.differences) <= self.threshold, 0.0, np.sign(self.differences))

    def sum_by_group(self, values: Bool[np.ndarray, " P"] | Float64[np.ndarray, " P"]) -> Float64[np.ndarray, " G"]:
        """Return the sum of the values of each group."""
        return np.bincount(self.groups, weights=values, minlength=self.num_groups)


def scored_pairs(
    differences: ArrayLike, outcomes: ArrayLike, groups: Sequence[str], *, threshold: float = 0.0
) -> ScoredPairs:
    """Return checked pairs with numbered groups. Raises ValueError for invalid values or lengths."""
    difference, outcome = columns_of(differences=differences, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    if len(groups) != len(difference):
        raise ValueError(f"groups has {len(groups)} names; it must name one group for each of {len(difference)} pairs.")
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold}; it must be a finite number >= 0.")
    _, numbers = np.unique(np.asarray(groups), return_inverse=True)
    return ScoredPairs(difference, outcome, numbers, threshold)


def comparison_metrics(
    pairs: ScoredPairs, *, tuned_threshold: float | None = None, num_resamples: int = 2000, seed: int = 0
) -> list[Metric]:
    """Return the agreement of scores with preferences under every rule in use.

    On pairs that annotators do not tie:
        accuracy_ties_wrong        right / all
        accuracy_ties_dropped      right / pairs that the model does not tie
        accuracy_ties_half         (right + tied by the model / 2) / all
        accuracy_per_prompt        the first one for each prompt, averaged over prompts
        accuracy_first_wins, accuracy_second_wins, accuracy_order_balanced
                                   the first one where the first image is preferred, where the second is, and their mean
    On all pairs:
        agreement_per_prompt       1 - inversions / all for each prompt, averaged; only a reversed pair is an inversion
        agreement_half_ties        1 if both agree, 0.5 if just one of them ties, else 0
        agreement_half_ties_tuned  the same with the tie threshold `tuned_threshold`, from other pairs (see
                                   `best_tie_threshold`)
        agreement_tie_optimised    fraction of agreement with the tie threshold that is best on these pairs

    The last three need ties of annotators to differ from the others, and are left out if there are none.
    """
    measure = partial(_over_groups, pairs.num_groups, num_resamples=num_resamples, seed=seed)
    strict = pairs.outcomes != 0
    prediction = pairs.predictions
    right = pairs.sum_by_group(strict & (prediction == pairs.outcomes))
    tied = pairs.sum_by_group(strict & (prediction == 0))
    total, everything = pairs.sum_by_group(strict), pairs.sum_by_group(np.ones_like(strict))
    agreed = everything - pairs.sum_by_group(prediction * pairs.outcomes < 0)
    num, num_tied = int(total.sum()), int(tied.sum())
    ties, mean = f"{num_tied} tied by the model", "mean over prompts"
    metrics = [
        measure("accuracy_ties_wrong", _ratio(right, total), count=num, note=ties, of=total),
        measure("accuracy_ties_dropped", _ratio(right, total - tied), count=num - num_tied, note=ties, of=total - tied),
        measure("accuracy_ties_half", _ratio(right + tied / 2, total), count=num, note=ties, of=total),
        measure("accuracy_per_prompt", _mean(right, total), count=_num_positive(total), note=mean, of=total),
        measure("agreement_per_prompt", _mean(agreed, everything), count=pairs.num_groups, note=mean, of=everything),
        *_by_order(pairs, strict & (prediction == pairs.outcomes), measure),
    ]
    return metrics if strict.all() else [*metrics, *_with_ties(pairs, tuned_threshold, measure)]


def _with_ties(pairs: ScoredPairs, tuned_threshold: float | None, measure: Callable[..., Metric]) -> list[Metric]:
    """Return the rules in which ties of annotators count."""
    prediction, count = pairs.predictions, len(pairs.outcomes)
    everything = pairs.sum_by_group(np.ones(count))
    note = f"{int((pairs.outcomes == 0).sum())} tied by annotators"
    half = pairs.sum_by_group(_credits(prediction, pairs.outcomes))
    metrics = [measure("agreement_half_ties", _ratio(half, everything), count=count, note=note, of=everything)]
    if tuned_threshold is not None:
        tuned_prediction = np.where(np.abs(pairs.differences) <= tuned_threshold, 0.0, prediction)
        tuned = pairs.sum_by_group(_credits(tuned_prediction, pairs.outcomes))
        source = f"{note}, tie threshold {tuned_threshold:.4g} from the validation pairs"
        metrics.append(
            measure("agreement_half_ties_tuned", _ratio(tuned, everything), count=count, note=source, of=everything)
        )
    search = TieSearch(pairs.differences, pairs.outcomes)
    groups = pairs.groups[search.order]
    best = search.best(np.ones(len(groups), np.int64))
    optimised = measure(
        "agreement_tie_optimised",
        lambda drawn: search.best(drawn[groups]).accuracy,
        count=count,
        note=f"{note}, tie threshold {best.threshold:.4g} from these pairs",
    )
    return [*metrics, optimised]


def best_tie_threshold(differences: ArrayLike, outcomes: ArrayLike) -> float:
    """Return the lowest tie threshold with the highest agreement, half a point where just one side ties.

    PickScore's rule (arXiv:2305.01569, Section 4) over all thresholds, in units of the score.
    """
    difference, outcome = columns_of(differences=differences, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    order = np.argsort(np.abs(difference), kind="stable")
    width = np.abs(difference)[order]
    without_ties = _credits(np.sign(difference), outcome)
    gain = np.cumsum((_credits(np.zeros_like(outcome), outcome) - without_ties)[order])
    last = np.flatnonzero(np.append(width[1:] != width[:-1], True))  # pairs with equal |difference| are tied together
    best = int(np.argmax(gain[last]))
    return float(width[last[best]]) if gain[last[best]] > 0 else 0.0


def rating_metrics(
    scores: ArrayLike, ratings: ArrayLike, groups: Sequence[str], *, num_resamples: int = 2000, seed: int = 0
) -> list[Metric]:
    """Return the agreement of scores (N,) with ratings (N,): correlations, and accuracies over pairs of images.

    Pairs are those of all images, and those of each prompt's images (`groups`, one name an image).
    """
    score, rating = columns_of(scores=scores, ratings=ratings)
    names, numbers = np.unique(np.asarray(groups), return_inverse=True)
    if numbers.shape != score.shape:
        raise ValueError(f"groups has {len(groups)} names; it must name one group for each of {len(score)} items.")
    members = np.split(np.argsort(numbers, kind="stable"), np.cumsum(np.bincount(numbers))[:-1])
    measure = partial(_over_groups, len(names), num_resamples=num_resamples, seed=seed)

    def over_rows(statistic: Callable[[Floats, Floats], float]) -> Statistic:
        def over_drawn_rows(drawn: GroupCounts) -> float:
            rows = np.concatenate([np.tile(members[group], drawn[group]) for group in np.flatnonzero(drawn)])
            return statistic(score[rows], rating[rows])

        return over_drawn_rows

    metrics = [
        measure(name, over_rows(statistic), count=len(score), note="over all images")
        for name, statistic in (("pearson", pearson), ("spearman", spearman), ("kendall_tau_b", kendall))
    ]
    for name, within in (("pairwise_accuracy_tie_optimised", None), ("pairwise_accuracy_within_prompts", numbers)):
        metrics.append(_pairwise(name, score, rating, numbers, within, measure))
    return metrics


def _pairwise(
    name: str,
    score: Floats,
    rating: Floats,
    numbers: Int[np.ndarray, " N"],
    within: Int[np.ndarray, " N"] | None,
    measure: Callable[..., Metric],
) -> Metric:
    """Return the tie-optimised accuracy over pairs of items, only within the groups `within` if given.

    In a resample, an image that is drawn twice is not compared with itself.
    """
    try:
        pairs = item_pairs(score, rating, groups=within)
    except UndefinedMetricError as error:
        return Metric(name, math.nan, None, None, len(score), f"undefined: {error}")
    search = TieSearch(pairs.differences, pairs.outcomes)
    first, second = (numbers[side[search.order]] for side in (pairs.first, pairs.second))
    best = search.best(np.ones(len(first), np.int64))
    num_tied = int((pairs.outcomes == 0).sum())
    note = f"{num_tied} tied by annotators, tie threshold {best.threshold:.4g} from these pairs"
    if len(first) > MAX_RESAMPLED_PAIRS:
        return Metric(name, best.accuracy, None, None, len(first), f"{note}; no interval: too many pairs")
    return measure(name, lambda drawn: search.best(drawn[first] * drawn[second]).accuracy, count=len(first), note=note)


def _by_order(pairs: ScoredPairs, right: Bool[np.ndarray, " P"], measure: Callable[..., Metric]) -> list[Metric]:
    """Return the accuracy by the position of the preferred image, which shows a bias of models that compare pairs."""
    first, second = (pairs.sum_by_group(pairs.outcomes == side) for side in (1, -1))
    right_first, right_second = (pairs.sum_by_group(right & (pairs.outcomes == side)) for side in (1, -1))

    def balanced(drawn: GroupCounts) -> float:
        return (_ratio(right_first, first)(drawn) + _ratio(right_second, second)(drawn)) / 2

    num_first, num_second = int(first.sum()), int(second.sum())
    share = f"annotators prefer the first in {num_first} of {num_first + num_second}"
    return [
        measure("accuracy_first_wins", _ratio(right_first, first), count=num_first, note=share, of=first),
        measure("accuracy_second_wins", _ratio(right_second, second), count=num_second, note=share, of=second),
        measure("accuracy_order_balanced", balanced, count=num_first + num_second, note=share),
    ]


def _over_groups(
    num_groups: int, name: str, statistic: Statistic, *, count: int, note: str, num_resamples: int, seed: int,
    of: Float64[np.ndarray, " G"] | None = None,
) -> Metric:  # fmt: skip
    """Return the metric of a statistic of group counts, with its interval over resampled groups.

    `of` has the number of pairs of each group that the statistic is a fraction of.
    """

    def of_drawn_groups(drawn: Int[np.ndarray, " D"]) -> float:
        return statistic(np.bincount(drawn, minlength=num_groups))

    return with_interval(
        name, of_drawn_groups, np.arange(num_groups), num_resamples=num_resamples, seed=seed, count=count, note=note,
        num_trials=None if of is None else _num_positive(of),
    )  # fmt: skip


def _num_positive(values: Float64[np.ndarray, " G"]) -> int:
    return int((values > 0).sum())


def _ratio(part: Float64[np.ndarray, " G"], total: Float64[np.ndarray, " G"]) -> Statistic:
    """Return the statistic sum(part) / sum(total): every pair has the same weight."""

    def of_counts(drawn: GroupCounts) -> float:
        if not (denominator := float(drawn @ total)):
            raise UndefinedMetricError("No pair is left.")
        return float(drawn @ part) / denominator

    return of_counts


def _mean(part: Float64[np.ndarray, " G"], total: Float64[np.ndarray, " G"]) -> Statistic:
    """Return the statistic mean(part / total) over groups with pairs: every prompt has the same weight."""
    has_pairs = (total > 0).astype(np.float64)
    shares = np.divide(part, total, out=np.zeros_like(part), where=total > 0)
    return _ratio(shares, has_pairs)


def _credits(predictions: Floats, outcomes: Floats) -> Floats:
    """Return 1 where both agree, 0.5 where just one of them ties, else 0: 1 - |prediction - outcome| / 2."""
    return 1 - np.abs(predictions - outcomes) / 2
