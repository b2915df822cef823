"""Losses of the reward training. Logits are log-odds (`heads.preference_logits`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from reward_model.heads import HeadKind, Readout, preference_logits
from reward_model.types import LabelledImage, PreferencePair, Record

LossName = Literal["bradley_terry", "general_preference", "cross_entropy"]


def preference_losses(
    logits: Float[Tensor, " P"],
    tie: Bool[Tensor, " P"],
    *,
    margin: Float[Tensor, " P"] | float = 0.0,
    tie_width: float = 0.0,
) -> Float[Tensor, " P"]:
    """Return minus the log-likelihood of each comparison, won by the first image or tied.

        P(first wins)  = sigmoid(logit - tie_width)
        P(second wins) = sigmoid(-logit - tie_width)
        P(tie)         = 1 - both = (exp(2 tie_width) - 1) P(first wins) P(second wins)      (Rao and Kupper, 1967)

    With tie_width 0 and no ties this is Bradley-Terry. `margin`, in log-odds and >= 0, is subtracted from the logit of
    a winner; it does not apply to ties. A tie needs tie_width > 0: with 0 its probability is 0 and its loss infinite.
    """
    won = F.logsigmoid(logits - tie_width - margin)
    tied = F.logsigmoid(logits - tie_width) + F.logsigmoid(-logits - tie_width)
    tied = tied + torch.log(torch.expm1(logits.new_tensor(2 * tie_width)))
    return -torch.where(tie, tied, won)


def win_probability(logits: Float[Tensor, "*P"], *, tie_width: float = 0.0) -> Float[Tensor, "*P"]:
    """Return P(first wins) + P(tie) / 2, in [0, 1]; sigmoid(logit) for tie_width 0. Both orders of a pair sum to 1."""
    return (1 + torch.sigmoid(logits - tie_width) - torch.sigmoid(-logits - tie_width)) / 2


def decided_logits(logits: Float[Tensor, "*P"], *, tie_width: float) -> Float[Tensor, "*P"]:
    """Return log P(first wins) - log P(second wins), the log-odds given that there is no tie; logits for width 0."""
    return F.logsigmoid(logits - tie_width) - F.logsigmoid(-logits - tie_width)


def label_losses(scores: Float[Tensor, " N"], labels: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the binary cross-entropy of each image with P(good) = sigmoid(score); labels are 1 (good) or 0 (bad)."""
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The training loss of a batch: bradley_terry and general_preference compare pairs, cross_entropy labels images.

    cross_entropy treats a pair as two labels, the winner good and the loser bad:
    -log sigmoid(winner) - log(1 - sigmoid(loser)).
    """

    loss: LossName = "bradley_terry"
    temperature: float = 0.1
    tie_width: float = 0.0
    margin_per_rating: float = 0.0
    """Margin of a winner in log-odds for each unit of `rating_gap`; >= 0."""
    readout: Readout = "last_token"
    """prompt_likelihood is trained by bradley_terry on pairs only: its scores are all below 0, so 0 is no threshold."""

    def __post_init__(self) -> None:
        """Raise ValueError for a loss that cannot train the readout."""
        if self.readout == "prompt_likelihood" and self.loss != "bradley_terry":
            raise ValueError(
                f"loss is {self.loss}; readout prompt_likelihood is trained by bradley_terry. Readout last_token can "
                f"be trained by {self.loss}."
            )

    @property
    def head(self) -> HeadKind:
        """The kind of head that this loss trains."""
        return "general_preference" if self.loss == "general_preference" else "scalar"

    def __call__(
        self,
        outputs: Float[Tensor, "R d"],
        tie: Bool[Tensor, " P"],
        gap: Float[Tensor, " P"],
        label: Float[Tensor, " L"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, " N"]]:
        """Return the mean loss over the N = P + L records, and for each 1 if correct, 0 if not, nan for ties.

        The rows of `outputs` are the winners of all pairs, then their losers, then the labelled images.
        """
        winners, losers, labelled = outputs.split([len(tie), len(tie), len(label)])
        logits = preference_logits(winners, losers, kind=self.head, temperature=self.temperature)
        if self.loss == "cross_entropy":
            pair_losses = label_losses(winners[:, 0], torch.ones_like(gap))
            pair_losses = pair_losses + label_losses(losers[:, 0], torch.zeros_like(gap))
        else:
            pair_losses = preference_losses(logits, tie, margin=self.margin_per_rating * gap, tie_width=self.tie_width)
        loss = torch.cat([pair_losses, label_losses(labelled[:, 0], label)]).mean()
        correct_pairs = torch.where(tie, torch.nan, (logits > 0).float())
        correct_labels = ((labelled[:, 0] > 0) == (label > 0.5)).float()
        return loss, torch.cat([correct_pairs, correct_labels]).detach()

    def check(self, records: Sequence[Record]) -> None:
        """Raise ValueError, naming the first, for a record that this loss cannot use."""
        for record in records:
            if isinstance(record, LabelledImage) and self.head != "scalar":
                raise ValueError(
                    f"{record.where} is a label, and general_preference only takes pairs; use bradley_terry or "
                    f"cross_entropy."
                )
            if isinstance(record, LabelledImage) and self.readout == "prompt_likelihood":
                raise ValueError(
                    f"{record.where} is a label; readout prompt_likelihood compares images of one prompt: give pairs, "
                    f"or train readout last_token."
                )
            if isinstance(record, PreferencePair) and record.tie and self.loss == "cross_entropy":
                raise ValueError(
                    f"{record.where} is a tie, which has neither a good image nor a bad one; use bradley_terry."
                )
            if isinstance(record, PreferencePair) and record.tie and self.tie_width <= 0:
                raise ValueError(f"{record.where} is a tie, which needs tie_width > 0; it is {self.tie_width}.")
