"""Generate images, and record every denoising step so that an update can replay it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import mean_log_prob, per_image, randn
from rlhf_t2i.types import (
    Conditioning,
    DiffusionModel,
    EncodedPrompts,
    Prediction,
    Sampler,
    Trajectory,
    Transition,
)

ItemT = TypeVar("ItemT")


@torch.no_grad()
def rollout(
    model: DiffusionModel,
    prompts: Sequence[str],
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    microbatch_size: int,
    same_initial_noise: bool = False,
    on_images: Callable[[Float[Tensor, "N 3 Y X"], Sequence[str]], None] | None = None,
) -> tuple[Float[Tensor, "B 3 Y X"], Trajectory]:
    """Sample one image per prompt and return the images, clamped to [0, 1], with the record of their denoising steps.

    Each generator serves an equal share of the prompts, in order; ValueError if there is none. `microbatch_size` is the
    most images in one forward pass; it changes memory, not images. With `same_initial_noise` the images of a generator
    start from the same noise and differ by the noise of later steps only. With `on_images` the prompts are sampled in
    groups of about `microbatch_size`, never splitting a generator's share, and it is called with the images and prompts
    of each group while the next groups are still to be sampled.

    Every forward pass has the trajectory's `num_rows` images: the last one of a group is filled up.
    """
    copies, num_images = _copies(prompts, generators), len(prompts)
    num_groups = 1 if on_images is None else min(len(generators), math.ceil(num_images / microbatch_size))
    groups = torch.arange(len(generators)).tensor_split(num_groups)
    num_rows = _even_rows(copies * len(groups[0]), microbatch_size)
    conditioning, shape = encode_distinct(model, prompts), (num_images, sampler.schedule.num_steps + 1)
    images = latents = log_probs = torch.empty(0)
    for members in groups:
        own = [generators[int(i)] for i in members]
        rows = slice(copies * int(members[0]), copies * int(members[-1] + 1))
        noise = _initial_noise(model, own, copies=copies, same=same_initial_noise)
        if not len(latents):
            latents, log_probs = noise.new_empty(*shape, *noise.shape[1:]), noise.new_empty(num_images, shape[1] - 1)
        latents[rows, 0] = noise
        _denoise(
            model, log_probs[rows], latents[rows], EncodedPrompts(conditioning.distinct, conditioning.index[rows]),
            sampler=sampler, generators=own, num_rows=num_rows,
        )  # fmt: skip
        images = _decode(model, latents[:, -1], rows, into=images, num_rows=num_rows)
        if on_images is not None:
            on_images(images[rows], prompts[rows])
    return images, Trajectory(conditioning, log_probs, latents, num_rows)


def _denoise(
    model: DiffusionModel,
    log_probs: Float[Tensor, "B T"],
    latents: Float[Tensor, "B T+1 C H W"],
    conditioning: EncodedPrompts,
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    num_rows: int,
) -> None:
    """Fill in the latents after each step, and their log-probabilities; those at index 0 are given."""
    for step in each(range(log_probs.shape[1])):
        for rows, transition, x_next in _next_latents(
            model, latents[:, step], step, conditioning, sampler=sampler, generators=generators, num_rows=num_rows
        ):
            # The float32 sample is stored as it was drawn: the log-probability is of the very bits an update reads.
            latents[rows, step + 1], log_probs[rows, step] = x_next, mean_log_prob(transition, x_next)


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
    conditioning, num_rows = encode_distinct(model, prompts), _even_rows(len(prompts), microbatch_size)
    latents = model.initial_noise(generators, copies=_copies(prompts, generators))
    for step in each(range(sampler.schedule.num_steps)):
        for rows, _, x_next in _next_latents(
            model, latents, step, conditioning, sampler=sampler, generators=generators, num_rows=num_rows
        ):
            latents[rows] = x_next
    return _decode(model, latents, slice(None), into=torch.empty(0), num_rows=num_rows), latents


def each(items: Iterable[ItemT]) -> Iterable[ItemT]:
    """Return items with each of which a loop does the same work; a dry run replaces this and takes some of them."""
    return items


def encode_distinct(model: DiffusionModel, prompts: Sequence[str]) -> EncodedPrompts:
    """Encode prompts, holding each distinct one once."""
    row = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    return EncodedPrompts(model.encode(list(row)), torch.tensor([row[prompt] for prompt in prompts]))


def _initial_noise(
    model: DiffusionModel, generators: Sequence[torch.Generator], *, copies: int, same: bool
) -> Float[Tensor, "B C H W"]:
    if same:
        return model.initial_noise(generators, copies=1).repeat_interleave(copies, dim=0)
    return model.initial_noise(generators, copies=copies)


def _copies(prompts: Sequence[str], generators: Sequence[torch.Generator]) -> int:
    """Return the number of prompts that each generator serves."""
    copies, rest = divmod(len(prompts), len(generators))
    if rest:
        raise ValueError(f"{len(generators)} generators cannot share {len(prompts)} prompts equally.")
    return copies


def _even_rows(count: int, most: int) -> int:
    """Return the size of the fewest batches of equal size, at most `most`, for `count` rows."""
    return math.ceil(count / math.ceil(count / most))


def _next_latents(
    model: DiffusionModel,
    latents: Float[Tensor, "B C H W"],
    step: int,
    conditioning: EncodedPrompts,
    *,
    sampler: Sampler,
    generators: Sequence[torch.Generator],
    num_rows: int,
) -> Iterator[tuple[Int[Tensor, " N"], Transition, Float[Tensor, "N C H W"]]]:
    """Yield (rows, transition, next latents) for batches of latents that have all taken `step` steps."""
    noise, steps = randn(latents.shape, generators=generators, device=latents.device), torch.full((len(latents),), step)
    for rows in each(torch.arange(len(latents)).split(num_rows)):
        transition = transition_at(
            model, latents[rows], steps[rows], conditioning[rows], sampler=sampler, num_rows=num_rows
        )
        yield rows, transition, transition.mean + per_image(transition.std) * noise[rows]


def _decode(
    model: DiffusionModel, latents: Float[Tensor, "B C H W"], rows: slice, *, into: Tensor, num_rows: int
) -> Float[Tensor, "B 3 Y X"]:
    """Write the images of some rows into `into`, which is allocated if it is empty; return it."""
    for part in each(torch.arange(len(latents))[rows].split(num_rows)):
        decoded = model.decode(latents[part]).clamp(0, 1)
        into = into if len(into) else decoded.new_empty(len(latents), *decoded.shape[1:])
        into[part] = decoded
    return into


@torch.no_grad()
def with_rows(model: DiffusionModel, trajectory: Trajectory, *, sampler: Sampler, num_rows: int) -> Trajectory:
    """Return a trajectory with the log-probabilities of forward passes of `num_rows` images, by the present weights."""
    log_probs = torch.empty_like(trajectory.log_probs)
    for step in range(log_probs.shape[1]):
        for rows in torch.arange(len(log_probs)).split(num_rows):
            transition = transition_at(
                model, trajectory.latents[rows, step], torch.full((len(rows),), step), trajectory.conditioning[rows],
                sampler=sampler, num_rows=num_rows,
            )  # fmt: skip
            log_probs[rows, step] = mean_log_prob(transition, trajectory.latents[rows, step + 1])
    return replace(trajectory, log_probs=log_probs, num_rows=num_rows)


def noise_of_rollout(
    model: DiffusionModel,
    trajectory: Trajectory,
    *,
    generators: Sequence[torch.Generator],
    same_initial_noise: bool = False,
) -> Float[Tensor, "B T C H W"]:
    """Draw the noise of each step of a rollout again; `generators` are in the state that they had before the rollout.

    The mean of a step to x' with a std was x' - std * noise.
    """
    num_images, num_steps = trajectory.log_probs.shape
    _initial_noise(model, generators, copies=num_images // len(generators), same=same_initial_noise)
    noise = torch.empty_like(trajectory.latents[:, 1:])
    for step in range(num_steps):
        noise[:, step] = randn(noise[:, 0].shape, generators=generators, device=noise.device)
    return noise


def transition_at(
    model: DiffusionModel,
    latents: Float[Tensor, "B C H W"],
    steps: Int[Tensor, " B"],
    conditioning: Conditioning,
    *,
    sampler: Sampler,
    num_rows: int | None = None,
) -> Transition:
    """Return the transition of latents that have taken `steps` denoising steps, one number per image.

    With `num_rows` the last image is repeated until the forward pass has that many, since the rounding of half
    precision on a GPU depends on their number.
    """
    level, next_level = sampler.schedule.at(steps), sampler.schedule.at(steps + 1)
    count = len(latents)
    inputs = latents, level, conditioning
    if num_rows is not None and count < num_rows:
        rows = torch.arange(num_rows).clamp_max(count - 1)
        inputs = latents[rows], sampler.schedule.at(steps[rows]), conditioning[rows]
    prediction = model.predict(*inputs, guidance_scale=sampler.guidance_scale)
    prediction = Prediction(prediction.clean[:count], prediction.noise[:count])
    return sampler.dynamics(latents, prediction, level, next_level)
