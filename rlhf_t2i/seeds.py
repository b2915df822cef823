"""Random generators by address: a generator is a pure function of what it is for, never of earlier draws.

So a run stores no generator state to resume, and the numbers do not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

SAMPLE, UPDATE, NOISE, RESAMPLE, CALIBRATE, ANNOTATE, AUGMENT = range(7)
"""Purpose of a generator: noise of sampling, order of an update, noise added to finished images, resampling of
particles, calibration samples of a reward, the order of an annotator's questions, changes of preference pairs."""


def seed_for(*address: int) -> int:
    """Return the 64-bit seed of an address such as (seed, SAMPLE, step, prompt); numbers must be at least 0."""
    state = np.random.SeedSequence([len(address), *address]).generate_state(2, np.uint32)
    return int(state[0]) << 32 | int(state[1])


def generator_for(*address: int) -> torch.Generator:
    """Return the CPU generator of an address."""
    return torch.Generator().manual_seed(seed_for(*address))


def generators_for(seed: int, purpose: int, step: int, prompts: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per prompt of a step, by the prompt's index in the step; the same on every process."""
    return [generator_for(seed, purpose, step, prompt) for prompt in prompts]
