"""Classifier-free guidance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor


def classifier_free(
    denoise: Callable[[Tensor, Tensor, Tensor], Tensor],
    latents: Float[Tensor, "B C H W"],
    model_time: Float[Tensor, " B"],
    conditioning: Float[Tensor, "B L D"],
    *,
    empty: Float[Tensor, "1 L D"],
    guidance_scale: float,
) -> Float[Tensor, "B C H W"]:
    """What a network puts out, drawn away from what it would without a prompt (arXiv:2207.12598).

        output = unconditional + guidance_scale * (conditional - unconditional)

    A scale of 1 is off, and asks the network once instead of twice. `empty` is what it is told without a prompt.
    """
    if guidance_scale <= 1:
        return denoise(latents, model_time, conditioning)
    both = denoise(
        torch.cat([latents, latents]),
        torch.cat([model_time] * 2),
        torch.cat([empty.expand_as(conditioning), conditioning]),
    )
    unconditional, conditional = both.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


class ClassifierFree(ABC):
    """What families of models share whose guidance is classifier-free."""

    is_told_guidance: ClassVar[bool] = False
    guidance_when_off: ClassVar[float] = 1.0
    empty: Tensor
    """What the network is told without a prompt, (1, L, D)."""

    @abstractmethod
    def denoise(self, network: Any, latents: Tensor, model_time: Tensor, conditioning: Tensor) -> Tensor:
        """What `network` puts out, without guidance, in float32."""
        ...

    def output(
        self,
        network: Any,
        latents: Float[Tensor, "B C H W"],
        model_time: Float[Tensor, " B"],
        conditioning: Float[Tensor, "B L D"],
        *,
        guidance_scale: float,
    ) -> Float[Tensor, "B C H W"]:
        """What `network` puts out, guided."""
        return classifier_free(
            partial(self.denoise, network), latents, model_time, conditioning,
            empty=self.empty, guidance_scale=guidance_scale,
        )  # fmt: skip
