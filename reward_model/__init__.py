"""Teach a judge: LLaVA-Reward (arXiv:2507.21391), a multimodal LLM that says how well an image serves a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reward_model.scoring import LlavaReward

__all__ = ["LlavaReward"]


def __getattr__(name: str) -> object:
    """Import the judge, which takes seconds, when it is asked for."""
    if name == "LlavaReward":
        from reward_model.scoring import LlavaReward

        return LlavaReward
    raise AttributeError(f"module 'reward_model' has no attribute {name!r}")
