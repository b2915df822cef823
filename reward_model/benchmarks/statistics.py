"""Agreement of scores with preferences and ratings: pairwise accuracies, correlations, and consistency of order.

Arguments have one dimension and are anything that `numpy.asarray` accepts; results are computed in float64. Invalid
arguments raise ValueError; where a metric would be 0/0, UndefinedMetricError is raised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike
from scipy import stats

from reward_model.benchmarks.columns import (
    Floats,
    UndefinedMetricError,
    columns_of,
    require_probabilities,
    require_values,
)


@dataclass(frozen=True, slots=True)
class PairwiseAccuracy:
    """Counts of pairs with a preferred image. A pair that the scores tie is never right."""

    num_right: int
    num_wrong: int
    num_tied: int

    @property
    def ties_wrong(self) -> float:
        """right / all ("w/ tie" in LLaVA-Reward, arXiv:2507.21391)."""
        return self.num_right / (self.num_right + self.num_wrong + self.num_tied)

    @property
    def ties_dropped(self) -> float:
        """right / (right + wrong) ("w/o tie"). Report it with `num_tied`: the scores may decide the easy pairs only."""
        if not self.num_right + self.num_wrong:
            raise UndefinedMetricError(f"The scores tie all {self.num_tied} pairs; none is left.")
        return self.num_right / (self.num_right + self.num_wrong)


def pairwise_accuracy(winner_scores: ArrayLike, loser_scores: ArrayLike, *, threshold: float = 0.0) -> PairwiseAccuracy:
    """Count the pairs whose winner has the higher score.

        right: winner - loser > threshold      tied: |winner - loser| <= threshold      wrong: all others

    Rounded scores (bfloat16) are often equal; breaking these ties at random would hide it.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold}; it must be a finite number >= 0.")
    winner, loser = columns_of(winner_scores=winner_scores, loser_scores=loser_scores)
    gap = winner - loser
    right, wrong = int((gap > threshold).sum()), int((gap < -threshold).sum())
    return PairwiseAccuracy(right, wrong, len(gap) - right - wrong)


@dataclass(frozen=True, slots=True)
class TieOptimisedAccuracy:
    """The highest accuracy over all tie thresholds, and the lowest threshold that reaches it."""

    accuracy: float
    threshold: float
    """Tie threshold in the units of the differences; 0 if no other is better."""


def tie_optimised_accuracy(differences: ArrayLike, outcomes: ArrayLike) -> TieOptimisedAccuracy:
    """Return the fraction of pairs, ties included, that are predicted rightly with the best tie threshold.

        prediction(e) = 0 if |difference| <= e else sign(difference)
        accuracy      = max over e >= 0 of mean(prediction(e) == outcome)    outcome: +1 first won, 0 tie, -1 second won

    acc_eq with tie calibration (Deutsch, Foster and Freitag, 2023, arXiv:2305.14324), exact and in O(n log n). The
    threshold is chosen on the evaluated pairs: the value compares models on one set and predicts nothing for others.
    """
    difference, outcome = columns_of(differences=differences, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    return TieSearch(difference, outcome).best(np.ones(len(outcome), np.int64))


class TieSearch:
    """Pairs ordered by |difference|, so that one cumulative sum evaluates every tie threshold."""

    def __init__(self, differences: Floats, outcomes: Floats) -> None:
        width = np.abs(differences)
        self.order = np.argsort(width, kind="stable")
        self.width = width[self.order]
        self.right = (np.sign(differences) == outcomes)[self.order].astype(np.int64)
        """1 where the prediction without a threshold is right."""
        self.gain = (outcomes == 0)[self.order] - self.right
        """Change of `right` when the pair is tied."""
        self.last = np.flatnonzero(np.append(self.width[1:] != self.width[:-1], True))
        """Last pair of each distinct |difference|: pairs with the same are tied together."""

    def best(self, counts: Int[np.ndarray, " N"]) -> TieOptimisedAccuracy:
        """Return the best accuracy with each pair weighted by `counts`, which is in the order of this object."""
        total, without_ties = int(counts.sum()), int(counts @ self.right)
        if not total:
            raise UndefinedMetricError("No pair is counted.")
        with_ties = without_ties + np.cumsum(counts * self.gain)[self.last]
        best = int(np.argmax(with_ties))  # the lowest of equally good thresholds
        if with_ties[best] <= without_ties:
            return TieOptimisedAccuracy(without_ties / total, 0.0)
        return TieOptimisedAccuracy(int(with_ties[best]) / total, float(self.width[self.last[best]]))


@dataclass(frozen=True, slots=True)
class ItemPairs:
    """All pairs of rated items, each once."""

    first: Int[np.ndarray, " P"]
    second: Int[np.ndarray, " P"]
    differences: Float64[np.ndarray, " P"]
    """Score of the first minus score of the second."""
    outcomes: Float64[np.ndarray, " P"]
    """+1 where the first is rated higher, 0 where both ratings are equal, else -1."""


def item_pairs(scores: ArrayLike, ratings: ArrayLike, *, groups: ArrayLike | None = None) -> ItemPairs:
    """Return all pairs of rated items; with `groups`, (N,) of one name an item, only pairs within a group.

    Pairs of all groups are pooled: a large group has more weight than in the mean of the groups' accuracies.
    """
    score, rating = columns_of(scores=scores, ratings=ratings)
    group = np.zeros(len(score), np.int64) if groups is None else np.asarray(groups)
    if group.shape != score.shape:
        raise ValueError(f"groups has shape {group.shape}; it must name one group for each of {len(score)} items.")
    _, index, sizes = np.unique(group, return_inverse=True, return_counts=True)
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(sizes)[:-1])
    pairs = [items[np.stack(np.triu_indices(len(items), k=1))] for items in members]
    first, second = np.concatenate(pairs, axis=1)
    if not len(first):
        raise UndefinedMetricError(f"No two of {len(score)} items can be paired.")
    return ItemPairs(first, second, score[first] - score[second], np.sign(rating[first] - rating[second]))


def pearson(scores: ArrayLike, ratings: ArrayLike) -> float:
    """Return Pearson's correlation, in [-1, 1]: cov(s, r) / (std(s) std(r))."""
    result: Any = stats.pearsonr(*_varying(scores, ratings))
    return float(result.statistic)


def spearman(scores: ArrayLike, ratings: ArrayLike) -> float:
    """Return Spearman's correlation, in [-1, 1]: Pearson's correlation of the ranks, with mean ranks for ties."""
    return pearson(*(stats.rankdata(column) for column in _varying(scores, ratings)))


def kendall(scores: ArrayLike, ratings: ArrayLike) -> float:
    """Return Kendall's tau-b, in [-1, 1].

    (concordant - discordant) / sqrt(pairs not tied by scores * pairs not tied by ratings)
    """
    result: Any = stats.kendalltau(*_varying(scores, ratings), variant="b")
    return float(result.statistic)


@dataclass(frozen=True, slots=True)
class OrderConsistency:
    """Difference between the preferences of a model for a pair in both orders."""

    largest_gap: float
    """Largest |p(a beats b) + p(b beats a) - 1|; 0 if the order has no influence."""
    mean_gap: float
    same_choice: float
    """Fraction of pairs for which both orders prefer the same image, or both give exactly 0.5."""


def order_consistency(a_beats_b: ArrayLike, b_beats_a: ArrayLike) -> OrderConsistency:
    """Compare p(a beats b) for the pair (a, b) with p(b beats a) for the pair (b, a)."""
    forward, backward = columns_of(a_beats_b=a_beats_b, b_beats_a=b_beats_a)
    require_probabilities(forward, name="a_beats_b")
    require_probabilities(backward, name="b_beats_a")
    gap = np.abs(forward + backward - 1)
    same = np.sign(forward - 0.5) == -np.sign(backward - 0.5)
    return OrderConsistency(float(gap.max()), float(gap.mean()), float(same.mean()))


def _varying(scores: ArrayLike, ratings: ArrayLike) -> list[Floats]:
    """Return both columns; raises UndefinedMetricError if all values of one are equal."""
    columns = columns_of(scores=scores, ratings=ratings)
    for name, column in zip(("scores", "ratings"), columns, strict=True):
        if (column == column[0]).all():
            raise UndefinedMetricError(f"All {name} are {column[0]:g}; a correlation needs two different ones.")
    return columns
