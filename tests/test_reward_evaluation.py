"""Every metric of a reward model: by hand, against a slow loop, in its limits, and where it is undefined."""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from reward_model.attention import AttentionMap, attention_maps
from reward_model.benchmarks.bootstrap import bootstrap_interval, wilson_interval
from reward_model.benchmarks.breakdown import (
    accuracy_by_group,
    break_down,
    calibration_curve,
    histogram,
    score_histogram,
)
from reward_model.benchmarks.classification import (
    Confusion,
    auroc,
    calibration_error,
    confusion,
    pair_calibration_error,
)
from reward_model.benchmarks.columns import UndefinedMetricError
from reward_model.benchmarks.evaluation import RecordScores, score_records, with_explanations, worst_mistakes
from reward_model.benchmarks.metrics import Metric, gap_metrics, label_metrics, pair_metrics, to_csv, to_table
from reward_model.benchmarks.report import render_report
from reward_model.benchmarks.rules import rating_metrics
from reward_model.benchmarks.statistics import (
    item_pairs,
    kendall,
    order_consistency,
    pairwise_accuracy,
    pearson,
    spearman,
    tie_optimised_accuracy,
)
from reward_model.scorers import load_scorer
from reward_model.types import LabelledImage, PreferencePair
from tests.reward_models import backbone_folder, bytes_of
from tests.reward_models import load as load_tiny

SEEDS = range(20)


def sign(number: float) -> int:
    return (number > 0) - (number < 0)


def coarse(rng: np.random.Generator, num: int, *, step: float = 0.25) -> list[float]:
    """Return random numbers with many ties, exact in binary."""
    return (np.round(rng.normal(size=num) / step) * step).tolist()


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def slow_pearson(x: list[float], y: list[float]) -> float:
    dx, dy = [a - mean(x) for a in x], [b - mean(y) for b in y]
    cov = math.fsum(a * b for a, b in zip(dx, dy, strict=True))
    return cov / math.sqrt(math.fsum(a * a for a in dx) * math.fsum(b * b for b in dy))


def slow_ranks(x: list[float]) -> list[float]:
    return [sum(b < a for b in x) + (sum(b == a for b in x) + 1) / 2 for a in x]


def slow_kendall(x: list[float], y: list[float]) -> float:
    signs = [(sign(x[i] - x[j]), sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    untied_x, untied_y = sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)
    return sum(a * b for a, b in signs) / math.sqrt(untied_x * untied_y)


def slow_auroc(scores: list[float], labels: list[int]) -> float:
    good = [s for s, label in zip(scores, labels, strict=True) if label == 1]
    bad = [s for s, label in zip(scores, labels, strict=True) if label == 0]
    return mean([(sign(g - b) + 1) / 2 for g in good for b in bad])


def slow_calibration_error(probabilities: list[float], labels: list[int], num_bins: int) -> float:
    error = 0.0
    for k in range(num_bins):
        rows = [i for i, p in enumerate(probabilities) if k / num_bins < p <= (k + 1) / num_bins or (k == p == 0)]
        if rows:
            gap = mean([labels[i] for i in rows]) - mean([probabilities[i] for i in rows])
            error += len(rows) / len(labels) * abs(gap)
    return error


def slow_tie_optimised(differences: list[float], outcomes: list[int]) -> tuple[float, float]:
    """Try the thresholds at every |difference|, between them and beyond."""
    widths = sorted({0.0, *map(abs, differences)})
    widths += [(a + b) / 2 for a, b in pairwise(widths)] + [widths[-1] + 1]
    best = (-1.0, 0.0)
    for threshold in sorted(widths):
        predictions = [0 if abs(d) <= threshold else sign(d) for d in differences]
        best = max(best, (mean([p == o for p, o in zip(predictions, outcomes, strict=True)]), -threshold))
    return best[0], -best[1]


def by_name(metrics: list[Metric]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


# Pairs


def test_pairwise_accuracy_by_hand() -> None:
    """Gaps 1, 0, -2, 0.5: two right, one tied, one wrong."""
    accuracy = pairwise_accuracy([2.0, 1.0, 0.0, 0.5], [1.0, 1.0, 2.0, 0.0])
    assert (accuracy.num_right, accuracy.num_tied, accuracy.num_wrong) == (2, 1, 1)
    assert accuracy.ties_wrong == 2 / 4
    assert accuracy.ties_dropped == 2 / 3


@pytest.mark.parametrize(("threshold", "right", "tied"), [(0.25, 2, 1), (0.5, 1, 2), (1.0, 0, 3), (2.0, 0, 4)])
def test_a_gap_up_to_the_threshold_is_a_tie(threshold: float, right: int, tied: int) -> None:
    accuracy = pairwise_accuracy([2.0, 1.0, 0.0, 0.5], [1.0, 1.0, 2.0, 0.0], threshold=threshold)
    assert (accuracy.num_right, accuracy.num_tied, accuracy.num_wrong) == (right, tied, 4 - right - tied)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_pairwise_accuracy_agrees_with_the_slow_loop(threshold: float) -> None:
    rng = np.random.default_rng(0)
    winner, loser = coarse(rng, 500), coarse(rng, 500)
    right = wrong = 0
    for w, l in zip(winner, loser, strict=True):  # noqa: E741
        right += w - l > threshold
        wrong += l - w > threshold
    accuracy = pairwise_accuracy(winner, loser, threshold=threshold)
    assert accuracy.ties_wrong == right / 500
    assert accuracy.ties_dropped == right / (right + wrong)


def test_pairwise_accuracy_in_the_limits() -> None:
    """Perfect scores, their reverse, and random scores."""
    rng = np.random.default_rng(0)
    low, random = rng.uniform(size=(2, 4000))
    assert pairwise_accuracy(low + 1, low).ties_wrong == 1
    assert pairwise_accuracy(low, low + 1).ties_dropped == 0
    assert pairwise_accuracy(random, low).ties_wrong == pytest.approx(0.5, abs=0.03)


def test_scores_that_tie_all_pairs_are_never_right_and_have_no_accuracy_without_ties() -> None:
    accuracy = pairwise_accuracy([1.0, 2.0], [1.0, 2.0])
    assert accuracy.ties_wrong == 0
    with pytest.raises(UndefinedMetricError, match="tie all 2 pairs"):
        _ = accuracy.ties_dropped


def test_tie_optimised_accuracy_by_hand() -> None:
    """2 of 4 are right without a threshold; 0.2 ties the first two rightly; 0.5 would tie a third one wrongly."""
    best = tie_optimised_accuracy([0.1, -0.2, 0.5, 1.0], [0, 0, 1, 1])
    assert (best.accuracy, best.threshold) == (1.0, 0.2)


@pytest.mark.parametrize("seed", SEEDS)
def test_tie_optimised_accuracy_agrees_with_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences = coarse(rng, 60)
    outcomes = [sign(d + e) if abs(d) > 0.3 else 0 for d, e in zip(differences, coarse(rng, 60), strict=True)]
    best = tie_optimised_accuracy(differences, outcomes)
    assert (best.accuracy, best.threshold) == slow_tie_optimised(differences, outcomes)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_tied_outcomes_no_threshold_helps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences, outcomes = coarse(rng, 40), rng.choice([-1, 1], size=40)
    best = tie_optimised_accuracy(differences, outcomes)
    assert best.threshold == 0
    assert best.accuracy == pairwise_accuracy(differences * outcomes, np.zeros(40)).ties_wrong


def test_equal_scores_reach_the_fraction_of_ties() -> None:
    best = tie_optimised_accuracy([0.0] * 5, [0, 0, 0, 1, -1])
    assert (best.accuracy, best.threshold) == (3 / 5, 0.0)


def test_the_threshold_covers_all_pairs_if_all_outcomes_are_ties() -> None:
    best = tie_optimised_accuracy([0.3, -2.0, 1.0], [0, 0, 0])
    assert (best.accuracy, best.threshold) == (1.0, 2.0)


def test_the_lowest_of_equally_good_thresholds_is_returned() -> None:
    """0.1 gains a pair; 0.2 loses one and 0.3 gains one."""
    best = tie_optimised_accuracy([0.1, 0.2, 0.3], [0, 1, 0])
    assert (best.accuracy, best.threshold) == (2 / 3, 0.1)


def test_a_threshold_that_is_no_better_than_none_is_not_chosen() -> None:
    """0.1 would gain one pair and lose another."""
    best = tie_optimised_accuracy([0.1, 0.1], [0, 1])
    assert (best.accuracy, best.threshold) == (1 / 2, 0.0)


def test_the_scale_of_the_scores_scales_the_threshold_only() -> None:
    rng = np.random.default_rng(3)
    differences, outcomes = np.array(coarse(rng, 80)), rng.choice([-1, 0, 0, 1], size=80)
    one, four = tie_optimised_accuracy(differences, outcomes), tie_optimised_accuracy(4 * differences, outcomes)
    assert (four.accuracy, four.threshold) == (one.accuracy, 4 * one.threshold)


def test_item_pairs_by_hand() -> None:
    pairs = item_pairs([0.5, 0.0, 2.0], [3, 3, 1])
    assert [*zip(pairs.first, pairs.second, strict=True)] == [(0, 1), (0, 2), (1, 2)]
    assert pairs.differences.tolist() == [0.5, -1.5, -2.0]
    assert pairs.outcomes.tolist() == [0, 1, 1]


def test_groups_restrict_pairs_to_their_items() -> None:
    rng = np.random.default_rng(0)
    scores, ratings = coarse(rng, 30), coarse(rng, 30, step=1.0)
    groups = rng.choice(["a red fox", "two cups", "a tree", "alone"], size=30, p=[0.4, 0.3, 0.25, 0.05])
    pairs = item_pairs(scores, ratings, groups=groups)
    expected = {
        (i, j, scores[i] - scores[j], sign(ratings[i] - ratings[j]))
        for i, j in combinations(range(30), 2)
        if groups[i] == groups[j]
    }
    found = [*zip(pairs.first, pairs.second, pairs.differences, pairs.outcomes, strict=True)]
    assert len(found) == len(expected)
    assert set(found) == expected


# Correlations


def test_correlations_by_hand() -> None:
    """1, 2, 3 against 1, 3, 2: one pair of three is reversed."""
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert spearman([1, 2, 3], [10, 1000, 20]) == pytest.approx(0.5)
    assert kendall([1, 2, 3], [1, 3, 2]) == pytest.approx(1 / 3)


def test_kendall_counts_ties_as_tau_b() -> None:
    """Two of three pairs are concordant and one is tied by the ratings: 2 / sqrt(3 * 2)."""
    assert kendall([1, 2, 3], [1, 2, 2]) == pytest.approx(2 / math.sqrt(6))


@pytest.mark.parametrize("seed", SEEDS)
def test_correlations_agree_with_the_slow_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = coarse(rng, 40)
    ratings = [round(s + e) for s, e in zip(scores, rng.normal(size=40).tolist(), strict=True)]
    assert pearson(scores, ratings) == pytest.approx(slow_pearson(scores, ratings), abs=1e-12)
    assert spearman(scores, ratings) == pytest.approx(slow_pearson(slow_ranks(scores), slow_ranks(ratings)), abs=1e-12)
    library: Any = stats.spearmanr(scores, ratings)
    assert spearman(scores, ratings) == pytest.approx(library.statistic, abs=1e-12)
    assert kendall(scores, ratings) == pytest.approx(slow_kendall(scores, ratings), abs=1e-12)


@pytest.mark.parametrize("correlation", [pearson, spearman, kendall])
@pytest.mark.parametrize("num", [2, 3, 200])
def test_correlations_in_the_limits(correlation: Callable[..., float], num: int) -> None:
    scores = np.random.default_rng(0).normal(size=num)
    assert correlation(scores, 3 * scores + 1) == pytest.approx(1)
    assert correlation(scores, -scores) == pytest.approx(-1)


@pytest.mark.parametrize("correlation", [pearson, spearman, kendall])
def test_random_scores_are_uncorrelated(correlation: Callable[..., float]) -> None:
    scores, ratings = np.random.default_rng(0).normal(size=(2, 4000))
    assert correlation(scores, ratings) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("transform", [np.exp, np.arctan, lambda x: x**3 - 5])
def test_rank_metrics_depend_on_the_order_of_scores_only(transform: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    scores, ratings = np.array(coarse(rng, 100)), np.array(coarse(rng, 100, step=1.0))
    labels = (ratings > 0).astype(int)
    for metric in (lambda s: spearman(s, ratings), lambda s: kendall(s, ratings), lambda s: auroc(s, labels)):
        assert metric(transform(scores)) == metric(scores)
    other = np.array(coarse(rng, 100))
    assert pairwise_accuracy(transform(scores), transform(other)) == pairwise_accuracy(scores, other)


# Labels


def test_both_positive_classes_by_hand() -> None:
    """Good: 3 of 4 found. Bad: 1 of 2 found. A probability of 0.5 is predicted good."""
    counts = confusion([0.9, 0.5, 0.8, 0.1, 0.7, 0.2], [1, 1, 1, 1, 0, 0])
    assert counts == Confusion(good_called_good=3, good_called_bad=1, bad_called_good=1, bad_called_bad=1)
    assert counts.accuracy == 4 / 6
    assert (counts.precision(1), counts.recall(1), counts.f1(1)) == (3 / 4, 3 / 4, 3 / 4)
    assert (counts.precision(0), counts.recall(0), counts.f1(0)) == (1 / 2, 1 / 2, 1 / 2)


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.5])
@pytest.mark.parametrize("positive", [0, 1])
def test_classification_agrees_with_the_slow_loop(threshold: float, positive: Any) -> None:
    rng = np.random.default_rng(0)
    scores, labels = coarse(rng, 300), rng.integers(2, size=300).tolist()
    hits = false_alarms = misses = 0
    for score, label in zip(scores, labels, strict=True):
        predicted = int(score >= threshold)
        hits += predicted == positive == label
        false_alarms += predicted == positive != label
        misses += predicted != positive == label
    counts = confusion(scores, labels, threshold=threshold)
    precision, recall = hits / (hits + false_alarms), hits / (hits + misses)
    assert counts.precision(positive) == precision
    assert counts.recall(positive) == recall
    assert counts.f1(positive) == pytest.approx(2 * precision * recall / (precision + recall))
    assert counts.accuracy == 1 - (false_alarms + misses) / 300


def test_negated_scores_and_labels_swap_the_classes() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=50), rng.integers(2, size=50)
    one, other = confusion(scores, labels, threshold=0.1), confusion(-scores, 1 - labels, threshold=-0.1)
    assert (one.f1(1), one.precision(1), one.recall(1)) == (other.f1(0), other.precision(0), other.recall(0))
    assert one.accuracy == other.accuracy


def test_f1_of_a_missed_class_is_0_and_of_an_absent_class_undefined() -> None:
    missed = confusion([0.9, 0.8], [1, 0])
    assert (missed.f1(0), missed.recall(0)) == (0, 0)
    with pytest.raises(UndefinedMetricError, match="No image is predicted 0"):
        missed.precision(0)
    absent = confusion([0.9, 0.8], [1, 1])
    with pytest.raises(UndefinedMetricError, match="No image is labelled 0"):
        absent.recall(0)
    with pytest.raises(UndefinedMetricError, match="No image is labelled or predicted 0"):
        absent.f1(0)


def test_auroc_by_hand() -> None:
    """Good 3 and 1 against bad 1 and 0: won, won, tied, won."""
    assert auroc([3, 1, 1, 0], [1, 1, 0, 0]) == 3.5 / 4


@pytest.mark.parametrize("seed", SEEDS)
def test_auroc_agrees_with_the_slow_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = coarse(rng, 60), rng.integers(2, size=60).tolist()
    assert auroc(scores, labels) == pytest.approx(slow_auroc(scores, labels), abs=1e-12)
    assert auroc(np.negative(scores), labels) == pytest.approx(1 - auroc(scores, labels), abs=1e-12)


def test_auroc_in_the_limits() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=4000)
    assert auroc(labels, labels) == 1
    assert auroc(-labels, labels) == 0
    assert auroc(np.zeros(4000), labels) == 0.5
    assert auroc(rng.normal(size=4000), labels) == pytest.approx(0.5, abs=0.03)


# Calibration


def test_calibration_error_by_hand() -> None:
    """Three bins of one image each, off by 0.05, 0.85 and 0.05."""
    assert calibration_error([0.05, 0.15, 0.95], [0, 1, 1]) == pytest.approx(0.95 / 3)


def test_an_edge_belongs_to_the_lower_bin() -> None:
    """0.5 shares the lower half with 0.4, where +0.5 and -0.4 almost cancel."""
    assert calibration_error([0.5, 0.4], [1, 0], num_bins=2) == pytest.approx(0.05)


@pytest.mark.parametrize("num_bins", [1, 7, 10, 20])
@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_agrees_with_the_slow_loop(num_bins: int, seed: int) -> None:
    """Probabilities on the edges themselves, 0 and 1 among them."""
    rng = np.random.default_rng(seed)
    probabilities = (rng.integers(0, 21, size=200) / 20).tolist()
    labels = rng.integers(2, size=200).tolist()
    expected = slow_calibration_error(probabilities, labels, num_bins)
    assert calibration_error(probabilities, labels, num_bins=num_bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_in_the_limits() -> None:
    """Perfect, reversed, and labels drawn with the stated probabilities."""
    rng = np.random.default_rng(0)
    labels = rng.integers(2, size=1000)
    assert calibration_error(labels, labels) == 0
    assert calibration_error(1 - labels, labels) == 1
    stated = rng.uniform(size=100_000)
    assert calibration_error(stated, rng.uniform(size=100_000) < stated) < 0.01


def test_pair_calibration_error_by_hand() -> None:
    """Log-odds of log 3: probability 0.75 of the winner, 0.25 of the loser."""
    assert pair_calibration_error([math.log(3)]) == pytest.approx(0.25)
    assert pair_calibration_error([0.0]) == 0
    assert pair_calibration_error([700.0, -700.0]) == pytest.approx(0.5)


def test_pair_calibration_error_agrees_with_the_slow_loop() -> None:
    margins = np.random.default_rng(0).normal(size=200).tolist()
    winner, loser = [1 / (1 + math.exp(-m)) for m in margins], [1 / (1 + math.exp(m)) for m in margins]
    expected = slow_calibration_error(winner + loser, [1] * 200 + [0] * 200, 10)
    assert pair_calibration_error(margins) == pytest.approx(expected, abs=1e-12)


# Order


def test_order_consistency_by_hand() -> None:
    """Gaps 0, 0.25, 0 and 0.5; the second prefers the first image in both orders, the third gives 0.5 in both."""
    order = order_consistency([0.75, 0.625, 0.5, 0.25], [0.25, 0.625, 0.5, 0.25])
    assert (order.largest_gap, order.mean_gap, order.same_choice) == (0.5, 0.25 * 0.75, 0.5)


def test_antisymmetric_preferences_are_consistent() -> None:
    probability = np.random.default_rng(0).uniform(size=100)
    order = order_consistency(probability, 1 - probability)
    assert order.largest_gap == pytest.approx(0, abs=1e-15)
    assert order.same_choice == 1


# Bootstrap


def test_the_interval_agrees_with_the_slow_loop() -> None:
    """The same rows are drawn from both columns, and the ends are quantiles of the resamples."""
    rng = np.random.default_rng(7)
    x, y = rng.normal(size=(2, 30))
    draws = np.random.default_rng(5)
    values = []
    for _ in range(200):
        rows = draws.integers(30, size=30)
        values.append(slow_pearson(x[rows].tolist(), y[rows].tolist()))
    interval = bootstrap_interval(pearson, x, y, num_resamples=200, seed=5, level=0.9)
    assert interval == pytest.approx((np.quantile(values, 0.05), np.quantile(values, 0.95)))


def test_the_interval_is_deterministic_in_its_seed() -> None:
    values = np.random.default_rng(0).normal(size=40)
    first, again, other = (
        bootstrap_interval(lambda x: float(x.mean()), values, num_resamples=100, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    """400 samples of 100 pairs, of which 70 % are right in expectation."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(400):
        right = (rng.uniform(size=100) < 0.7).astype(float)
        low, high = bootstrap_interval(lambda x: float(x.mean()), right, num_resamples=200, seed=seed)
        covered += low <= 0.7 <= high
    assert 0.92 <= covered / 400 <= 0.98


def test_the_interval_has_no_width_if_there_is_no_error() -> None:
    assert bootstrap_interval(auroc, [3, 2, 1, 0], [1, 1, 0, 0], num_resamples=50) == (1, 1)


def test_undefined_resamples_are_drawn_again() -> None:
    """A third of the resamples lack the only bad image."""
    draws, values = np.random.default_rng(0), []
    scores, labels = np.array([0.1, 0.5, 0.3, 0.9]), np.array([1, 1, 0, 1])
    while len(values) < 100:
        rows = draws.integers(4, size=4)
        if 0 < labels[rows].sum() < 4:
            values.append(auroc(scores[rows], labels[rows]))
    expected = np.quantile(values, [0.025, 0.975])
    assert bootstrap_interval(auroc, scores, labels, num_resamples=100) == pytest.approx(tuple(expected))


def test_too_many_undefined_resamples_are_an_error() -> None:
    def all_rows(rows: np.ndarray) -> float:
        if len(set(rows.tolist())) < len(rows):
            raise ValueError("A row is missing.")
        return 1.0

    with pytest.raises(UndefinedMetricError, match="of 20 resamples are undefined"):
        bootstrap_interval(all_rows, np.arange(10), num_resamples=10)


def test_a_statistic_that_fails_on_the_data_fails_at_once() -> None:
    with pytest.raises(UndefinedMetricError, match="AUROC needs both labels; 2 are 1 and 0 are 0"):
        bootstrap_interval(auroc, [1.0, 2.0], [1, 1])


def test_a_statistic_that_returns_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite on a resample"):
        bootstrap_interval(lambda _: math.nan, [1.0, 2.0], num_resamples=3)


# Groups of metrics


def test_pair_metrics_by_hand() -> None:
    """Strict pairs: right, right, tied scores, wrong. A threshold of 0.5 finds one of two tied outcomes."""
    logits, outcomes = [2.0, -1.0, 0.0, -3.0, 0.5, 4.0], [1, -1, 1, 1, 0, 0]
    metrics = by_name(pair_metrics(logits, outcomes, num_resamples=50))
    wrong, dropped, best = (metrics[f"accuracy_{name}"] for name in ("ties_wrong", "ties_dropped", "tie_optimised"))
    assert (wrong.value, wrong.count, wrong.note) == (2 / 4, 4, "1 tied by the model")
    assert (dropped.value, dropped.count, dropped.note) == (2 / 3, 3, "1 tied by the model")
    assert (best.value, best.count, best.note) == (3 / 6, 6, "2 tied by annotators, tie threshold 0.5")
    expected = slow_calibration_error(
        [1 / (1 + math.exp(-m)) for m in (2, 1, 0, -3, -2, -1, 0, 3)], [1] * 4 + [0] * 4, 10
    )
    assert metrics["calibration_error"].value == pytest.approx(expected)


def test_pair_metrics_do_not_depend_on_which_image_comes_first() -> None:
    rng = np.random.default_rng(0)
    logits, outcomes, flip = rng.normal(size=80), rng.choice([-1, 0, 1], size=80), rng.choice([-1, 1], size=80)
    assert pair_metrics(logits, outcomes, num_resamples=20) == pair_metrics(
        flip * logits, flip * outcomes, num_resamples=20
    )


def test_tie_optimised_accuracy_is_reported_if_there_are_tied_outcomes() -> None:
    strict, tied = (pair_metrics([1.0, 2.0, -1.0], [1, 1, last], num_resamples=5) for last in (-1, 0))
    assert "accuracy_tie_optimised" not in by_name(strict)
    assert "accuracy_tie_optimised" in by_name(tied)


def test_scores_within_the_threshold_are_ties() -> None:
    metrics = by_name(pair_metrics([1.0, 0.2, -0.2], [1, 1, 1], threshold=0.5, num_resamples=5))
    assert metrics["accuracy_ties_wrong"].value == 1 / 3
    assert metrics["accuracy_ties_dropped"].value == 1


def test_an_undefined_metric_has_a_note_and_the_others_are_reported() -> None:
    metrics = by_name(pair_metrics([0.0, 0.0], [1, -1], num_resamples=5))
    assert metrics["accuracy_ties_wrong"].value == 0
    dropped = metrics["accuracy_ties_dropped"]
    assert math.isnan(dropped.value)
    assert (dropped.low, dropped.high, dropped.count) == (None, None, 0)
    assert dropped.note == "undefined: The scores tie all 2 pairs; none is left."

    all_tied = by_name(pair_metrics([0.5, 0.1], [0, 0], num_resamples=5))
    assert math.isnan(all_tied["calibration_error"].value)
    assert all_tied["accuracy_tie_optimised"].value == 1

    one_class = by_name(label_metrics([0.5, 1.0], [1, 1], [0.6, 0.7], num_resamples=5))
    assert {name for name, metric in one_class.items() if math.isnan(metric.value)} == {
        "f1_bad", "precision_bad", "recall_bad", "auroc",
    }  # fmt: skip
    assert one_class["accuracy"].value == 1

    ratings = by_name(rating_metrics([1.0, 2.0], [3.0, 3.0], ["a", "b"], num_resamples=5))
    assert ratings.pop("pairwise_accuracy_tie_optimised").value == 1
    assert all(math.isnan(metric.value) and metric.note.startswith("undefined: ") for metric in ratings.values())


def test_a_single_row_has_a_value_but_no_interval() -> None:
    (wrong, *_) = pair_metrics([1.0], [1])
    assert (wrong.value, wrong.low, wrong.high) == (1, None, None)
    assert wrong.note == "0 tied by the model; no interval: An interval needs at least 2 rows; there is 1."


def test_label_metrics_are_the_single_metrics() -> None:
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=60), rng.integers(2, size=60)
    probabilities = 1 / (1 + np.exp(-scores))
    counts = confusion(probabilities, labels, threshold=0.4)
    metrics = label_metrics(scores, labels, probabilities, threshold=0.4, num_resamples=20, seed=3)
    assert {metric.name: metric.value for metric in metrics} == {
        "accuracy": counts.accuracy,
        "f1_good": counts.f1(1),
        "precision_good": counts.precision(1),
        "recall_good": counts.recall(1),
        "f1_bad": counts.f1(0),
        "precision_bad": counts.precision(0),
        "recall_bad": counts.recall(0),
        "auroc": auroc(scores, labels),
        "calibration_error": calibration_error(probabilities, labels),
    }
    expected = bootstrap_interval(auroc, scores, labels, num_resamples=20, seed=3)
    assert (by_name(metrics)["auroc"].low, by_name(metrics)["auroc"].high) == expected


@pytest.mark.parametrize("group_size", [1, 3])
def test_rating_intervals_resample_prompts_and_never_pair_an_image_with_itself(group_size: int) -> None:
    rng = np.random.default_rng(1)
    scores, ratings = coarse(rng, 12), coarse(rng, 12, step=1.0)
    groups, num_groups = [f"{i // group_size:02}" for i in range(12)], 12 // group_size

    def slow(pairs: list[tuple[int, int]]) -> float:
        differences = [scores[i] - scores[j] for i, j in pairs]
        return slow_tie_optimised(differences, [sign(ratings[i] - ratings[j]) for i, j in pairs])[0]

    draws, values = np.random.default_rng(0), {"tie_optimised": [], "within_prompts": []}
    for _ in range(40):
        rows = [
            group_size * group + i for group in draws.integers(num_groups, size=num_groups) for i in range(group_size)
        ]
        pairs = [(i, j) for i, j in combinations(rows, 2) if i != j]
        values["tie_optimised"].append(slow(pairs))
        if group_size > 1:
            values["within_prompts"].append(slow([(i, j) for i, j in pairs if groups[i] == groups[j]]))

    metrics = by_name(rating_metrics(scores, ratings, groups, num_resamples=40))

    for name, within in (("tie_optimised", None), ("within_prompts", groups))[: 1 if group_size == 1 else 2]:
        metric, pairs = metrics[f"pairwise_accuracy_{name}"], item_pairs(scores, ratings, groups=within)
        assert metric.value == tie_optimised_accuracy(pairs.differences, pairs.outcomes).accuracy
        assert (metric.low, metric.high) == pytest.approx(tuple(np.quantile(values[name], [0.025, 0.975])))
    assert (metrics["pearson"].value, metrics["spearman"].value, metrics["kendall_tau_b"].value) == (
        pearson(scores, ratings), spearman(scores, ratings), kendall(scores, ratings),
    )  # fmt: skip


# Records


@pytest.fixture
def scored(tmp_path: Path) -> RecordScores:
    """Four pairs of a dark winner and a light loser, of which one is right, two are wrong, and one is a tie."""
    for name, colour in (("dark", "black"), ("light", "white")):
        Image.new("RGB", (400, 300), colour).save(tmp_path / f"{name}.png")
    winner, loser = tmp_path / "dark.png", tmp_path / "light.png"
    pairs = [
        PreferencePair(winner, loser, prompt, prompt, tie=prompt == "a tie", where=f"pairs.jsonl:{line}")
        for line, prompt in enumerate(["right", "a <b>small</b> error", "a large error", "a tie"], start=1)
    ]
    return RecordScores(pairs, torch.tensor([1.0, -0.5, -2.0, -3.0]), torch.zeros(4), [], torch.zeros(0))


def test_mistakes_are_wrong_pairs_with_the_largest_log_odds_first(scored: RecordScores) -> None:
    mistakes = worst_mistakes(scored, count=5)
    assert [(mistake.where, mistake.log_odds) for mistake in mistakes] == [
        ("pairs.jsonl:3", 2.0),
        ("pairs.jsonl:2", 0.5),
    ]
    assert worst_mistakes(scored, count=1) == mistakes[:1]


def test_the_report_shows_metrics_and_mistakes_and_loads_nothing(scored: RecordScores) -> None:
    mistakes = worst_mistakes(scored, count=5)
    page = render_report("my-reward", {"pairs": METRICS, "none": METRICS[2:]}, {"pairs": mistakes, "none": []})
    assert re.findall(
        r">(accuracy|auroc)</td><td[^>]*>([^<]*)</td>\s*<td[^>]*>([^<]*)</td>", page
    ) == [
        ("accuracy", "0.7500", "0.5000 to 1.0000"), ("auroc", "-", "-"), ("auroc", "-", "-"),
    ]  # fmt: skip
    assert re.findall(r"log-odds ([\d.]+) of the loser; (\S+)</p>", page) == [
        ("2.00", "pairs.jsonl:3"), ("0.50", "pairs.jsonl:2"),
    ]  # fmt: skip
    assert "a &lt;b&gt;small&lt;/b&gt; error" in page
    assert "http://" not in page
    assert "https://" not in page
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    images = [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]
    assert [(image.size, image.convert("RGB").getpixel((0, 0))) for image in images] == [
        ((320, 240), (0, 0, 0)), ((320, 240), (255, 255, 255)),
    ] * 2  # fmt: skip


def failing_pairs() -> tuple[list[PreferencePair], np.ndarray]:
    """Six pairs: short prompts are right; long ones and pairs of one image with two prompts are wrong."""
    a, b = Path("a.png"), Path("b.png")
    short = [PreferencePair(a, b, "a fox", "a fox", rating_gap=gap) for gap in (1.0, 2.0, 3.0)]
    text = "a photo of a red fox that runs over green hills in the morning"
    long = [PreferencePair(a, b, text, text) for _ in range(2)]
    return [*short, *long, PreferencePair(a, a, "a fox", "a cat")], np.array([0.5, 3.0, 9.0, -3.0, -9.0, -0.2])


def test_the_accuracy_by_kind_of_pair_names_where_a_model_fails() -> None:
    groups = accuracy_by_group(*failing_pairs())
    found = {(group.by, group.value): (group.accuracy.value, group.accuracy.count) for group in groups}
    assert found == {
        ("words in the prompt", "0 to 5"): (3 / 4, 4), ("words in the prompt", "11 to 20"): (0, 2),
        ("style of the prompt", "none"): (3 / 4, 4), ("style of the prompt", "photo"): (0, 2),
        ("what differs", "the image"): (3 / 5, 5), ("what differs", "the prompt"): (0, 1),
        ("rating gap", "at most 1"): (1, 1), ("rating gap", "above 1, at most 2"): (1, 1),
        ("rating gap", "above 2"): (1, 1),
    }  # fmt: skip
    assert [group.value for group in groups if group.by == "words in the prompt"] == ["11 to 20", "0 to 5"]


def test_calibration_and_log_odds_count_every_strict_pair_once() -> None:
    pairs, logits = failing_pairs()
    curve = calibration_curve(logits)
    assert [(c.low, c.high, c.right, c.count) for c in curve] == [
        (0.5, 0.6, 0, 1), (0.6, 0.7, 1, 1), (0.95, 0.99, 0.5, 2), (0.99, 1.0, 0.5, 2),
    ]  # fmt: skip
    assert curve[0].mean == pytest.approx(1 / (1 + math.exp(-0.2)))
    bins = {one.label: one.count for one in histogram(logits) if one.count}
    assert bins == {"below -8": 1, "-4 to -2": 1, "-1 to 0": 1, "0 to 1": 1, "2 to 4": 1, "above 8": 1}
    tie = replace(pairs[0], tie=True)
    scores = RecordScores([*pairs, tie], torch.tensor([*logits, 7.0]), torch.zeros(0), [], torch.zeros(0))
    assert sum(one.count for one in break_down(scores).log_odds) == 6
    assert break_down(RecordScores([tie], torch.tensor([7.0]), torch.zeros(0), [], torch.zeros(0))).groups == []


def test_the_report_shows_where_a_model_fails(scored: RecordScores) -> None:
    pairs, logits = failing_pairs()
    found = break_down(RecordScores(pairs, torch.tensor(logits), torch.zeros(0), [], torch.zeros(0)))
    page = render_report("mine", {"pairs": METRICS}, {"pairs": []}, {"pairs": found})
    rows = plain_rows(page)
    assert "11 to 20 | 0.0 % | none | 2 few" in rows, "two pairs of one prompt have no interval"
    assert "95 to 99 % | 95.3 | 50.0 | 2" in rows
    assert 'style="width: 75.0%"' in page
    assert "Right on <b>50.0 %</b> of 6 pairs" in page
    assert "2 pairs are wrong with a confidence of 95 % or more" in page
    assert "Accuracy by group" not in render_report("mine", {"pairs": METRICS}, {"pairs": []})


def plain_rows(page: str) -> list[str]:
    """The rows of the tables of a page as text, with | between cells, without empty ones."""
    rows = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    ]
    texts = [[re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", cell)).strip() for cell in row] for row in rows]
    return [" | ".join(filter(None, row)) for row in texts]


def tagged(
    count: int, right: int, *, start: int = 0, **tags: tuple[str, ...]
) -> tuple[list[PreferencePair], list[float]]:
    """Pairs of prompts of their own with these tags, of which the first `right` are right."""
    prompts = [f"prompt {start + i}" for i in range(count)]
    pairs = [PreferencePair(Path("a.png"), Path("b.png"), text, text, tags=tags) for text in prompts]
    return pairs, [1.0 if i < right else -5.0 for i in range(count)]


def tagged_scores() -> RecordScores:
    """100 easy pairs, 40 of bound attributes that are half right, and 3 of two generators that are wrong."""
    parts = [
        tagged(100, 95, tier=("one",), generator=("sdxl",)),
        tagged(40, 20, start=100, tier=("binding",), generator=("flux",)),
        tagged(3, 0, start=140, tier=("binding",), generator=("sdxl", "flux")),
    ]
    pairs = [pair for some, _ in parts for pair in some]
    logits = torch.tensor([logit for _, some in parts for logit in some])
    labelled = [LabelledImage(Path("a.png"), "a", i % 2, tags={"source": ("x" if i < 4 else "y",)}) for i in range(8)]
    scores = torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0])
    return RecordScores(pairs, logits, torch.zeros(0), labelled, scores, logits, torch.zeros(len(logits)))


def test_accuracy_by_tag_has_wilsons_interval_and_marks_small_groups() -> None:
    """A pair with two generators counts for both, and tags come before the other criteria."""
    found = break_down(tagged_scores())
    by_tag = {(one.by, one.value): one for one in found.groups if one.by in ("tier", "generator")}
    accuracies = {key: one.accuracy for key, one in by_tag.items()}
    assert {key: (round(one.value * one.count), one.count) for key, one in accuracies.items()} == {
        ("tier", "one"): (95, 100), ("tier", "binding"): (20, 43),
        ("generator", "sdxl"): (95, 103), ("generator", "flux"): (20, 43),
    }  # fmt: skip
    binding = by_tag["tier", "binding"].accuracy
    assert (binding.low, binding.high) == pytest.approx(wilson_interval(20, 43))
    assert [one.by for one in found.groups][:2] == ["tier", "tier"]
    assert [one.value for one in found.weakest()] == ["binding", "flux"]
    assert not by_tag["tier", "binding"].is_small
    pairs, logits = tagged(29, 3, tier=("a", "b"))
    small = accuracy_by_group(pairs, np.array(logits))
    assert [one.is_small for one in small if one.by == "tier"] == [True, True]
    assert found.num_confident_mistakes == 28
    assert (found.overall.value, found.overall.count) == (115 / 143, 143)


def test_prompts_with_several_pairs_are_resampled_together() -> None:
    """Forty pairs of two prompts, one all right and one all wrong, say nothing: Wilson's interval would claim much."""
    pairs = [PreferencePair(Path("a.png"), Path("b.png"), text, text, tags={"tier": ("x", "y")}) for text in "ab" * 20]
    group = accuracy_by_group(pairs, np.array([1.0, -1.0] * 20))[0]
    assert (group.accuracy.low, group.accuracy.high) == (0, 1)


def test_labelled_images_are_broken_down_by_their_tags() -> None:
    found = {(one.by, one.value): one.accuracy.value for one in break_down(tagged_scores()).label_groups}
    assert found == {("source", "x"): 0.75, ("source", "y"): 1.0}


def test_the_distributions_of_scores_count_every_image_once() -> None:
    bins = score_histogram(np.array([0.0, 1.0, 2.0, 3.0]), np.array([-100.0, 0.0, 0.0, 0.1]))
    assert sum(one.preferred for one in bins) == pytest.approx(1)
    assert sum(one.rejected for one in bins) == pytest.approx(1)
    assert bins[0].rejected == 0.25
    same = score_histogram(np.zeros(3), np.zeros(2))
    assert [one.preferred for one in same if one.preferred] == [1.0]


def test_maps_of_attention_lie_over_both_images_of_a_mistake(scored: RecordScores) -> None:
    """Opaque where the attention is, in proportion to it, and clear elsewhere; an even map is faint."""
    halves = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.0, 0.5, 1.0, 1.0]])
    left, even = (AttentionMap(torch.tensor(weights), halves) for weights in ([1.0, 0.0], [0.5, 0.5]))
    mistakes = [replace(one, maps=(left, even)) for one in worst_mistakes(scored, count=1)]
    page = render_report("mine", {"pairs": METRICS}, {"pairs": mistakes})
    sources = re.findall(r'class="map"[^>]*src="data:image/png;base64,([^"]+)"', page)
    one, other = (Image.open(io.BytesIO(base64.b64decode(source))) for source in sources)
    assert one.size == (320, 240)
    opacity = [one.getpixel((x, 100))[3] for x in (10, 310)]
    assert opacity == [round(2 / 4 * 0.6 * 255), 0]
    assert other.getpixel((10, 100))[3] == round(1 / 4 * 0.6 * 255)
    assert "attention peaks at 2.0× an even spread" in page
    assert page.count('type="checkbox"') == 1
    page = render_report("mine", {"pairs": METRICS}, {"pairs": worst_mistakes(scored, count=1)}, no_map="No map: why.")
    assert "No map: why." in page
    assert 'class="map"' not in page


def test_the_page_of_a_real_reward_model_has_its_scores_and_maps(tmp_path: Path) -> None:
    """Log-odds are those of `logits`, to the bit, and each mistake has the maps of its two images."""
    reward = load_tiny("llava")
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for seed, path in enumerate(paths):
        Image.fromarray(bytes_of(40, 56, seed=seed).permute(1, 2, 0).numpy()).save(path)
    pairs = [PreferencePair(a, b, "a red fox", "a red fox") for a, b in zip(paths[:3], paths[3:], strict=True)]
    scores = score_records(reward, pairs, batch_size=2)
    logits = reward.logits(paths[:3], paths[3:], ["a red fox"] * 3, batch_size=2)
    assert torch.equal(scores.logits, logits)
    assert torch.equal(scores.winner_scores, reward.score(paths[:3], ["a red fox"] * 3, batch_size=2))
    wrong = replace(scores, logits=-scores.logits.abs())
    mistakes = with_explanations(reward, worst_mistakes(wrong, count=2))
    expected = attention_maps(reward, [mistakes[1].loser], ["a red fox"])[0]
    assert torch.equal(mistakes[1].maps[1].weights, expected.weights)


def test_the_page_says_what_each_token_adds_to_a_likelihood(tmp_path: Path) -> None:
    """Of one prompt for both images the tokens' parts add up to the log-odds; a trained model and an untrained one."""
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        Image.fromarray(bytes_of(40, 56, seed=seed).permute(1, 2, 0).numpy()).save(path)
    pair = PreferencePair(*paths, "a red fox", "a red fox")
    other = PreferencePair(*paths, "a red fox", "a blue fox")
    likelihood = load_tiny("llava", readout="prompt_likelihood", skip_ca=False)
    for reward in (likelihood, load_scorer(f"visual_gpt_score:{backbone_folder('llava')}")):
        scores = score_records(reward, [pair, other], batch_size=2)
        wrong = worst_mistakes(replace(scores, logits=scores.logits - 100), count=2)
        same, two_prompts = sorted(with_explanations(reward, wrong), key=lambda one: one.loser_prompt, reverse=True)
        assert sum(part for _, part in same.contributions) == pytest.approx(-scores.logits[0].item(), abs=1e-4)
        assert {"red", "fox"} <= {text for text, _ in same.contributions}
        assert not two_prompts.contributions
        page = render_report("mine", {"pairs": METRICS}, {"pairs": [two_prompts, same]}, no_map="No map: why.")
        assert page.count('class="token" title') == len(same.contributions)
        assert "No map" not in page
    page = render_report("mine", {"pairs": METRICS}, {"pairs": [two_prompts]}, no_map="No map: why.")
    assert 'class="token"' not in page
    assert "No map: why." in page


def test_a_model_that_only_compares_has_no_distribution_of_scores(tmp_path: Path) -> None:
    reward = load_tiny("llava", head="general_preference")
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for seed, path in enumerate(paths):
        Image.fromarray(bytes_of(40, 56, seed=seed).permute(1, 2, 0).numpy()).save(path)
    scores = score_records(reward, [PreferencePair(*paths, "a", "a")], batch_size=2)
    assert len(scores.winner_scores) == 0
    assert break_down(scores).scores == []
    assert len(break_down(scores).log_odds) == 10


METRICS = [
    Metric("accuracy", 0.75, 0.5, 1.0, 8, 'a "note", with a comma'),
    Metric("kendall_tau_b", -0.123456, -0.25, 0.0, 1024, ""),
    Metric("auroc", math.nan, None, None, 8, "undefined: one class"),
]


def test_the_table_is_aligned() -> None:
    assert to_table(METRICS).split("\n") == [
        "metric           value      95 % interval  count  note",
        'accuracy        0.7500   0.5000 .. 1.0000      8  a "note", with a comma',
        "kendall_tau_b  -0.1235  -0.2500 .. 0.0000   1024",
        "auroc                -                  -      8  undefined: one class",
    ]


def test_csv_gives_back_what_was_written() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(METRICS))))
    assert [row["name"] for row in rows] == ["accuracy", "kendall_tau_b", "auroc"]
    assert [float(row["value"]) for row in rows[:2]] == [0.75, -0.123456]
    assert rows[0]["note"] == 'a "note", with a comma'
    assert (rows[2]["value"], rows[2]["low"], rows[2]["high"]) == ("nan", "", "")


# Arguments


def test_lists_arrays_and_tensors_are_the_same() -> None:
    scores, labels = [0.5, -1.0, 2.0, 0.25], [1, 0, 1, 0]
    assert auroc(scores, labels) == auroc(torch.tensor(scores), torch.tensor(labels))
    assert auroc(scores, labels) == auroc(np.array(scores, dtype=np.float32), np.array(labels, dtype=bool))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pairwise_accuracy([1.0, 2.0], [1.0]), "winner_scores has 2, loser_scores has 1"),
        (lambda: pairwise_accuracy([], []), "nothing to count: no winner_scores and no loser_scores"),
        (lambda: pairwise_accuracy([1.0, math.nan], [0.0, 0.0]), r"winner_scores\[1\] is nan"),
        (lambda: pairwise_accuracy([1.0], [-math.inf]), r"loser_scores\[0\] is -inf"),
        (lambda: pairwise_accuracy([[1.0]], [[0.0]]), r"winner_scores has shape \(1, 1\)"),
        (lambda: pairwise_accuracy([1.0], [0.0], threshold=-0.1), "threshold is -0.1"),
        (lambda: tie_optimised_accuracy([0.1, 0.2], [1, 2]), r"outcomes\[1\] is 2; it must be one of -1, 0, 1"),
        (lambda: item_pairs([1.0], [1.0]), "No two of 1 items"),
        (lambda: item_pairs([1.0, 2.0], [1.0, 2.0], groups=["a", "b"]), "No two of 2 items"),
        (lambda: item_pairs([1.0, 2.0], [1.0, 2.0], groups=["a"]), r"groups has shape \(1,\)"),
        (lambda: pearson([1.0, 1.0], [1.0, 2.0]), "All scores are 1"),
        (lambda: spearman([1.0, 2.0], [3.0, 3.0]), "All ratings are 3"),
        (lambda: kendall([1.0], [1.0]), "a correlation needs two different ones"),
        (lambda: confusion([0.1, 0.2], [1, -1]), r"labels\[1\] is -1; it must be one of 0, 1"),
        (lambda: confusion([0.1], [0.5]), r"labels\[0\] is 0.5"),
        (lambda: confusion([0.1], [1], threshold=math.nan), "threshold is nan"),
        (lambda: auroc([0.1, 0.2], [0, 0]), "0 are 1 and 2 are 0"),
        (lambda: calibration_error([0.5, 1.5], [0, 1]), r"probabilities\[1\] is 1.5"),
        (lambda: calibration_error([0.5], [1], num_bins=0), "num_bins is 0"),
        (lambda: pair_calibration_error([]), "no margins"),
        (lambda: order_consistency([0.5], [-0.5]), r"b_beats_a\[0\] is -0.5"),
        (lambda: bootstrap_interval(lambda: 1.0), "there are none"),
        (lambda: bootstrap_interval(pearson, [1.0, 2.0], [1.0]), "column 0 has 2, column 1 has 1"),
        (lambda: bootstrap_interval(pearson, [1.0, 2.0], [1.0, 2.0], level=1.0), "level 1.0"),
        (lambda: bootstrap_interval(pearson, [1.0, 2.0], [1.0, 2.0], num_resamples=0), "num_resamples is 0"),
        (lambda: pair_metrics([], []), "no logits and no outcomes"),
        (lambda: pair_metrics([1.0, 2.0], [0, 0], threshold=-1.0), "threshold is -1.0"),
        (lambda: label_metrics([1.0], [1], [2.0]), r"probabilities\[0\] is 2.0"),
        (lambda: rating_metrics([1.0, math.nan], [1.0, 2.0], ["a", "b"]), r"scores\[1\] is nan"),
        (lambda: rating_metrics([1.0, 2.0], [1.0, 2.0], ["a"]), "groups has 1 names"),
    ],
)
def test_an_invalid_argument_is_refused_with_its_name_and_value(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_gap_metrics_are_correlations_of_log_odds_with_rating_gaps() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=60)
    gaps = logits + rng.normal(size=60)
    found = {metric.name: metric for metric in gap_metrics(logits, gaps, num_resamples=50)}
    assert found["pearson"].value == pytest.approx(slow_pearson(logits.tolist(), gaps.tolist()))
    assert found["kendall_tau_b"].value == pytest.approx(stats.kendalltau(logits, gaps).statistic)
    assert found["spearman"].value == pytest.approx(stats.spearmanr(logits, gaps).statistic)
    assert all(metric.count == 60 for metric in found.values())
