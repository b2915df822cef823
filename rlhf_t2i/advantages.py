"""Better than what? Rewards of P prompts with K images each become advantages."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_FLAT = 1e-6
"""A spread of rewards below this counts as none."""


def group_relative_advantages(rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """How much better each image is than its K siblings, in standard deviations of its group.

    A group whose images all earn the same reward teaches nothing and gets exact zeros (arXiv:2402.03300).
    """
    return _standardise(rewards, rewards.double().mean(dim=1, keepdim=True), _std(rewards, dim=1))


def whole_batch_advantages(rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """How much better each image is than all images of this step, in their standard deviations."""
    flat = rewards.flatten()[None]
    return _standardise(rewards, flat.double().mean(dim=1), _std(flat, dim=1)[0])


def globally_scaled_advantages(rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
    """How much better each image is than its K siblings, in standard deviations of all rewards of this step.

    Groups that differ little then count little (Flow-GRPO's `global_std`, arXiv:2505.05470). A group whose images all
    earn the same reward gets exact zeros.
    """
    std = _std(rewards.flatten()[None], dim=1)[0]
    scaled = _standardise(rewards, rewards.double().mean(dim=1, keepdim=True), std)
    return torch.where(_std(rewards, dim=1) > _FLAT, scaled, 0.0)


def num_degenerate_groups(rewards: Float[Tensor, "P K"]) -> int:
    """How many groups teach nothing, because their images all earn the same reward."""
    return int((_std(rewards, dim=1) <= _FLAT).sum())


class PerPromptHistory:
    """DDPO's advantages (arXiv:2305.13301, appendix): better than what this prompt earned of late.

    Each prompt remembers its last `size` rewards, this step's among them. Until it knows `min_count` of them,
    it is compared with the whole batch.
    """

    def __init__(self, *, size: int, min_count: int) -> None:
        """Raises ValueError for a `min_count` that is never reached."""
        if not 0 < min_count <= size:
            raise ValueError(
                f"history_min_count ({min_count}) must be between 1 and history_size ({size}); otherwise a prompt's "
                f"own history is never used."
            )
        self.size, self.min_count = size, min_count
        self.rewards: dict[str, deque[float]] = {}

    def __call__(self, prompts: Sequence[str], rewards: Float[Tensor, "P K"]) -> Float[Tensor, "P K"]:
        """Remember the rewards, then return the advantages; `prompts` names the P rows."""
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
    return torch.where(std > _FLAT, (rewards - mean) / std.clamp_min(_FLAT), 0.0).to(rewards.dtype)
