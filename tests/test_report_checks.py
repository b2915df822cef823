"""A warning has a reason that chance is not, says what was seen, and advises only what the recipe has a setting for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

import pytest

from recipes import ddpo, diffusion_dpo, draft, flow_grpo
from rlhf_t2i.report.checks import diversity_collapses, findings, groups_are_flat, held_out_falls
from rlhf_t2i.report.finding import Config, Finding
from rlhf_t2i.report.update_checks import clipping_is_stuck, gradients_break, ratios_are_off
from tests.test_report import HACKED, Row, judged, train

DDPO = asdict(ddpo.Config())
FLOW_GRPO = asdict(flow_grpo.Config())
RECIPES: dict[str, Any] = {"ddpo": ddpo, "flow_grpo": flow_grpo, "draft": draft, "diffusion_dpo": diffusion_dpo}


def looked_at(*means: tuple[float, float], error: float = 0.025) -> list[Row]:
    """Evaluations, ten updates apart, of (judge, oracle); the judge is trained on, and its errors are 0.1."""
    rows = [judged(10 * i, judge=judge, oracle=oracle) for i, (judge, oracle) in enumerate(means)]
    rows = [{**row, "oracle/standard_error": error} for row in rows]
    return [rows[0], {"kind": "train", "step": 1, "rewards/judge": 1.0, "elapsed": 1.0}, *rows[1:]]


def updates(*, count: int = 8, **values: float | Sequence[float]) -> list[Row]:
    """Training rows; a sequence gives each its own value."""
    own = [{k: v if isinstance(v, float | int) else v[i] for k, v in values.items()} for i in range(count)]
    return [{**train(i + 1, elapsed=float(i), clip_range=1e-3), **row} for i, row in enumerate(own)]


# --- a held-out reward falls ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "state"),
    [
        # Two evaluations: the bound is 3 standard errors, and the error of a change sqrt(2) * 0.025 = 0.0354.
        ([(1.0, 0.60), (3.0, 0.49)], "warning"),  # 3.1 standard errors down
        ([(1.0, 0.60), (3.0, 0.50)], "fine"),  # 2.8
        ([(1.0, 0.60), (3.0, 0.90)], "fine"),
        # It rose, and then fell from its best, by 0.25 = 7.1 standard errors.
        ([(1.0, 0.40), (3.0, 0.85), (5.0, 0.60)], "warning"),
    ],
)
def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_a_warning(
    means: list[tuple[float, float]], state: str
) -> None:
    assert held_out_falls(looked_at(*means), DDPO).state == state


def test_the_warning_names_both_rewards_with_their_numbers() -> None:
    found = held_out_falls(looked_at((1.0, 0.4), (3.0, 0.85), (5.0, 0.6)), DDPO)
    assert found.title == "oracle, which is not trained on, falls"
    assert "From update 10 to 20 oracle went from 0.850 ± 0.025 to 0.600 ± 0.025" in found.seen
    assert "judge went from 3.00 ± 0.10 to 5.00 ± 0.10" in found.seen
    assert "reward hacking" in found.meaning
    assert "--early_stop_reward oracle" in found.remedy


def test_where_both_fall_the_updates_are_blamed() -> None:
    found = held_out_falls(looked_at((1.0, 0.6), (-3.0, 0.2)), DDPO)
    assert (found.state, "do damage" in found.meaning) == ("warning", True)


def test_what_is_set_already_is_not_advised() -> None:
    stopping = asdict(ddpo.Config(early_stop_reward="oracle"))
    assert "--early_stop_reward" not in held_out_falls(looked_at((1.0, 0.6), (3.0, 0.2)), stopping).remedy


def test_the_best_of_many_evaluations_may_be_luck() -> None:
    """A fall of 3.1 standard errors from the best of 50 is seen by chance too often to be a warning; of 4.5 it is not.

    With 50 to choose from, the bound is where the normal distribution has left 0.00135 / 50: at 4.04.
    """
    flat = [(1.0 + 0.1 * i, 0.5) for i in range(49)]
    error = math.hypot(0.025, 0.025)
    for fall, state in ((3.1, "fine"), (4.5, "warning")):
        best = 0.4 + fall * error
        means = [(1.0, best), *((judge, 0.45) for judge, _ in flat), (9.0, 0.4)]
        assert held_out_falls(looked_at(*means), DDPO).state == state


def test_without_errors_nothing_is_claimed_of_rewards() -> None:
    rows = looked_at((1.0, 0.6), (3.0, 0.2), error=math.nan)
    assert held_out_falls(rows, DDPO).state == "unknown"


@pytest.mark.parametrize(
    ("missing", "lacking"), [("llava_reward", "that is trained on"), ("oracle", "that is not trained on")]
)
def test_a_check_that_cannot_be_made_says_what_it_lacks(missing: str, lacking: str) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith(missing)} for row in HACKED]
    found = held_out_falls(rows, DDPO)
    assert (found.state, lacking in found.seen) == ("unknown", True)
    assert "--evaluation_rewards" in found.seen


# --- diversity ------------------------------------------------------------------------------------


def diverse(first: float, last: float, *, error: float) -> list[Row]:
    rows = [judged(step, judge=1.0, oracle=0.5) for step in (0, 10)]
    return [{**row, "diversity": d, "diversity_error": error} for row, d in zip(rows, (first, last), strict=True)]


@pytest.mark.parametrize(
    ("last", "error", "state"),
    [
        (0.15, 0.001, "fine"),  # half of it: wrong images have gone
        (0.09, 0.001, "warning"),  # under 0.3 / 3 = 0.1, by 0.01, with an error of sqrt((1/3)^2 + 1) * 0.001 = 0.00105
        (0.09, 0.004, "fine"),  # 0.01 is 2.4 errors of sqrt((1/3)^2 + 1) * 0.004 = 0.0042
        (0.00, 0.004, "warning"),
    ],
)
def test_a_collapse_is_a_third_of_the_first_diversity_beyond_its_errors(last: float, error: float, state: str) -> None:
    assert diversity_collapses(diverse(0.3, last, error=error), DDPO).state == state


def test_one_image_of_each_prompt_has_no_diversity_to_lose() -> None:
    found = diversity_collapses(diverse(0.0, 0.0, error=0.0), DDPO)
    assert (found.state, "--num_evaluation_images" in found.seen) == ("unknown", True)


# --- the updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "values", "state"),
    [
        (ratios_are_off, {"replay_error": 0.0}, "fine"),
        (ratios_are_off, {"replay_error": 9e-5}, "fine"),
        (ratios_are_off, {"replay_error": [0, 0, 0, 0, 2e-4, 0, 0, 0]}, "warning"),  # a fifth of the clip range
        (ratios_are_off, {"replay_error": [0, 0, 0, 0, math.nan, 0, 0, 0]}, "warning"),
        (ratios_are_off, {"replay_error": 0.0, "ratio_std": [2e-2, *[1e-4] * 7]}, "warning"),  # 20 clip ranges at once
        (ratios_are_off, {"replay_error": 0.0, "ratio_std": [1e-4, 2e-2, *[1e-4] * 6]}, "fine"),  # not in the first
        (clipping_is_stuck, {"clip_fraction": [0.0, 0.0, 0.0, 0.0, 0.9, 0.95, 0.9, 0.95]}, "warning"),
        (clipping_is_stuck, {"clip_fraction": [0.9, 0.95, 0.9, 0.95, 0.1, 0.1, 0.1, 0.1]}, "fine"),  # not lately
        (clipping_is_stuck, {"clip_fraction": [0.5, 1.0, 0.9, 1.0] * 2}, "fine"),  # 0.85 ± 0.12: perhaps under 0.8
        (gradients_break, {"gradient_norm": 0.5, "skipped_updates": 0.0}, "fine"),
        (gradients_break, {"gradient_norm": 0.5, "skipped_updates": [0, 0, 1, 0, 0, 0, 0, 0]}, "warning"),
        (gradients_break, {"gradient_norm": [0.5] * 7 + [math.nan]}, "warning"),
    ],
)
def test_what_an_update_may_do_wrong(check: Callable[..., Finding], values: dict[str, Any], state: str) -> None:
    assert check(updates(**values), DDPO).state == state


@pytest.mark.parametrize(
    ("spread", "oracle", "state"),
    [
        (1e-5, (0.5, 0.5), "warning"),  # a hundredth of the clip range, and nothing came of it
        (1e-5, (0.5, 0.9), "fine"),  # it learns all the same
        (0.0, (0.5, 0.5), "fine"),  # one optimiser step a rollout: its ratios are one
        (1e-4, (0.5, 0.5), "fine"),
    ],
)
def test_a_clip_range_that_is_never_reached_is_a_warning_where_nothing_is_learnt(
    spread: float, oracle: tuple[float, float], state: str
) -> None:
    before, *_, after = looked_at((1.0, oracle[0]), (1.0, oracle[1]))
    rows = [before, *updates(clip_fraction=0.0, ratio_std=spread), after]
    assert clipping_is_stuck(rows, DDPO).state == state


@pytest.mark.parametrize(
    ("precision", "skipped", "state"),
    [
        ("fp16", [1, 1, 1, *[0] * 47], "fine"),  # it begins with too large a scale
        ("bf16", [1, 1, 1, *[0] * 47], "warning"),  # which has none
        ("fp16", [*[0] * 40, 1, 1, 1, *[0] * 7], "warning"),
    ],
)
def test_only_fp16_may_leave_out_the_first_updates(precision: str, skipped: list[int], state: str) -> None:
    rows = updates(count=50, gradient_norm=0.5, skipped_updates=skipped)
    assert gradients_break(rows, {**DDPO, "mixed_precision": precision}).state == state


@pytest.mark.parametrize(
    ("config", "values", "state"),
    [
        (FLOW_GRPO, {"degenerate_groups": [36, 38, 36, 38] * 2}, "warning"),  # of 48: 0.77 ± 0.01
        (FLOW_GRPO, {"degenerate_groups": [12, 48, 12, 48] * 2}, "fine"),  # 0.62 ± 0.22: perhaps under a half
        (FLOW_GRPO, {"degenerate_groups": 5}, "fine"),
        (asdict(diffusion_dpo.Config()), {"pairs": 4}, "warning"),  # of 32 prompts
        (asdict(diffusion_dpo.Config()), {"pairs": 30}, "fine"),
        (DDPO, {"reward_std": 0.0}, "warning"),
        (DDPO, {"reward_std": 0.2}, "fine"),
        (DDPO, {}, "unknown"),
    ],
)
def test_groups_without_variance_are_a_warning_where_they_are_the_rule(
    config: Config, values: dict[str, Any], state: str
) -> None:
    assert groups_are_flat(updates(**values), config).state == state


# --- all of them ----------------------------------------------------------------------------------

BAD: list[Row] = [
    *looked_at((1.0, 0.6), (3.0, 0.2))[:2],
    *updates(
        replay_error=1.0, clip_fraction=0.99, skipped_updates=1.0, gradient_norm=0.0, degenerate_groups=30, pairs=1
    ),
    {**looked_at((1.0, 0.6), (3.0, 0.2))[2], "diversity": 0.01},
]
for _row in BAD:
    _row.pop("rewards/oracle", None)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_only_settings_of_the_recipe_are_advised(name: str, precision: str) -> None:
    config = {**asdict(RECIPES[name].Config()), "mixed_precision": precision}
    found = findings(BAD, config)
    warnings = [one for one in found if one.state == "warning"]
    assert len(warnings) >= 4
    assert all(one.seen and one.meaning and one.remedy for one in warnings)
    advised = {flag for one in found for flag in re.findall(r"--(\w+)", one.seen + one.remedy)}
    assert "learning_rate" in advised
    assert advised <= {field.name for field in fields(RECIPES[name].Config)}


@pytest.mark.parametrize("rows", [[], BAD[:1], BAD[1:2], BAD[:2]])
def test_a_run_too_young_to_be_judged_is_not_judged(rows: list[Row]) -> None:
    assert {one.state for one in findings(rows, DDPO)} <= {"fine", "unknown"}
