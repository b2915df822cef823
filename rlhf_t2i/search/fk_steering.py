"""Feynman-Kac steering: a crowd of half-painted images in which the promising ones multiply (arXiv:2501.06848)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_t2i.search.best_of_n import best_of_n, num_for_each, repeated
from rlhf_t2i.search.context import Candidates, SearchContext
from rlhf_t2i.search.particles import (
    PotentialName,
    effective_sample_size,
    new_particles,
    resample,
    weigh,
    weigh_finished,
)
from rlhf_t2i.types import Prediction


@dataclass(frozen=True, slots=True)
class Steered:
    """Weighted images that represent p(image) * exp(strength / spread * reward(image))."""

    candidates: Candidates
    log_weights: Float[Tensor, "P K"]
    """Of the finished images: an average over the steered distribution weighs with their softmax."""
    effective: dict[int, Float[Tensor, " P"]]
    """How many particles still counted after so many steps, before any resampling."""
    resampled: dict[int, Bool[Tensor, " P"]]
    """Whether there was a resampling then."""


@torch.no_grad()
def fk_steering(
    context: SearchContext,
    prompts: Sequence[str],
    *,
    strength: float,
    spread: float,
    potential: PotentialName = "difference",
    resample_after: Sequence[int],
    ess_threshold: float = 1.0,
    generators: Sequence[torch.Generator],
    resampling: Sequence[torch.Generator],
) -> Steered:
    """Paint K particles of each prompt, as many as there are generators for it; all prompts go in one batch.

    After each of these numbers of denoiser calls the clean images that the particles will become are judged and
    weighed with lambda = strength / spread. `spread` is the reward's own standard deviation among images of one
    prompt (`reward_spread`), so that one strength means the same to every judge. A prompt's particles are resampled
    when its effective sample size is below `ess_threshold` of K (at 1: whenever weights differ), each prompt from
    its own generator of `resampling`; if not, the weights are kept and count on. Strength 0 is plain sampling, to the
    bit.

    Resampling comes before the noise of its step, not after it as in the authors' code: the target is the same, and
    twins part at once. The last potential is that of the finished image, after which nobody is resampled: no image
    is returned twice.

    Raises ValueError for resampling outside the schedule, and for a sampler without noise after a resampling, with
    which twins would stay twins.
    """
    num = num_for_each(prompts, generators)
    check_steering(context, resample_after, spread=spread, ess_threshold=ess_threshold)
    if len(resampling) != len(prompts):
        raise ValueError(
            f"{len(resampling)} generators to resample with came for {len(prompts)} prompts; each has one."
        )
    start = context.spent()
    conditioning = repeated(context.model.encode(prompts), len(generators))
    latents = context.model.initial_noise(generators, copies=1)
    particles = new_particles(len(prompts), num, potential=potential)
    effective: dict[int, Tensor] = {}
    resampled: dict[int, Tensor] = {}
    for step in range(context.num_steps):
        prediction = context.predict(latents, step, conditioning)
        if step + 1 in resample_after:
            _, verdict = context.judge(prediction.clean, prompts, veto=False)
            particles = weigh(particles, verdict.reward, potential=potential, strength=strength / spread)
            effective[step + 1] = effective_sample_size(_of_living(particles.log_weights, prompts))
            chosen = effective[step + 1] < ess_threshold * num * (1 - 1e-9)
            resampled[step + 1] = chosen
            particles, parents = resample(particles, chosen=chosen, generators=resampling)
            rows = (parents + torch.arange(len(prompts))[:, None] * num).flatten().to(latents.device)
            latents, prediction = latents[rows], Prediction(prediction.clean[rows], prediction.noise[rows])
        latents = context.step(latents, prediction, step, generators=generators)
    images, verdict = context.judge(latents, prompts)
    particles = weigh_finished(particles, verdict.reward, strength=strength / spread)
    weights = _of_living(particles.log_weights, prompts)
    return Steered(Candidates(images, verdict, context.spent() - start), weights, effective, resampled)


def check_steering(
    context: SearchContext, resample_after: Sequence[int], *, spread: float, ess_threshold: float
) -> None:
    """ValueError for settings with which particles could not be steered."""
    if not spread > 0:
        raise ValueError(f"The reward's spread is {spread}; it must be positive. Is every image given the same reward?")
    if not 0 < ess_threshold <= 1:
        raise ValueError(f"ess_threshold is {ess_threshold}; it must be in (0, 1], a share of the particles.")
    num_steps, noise = context.num_steps, context.noise_of_steps()
    if not resample_after:
        raise ValueError("resample_after is empty: name the numbers of steps after which particles are resampled.")
    for after in resample_after:
        if not 1 <= after < num_steps:
            raise ValueError(
                f"Particles cannot be resampled after {after} steps: painting takes {num_steps}, so it must be between "
                f"1 and {num_steps - 1}."
            )
        if not (noise[after - 1 :] > 0).any():
            raise ValueError(
                f"The sampler adds no noise after resampling at step {after}, so copies of a particle would end as the "
                f"same image. FK steering needs a stochastic sampler: DDIM with eta > 0."
            )


def reward_spread(context: SearchContext, prompts: Sequence[str], *, generators: Sequence[torch.Generator]) -> float:
    """The reward's standard deviation among images of one prompt, pooled over prompts: the unit of `strength`.

        spread = sqrt(sum over prompts of sum_i (r_i - mean r)^2 / (number of images - number of prompts))

    Of finished images, painted for it by the plain sampler. What separates easy prompts from hard ones is not in it,
    because particles only compete with others of their own prompt.
    """
    num = num_for_each(prompts, generators)
    if num < 2:
        raise ValueError("The reward's spread needs at least 2 images of each prompt.")
    rewards = best_of_n(context, prompts, generators=generators).verdict.reward.double()
    finite = rewards.isfinite()
    mean = torch.where(finite, rewards, 0.0).sum(1, keepdim=True) / finite.sum(1, keepdim=True)
    squares = torch.where(finite, rewards - mean, 0.0).square().sum()
    return float((squares / (finite.sum() - len(prompts)).clamp_min(1)).sqrt())


def _of_living(log_weights: Tensor, prompts: Sequence[str]) -> Tensor:
    """The weights; ValueError if all particles of a prompt have lost, one after another."""
    lost = (log_weights == -torch.inf).all(dim=1)
    if lost.any():
        prompt = prompts[int(lost.nonzero()[0])]
        raise ValueError(
            f"No particle of {prompt!r} is left: each got, at some step, a reward that is no finite number."
        )
    return log_weights
