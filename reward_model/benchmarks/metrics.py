"""The metrics of a judge, bundled for a recipe: each with its interval, its count and its rule.

Where a metric is undefined the others go on: its value is nan, and its note says why.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import ArrayLike

from reward_model.benchmarks.statistics import (
    Confusion,
    Floats,
    PairwiseAccuracy,
    TieSearch,
    UndefinedMetricError,
    auroc,
    bootstrap_interval,
    calibration_error,
    columns_of,
    confusion,
    item_pairs,
    kendall,
    labelled_columns,
    pair_calibration_error,
    pairwise_accuracy,
    pearson,
    require_probabilities,
    require_values,
    spearman,
    tie_optimised_accuracy,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One number about a judge, how sure it is, and what it was computed from."""

    name: str
    value: float
    """nan where the metric is undefined; the note then says why."""
    low: float | None
    high: float | None
    """Ends of the bootstrap interval of 95 %; None where there is none, and the note says why."""
    count: int
    """Pairs, images or items that it was computed from."""
    note: str


def pair_metrics(
    logits: ArrayLike, outcomes: ArrayLike, *, threshold: float = 0.0, num_resamples: int = 2000, seed: int = 0
) -> list[Metric]:
    """How well a judge's comparisons agree with people's.

    `logits`: the judge's log-odds that the first image wins; |logit| <= threshold is a tie of the judge. `outcomes`:
    +1 the first won, 0 tie, -1 the second won. Pairs that people tie count in the tie-optimised accuracy only, which
    is left out if there are none.
    """
    logit, outcome = columns_of(logits=logits, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    strict = outcome != 0
    margins = (logit * outcome)[strict]
    num_tied = int((np.abs(margins) <= threshold).sum())
    measure = partial(bootstrapped, num_resamples=num_resamples, seed=seed)

    def accuracy(margins: Floats) -> PairwiseAccuracy:
        return pairwise_accuracy(margins, np.zeros_like(margins), threshold=threshold)

    note, num_decided = f"{num_tied} ties of the judge", len(margins) - num_tied
    metrics = [
        measure("accuracy_ties_wrong", lambda m: accuracy(m).ties_wrong, margins, note=note),
        measure("accuracy_ties_dropped", lambda m: accuracy(m).ties_dropped, margins, note=note, count=num_decided),
        measure("calibration_error", pair_calibration_error, margins, note="10 bins, each pair in both orders"),
    ]
    if strict.all():
        return metrics
    epsilon = tie_optimised_accuracy(logit, outcome).epsilon
    note = f"{int((~strict).sum())} ties of people, epsilon {epsilon:.4g}"
    best = measure(
        "accuracy_tie_optimised", lambda d, o: tie_optimised_accuracy(d, o).accuracy, logit, outcome, note=note
    )
    return [*metrics, best]


def label_metrics(
    scores: ArrayLike,
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    threshold: float = 0.5,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[Metric]:
    """How well a judge tells good images (label 1) from bad ones (0), both taken as the positive class in turn.

    An image is called good if its probability is >= threshold; `scores` are for the AUROC.
    """
    score, label = labelled_columns(scores=scores, labels=labels)
    probability, _ = labelled_columns(probabilities=probabilities, labels=labels)
    require_probabilities(probability, name="probabilities")
    measure = partial(bootstrapped, num_resamples=num_resamples, seed=seed)

    def counted(name: str, read: Callable[[Confusion], float], note: str) -> Metric:
        return measure(name, lambda p, y: read(confusion(p, y, threshold=threshold)), probability, label, note=note)

    rule = f"good if probability >= {threshold:g}"
    good, bad = (f"positive is {positive}: {int((label == positive).sum())} images" for positive in (1, 0))
    return [
        counted("accuracy", lambda c: c.accuracy, rule),
        counted("f1_good", lambda c: c.f1(1), good),
        counted("precision_good", lambda c: c.precision(1), good),
        counted("recall_good", lambda c: c.recall(1), good),
        counted("f1_bad", lambda c: c.f1(0), bad),
        counted("precision_bad", lambda c: c.precision(0), bad),
        counted("recall_bad", lambda c: c.recall(0), bad),
        measure("auroc", auroc, score, label),
        measure("calibration_error", calibration_error, probability, label, note="10 bins"),
    ]


def rating_metrics(
    scores: ArrayLike,
    ratings: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> list[Metric]:
    """How well scores follow ratings of single images, correlations over all and comparisons of pairs.

    Pairs are made as in `item_pairs`. Intervals resample images, not pairs, which share images; an image drawn
    twice is not compared with itself, or it would agree with people for free.
    """
    score, rating = columns_of(scores=scores, ratings=ratings)
    measure = partial(bootstrapped, num_resamples=num_resamples, seed=seed)
    metrics = [
        measure("pearson", pearson, score, rating),
        measure("spearman", spearman, score, rating),
        measure("kendall_tau_b", kendall, score, rating),
    ]
    name = "pairwise_accuracy_tie_optimised"
    try:
        pairs = item_pairs(score, rating, groups=groups)
    except UndefinedMetricError as error:
        return [*metrics, Metric(name, math.nan, None, None, len(score), f"undefined: {error}")]
    search = TieSearch(pairs.differences, pairs.outcomes)
    first, second = pairs.first[search.order], pairs.second[search.order]

    def accuracy(items: Int[np.ndarray, " N"]) -> float:
        copies = np.bincount(items, minlength=len(score))
        return search.best(copies[first] * copies[second]).accuracy

    epsilon = tie_optimised_accuracy(pairs.differences, pairs.outcomes).epsilon
    note = f"{len(first)} pairs, {int((pairs.outcomes == 0).sum())} ties of people, epsilon {epsilon:.4g}"
    return [*metrics, measure(name, accuracy, np.arange(len(score)), note=note)]


def gap_metrics(logits: ArrayLike, gaps: ArrayLike, *, num_resamples: int = 2000, seed: int = 0) -> list[Metric]:
    """Whether a judge is surer of pairs whose ratings lie further apart: correlations of its log-odds with the gaps."""
    logit, gap = columns_of(logits=logits, gaps=gaps)
    measure = partial(bootstrapped, num_resamples=num_resamples, seed=seed, note="of log-odds with rating gaps")
    return [
        measure("pearson", pearson, logit, gap),
        measure("spearman", spearman, logit, gap),
        measure("kendall_tau_b", kendall, logit, gap),
    ]


def bootstrapped(
    name: str,
    statistic: Callable[..., float],
    *columns: Shaped[np.ndarray, " N"],
    num_resamples: int,
    seed: int,
    count: int | None = None,
    note: str = "",
) -> Metric:
    """A statistic with its interval; what is undefined is not left out but noted."""
    count = len(columns[0]) if count is None else count
    try:
        value = statistic(*columns)
    except UndefinedMetricError as error:
        return Metric(name, math.nan, None, None, count, f"undefined: {error}")
    try:
        low, high = bootstrap_interval(statistic, *columns, num_resamples=num_resamples, seed=seed)
    except UndefinedMetricError as error:
        return Metric(name, value, None, None, count, "; ".join(filter(None, [note, f"no interval: {error}"])))
    return Metric(name, value, low, high, count, note)


def to_table(metrics: Sequence[Metric]) -> str:
    """The metrics for a terminal, in aligned columns."""
    rows = [("metric", "value", "95 % interval", "count", "note")]
    for metric in metrics:
        value = "-" if math.isnan(metric.value) else f"{metric.value:.4f}"
        interval = "-" if metric.low is None or metric.high is None else f"{metric.low:.4f} .. {metric.high:.4f}"
        rows.append((metric.name, value, interval, str(metric.count), metric.note))
    name, value, interval, count, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"{n:{name}}  {v:>{value}}  {i:>{interval}}  {c:>{count}}  {note}" for n, v, i, c, note in rows]
    return "\n".join(line.rstrip() for line in lines)


def to_csv(metrics: Sequence[Metric]) -> str:
    """The metrics for a program, a line each under a header; an interval that is missing is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Metric)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(metric) for metric in metrics)
    return text.getvalue()
