"""Which strokes of a rollout go into which optimiser step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def window_of_step(
    step: int, *, within: tuple[int, int], size: int | None, moves_every: int | None, generator: torch.Generator
) -> tuple[int, int]:
    """Which denoising steps a training step paints with noise: the first, and the one after the last.

    `size` of those `within` (first, end); None is all of them. The window moves on by one after every `moves_every`
    training steps, and from the end to the start again; None draws its place.
    """
    first, end = within
    size = size or end - first
    num_places = end - first - size + 1
    if moves_every is None:
        place = int(torch.randint(num_places, (), generator=generator))
    else:
        place = step // moves_every % num_places
    return first + place, first + place + size


def minibatches(
    *,
    generators: Sequence[torch.Generator],
    images_per_prompt: int,
    window: tuple[int, int],
    fraction: float,
    num_minibatches: int,
    num_epochs: int,
) -> Iterator[tuple[Int[Tensor, " N"], Int[Tensor, " N"]]]:
    """Shuffle a rollout's images and denoising steps, anew in each epoch, into equal minibatches of (image, step).

    There is one generator for each prompt. Every prompt gives each minibatch the same number of its images, so that
    the result does not depend on how prompts are spread over processes. Of the steps in `window` (first, end) each
    image trains its own random `fraction`.
    """
    first, end = window
    num_kept = max(1, round(fraction * (end - first)))
    for _ in range(num_epochs):
        orders = [torch.randperm(images_per_prompt, generator=g) for g in generators]
        kept = torch.stack(
            [
                first + torch.randperm(end - first, generator=generator)[:num_kept]
                for generator in generators
                for _ in range(images_per_prompt)
            ]
        )
        by_minibatch = [order.chunk(num_minibatches) for order in orders]
        for batch in range(num_minibatches):
            images = torch.cat([prompt * images_per_prompt + own[batch] for prompt, own in enumerate(by_minibatch)])
            # Stroke after stroke is of another image, so that a microbatch mixes images and steps.
            yield images.repeat(num_kept), kept[images].T.flatten()
