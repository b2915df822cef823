"""Scorers of other projects (CLIPScore, PickScore, HPS, ImageReward, aesthetics, VQAScore) as rewards.

This module and `llava_reward` are the only ones under rewards/ that import `reward_model`.
"""

from __future__ import annotations

from reward_model.scorers.load import load_function
from reward_model.scorers.soft_tifa import SoftTifa, load_soft_tifa

__all__ = ["SoftTifa", "load_function", "load_soft_tifa"]
