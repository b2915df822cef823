"""Best-of-N, pruning, memory and the Python API of search: closed forms, limits and bad input."""

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
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.sampling.rollout import rollout
from rlhf_t2i.search import api, steering
from rlhf_t2i.search.candidates import best_of_n, expected_best, halving, pruned_best_of_n
from rlhf_t2i.search.context import CandidateScores, SearchContext, Veto
from rlhf_t2i.search.steering import fk_steering, measure_reward_std
from rlhf_t2i.types import Sampler
from tests import reference
from tests.runs import REDNESS, redness
from tests.search_toys import context_of, distribution_of, generators, nan_above, steer_toy, toy, value
from tests.toys import GaussianModel, number


@pytest.fixture
def policy(tiny_sd: Path) -> DiffusionPolicy:
    return load_policy(str(tiny_sd), device=torch.device("cpu"))


# --- best-of-N --------------------------------------------------------------------------------------


def test_expected_best_is_the_mean_over_all_subsets() -> None:
    """Also for the score of another reward of the selected image."""
    scores, values = (
        torch.randn(3, 7, generator=generators(1)[0]),
        torch.randn(3, 7, generator=generators(1, seed=1)[0]),
    )
    for averaged, result in ((scores, expected_best(scores)), (values, expected_best(scores, values))):
        for p in range(3):
            expected = [reference.expected_best(scores[p].tolist(), averaged[p].tolist(), n) for n in range(1, 8)]
            assert result[p].tolist() == pytest.approx(expected, abs=1e-5)


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
    result = expected_best(scores)
    assert result.isfinite().all()
    assert_close(result[0, 0], scores.mean(), rtol=0, atol=1e-4)
    assert_close(result[0, -1], scores.max())
    assert (result.diff() >= 0).all()


def test_best_of_n_on_the_toy_has_the_mean_of_the_maximum_of_n_normal_numbers() -> None:
    """1.0294 standard deviations above the mean for n = 4."""
    context = toy(eta=1.0)
    result = best_of_n(context, ["a"] * 4000, generators=generators(16_000))
    mean, variance = distribution_of(context)
    assert number(result.best).mean().item() == pytest.approx(mean + 1.0294 * variance**0.5, abs=0.03)


def test_an_image_depends_only_on_its_seed(policy: DiffusionPolicy) -> None:
    """Best of 6 contains the images of best of 3, and equals what `rollout` generates."""
    many = best_of_n(context_of(policy, eta=1.0), ["a fox"], generators=generators(6))
    few = best_of_n(context_of(policy, eta=1.0), ["a fox"], generators=generators(3))
    assert_close(many.images[:, :3], few.images, rtol=0, atol=1e-6)
    images, _ = rollout(
        policy, ["a fox"] * 6, sampler=context_of(policy, eta=1.0).sampler, generators=generators(6), microbatch_size=64
    )
    assert torch.equal(images, many.images[0])


def test_a_weighted_sum_returns_the_scores_of_each_reward(policy: DiffusionPolicy) -> None:
    rewards = load_rewards(f"{REDNESS}=2,jpeg_compressibility=0.1", finite=False)
    result = api.best_of_n(
        policy, ["a fox", "a cat"], rewards, num_candidates=3, num_denoising_steps=4, guidance_scale=1.0
    )
    scores = result.scores.by_name
    assert list(scores) == ["reward", REDNESS, "jpeg_compressibility"]
    assert_close(scores["reward"], 2 * scores[REDNESS] + 0.1 * scores["jpeg_compressibility"])
    assert torch.equal(result.selected, scores["reward"].argmax(1))
    assert result.cost.reward_calls == 12


def test_a_vetoed_image_is_selected_only_if_all_are_vetoed() -> None:
    reward = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, math.nan, 1.0]])
    safe = torch.tensor([[-1.0, 0.5, 2.0], [-1.0, -0.5, -2.0], [-1.0, 0.5, math.nan]])
    scores = CandidateScores({"reward": reward, "veto": safe}, ~(safe >= 0))
    assert scores.order.tolist() == [[1, 2, 0], [1, 0, 2], [1, 0, 2]]
    assert scores.rank.tolist() == [[2, 0, 1], [1, 0, 2], [1, 0, 2]]


def test_the_veto_applies_to_final_images() -> None:
    """Every number above 0 is vetoed: the highest number below 0 is selected."""
    context = toy(eta=1.0, veto=Veto(lambda images, prompts: -number(images), 0.0))
    result = best_of_n(context, ["a"] * 12, generators=generators(800 - 32))
    numbers = result.scores.reward
    assert (number(result.best) <= 0).all()
    assert_close(number(result.best), numbers.where(numbers <= 0, -math.inf).max(1).values)
    assert result.cost.reward_calls == 2 * 768


def written_over(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward of the toy model, which leaves nothing of its images."""
    numbers = number(images)
    images.mul_(0)
    return numbers


def test_a_reward_and_a_veto_that_write_into_their_images_change_no_result() -> None:
    plain, vetoing = (toy(eta=1.0, reward=reward, veto=Veto(reward, 0.0)) for reward in (value, written_over))
    results = [best_of_n(context, ["a", "b"], generators=generators(8)) for context in (plain, vetoing)]
    assert torch.equal(results[0].images, results[1].images)
    assert torch.equal(results[0].scores.by_name["veto"], results[1].scores.by_name["veto"])
    steered = [steer_toy(num_particles=4, strength=1.0, reward=reward)[1] for reward in (value, written_over)]
    assert torch.equal(steered[0].candidates.images, steered[1].candidates.images)


# --- pruning ----------------------------------------------------------------------------------------


def test_pruning_saves_denoiser_calls_and_survivors_equal_the_unpruned_images(policy: DiffusionPolicy) -> None:
    complete = best_of_n(context_of(policy, eta=0.0), ["a fox", "a cat"], generators=generators(16))
    pruned = pruned_best_of_n(
        context_of(policy, eta=0.0), ["a fox", "a cat"], keep=halving(8, after=[1, 2]), generators=generators(16)
    )
    assert halving(8, after=[1, 2]) == halving(8, after=[2, 1]) == {1: 4, 2: 2}
    assert pruned.candidates.cost.denoiser_calls == 2 * (8 * 1 + 4 * 1 + 2 * 2)
    assert pruned.candidates.cost.reward_calls == 2 * (8 + 4 + 2)
    for p in range(2):
        assert_close(pruned.candidates.images[p], complete.images[p, pruned.survivors[p]], rtol=0, atol=1e-6)
        assert set(pruned.rounds[1].order[p, :4].tolist()) >= set(pruned.survivors[p].tolist())


def test_pruning_by_a_perfect_prediction_keeps_the_best_image() -> None:
    """With a deterministic sampler the order of the toy's images never changes, so the best survives every round."""
    complete = best_of_n(toy(eta=0.0), ["a"] * 20, generators=generators(320))
    pruned = pruned_best_of_n(toy(eta=0.0), ["a"] * 20, keep={1: 8, 2: 3, 5: 1}, generators=generators(320))
    assert_close(pruned.candidates.best, complete.best)


# --- memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [3, 5])
def test_the_microbatch_size_does_not_change_the_images(policy: DiffusionPolicy, microbatch_size: int) -> None:
    settings: dict[str, Any] = {"strength": 3.0, "reward_std": 0.05, "resample_after": [1, 2]}
    results = [
        fk_steering(
            context_of(policy, eta=1.0, microbatch_size=size), ["a fox", "a cat"], **settings, generators=generators(8),
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
        result = best_of_n(small, ["a", "b"], generators=generators(24))
    assert [str(w.message)[:60] for w in caught] == [
        "Out of memory with 16 images in one batch; continuing with 8",
        "Out of memory with 8 images in one batch; continuing with 4,",
    ]
    assert small.microbatch_size == 4
    plain = best_of_n(toy(eta=1.0), ["a", "b"], generators=generators(24))
    assert_close(result.images, plain.images, rtol=0, atol=0)
    assert result.cost.denoiser_calls == plain.cost.denoiser_calls


def test_out_of_memory_with_one_image_is_raised() -> None:
    class NoRoom(GaussianModel):
        def predict(self, latents: Tensor, *arguments: Any, **keywords: Any) -> Any:
            raise torch.OutOfMemoryError("there is no room")

    context = SearchContext(
        NoRoom(), value, sampler=Sampler(GaussianModel().schedule(8), partial(ddim, eta=1.0)), microbatch_size=1
    )
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        best_of_n(context, ["a"], generators=generators(2))


# --- Python API -------------------------------------------------------------------------------------


def test_the_seed_of_a_selected_image_gives_that_image_in_diffusers(tiny_sd: Path) -> None:
    from diffusers import DDIMScheduler, StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    pipe: Any = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipe.set_progress_bar_config(disable=True)
    result = api.best_of_n(
        pipe, ["a fox", "a cat"], redness, num_candidates=3, num_denoising_steps=4, guidance_scale=2.0, seed=5
    )
    assert api.to_pil(result.best[0]).size == (16, 16)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    seed = 5 + 1 * 3 + int(result.selected[1])
    image = pipe(
        "a cat",
        num_inference_steps=4,
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    ).images[0]
    assert_close(image, result.best[1], rtol=0, atol=1e-3)


def test_the_api_steers_and_prunes(policy: DiffusionPolicy) -> None:
    small: dict[str, Any] = {"num_denoising_steps": 4, "guidance_scale": 1.0}
    result = api.fk_steering(policy, ["a fox"], redness, num_particles=4, resample_after=(1, 2), **small)
    assert result.candidates.images.shape == (1, 4, 3, 16, 16)
    assert api.best_of_n(policy, ["a fox"], redness, num_candidates=4, prune_after=(1,), **small).images.shape[1] == 2


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(50, [10, 20, 30, 40]), (8, [2, 3, 5, 6]), (4, [1, 2, 3]), (2, [1]), (1, [])]
)
def test_particles_are_resampled_after_each_fifth_of_sampling_by_default(num_steps: int, expected: list[int]) -> None:
    assert steering.evenly_spaced(num_steps) == expected


def test_the_api_steers_with_any_number_of_steps_by_default(policy: DiffusionPolicy) -> None:
    result = api.fk_steering(
        policy, ["a fox"], redness, num_particles=2, reward_std=1.0, num_denoising_steps=4, guidance_scale=1.0
    )
    assert list(result.effective_sample_size) == [1, 2, 3]


# --- bad input --------------------------------------------------------------------------------------


def test_images_without_a_finite_reward_are_ranked_last_and_counted() -> None:
    with pytest.warns(UserWarning, match=r"of 160 images is not finite; they are ranked last"):
        result = best_of_n(toy(eta=1.0, reward=nan_above(1.0)), ["a"] * 20, generators=generators(160))
    assert (number(result.best) <= 1.0).all()
    assert expected_best(result.scores.reward).isfinite().all()
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
            r"'reward' returned shape \(2, 1\) for 2 images; it must return \(2,\)\. The first prompt was 'a'",
        ),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_string_is_refused_as_a_list_of_prompts() -> None:
    with pytest.raises(
        ValueError, match=r"prompts is 'a fox'; it must be a list of texts or rows, such as \['a fox'\]"
    ):
        api.best_of_n(GaussianModel(), "a fox", value, num_candidates=2)
