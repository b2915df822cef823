"""The gradient of a reward with respect to the pixels of the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.load import CheckedReward, WeightedSum
from rlhf_t2i.rewards.trial import trial_images


@dataclass(frozen=True, slots=True)
class ScoredImages:
    """The rewards of images and their gradient with respect to the pixels."""

    rewards: Float[Tensor, " B"]
    """The weighted sum, with a gradient to the images."""
    scores: dict[str, Float[Tensor, " B"]]
    """The unweighted scores of each reward by its name, without a gradient."""
    pixel_gradient: Float[Tensor, "B 3 Y X"]
    """d rewards[i] / d images[i]."""


def require_gradient(reward: WeightedSum, *, prompt: str) -> None:
    """Raise ValueError, naming the reward, if a reward has no gradient with respect to the pixels of a single image.

    The table of rewards decides; a user's own module:function is tested on one random image with `prompt`.
    """
    reward.refuse_groups("the gradient of each image is computed on its own")
    image = trial_images(1)
    for term in reward.rewards:
        if term.differentiable is None:
            _score(term, image, [prompt])
        elif not term.differentiable:
            raise ValueError(_refusal(term.name))


def score_with_gradient(reward: WeightedSum, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> ScoredImages:
    """Score images clamped to [0, 1], and compute the gradient straight through the clamp.

    A saturated pixel so keeps its gradient. The graph of one reward is freed before the next one is called, and all of
    them before `rewards` is backpropagated. The reward of an image must depend on that image alone. Raises ValueError,
    naming the reward, for a gradient that is missing or not finite.
    """
    clamped = images.detach().clamp(0, 1)
    scores: dict[str, Tensor] = {}
    total, pixel_gradient = clamped.new_zeros(len(clamped)), torch.zeros_like(clamped)
    for term, weight in reward.terms:
        scores[term.name], gradient = _score(term, clamped, prompts)
        total, pixel_gradient = total + weight * scores[term.name], pixel_gradient + weight * gradient
    # Its value is zero and its gradient is pixel_gradient.
    linear = (pixel_gradient * images).flatten(1).sum(1)
    return ScoredImages(total + (linear - linear.detach()), scores, pixel_gradient)


def _score(
    reward: CheckedReward, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B 3 Y X"]]:
    """Return the scores of one reward and their pixel gradient."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        scores = reward(images, prompts)
    pixel_gradient = None
    if scores.requires_grad:
        (pixel_gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    if pixel_gradient is None:
        raise ValueError(_refusal(reward.name))
    if not (finite := pixel_gradient.isfinite().flatten(1).all(dim=1)).all():
        worst = int((~finite).nonzero()[0])
        raise ValueError(
            f"The gradient of the reward {reward.name!r} is not finite for the prompt {prompts[worst]!r} (image "
            f"{worst} of {len(images)}); its score there is {scores[worst].item():.4g}."
        )
    return scores.detach(), pixel_gradient


def _refusal(name: str) -> str:
    return (
        f"The reward {name!r} has no gradient with respect to the pixels, which this recipe needs; train on it with "
        f"recipes/ddpo.py, which takes any reward."
    )
