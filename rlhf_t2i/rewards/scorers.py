"""Well-known judges (CLIPScore, PickScore, HPS, ImageReward, VQAScore) as rewards: a second door to `reward_model`."""

from __future__ import annotations

from reward_model.scorers.load import load_function

__all__ = ["load_function"]
