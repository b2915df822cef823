"""Checks for common problems of a run: each states the numbers, their usual meaning, and options that may help.

Random fluctuations are not warnings: means are compared by their standard errors, and quantities that vary from step
to step by the standard error of their recent mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean

from rlhf_t2i.report.finding import (
    Config,
    Finding,
    mean_exceeds,
    mean_text,
    option,
    recent,
    suggest,
    z_score,
)
from rlhf_t2i.report.update_checks import check_clipping, check_gradients, check_ratios
from rlhf_t2i.training.changes import Z_THRESHOLD, with_error
from rlhf_t2i.training.metrics import Row, by_step, number, reward_names, trained_rewards

COLLAPSE = 1 / 3
"""Fraction of the first diversity below which it has collapsed. Half is often lost because wrong images disappear."""
MOSTLY_FLAT = 0.5
"""Fraction of groups without variance above which most images of a step are wasted."""
_FLAT_REWARD = 1e-6
"""Standard deviation of rewards, in units of their mean, that counts as 0: as in `rlhf_t2i.advantages`."""


def findings(rows: Sequence[Row], config: Config) -> list[Finding]:
    """Return the results of all checks, the most important first."""
    checks = (
        check_held_out_rewards, check_diversity, check_ratios, check_group_variance, check_clipping, check_gradients,
    )  # fmt: skip
    return [check(rows, config) for check in checks]


def check_held_out_rewards(rows: Sequence[Row], config: Config) -> Finding:
    """Warn if a held-out reward has fallen since its best evaluation.

    The best of k evaluations is biased upwards. The threshold grows with k such that noise exceeds it as rarely as
    3 standard errors in a single comparison (Bonferroni): Phi(-threshold) = Phi(-3) / k.
    """
    title = "Held-out rewards do not fall"
    evaluations, trained_on = by_step(rows, "evaluation"), trained_rewards(rows)
    evaluated = reward_names(evaluations[:1])
    trained, held_out = ([n for n in evaluated if (n in trained_on) == side] for side in (True, False))
    if not trained_on:
        return Finding(title, "unknown", "No reward is trained on so far.")
    if not trained or not held_out:
        kind = "that is trained on" if not trained else "that is held out"
        hint = suggest(config, ("evaluation_rewards", "one of each kind in --evaluation_rewards"))
        return Finding(title, "unknown", f"No reward {kind} is evaluated. {hint}".strip())
    if len(evaluations) < 2:
        return Finding(title, "unknown", "There is only one evaluation.")
    last, tail = evaluations[-1], 1 - NormalDist().cdf(Z_THRESHOLD)
    threshold = -NormalDist().inv_cdf(tail / (len(evaluations) - 1))
    if all(math.isnan(z_score(evaluations[0], last, name)) for name in held_out):
        return Finding(title, "unknown", "The standard errors of the held-out rewards are unknown.")
    for name in held_out:
        best = max(evaluations[:-1], key=lambda row: number(row, name))
        if not z_score(best, last, name) < -threshold:
            continue
        steady = next((one for one in trained if z_score(best, last, one) > -threshold), None)
        changes = ", ".join(
            f"{one} went from {mean_text(best, one)} to {mean_text(last, one)}" for one in (name, steady or trained[0])
        )
        observed = f"From update {best['step']} to {last['step']} {changes}."
        cause = "Reward hacking or overfitting" if steady else "Training damages the model"
        other = f"{steady} {_verb(z_score(best, last, steady))}" if steady else f"{trained[0]} fell"
        summary = f"{cause}: {other}{', but' if steady else ', and'} the held-out {name} fell"
        explained = _explain_fall(steady, name, config)
        return Finding(f"The held-out reward {name} falls", "warning", observed, *explained, summary)
    changes = ", ".join(f"{n} {mean_text(evaluations[0], n)} to {mean_text(last, n)}" for n in (*trained, *held_out))
    return Finding(title, "passed", f"None has fallen by more than {threshold:.1f} standard errors: {changes}.")


def _verb(z: float) -> str:
    return "rose" if z > Z_THRESHOLD else "did not fall"


def _explain_fall(steady: str | None, held_out: str, config: Config) -> tuple[str, str]:
    """Return meaning and advice; `steady` is a reward that is trained on and has not fallen."""
    stop = ("early_stop_reward", f"--early_stop_reward {held_out}, which exports the weights from before the fall")
    advice = suggest(
        config,
        *([stop] if config.get("early_stop_reward") is None else []),
        option(config, "a higher", "kl_weight"),
        option(config, "a higher", "beta"),
        option(config, "a lower", "learning_rate"),
        ("rewards", "a second reward in --rewards, because several are harder to exploit than one"),
    )
    if steady is None:
        return "Both rewards have fallen: the updates damage the model, most often because they are too large.", advice
    return (
        f"The model exploits errors of {steady} (reward hacking) or overfits to the training prompts. Check the images "
        f"with its highest scores below.",
        advice,
    )


def check_diversity(rows: Sequence[Row], config: Config) -> Finding:
    """Warn if diversity is below a third of that of the first evaluation, beyond its standard errors."""
    title = "Images of the same prompt still differ"
    evaluations = by_step(rows, "evaluation")
    measured = [row for row in evaluations if "diversity" in row]
    if evaluations and not measured:
        option_name = "--num_evaluation_images above the number of evaluation prompts"
        return Finding(title, "unknown", f"This needs two images of the same prompt ({option_name}).")
    if len(measured) < 2:
        return Finding(title, "unknown", "This needs two evaluations.")
    first, last = (
        (number(row, "diversity"), float(row.get("diversity_error", 0.0))) for row in (measured[0], measured[-1])
    )
    if first[0] == 0:
        return Finding(title, "unknown", "The images of a prompt were equal before training.")
    fraction = last[0] / first[0]
    observed = f"Diversity went from {with_error(*first)} to {with_error(*last)}, {fraction:.0%} of the first value."
    if not COLLAPSE * first[0] - last[0] > Z_THRESHOLD * math.hypot(COLLAPSE * first[1], last[1]):
        return Finding(title, "passed", f"{observed} Under {COLLAPSE:.0%} counts as collapsed.")
    return Finding(
        "Diversity has collapsed", "warning", observed,
        "Mode collapse: the images of a prompt are nearly the same for all seeds. Some loss is usual, because wrong "
        "images disappear; this is more.",
        suggest(
            config,
            option(config, "a higher", "kl_weight"),
            option(config, "a higher", "beta"),
            option(config, "a lower", "learning_rate"),
            option(config, "fewer", "num_steps"),
        ),
    )  # fmt: skip


def check_group_variance(rows: Sequence[Row], config: Config) -> Finding:
    """Warn if the images of most prompts have equal rewards, or if all images have."""
    title = "Rewards differ within a group"
    train = by_step(rows, "train")
    flat = _flat_fractions(train, config)
    measured = [row for row in train if "reward_std" in row]
    stds = recent([number(row, "reward_std") for row in measured])
    sizes = recent([abs(number(row, "reward")) for row in measured])
    if not flat and not stds:
        return Finding(title, "unknown", "The recipe does not compare images of a prompt, or there are too few steps.")
    if flat:
        observed = f"In the last {len(flat)} steps {fmean(flat):.0%} of the groups had images with equal rewards."
        is_bad = mean_exceeds(flat, MOSTLY_FLAT)
    else:
        observed = f"In the last {len(stds)} steps the standard deviation of the rewards was {fmean(stds):.3g}."
        is_bad = all(std <= _FLAT_REWARD * size for std, size in zip(stds, sizes, strict=True))
    if not is_bad:
        return Finding(title, "passed", observed)
    return Finding(
        "Most groups have no variance", "warning", observed,
        "The advantages of a group with equal rewards are 0: its images cost as much as others and have no gradient.",
        suggest(
            config,
            option(config, "more", "images_per_prompt"),
            ("rewards", "a graded reward instead of pass or fail in --rewards"),
            ("prompts", "--prompts that the model gets right sometimes, but not always"),
            option(config, "a higher", "noise_scale"),
        ),
    )  # fmt: skip


def _flat_fractions(train: Sequence[Row], config: Config) -> list[float]:
    """Return the fraction of groups with equal rewards in each recent step; empty if it is unknown."""
    groups = config.get("prompts_per_step")
    if groups and config.get("pairs") == "sampled" and config.get("pair_selection") == "best_worst":
        return recent([1 - row["pairs"] / groups for row in train if "pairs" in row])
    return recent([row["degenerate_groups"] / groups for row in train if "degenerate_groups" in row]) if groups else []
