"""Advantages from the rewards of P prompts with K images each; torch only."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_MIN_STD = 1e-6
"""Rewards with a standard deviation up to this count as equal."""


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
    return torch.where(_std(rewards, dim=1) > _MIN_STD, scaled, 0.0)


def num_degenerate_groups(rewards: Float[Tensor, "P K"]) -> int:
    """Return the number of groups whose images all have the same reward, which contribute no gradient."""
    return int((_std(rewards, dim=1) <= _MIN_STD).sum())


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
        for prompt, row in zip(prompts, rewards.tolist(), strict=True):
            self.rewards.setdefault(prompt, deque(maxlen=self.size)).extend(row)
        advantages = whole_batch_advantages(rewards)
        for index, prompt in enumerate(prompts):
            if len(self.rewards[prompt]) >= self.min_count:
                past = rewards.new_tensor(list(self.rewards[prompt]))[None]
                advantages[index] = _standardise(rewards[index], past.double().mean(), _std(past, dim=1)[0])
        return advantages

    def state_dict(self) -> dict[str, list[float]]:
        return {prompt: list(rewards) for prompt, rewards in self.rewards.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.rewards = {p: deque(rewards, maxlen=self.size) for p, rewards in state.items()}


def _std(rewards: Float[Tensor, "P K"], *, dim: int) -> Float[Tensor, "P 1"]:
    return rewards.double().std(dim=dim, keepdim=True, correction=0)


def _standardise(rewards: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return torch.where(std > _MIN_STD, (rewards - mean) / std.clamp_min(_MIN_STD), 0.0).to(rewards.dtype)
