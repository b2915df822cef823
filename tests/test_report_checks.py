"""A warning is no random fluctuation, states the numbers, and suggests only options that the recipe has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from recipes import ddpo, diffusion_dpo, draft, flow_grpo
from rlhf_t2i.report.checks import (
    COLLAPSE,
    MOSTLY_FLAT,
    check_diversity,
    check_group_variance,
    check_held_out_rewards,
    findings,
)
from rlhf_t2i.report.finding import Config, Finding
from rlhf_t2i.report.update_checks import check_clipping, check_gradients, check_ratios
from rlhf_t2i.training.changes import Z_THRESHOLD
from rlhf_t2i.training.metrics import FAST, MOSTLY_CLIPPED, REPLAY_NOISE, SLOW
from tests.report_files import HACKED, Row, train, two_rewards

DDPO = asdict(ddpo.Config())
FLOW_GRPO = asdict(flow_grpo.Config())
RECIPES: dict[str, Any] = {"ddpo": ddpo, "flow_grpo": flow_grpo, "draft": draft, "diffusion_dpo": diffusion_dpo}


def evaluations(*means: tuple[float, float], error: float = 0.025) -> list[Row]:
    """Evaluations, ten updates apart, of llava_reward, which is trained on and has an error of 0.1, and of oracle."""
    rows = [two_rewards(10 * i, trained=trained, oracle=oracle) for i, (trained, oracle) in enumerate(means)]
    rows = [{**row, "oracle/standard_error": error} for row in rows]
    return [rows[0], {"kind": "train", "step": 1, "rewards/llava_reward": 1.0, "elapsed": 1.0}, *rows[1:]]


def updates(*, count: int = 8, **values: float | Sequence[float]) -> list[Row]:
    """Training rows; a sequence holds the value of each row."""
    own = [{k: v if isinstance(v, float | int) else v[i] for k, v in values.items()} for i in range(count)]
    return [{**train(i + 1, elapsed=float(i), clip_range=1e-3), **row} for i, row in enumerate(own)]


# --- a held-out reward falls ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("means", "state"),
    [
        # Two evaluations: the bound is 3 standard errors, and the error of a change sqrt(2) * 0.025 = 0.0354.
        ([(1.0, 0.60), (3.0, 0.49)], "warning"),  # 3.1 standard errors down
        ([(1.0, 0.60), (3.0, 0.50)], "passed"),  # 2.8
        ([(1.0, 0.60), (3.0, 0.90)], "passed"),
        # It rose, and then fell from its best, by 0.25 = 7.1 standard errors.
        ([(1.0, 0.40), (3.0, 0.85), (5.0, 0.60)], "warning"),
    ],
)
def test_a_held_out_reward_that_falls_while_the_trained_one_rises_is_a_warning(
    means: list[tuple[float, float]], state: str
) -> None:
    assert check_held_out_rewards(evaluations(*means), DDPO).state == state


def test_the_warning_names_both_rewards_with_their_numbers() -> None:
    found = check_held_out_rewards(evaluations((1.0, 0.4), (3.0, 0.85), (5.0, 0.6)), DDPO)
    assert found.title == "The held-out reward oracle falls"
    assert "From update 10 to 20 oracle went from 0.850 ± 0.025 to 0.600 ± 0.025" in found.observed
    assert "llava_reward went from 3.00 ± 0.10 to 5.00 ± 0.10" in found.observed
    assert "reward hacking" in found.meaning
    assert "--early_stop_reward oracle" in found.advice


def test_if_both_rewards_fall_the_updates_are_too_large() -> None:
    found = check_held_out_rewards(evaluations((1.0, 0.6), (-3.0, 0.2)), DDPO)
    assert (found.state, "updates damage the model" in found.meaning) == ("warning", True)


def test_an_option_that_is_set_is_not_suggested() -> None:
    stopping = asdict(ddpo.Config(early_stop_reward="oracle"))
    assert "--early_stop_reward" not in check_held_out_rewards(evaluations((1.0, 0.6), (3.0, 0.2)), stopping).advice


def test_the_threshold_grows_with_the_number_of_evaluations() -> None:
    """Noise too often lies 3.1 standard errors below the best of 50, but hardly ever 4.5.

    The threshold is the quantile of the normal distribution at 0.00135 / 50: 4.04.
    """
    flat = [(1.0 + 0.1 * i, 0.5) for i in range(49)]
    error = math.hypot(0.025, 0.025)
    for fall, state in ((3.1, "passed"), (4.5, "warning")):
        best = 0.4 + fall * error
        means = [(1.0, best), *((trained, 0.45) for trained, _ in flat), (9.0, 0.4)]
        assert check_held_out_rewards(evaluations(*means), DDPO).state == state


def test_rewards_without_standard_errors_are_not_checked() -> None:
    rows = evaluations((1.0, 0.6), (3.0, 0.2), error=math.nan)
    assert check_held_out_rewards(rows, DDPO).state == "unknown"


@pytest.mark.parametrize(
    ("missing", "lacking"), [("llava_reward", "that is trained on"), ("oracle", "that is held out")]
)
def test_a_check_without_its_data_says_what_is_missing(missing: str, lacking: str) -> None:
    rows = [{k: v for k, v in row.items() if not k.startswith(missing)} for row in HACKED]
    found = check_held_out_rewards(rows, DDPO)
    assert (found.state, lacking in found.observed) == ("unknown", True)
    assert "--evaluation_rewards" in found.observed


# --- diversity ------------------------------------------------------------------------------------


def diverse(first: float, last: float, *, error: float) -> list[Row]:
    rows = [two_rewards(step, trained=1.0, oracle=0.5) for step in (0, 10)]
    return [{**row, "diversity": d, "diversity_error": error} for row, d in zip(rows, (first, last), strict=True)]


@pytest.mark.parametrize(
    ("last", "error", "state"),
    [
        (0.15, 0.001, "passed"),  # half of the first
        (0.09, 0.001, "warning"),  # under 0.3 / 3 = 0.1, by 0.01, with an error of sqrt((1/3)^2 + 1) * 0.001 = 0.00105
        (0.09, 0.004, "passed"),  # 0.01 is 2.4 errors of sqrt((1/3)^2 + 1) * 0.004 = 0.0042
        (0.00, 0.004, "warning"),
    ],
)
def test_diversity_has_collapsed_below_a_third_beyond_its_errors(last: float, error: float, state: str) -> None:
    assert check_diversity(diverse(0.3, last, error=error), DDPO).state == state


def test_one_image_per_prompt_has_no_diversity() -> None:
    rows = [{k: v for k, v in row.items() if k != "diversity"} for row in diverse(0.0, 0.0, error=0.0)]
    found = check_diversity(rows, DDPO)
    assert (found.state, "--num_evaluation_images" in found.observed) == ("unknown", True)


def test_equal_images_before_training_cannot_collapse() -> None:
    assert check_diversity(diverse(0.0, 0.2, error=0.01), DDPO).state == "unknown"


# --- the updates ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("check", "values", "state"),
    [
        (check_ratios, {"replay_error": 0.0}, "passed"),
        (check_ratios, {"replay_error": 9e-5}, "passed"),
        (check_ratios, {"replay_error": [0, 0, 0, 0, 2e-4, 0, 0, 0]}, "warning"),  # a fifth of the clip range
        (check_ratios, {"replay_error": [0, 0, 0, 0, math.nan, 0, 0, 0]}, "warning"),
        (
            check_ratios,
            {"replay_error": 0.0, "ratio_std": [2e-2, *[1e-4] * 7]},
            "warning",
        ),  # 20 clip ranges in the first update
        (check_ratios, {"replay_error": 0.0, "ratio_std": [1e-4, 2e-2, *[1e-4] * 6]}, "passed"),  # 20 clip ranges later
        (check_clipping, {"clip_fraction": [0.0, 0.0, 0.0, 0.0, 0.9, 0.95, 0.9, 0.95]}, "warning"),
        (
            check_clipping,
            {"clip_fraction": [0.9, 0.95, 0.9, 0.95, 0.1, 0.1, 0.1, 0.1]},
            "passed",
        ),  # only in the first half
        (check_clipping, {"clip_fraction": [0.5, 1.0, 0.9, 1.0] * 2}, "passed"),  # 0.85 ± 0.12: may be under 0.8
        (check_gradients, {"gradient_norm": 0.5, "skipped_updates": 0.0}, "passed"),
        (check_gradients, {"gradient_norm": 0.5, "skipped_updates": [0, 0, 1, 0, 0, 0, 0, 0]}, "warning"),
        (check_gradients, {"gradient_norm": [0.5] * 7 + [math.nan]}, "warning"),
    ],
)
def test_problems_of_updates(check: Callable[..., Finding], values: dict[str, Any], state: str) -> None:
    assert check(updates(**values), DDPO).state == state


@pytest.mark.parametrize(
    ("ratio_std", "oracle", "state"),
    [
        (1e-5, (0.5, 0.5), "warning"),  # a hundredth of the clip range, and no reward rose
        (1e-5, (0.5, 0.9), "passed"),  # the reward rose all the same
        (0.0, (0.5, 0.5), "passed"),  # one optimiser step per rollout: ratios are 1
        (1e-4, (0.5, 0.5), "passed"),
    ],
)
def test_no_clipping_is_a_warning_if_no_reward_rises(ratio_std: float, oracle: tuple[float, float], state: str) -> None:
    before, *_, after = evaluations((1.0, oracle[0]), (1.0, oracle[1]))
    rows = [before, *updates(clip_fraction=0.0, ratio_std=ratio_std), after]
    assert check_clipping(rows, DDPO).state == state


@pytest.mark.parametrize(
    ("precision", "skipped", "state"),
    [
        ("fp16", [1, 1, 1, *[0] * 47], "passed"),  # its first loss scale is too large
        ("bf16", [1, 1, 1, *[0] * 47], "warning"),  # which has no loss scale
        ("fp16", [*[0] * 40, 1, 1, 1, *[0] * 7], "warning"),
    ],
)
def test_only_fp16_may_skip_the_first_updates(precision: str, skipped: list[int], state: str) -> None:
    rows = updates(count=50, gradient_norm=0.5, skipped_updates=skipped)
    assert check_gradients(rows, {**DDPO, "mixed_precision": precision}).state == state


@pytest.mark.parametrize(
    ("config", "values", "state"),
    [
        (FLOW_GRPO, {"degenerate_groups": [36, 38, 36, 38] * 2}, "warning"),  # of 48: 0.77 ± 0.01
        (FLOW_GRPO, {"degenerate_groups": [12, 48, 12, 48] * 2}, "passed"),  # 0.62 ± 0.22: may be under a half
        (FLOW_GRPO, {"degenerate_groups": 5}, "passed"),
        (asdict(diffusion_dpo.Config()), {"pairs": 4}, "warning"),  # of 32 prompts
        (asdict(diffusion_dpo.Config()), {"pairs": 30}, "passed"),
        (DDPO, {"reward_std": 0.0}, "warning"),
        (DDPO, {"reward_std": 0.2}, "passed"),
        (DDPO, {}, "unknown"),
    ],
)
def test_groups_without_variance_are_a_warning_if_they_are_the_majority(
    config: Config, values: dict[str, Any], state: str
) -> None:
    assert check_group_variance(updates(**values), config).state == state


# --- all of them ----------------------------------------------------------------------------------

BAD: list[Row] = [
    *evaluations((1.0, 0.6), (3.0, 0.2))[:2],
    *updates(
        replay_error=1.0, clip_fraction=0.99, skipped_updates=1.0, gradient_norm=0.0, degenerate_groups=30, pairs=1
    ),
    {**evaluations((1.0, 0.6), (3.0, 0.2))[2], "diversity": 0.01},
]
for _row in BAD:
    _row.pop("rewards/oracle", None)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_only_options_of_the_recipe_are_suggested(name: str, precision: str) -> None:
    config = {**asdict(RECIPES[name].Config()), "mixed_precision": precision}
    found = findings(BAD, config)
    warnings = [one for one in found if one.state == "warning"]
    assert len(warnings) >= 4
    assert all(one.observed and one.meaning and one.advice for one in warnings)
    suggested = {flag for one in found for flag in re.findall(r"--(\w+)", one.observed + one.advice)}
    assert "learning_rate" in suggested
    assert suggested <= {field.name for field in fields(RECIPES[name].Config)}


@pytest.mark.parametrize("rows", [[], BAD[:1], BAD[1:2], BAD[:2]])
def test_a_run_that_has_just_started_has_no_warnings(rows: list[Row]) -> None:
    assert {one.state for one in findings(rows, DDPO)} <= {"passed", "unknown"}


# --- the documentation ----------------------------------------------------------------------------


def documented_warnings() -> dict[str, str]:
    """Condition of each warning in the table of docs/report.md, by its title."""
    text = (Path(__file__).parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    table = text.split("| warning | condition |\n|---|---|\n")[1].split("\n\n")[0]
    return dict(line.strip("| ").split(" | ") for line in table.splitlines())


def test_the_documentation_lists_all_warnings() -> None:
    before = evaluations((1.0, 0.6))[0]
    examples = [
        check_held_out_rewards(evaluations((1.0, 0.6), (3.0, 0.2)), DDPO),
        check_diversity(diverse(0.3, 0.0, error=0.001), DDPO),
        check_ratios(updates(replay_error=1.0), DDPO),
        check_ratios(updates(replay_error=0.0, ratio_std=1.0), DDPO),
        check_group_variance(updates(reward_std=0.0), DDPO),
        check_clipping(updates(clip_fraction=0.99), DDPO),
        check_clipping([before, *updates(clip_fraction=0.0, ratio_std=1e-6), {**before, "step": 20}], DDPO),
        check_gradients(updates(gradient_norm=0.0, skipped_updates=1.0), DDPO),
    ]
    assert {one.state for one in examples} == {"warning"}
    assert list(documented_warnings()) == [one.title.replace("oracle", "NAME") for one in examples]


def test_the_documentation_states_the_thresholds() -> None:
    conditions = documented_warnings()
    for title, threshold in {
        "The held-out reward NAME falls": f"more than {Z_THRESHOLD:.0f} standard errors",
        "Diversity has collapsed": f"below {100 * COLLAPSE:.0f} % of the first",
        "Ratios do not start at 1": f"more than {REPLAY_NOISE} clip ranges",
        "The first update was too large": f"more than {FAST:.0f} clip ranges",
        "Most groups have no variance": f"more than {100 * MOSTLY_FLAT:.0f} % of the groups",
        "Most (image, step) pairs are clipped": f"More than {100 * MOSTLY_CLIPPED:.0f} % are",
        "Nothing is clipped, and no reward rises": f"less than {SLOW} clip ranges",
    }.items():
        assert threshold in conditions[title]
