"""Checks of the updates: do ratios begin at one, is the clip range of use, are gradients finite?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from rlhf_t2i.report.finding import Config, Finding, advice, has_learnt, no_nan, recent, setting, surely_above
from rlhf_t2i.training.metrics import FAST, MOSTLY_CLIPPED, REPLAY_NOISE, SLOW, Row, by_step, number

_WARM_UP = 0.1
"""Part of a run in which left out updates are no warning with fp16: it begins with too large a scale, and lowers it."""
_SCALING = 0.01
"""Part of the later updates that fp16 may leave out: now and then it tries a larger scale, which may be too large."""


def ratios_are_off(rows: Sequence[Row], config: Config) -> Finding:
    """Whether replaying an unchanged policy gives ratios of one, and whether the first update moved them in measure."""
    check = "Ratios begin at one"
    train = [row for row in by_step(rows, "train") if {"replay_error", "clip_range"} <= row.keys()]
    if not train:
        return Finding(check, "unknown", "This recipe has no ratios.")
    worst = max(train, key=lambda row: no_nan(number(row, "replay_error") / number(row, "clip_range")))
    error, clip_range = number(worst, "replay_error"), number(worst, "clip_range")
    first, spread = train[0], number(train[0], "ratio_std") / number(train[0], "clip_range")
    if not error <= REPLAY_NOISE * clip_range:
        coarse = config.get("mixed_precision") in ("fp16", "bf16")
        return Finding(
            "Ratios do not begin at one", "warning",
            f"Replaying the unchanged policy moved its log-densities by up to {error:.1g} (update {worst['step']}), "
            f"with a clip range of {clip_range:.2g}.",
            "Painting and update do not compute the same, mostly because of a coarse number format, so that noise "
            "decides what is clipped.",
            advice(
                config,
                *([("mixed_precision", "--mixed_precision no")] if coarse else []),
                ("microbatch_size", "the same --microbatch_size on another device"),
            ),
        )  # fmt: skip
    replayed = f"Replay is exact{f' to {error:.1g}' if error else ''}"
    moved = f"the first update moved the ratios by {_times(spread)} the clip range ({clip_range:.2g})"
    if first["step"] == 1 and spread > FAST:
        return Finding(
            "The first update went too far", "warning", f"{replayed}, but {moved}.",
            "Most strokes are clipped at once and teach nothing.",
            advice(
                config,
                setting(config, "a lower", "learning_rate"),
                setting(config, "fewer", "num_inner_epochs"),
            ),
        )  # fmt: skip
    return Finding(check, "fine", f"{replayed}; {moved}.")


def clipping_is_stuck(rows: Sequence[Row], config: Config) -> Finding:
    """Whether almost all strokes are clipped, or none, while the ratio hardly moves and nothing is learnt."""
    check = "Some strokes are clipped, most are not"
    train = [row for row in by_step(rows, "train") if {"clip_fraction", "clip_range"} <= row.keys()]
    clipped = recent([number(row, "clip_fraction") for row in train])
    if not clipped:
        return Finding(check, "unknown", "This recipe clips nothing, or there are too few steps.")
    moved = fmean(recent([number(row, "ratio_std") / number(row, "clip_range") for row in train]))
    seen = f"Lately {fmean(clipped):.1%} of the strokes were clipped; ratios moved by {_times(moved)} the clip range."
    if surely_above(clipped, MOSTLY_CLIPPED):
        return Finding(
            "Most strokes are clipped", "warning", seen,
            "The updates are too large: what lies beyond the clip range teaches nothing more.",
            advice(
                config,
                setting(config, "a lower", "learning_rate"),
                setting(config, "fewer", "num_inner_epochs"),
            ),
        )  # fmt: skip
    looked_twice = len(by_step(rows, "evaluation")) > 1
    if max(clipped) == 0 and 0 < moved < SLOW and looked_twice and not has_learnt(rows):
        return Finding(
            "Nothing is clipped, and nothing is learnt", "warning", f"{seen} No reward has risen beyond noise.",
            "The updates are so small that the model hardly changes.",
            advice(config, setting(config, "a higher", "learning_rate")),
        )  # fmt: skip
    exact = " Each rollout is learnt from in one optimiser step, so its ratios stay at one." if moved == 0 else ""
    return Finding(check, "fine", seen + exact)


def gradients_break(rows: Sequence[Row], config: Config) -> Finding:
    """Whether updates were left out because their gradient was not finite, other than at the very beginning."""
    check = "Gradients are finite"
    train = [row for row in by_step(rows, "train") if "gradient_norm" in row]
    if not train:
        return Finding(check, "unknown", "No gradient norms were written down.")
    broken = [row for row in train if row.get("skipped_updates") or not math.isfinite(number(row, "gradient_norm"))]
    scaled = config.get("mixed_precision") == "fp16"
    late = [row for row in broken if not scaled or row["step"] > math.ceil(_WARM_UP * train[-1]["step"])]
    num = round(sum(row.get("skipped_updates", 0) for row in broken))
    if len(late) <= (_SCALING * len(train) if scaled else 0):
        few = f"; {num} updates were left out while fp16 looked for its scale" if broken else ""
        norms = [number(row, "gradient_norm") for row in train if row not in broken] or [math.nan]
        return Finding(check, "fine", f"Their norm was between {min(norms):.2g} and {max(norms):.2g}{few}.")
    return Finding(
        "Gradients are not finite", "warning",
        f"{num} updates were left out because their gradient was not finite, the last in step {late[-1]['step']}.",
        "Numbers overflow: the learning rate is too high, or the number format too small.",
        advice(
            config,
            setting(config, "a lower", "learning_rate"),
            *([("mixed_precision", "--mixed_precision bf16 or no")] if scaled else []),
            setting(config, "a lower", "max_gradient_norm"),
        ),
    )  # fmt: skip


def _times(factor: float) -> str:
    """To two digits, and as a number that is no count."""
    return f"{factor:.1f} times" if factor >= 0.95 else f"{factor:.2g} times"
