"""The vocabulary of the toolkit: what crosses from one file to another.

Every diffusion process here is x = alpha * clean + sigma * noise. A `Schedule` lists levels of noise, a model answers
with a `Prediction` of both parts whatever it was trained to output, and one reverse step is a Gaussian `Transition`.
All per-level numbers are tensors with one entry per image, so a batch may mix denoising steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Level:
    """How noisy each latent of a batch is: x = alpha * clean + sigma * noise."""

    alpha: Float[Tensor, " B"]
    sigma: Float[Tensor, " B"]
    model_time: Float[Tensor, " B"]
    """What the network is told, in its own units (0..999 for Stable Diffusion)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """The levels an image passes on its way from noise (index 0) to clean (index T)."""

    alpha: Float[Tensor, " levels"]
    sigma: Float[Tensor, " levels"]
    model_time: Float[Tensor, " levels"]
    kind: Literal["diffusion", "flow"] = "diffusion"
    """What an image turns into noise by: alpha^2 + sigma^2 = 1, or alpha + sigma = 1."""

    @property
    def num_steps(self) -> int:
        return len(self.alpha) - 1

    def at(self, index: Int[Tensor, " B"]) -> Level:
        """The level of each image of a batch, given how many steps it has taken."""
        index = index.to(self.alpha.device)
        return Level(self.alpha[index], self.sigma[index], self.model_time[index])


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model sees in a noisy latent, free of its parameterisation (noise, v or velocity)."""

    clean: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]


@dataclass(frozen=True, slots=True)
class Transition:
    """One reverse step: p(x_next | x) = Normal(mean, std^2 I)."""

    mean: Float[Tensor, "B C H W"]
    std: Float[Tensor, " B"]
    """The whole standard deviation of the step, every factor included; 0 where the step is deterministic."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Everything an update needs to replay how a batch of images was painted, in float32."""

    conditioning: Float[Tensor, "B L D"]
    log_probs: Float[Tensor, "B T"]
    latents: Float[Tensor, "B T+1 C H W"]


@runtime_checkable
class Dynamics(Protocol):
    """How a sampler steps from one level to the next; `partial(ddim, eta=1.0)` is one."""

    def __call__(
        self,
        latents: Float[Tensor, "B C H W"],
        prediction: Prediction,
        level: Level,
        next_level: Level,
    ) -> Transition: ...


@dataclass(frozen=True, slots=True)
class Sampler:
    """How images are painted: along which levels, by which step, with how much guidance."""

    schedule: Schedule
    dynamics: Dynamics
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off."""


@runtime_checkable
class DiffusionModel(Protocol):
    """A text-to-image model seen as something that paints."""

    def schedule(self, num_steps: int) -> Schedule: ...

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Tensor:
        """Latents at index 0 of a schedule, `copies` from each generator: (G * copies, C, H, W)."""
        ...

    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]: ...

    def predict(
        self,
        latents: Float[Tensor, "B C H W"],
        level: Level,
        conditioning: Float[Tensor, "B L D"],
        *,
        guidance_scale: float,
    ) -> Prediction: ...

    def num_calls(self, guidance_scale: float) -> int:
        """How often the denoiser is asked for one prediction: twice with classifier-free guidance."""
        ...

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Images in [0, 1]; values beyond it are kept, so that a gradient survives."""
        ...


@runtime_checkable
class Policy(DiffusionModel, Protocol):
    """A text-to-image model seen as something that can be taught."""

    denoiser: nn.Module
    """The network that learns, as it is spread over several processes."""
    reference: nn.Module | None
    """A frozen copy of it, if one is needed and was kept; spread in the same way."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images it paints."""
        ...

    def encode_images(
        self, images: Float[Tensor, "B 3 Y X"], *, generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Clean latents of images in [0, 1]: what `decode` makes images of."""
        ...

    def levels_at(self, times: Int[Tensor, " B"]) -> Level:
        """The levels of noise that the model was trained at, by their number: 0 is nearly clean."""
        ...

    def output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        """A prediction in the model's own terms: the noise, or v = alpha noise - sigma clean."""
        ...

    def fingerprint(self, part: Literal["autoencoder", "text encoder"]) -> str:
        """A hash of a frozen part: equal if it gives equal answers."""
        ...

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write trained weights, whole and by name, in a form that others load; returns where in `folder` they lie."""
        ...

    def as_reference(self) -> AbstractContextManager[None]:
        """Within it, `predict` answers as the model did before training."""
        ...


@runtime_checkable
class ProcessGroup(Protocol):
    """Processes that share a task."""

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        ...

    @property
    def num_processes(self) -> int: ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes, in the order of their ranks. Collective."""
        ...


@runtime_checkable
class Reward(Protocol):
    """How good are these images? Any callable of this shape is a reward."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]: ...
