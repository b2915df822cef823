"""Where a reward model fails: its accuracy by kind of pair, its calibration, and the distribution of its log-odds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reward_model.benchmarks.columns import Floats
from reward_model.benchmarks.domains import group_accuracy, length_class, prompt_styles
from reward_model.benchmarks.evaluation import RecordScores
from reward_model.benchmarks.metrics import Metric
from reward_model.types import PreferencePair

NUM_RESAMPLES = 500
"""Bootstrap resamples of each interval."""
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
"""Bounds of the classes of confidence: the probability of the image that the model prefers."""
LOG_ODDS = (-8.0, -4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)
"""Bounds of the inner classes of the winner's log-odds; beyond them there is one class on each side."""


@dataclass(frozen=True, slots=True)
class Group:
    """The accuracy on the pairs of one kind, tied by nobody."""

    by: str
    """Criterion: prompt length, prompt style, rating gap, or what differs."""
    value: str
    accuracy: Metric


@dataclass(frozen=True, slots=True)
class Confidence:
    """The pairs of one class of confidence."""

    low: float
    high: float
    mean: float
    """Mean probability of the preferred image."""
    right: float
    """Fraction of them that annotators prefer too: equal to `mean` if the model is calibrated."""
    count: int


@dataclass(frozen=True, slots=True)
class Bin:
    """The pairs of one class of log-odds."""

    label: str
    count: int
    share: float
    """Fraction of all pairs that are not tied."""


@dataclass(frozen=True, slots=True)
class Breakdown:
    """All of it for one data set; empty for one without strict pairs."""

    groups: Sequence[Group]
    """The lowest accuracy first within each criterion; criteria with one group are left out."""
    calibration: Sequence[Confidence]
    log_odds: Sequence[Bin]


def break_down(scores: RecordScores) -> Breakdown:
    """Return where a reward model fails on the strict pairs of a data set."""
    strict = [i for i, pair in enumerate(scores.pairs) if not pair.tie]
    if not strict:
        return Breakdown([], [], [])
    logits = scores.logits[strict].double().numpy()
    pairs = [scores.pairs[i] for i in strict]
    return Breakdown(accuracy_by_group(pairs, logits), calibration_curve(logits), histogram(logits))


def accuracy_by_group(pairs: Sequence[PreferencePair], logits: Floats) -> list[Group]:
    """Return the accuracy by kind of pair, with intervals over prompts; equal scores are wrong."""
    members: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    bounds = _gap_bounds(pairs)
    for pair, logit in zip(pairs, logits, strict=True):
        for kind in _kinds(pair, bounds):
            members[kind].append((pair.winner_prompt, float(logit > 0)))
    found = [
        Group(by, value, group_accuracy(rows, num_resamples=NUM_RESAMPLES, seed=0))
        for (by, value), rows in members.items()
    ]
    criteria = list(dict.fromkeys(group.by for group in found))
    several = [by for by in criteria if sum(group.by == by for group in found) > 1]
    return sorted(
        (group for group in found if group.by in several), key=lambda g: (criteria.index(g.by), g.accuracy.value)
    )


def _kinds(pair: PreferencePair, bounds: Sequence[float]) -> Iterator[tuple[str, str]]:
    """Yield the kinds of a pair, as (criterion, value)."""
    yield "words in the prompt", length_class(pair.winner_prompt)
    yield from (("style of the prompt", style) for style in prompt_styles(pair.winner_prompt))
    same_image, same_prompt = pair.winner == pair.loser, pair.winner_prompt == pair.loser_prompt
    yield "what differs", "the prompt" if same_image else "the image" if same_prompt else "both"
    if pair.rating_gap > 0 and bounds:
        yield "rating gap", _gap_class(pair.rating_gap, bounds)


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
        right = float((logits[inside] > 0).mean())
        mean, count = float(confidence[inside].mean()), int(inside.sum())
        found.append(Confidence(CONFIDENCES[i], CONFIDENCES[i + 1], mean, right, count))
    return found


def histogram(logits: Floats) -> list[Bin]:
    """Return the number of pairs by the log-odds of the winner, the most wrong first."""
    counts = np.bincount(np.searchsorted(LOG_ODDS, logits, side="left"), minlength=len(LOG_ODDS) + 1)
    inner = [f"{low:g} to {high:g}" for low, high in pairwise(LOG_ODDS)]
    labels = [f"below {LOG_ODDS[0]:g}", *inner, f"above {LOG_ODDS[-1]:g}"]
    return [Bin(label, int(n), float(n / len(logits))) for label, n in zip(labels, counts, strict=True)]
