"""The charts of a run: rewards, metrics and speed over training steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_t2i.training.changes import Gap, reward_hacking_gap
from rlhf_t2i.training.metrics import Points, Row, by_step, points, reward_names, trained_rewards

_IMAGES, _UPDATE = "Images", "Update"
_METRICS = [
    (
        _IMAGES,
        "diversity",
        "diversity",
        "Mean distance between images of the same prompt: a fall indicates mode collapse.",
    ),
    (
        _IMAGES,
        "reward std",
        "reward_std",
        "Standard deviation of all rewards of a step: images with equal rewards have no advantages.",
    ),
    (
        _IMAGES,
        "groups without variance",
        "degenerate_groups",
        "Prompts of a step whose images all had the same reward, so that their advantages are 0.",
    ),
    (
        _IMAGES,
        "saturated share",
        "saturated_share",
        "Fraction of the squared pixel gradient on pixels outside [0, 1]: growth indicates reward hacking.",
    ),
    (_UPDATE, "KL divergence", "kl", "KL divergence from the model before training."),
    (_UPDATE, "loss", "loss", "Mean loss of the updates of a step. A clipped surrogate stays near 0 while it learns."),
    (_UPDATE, "learning rate", "learning_rate", "Learning rate of the updates of a step."),
    (
        _UPDATE,
        "distance from the reference",
        "reference_gap",
        "Mean squared difference between the predictions of the model and of the model before training.",
    ),
    (
        _UPDATE,
        "ratio std",
        "ratio_std",
        "Root mean square of the log-ratio between the updated model and the one that sampled the images.",
    ),
    (
        _UPDATE,
        "clip fraction",
        "clip_fraction",
        "Fraction of (image, step) pairs whose ratio is outside the clip range.",
    ),
    (
        _UPDATE,
        "replay error",
        "replay_error",
        "Largest change of a log-probability when it is computed again before any update: 0 is exact.",
    ),
    (
        _UPDATE,
        "gradient norm",
        "gradient_norm",
        "Norm before clipping at max_gradient_norm; 0 if it was not finite and the update was skipped.",
    ),
    (_UPDATE, "skipped updates", "skipped_updates", "Updates of each step whose gradient was not finite."),
    (
        _UPDATE,
        "implicit accuracy",
        "accuracy",
        "Fraction of pairs whose winner has gained likelihood over the loser since the start; 0.5 is chance.",
    ),
    (
        _UPDATE,
        "winner's error",
        "winner_error",
        "Denoising error minus that of the model before training: above 0, winners have become less likely.",
    ),
    (
        _UPDATE,
        "loser's error",
        "loser_error",
        "Denoising error minus that of the model before training: above 0, losers have become less likely.",
    ),
]
"""Group, title, key and note of each chart that is drawn if its key was logged."""
_ONLY_IF_NOT_ZERO = {"replay_error", "skipped_updates"}
"""Keys that are drawn only if a value differs from 0; otherwise a passed check says enough."""
_ERRORS = {"diversity": "diversity_error"}
"""Keys of standard errors that do not follow the naming of rewards."""


GAP = "gap"
"""Title of the chart of the difference between two gains."""
_GLANCE = (
    "KL divergence", "distance from the reference", "loss", "learning rate", "clip fraction", "gradient norm",
)  # fmt: skip
"""Titles of the charts that tell whether the updates are healthy, in the order of the page."""


_SERIES = ("training images", "evaluations")
"""Names of the two series of most charts."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Two series over training steps, with a title and an explanation."""

    title: str
    note: str
    training: Points
    evaluation: Points
    group: str = "Rewards"
    names: tuple[str, str] = _SERIES
    """Names of the two series."""
    kinds: tuple[str, str] = ("training", "evaluation")
    """What the colours of the two series mean; "trained" and "held-out" are rewards in the chart of their gains."""


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the charts of a run: gap and rewards, then the metrics that its recipe logs, then the speed."""
    train, evaluations = by_step(rows, "train"), by_step(rows, "evaluation")
    trained = trained_rewards(rows)
    weighted_sum = ["reward"] if len(trained) > 1 else []
    names = dict.fromkeys(weighted_sum + trained + reward_names(evaluations))
    gap = reward_hacking_gap(rows)
    found = _gap_charts(gap) if gap else []
    for name in names:
        training = points(train, f"rewards/{name}") or points(train, name)
        found.append(Chart(name, "Mean reward of the images: higher is better.", training, points(evaluations, name)))
    for group, title, key, note in _METRICS:
        evaluation = points(evaluations, key, error=_ERRORS.get(key))
        training = points(train, key)
        if key not in _ONLY_IF_NOT_ZERO or any(y for _, y, _ in training):
            found.append(Chart(title, note, training, evaluation, group))
    speed = "Training images per second of sampling, scoring and updating; evaluations are not counted."
    found.append(Chart("images per second", speed, _images_per_second(train), [], _UPDATE))
    return [chart for chart in found if chart.training or chart.evaluation]


def grouped(found: Sequence[Chart]) -> dict[str, list[Chart]]:
    """Return the charts by group, both in their order."""
    return {group: [c for c in found if c.group == group] for group in dict.fromkeys(c.group for c in found)}


def at_a_glance(found: Sequence[Chart]) -> dict[str, list[Chart]]:
    """Return the charts by group; the first group has a reward and the state of the updates, which no other repeats."""
    rewards = [c for c in found if c.group == "Rewards" and c.names == _SERIES and c.title != GAP]
    titles = [rewards[0].title if rewards else "", *_GLANCE]
    first = [chart for title in titles for chart in found if chart.title == title][: len(_GLANCE)]
    rest = grouped([chart for chart in found if chart not in first])
    return {**({"At a glance": first} if first else {}), **rest}


def _images_per_second(train: Sequence[Row]) -> Points:
    seconds = [math.fsum(value for key, value in row.items() if key.startswith("seconds/")) for row in train]
    rates = [{**row, "rate": row["images"] / s} for row, s in zip(train, seconds, strict=True) if s > 0]
    return points(rates, "rate")


def _gap_charts(gap: Gap) -> list[Chart]:
    """Return a chart of the gains of both rewards, and one of their difference."""
    unit = "in standard deviations of the first evaluation's images"
    note = f"Gain of {gap.trained} minus gain of {gap.held_out}, {unit}: growth indicates reward hacking."
    gains = Chart(f"gain of {gap.trained} and {gap.held_out}", f"{unit}.", gap.trained_gains, gap.held_out_gains)
    gains = replace(gains, names=(gap.trained, gap.held_out), kinds=("trained", "held-out"))
    return [gains, Chart(GAP, note, [], gap.points)]
