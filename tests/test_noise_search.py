"""Noise search: steps by hand, limits and bad input."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum, load_rewards
from rlhf_t2i.search.context import SearchContext
from rlhf_t2i.search.noise_search import gradient_search, neighbourhood_search
from rlhf_t2i.types import Sampler
from tests.search_toys import distribution_of, generators, toy, value
from tests.toys import GaussianModel, number


def test_neighbours_of_the_best_noise_are_normal_around_it() -> None:
    """The deterministic toy is linear in its noise, so the numbers of a round show the noise."""
    result = neighbourhood_search(toy(eta=0.0), ["a"] * 500, num_rounds=2, similarity=0.9, generators=generators(4000))
    numbers = result.scores.reward
    first, second = numbers[:, :8], numbers[:, 8:]
    pivot = first.max(1).values
    # neighbour = 0.9 * pivot + sqrt(0.19) * fresh, on the scale of the toy's numbers
    centre = first.mean()
    assert_close(second.mean() - centre, 0.9 * (pivot.mean() - centre), rtol=0.05, atol=0.02)
    assert_close(
        (second - second.mean(1, keepdim=True)).std(), math.sqrt(0.19 * 7 / 8) * first.std(), rtol=0.05, atol=0.02
    )
    assert result.cost.denoiser_calls == 500 * 8 * 2 * 8


def test_similarity_zero_is_random_search() -> None:
    result = neighbourhood_search(toy(eta=0.0), ["a"] * 500, num_rounds=3, similarity=0.0, generators=generators(2000))
    numbers = result.scores.reward
    assert_close(numbers[:, 4:].mean(), numbers[:, :4].mean(), rtol=0, atol=0.06)
    assert_close(numbers[:, 4:].std(), numbers[:, :4].std(), rtol=0.05, atol=0)


def test_a_gradient_step_matches_the_calculation_by_hand() -> None:
    """reward = slope * noise + ..., so the first Nesterov step raises it by learning_rate * 1.9 * slope^2."""
    std = distribution_of(toy(eta=0.0))[1] ** 0.5  # the slope: the noise is standard normal
    result = gradient_search(
        toy(eta=0.0, reward=value), ["a", "b"], num_rounds=2, learning_rate=0.1, prior_weight=0.0,
        max_gradient_norm=1e9, generators=generators(4),
    )  # fmt: skip
    gained = result.scores.reward[:, 2:] - result.scores.reward[:, :2]
    assert_close(gained, torch.full((2, 2), 0.1 * 1.9 * std**2), rtol=1e-3, atol=1e-3)
    assert result.cost.denoiser_calls == 4 * 8 * (2 + 1)
    assert result.cost.reward_calls == 4 * (2 + 1)


def test_the_gradient_is_clipped_and_the_prior_regularises() -> None:
    settings: dict[str, Any] = {"num_rounds": 2, "learning_rate": 0.1, "generators": generators(4)}
    result = gradient_search(toy(eta=0.0), ["a"], prior_weight=0.0, max_gradient_norm=0.01, **settings)
    gained = result.scores.reward[:, 4:] - result.scores.reward[:, :4]
    assert (gained.abs() < 0.1 * 1.9 * 0.011).all()
    # With D = 1 the prior is x^2 / 2, whose gradient points to 0.
    zero = WeightedSum(((CheckedReward("number", value), 0.0), (CheckedReward("other", value), 0.0)))
    settings["generators"] = generators(4)
    pulled = gradient_search(
        toy(eta=0.0, reward=zero), ["a"], prior_weight=1.0, max_gradient_norm=1e9, **settings
    ).scores.by_name["number"]
    centre = distribution_of(toy(eta=0.0))[0]
    assert_close(pulled[:, 4:] - centre, (1 - 0.19) * (pulled[:, :4] - centre), rtol=1e-2, atol=1e-3)


class GradientCounter(GaussianModel):
    """Count the forward passes that record a graph."""

    num_with_graph = 0

    def predict(self, latents: Tensor, *arguments: Any, **keywords: Any) -> Any:
        self.num_with_graph += torch.is_grad_enabled()
        return super().predict(latents, *arguments, **keywords)


def test_the_last_round_records_no_graph() -> None:
    """The weights of a diffusers pipeline require gradients, so a graph of all steps would take memory for nothing."""
    model = GradientCounter()
    context = SearchContext(model, value, sampler=Sampler(model.schedule(8), partial(ddim, eta=0.0)))
    gradient_search(context, ["a"], num_rounds=3, learning_rate=1.0, generators=generators(2))
    assert (model.num_with_graph, len(model.rows)) == (2 * 8, 3 * 8)


@pytest.mark.slow
def test_gradient_search_raises_the_reward_of_the_built_in_model() -> None:
    policy = load_policy("shapes", device=torch.device("cpu"))
    reward = load_rewards("llava_reward", finite=False)
    context = SearchContext(policy, reward, sampler=Sampler(policy.schedule(1), partial(ddim, eta=0.0)))
    prompts = load_prompts("shapes", held_out=True)[:8]
    result = gradient_search(context, prompts, num_rounds=12, learning_rate=5.0, generators=generators(16))
    rounds = result.scores.reward.view(8, 12, 2).mean((0, 2))
    assert rounds[-3:].mean() > rounds[0] + 0.1, rounds


def test_noise_search_refuses_a_stochastic_sampler() -> None:
    with pytest.raises(ValueError, match="needs a deterministic sampler: DDIM with eta = 0"):
        neighbourhood_search(toy(eta=1.0), ["a"], num_rounds=2, similarity=0.9, generators=generators(2))
    with pytest.raises(ValueError, match="needs a deterministic sampler: DDIM with eta = 0"):
        gradient_search(toy(eta=0.5), ["a"], num_rounds=2, learning_rate=1.0, generators=generators(2))


def test_gradient_search_refuses_a_reward_without_gradient() -> None:
    context = toy(eta=0.0, reward=lambda images, prompts: number(images).detach())
    with pytest.raises(ValueError, match="The reward has no gradient"):
        gradient_search(context, ["a"], num_rounds=2, learning_rate=1.0, generators=generators(2))
