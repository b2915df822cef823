"""What may have gone wrong in a run: each check says what it saw, what that usually means, and what to do about it.

Nothing is called a warning that chance alone may have done: means are compared by their standard errors, and whatever
fluctuates from step to step by the spread of its last steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean

from rlhf_t2i.report.finding import NUM_ERRORS, Config, Finding, advice, change, recent, setting, surely_above, text
from rlhf_t2i.report.update_checks import clipping_is_stuck, gradients_break, ratios_are_off
from rlhf_t2i.training.changes import diversity_of, with_error
from rlhf_t2i.training.metrics import Row, by_step, number, reward_names, trained_rewards

COLLAPSE = 1 / 3
"""Of the first diversity. Half is lost where all is well: much of it was images of something else than asked."""
MOSTLY_FLAT = 0.5
"""Share of groups: then half of the images are painted and judged for nothing."""
_FLAT_REWARD = 1e-6
"""A spread of rewards below this counts as none, as in the advantages."""


def findings(rows: Sequence[Row], config: Config) -> list[Finding]:
    """All checks, in the order in which they are worth reading."""
    checks = (held_out_falls, diversity_collapses, ratios_are_off, groups_are_flat, clipping_is_stuck, gradients_break)
    return [check(rows, config) for check in checks]


def held_out_falls(rows: Sequence[Row], config: Config) -> Finding:
    """Whether a reward that is not trained on has fallen since it was best, and one that is has not.

    The best of k earlier evaluations is partly luck: the bound is as rarely passed by chance as NUM_ERRORS by one.
    """
    check = "Trained and held-out rewards go together"
    evaluations, trained_on = by_step(rows, "evaluation"), trained_rewards(rows)
    evaluated = reward_names(evaluations[:1])
    trained, held_out = ([n for n in evaluated if (n in trained_on) == side] for side in (True, False))
    if not trained_on:
        return Finding(check, "unknown", "No reward is trained on so far.")
    if not trained or not held_out:
        lacking = "that is trained on" if not trained else "that is not trained on"
        hint = advice(config, ("evaluation_rewards", "one of each kind in --evaluation_rewards"))
        return Finding(check, "unknown", f"No reward {lacking} is evaluated. {hint}".strip())
    if len(evaluations) < 2:
        return Finding(check, "unknown", "There is one evaluation, with nothing to compare it to.")
    last, chance = evaluations[-1], 1 - NormalDist().cdf(NUM_ERRORS)
    bound = -NormalDist().inv_cdf(chance / (len(evaluations) - 1))
    if all(math.isnan(change(evaluations[0], last, name)) for name in held_out):
        return Finding(check, "unknown", "The standard errors of the held-out rewards are not known.")
    for name in held_out:
        best = max(evaluations[:-1], key=lambda row: number(row, name))
        if not change(best, last, name) < -bound:
            continue
        kept = next((one for one in trained if change(best, last, one) > -bound), None)
        both = ", ".join(
            f"{one} went from {text(best, one)} to {text(last, one)}" for one in (name, kept or trained[0])
        )
        seen = f"From update {best['step']} to {last['step']} {both}."
        return Finding(f"{name}, which is not trained on, falls", "warning", seen, *_about_a_fall(kept, name, config))
    gaps = ", ".join(f"{n} {text(evaluations[0], n)} to {text(last, n)}" for n in (*trained, *held_out))
    return Finding(check, "fine", f"No held-out reward has fallen by more than {bound:.1f} standard errors: {gaps}.")


def _about_a_fall(kept: str | None, held_out: str, config: Config) -> tuple[str, str]:
    """What it means, and what to do."""
    stop = ("early_stop_reward", f"--early_stop_reward {held_out}, which exports the weights from before the fall")
    nearer = advice(
        config,
        *([stop] if config.get("early_stop_reward") is None else []),
        setting(config, "a higher", "kl_weight"),
        setting(config, "a higher", "beta"),
        setting(config, "a lower", "learning_rate"),
        ("rewards", "a second reward in --rewards, as two are harder to fool than one"),
    )
    if kept is None:
        return "Both have become worse: the updates do damage, most often because they are too large.", nearer
    return (
        f"The model no longer gets better but learns what {kept} mistakes for better: reward hacking, or a fit to the "
        f"training prompts. Look at its best images below.",
        nearer,
    )


def diversity_collapses(rows: Sequence[Row], config: Config) -> Finding:
    """Whether the images of one prompt have become much more alike than they were."""
    check = "Images of one prompt still differ"
    evaluations = by_step(rows, "evaluation")
    if len(evaluations) < 2 or not number(evaluations[0], "diversity") > 0:
        hint = "two images of a prompt are needed: --num_evaluation_images above the number of evaluation prompts"
        why = hint if evaluations and number(evaluations[0], "diversity") == 0 else "two evaluations are needed"
        return Finding(check, "unknown", f"Not known: {why}.")
    first, last = (diversity_of(evaluations[i]) for i in (0, -1))
    share = last[0] / first[0]
    seen = f"Diversity went from {with_error(*first)} to {with_error(*last)}, {share:.0%} of what it was."
    if not COLLAPSE * first[0] - last[0] > NUM_ERRORS * math.hypot(COLLAPSE * first[1], last[1]):
        return Finding(check, "fine", f"{seen} Under {COLLAPSE:.0%} would be called a collapse.")
    return Finding(
        "Diversity has collapsed", "warning", seen,
        "The model paints much the same image of a prompt whatever the seed: a collapse. Some loss is usual, as "
        "wrong images disappear; this is more.",
        advice(
            config,
            setting(config, "a higher", "kl_weight"),
            setting(config, "a higher", "beta"),
            setting(config, "a lower", "learning_rate"),
            setting(config, "fewer", "num_steps"),
        ),
    )  # fmt: skip


def groups_are_flat(rows: Sequence[Row], config: Config) -> Finding:
    """Whether too many prompts have images that all earn the same, or all images do."""
    check = "Rewards differ within a group"
    train = by_step(rows, "train")
    flat = _flat_shares(train, config)
    spreads = recent([number(row, "reward_std") for row in train if "reward_std" in row])
    if not flat and not spreads:
        return Finding(check, "unknown", "This recipe compares no images of one prompt, or there are too few steps.")
    if flat:
        seen = f"Lately {fmean(flat):.0%} of the groups had images that all earned the same."
        bad = surely_above(flat, MOSTLY_FLAT)
    else:
        seen = f"Lately the rewards of a step spread by {fmean(spreads):.3g}."
        bad = max(spreads) <= _FLAT_REWARD
    if not bad:
        return Finding(check, "fine", seen)
    return Finding(
        "Most groups have no variance", "warning", seen,
        "Without a difference there is no better and worse: such images cost as much as others and teach nothing.",
        advice(
            config,
            setting(config, "more", "images_per_prompt"),
            ("rewards", "a graded reward instead of one that only passes or fails, in --rewards"),
            ("prompts", "--prompts that are neither always nor never painted right"),
            setting(config, "a higher", "noise_scale"),
        ),
    )  # fmt: skip


def _flat_shares(train: Sequence[Row], config: Config) -> list[float]:
    """Of each recent step the share of its groups that taught nothing; none where that is not known."""
    groups = config.get("prompts_per_step")
    if groups and config.get("pairs") == "sampled" and config.get("pair_selection") == "best_worst":
        return recent([1 - row["pairs"] / groups for row in train if "pairs" in row])
    return recent([row["degenerate_groups"] / groups for row in train if "degenerate_groups" in row]) if groups else []
