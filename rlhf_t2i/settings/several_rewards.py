"""Options of recipes that make advantages of several rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_t2i.rewards.terms import join_terms, reward_names_of
from rlhf_t2i.settings.groups import RewardSettings
from rlhf_t2i.settings.ranges import OneReward


@dataclass(frozen=True, kw_only=True)
class SeveralRewardsSettings(RewardSettings, group="reward"):
    """Several rewards of which advantages are made."""

    combine_rewards: Literal["sum", "standardised_sum", "gdpo"] = "sum"
    """Combination of several rewards: their weighted sum; the weighted sum after each is divided by its standard
    deviation over all images of the step; or the weighted sum of the advantages of each (GDPO, arXiv:2601.05242)."""
    veto: OneReward | None = None
    """Reward that images must pass, one NAME (docs/rewards.md); one that fails gets the lowest advantage of its prompt,
    and at most -1. null excludes none."""
    veto_below: float = 0.0
    """Score of the veto reward below which an image fails."""

    @property
    def scored_rewards(self) -> str:
        """The rewards that sampled images are scored with; the veto has a weight of 0 in their sum."""
        if self.veto is None or self.veto in reward_names_of(self.rewards):
            return self.rewards
        return f"{self.rewards},{join_terms([self.veto])}=0"
