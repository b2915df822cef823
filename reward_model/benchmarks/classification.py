"""Accuracy and calibration of scores and probabilities against binary labels, 1 good and 0 bad, in float64.

Arguments have one dimension and are anything that `numpy.asarray` accepts. Invalid arguments raise ValueError; where a
metric would be 0/0, UndefinedMetricError is raised.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special, stats

from reward_model.benchmarks.columns import UndefinedMetricError, columns_of, labelled_columns, require_probabilities


@dataclass(frozen=True, slots=True)
class Confusion:
    """Counts of images by label (1 good, 0 bad) and prediction. A ratio of 0/0 raises UndefinedMetricError."""

    good_called_good: int
    good_called_bad: int
    bad_called_good: int
    bad_called_bad: int

    @property
    def accuracy(self) -> float:
        """Fraction of images whose prediction equals their label."""
        right = self.good_called_good + self.bad_called_bad
        return right / (right + self.good_called_bad + self.bad_called_good)

    def precision(self, positive: Literal[0, 1]) -> float:
        """Return the fraction of images predicted `positive` that are; undefined if none is predicted so."""
        hits, false_alarms, _ = self._counts(positive)
        return _ratio(hits, hits + false_alarms, f"No image is predicted {positive}.")

    def recall(self, positive: Literal[0, 1]) -> float:
        """Return the fraction of images labelled `positive` that are predicted so; undefined if there are none."""
        hits, _, misses = self._counts(positive)
        return _ratio(hits, hits + misses, f"No image is labelled {positive}.")

    def f1(self, positive: Literal[0, 1]) -> float:
        """Return 2 hits / (2 hits + false alarms + misses); undefined if the class is neither labelled nor predicted.

        The value depends on the positive class: papers on safety report unsafe = 0 or safe = 1, often without saying.
        """
        hits, false_alarms, misses = self._counts(positive)
        return _ratio(2 * hits, 2 * hits + false_alarms + misses, f"No image is labelled or predicted {positive}.")

    def _counts(self, positive: Literal[0, 1]) -> tuple[int, int, int]:
        """Return hits, false alarms and misses of one class."""
        if positive == 1:
            return self.good_called_good, self.bad_called_good, self.good_called_bad
        return self.bad_called_bad, self.good_called_bad, self.bad_called_good


def confusion(scores: ArrayLike, labels: ArrayLike, *, threshold: float = 0.5) -> Confusion:
    """Predict good where the score (or probability) is >= threshold, and count predictions by label."""
    score, label = labelled_columns(scores=scores, labels=labels)
    if not math.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}; it must be finite.")
    cells = np.bincount(2 * label.astype(np.int64) + (score >= threshold), minlength=4)
    bad_called_bad, bad_called_good, good_called_bad, good_called_good = cells.tolist()
    return Confusion(good_called_good, good_called_bad, bad_called_good, bad_called_bad)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """Return the probability that a good image has a higher score than a bad one, a tie counting half.

        (sum of ranks of good - n_good (n_good + 1) / 2) / (n_good n_bad)       (Mann-Whitney's U, mean ranks for ties)

    Not `scipy.stats.mannwhitneyu`, which gives the same U and a p-value, and takes five times as long in a bootstrap.
    """
    score, label = labelled_columns(scores=scores, labels=labels)
    good = label == 1
    num_good, num_bad = int(good.sum()), int((~good).sum())
    if not (num_good and num_bad):
        raise UndefinedMetricError(f"AUROC needs both labels; {num_good} are 1 and {num_bad} are 0.")
    wins = stats.rankdata(score)[good].sum() - num_good * (num_good + 1) / 2
    return float(wins / (num_good * num_bad))


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, num_bins: int = 10) -> float:
    """Return the expected calibration error of probabilities of label 1, over bins of equal width.

        sum over bins of share of bin * |mean(label) - mean(probability)|

    Guo et al., 2017 (arXiv:1706.04599, Eq. 3), with the probability of class 1 in place of that of the predicted class;
    bins as there: (k / n, (k + 1) / n], and 0 in the first. It is biased upwards on few images, and 0 for a model that
    always predicts the base rate.
    """
    probability, label = labelled_columns(probabilities=probabilities, labels=labels)
    require_probabilities(probability, name="probabilities")
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1.")
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, probability, side="left")
    return float(np.abs(np.bincount(bins, weights=label - probability)).sum() / len(label))


def pair_calibration_error(margins: ArrayLike, *, num_bins: int = 10) -> float:
    """Return the calibration error of sigmoid(margin), where a margin is the log-odds of the winner of a pair.

    Each pair counts in both orders: sigmoid(m) with label 1 and sigmoid(-m) with label 0.
    """
    (margin,) = columns_of(margins=margins)
    probability = special.expit(np.concatenate([margin, -margin]))
    return calibration_error(probability, np.repeat([1, 0], len(margin)), num_bins=num_bins)


def _ratio(part: int, total: int, why_undefined: str) -> float:
    if not total:
        raise UndefinedMetricError(why_undefined)
    return part / total
