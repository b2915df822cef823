"""Randomness by address: a generator is a pure function of what it is for, never of what was drawn before.

So nothing has to be stored to resume, and one process draws the very numbers that many would.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

SAMPLE, UPDATE, NOISE, RESAMPLE, CALIBRATE, ANNOTATE = range(6)
"""What a generator is for: the noise of a rollout, the order of an update, the noise put on finished images, which
particles have children, the images that a reward's spread is measured on, or what an annotator is shown."""


def seed_for(*address: int) -> int:
    """The seed that belongs to an address such as (seed, PAINT, step, prompt); numbers >= 0."""
    state = np.random.SeedSequence([len(address), *address]).generate_state(2, np.uint32)
    return int(state[0]) << 32 | int(state[1])


def generator_for(*address: int) -> torch.Generator:
    """The CPU generator that belongs to an address."""
    return torch.Generator().manual_seed(seed_for(*address))


def generators_for(seed: int, purpose: int, step: int, prompts: Sequence[int]) -> list[torch.Generator]:
    """One generator for each prompt of a step, whichever process paints it."""
    return [generator_for(seed, purpose, step, prompt) for prompt in prompts]
