"""Rewards are tried before a model is loaded, so that mistakes in them are found within seconds."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.load import WeightedSum
from rlhf_t2i.rewards.rows import check_rows

TRIAL_SIZE = 64
"""Height and width of the images in pixels."""


@runtime_checkable
class _Servers(Protocol):
    """A reward on other machines; see `RemoteReward`."""

    def wait_until_reachable(self) -> None: ...


def try_rewards(reward: WeightedSum, prompts: Sequence[str]) -> None:
    """Call each of a user's own rewards (`module:function`) once, on two random images of the first prompts, or of one.

    Servers are asked whether they are there, and get no images. Raises ValueError for a prompt without what a reward
    needs (`check_rows`), ConnectionError if no server of a reward responds, and what `CheckedReward` does for a result
    that cannot be used; an exception of the reward is passed on, with a note. A score that is not finite is no error,
    as such images are no real ones.
    """
    images = trial_images(2)
    for term in reward.rewards:
        texts = [prompts[0], prompts[0 if term.needs_groups else min(1, len(prompts) - 1)]]
        check_rows(term.name, term.function, prompts)
        if isinstance(term.function, _Servers):
            term.function.wait_until_reachable()
        elif term.differentiable is None:
            try:
                with torch.no_grad():
                    replace(term, finite=False)(images, texts)
            except Exception as error:
                error.add_note(
                    f"The reward {term.name!r} was tried on two random images of {TRIAL_SIZE} x {TRIAL_SIZE} pixels, "
                    f"before the model is loaded."
                )
                raise


def trial_images(count: int) -> Float[Tensor, "B 3 Y X"]:
    """Return random images on the device that this process will use."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, 3, TRIAL_SIZE, TRIAL_SIZE, generator=generator)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true":
        return images
    return images.to(torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0"))))
