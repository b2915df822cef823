"""Several rewards: their sum, standardised sum, advantages of each (GDPO), and a veto."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from recipes import ddpo, diffusion_nft, flow_grpo
from rlhf_t2i.advantages import (
    decoupled_advantages,
    group_relative_advantages,
    standardised_sum,
    standardised_sum_of_groups,
    vetoed_advantages,
)
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum
from rlhf_t2i.search.candidates import best_of_n
from rlhf_t2i.training.several_rewards import warn_of_drowned
from tests.runs import as_for_toy_models, assert_same, rows, state, weights
from tests.search_toys import generators, toy, value

LOUD = torch.tensor([[100.0, 100.0, 0.0, 0.0]])
QUIET = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
ROOT_2 = math.sqrt(2)


def test_gdpo_by_hand() -> None:
    """Advantages 1, 1, -1, -1 and 1, -1, 1, -1; their sum 2, 0, 0, -2 has a standard deviation of sqrt(2)."""
    parts = torch.stack([group_relative_advantages(LOUD), group_relative_advantages(QUIET)])
    assert_close(decoupled_advantages(parts, [1.0, 1.0]), torch.tensor([[ROOT_2, 0.0, 0.0, -ROOT_2]]))
    assert_close(decoupled_advantages(parts, [0.0, 3.0]), torch.tensor([[1.0, -1.0, 1.0, -1.0]]))


def test_gdpo_tells_images_apart_whose_rewards_differ_but_not_their_sum() -> None:
    """In the second group the sum is 1 for every image, and one reward is rarer than the other."""
    one, two = torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    parts = torch.stack([group_relative_advantages(one), group_relative_advantages(two)])
    plain = group_relative_advantages(one + two)
    assert_close(plain[0], plain[1])
    one[1], two[1] = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0])
    parts = torch.stack([group_relative_advantages(one), group_relative_advantages(two)])
    assert_close(decoupled_advantages(parts, [1.0, 1.0])[0], 2 * decoupled_advantages(parts, [1.0, 1.0])[1])


def test_rewards_that_cancel_leave_no_rounding_errors() -> None:
    rewards = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    parts = torch.stack([group_relative_advantages(rewards), group_relative_advantages(7 - 3 * rewards)])
    assert decoupled_advantages(parts, [1.0, 1.0]).eq(0).all()


@pytest.mark.parametrize(("weight", "drowned"), [(1.0, True), (100.0, False), (0.0, False)])
def test_a_reward_that_another_one_drowns_is_named(
    weight: float, drowned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    terms = [(CheckedReward(name, lambda images, prompts: images), w) for name, w in (("loud", 2.0), ("quiet", weight))]
    scores = {"loud": LOUD.flatten(), "quiet": QUIET.flatten()}
    warn_of_drowned(scores, WeightedSum(tuple(terms)), gather=torch.clone, print=print)
    said = capsys.readouterr().out
    assert said.startswith("WARNING: the reward quiet is drowned") == drowned
    assert bool(said) == drowned


def test_a_standardised_sum_by_hand() -> None:
    """Standard deviations of all images: 2 and 1/2."""
    one, two = torch.tensor([[0.0, 4.0], [0.0, 4.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert_close(standardised_sum(torch.stack([one, two]), [1.0, 10.0]), torch.tensor([[9.0, 11.0], [-11.0, -9.0]]))


def test_a_veto_by_hand() -> None:
    """The failed image is the worst of its group, at least one standard deviation below; a failed group is silent."""
    advantages = torch.tensor([[2.0, 0.5, -1.5], [0.3, 0.2, 0.1], [1.0, 0.0, -1.0]])
    passed = torch.tensor([[False, True, True], [True, False, True], [False, False, False]])
    expected = torch.tensor([[-1.5, 0.5, -1.5], [0.3, -1.0, 0.1], [0.0, 0.0, 0.0]])
    assert torch.equal(vetoed_advantages(advantages, passed), expected)


def test_the_order_within_a_group_ignores_units_and_scores_that_are_not_finite() -> None:
    loud = torch.tensor([[0.0, 100.0, 200.0, math.inf]])
    quiet = torch.tensor([[0.2, 0.1, 0.0, 5.0]])
    total = standardised_sum_of_groups(torch.stack([loud, quiet]), [1.0, 3.0])
    assert total[0].nan_to_num(-9).argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert total[0, 3].isnan()


def test_best_of_n_by_a_standardised_sum_lets_the_quiet_reward_count() -> None:
    """Its weight is 2, so it decides; in the plain sum the loud one does. Reported rewards stay plain sums."""
    loud = CheckedReward("loud", lambda images, prompts: 1000 * value(images, prompts))
    quiet = CheckedReward("quiet", lambda images, prompts: -value(images, prompts))
    reward = WeightedSum(((loud, 1.0), (quiet, 2.0)))
    plain, fair = (
        best_of_n(toy(eta=1.0, reward=reward, standardise=each), ["a", "b"], generators=generators(8))
        for each in (False, True)
    )
    assert torch.equal(plain.scores.by_name["reward"], fair.scores.by_name["reward"])
    assert plain.selected.tolist() == plain.scores.by_name["loud"].argmax(1).tolist()
    assert fair.selected.tolist() == fair.scores.by_name["quiet"].argmax(1).tolist()


# --- in the recipes ---------------------------------------------------------------------------------

RED, BLUE, LOUD_BLUE = (f"tests.runs:channel({each})" for each in ("index=0", "index=2", "index=2, scale=100"))
VETO = "tests.runs:redness"


def trained(recipe: Any, model: Path, folder: Path, rewards: str, **options: Any) -> Path:
    """Train for one step with GDPO and a veto that about half of the images fail."""
    config = recipe.Config(
        **as_for_toy_models(
            model=str(model), prompts_per_step=2, images_per_prompt=4, num_denoising_steps=4, num_minibatches=1,
            microbatch_size=8, adam_epsilon=1e-3, num_steps=1, evaluate_every=0, num_evaluation_images=2,
            evaluation_rewards=VETO, rewards=rewards, combine_rewards="gdpo", veto=VETO, veto_below=-0.07,
            num_cpu_threads=1, run_folder=str(folder), **options,
        )
    )  # fmt: skip
    return recipe.main(config)


@pytest.mark.parametrize(
    ("recipe", "model", "options"),
    [
        (ddpo, "tiny_sd", {"history_size": 4, "history_min_count": 4}),
        pytest.param(flow_grpo, "tiny_sd3", {"resolution": 16}, marks=pytest.mark.slow),
        pytest.param(diffusion_nft, "tiny_zimage", {"resolution": 16}, marks=pytest.mark.slow),
    ],
)
def test_with_gdpo_the_unit_of_a_reward_changes_no_weight(
    recipe: Any, model: str, options: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """A veto counts nothing in the sum; it is scored and evaluated."""
    folders = [
        trained(recipe, request.getfixturevalue(model), tmp_path / name, f"{RED},{reward}", **options)
        for name, reward in (("quiet", BLUE), ("loud", LOUD_BLUE))
    ]
    assert_same(*(weights(folder, 1) for folder in folders), atol=1e-5)
    row = rows(folders[1], "train")[-1]
    assert row["reward"] == pytest.approx(row[f"rewards/{RED}"] + row[f"rewards/{LOUD_BLUE}"])
    assert f"rewards/{VETO}" in row
    assert VETO in rows(folders[1], "evaluation")[-1]
    if recipe is ddpo:  # the checkpoint has the history of each reward, the veto included
        histories = [each for each in state(folders[1], 1)[1] if any(isinstance(past, list) for past in each.values())]
        assert len(histories) == 3
