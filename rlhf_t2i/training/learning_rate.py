"""Learning rate of each training step, a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from rlhf_t2i.settings.optimizer import OptimizerSettings


def learning_rates(config: OptimizerSettings) -> Callable[[int], float]:
    """Return a function from a training step, from 0, to its learning rate.

    It rises linearly over warmup_steps, whose last one has the full rate, and then is that of transformers' schedule:
    constant, or falling so that it would be zero after num_steps.
    """
    from transformers.optimization import get_scheduler  # takes seconds

    name = "constant_with_warmup" if config.lr_scheduler == "constant" else config.lr_scheduler
    # transformers' first step of a warm-up has a rate of zero; leave that one out.
    first = 1 if config.warmup_steps else 0
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    schedule: Any = get_scheduler(
        name, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.num_steps + first
    )
    [factor] = schedule.lr_lambdas
    return lambda step: config.learning_rate * factor(step + first)
