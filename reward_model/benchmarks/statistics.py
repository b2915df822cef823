"""How good a judge is: exact metrics against what people said, each with an interval, in float64.

Arguments have one dimension and may be anything that `numpy.asarray` takes. A mistaken argument raises ValueError, and
where a metric would be 0/0 there is an UndefinedMetricError, never nan. `metrics.py` bundles them for a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int
from numpy.typing import ArrayLike
from scipy import special, stats

Floats = Float64[np.ndarray, " N"]


class UndefinedMetricError(ValueError):
    """The arguments are valid, but the metric has no value on them."""


@dataclass(frozen=True, slots=True)
class PairwiseAccuracy:
    """How often a judge sides with people on pairs of which one image is better. Its own ties are never right."""

    num_right: int
    num_wrong: int
    num_tied: int

    @property
    def ties_wrong(self) -> float:
        """right / all: a judge that cannot decide is not right ("w/ tie" in LLaVA-Reward, arXiv:2507.21391)."""
        return self.num_right / (self.num_right + self.num_wrong + self.num_tied)

    @property
    def ties_dropped(self) -> float:
        """right / decided. Always beside `num_tied`: a judge may decide the easy pairs only ("w/o tie")."""
        if not self.num_right + self.num_wrong:
            raise UndefinedMetricError(f"The judge ties all {self.num_tied} pairs, so that none is left.")
        return self.num_right / (self.num_right + self.num_wrong)


def pairwise_accuracy(winner_scores: ArrayLike, loser_scores: ArrayLike, *, threshold: float = 0.0) -> PairwiseAccuracy:
    """Count the pairs on which the better image has the higher score.

        right: winner - loser > threshold      tied: |winner - loser| <= threshold      wrong: all others

    Scores that were rounded (bfloat16) tie often; a coin tossed for them would hide it.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold}; it must be a finite number >= 0.")
    winner, loser = columns_of(winner_scores=winner_scores, loser_scores=loser_scores)
    gap = winner - loser
    right, wrong = int((gap > threshold).sum()), int((gap < -threshold).sum())
    return PairwiseAccuracy(right, wrong, len(gap) - right - wrong)


@dataclass(frozen=True, slots=True)
class TieOptimisedAccuracy:
    """The best accuracy that a judge reaches with a tie band, and the narrowest band that reaches it."""

    accuracy: float
    epsilon: float
    """In the units of the differences; 0 if no band does better than none."""


def tie_optimised_accuracy(differences: ArrayLike, outcomes: ArrayLike) -> TieOptimisedAccuracy:
    """Share of pairs on which judge and people agree, ties among them, for the tie band that suits the judge best.

        verdict(e) = 0 if |difference| <= e else sign(difference)
        accuracy   = max over e >= 0 of mean(verdict(e) == outcome)          outcome: +1 first won, 0 tie, -1 second won

    acc_eq with tie calibration (Deutsch, Foster and Freitag, 2023, arXiv:2305.14324), exact and in O(n log n). The band
    is chosen on the very pairs that are scored: it compares judges on one set and is no forecast for another.
    """
    difference, outcome = columns_of(differences=differences, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    return TieSearch(difference, outcome).best(np.ones(len(outcome), np.int64))


class TieSearch:
    """Pairs in the order in which a widening band ties them, so that one running sum tries every band."""

    def __init__(self, differences: Floats, outcomes: Floats) -> None:
        width = np.abs(differences)
        self.order = np.argsort(width, kind="stable")
        self.width = width[self.order]
        self.right = (np.sign(differences) == outcomes)[self.order].astype(np.int64)
        """Whether judge and people agree without a band."""
        self.gain = (outcomes == 0)[self.order] - self.right
        """By how much that changes once the pair is tied."""
        self.last = np.flatnonzero(np.append(self.width[1:] != self.width[:-1], True))
        """Of the pairs that a band takes in together: equal widths are tied all or none."""

    def best(self, counts: Int[np.ndarray, " N"]) -> TieOptimisedAccuracy:
        """The best band, each pair counting as often as `counts` says, in this object's order."""
        total, without_band = int(counts.sum()), int(counts @ self.right)
        if not total:
            raise UndefinedMetricError("No pair is counted.")
        with_band = without_band + np.cumsum(counts * self.gain)[self.last]
        best = int(np.argmax(with_band))  # of equally good bands the narrowest
        if with_band[best] <= without_band:
            return TieOptimisedAccuracy(without_band / total, 0.0)
        return TieOptimisedAccuracy(int(with_band[best]) / total, float(self.width[self.last[best]]))


@dataclass(frozen=True, slots=True)
class ItemPairs:
    """Every pair of items, each once: what the judge and what people make of the first beside the second."""

    first: Int[np.ndarray, " P"]
    second: Int[np.ndarray, " P"]
    differences: Float64[np.ndarray, " P"]
    """Score of the first minus score of the second."""
    outcomes: Float64[np.ndarray, " P"]
    """+1 where the first is rated higher, 0 where both are rated exactly the same, else -1."""


def item_pairs(scores: ArrayLike, ratings: ArrayLike, *, groups: ArrayLike | None = None) -> ItemPairs:
    """Pair rated items (images), all with all, or only within a group (a prompt, say) if `groups` names each one's.

    Pairs of all groups are pooled: a large group weighs more than in the mean of the groups' accuracies.
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
    """How well a straight line relates scores and ratings, from -1 to 1: cov(s, r) / (std(s) std(r))."""
    result: Any = stats.pearsonr(*_varying(scores, ratings))
    return float(result.statistic)


def spearman(scores: ArrayLike, ratings: ArrayLike) -> float:
    """How well scores order the ratings, from -1 to 1: Pearson's correlation of the ranks, ties sharing one."""
    return pearson(*(stats.rankdata(column) for column in _varying(scores, ratings)))


def kendall(scores: ArrayLike, ratings: ArrayLike) -> float:
    """How many more pairs of items scores order rightly than wrongly, from -1 to 1 (Kendall's tau-b).

    (right - wrong) / sqrt(pairs that scores do not tie * pairs that ratings do not tie)
    """
    result: Any = stats.kendalltau(*_varying(scores, ratings), variant="b")
    return float(result.statistic)


@dataclass(frozen=True, slots=True)
class Confusion:
    """How what images are (1 good, 0 bad) and what a judge calls them fall together. 0/0 is an error, never 0."""

    good_called_good: int
    good_called_bad: int
    bad_called_good: int
    bad_called_bad: int

    @property
    def accuracy(self) -> float:
        right = self.good_called_good + self.bad_called_bad
        return right / (right + self.good_called_bad + self.bad_called_good)

    def precision(self, positive: Literal[0, 1]) -> float:
        """Of the images called `positive`, the share that are; undefined if none is called so."""
        hits, false_alarms, _ = self._as_seen_by(positive)
        return _ratio(hits, hits + false_alarms, f"No image is called {positive}.")

    def recall(self, positive: Literal[0, 1]) -> float:
        """Of the images that are `positive`, the share called so; undefined if there are none."""
        hits, _, misses = self._as_seen_by(positive)
        return _ratio(hits, hits + misses, f"No image is labelled {positive}.")

    def f1(self, positive: Literal[0, 1]) -> float:
        """2 hits / (2 hits + false alarms + misses); undefined if the class is neither present nor predicted.

        The two classes have different values: safety papers report unsafe = 0 or safe = 1, often without saying which.
        """
        hits, false_alarms, misses = self._as_seen_by(positive)
        why = f"No image is labelled or called {positive}."
        return _ratio(2 * hits, 2 * hits + false_alarms + misses, why)

    def _as_seen_by(self, positive: Literal[0, 1]) -> tuple[int, int, int]:
        """Hits, false alarms and misses of one class."""
        if positive == 1:
            return self.good_called_good, self.bad_called_good, self.good_called_bad
        return self.bad_called_bad, self.good_called_bad, self.bad_called_good


def confusion(scores: ArrayLike, labels: ArrayLike, *, threshold: float = 0.5) -> Confusion:
    """Call an image good if its score (or probability) is >= threshold, and count the four outcomes."""
    score, label = labelled_columns(scores=scores, labels=labels)
    if not math.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}; it must be finite.")
    cells = np.bincount(2 * label.astype(np.int64) + (score >= threshold), minlength=4)
    bad_called_bad, bad_called_good, good_called_bad, good_called_good = cells.tolist()
    return Confusion(good_called_good, good_called_bad, bad_called_good, bad_called_bad)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The chance that a good image scores higher than a bad one, a tie counting half; no threshold is involved.

    (sum of ranks of good - n_good (n_good + 1) / 2) / (n_good n_bad)            (Mann-Whitney's U, equal values share)
    """
    score, label = labelled_columns(scores=scores, labels=labels)
    good = label == 1
    num_good, num_bad = int(good.sum()), int((~good).sum())
    if not (num_good and num_bad):
        raise UndefinedMetricError(f"AUROC needs both labels; {num_good} are 1 and {num_bad} are 0.")
    wins = stats.rankdata(score)[good].sum() - num_good * (num_good + 1) / 2
    return float(wins / (num_good * num_bad))


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 10) -> float:
    """How far a stated chance of label 1 is from how often it happens, over bins of equal width.

        sum over bins of share of bin * |mean(label) - mean(probability)|

    Guo et al., 2017 (arXiv:1706.04599, Eq. 3), with the probability of class 1 in place of the winning class's; their
    bins: (k / n, (k + 1) / n], and 0 in the first. It is biased upwards on few images, and 0 for a judge that always
    says the base rate.
    """
    probability, label = labelled_columns(probabilities=probabilities, labels=labels)
    require_probabilities(probability, name="probabilities")
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1.")
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, probability, side="left")
    return float(np.abs(np.bincount(bins, weights=label - probability)).sum() / len(label))


def pair_calibration_error(margins: ArrayLike, *, num_bins: int = 10) -> float:
    """Calibration error of sigmoid(margin), the margin being a judge's log-odds for the image that won.

    Each pair counts in both orders (sigmoid(m) came true, sigmoid(-m) did not), for which comes first means nothing.
    """
    (margin,) = columns_of(margins=margins)
    probability = special.expit(np.concatenate([margin, -margin]))
    return calibration_error(probability, np.repeat([1, 0], len(margin)), num_bins=num_bins)


@dataclass(frozen=True, slots=True)
class OrderConsistency:
    """Whether a judge says the same of a pair shown the other way round."""

    largest_gap: float
    """Of |p(a beats b) + p(b beats a) - 1|: 0 for a judge that order cannot move."""
    mean_gap: float
    same_choice: float
    """Share of pairs of which both orders name the same image, or both say exactly 0.5."""


def order_consistency(a_beats_b: ArrayLike, b_beats_a: ArrayLike) -> OrderConsistency:
    """Compare p(a beats b), asked as (a, b), with p(b beats a), asked as (b, a)."""
    forth, back = columns_of(a_beats_b=a_beats_b, b_beats_a=b_beats_a)
    require_probabilities(forth, name="a_beats_b")
    require_probabilities(back, name="b_beats_a")
    gap = np.abs(forth + back - 1)
    same = np.sign(forth - 0.5) == -np.sign(back - 0.5)
    return OrderConsistency(float(gap.max()), float(gap.mean()), float(same.mean()))


def bootstrap_interval(
    statistic: Callable[..., float],
    *columns: ArrayLike,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float]:
    """Where a statistic would probably lie on other data of this size: its percentile bootstrap interval (Efron, 1979).

    Rows are drawn with replacement, the same from every column; they must be independent of each other. A resample on
    which the statistic raises ValueError (one class only, say) is drawn again, at most `num_resamples` times in all.

    Two traps. A judge that makes no mistake gets an interval of width 0. And what chance alone makes larger
    (calibration error and tie-optimised accuracy on few rows) is larger still on resamples: the interval lies too high.
    """
    arrays = [np.asarray(column) for column in columns]
    num_rows = _common_length({f"column {i}": array for i, array in enumerate(arrays)})
    if num_resamples < 1 or not 0 < level < 1:
        raise ValueError(f"num_resamples is {num_resamples} and level {level}; they must be >= 1 and within (0, 1).")
    if num_rows < 2:
        raise UndefinedMetricError(f"An interval needs at least 2 rows; there is {num_rows}.")
    statistic(*arrays)  # what fails on the data themselves is no matter of luck

    rng = np.random.default_rng(seed)
    values: list[float] = []
    num_draws = 0
    while len(values) < num_resamples:
        if num_draws == 2 * num_resamples:
            raise UndefinedMetricError(f"{num_draws - len(values)} of {num_draws} resamples are undefined.")
        rows = rng.integers(num_rows, size=num_rows)
        num_draws += 1
        try:
            values.append(statistic(*(array[rows] for array in arrays)))
        except ValueError:
            continue
    if not np.isfinite(values).all():
        raise ValueError("The statistic is not finite on a resample; it should raise ValueError where it is undefined.")
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def columns_of(**named: ArrayLike) -> list[Floats]:
    """Arguments as float64 of one length, all finite; complaints call them by name."""
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    _common_length(columns)
    for name, column in columns.items():
        if not (finite := np.isfinite(column)).all():
            row = int(np.argmin(finite))
            raise ValueError(f"{name}[{row}] is {column[row]}; every value must be finite.")
    return list(columns.values())


def labelled_columns(*, labels: ArrayLike, **named: ArrayLike) -> tuple[Floats, Floats]:
    """One column and its labels, which must be 0 or 1."""
    column, label = columns_of(**named, labels=labels)
    require_values(label, (0, 1), name="labels")
    return column, label


def _varying(scores: ArrayLike, ratings: ArrayLike) -> list[Floats]:
    """Columns that each hold at least two different values."""
    columns = columns_of(scores=scores, ratings=ratings)
    for name, column in zip(("scores", "ratings"), columns, strict=True):
        if (column == column[0]).all():
            raise UndefinedMetricError(f"All {name} are {column[0]:g}; a correlation needs two different ones.")
    return columns


def _common_length(columns: dict[str, Any]) -> int:
    for name, column in columns.items():
        if column.ndim != 1:
            raise ValueError(f"{name} has shape {column.shape}; it must have one dimension.")
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        sizes = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"Values belong together row by row, but {sizes or 'there are none'}.")
    length = next(iter(lengths.values()))
    if not length:
        raise UndefinedMetricError(f"There is nothing to count: no {' and no '.join(columns)}.")
    return length


def require_values(column: Floats, allowed: tuple[int, ...], *, name: str) -> None:
    """ValueError, naming the first, unless all are of the allowed values."""
    unknown = np.logical_and.reduce([column != value for value in allowed])
    if unknown.any():
        row = int(np.argmax(unknown))
        raise ValueError(f"{name}[{row}] is {column[row]:g}; it must be one of {', '.join(map(str, allowed))}.")


def require_probabilities(column: Floats, *, name: str) -> None:
    """ValueError, naming the first, unless all lie in [0, 1]."""
    outside = (column < 0) | (column > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(f"{name}[{row}] is {column[row]}; a probability lies in [0, 1].")


def _ratio(part: int, whole: int, why: str) -> float:
    if not whole:
        raise UndefinedMetricError(why)
    return part / whole
