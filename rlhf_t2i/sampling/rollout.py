"""Paint images and remember every stroke, so that an update can replay them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import mean_log_prob, randn, sample
from rlhf_t2i.types import Policy, Sampler, Trajectory, Transition


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    batch_size: int,
    painted: Callable[[Float[Tensor, "N 3 Y X"], Sequence[str]], None] | None = None,
) -> tuple[Float[Tensor, "B 3 Y X"], Trajectory]:
    """Denoise one image for each prompt, drawing each step from the policy's own transition.

    Each generator serves an equal share of the prompts, in order. At most `batch_size` images go through the
    networks at once, which changes memory and not the images. Images are clamped to [0, 1]; latents and densities
    are float32. With `painted` the images are finished in parts of about `batch_size`, those of a generator together,
    and it is called with each part and its prompts while the others are still to come.
    """
    copies = _copies(prompts, generators)
    conditioning = policy.encode(prompts)
    num_parts = 1 if painted is None else min(len(generators), math.ceil(len(prompts) / batch_size))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for groups in torch.arange(len(generators)).tensor_split(num_parts):
        first, last = copies * int(groups[0]), copies * (int(groups[-1]) + 1)
        part = _paint(
            policy, conditioning[first:last], sampler=sampler, batch_size=batch_size, copies=copies,
            generators=generators[int(groups[0]) : int(groups[-1]) + 1],
        )  # fmt: skip
        if painted is not None:
            painted(part[0], prompts[first:last])
        parts.append(part)
    images, log_probs, latents = (torch.cat(each) for each in zip(*parts, strict=True))
    return images, Trajectory(conditioning, log_probs, latents)


def _paint(
    policy: Policy,
    conditioning: Float[Tensor, "B L D"],
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    copies: int,
    batch_size: int,
) -> tuple[Float[Tensor, "B 3 Y X"], Float[Tensor, "B T"], Float[Tensor, "B T+1 C H W"]]:
    """Images, log-densities and latents of a part."""
    latents = [policy.initial_noise(generators, copies=copies)]
    log_probs: list[Tensor] = []
    for step in range(sampler.schedule.num_steps):
        transition = _next(policy, latents[-1], step, conditioning, sampler=sampler, batch_size=batch_size)
        # What is stored is what was drawn, in float32: the density is of the very bits that an update reads.
        x_next = sample(transition, generators=generators)
        log_probs.append(mean_log_prob(transition, x_next))
        latents.append(x_next)
    images = torch.cat([policy.decode(part) for part in latents[-1].split(batch_size)]).clamp(0, 1)
    return images, torch.stack(log_probs, dim=1), torch.stack(latents, dim=1)


@torch.no_grad()
def paint(
    policy: Policy,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    batch_size: int,
) -> tuple[Float[Tensor, "B 3 Y X"], Float[Tensor, "B C H W"]]:
    """The images of a `rollout` and their latents, without the memory of how they came to be."""
    conditioning = policy.encode(prompts)
    latents = policy.initial_noise(generators, copies=_copies(prompts, generators))
    for step in range(sampler.schedule.num_steps):
        transition = _next(policy, latents, step, conditioning, sampler=sampler, batch_size=batch_size)
        latents = sample(transition, generators=generators)
    return torch.cat([policy.decode(part) for part in latents.split(batch_size)]).clamp(0, 1), latents


def _copies(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> int:
    """How many prompts each generator serves."""
    copies, rest = divmod(len(prompts), len(generators))
    if rest:
        raise ValueError(f"{len(generators)} generators cannot share {len(prompts)} prompts equally.")
    return copies


def _next(
    policy: Policy, latents: Tensor, step: int, conditioning: Tensor, *, sampler: Sampler, batch_size: int
) -> Transition:
    """Where the policy steps from latents that have all taken `step` steps."""
    steps = torch.full((len(latents),), step)
    parts = [
        transition_at(policy, latents[rows], steps[rows], conditioning[rows], sampler=sampler)
        for rows in torch.arange(len(latents)).split(batch_size)
    ]
    return Transition(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))


def noise_of_rollout(
    policy: Policy, trajectory: Trajectory, *, generators: Sequence[torch.Generator]
) -> Float[Tensor, "B T C H W"]:
    """The noise that each step of a rollout drew, drawn once more: `generators` are as the rollout's were before it.

    Of a step to x' with a std, x' - std * noise is the mean that the policy had.
    """
    num_images, num_steps = trajectory.log_probs.shape
    policy.initial_noise(generators, copies=num_images // len(generators))
    shape, device = trajectory.latents[:, 0].shape, trajectory.latents.device
    return torch.stack([randn(shape, generators=generators, device=device) for _ in range(num_steps)], dim=1)


def transition_at(
    policy: Policy,
    latents: Float[Tensor, "B C H W"],
    steps: Int[Tensor, " B"],
    conditioning: Float[Tensor, "B L D"],
    *,
    sampler: Sampler,
) -> Transition:
    """Where the policy would step from latents that have taken `steps` steps, each image its own number."""
    level, next_level = sampler.schedule.at(steps), sampler.schedule.at(steps + 1)
    prediction = policy.predict(latents, level, conditioning, guidance_scale=sampler.guidance_scale)
    return sampler.dynamics(latents, prediction, level, next_level)
