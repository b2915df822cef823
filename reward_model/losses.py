"""What the judge minimises. Logits are log-odds as `heads.preference_logits` gives them; every loss is one scalar."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def preference_losses(
    logits: Float[Tensor, " P"],
    tie: Bool[Tensor, " P"],
    *,
    margin: Float[Tensor, " P"] | float = 0.0,
    tie_width: float = 0.0,
) -> Float[Tensor, " P"]:
    """Minus the log-likelihood of each comparison: the first image won, or neither did.

        P(first wins)  = sigmoid(logit - tie_width)
        P(second wins) = sigmoid(-logit - tie_width)
        P(tie)         = 1 - both = (exp(2 tie_width) - 1) P(first wins) P(second wins)      (Rao and Kupper, 1967)

    With tie_width 0 and no ties it is Bradley and Terry's. `margin`, in log-odds and >= 0, is how far a winner is asked
    to be ahead; a tie has none. A tie needs tie_width > 0: with 0 it is impossible, and its loss infinite.
    """
    won = F.logsigmoid(logits - tie_width - margin)
    tied = F.logsigmoid(logits - tie_width) + F.logsigmoid(-logits - tie_width)
    tied = tied + torch.log(torch.expm1(logits.new_tensor(2 * tie_width)))
    return -torch.where(tie, tied, won)


def win_probability(logits: Float[Tensor, "*P"], *, tie_width: float = 0.0) -> Float[Tensor, "*P"]:
    """P(first wins) + P(tie) / 2, in [0, 1]; for tie_width 0 sigmoid(logit). Both orders of a pair sum to 1."""
    return (1 + torch.sigmoid(logits - tie_width) - torch.sigmoid(-logits - tie_width)) / 2


def decided_logits(logits: Float[Tensor, "*P"], *, tie_width: float) -> Float[Tensor, "*P"]:
    """Log-odds that the first wins if it is no tie, log P(first wins) - log P(second wins); for width 0 unchanged."""
    return F.logsigmoid(logits - tie_width) - F.logsigmoid(-logits - tie_width)


def label_losses(scores: Float[Tensor, " N"], labels: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Binary cross-entropy of each image, sigmoid(score) being the chance that it is good; labels 1 good, 0 bad."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
