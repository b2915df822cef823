"""A float64 policy for finite differences, and sampling with a gradient written out as a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rlhf_t2i.models.base import DiffusionPolicy
from rlhf_t2i.models.stable_diffusion import StableDiffusion
from rlhf_t2i.sampling.backprop import DifferentiableSamples, GradientWindow
from rlhf_t2i.types import Conditioning, Sampler
from tests.policies import policy_of
from tests.toys import seeded

PROMPTS = ["a red circle", "a blue square", "a red circle"]


class ExactDiffusion(StableDiffusion):
    """Stable Diffusion in float64, in which finite differences are accurate to eight digits."""

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Tensor:
        return super().initial_noise(generators, copies=copies).double()

    def denoise(self, latents: Tensor, model_time: Tensor, conditioning: Conditioning) -> Tensor:
        return self.denoiser(latents, model_time, conditioning.states.double(), return_dict=False)[0]

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.autoencoder.vae
        return vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5


def exact_policy(model: Path) -> ExactDiffusion:
    """Return a policy whose weights differ a little from its reference."""
    policy = policy_of(model)
    policy.set_trainable(None, keep_reference=True, seed=0)
    policy.__class__ = ExactDiffusion
    assert isinstance(policy, ExactDiffusion)
    for module in (policy.network, policy.autoencoder.vae, policy.reference):
        module.double()
    shift_weights(policy, random_direction(policy, seed=7), 0.02)
    return policy


def frozen_copy(policy: ExactDiffusion) -> ExactDiffusion:
    """Return a copy that keeps the current weights."""
    frozen = copy.copy(policy)
    frozen.network = copy.deepcopy(policy.network).requires_grad_(False)
    frozen.denoiser = frozen.network
    return frozen


def random_direction(policy: DiffusionPolicy, *, seed: int) -> dict[str, Tensor]:
    [generator] = seeded(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in policy.trainable.items()}


@torch.no_grad()
def shift_weights(policy: DiffusionPolicy, direction: dict[str, Tensor], length: float) -> None:
    for name, weight in policy.trainable.items():
        weight.add_(direction[name], alpha=length)


def written_out(
    policy: ExactDiffusion,
    before: DiffusionPolicy,
    *,
    window: GradientWindow,
    sampler: Sampler,
    prompts: Sequence[str] = PROMPTS,
) -> DifferentiableSamples:
    """Sample one image at a time in one graph; `before` computes the steps before the window."""
    schedule, last = sampler.schedule, sampler.schedule.num_steps - 1
    images: list[tuple[Tensor, Tensor]] = []
    variants: list[list[tuple[Tensor, Tensor]]] = []
    for prompt, generator, first in zip(prompts, seeded(*range(len(prompts))), window.first.tolist(), strict=True):
        step = partial(_step, policy, sampler=sampler, text=policy.encode([prompt]))
        x, gaps = policy.initial_noise([generator], copies=1), []
        finished = x
        for t in range(last + 1):
            noise = _noise_like(x, generator)
            finished = step(finished, t, noise, predictor=before)[0].detach()
            if t < first:
                x = step(x, t, noise, predictor=before)[0].detach()
                continue
            x, gap = step(x, t, noise, jumps=window.jumps)
            gaps.append(gap)
            if window.jumps:
                break
        images.append((policy.decode(x), torch.stack(gaps).mean()))
        drawn = [[_noise_like(x, generator) for _ in range(window.num_renoisings)] for _ in range(2)]
        own: list[tuple[Tensor, Tensor]] = []
        alpha, sigma = schedule.alpha.double(), schedule.sigma.double()
        for renoising, noise in zip(*drawn, strict=True):
            ratio = alpha[last] / alpha[-1]
            noisy = ratio * finished + (sigma[last] ** 2 - ratio**2 * sigma[-1] ** 2).sqrt() * renoising
            variant, gap = step(noisy, last, noise)
            own.append((policy.decode(variant), gap))
        variants.append(own)
    ordered = images + [own[i] for i in range(window.num_renoisings) for own in variants]
    return DifferentiableSamples(
        torch.cat([image for image, _ in ordered]), torch.stack([gap for _, gap in ordered]), 0
    )


def _noise_like(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator).to(x.dtype)


def _step(
    policy: ExactDiffusion,
    x: Tensor,
    t: int,
    noise: Tensor,
    *,
    sampler: Sampler,
    text: Conditioning,
    predictor: DiffusionPolicy | None = None,
    jumps: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the next latents, predicted by `predictor` or the policy, and the gap to the reference."""
    at = torch.tensor([t])
    level, next_level = sampler.schedule.at(at), sampler.schedule.at(at + 1)
    prediction = (predictor or policy).predict(x, level, text, guidance_scale=sampler.guidance_scale)
    with policy.as_reference():
        reference = policy.predict(x, level, text, guidance_scale=sampler.guidance_scale)
    gap = ((prediction.noise - reference.noise) ** 2).mean()
    transition = sampler.dynamics(x, prediction, level, next_level)
    return prediction.clean if jumps else transition.mean + transition.std * noise, gap
