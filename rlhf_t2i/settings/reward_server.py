"""Options of `python -m rlhf_t2i.reward_server`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from rlhf_t2i.settings.base import Group
from rlhf_t2i.settings.groups import MicrobatchSettings, RewardSettings
from rlhf_t2i.settings.ranges import NonNegativeFloat, PositiveInt, RewardNames
from rlhf_t2i.settings.server import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Config(MicrobatchSettings, ServerSettings, RewardSettings):
    """Settings of the reward server."""

    rewards: RewardNames = "llava_reward"
    """Rewards to serve, comma-separated NAME or NAME=WEIGHT, summed by weight (docs/rewards.md)."""
    device: Annotated[str, Group("system")] | None = None
    """Device of the rewards, such as cuda:1; null is a GPU if there is one, else the CPU."""
    max_body_mb: Annotated[PositiveInt, Group("system")] = 512
    """Largest size of one request, and of its images as float32, in MiB."""
    max_images: Annotated[PositiveInt, Group("system")] = 1024
    """Largest number of images in one request."""
    max_requests: Annotated[PositiveInt, Group("system")] = 64
    """Largest number of requests in progress; further ones are answered with status 503."""
    microbatch_size: PositiveInt = 64
    """Images in one forward pass, from as many requests as fit."""
    max_wait_ms: Annotated[NonNegativeFloat, Group("system")] = 5.0
    """Milliseconds that a request waits for others to share a forward pass."""
