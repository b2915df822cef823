"""What is minimised. Each loss returns one scalar; metrics are other functions."""

from __future__ import annotations

import torch
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
