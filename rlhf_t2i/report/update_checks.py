"""Checks of the updates: ratios, clip range and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rlhf_t2i.report.finding import (
    Config,
    Finding,
    any_reward_rose,
    mean_exceeds,
    nan_as_inf,
    option,
    recent,
    suggest,
)
from rlhf_t2i.training.metrics import FAST, MOSTLY_CLIPPED, REPLAY_NOISE, SLOW, Row, by_step, number

_WARM_UP = 0.1
"""Fraction of a run in which fp16 may skip updates: its loss scale starts too large and is lowered."""
_SCALING = 0.01
"""Fraction of the later updates that fp16 may skip: now and then it tries a larger loss scale."""


def check_ratios(rows: Sequence[Row], config: Config) -> Finding:
    """Warn if the ratios of the unchanged policy are not 1, or if the first update moved them too far."""
    title = "Ratios start at 1"
    train = [row for row in by_step(rows, "train") if {"replay_error", "clip_range"} <= row.keys()]
    if not train:
        return Finding(title, "unknown", "This recipe has no ratios.")
    worst = max(train, key=lambda row: nan_as_inf(number(row, "replay_error") / number(row, "clip_range")))
    error, clip_range = number(worst, "replay_error"), number(worst, "clip_range")
    if not error <= REPLAY_NOISE * clip_range:
        is_coarse = config.get("mixed_precision") in ("fp16", "bf16")
        return Finding(
            "Ratios do not start at 1", "warning",
            f"Replaying the unchanged policy changed its log-probabilities by up to {error:.1g} (update "
            f"{worst['step']}), {_times(error / clip_range)} the clip range ({clip_range:.2g}).",
            "Sampling and update compute different log-probabilities, mostly because of a coarse number format: noise "
            "decides which ratios are clipped.",
            suggest(
                config, ("mixed_precision", "--mixed_precision no") if is_coarse else ("attention", "--attention math")
            ),
        )  # fmt: skip
    first, moved = train[0], number(train[0], "ratio_std") / number(train[0], "clip_range")
    exact = f"Replay is exact{f' to {error:.1g}' if error else ''}"
    update = f"the first update moved the ratios by {_times(moved)} the clip range ({clip_range:.2g})"
    if first["step"] == 1 and moved > FAST:
        return Finding(
            "The first update was too large", "warning", f"{exact}, but {update}.",
            "Most (image, step) pairs are clipped at once and have no gradient.",
            _smaller_updates(config),
        )  # fmt: skip
    return Finding(title, "passed", f"{exact}; {update}.")


def check_clipping(rows: Sequence[Row], config: Config) -> Finding:
    """Warn if most (image, step) pairs are clipped, or if none are and no reward rises."""
    title = "Some (image, step) pairs are clipped, most are not"
    train = [row for row in by_step(rows, "train") if {"clip_fraction", "clip_range"} <= row.keys()]
    clipped = recent([number(row, "clip_fraction") for row in train])
    if not clipped:
        return Finding(title, "unknown", "This recipe does not clip ratios, or there are too few steps.")
    moved = fmean(recent([number(row, "ratio_std") / number(row, "clip_range") for row in train]))
    observed = (
        f"In the last {len(clipped)} steps {fmean(clipped):.1%} of the (image, step) pairs were clipped; ratios moved "
        f"by {_times(moved)} the clip range."
    )
    if mean_exceeds(clipped, MOSTLY_CLIPPED):
        return Finding(
            "Most (image, step) pairs are clipped", "warning", observed,
            "The updates are too large: ratios outside the clip range have no gradient.",
            _smaller_updates(config),
        )  # fmt: skip
    evaluated_twice = len(by_step(rows, "evaluation")) > 1
    if max(clipped) == 0 and 0 < moved < SLOW and evaluated_twice and not any_reward_rose(rows):
        return Finding(
            "Nothing is clipped, and no reward rises", "warning", f"{observed} No reward has risen beyond noise.",
            "The updates are so small that the model hardly changes.",
            suggest(config, option(config, "a higher", "learning_rate")),
        )  # fmt: skip
    exact = " Each rollout is used in one optimiser step, so its ratios stay at 1." if moved == 0 else ""
    return Finding(title, "passed", observed + exact)


def _smaller_updates(config: Config) -> str:
    return suggest(config, option(config, "a lower", "learning_rate"), option(config, "fewer", "num_inner_epochs"))


def check_gradients(rows: Sequence[Row], config: Config) -> Finding:
    """Warn if updates were skipped because their gradient was not finite, except while fp16 finds its loss scale."""
    title = "Gradients are finite"
    train = [row for row in by_step(rows, "train") if "gradient_norm" in row]
    if not train:
        return Finding(title, "unknown", "No gradient norms were logged.")
    skipped = [row for row in train if row.get("skipped_updates") or not math.isfinite(number(row, "gradient_norm"))]
    has_scale = config.get("mixed_precision") == "fp16"
    late = [row for row in skipped if not has_scale or row["step"] > math.ceil(_WARM_UP * train[-1]["step"])]
    count = round(sum(row.get("skipped_updates", 0) for row in skipped))
    if len(late) <= (_SCALING * len(train) if has_scale else 0):
        few = f"; {count} updates were skipped while fp16 adjusted its loss scale" if skipped else ""
        norms = [number(row, "gradient_norm") for row in train if row not in skipped] or [math.nan]
        return Finding(title, "passed", f"Their norm was between {min(norms):.2g} and {max(norms):.2g}{few}.")
    return Finding(
        "Gradients are not finite", "warning",
        f"{count} updates were skipped because their gradient was not finite, the last in step {late[-1]['step']}.",
        "Numbers overflow: the learning rate is too high, or the range of the number format too small.",
        suggest(
            config,
            option(config, "a lower", "learning_rate"),
            *([("mixed_precision", "--mixed_precision bf16 or no")] if has_scale else []),
            option(config, "a lower", "max_gradient_norm"),
        ),
    )  # fmt: skip


def _times(factor: float) -> str:
    """Return a factor with two digits; 1.0 instead of 1, which would look like a count."""
    return f"{factor:.1f} times" if factor >= 0.95 else f"{factor:.2g} times"
