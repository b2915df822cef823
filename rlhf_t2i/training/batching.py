"""Split a rollout into minibatches of (image, denoising step) pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor


def window_of_step(
    step: int, *, within: tuple[int, int], size: int | None, moves_every: int | None, generator: torch.Generator
) -> tuple[int, int]:
    """Return the window (first, end) of denoising steps that are noisy in a training step; `end` is exclusive.

    It has `size` of the steps in `within` (first, end); None is all of them. It moves by one denoising step every
    `moves_every` training steps and wraps around at the end; None draws its position from `generator`.
    """
    first, end = within
    size = size or end - first
    num_positions = end - first - size + 1
    if moves_every is None:
        position = int(torch.randint(num_positions, (), generator=generator))
    else:
        position = step // moves_every % num_positions
    return first + position, first + position + size


def minibatches(
    *,
    generators: Sequence[torch.Generator],
    images_per_prompt: int,
    window: tuple[int, int],
    fraction: float,
    num_minibatches: int,
    num_epochs: int,
) -> Iterator[tuple[Int[Tensor, " N"], Int[Tensor, " N"]]]:
    """Yield shuffled minibatches of (image, denoising step) pairs of a rollout, as two index tensors.

    There is one generator per prompt. Every minibatch has the same number of images of each prompt, so that the result
    does not depend on which process has which prompt. Each image is trained at a random `fraction` of the denoising
    steps in `window` (first, end). Images and steps are drawn anew in each epoch.
    """
    first, end = window
    num_trained = max(1, round(fraction * (end - first)))
    for _ in range(num_epochs):
        orders = [torch.randperm(images_per_prompt, generator=g) for g in generators]
        trained = torch.stack(
            [
                first + torch.randperm(end - first, generator=generator)[:num_trained]
                for generator in generators
                for _ in range(images_per_prompt)
            ]
        )
        by_minibatch = [order.chunk(num_minibatches) for order in orders]
        for batch in range(num_minibatches):
            images = torch.cat([prompt * images_per_prompt + own[batch] for prompt, own in enumerate(by_minibatch)])
            # Consecutive pairs are of different images, so that a microbatch mixes images and steps.
            yield images.repeat(num_trained), trained[images].T.flatten()
