"""Sample images with a gradient from their pixels back through some of the denoising steps."""

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
from rlhf_t2i.types import Conditioning, Policy, Sampler


@dataclass(frozen=True, slots=True)
class GradientWindow:
    """Denoising steps that the gradient passes, out of T; the methods differ in this only.

        DRaFT-K    first = T - K                              (arXiv:2309.17400)
        DRaFT-LV   first = T - 1, num_renoisings = 2          (arXiv:2309.17400)
        AlignProp  first = T - K, with K drawn anew each time (arXiv:2310.03739)
        ReFL       first drawn among the late steps, jumps    (arXiv:2304.05977)

    AlignProp's code runs every step with a graph and detaches the model's output before the window. These steps cannot
    contribute a gradient, since the initial noise needs none, so here they run without a graph. Within the window
    nothing is detached: the gradient also passes through the network's input.
    """

    first: Int[Tensor, " B"]
    """First step with a gradient of each image; all later steps have it too."""
    jumps: bool = False
    """True to decode the clean latents predicted in step `first` and skip the remaining steps."""
    num_renoisings: int = 0
    """Number of variants of each finished image, noised to the last level and denoised from there with a gradient; they
    are images of their own."""


@dataclass(frozen=True, slots=True)
class DifferentiableSamples:
    """Images with a gradient to the trained weights."""

    images: Float[Tensor, "N 3 Y X"]
    """One per prompt, then, for each renoising, one variant of each. Not clamped, so that saturated pixels keep their
    gradient."""
    reference_gap: Float[Tensor, " N"]
    """Mean squared difference between the noise predicted by policy and reference, averaged over an image's steps in
    the window, with gradient; 0 if it was not requested."""
    num_calls: int
    """Number of denoiser evaluations, counted per image and twice with guidance."""


def sample_with_gradient(
    policy: Policy,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    window: GradientWindow,
    generators: Sequence[torch.Generator],
    checkpointing: bool = False,
    with_reference_gap: bool = False,
    equal_calls: bool = False,
) -> DifferentiableSamples:
    """Sample one image per prompt, with a gradient through the window's steps and the decoder.

    There is one generator per image. With eta > 0 the noise of a step is a constant, and the gradient is that of the
    step's mean and std. The values are those of `rollout` before clamping.

    Steps before the window store nothing. With `checkpointing` the steps of the window and the decoder store their
    inputs only and run again in the backward pass. With `equal_calls` every rank issues the same number of forward
    passes, as sharded weights require: one on a single image, discarded, where a rank has nothing to compute.
    """
    num_steps, device = sampler.schedule.num_steps, sampler.schedule.alpha.device
    step = partial(_step, policy, sampler=sampler)
    with_graph = partial(checkpoint, use_reentrant=False, preserve_rng_state=False) if checkpointing else _call
    conditioning, first = policy.encode(prompts), window.first
    latents = policy.initial_noise(generators, copies=1)
    gaps, num_calls = latents.new_zeros(len(prompts)), 0
    for t in range(num_steps):
        if window.jumps and bool((first < t).all()) and not equal_calls:
            break
        noise = randn(latents.shape, generators=generators, device=device)
        for in_window, chosen in ((False, first > t), (True, first == t if window.jumps else first <= t)):
            rows = chosen.nonzero()[:, 0].to(device)
            idle = not len(rows)
            if idle and not equal_calls:
                continue
            rows = rows.new_zeros(1) if idle else rows
            inputs = latents[rows], torch.full_like(rows, t), conditioning[rows], noise[rows]
            with torch.set_grad_enabled(in_window and torch.is_grad_enabled()):
                run = with_graph if in_window else _call
                next_latents, gap = run(
                    partial(
                        step, jumps=in_window and window.jumps, with_reference_gap=in_window and with_reference_gap
                    ),
                    *inputs,
                )
            if idle:  # the backward pass must run through it too
                next_latents, gap = latents[rows] + 0 * next_latents, 0 * gap
            latents = latents.index_copy(0, rows, next_latents)
            gaps = gaps.index_add(0, rows, gap)
            num_calls += len(rows)
    gaps = gaps / (1 if window.jumps else (num_steps - first).to(device))
    if count := window.num_renoisings:
        noisy = torch.cat([_renoised(latents.detach(), sampler, generators) for _ in range(count)])
        noise = torch.cat([randn(latents.shape, generators=generators, device=device) for _ in range(count)])
        inputs = noisy, torch.full((len(noisy),), num_steps - 1), conditioning.repeat(count), noise
        variants, more_gaps = with_graph(partial(step, jumps=False, with_reference_gap=with_reference_gap), *inputs)
        latents, gaps = torch.cat([latents, variants]), torch.cat([gaps, more_gaps])
        num_calls += len(noisy)
    images = with_graph(policy.decode, latents)
    return DifferentiableSamples(images, gaps, num_calls * policy.num_calls(sampler.guidance_scale))


def _call(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function, with `checkpoint`'s signature."""
    return function(*inputs)


def _step(
    policy: Policy,
    latents: Float[Tensor, "B C H W"],
    steps: Int[Tensor, " B"],
    conditioning: Conditioning,
    noise: Float[Tensor, "B C H W"],
    *,
    sampler: Sampler,
    jumps: bool,
    with_reference_gap: bool,
) -> tuple[Float[Tensor, "B C H W"], Float[Tensor, " B"]]:
    """Return the next latents (with `jumps` the predicted clean ones) and the gap to the reference.

    Draws no random numbers, so that checkpointing can run it again.
    """
    level, next_level = sampler.schedule.at(steps), sampler.schedule.at(steps + 1)
    predict = partial(policy.predict, latents, level, conditioning, guidance_scale=sampler.guidance_scale)
    gap = latents.new_zeros(len(latents))
    reference = None
    if with_reference_gap:
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
    """Return finished latents, noised to the level before the last step.

        x = r x' + sqrt(sigma^2 - r^2 sigma'^2) noise,  r = alpha / alpha'

    Primes mark the end of the schedule, where some models leave a little noise.
    """
    alpha, sigma = sampler.schedule.alpha, sampler.schedule.sigma
    shrink = alpha[-2] / alpha[-1]
    std = (sigma[-2] ** 2 - (shrink * sigma[-1]) ** 2).clamp_min(0).sqrt()
    return shrink * latents + std * randn(latents.shape, generators=generators, device=latents.device)
