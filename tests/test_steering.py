"""FK steering: convergence to the tilted distribution, limits, reproducibility and bad input."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.load import CheckedReward, WeightedSum, as_checked
from rlhf_t2i.sampling.rollout import rollout
from rlhf_t2i.search.candidates import pruned_best_of_n
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.search.steering import SteeringResult, fk_steering, measure_reward_std
from rlhf_t2i.types import Sampler
from tests.search_toys import POTENTIALS, context_of, distribution_of, generators, steer_toy, toy, value
from tests.toys import number

STRENGTH = 1.2


@pytest.fixture
def policy(tiny_sd: Path) -> DiffusionPolicy:
    return load_policy(str(tiny_sd), device=torch.device("cpu"))


def moments(result: SteeringResult) -> tuple[Tensor, Tensor]:
    """Mean and variance of the weighted images of each prompt."""
    weights, numbers = result.log_weights.softmax(1), result.candidates.scores.by_name["number"].double()
    mean = (weights * numbers).sum(1)
    return mean, (weights * (numbers - mean[:, None]) ** 2).sum(1)


def closeness_to_one(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Minus the squared distance from 1."""
    return -((number(images) - 1.0) ** 2)


near_one = WeightedSum(((as_checked(closeness_to_one), 1.0), (CheckedReward("number", value), 0.0)))
"""The number itself is a further score, which does not count."""


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("ess_threshold", [1.0, 0.9])
def test_particles_converge_to_the_tilted_posterior(potential: PotentialName, ess_threshold: float) -> None:
    """Normal(m, v) * exp(-s (x - 1)^2) is Normal((m / v + 2 s) / p, 1 / p) with p = 1 / v + 2 s.

    The error falls with 4, 64 and 4,096 particles; with the last it is within four standard errors over 8 prompts.
    """
    errors: list[float] = []
    mean, variance = torch.zeros(1), torch.zeros(1)
    m, v = distribution_of(toy(eta=1.0))
    precision = 1 / v + 2 * STRENGTH
    expected_mean, expected_variance = (m / v + 2 * STRENGTH) / precision, 1 / precision
    for num_particles, num_prompts in ((4, 200), (64, 40), (4096, 8)):
        _, result = steer_toy(
            num_particles=num_particles, num_prompts=num_prompts, strength=STRENGTH, reward=near_one,
            potential=potential, ess_threshold=ess_threshold,
        )  # fmt: skip
        mean, variance = moments(result)
        errors.append(float((mean - expected_mean).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    for measured, expected in ((mean, expected_mean), (variance, expected_variance)):
        assert abs(measured.mean().item() - expected) < 4 * measured.std().item() / 8**0.5
        assert measured.mean().item() == pytest.approx(expected, abs=0.04)
    assert expected_mean - m > 0.15, "or plain sampling would pass too"
    assert v - expected_variance > 0.15


def test_adaptive_resampling_skips_and_resamples() -> None:
    """Without both, the test above could not detect that weights are dropped when resampling is skipped."""
    resampled: list[float] = []
    for ess_threshold in (1.0, 0.9):
        _, result = steer_toy(
            num_particles=64, num_prompts=40, strength=STRENGTH, reward=near_one, potential="max",
            ess_threshold=ess_threshold,
        )  # fmt: skip
        resampled.append(torch.stack(list(result.resampled.values())).double().mean().item())
    assert resampled[0] == 1
    assert 0.1 < resampled[1] < 0.9


@pytest.mark.parametrize("potential", POTENTIALS)
def test_strength_zero_is_plain_sampling_to_the_bit(policy: DiffusionPolicy, potential: PotentialName) -> None:
    context = context_of(policy, eta=1.0)
    result = fk_steering(
        context, ["a fox", "a cat"], strength=0.0, reward_std=1.0, potential=potential, resample_after=[1, 2, 3],
        generators=generators(8), resampling=generators(2, seed=1),
    )  # fmt: skip
    images, _ = rollout(
        policy, ["a fox"] * 4 + ["a cat"] * 4, sampler=context.sampler, generators=generators(8), microbatch_size=64
    )
    assert torch.equal(result.candidates.images.flatten(0, 1), images)
    assert (result.log_weights == 0).all()


def test_strength_is_relative_to_the_standard_deviation_of_the_reward() -> None:
    """A reward that is 7 times as large, and shifted, gives the same images."""
    _, one = steer_toy(
        num_particles=16,
        strength=2.0,
        reward_std=measure_reward_std(toy(eta=1.0), ["a"] * 50, generators=generators(200)),
    )
    scaled = lambda images, prompts: 7 * number(images) - 40  # noqa: E731
    reward_std = measure_reward_std(toy(eta=1.0, reward=scaled), ["a"] * 50, generators=generators(200))
    _, other = steer_toy(num_particles=16, strength=2.0, reward_std=reward_std, reward=scaled)
    assert_close(one.candidates.images, other.candidates.images, rtol=0, atol=0)
    assert_close(one.log_weights.softmax(1), other.log_weights.softmax(1), rtol=0, atol=1e-4)


def test_reward_std_leaves_out_differences_between_prompts() -> None:
    context = toy(
        eta=1.0, reward=lambda images, prompts: number(images) + torch.tensor([100.0 * len(p) for p in prompts])
    )
    reward_std = measure_reward_std(context, ["a", "bb"] * 500, generators=generators(4000))
    assert reward_std == pytest.approx(distribution_of(context)[1] ** 0.5, rel=0.05)


def test_prompts_in_one_batch_are_independent() -> None:
    """Two prompts in one batch give the images that each gives alone."""
    reward = lambda images, prompts: number(images) * torch.tensor([1.0 if p == "up" else -1.0 for p in prompts])  # noqa: E731
    settings: dict[str, Any] = {"strength": 3.0, "reward_std": 1.0, "resample_after": [2, 5]}
    noise, choose = generators(16), generators(2, seed=1)
    both = fk_steering(toy(eta=1.0, reward=reward), ["up", "down"], **settings, generators=noise, resampling=choose)
    noise, choose = generators(16), generators(2, seed=1)
    for p, prompt in enumerate(["up", "down"]):
        alone = fk_steering(
            toy(eta=1.0, reward=reward),
            [prompt],
            **settings,
            generators=noise[8 * p : 8 * p + 8],
            resampling=[choose[p]],
        )
        assert_close(alone.candidates.images[0], both.candidates.images[p], rtol=0, atol=0)
    up, down = number(both.candidates.images.flatten(0, 1)).unflatten(0, (2, 8)).mean(1)
    assert up > down + 0.5


def test_the_cost_counts_guidance_twice_and_every_scored_image(policy: DiffusionPolicy) -> None:
    context = context_of(policy, eta=1.0)
    context.sampler = Sampler(context.sampler.schedule, context.sampler.dynamics, guidance_scale=3.0)
    result = fk_steering(
        context, ["a fox"], strength=1.0, reward_std=1.0, resample_after=[1, 3], generators=generators(4),
        resampling=generators(1),
    )  # fmt: skip
    assert result.candidates.cost.denoiser_calls == 2 * 4 * 4
    assert result.candidates.cost.reward_calls == 4 * 3
    assert result.candidates.cost.seconds > 0


@pytest.mark.parametrize("after", [0, 8, 99])
def test_steps_outside_the_schedule_are_refused(after: int) -> None:
    with pytest.raises(
        ValueError, match=rf"resampled after {after} steps: sampling has 8 steps, so .* between 1 and 7"
    ):
        fk_steering(
            toy(eta=1.0), ["a"], strength=1.0, reward_std=1.0, resample_after=[after], generators=generators(2),
            resampling=generators(1),
        )  # fmt: skip
    with pytest.raises(ValueError, match=rf"pruned after {after} steps: sampling has 8 steps, so .* between 1 and 7"):
        pruned_best_of_n(toy(eta=1.0), ["a"], keep={after: 1}, generators=generators(2))


def test_fk_steering_refuses_a_deterministic_sampler() -> None:
    context = toy(eta=0.0)
    with pytest.raises(ValueError, match="FK steering needs a stochastic sampler: DDIM with eta > 0"):
        fk_steering(
            context, ["a"], strength=1.0, reward_std=1.0, resample_after=[4], generators=generators(2),
            resampling=generators(1),
        )  # fmt: skip
    assert context.denoiser_calls == 0
