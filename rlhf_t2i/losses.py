"""What is minimised. Each loss returns one scalar; metrics are other functions."""

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
    """PPO's pessimistic surrogate (arXiv:1707.06347, Eq. 7), averaged over the batch.

        ratio = exp(log_prob - old_log_prob)
        loss  = -mean(min(ratio * A, clip(ratio, 1 - c, 1 + c) * A))

    With densities averaged over latent numbers, DDPO's c is 1e-4. Gradients reach `log_prob` only.
    """
    ratio = torch.exp(log_prob - old_log_prob.detach())
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    advantage = advantage.detach()
    return -torch.minimum(ratio * advantage, clipped_ratio * advantage).mean()


def clip_range_for(num_latent_numbers: int) -> float:
    """A clip range that suits so many latent numbers: 0.0113 / sqrt(num_latent_numbers).

    A step changes each number's log-density a little, half of them up and half down; the mean over n numbers, which
    the ratio is of, spreads as 1 / sqrt(n). The constant makes 5e-4 of the built-in model's 512 (docs/experiments.md)
    and 9e-5 of the 16,384 of Stable Diffusion 1.5, for which DDPO (arXiv:2305.13301) published 1e-4.
    """
    return 5e-4 * (512 / num_latent_numbers) ** 0.5


def diffusion_dpo_loss(
    winner_error: Float[Tensor, " B"],
    loser_error: Float[Tensor, " B"],
    reference_winner_error: Float[Tensor, " B"],
    reference_loser_error: Float[Tensor, " B"],
    *,
    beta: float,
    dpop_weight: float = 0.0,
) -> Float[Tensor, ""]:
    """Diffusion-DPO (Wallace et al., arXiv:2311.12908, Eq. 14), averaged over pairs.

        moved_w = winner_error - reference_winner_error        moved_l = loser_error - reference_loser_error
        loss    = -mean(log sigmoid(-beta / 2 * (moved_w - moved_l + dpop_weight * max(0, moved_w))))

    Errors are `denoising_mse` of one noise and one level for all four: means over latent numbers, on which the
    published beta (2000 to 5000) depends, as it does on the half. At the reference the loss is log 2.

    The loss also falls if both errors rise and the loser's rises more. A dpop_weight above 0 is the penalty of
    DPO-Positive (arXiv:2402.13228, Eq. 3) against it: what the winner lost counts again, so many times.
    Gradients reach the first two errors only.
    """
    moved_winner = winner_error - reference_winner_error.detach()
    moved_loser = loser_error - reference_loser_error.detach()
    margin = moved_loser - moved_winner - dpop_weight * moved_winner.clamp_min(0)
    return -F.logsigmoid(beta / 2 * margin).mean()


def negative_aware_loss(
    found: Float[Tensor, "B C H W"],
    old: Float[Tensor, "B C H W"],
    clean: Float[Tensor, "B C H W"],
    optimality: Float[Tensor, " B"],
    *,
    beta: float,
) -> Float[Tensor, ""]:
    """DiffusionNFT (Zheng et al., arXiv:2509.16117, Eq. 5), in clean latents and averaged over images.

        positive = beta * found + (1 - beta) * old              negative = (1 + beta) * old - beta * found
        error(x) = mean((x - clean)^2) / mean(|x - clean|)
        loss     = mean(goodness * error(positive) + (1 - goodness) * error(negative)) / beta

    `found` is what the model that learns takes for the clean latents, `old` what the one that painted them did;
    `goodness`, in [0, 1], is how likely the image is one of the good ones. The positive is drawn towards a good
    image, and the negative, which mirrors it at `old`, towards a bad one: so the model is driven away from that. The
    divisor, the authors' own, is taken as a number. Gradients reach `found` only.
    """
    old, clean = old.detach().float(), clean.detach().float()
    positive = beta * found.float() + (1 - beta) * old
    negative = (1 + beta) * old - beta * found.float()
    errors = [
        denoising_mse(guess, clean) / (guess.detach() - clean).abs().mean(dim=(1, 2, 3)).clamp_min(1e-5)
        for guess in (positive, negative)
    ]
    return (optimality * errors[0] + (1 - optimality) * errors[1]).mean() / beta


def denoising_mse(predicted: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"]) -> Float[Tensor, " B"]:
    """The squared error of each image, averaged over its numbers, in float32."""
    return (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))


def reward_loss(rewards: Float[Tensor, " B"], *, margin: float | None) -> Float[Tensor, ""]:
    """What falls when rewards rise (DRaFT, arXiv:2309.17400), averaged over images.

        loss = -mean(reward)                       without a margin
        loss = mean(max(0, margin - reward))       with one (ReFL, arXiv:2304.05977)

    An image whose reward is above the margin pulls no more.
    """
    return -rewards.mean() if margin is None else (margin - rewards).clamp_min(0).mean()


def weight_distance(weights: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> Float[Tensor, ""]:
    """Half the squared distance of the weights from their first values, so that its gradient is their difference."""
    return 0.5 * torch.stack([(weights[name] - first).square().sum() for name, first in initial.items()]).sum()
