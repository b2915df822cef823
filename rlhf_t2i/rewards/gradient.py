"""Which way is better? The gradient of a reward with respect to the pixels, looked at before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.load import CheckedReward, WeightedSum

_WITHOUT_GRADIENT = ("oracle", "oracle_pass", "jpeg_compressibility", "jpeg_incompressibility")
_PROBE_SIZE = 64


@dataclass(frozen=True, slots=True)
class ScoredImages:
    """What judges say of images, and where they point."""

    rewards: Float[Tensor, " B"]
    """The verdicts, with a gradient to the images."""
    verdicts: dict[str, Float[Tensor, " B"]]
    """What each judge said before its weight."""
    pixel_gradient: Float[Tensor, "B 3 Y X"]
    """How each reward changes with the pixels of its image."""


def require_gradient(reward: WeightedSum, *, prompt: str) -> None:
    """Refuse rewards that cannot be climbed; one that is not built in is asked about a small random image.

    Raises ValueError with the name of the reward.
    """
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, _PROBE_SIZE, _PROBE_SIZE, generator=generator)
    for judge, _ in reward.parts:
        if judge.name == "llava_reward" or judge.name.startswith("judge:"):
            continue
        if judge.name in _WITHOUT_GRADIENT or judge.name.startswith(("http://", "https://")):
            raise ValueError(_refusal(judge.name))
        _judge(judge, image, [prompt])


def score_with_gradient(reward: WeightedSum, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> ScoredImages:
    """Let each judge look at the images as they are shown, clamped, and hand its gradient on as if nothing had been.

    So a saturated pixel keeps its gradient and can be led back. One judge's graph is gone before the next one looks and
    before the painter's is walked. Each image's reward must depend on that image alone. Raises ValueError, naming
    the judge, for a gradient that is missing or not finite.
    """
    shown = images.detach().clamp(0, 1)
    verdicts: dict[str, Tensor] = {}
    total, pixel_gradient = shown.new_zeros(len(shown)), torch.zeros_like(shown)
    for judge, weight in reward.parts:
        verdicts[judge.name], own = _judge(judge, shown, prompts)
        total, pixel_gradient = total + weight * verdicts[judge.name], pixel_gradient + weight * own
    linear = (pixel_gradient * images).flatten(1).sum(1)
    return ScoredImages(total + (linear - linear.detach()), verdicts, pixel_gradient)


def _judge(
    judge: CheckedReward, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]
) -> tuple[Float[Tensor, " B"], Float[Tensor, "B 3 Y X"]]:
    """Rewards and their gradients."""
    with torch.enable_grad():
        images = images.detach().requires_grad_()
        scores = judge(images, prompts)
    pixel_gradient = None
    if scores.requires_grad:
        (pixel_gradient,) = torch.autograd.grad(scores.sum(), images, allow_unused=True)
    if pixel_gradient is None:
        raise ValueError(_refusal(judge.name))
    if not (finite := pixel_gradient.isfinite().flatten(1).all(dim=1)).all():
        worst = int((~finite).nonzero()[0])
        raise ValueError(
            f"The gradient of the reward {judge.name!r} is not finite for the prompt {prompts[worst]!r} (image {worst} "
            f"of {len(images)}); its reward there is {scores[worst].item():.4g}."
        )
    return scores.detach(), pixel_gradient


def _refusal(name: str) -> str:
    return (
        f"The reward {name!r} has no gradient with respect to the pixels, which this recipe climbs; train on it with "
        f"recipes/ddpo.py, which takes any reward."
    )
