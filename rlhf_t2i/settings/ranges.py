"""Types of options with their range."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from rlhf_t2i.rewards.table import reward_names
from rlhf_t2i.settings.paths import Inputs, Prefix, Rewards
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_MODELS, TOY_PAIRS, TOY_PROMPT_SETS, TOY_REWARD_MODELS

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
BASE = "base"
"""Name of the model itself among weights."""
SAMPLED = "sampled"
"""Name of the pairs that Diffusion-DPO makes in each step, among preference data."""

InputPath = Annotated[str, Inputs()]
"""An existing file or folder: in a file of options, it may be relative to it. So may the others below."""
InputPaths = Annotated[str, Inputs(several=True)]
DataPaths = Annotated[str, Inputs(several=True, names=(TOY_PAIRS, SAMPLED))]
WeightsPaths = Annotated[str, Inputs(several=True, names=(BASE,))]
ModelPath = Annotated[str, Inputs(names=tuple(TOY_MODELS))]
PromptsPath = Annotated[str, Inputs(names=TOY_PROMPT_SETS)]
BackbonePath = Annotated[str, Inputs(names=(TOY_BACKBONE,))]
RewardModelPath = Annotated[str, Inputs(names=tuple(TOY_REWARD_MODELS))]
PathPrefix = Annotated[str, Prefix()]
RewardNames = Annotated[str, Rewards(reward_names())]
DifferentiableRewardNames = Annotated[str, Rewards(reward_names(differentiable=True))]
OneReward = Annotated[str, Rewards(reward_names(), several=False)]
MeasuredReward = Annotated[str, Rewards(several=False)]
"""One of the rewards that another option names."""
