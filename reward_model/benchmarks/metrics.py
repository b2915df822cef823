"""The metrics of a reward model with their confidence intervals, as a table and as CSV.

A metric that is undefined for the data has the value nan and a note with the reason; the others are still reported.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Shaped
from numpy.typing import ArrayLike

from reward_model.benchmarks.bootstrap import bootstrap_interval, wilson_interval
from reward_model.benchmarks.classification import (
    Confusion,
    auroc,
    calibration_error,
    confusion,
    pair_calibration_error,
)
from reward_model.benchmarks.columns import (
    Floats,
    UndefinedMetricError,
    columns_of,
    labelled_columns,
    require_probabilities,
    require_values,
)
from reward_model.benchmarks.statistics import (
    PairwiseAccuracy,
    kendall,
    pairwise_accuracy,
    pearson,
    spearman,
    tie_optimised_accuracy,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of a reward model, with its confidence interval."""

    name: str
    value: float
    """nan where the metric is undefined; the note states the reason."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval: the bootstrap's, or Wilson's if the note says so; None where there is none, and the
    note states the reason."""
    count: int
    """Number of pairs, images or prompts that the value is computed from."""
    note: str


def pair_metrics(
    logits: ArrayLike, outcomes: ArrayLike, *, threshold: float = 0.0, num_resamples: int = 2000, seed: int = 0
) -> list[Metric]:
    """Return the agreement of a reward model's comparisons with preferences.

    `logits` (N,) are log-odds that the first image is preferred; |logit| <= threshold is a tie of the model.
    `outcomes` (N,): +1 the first was preferred, 0 tie, -1 the second. Pairs that annotators tie count in the
    tie-optimised accuracy only, which is left out if there are none.
    """
    logit, outcome = columns_of(logits=logits, outcomes=outcomes)
    require_values(outcome, (-1, 0, 1), name="outcomes")
    strict = outcome != 0
    margins = (logit * outcome)[strict]
    num_tied = int((np.abs(margins) <= threshold).sum())
    measure = partial(with_interval, num_resamples=num_resamples, seed=seed)

    def accuracy(margins: Floats) -> PairwiseAccuracy:
        return pairwise_accuracy(margins, np.zeros_like(margins), threshold=threshold)

    note, num_decided = f"{num_tied} tied by the model", len(margins) - num_tied
    metrics = [
        measure(
            "accuracy_ties_wrong", lambda m: accuracy(m).ties_wrong, margins, note=note, num_trials=len(margins)
        ),
        measure(
            "accuracy_ties_dropped", lambda m: accuracy(m).ties_dropped, margins, note=note, count=num_decided,
            num_trials=num_decided,
        ),
        measure("calibration_error", pair_calibration_error, margins, note="10 bins, each pair in both orders"),
    ]  # fmt: skip
    if strict.all():
        return metrics
    best_threshold = tie_optimised_accuracy(logit, outcome).threshold
    note = f"{int((~strict).sum())} tied by annotators, tie threshold {best_threshold:.4g}"
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
    """Return the accuracy of a reward model on images labelled good (1) and bad (0), with each as the positive class.

    An image is predicted good if its probability is >= threshold; `scores` are used for the AUROC. All are (N,).
    """
    score, label = labelled_columns(scores=scores, labels=labels)
    probability, _ = labelled_columns(probabilities=probabilities, labels=labels)
    require_probabilities(probability, name="probabilities")
    measure = partial(with_interval, num_resamples=num_resamples, seed=seed)

    def counted(name: str, ratio: Callable[[Confusion], float], note: str, num_trials: int | None) -> Metric:
        return measure(
            name, lambda p, y: ratio(confusion(p, y, threshold=threshold)), probability, label, note=note,
            num_trials=num_trials,
        )  # fmt: skip

    num_good, num_called_good, total = int(label.sum()), int((probability >= threshold).sum()), len(label)
    rule = f"good if probability >= {threshold:g}"
    good, bad = (f"positive is {positive}: {int((label == positive).sum())} images" for positive in (1, 0))
    return [
        counted("accuracy", lambda c: c.accuracy, rule, total),
        counted("f1_good", lambda c: c.f1(1), good, None),
        counted("precision_good", lambda c: c.precision(1), good, num_called_good),
        counted("recall_good", lambda c: c.recall(1), good, num_good),
        counted("f1_bad", lambda c: c.f1(0), bad, None),
        counted("precision_bad", lambda c: c.precision(0), bad, total - num_called_good),
        counted("recall_bad", lambda c: c.recall(0), bad, total - num_good),
        measure("auroc", auroc, score, label),
        measure("calibration_error", calibration_error, probability, label, note="10 bins"),
    ]


def gap_metrics(logits: ArrayLike, gaps: ArrayLike, *, num_resamples: int = 2000, seed: int = 0) -> list[Metric]:
    """Return the correlations of log-odds (N,) with the rating gaps (N,) of the pairs."""
    logit, gap = columns_of(logits=logits, gaps=gaps)
    measure = partial(with_interval, num_resamples=num_resamples, seed=seed, note="of log-odds with rating gaps")
    return [
        measure("pearson", pearson, logit, gap),
        measure("spearman", spearman, logit, gap),
        measure("kendall_tau_b", kendall, logit, gap),
    ]


def with_interval(
    name: str,
    statistic: Callable[..., float],
    *columns: Shaped[np.ndarray, " N"],
    num_resamples: int,
    seed: int,
    count: int | None = None,
    note: str = "",
    num_trials: int | None = None,
) -> Metric:
    """Return the metric of a statistic with its interval; its note states why either is undefined.

    The interval is the bootstrap's, unless all resamples give the same value. Then it is Wilson's for a statistic that
    is a fraction of `num_trials` independent trials and 0 or 1; for others there is none.
    """
    count = len(columns[0]) if count is None else count
    try:
        value = statistic(*columns)
    except UndefinedMetricError as error:
        return Metric(name, math.nan, None, None, count, f"undefined: {error}")
    try:
        low, high = bootstrap_interval(statistic, *columns, num_resamples=num_resamples, seed=seed)
    except UndefinedMetricError as error:
        return Metric(name, value, None, None, count, "; ".join(filter(None, [note, f"no interval: {error}"])))
    if low == high and num_trials and value in (0, 1):
        low, high = wilson_interval(round(value * num_trials), num_trials)
        return Metric(name, value, low, high, count, "; ".join(filter(None, [note, "Wilson's interval"])))
    if low == high:
        reason = "no interval: all resamples give the same value"
        return Metric(name, value, None, None, count, "; ".join(filter(None, [note, reason])))
    return Metric(name, value, low, high, count, note)


def to_rows(metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Return the metrics for JSON, which has no nan: an undefined value is None."""
    return [{**asdict(metric), "value": None if math.isnan(metric.value) else metric.value} for metric in metrics]


def to_table(metrics: Sequence[Metric]) -> str:
    """Return the metrics as a table with aligned columns, for a terminal."""
    rows = [("metric", "value", "95 % interval", "count", "note")]
    for metric in metrics:
        value = "-" if math.isnan(metric.value) else f"{metric.value:z.4f}"
        interval = "-" if metric.low is None or metric.high is None else f"{metric.low:z.4f} .. {metric.high:z.4f}"
        rows.append((metric.name, value, interval, str(metric.count), metric.note))
    name, value, interval, count, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    lines = [f"{n:{name}}  {v:>{value}}  {i:>{interval}}  {c:>{count}}  {note}" for n, v, i, c, note in rows]
    return "\n".join(line.rstrip() for line in lines)


def to_csv(metrics: Sequence[Metric]) -> str:
    """Return the metrics as CSV with a header; the ends of a missing interval are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Metric)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(metric) for metric in metrics)
    return text.getvalue()
