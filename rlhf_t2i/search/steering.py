"""Feynman-Kac steering: sampling with interacting particles that are resampled by reward (arXiv:2501.06848)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_t2i.advantages import EQUAL
from rlhf_t2i.search.candidates import best_of_n, num_candidates_of, repeat_rows
from rlhf_t2i.search.context import Candidates, SearchContext
from rlhf_t2i.search.particles import (
    PotentialName,
    effective_sample_size,
    new_particles,
    resample,
    reweight,
    reweight_finished,
)
from rlhf_t2i.types import Prediction

NUM_CALIBRATION_PROMPTS, NUM_CALIBRATION_IMAGES = 16, 4
"""Number of prompts, and of images of each, on which `reward_std` is measured."""


@dataclass(frozen=True, slots=True)
class SteeringResult:
    """Weighted images that represent p(image) * exp(strength / reward_std * reward(image))."""

    candidates: Candidates
    log_weights: Float[Tensor, "P K"]
    """Log-weights of the final images: their softmax weighs an average over the steered distribution."""
    effective_sample_size: dict[int, Float[Tensor, " P"]]
    """Effective number of particles before resampling, by the number of denoising steps taken."""
    resampled: dict[int, Bool[Tensor, " P"]]
    """True for prompts whose particles were resampled, by the number of denoising steps taken."""


@torch.no_grad()
def fk_steering(  # noqa: PLR0913
    context: SearchContext,
    prompts: Sequence[str],
    *,
    strength: float,
    reward_std: float,
    potential: PotentialName = "difference",
    initial_max: float = -math.inf,
    resample_after: Sequence[int],
    ess_threshold: float = 1.0,
    generators: Sequence[torch.Generator],
    resampling: Sequence[torch.Generator],
) -> SteeringResult:
    """Sample K particles of each prompt, where K = len(generators) / len(prompts), all prompts in one batch.

    After each number of denoising steps in `resample_after`, the predicted clean images are scored and the particles
    reweighted with lambda = strength / reward_std. `reward_std` is the standard deviation of the reward among images
    of one prompt (`measure_reward_std`), so that a strength means the same for every reward. The particles of a prompt
    are resampled, with its own generator of `resampling`, when their effective sample size is below
    `ess_threshold` * K (at 1: whenever the weights differ); otherwise they keep their weights. Strength 0 reproduces
    plain sampling to the bit.

    Resampling precedes the noise of its step, not follows it as in the authors' code: the target distribution is the
    same, and copies of a particle differ from the same step on. The last potential is that of the final images, after
    which there is no resampling, so no image is returned twice.

    Raises ValueError for resampling outside the schedule, or if the sampler adds no noise after a resampling, so that
    copies of a particle would stay equal.
    """
    num = num_candidates_of(prompts, generators)
    check_steering(context, resample_after, reward_std=reward_std, ess_threshold=ess_threshold)
    if len(resampling) != len(prompts):
        raise ValueError(
            f"There are {len(resampling)} generators for resampling and {len(prompts)} prompts; each prompt needs one."
        )
    start = context.cost_so_far()
    conditioning = repeat_rows(context.model.encode(prompts), len(generators))
    latents = context.model.initial_noise(generators, copies=1)
    particles = new_particles(len(prompts), num, potential=potential, initial_max=initial_max)
    sample_sizes: dict[int, Tensor] = {}
    resampled: dict[int, Tensor] = {}
    for step in range(context.num_steps):
        prediction = context.predict(latents, step, conditioning)
        if step + 1 in resample_after:
            _, scores = context.score(prediction.clean, prompts, veto=False)
            particles = reweight(particles, scores.reward, potential=potential, strength=strength / reward_std)
            sample_sizes[step + 1] = effective_sample_size(_checked(particles.log_weights, prompts))
            chosen = sample_sizes[step + 1] < ess_threshold * num * (1 - 1e-9)
            resampled[step + 1] = chosen
            particles, parents = resample(particles, chosen=chosen, generators=resampling)
            rows = (parents + torch.arange(len(prompts))[:, None] * num).flatten().to(latents.device)
            latents, prediction = latents[rows], Prediction(prediction.clean[rows], prediction.noise[rows])
        latents = context.step(latents, prediction, step, generators=generators)
    images, scores = context.score(latents, prompts)
    particles = reweight_finished(particles, scores.reward, strength=strength / reward_std)
    log_weights = _checked(particles.log_weights, prompts)
    candidates = Candidates(images, scores, context.cost_so_far() - start)
    return SteeringResult(candidates, log_weights, sample_sizes, resampled)


def evenly_spaced(num_steps: int) -> list[int]:
    """Return the numbers of steps after each fifth of sampling, without its end: 10, 20, 30 and 40 of 50."""
    return sorted({min(max(1, round(num_steps * i / 5)), num_steps - 1) for i in range(1, 5)} - {0})


def check_steering(
    context: SearchContext, resample_after: Sequence[int], *, reward_std: float, ess_threshold: float
) -> None:
    """Raise ValueError for settings with which particles cannot be steered."""
    if not reward_std > 0:
        raise ValueError(
            f"reward_std is {reward_std}; it must be positive. Does every image of a prompt get the same reward?"
        )
    if not 0 < ess_threshold <= 1:
        raise ValueError(f"ess_threshold is {ess_threshold}; it must be in (0, 1], a fraction of the particles.")
    num_steps, stds = context.num_steps, context.step_stds()
    if not resample_after:
        raise ValueError("resample_after is empty; it must name the numbers of steps after which to resample.")
    for after in resample_after:
        if not 1 <= after < num_steps:
            raise ValueError(
                f"Particles cannot be resampled after {after} steps: sampling has {num_steps} steps, so it must be "
                f"between 1 and {num_steps - 1}."
            )
        if not (stds[after - 1 :] > 0).any():
            raise ValueError(
                f"The sampler adds no noise after resampling at step {after}, so copies of a particle would end as the "
                f"same image. FK steering needs a stochastic sampler: DDIM with eta > 0."
            )


def measure_reward_std(
    context: SearchContext, prompts: Sequence[str], *, generators: Sequence[torch.Generator]
) -> float:
    """Return the standard deviation of the reward among images of one prompt, pooled over prompts.

        reward_std = sqrt(sum over prompts of sum_i (r_i - mean r)^2 / (number of images - number of prompts))

    It is measured on final images of plain sampling. Differences between easy and hard prompts are left out, because
    particles compete only with others of their own prompt. It is 0 if the rewards differ by rounding only.
    """
    num = num_candidates_of(prompts, generators)
    if num < 2:
        raise ValueError("The standard deviation of the reward needs at least 2 images of each prompt.")
    rewards = best_of_n(context, prompts, generators=generators).scores.reward.double()
    finite = rewards.isfinite()
    mean = torch.where(finite, rewards, 0.0).sum(1, keepdim=True) / finite.sum(1, keepdim=True)
    squares = torch.where(finite, rewards - mean, 0.0).square().sum()
    std = float((squares / (finite.sum() - len(prompts)).clamp_min(1)).sqrt())
    return std if std > EQUAL * float(torch.where(finite, rewards.abs(), 0.0).max()) else 0.0


def _checked(log_weights: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return the log-weights; ValueError if all particles of a prompt have weight 0."""
    lost = (log_weights == -torch.inf).all(dim=1)
    if lost.any():
        prompt = prompts[int(lost.nonzero()[0])]
        raise ValueError(f"No particle of {prompt!r} is left: the reward of each was not finite at some step.")
    return log_weights
