"""Best-of-N, pruning, FK steering and noise search: closed forms, limits and bad input."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.prompts import load_prompts
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.sampling.rollout import rollout
from rlhf_t2i.search import api
from rlhf_t2i.search.candidates import best_of_n, expected_best, halving, pruned_best_of_n
from rlhf_t2i.search.context import CandidateScores, RewardFunction, SearchContext, Veto
from rlhf_t2i.search.noise_search import gradient_search, neighbourhood_search
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.search.steering import SteeringResult, fk_steering, measure_reward_std
from rlhf_t2i.types import Sampler
from tests import reference
from tests.runs import REDNESS, redness
from tests.toys import GaussianModel, number

POTENTIALS: list[PotentialName] = ["difference", "max", "sum"]
STRENGTH = 1.2


def value(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward of the toy model: the number that its image encodes."""
    return number(images)


def generators(count: int, *, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed * 1_000_000 + i) for i in range(count)]


def toy(*, eta: float, reward: RewardFunction = value, num_steps: int = 8, **settings: Any) -> SearchContext:
    model = GaussianModel()
    sampler = Sampler(model.schedule(num_steps), partial(ddim, eta=eta))
    return SearchContext(
        model, reward, sampler=sampler, microbatch_size=settings.pop("microbatch_size", 100_000), **settings
    )


def distribution_of(context: SearchContext) -> tuple[float, float]:
    """Mean and variance of the samples of a toy model."""
    assert isinstance(context.model, GaussianModel)
    return context.model.distribution(context.sampler)


@pytest.fixture
def tiny(tiny_sd: Path) -> DiffusionPolicy:
    return load_policy(str(tiny_sd), device=torch.device("cpu"))


def context_of(policy: DiffusionPolicy, *, eta: float, microbatch_size: int = 64, num_steps: int = 4) -> SearchContext:
    return SearchContext(
        policy,
        redness,
        sampler=Sampler(policy.schedule(num_steps), partial(ddim, eta=eta)),
        microbatch_size=microbatch_size,
    )


# --- best-of-N ---------------------------------------------------------------------------------------


def test_expected_best_is_the_mean_over_all_subsets() -> None:
    """Also for the score of another reward of the selected image."""
    scores, values = (
        torch.randn(3, 7, generator=generators(1)[0]),
        torch.randn(3, 7, generator=generators(1, seed=1)[0]),
    )
    for averaged, found in ((scores, expected_best(scores)), (values, expected_best(scores, values))):
        for p in range(3):
            expected = [reference.expected_best(scores[p].tolist(), averaged[p].tolist(), n) for n in range(1, 8)]
            assert found[p].tolist() == pytest.approx(expected, abs=1e-5)


def test_expected_best_of_uniform_scores_is_the_closed_form() -> None:
    """The maximum of n uniform numbers has mean n / (n + 1); values that equal the score half of the time gain half."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(20_000, 16, generator=generator)
    values = torch.where(
        torch.rand(20_000, 16, generator=generator) < 0.5, scores, torch.rand(20_000, 16, generator=generator)
    )
    n = torch.arange(1, 17)
    assert_close(expected_best(scores).mean(0), n / (n + 1), rtol=0, atol=0.006)
    assert_close(expected_best(scores, values).mean(0), 0.5 * n / (n + 1) + 0.25, rtol=0, atol=0.008)


def test_expected_best_of_many_images_is_finite_and_ends_with_the_maximum() -> None:
    scores = torch.randn(1, 2000, generator=generators(1)[0])
    found = expected_best(scores)
    assert found.isfinite().all()
    assert_close(found[0, 0], scores.mean(), rtol=0, atol=1e-4)
    assert_close(found[0, -1], scores.max())
    assert (found.diff() >= 0).all()


def test_best_of_n_on_the_toy_has_the_mean_of_the_maximum_of_n_normal_numbers() -> None:
    """1.0294 standard deviations above the mean for n = 4."""
    context = toy(eta=1.0)
    found = best_of_n(context, ["a"] * 4000, generators=generators(16_000))
    mean, variance = distribution_of(context)
    assert number(found.best).mean().item() == pytest.approx(mean + 1.0294 * variance**0.5, abs=0.03)


def test_an_image_depends_only_on_its_seed(tiny: DiffusionPolicy) -> None:
    """Best of 6 contains the images of best of 3, and equals what `rollout` generates."""
    many = best_of_n(context_of(tiny, eta=1.0), ["a fox"], generators=generators(6))
    few = best_of_n(context_of(tiny, eta=1.0), ["a fox"], generators=generators(3))
    assert_close(many.images[:, :3], few.images, rtol=0, atol=1e-6)
    images, _ = rollout(
        tiny, ["a fox"] * 6, sampler=context_of(tiny, eta=1.0).sampler, generators=generators(6), microbatch_size=64
    )
    assert torch.equal(images, many.images[0])


def test_a_weighted_sum_returns_the_scores_of_each_reward(tiny: DiffusionPolicy) -> None:
    rewards = load_rewards(f"{REDNESS}=2,jpeg_compressibility=0.1", finite=False)
    found = api.best_of_n(
        tiny, ["a fox", "a cat"], rewards, num_candidates=3, num_denoising_steps=4, guidance_scale=1.0
    )
    scores = found.scores.by_name
    assert list(scores) == ["reward", REDNESS, "jpeg_compressibility"]
    assert_close(scores["reward"], 2 * scores[REDNESS] + 0.1 * scores["jpeg_compressibility"])
    assert torch.equal(found.selected, scores["reward"].argmax(1))
    assert found.cost.reward_calls == 12


def test_a_vetoed_image_is_selected_only_if_all_are_vetoed() -> None:
    reward = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, math.nan, 1.0]])
    safe = torch.tensor([[-1.0, 0.5, 2.0], [-1.0, -0.5, -2.0], [-1.0, 0.5, math.nan]])
    scores = CandidateScores({"reward": reward, "veto": safe}, ~(safe >= 0))
    assert scores.order.tolist() == [[1, 2, 0], [1, 0, 2], [1, 0, 2]]
    assert scores.rank.tolist() == [[2, 0, 1], [1, 0, 2], [1, 0, 2]]


def test_the_veto_applies_to_final_images() -> None:
    """Every number above 0 is vetoed: the highest number below 0 is selected."""
    context = toy(eta=1.0, veto=Veto(lambda images, prompts: -number(images), 0.0))
    found = best_of_n(context, ["a"] * 12, generators=generators(800 - 32))
    numbers = found.scores.reward
    assert (number(found.best) <= 0).all()
    assert_close(number(found.best), numbers.where(numbers <= 0, -math.inf).max(1).values)
    assert found.cost.reward_calls == 2 * 768


# --- pruning -----------------------------------------------------------------------------------------


def test_pruning_saves_denoiser_calls_and_survivors_equal_the_unpruned_images(tiny: DiffusionPolicy) -> None:
    whole = best_of_n(context_of(tiny, eta=0.0), ["a fox", "a cat"], generators=generators(16))
    pruned = pruned_best_of_n(
        context_of(tiny, eta=0.0), ["a fox", "a cat"], keep=halving(8, after=[1, 2]), generators=generators(16)
    )
    assert halving(8, after=[1, 2]) == halving(8, after=[2, 1]) == {1: 4, 2: 2}
    assert pruned.candidates.cost.denoiser_calls == 2 * (8 * 1 + 4 * 1 + 2 * 2)
    assert pruned.candidates.cost.reward_calls == 2 * (8 + 4 + 2)
    for p in range(2):
        assert_close(pruned.candidates.images[p], whole.images[p, pruned.survivors[p]], rtol=0, atol=1e-6)
        assert set(pruned.rounds[1].order[p, :4].tolist()) >= set(pruned.survivors[p].tolist())


def test_pruning_by_a_perfect_prediction_keeps_the_best_image() -> None:
    """With a deterministic sampler the order of the toy's images never changes, so the best survives every round."""
    whole = best_of_n(toy(eta=0.0), ["a"] * 20, generators=generators(320))
    pruned = pruned_best_of_n(toy(eta=0.0), ["a"] * 20, keep={1: 8, 2: 3, 5: 1}, generators=generators(320))
    assert_close(pruned.candidates.best, whole.best)


# --- FK steering -------------------------------------------------------------------------------------


def steer_toy(
    *,
    num_particles: int,
    num_prompts: int = 1,
    strength: float,
    reward_std: float = 1.0,
    reward: RewardFunction = value,
    **settings: Any,
) -> tuple[SearchContext, SteeringResult]:
    context = toy(eta=1.0, reward=reward)
    found = fk_steering(
        context, ["a"] * num_prompts, strength=strength, reward_std=reward_std, resample_after=[2, 4, 6],
        generators=generators(num_particles * num_prompts), resampling=generators(num_prompts, seed=1), **settings,
    )  # fmt: skip
    return context, found


def moments(found: SteeringResult) -> tuple[Tensor, Tensor]:
    """Mean and variance of the weighted images of each prompt."""
    weights, numbers = found.log_weights.softmax(1), found.candidates.scores.by_name["number"].double()
    mean = (weights * numbers).sum(1)
    return mean, (weights * (numbers - mean[:, None]) ** 2).sum(1)


def near_one(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Minus the squared distance from 1, with the number itself as a further score."""
    return -((number(images) - 1.0) ** 2), {"number": number(images), "other": number(images)}


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
        _, found = steer_toy(
            num_particles=num_particles, num_prompts=num_prompts, strength=STRENGTH, reward=near_one,
            potential=potential, ess_threshold=ess_threshold,
        )  # fmt: skip
        mean, variance = moments(found)
        errors.append(float((mean - expected_mean).square().mean().sqrt()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    for found_, expected in ((mean, expected_mean), (variance, expected_variance)):
        assert abs(found_.mean().item() - expected) < 4 * found_.std().item() / 8**0.5
        assert found_.mean().item() == pytest.approx(expected, abs=0.04)
    assert expected_mean - m > 0.15, "or plain sampling would pass too"
    assert v - expected_variance > 0.15


def test_adaptive_resampling_skips_and_resamples() -> None:
    """Without both, the test above could not detect that weights are dropped when resampling is skipped."""
    resampled: list[float] = []
    for ess_threshold in (1.0, 0.9):
        _, found = steer_toy(
            num_particles=64, num_prompts=40, strength=STRENGTH, reward=near_one, potential="max",
            ess_threshold=ess_threshold,
        )  # fmt: skip
        resampled.append(torch.stack(list(found.resampled.values())).double().mean().item())
    assert resampled[0] == 1
    assert 0.1 < resampled[1] < 0.9


@pytest.mark.parametrize("potential", POTENTIALS)
def test_strength_zero_is_plain_sampling_to_the_bit(tiny: DiffusionPolicy, potential: PotentialName) -> None:
    context = context_of(tiny, eta=1.0)
    found = fk_steering(
        context, ["a fox", "a cat"], strength=0.0, reward_std=1.0, potential=potential, resample_after=[1, 2, 3],
        generators=generators(8), resampling=generators(2, seed=1),
    )  # fmt: skip
    images, _ = rollout(
        tiny, ["a fox"] * 4 + ["a cat"] * 4, sampler=context.sampler, generators=generators(8), microbatch_size=64
    )
    assert torch.equal(found.candidates.images.flatten(0, 1), images)
    assert (found.log_weights == 0).all()


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


def test_the_cost_counts_guidance_twice_and_every_scored_image(tiny: DiffusionPolicy) -> None:
    context = context_of(tiny, eta=1.0)
    context.sampler = Sampler(context.sampler.schedule, context.sampler.dynamics, guidance_scale=3.0)
    found = fk_steering(
        context, ["a fox"], strength=1.0, reward_std=1.0, resample_after=[1, 3], generators=generators(4),
        resampling=generators(1),
    )  # fmt: skip
    assert found.candidates.cost.denoiser_calls == 2 * 4 * 4
    assert found.candidates.cost.reward_calls == 4 * 3
    assert found.candidates.cost.seconds > 0


# --- noise search ------------------------------------------------------------------------------------


def test_neighbours_of_the_best_noise_are_normal_around_it() -> None:
    """The deterministic toy is linear in its noise, so the numbers of a round show the noise."""
    found = neighbourhood_search(toy(eta=0.0), ["a"] * 500, num_rounds=2, similarity=0.9, generators=generators(4000))
    numbers = found.scores.reward
    first, second = numbers[:, :8], numbers[:, 8:]
    pivot = first.max(1).values
    # neighbour = 0.9 * pivot + sqrt(0.19) * fresh, on the scale of the toy's numbers
    centre = first.mean()
    assert_close(second.mean() - centre, 0.9 * (pivot.mean() - centre), rtol=0.05, atol=0.02)
    assert_close(
        (second - second.mean(1, keepdim=True)).std(), math.sqrt(0.19 * 7 / 8) * first.std(), rtol=0.05, atol=0.02
    )
    assert found.cost.denoiser_calls == 500 * 8 * 2 * 8


def test_similarity_zero_is_random_search() -> None:
    found = neighbourhood_search(toy(eta=0.0), ["a"] * 500, num_rounds=3, similarity=0.0, generators=generators(2000))
    numbers = found.scores.reward
    assert_close(numbers[:, 4:].mean(), numbers[:, :4].mean(), rtol=0, atol=0.06)
    assert_close(numbers[:, 4:].std(), numbers[:, :4].std(), rtol=0.05, atol=0)


def test_a_gradient_step_matches_the_calculation_by_hand() -> None:
    """reward = slope * noise + ..., so the first Nesterov step raises it by learning_rate * 1.9 * slope^2."""
    std = distribution_of(toy(eta=0.0))[1] ** 0.5  # the slope: the noise is standard normal
    found = gradient_search(
        toy(eta=0.0, reward=value), ["a", "b"], num_rounds=2, learning_rate=0.1, prior_weight=0.0,
        max_gradient_norm=1e9, generators=generators(4),
    )  # fmt: skip
    gained = found.scores.reward[:, 2:] - found.scores.reward[:, :2]
    assert_close(gained, torch.full((2, 2), 0.1 * 1.9 * std**2), rtol=1e-3, atol=1e-3)
    assert found.cost.denoiser_calls == 4 * 8 * (2 + 1)
    assert found.cost.reward_calls == 4 * (2 + 1)


def test_the_gradient_is_clipped_and_the_prior_regularises() -> None:
    settings: dict[str, Any] = {"num_rounds": 2, "learning_rate": 0.1, "generators": generators(4)}
    found = gradient_search(toy(eta=0.0), ["a"], prior_weight=0.0, max_gradient_norm=0.01, **settings)
    gained = found.scores.reward[:, 4:] - found.scores.reward[:, :4]
    assert (gained.abs() < 0.1 * 1.9 * 0.011).all()
    # With D = 1 the prior is x^2 / 2, whose gradient points to 0.
    zero = lambda images, prompts: 0.0 * number(images)  # noqa: E731
    settings["generators"] = generators(4)
    pulled = gradient_search(
        toy(eta=0.0, reward=lambda i, p: (zero(i, p), {"number": number(i), "b": number(i)})), ["a"],
        prior_weight=1.0, max_gradient_norm=1e9, **settings,
    ).scores.by_name["number"]  # fmt: skip
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


def test_gradient_search_raises_the_reward_of_the_built_in_model() -> None:
    policy = load_policy("shapes", device=torch.device("cpu"))
    reward = load_rewards("llava_reward", finite=False)
    context = SearchContext(policy, reward, sampler=Sampler(policy.schedule(1), partial(ddim, eta=0.0)))
    prompts = load_prompts("shapes", held_out=True)[:8]
    found = gradient_search(context, prompts, num_rounds=12, learning_rate=5.0, generators=generators(16))
    rounds = found.scores.reward.view(8, 12, 2).mean((0, 2))
    assert rounds[-3:].mean() > rounds[0] + 0.1, rounds


# --- memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [3, 5])
def test_the_microbatch_size_does_not_change_the_images(tiny: DiffusionPolicy, microbatch_size: int) -> None:
    settings: dict[str, Any] = {"strength": 3.0, "reward_std": 0.05, "resample_after": [1, 2]}
    results = [
        fk_steering(
            context_of(tiny, eta=1.0, microbatch_size=size), ["a fox", "a cat"], **settings, generators=generators(8),
            resampling=generators(2, seed=1),
        )
        for size in (64, microbatch_size)
    ]  # fmt: skip
    assert_close(results[0].candidates.images, results[1].candidates.images, rtol=0, atol=1e-5)
    assert torch.equal(results[0].candidates.selected, results[1].candidates.selected)


class SmallMachine(GaussianModel):
    """Runs out of memory with more than five images."""

    def predict(self, latents: Tensor, *arguments: Any, **keywords: Any) -> Any:
        if len(latents) > 5:
            raise torch.OutOfMemoryError("there is no room")
        return super().predict(latents, *arguments, **keywords)


def test_out_of_memory_halves_the_batch_with_a_warning_and_does_not_change_the_images() -> None:
    sampler = Sampler(GaussianModel().schedule(8), partial(ddim, eta=1.0))
    small = SearchContext(SmallMachine(), value, sampler=sampler, microbatch_size=16)
    with pytest.warns(UserWarning, match="Out of memory") as caught:
        found = best_of_n(small, ["a", "b"], generators=generators(24))
    assert [str(w.message)[:60] for w in caught] == [
        "Out of memory with 16 images in one batch; continuing with 8",
        "Out of memory with 8 images in one batch; continuing with 4,",
    ]
    assert small.microbatch_size == 4
    plain = best_of_n(toy(eta=1.0), ["a", "b"], generators=generators(24))
    assert_close(found.images, plain.images, rtol=0, atol=0)
    assert found.cost.denoiser_calls == plain.cost.denoiser_calls


def test_out_of_memory_with_one_image_is_raised() -> None:
    class NoRoom(GaussianModel):
        def predict(self, latents: Tensor, *arguments: Any, **keywords: Any) -> Any:
            raise torch.OutOfMemoryError("there is no room")

    context = SearchContext(
        NoRoom(), value, sampler=Sampler(GaussianModel().schedule(8), partial(ddim, eta=1.0)), microbatch_size=1
    )
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        best_of_n(context, ["a"], generators=generators(2))


# --- Python API ---------------------------------------------------------------------------------------


def test_the_seed_of_a_selected_image_gives_that_image_in_diffusers(tiny_sd: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipe.set_progress_bar_config(disable=True)
    found = api.best_of_n(
        pipe, ["a fox", "a cat"], redness, num_candidates=3, num_denoising_steps=4, guidance_scale=2.0, seed=5
    )
    assert api.to_pil(found.best[0]).size == (16, 16)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    seed = 5 + 1 * 3 + int(found.selected[1])
    image = pipe(
        "a cat",
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images[0]
    assert_close(image, found.best[1], rtol=0, atol=1e-3)


def test_the_api_steers_and_prunes(tiny: DiffusionPolicy) -> None:
    small: dict[str, Any] = {"num_denoising_steps": 4, "guidance_scale": 1.0}
    found = api.fk_steering(tiny, ["a fox"], redness, num_particles=4, resample_after=(1, 2), **small)
    assert found.candidates.images.shape == (1, 4, 3, 16, 16)
    assert api.best_of_n(tiny, ["a fox"], redness, num_candidates=4, prune_after=(1,), **small).images.shape[1] == 2


# --- bad input ---------------------------------------------------------------------------------------


def nan_above(limit: float) -> RewardFunction:
    return lambda images, prompts: torch.where(number(images) > limit, math.nan, number(images))


def test_images_without_a_finite_reward_are_ranked_last_and_counted() -> None:
    with pytest.warns(UserWarning, match=r"of 160 images is not finite; they are ranked last"):
        found = best_of_n(toy(eta=1.0, reward=nan_above(1.0)), ["a"] * 20, generators=generators(160))
    assert (number(found.best) <= 1.0).all()
    assert expected_best(found.scores.reward).isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, steered = steer_toy(num_particles=8, num_prompts=20, strength=1.0, reward=nan_above(1.0))
    lost = number(steered.candidates.images.flatten(0, 1)) > 1.0
    assert lost.any()
    assert (steered.log_weights.flatten()[lost] == -math.inf).all()
    assert (number(steered.candidates.best) <= 1.0).all()


@pytest.mark.parametrize("resample_after", [[], [1]])
def test_a_prompt_without_any_finite_reward_is_an_error(resample_after: list[int]) -> None:
    """In best-of-N at the end, in FK steering at the first resampling."""
    context = toy(
        eta=1.0, reward=lambda images, prompts: torch.tensor([math.nan if p == "b" else 0.0 for p in prompts])
    )
    search: Any = best_of_n
    if resample_after:
        settings = {"strength": 1.0, "reward_std": 1.0, "resample_after": resample_after, "resampling": generators(2)}
        search = partial(fk_steering, **settings)
    with pytest.raises(ValueError, match=r"No image of 'b' has a finite reward \(4 were scored\)"):
        search(context, ["a", "b"], generators=generators(8))
    assert context.denoiser_calls == (8 if resample_after else 64)


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


def test_noise_search_refuses_a_stochastic_sampler() -> None:
    with pytest.raises(ValueError, match="needs a deterministic sampler: DDIM with eta = 0"):
        neighbourhood_search(toy(eta=1.0), ["a"], num_rounds=2, similarity=0.9, generators=generators(2))
    with pytest.raises(ValueError, match="needs a deterministic sampler: DDIM with eta = 0"):
        gradient_search(toy(eta=0.5), ["a"], num_rounds=2, learning_rate=1.0, generators=generators(2))


def test_gradient_search_refuses_a_reward_without_gradient() -> None:
    context = toy(eta=0.0, reward=lambda images, prompts: number(images).detach())
    with pytest.raises(ValueError, match="The reward has no gradient"):
        gradient_search(context, ["a"], num_rounds=2, learning_rate=1.0, generators=generators(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.best_of_n(GaussianModel(), ["a"], value, num_candidates=0), "num_candidates is 0"),
        (lambda: api.fk_steering(GaussianModel(), ["a"], value, num_particles=0), "num_particles is 0"),
        (lambda: api.fk_steering(GaussianModel(), ["a"], value, eta=0.0), "needs a stochastic sampler"),
        (lambda: api.best_of_n(GaussianModel(), ["a"], value, eta=2.0), r"eta is 2\.0; it must be in \[0, 1\]"),
        (lambda: best_of_n(toy(eta=0.0), ["a", "b"], generators=generators(3)), "3 generators for 2 prompts"),
        (lambda: pruned_best_of_n(toy(eta=0.0), ["a"], keep={2: 5}, generators=generators(4)), "5 candidates cannot"),
        (lambda: steer_toy(num_particles=2, strength=1.0, reward_std=0.0), r"reward_std is 0\.0; it must be positive"),
        (lambda: steer_toy(num_particles=2, strength=1.0, ess_threshold=0.0), r"ess_threshold is 0\.0"),
        (lambda: measure_reward_std(toy(eta=1.0), ["a"], generators=generators(1)), "needs at least 2 images"),
        (lambda: toy(eta=0.0, microbatch_size=0), "microbatch_size is 0; it must be at least 1"),
        (
            lambda: fk_steering(
                toy(eta=1.0), ["a"], strength=1.0, reward_std=1.0, resample_after=[2], generators=generators(2),
                resampling=generators(2),
            ),
            "2 generators for resampling and 1 prompts",
        ),
        (
            lambda: api.best_of_n(GaussianModel(), ["a"], lambda i, p: number(i)[:, None], num_candidates=2),
            r"The reward returned shape \(2, 1\) for 2 images; it must return \(2,\)\. The first prompt was 'a'",
        ),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_string_is_refused_as_a_list_of_prompts() -> None:
    with pytest.raises(
        TypeError, match=r"prompts is the string 'a fox'; it must be a list of strings, such as \['a fox'\]"
    ):
        api.best_of_n(GaussianModel(), "a fox", value, num_candidates=2)
