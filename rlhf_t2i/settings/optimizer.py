"""Options of the optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_t2i.settings.base import Settings
from rlhf_t2i.settings.ranges import Decay, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings, group="optimiser"):
    """The optimiser and its learning rate."""

    optimizer: Literal["adamw", "adam", "sgd", "adamw_8bit"] = "adamw"
    """Optimiser: AdamW, Adam (its weight decay is part of the gradient), SGD with momentum adam_beta1 (half the state),
    or AdamW with its state in 8 bits (a quarter, for weights of 4,096 elements or more; bitsandbytes). sgd is not
    available with ZeRO, adamw_8bit with ZeRO and FSDP2."""
    learning_rate: PositiveFloat = 3e-4
    """Highest learning rate, reached after warmup_steps."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up: constant, or falling to zero at num_steps along a cosine or a line
    (linear)."""
    warmup_steps: NonNegativeInt = 0
    """Training steps over which the learning rate rises linearly from zero."""
    adam_beta1: Decay = 0.9
    """Decay of the mean of gradients; with sgd, the momentum."""
    adam_beta2: Decay = 0.999
    """Decay of the mean of squared gradients (adamw, adam)."""
    adam_epsilon: PositiveFloat = 1e-8
    """Number that is added to the denominator of a step (adamw, adam)."""
    weight_decay: NonNegativeFloat = 1e-4
    """Factor of weight decay; with adamw it is decoupled from the gradient."""
    max_gradient_norm: PositiveFloat = 1.0
    """Norm to which gradients over all trained weights are clipped."""
    max_skipped_updates: PositiveInt = 10
    """Consecutive updates that may be skipped for a gradient that is not finite, before the run stops."""
    ema_decay: Decay = 0.0
    """Decay per step of an exponential moving average (EMA) of the weights, which is evaluated and exported in their
    place; 0 keeps no average."""
    num_steps: PositiveInt = 40
    """Number of training steps, after which the weights are exported."""
