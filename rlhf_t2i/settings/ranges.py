"""Types of options with their range."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from rlhf_t2i.rewards.table import reward_names
from rlhf_t2i.settings.base import Inputs, Names

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
PositiveFraction = Annotated[float, Gt(0), Le(1)]
Decay = Annotated[float, Ge(0), Lt(1)]
"""How much an average keeps of itself, and other numbers that must stay below 1."""
Port = Annotated[int, Ge(0), Le(65535)]
Precision = Literal["no", "fp16", "bf16"]
InputPaths = Annotated[str, Inputs()]
"""Existing files or folders: in a file of options, they may be relative to it."""
RewardNames = Annotated[str, Names(reward_names())]
DifferentiableRewardNames = Annotated[str, Names(reward_names(differentiable=True))]
