"""Scorers of other projects (CLIPScore, PickScore, HPS, ImageReward, aesthetics, VQAScore) and VLMs as rewards.

This module and `llava_reward` are the only ones under rewards/ that import `reward_model`.
"""

from __future__ import annotations

from reward_model.scorers.load import load_function
from reward_model.scorers.soft_tifa import SoftTifa, load_soft_tifa
from reward_model.scorers.text_reader import load_text_reader

__all__ = ["SoftTifa", "load_function", "load_soft_tifa", "load_text_reader"]
