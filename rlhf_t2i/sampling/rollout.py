"""Generate images, and record every denoising step so that an update can replay it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import mean_log_prob, randn, sample
from rlhf_t2i.types import Conditioning, DiffusionModel, Sampler, Trajectory, Transition


@torch.no_grad()
def rollout(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    microbatch_size: int,
    on_images: Callable[[Float[Tensor, "N 3 Y X"], Sequence[str]], None] | None = None,
) -> tuple[Float[Tensor, "B 3 Y X"], Trajectory]:
    """Sample one image per prompt and return the images, clamped to [0, 1], with the record of their denoising steps.

    Each generator serves an equal share of the prompts, in order; ValueError if there is none. `microbatch_size` is the
    number of images in one forward pass; it changes memory, not images. With `on_images` the prompts are sampled in
    groups of about `microbatch_size`, never splitting a generator's share, and it is called with the images and prompts
    of each group while the next groups are still to be sampled.
    """
    copies = _copies(prompts, generators)
    conditioning = model.encode(prompts)
    num_groups = 1 if on_images is None else min(len(generators), math.ceil(len(prompts) / microbatch_size))
    groups: list[tuple[Tensor, Tensor, Tensor]] = []
    for members in torch.arange(len(generators)).tensor_split(num_groups):
        start, end = int(members[0]), int(members[-1]) + 1
        rows = slice(copies * start, copies * end)
        group = _rollout_group(
            model, conditioning[rows], sampler=sampler, microbatch_size=microbatch_size, copies=copies,
            generators=generators[start:end],
        )  # fmt: skip
        if on_images is not None:
            on_images(group[0], prompts[rows])
        groups.append(group)
    images, log_probs, latents = (torch.cat(each) for each in zip(*groups, strict=True))
    return images, Trajectory(conditioning, log_probs, latents)


def _rollout_group(
    model: DiffusionModel,
    conditioning: Conditioning,
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    copies: int,
    microbatch_size: int,
) -> tuple[Float[Tensor, "B 3 Y X"], Float[Tensor, "B T"], Float[Tensor, "B T+1 C H W"]]:
    """Return images, log-probabilities and latents of a group."""
    latents = [model.initial_noise(generators, copies=copies)]
    log_probs: list[Tensor] = []
    for step in range(sampler.schedule.num_steps):
        transition = _next(model, latents[-1], step, conditioning, sampler=sampler, microbatch_size=microbatch_size)
        # The float32 sample is stored as it was drawn: the log-probability is of the very bits that an update reads.
        x_next = sample(transition, generators=generators)
        log_probs.append(mean_log_prob(transition, x_next))
        latents.append(x_next)
    return (
        _decode(model, latents[-1], microbatch_size=microbatch_size),
        torch.stack(log_probs, dim=1),
        torch.stack(latents, dim=1),
    )


@torch.no_grad()
def generate(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    microbatch_size: int,
) -> tuple[Float[Tensor, "B 3 Y X"], Float[Tensor, "B C H W"]]:
    """Return the images of a `rollout` and their clean latents, without a record of the denoising steps."""
    conditioning = model.encode(prompts)
    latents = model.initial_noise(generators, copies=_copies(prompts, generators))
    for step in range(sampler.schedule.num_steps):
        transition = _next(model, latents, step, conditioning, sampler=sampler, microbatch_size=microbatch_size)
        latents = sample(transition, generators=generators)
    return _decode(model, latents, microbatch_size=microbatch_size), latents


def _copies(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> int:
    """Return the number of prompts that each generator serves."""
    copies, rest = divmod(len(prompts), len(generators))
    if rest:
        raise ValueError(f"{len(generators)} generators cannot share {len(prompts)} prompts equally.")
    return copies


def _next(
    model: DiffusionModel,
    latents: Float[Tensor, "B C H W"],
    step: int,
    conditioning: Conditioning,
    *,
    sampler: Sampler,
    microbatch_size: int,
) -> Transition:
    """Return the transition of latents that have all taken `step` steps."""
    steps = torch.full((len(latents),), step)
    parts = [
        transition_at(model, latents[rows], steps[rows], conditioning[rows], sampler=sampler)
        for rows in torch.arange(len(latents)).split(microbatch_size)
    ]
    return Transition(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))


def _decode(
    model: DiffusionModel, latents: Float[Tensor, "B C H W"], *, microbatch_size: int
) -> Float[Tensor, "B 3 Y X"]:
    return torch.cat([model.decode(part) for part in latents.split(microbatch_size)]).clamp(0, 1)


def noise_of_rollout(
    model: DiffusionModel, trajectory: Trajectory, *, generators: Sequence[torch.Generator]
) -> Float[Tensor, "B T C H W"]:
    """Draw the noise of each step of a rollout again; `generators` are in the state that they had before the rollout.

    The mean of a step to x' with a std was x' - std * noise.
    """
    num_images, num_steps = trajectory.log_probs.shape
    model.initial_noise(generators, copies=num_images // len(generators))
    shape, device = trajectory.latents[:, 0].shape, trajectory.latents.device
    return torch.stack([randn(shape, generators=generators, device=device) for _ in range(num_steps)], dim=1)


def transition_at(
    model: DiffusionModel,
    latents: Float[Tensor, "B C H W"],
    steps: Int[Tensor, " B"],
    conditioning: Conditioning,
    *,
    sampler: Sampler,
) -> Transition:
    """Return the transition of latents that have taken `steps` denoising steps, one number per image."""
    level, next_level = sampler.schedule.at(steps), sampler.schedule.at(steps + 1)
    prediction = model.predict(latents, level, conditioning, guidance_scale=sampler.guidance_scale)
    return sampler.dynamics(latents, prediction, level, next_level)
