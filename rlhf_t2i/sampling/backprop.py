"""Paint images so that a gradient runs from their pixels back through some of the denoising steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_t2i.diffusion.gaussian import per_image, randn
from rlhf_t2i.types import Policy, Sampler


@dataclass(frozen=True, slots=True)
class GradientWindow:
    """Which of T denoising steps keep their gradient: all that tells the methods apart.

        DRaFT-K    first = T - K                              (arXiv:2309.17400)
        DRaFT-LV   first = T - 1, num_renoisings = 2          (the same)
        AlignProp  first = T - K, with K drawn anew each time (arXiv:2310.03739)
        ReFL       first drawn among the late steps, jumps    (arXiv:2304.05977)

    AlignProp's code runs every step with a graph and detaches the model's output before the kept ones. No gradient can
    come out of these steps then, for the noise that an image starts from needs none, so here they just run without.
    Of the kept steps nothing is detached: the gradient takes the way through the network's input too.
    """

    first: Int[Tensor, " B"]
    """The first step with gradient of each image; those after it have it too."""
    jumps: bool = False
    """Decode the clean latents that the model predicts in the first kept step, and leave out the rest."""
    num_renoisings: int = 0
    """Send each finished image so many times back to the last level of noise, and denoise it from there with
    gradient; these variants are images of their own."""


@dataclass(frozen=True, slots=True)
class Painting:
    """Images with a gradient to what the policy learns."""

    images: Float[Tensor, "N 3 Y X"]
    """Not clamped, or a saturated pixel would lose its gradient: one for each prompt, then, for each renoising, a
    variant of each."""
    reference_gap: Float[Tensor, " N"]
    """Mean squared difference of predicted noise from the reference, averaged over an image's kept steps; with
    gradient. 0 if no reference was asked."""
    num_calls: int
    """Images that went through the denoiser to paint these, twice with guidance."""


def sample_with_gradient(
    policy: Policy,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    kept: GradientWindow,
    generators: Sequence[torch.Generator],
    checkpointing: bool = False,
    ask_reference: bool = False,
    in_step: bool = False,
) -> Painting:
    """Denoise one image for each prompt; its gradient passes the kept steps, and the decoder.

    There is one generator for each image, whose noise is thus its own; with eta > 0 the noise of each step is data,
    and the gradient that of the step's mean and std. Without gradient, the images are those of `rollout`.

    Steps before the kept ones store nothing. With `checkpointing` a kept step stores but its latents and is run again
    in the backward pass, and so is the decoder. `ask_reference` fills `reference_gap`. With `in_step` the denoiser is
    called equally often whatever is kept, as processes must that have its weights in parts: where there is nothing to
    do, for an image that stays as it is.
    """
    num_steps, device = sampler.schedule.num_steps, sampler.schedule.alpha.device
    step = partial(_step, policy, sampler=sampler)
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if checkpointing else _at_once
    conditioning, first = policy.encode(prompts), kept.first
    latents = policy.initial_noise(generators, copies=1)
    gaps, num_calls = latents.new_zeros(len(prompts)), 0
    for t in range(num_steps):
        if kept.jumps and bool((first < t).all()) and not in_step:
            break
        noise = randn(latents.shape, generators=generators, device=device)
        for keeps, chosen in ((False, first > t), (True, first == t if kept.jumps else first <= t)):
            rows = chosen.nonzero()[:, 0].to(device)
            idle = not len(rows)
            if idle and not in_step:
                continue
            rows = rows.new_zeros(1) if idle else rows
            given = latents[rows], torch.full_like(rows, t), conditioning[rows], noise[rows]
            with torch.set_grad_enabled(keeps and torch.is_grad_enabled()):
                run = again if keeps else _at_once
                next_latents, gap = run(
                    partial(step, jumps=keeps and kept.jumps, ask_reference=keeps and ask_reference), *given
                )
            if idle:  # the backward pass must come by here too
                next_latents, gap = latents[rows] + 0 * next_latents, 0 * gap
            latents = latents.index_copy(0, rows, next_latents)
            gaps = gaps.index_add(0, rows, gap)
            num_calls += len(rows)
    gaps = gaps / (1 if kept.jumps else (num_steps - first).to(device))
    if kept.num_renoisings:
        count = kept.num_renoisings
        noisy = torch.cat([_renoised(latents.detach(), sampler, generators) for _ in range(count)])
        noise = torch.cat([randn(latents.shape, generators=generators, device=device) for _ in range(count)])
        given = noisy, torch.full((len(noisy),), num_steps - 1), conditioning.repeat(count, 1, 1), noise
        variants, more_gaps = again(partial(step, jumps=False, ask_reference=ask_reference), *given)
        latents, gaps = torch.cat([latents, variants]), torch.cat([gaps, more_gaps])
        num_calls += len(noisy)
    return Painting(again(policy.decode, latents), gaps, num_calls * policy.num_calls(sampler.guidance_scale))


def _at_once(function: Callable[..., Any], *given: Any) -> Any:
    """What `checkpoint` does, without a second run."""
    return function(*given)


def _step(
    policy: Policy,
    latents: Float[Tensor, "B C H W"],
    steps: Int[Tensor, " B"],
    conditioning: Float[Tensor, "B L D"],
    noise: Float[Tensor, "B C H W"],
    *,
    sampler: Sampler,
    jumps: bool,
    ask_reference: bool,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, " B"]]:
    """The next latents (or those that are predicted to be clean), and how far the reference would differ.

    Draws nothing itself, so that it can be run again.
    """
    level, next_level = sampler.schedule.at(steps), sampler.schedule.at(steps + 1)
    predict = partial(policy.predict, latents, level, conditioning, guidance_scale=sampler.guidance_scale)
    gap = latents.new_zeros(len(latents))
    reference = None
    if ask_reference:
        with policy.as_reference():
            reference = predict()
    prediction = predict()
    if reference is not None:
        gap = (prediction.noise - reference.noise).square().mean(dim=(1, 2, 3))
    if jumps:
        return prediction.clean, gap
    transition = sampler.dynamics(latents, prediction, level, next_level)
    return transition.mean + per_image(transition.std) * noise, gap


def _renoised(
    latents: Float[Tensor, "B C H W"], sampler: Sampler, generators: Sequence[torch.Generator]
) -> Float[Tensor, "B C H W"]:
    """Finished latents, made as noisy as they are before the last step.

        x = r x' + sqrt(sigma^2 - r^2 sigma'^2) noise,  r = alpha / alpha'

    Primes mark the end of the schedule, which some models leave slightly noisy.
    """
    alpha, sigma = sampler.schedule.alpha, sampler.schedule.sigma
    shrink = alpha[-2] / alpha[-1]
    std = (sigma[-2] ** 2 - (shrink * sigma[-1]) ** 2).clamp_min(0).sqrt()
    return shrink * latents + std * randn(latents.shape, generators=generators, device=latents.device)
