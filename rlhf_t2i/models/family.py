"""What tells one family of models from another: how it reads, what its network is told, how noise is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.models.autoencoder import Autoencoder
from rlhf_t2i.models.text_encoders import TextEncoder
from rlhf_t2i.types import Level, Prediction, Schedule


@runtime_checkable
class Levels(Protocol):
    """The levels of noise that a model knows, and what its output says at each of them."""

    scheduler: Any
    """What steps along them in diffusers."""

    def schedule(self, num_steps: int) -> Schedule: ...

    def at(self, times: Int[Tensor, " B"]) -> Level:
        """The levels that the model was trained at, by their number: 0 is nearly clean."""
        ...

    def prediction(
        self, latents: Float[Tensor, "B C H W"], output: Float[Tensor, "B C H W"], level: Level
    ) -> Prediction:
        """What the output of a network means."""
        ...

    def output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        """What the network would have to put out to mean this."""
        ...


@runtime_checkable
class Family(Protocol):
    """The parts of a diffusers pipeline, placed on a device; a `PipelinePolicy` does with them what all do alike."""

    pipeline_class: ClassVar[type[Any]]
    """Of diffusers: what loads a folder and saves adapters."""
    component: ClassVar[Literal["unet", "transformer"]]
    """What the pipeline calls its denoiser."""
    lora_targets: ClassVar[Sequence[str]]
    """How the names of layers end that adapters are put on."""
    is_told_guidance: ClassVar[bool]
    """Whether the network takes the scale as an input, where others are asked a second time without a prompt."""
    network: Any
    """The denoiser itself."""
    text_encoders: Sequence[TextEncoder]
    autoencoder: Autoencoder
    levels: Levels
    latent_shape: tuple[int, int, int]
    """Channels, height and width."""

    def read(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """All that the network is told of prompts, in one tensor: so it can be kept, cached and sent as a whole."""
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
        """What `network` (the denoiser, its reference, or either spread over processes) puts out, in float32."""
        ...


@runtime_checkable
class FamilyClass(Protocol):
    """The class of a family: what is known of it before there is a pipeline, and what makes one of a pipeline."""

    @property
    def pipeline_class(self) -> type[Any]: ...
    @property
    def title(self) -> str:
        """What people call such models."""
        ...

    @property
    def tag(self) -> str:
        """What the Hub finds them by."""
        ...

    @property
    def is_flow(self) -> bool:
        """Whether diffusers paints with a flow's scheduler, which is the run's own; otherwise DDIM is the run's."""
        ...

    @property
    def guidance_when_off(self) -> float:
        """The guidance_scale at which the stock pipeline gives none; a scale here of 1 + g is g more than that."""
        ...

    @property
    def component(self) -> Literal["unet", "transformer"]: ...
    @property
    def lora_targets(self) -> Sequence[str]: ...

    def __call__(
        self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, resolution: int | None = None
    ) -> Family: ...


def latent_size(resolution: int | None, own: int | Sequence[int], *, scale: int, patch: int = 1) -> tuple[int, int]:
    """Height and width of latents for square images of so many pixels; None is the model's `own` size.

    `scale` is how many pixels a latent has, `patch` how many latents the network takes at once. Raises ValueError for
    a resolution that cannot be cut into them.
    """
    if resolution is None:
        return (own, own) if isinstance(own, int) else (own[0], own[1])
    if resolution < 1 or resolution % (scale * patch):
        raise ValueError(f"resolution is {resolution}; for this model it must be a multiple of {scale * patch}.")
    return resolution // scale, resolution // scale
