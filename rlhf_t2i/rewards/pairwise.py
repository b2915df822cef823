"""Pairwise wins within a group: rewards for models that compare images and give no scores (Pref-GRPO)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.output.run_folder import reward_model_of
from rlhf_t2i.rewards.groups import runs_of_prompts
from rlhf_t2i.rewards.llava_reward import load_once


class PairwiseReward:
    """The share of the other images of its prompt that an image is preferred to (Pref-GRPO, arXiv:2508.20751).

        reward_i = mean over j != i of [P(i preferred to j) > 1/2], a tie counts for half; in [0, 1]

    The rewards of a group have the mean 1/2, however good its images are. A general-preference head may prefer in a
    circle; a scalar head gives the ranks of its scores.
    """

    needs_groups = True

    def __init__(self, source: str | Path, *, perspective: str | None = None, batch_size: int = 64) -> None:
        """Load a reward model from its folder, the folder of the run that trained it, or the Hub.

        `batch_size` images go through the model at once. Raises FileNotFoundError or ValueError if there is no reward
        model, and ValueError for a batch size below 1.
        """
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; it must be at least 1 image.")
        self.reward_model = load_once(reward_model_of(str(source)))
        self.perspective, self.batch_size = perspective, batch_size
        self.reward_model.config(perspective)

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        """Return the share of pairs that each image wins among its neighbours with the same prompt.

        Raises ValueError, with the prompt, for an image that is alone with its prompt.
        """
        self.reward_model.to(images.device)
        shares = images.new_zeros(len(images), dtype=torch.float32)
        for rows in runs_of_prompts(prompts):
            if rows.stop - rows.start < 2:
                raise ValueError(
                    f"One image of the prompt {prompts[rows.start]!r} has nothing to be compared with; a pairwise "
                    f"reward needs at least two images of each prompt, one after the other."
                )
            shares[rows] = win_shares(
                self.reward_model.preferences(
                    images[rows], prompts[rows], perspective=self.perspective, batch_size=self.batch_size
                )
            )
        return shares


def win_shares(log_odds: Float[Tensor, "K K"]) -> Float[Tensor, " K"]:
    """Return the share of the K - 1 other images that each image wins against; log-odds of 0 are half a win."""
    wins = (log_odds.sign() + 1) / 2
    return (wins.sum(dim=1) - wins.diagonal()) / (len(wins) - 1)
