"""Where a reward model fails: its accuracy by group, its calibration, and the distributions of its scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reward_model.benchmarks.bootstrap import wilson_interval
from reward_model.benchmarks.columns import Floats
from reward_model.benchmarks.domains import group_accuracy, length_class, prompt_styles
from reward_model.benchmarks.evaluation import RecordScores
from reward_model.benchmarks.metrics import Metric
from reward_model.types import PreferencePair, Tags

NUM_RESAMPLES = 500
"""Bootstrap resamples of each interval."""
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Bounds of the classes of confidence: the probability of the image that the model prefers."""
LOG_ODDS = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
"""Bounds of the inner classes of the winner's log-odds; beyond them there is one class on each side."""
FEW = 30
"""Number of pairs below which a group is marked as small."""
SURE = 0.95
"""Confidence from which a mistake counts as confident."""
NUM_SCORE_BINS = 24
"""Classes of scores in their distribution."""


@dataclass(frozen=True, slots=True)
class Group:
    """The accuracy on the pairs of one group, tied by nobody, or on its labelled images."""

    by: str
    """Criterion: the name of a tag, or prompt length, prompt style, rating gap, or what differs."""
    value: str
    accuracy: Metric

    @property
    def is_small(self) -> bool:
        """True for fewer than `FEW` pairs: its interval says more than its value."""
        return self.accuracy.count < FEW


@dataclass(frozen=True, slots=True)
class Confidence:
    """The pairs of one class of confidence."""

    low: float
    high: float
    mean: float
    """Mean probability of the preferred image."""
    right: float
    """Fraction of them that annotators prefer too: equal to `mean` if the model is calibrated."""
    interval: tuple[float, float]
    """Wilson's 95 % interval of `right`."""
    count: int


@dataclass(frozen=True, slots=True)
class Bin:
    """The pairs of one class of log-odds."""

    label: str
    count: int
    share: float
    """Fraction of all pairs that are not tied."""


@dataclass(frozen=True, slots=True)
class ScoreBin:
    """The images of one class of scores."""

    low: float
    high: float
    preferred: float
    """Fraction of the preferred images that are in this class."""
    rejected: float
    """Fraction of the other images."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Groups, calibration and distributions of one data set; without strict pairs only the groups of labels."""

    groups: Sequence[Group]
    """Tags first; the lowest accuracy first within each criterion; criteria with one group are left out."""
    calibration: Sequence[Confidence]
    log_odds: Sequence[Bin]
    scores: Sequence[ScoreBin] = ()
    """Empty for a model without scores."""
    label_groups: Sequence[Group] = ()
    """The same for labelled images, called good from a score of 0."""
    overall: Metric | None = None
    """The accuracy on all strict pairs."""
    num_confident_mistakes: int = 0
    """Pairs that are wrong with a confidence of at least `SURE`."""

    def weakest(self, count: int = 5) -> list[Group]:
        """Return the groups whose whole interval is below the accuracy on all pairs, the lowest first."""
        total = self.overall.value if self.overall else 0.0
        found = [one for one in self.groups if one.accuracy.high is not None and one.accuracy.high < total]
        return sorted(found, key=lambda one: one.accuracy.value)[:count]


def break_down(scores: RecordScores) -> Breakdown:
    """Return where a reward model fails on the strict pairs and the labelled images of a data set."""
    labels = accuracy_of_labels(scores)
    strict = [i for i, pair in enumerate(scores.pairs) if not pair.tie]
    if not strict:
        return Breakdown([], [], [], label_groups=labels)
    logits = scores.logits[strict].double().numpy()
    pairs = [scores.pairs[i] for i in strict]
    sides = [side.double().numpy() for side in (scores.winner_scores, scores.loser_scores)]
    return Breakdown(
        accuracy_by_group(pairs, logits),
        calibration_curve(logits),
        histogram(logits),
        score_histogram(*(side[strict] for side in sides)) if len(sides[0]) else [],
        labels,
        _accuracy([(pair.winner_prompt, float(logit > 0)) for pair, logit in zip(pairs, logits, strict=True)]),
        int((logits <= -np.log(SURE / (1 - SURE))).sum()),
    )


def accuracy_by_group(pairs: Sequence[PreferencePair], logits: Floats) -> list[Group]:
    """Return the accuracy by group of pairs, with 95 % intervals; equal scores are wrong.

    A pair is in the group of each of its tags, and in those of its prompt, of its rating gap and of what differs. The
    interval is Wilson's if each pair has a prompt of its own, else the bootstrap's over prompts.
    """
    bounds = _gap_bounds(pairs)
    return _grouped(
        ([*_of_tags(pair.tags), *_kinds(pair, bounds)], pair.winner_prompt, float(logit > 0))
        for pair, logit in zip(pairs, logits, strict=True)
    )


def accuracy_of_labels(scores: RecordScores) -> list[Group]:
    """Return the accuracy by group of labelled images, which are called good if their score is at least 0."""
    return _grouped(
        ([*_of_tags(one.tags), *_of_prompt(one.prompt)], one.prompt, float((score >= 0) == one.label))
        for one, score in zip(scores.labelled, scores.scores.tolist(), strict=True)
    )


def _grouped(rows: Iterable[tuple[list[tuple[int, str, str]], str, float]]) -> list[Group]:
    """Return the accuracy of the rows (kinds, prompt, credit) of each kind, a tuple (rank, criterion, value)."""
    members: dict[tuple[int, str, str], list[tuple[str, float]]] = defaultdict(list)
    for kinds, prompt, credit in rows:
        for kind in kinds:
            members[kind].append((prompt, credit))
    criteria = list(dict.fromkeys(kind[:2] for kind in members))
    several = [one for one in criteria if sum(kind[:2] == one for kind in members) > 1]
    several.sort(key=lambda one: one[0])
    found = {kind: Group(*kind[1:], _accuracy(rows)) for kind, rows in members.items() if kind[:2] in several}
    ordered = sorted(found.items(), key=lambda item: (several.index(item[0][:2]), item[1].accuracy.value))
    return [group for _, group in ordered]


def _accuracy(rows: Sequence[tuple[str, float]]) -> Metric:
    """Return the fraction of right rows (prompt, credit) with its interval."""
    if len({prompt for prompt, _ in rows}) < len(rows):
        return group_accuracy(rows, num_resamples=NUM_RESAMPLES, seed=0)
    right = int(sum(credit for _, credit in rows))
    return Metric("accuracy", right / len(rows), *wilson_interval(right, len(rows)), len(rows), "Wilson's interval")


def _of_tags(tags: Tags) -> Iterator[tuple[int, str, str]]:
    yield from ((0, by, value) for by, values in tags.items() for value in values)


def _of_prompt(prompt: str) -> Iterator[tuple[int, str, str]]:
    yield 1, "words in the prompt", length_class(prompt)
    yield from ((1, "style of the prompt", style) for style in prompt_styles(prompt))


def _kinds(pair: PreferencePair, bounds: Sequence[float]) -> Iterator[tuple[int, str, str]]:
    """Yield the kinds of a pair besides its tags, as (rank, criterion, value)."""
    yield from _of_prompt(pair.winner_prompt)
    same_image, same_prompt = pair.winner == pair.loser, pair.winner_prompt == pair.loser_prompt
    yield 1, "what differs", "the prompt" if same_image else "the image" if same_prompt else "both"
    if pair.rating_gap > 0 and bounds:
        yield 1, "rating gap", _gap_class(pair.rating_gap, bounds)


def _gap_bounds(pairs: Sequence[PreferencePair]) -> list[float]:
    """Return the different terciles of the rating gaps; none if there are none or all are equal."""
    gaps = [pair.rating_gap for pair in pairs if pair.rating_gap > 0]
    if not gaps:
        return []
    low, high = (float(value) for value in np.quantile(gaps, [1 / 3, 2 / 3], method="lower"))
    return [bound for bound in dict.fromkeys((low, high)) if bound < max(gaps)]


def _gap_class(gap: float, bounds: Sequence[float]) -> str:
    below = [bound for bound in bounds if bound < gap]
    above = [bound for bound in bounds if bound >= gap]
    if not below:
        return f"at most {above[0]:g}"
    return f"above {below[-1]:g}" + (f", at most {above[0]:g}" if above else "")


def calibration_curve(logits: Floats) -> list[Confidence]:
    """Return the accuracy by confidence, sigmoid(|logit|); classes without a pair are left out."""
    confidence = 1 / (1 + np.exp(-np.abs(logits)))
    place = np.clip(np.searchsorted(CONFIDENCES, confidence, side="right") - 1, 0, len(CONFIDENCES) - 2)
    found = []
    for i in np.unique(place):
        inside = place == i
        right, count = int((logits[inside] > 0).sum()), int(inside.sum())
        mean, interval = float(confidence[inside].mean()), wilson_interval(right, count)
        found.append(Confidence(CONFIDENCES[i], CONFIDENCES[i + 1], mean, right / count, interval, count))
    return found


def histogram(logits: Floats) -> list[Bin]:
    """Return the number of pairs by the log-odds of the winner, the most wrong first."""
    counts = np.bincount(np.searchsorted(LOG_ODDS, logits, side="left"), minlength=len(LOG_ODDS) + 1)
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(LOG_ODDS)]
    labels = [f"below {LOG_ODDS[0]:g}", *inner, f"above {LOG_ODDS[-1]:g}"]
    return [Bin(label, int(n), float(n / len(logits))) for label, n in zip(labels, counts, strict=True)]


def score_histogram(preferred: Floats, rejected: Floats) -> list[ScoreBin]:
    """Return the distributions of the scores of preferred and of rejected images over equal classes.

    The classes cover all but the outermost 0.5 % of the scores on each side, which the first and the last class take.
    """
    low, high = (float(end) for end in np.quantile([*preferred, *rejected], [0.005, 0.995]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, NUM_SCORE_BINS + 1)
    shares = [np.histogram(np.clip(side, low, high), edges)[0] / len(side) for side in (preferred, rejected)]
    ends = pairwise(edges.tolist())
    return [ScoreBin(low, high, float(p), float(r)) for (low, high), p, r in zip(ends, *shares, strict=True)]
