"""Losses, each of which returns one scalar; torch only."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def clipped_surrogate_loss(
    log_prob: Float[Tensor, " B"],
    old_log_prob: Float[Tensor, " B"],
    advantage: Float[Tensor, " B"],
    *,
    clip_range: float,
) -> Float[Tensor, ""]:
    """Return PPO's pessimistic surrogate (arXiv:1707.06347, Eq. 7), averaged over the batch.

        ratio = exp(log_prob - old_log_prob)
        loss  = -mean(min(ratio * A, clip(ratio, 1 - c, 1 + c) * A))

    With log-probabilities averaged over latent dimensions, DDPO's c is 1e-4. Only `log_prob` gets a gradient.
    """
    ratio = torch.exp(log_prob - old_log_prob.detach())
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantage = advantage.detach()
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()


def clip_range_for(num_latent_dimensions: int) -> float:
    """Return a clip range for a number of latent dimensions n: 0.0113 / sqrt(n).

    An update changes the log-probability of each dimension a little, half of them up and half down; the standard
    deviation of their mean, from which the ratio is computed, falls as 1 / sqrt(n). The constant gives 5e-4 for the 512
    dimensions of the built-in model (docs/experiments.md) and 9e-5 for the 16,384 of Stable Diffusion 1.5, for which
    DDPO (arXiv:2305.13301) published 1e-4.
    """
    return 5e-4 * (512 / num_latent_dimensions) ** 0.5


def diffusion_dpo_loss(
    winner_error: Float[Tensor, " B"],
    loser_error: Float[Tensor, " B"],
    reference_winner_error: Float[Tensor, " B"],
    reference_loser_error: Float[Tensor, " B"],
    *,
    beta: float,
    dpop_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the Diffusion-DPO loss (Wallace et al., arXiv:2311.12908, Eq. 14), averaged over pairs.

        moved_w = winner_error - reference_winner_error        moved_l = loser_error - reference_loser_error
        loss    = -mean(log sigmoid(-beta / 2 * (moved_w - moved_l + dpop_weight * max(0, moved_w))))

    The four errors are `denoising_mse` of the same noise and level: means over latent dimensions, on which the
    published beta (2000 to 5000) depends, as it does on the factor 1/2. At the reference the loss is log 2.

    The loss also falls if both errors rise and the loser's rises more. A dpop_weight above 0 adds the penalty of
    DPO-Positive (arXiv:2402.13228, Eq. 3) on a rise of the winner's error. Only the first two errors get gradients.
    """
    moved_winner = winner_error - reference_winner_error.detach()
    moved_loser = loser_error - reference_loser_error.detach()
    margin = moved_loser - moved_winner - dpop_weight * moved_winner.clamp_min(0)
    return -F.logsigmoid(beta / 2 * margin).mean()


def negative_aware_loss(
    new: Float[Tensor, "B C H W"],
    old: Float[Tensor, "B C H W"],
    clean: Float[Tensor, "B C H W"],
    optimality: Float[Tensor, " B"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """Return the DiffusionNFT loss (Zheng et al., arXiv:2509.16117, Eq. 5) on clean latents, averaged over images.

        positive = beta * new + (1 - beta) * old              negative = (1 + beta) * old - beta * new
        error(x) = mean((x - clean)^2) / mean(|x - clean|)
        loss     = mean(r * error(positive) + (1 - r) * error(negative)) / beta

    `new` and `old` are the clean latents predicted by the trained weights and by the weights that sampled the images;
    r is `optimality`, the optimality probability of an image, in [0, 1]. For r = 1 the positive is regressed on the
    image, for r = 0 the negative, which mirrors it at `old`, so that the policy moves away. The divisor of the error is
    that of the authors' code and is detached. Only `new` gets a gradient.
    """
    old, clean = old.detach().float(), clean.detach().float()
    positive = beta * new.float() + (1 - beta) * old
    negative = (1 + beta) * old - beta * new.float()
    errors = [
        denoising_mse(guess, clean) / (guess.detach() - clean).abs().mean(dim=(1, 2, 3)).clamp_min(1e-5)
        for guess in (positive, negative)
    ]
    return (optimality * errors[0] + (1 - optimality) * errors[1]).mean() / beta


def denoising_mse(predicted: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """Return the squared error of each image, averaged over latent dimensions, in float32."""
    return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


def reward_loss(rewards: Float[Tensor, " B"], *, margin: float | None) -> Float[Tensor, ""]:
    """Return a loss that falls as rewards rise (DRaFT, arXiv:2309.17400), averaged over images.

        loss = -mean(reward)                       without a margin
        loss = mean(max(0, margin - reward))       with one (ReFL, arXiv:2304.05977)

    With a margin, images whose reward is above it have no gradient.
    """
    return -rewards.mean() if margin is None else (margin - rewards).clamp_min(0).mean()


def weight_distance(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Return half the squared L2 distance of the weights from their initial values; its gradient is the difference."""
    return 0.5 * torch.stack([(weights[name] - first).square().sum() for name, first in initial.items()]).sum()
