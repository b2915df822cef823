"""Advantages from the rewards of P prompts with K images each; torch only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_t2i.prompt_rows import key_of

EQUAL = 1e-6
"""Rewards count as equal up to this standard deviation or difference, in units of the largest absolute one of them: a
few times what rounding to float32 changes."""


def group_relative_advantages(rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """Return each image's distance from the mean of its group, in standard deviations of the group (arXiv:2402.03300).

    A group is the K images of one prompt. A group whose images all have the same reward gets exact zeros.
    """
    return _standardise(rewards, rewards.double().mean(dim=1, keepdim=True), _std(rewards, dim=1))


def whole_batch_advantages(rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """Return each image's distance from the mean of all images of the step, in their standard deviations."""
    flat = rewards.flatten()[None]
    return _standardise(rewards, flat.double().mean(dim=1), _std(flat, dim=1)[0])


def globally_scaled_advantages(rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """Return each image's distance from the mean of its group, in standard deviations of all rewards of the step.

    Groups that differ little then count little (Flow-GRPO's `global_std`, arXiv:2505.05470). A group whose images all
    have the same reward gets exact zeros.
    """
    std = _std(rewards.flatten()[None], dim=1)[0]
    scaled = _standardise(rewards, rewards.double().mean(dim=1, keepdim=True), std)
    return torch.where(_std(rewards, dim=1) > 0, scaled, 0.0)


def standardised_sum(rewards: Float[Tensor, "R P K"], weights: Sequence[float]) -> Float[Tensor, "P K"]:
    """Return the weighted sum of R rewards, each first reduced to its distance from its mean, in standard deviations.

        sum_i weight_i * (reward_i - mean_i) / std_i            mean_i, std_i: over all images of the step

    The weights then say what each reward counts, whatever its unit is.
    """
    return _weighted_sum(torch.stack([whole_batch_advantages(reward) for reward in rewards]), weights)


def standardised_sum_of_groups(rewards: Float[Tensor, "R P N"], weights: Sequence[float]) -> Float[Tensor, "P N"]:
    """Return `standardised_sum` with mean and standard deviation of each group of N images, to order them by.

    GDPO's advantages have the same order. An image with a score that is not finite counts in no mean and gets NaN.
    """
    finite = rewards.isfinite().all(dim=0)
    count = finite.sum(dim=1, keepdim=True).clamp_min(1)
    mean = torch.where(finite, rewards.double(), 0.0).sum(dim=2, keepdim=True) / count
    centred = torch.where(finite, rewards - mean, 0.0)
    largest = torch.where(finite, rewards, 0.0).double().abs().amax(dim=2, keepdim=True)
    std = _without_rounding((centred.square().sum(dim=2, keepdim=True) / count).sqrt(), largest)
    total = _weighted_sum(_standardise(centred, torch.zeros_like(mean), std).to(rewards.dtype), weights)
    return torch.where(finite, total, torch.nan)


def decoupled_advantages(advantages: Float[Tensor, "R P K"], weights: Sequence[float]) -> Float[Tensor, "P K"]:
    """Return the weighted sum of the advantages of R rewards, normalised over all images of the step (GDPO).

        A_sum = sum_i weight_i * A_i            A_i: the advantages of reward i alone, within its groups
        A     = (A_sum - mean(A_sum)) / std(A_sum)

    No reward drowns another one, whatever its unit is; nor do two images with other rewards but the same sum count as
    equal (arXiv:2601.05242).
    """
    return whole_batch_advantages(_weighted_sum(advantages, weights))


def vetoed_advantages(advantages: Float[Tensor, "P K"], passed: Bool[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """Return advantages that never prefer an image that failed a veto.

        A = min(-1, the lowest of the group)        for an image that failed

    A group of which all images failed has nothing to prefer and gets exact zeros.
    """
    lowest = advantages.amin(dim=1, keepdim=True).clamp_max(-1.0)
    return torch.where(passed.any(dim=1, keepdim=True), torch.where(passed, advantages, lowest), 0.0)


def num_degenerate_groups(rewards: Float[Tensor, "P K"]) -> int:
    """Return the number of groups whose images all have the same reward, which contribute no gradient."""
    return int((_std(rewards, dim=1) == 0).sum())


class PerPromptHistory:
    """DDPO's advantages (arXiv:2305.13301, appendix): distance from the mean of the prompt's recent rewards.

    The last `size` rewards of each prompt are kept, including this step's. A prompt with fewer than `min_count` is
    compared with the whole batch.
    """

    def __init__(self, *, size: int, min_count: int) -> None:
        """Raises ValueError for a `min_count` that can never be reached."""
        if not 0 < min_count <= size:
            raise ValueError(
                f"history_min_count ({min_count}) must be between 1 and history_size ({size}); otherwise a prompt's "
                f"own history is never used."
            )
        self.size, self.min_count = size, min_count
        self.rewards: dict[str, deque[float]] = {}

    def __call__(self, prompts: Sequence[str], rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
        """Add the rewards to the history and return the advantages; `prompts` are those of the P rows."""
        keys = [key_of(prompt) for prompt in prompts]
        for key, row in zip(keys, rewards.tolist(), strict=True):
            self.rewards.setdefault(key, deque(maxlen=self.size)).extend(row)
        advantages = whole_batch_advantages(rewards)
        for index, key in enumerate(keys):
            if len(self.rewards[key]) >= self.min_count:
                past = rewards.new_tensor(list(self.rewards[key]))[None]
                advantages[index] = _standardise(rewards[index], past.double().mean(), _std(past, dim=1)[0])
        return advantages

    def state_dict(self) -> dict[str, list[float]]:
        # The keys are plain texts: a checkpoint is read without unpickling classes of ours.
        return {key: list(rewards) for key, rewards in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.rewards = {p: deque(rewards, maxlen=self.size) for p, rewards in state.items()}


def _weighted_sum(values: Float[Tensor, "R P K"], weights: Sequence[float]) -> Float[Tensor, "P K"]:
    """Return the weighted sum over the first dimension; 0 where its terms cancel but for rounding."""
    scale = values.new_tensor(list(weights))
    total = torch.einsum("r,rpk->pk", scale, values)
    return _without_rounding(total, torch.einsum("r,rpk->pk", scale.abs(), values.abs()).max())


def _std(rewards: Float[Tensor, "P K"], *, dim: int) -> Float[Tensor, "P 1"]:
    """Return the standard deviation of rewards; 0 if they count as equal."""
    exact = rewards.double()
    return _without_rounding(exact.std(dim=dim, keepdim=True, correction=0), exact.abs().amax(dim=dim, keepdim=True))


def _without_rounding(values: Tensor, largest: Tensor) -> Tensor:
    """Return values; 0 for those that are no more than EQUAL of the `largest` number that they were computed from."""
    return torch.where(values.abs() > EQUAL * largest, values, 0.0)


def _standardise(rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.where(std > 0, (rewards - mean) / torch.where(std > 0, std, 1.0), 0.0).to(rewards.dtype)
