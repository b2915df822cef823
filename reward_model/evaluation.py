"""How good a judge is: exact metrics against what people said, each with an interval, in float64.

Arguments have one dimension and may be anything that `numpy.asarray` takes. A mistaken argument raises ValueError, and
where a metric would be 0/0 there is an UndefinedMetricError, never nan. Only the three functions that bundle metrics
for a recipe go on with the others then, and the note of the one that is missing says why.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int, Shaped
from numpy.typing import ArrayLike
from scipy import special, stats

Floats = Float64[np.ndarray, " N"]


class UndefinedMetricError(ValueError):
    """The arguments are valid, but the metric has no value on them."""


@dataclass(frozen=True, slots=True)
class PairwiseAccuracy:
    """How often a judge sides with people on pairs of which one picture is better. Its own ties are never right."""

    num_right: int
    num_wrong: int
    num_tied: int

    @property
    def ties_wrong(self) -> float:
        """right / all: a judge that cannot decide is not right ("w/ tie" in LLaVA-Reward's tables, arXiv:2507.21391)."""
        return self.num_right / (self.num_right + self.num_wrong + self.num_tied)

    @property
    def ties_dropped(self) -> float:
        """right / decided. Always beside `num_tied`: a judge may decide the easy pairs only ("w/o tie")."""
        if not self.num_right + self.num_wrong:
            raise UndefinedMetricError(f"The judge ties all {self.num_tied} pairs, so that none is left.")
        return self.num_right / (self.num_right + self.num_wrong)


def pairwise_accuracy(winner_scores: ArrayLike, loser_scores: ArrayLike, *, threshold: float = 0.0) -> PairwiseAccuracy:
    """Count the pairs on which the better picture has the higher score.

        right: winner - loser > threshold      tied: |winner - loser| <= threshold      wrong: all others

    Scores that were rounded (bfloat16) tie often; a coin tossed for them would hide it.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"threshold is {threshold}; it must be a finite number >= 0.")
    winner, loser = _columns(winner_scores=winner_scores, loser_scores=loser_scores)
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
    difference, outcome = _columns(differences=differences, outcomes=outcomes)
    _require(outcome, (-1, 0, 1), name="outcomes")
    return _TieSearch(difference, outcome).best(np.ones(len(outcome), np.int64))


class _TieSearch:
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
    """Pair rated items (pictures), all with all, or only within a group (a prompt, say) if `groups` names each one's.

    Pairs of all groups are pooled: a large group weighs more than in the mean of the groups' accuracies.
    """
    score, rating = _columns(scores=scores, ratings=ratings)
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
    """How what pictures are (1 good, 0 bad) and what a judge calls them fall together. 0/0 is an error, never 0."""

    good_called_good: int
    good_called_bad: int
    bad_called_good: int
    bad_called_bad: int

    @property
    def accuracy(self) -> float:
        right = self.good_called_good + self.bad_called_bad
        return right / (right + self.good_called_bad + self.bad_called_good)

    def precision(self, positive: Literal[0, 1]) -> float:
        """Of the pictures called `positive`, the share that are; undefined if none is called so."""
        hits, false_alarms, _ = self._as_seen_by(positive)
        return _ratio(hits, hits + false_alarms, f"No picture is called {positive}.")

    def recall(self, positive: Literal[0, 1]) -> float:
        """Of the pictures that are `positive`, the share called so; undefined if there are none."""
        hits, _, misses = self._as_seen_by(positive)
        return _ratio(hits, hits + misses, f"No picture is labelled {positive}.")

    def f1(self, positive: Literal[0, 1]) -> float:
        """2 hits / (2 hits + false alarms + misses); undefined if the class is neither present nor predicted.

        The two classes have different values: safety papers report unsafe = 0 or safe = 1, often without saying which.
        """
        hits, false_alarms, misses = self._as_seen_by(positive)
        why = f"No picture is labelled or called {positive}."
        return _ratio(2 * hits, 2 * hits + false_alarms + misses, why)

    def _as_seen_by(self, positive: Literal[0, 1]) -> tuple[int, int, int]:
        """Hits, false alarms and misses of one class."""
        if positive == 1:
            return self.good_called_good, self.bad_called_good, self.good_called_bad
        return self.bad_called_bad, self.good_called_bad, self.bad_called_good


def confusion(scores: ArrayLike, labels: ArrayLike, *, threshold: float = 0.5) -> Confusion:
    """Call a picture good if its score (or probability) is >= threshold, and count the four outcomes."""
    score, label = _labelled(scores=scores, labels=labels)
    if not math.isfinite(threshold):
        raise ValueError(f"threshold is {threshold}; it must be finite.")
    cells = np.bincount(2 * label.astype(np.int64) + (score >= threshold), minlength=4)
    bad_called_bad, bad_called_good, good_called_bad, good_called_good = cells.tolist()
    return Confusion(good_called_good, good_called_bad, bad_called_good, bad_called_bad)


def auroc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The chance that a good picture scores higher than a bad one, a tie counting half; no threshold is involved.

    (sum of ranks of good - n_good (n_good + 1) / 2) / (n_good n_bad)            (Mann-Whitney's U, equal values share)
    """
    score, label = _labelled(scores=scores, labels=labels)
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
    bins: (k / n, (k + 1) / n], and 0 in the first. It is biased upwards on few pictures, and 0 for a judge that always
    says the base rate.
    """
    probability, label = _labelled(probabilities=probabilities, labels=labels)
    _require_probabilities(probability, name="probabilities")
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; it must be at least 1.")
    bins = np.searchsorted(np.arange(1, num_bins) / num_bins, probability, side="left")
    return float(np.abs(np.bincount(bins, weights=label - probability)).sum() / len(label))


def pair_calibration_error(margins: ArrayLike, *, num_bins: int = 10) -> float:
    """Calibration error of sigmoid(margin), the margin being a judge's log-odds for the picture that won.

    Each pair counts in both orders (sigmoid(m) came true, sigmoid(-m) did not), for which comes first means nothing.
    """
    (margin,) = _columns(margins=margins)
    probability = special.expit(np.concatenate([margin, -margin]))
    return calibration_error(probability, np.repeat([1, 0], len(margin)), num_bins=num_bins)


@dataclass(frozen=True, slots=True)
class OrderConsistency:
    """Whether a judge says the same of a pair shown the other way round."""

    largest_gap: float
    """Of |p(a beats b) + p(b beats a) - 1|: 0 for a judge that order cannot move."""
    mean_gap: float
    same_choice: float
    """Share of pairs of which both orders name the same picture, or both say exactly 0.5."""


def order_consistency(a_beats_b: ArrayLike, b_beats_a: ArrayLike) -> OrderConsistency:
    """Compare p(a beats b), asked as (a, b), with p(b beats a), asked as (b, a)."""
    forth, back = _columns(a_beats_b=a_beats_b, b_beats_a=b_beats_a)
    _require_probabilities(forth, name="a_beats_b")
    _require_probabilities(back, name="b_beats_a")
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

    Two traps. A judge that makes no mistake gets an interval of width 0. And what chance makes larger, calibration error
    and tie-optimised accuracy on few rows, is larger still on resamples: there the interval lies too high.
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
    """Pairs, pictures or items that it was computed from."""
    note: str


def pair_metrics(
    logits: ArrayLike, outcomes: ArrayLike, *, threshold: float = 0.0, num_resamples: int = 2000, seed: int = 0
) -> list[Metric]:
    """How well a judge's comparisons agree with people's.

    `logits`: the judge's log-odds that the first picture wins; |logit| <= threshold is a tie of the judge. `outcomes`:
    +1 the first won, 0 tie, -1 the second won. Pairs that people tie count in the tie-optimised accuracy only, which
    is left out if there are none.
    """
    logit, outcome = _columns(logits=logits, outcomes=outcomes)
    _require(outcome, (-1, 0, 1), name="outcomes")
    strict = outcome != 0
    margins = (logit * outcome)[strict]
    num_tied = int((np.abs(margins) <= threshold).sum())
    measure = partial(_measured, num_resamples=num_resamples, seed=seed)

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
    """How well a judge tells good pictures (label 1) from bad ones (0), both taken as the positive class in turn.

    A picture is called good if its probability is >= threshold; `scores` are for the AUROC.
    """
    score, label = _labelled(scores=scores, labels=labels)
    probability, _ = _labelled(probabilities=probabilities, labels=labels)
    _require_probabilities(probability, name="probabilities")
    measure = partial(_measured, num_resamples=num_resamples, seed=seed)

    def counted(name: str, read: Callable[[Confusion], float], note: str) -> Metric:
        return measure(name, lambda p, y: read(confusion(p, y, threshold=threshold)), probability, label, note=note)

    rule = f"good if probability >= {threshold:g}"
    good, bad = (f"positive is {positive}: {int((label == positive).sum())} pictures" for positive in (1, 0))
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
    """How well scores follow ratings of single pictures, correlations over all and comparisons of pairs.

    Pairs are made as in `item_pairs`. Intervals resample pictures, not pairs, which share pictures; a picture drawn
    twice is not compared with itself, or it would agree with people for free.
    """
    score, rating = _columns(scores=scores, ratings=ratings)
    measure = partial(_measured, num_resamples=num_resamples, seed=seed)
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
    search = _TieSearch(pairs.differences, pairs.outcomes)
    first, second = pairs.first[search.order], pairs.second[search.order]

    def accuracy(items: Int[np.ndarray, " N"]) -> float:
        copies = np.bincount(items, minlength=len(score))
        return search.best(copies[first] * copies[second]).accuracy

    epsilon = tie_optimised_accuracy(pairs.differences, pairs.outcomes).epsilon
    note = f"{len(first)} pairs, {int((pairs.outcomes == 0).sum())} ties of people, epsilon {epsilon:.4g}"
    return [*metrics, measure(name, accuracy, np.arange(len(score)), note=note)]


def table(metrics: Sequence[Metric]) -> str:
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


def _measured(
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


def _columns(**named: ArrayLike) -> list[Floats]:
    """Arguments as float64 of one length, all finite; complaints call them by name."""
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in named.items()}
    _common_length(columns)
    for name, column in columns.items():
        if not (finite := np.isfinite(column)).all():
            row = int(np.argmin(finite))
            raise ValueError(f"{name}[{row}] is {column[row]}; every value must be finite.")
    return list(columns.values())


def _labelled(*, labels: ArrayLike, **named: ArrayLike) -> tuple[Floats, Floats]:
    """One column and its labels, which must be 0 or 1."""
    column, label = _columns(**named, labels=labels)
    _require(label, (0, 1), name="labels")
    return column, label


def _varying(scores: ArrayLike, ratings: ArrayLike) -> list[Floats]:
    """Columns that each hold at least two different values."""
    columns = _columns(scores=scores, ratings=ratings)
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


def _require(column: Floats, allowed: tuple[int, ...], *, name: str) -> None:
    unknown = np.logical_and.reduce([column != value for value in allowed])
    if unknown.any():
        row = int(np.argmax(unknown))
        raise ValueError(f"{name}[{row}] is {column[row]:g}; it must be one of {', '.join(map(str, allowed))}.")


def _require_probabilities(column: Floats, *, name: str) -> None:
    outside = (column < 0) | (column > 1)
    if outside.any():
        row = int(np.argmax(outside))
        raise ValueError(f"{name}[{row}] is {column[row]}; a probability lies in [0, 1].")


def _ratio(part: int, whole: int, why: str) -> float:
    if not whole:
        raise UndefinedMetricError(why)
    return part / whole
