"""Types that cross from one file to another.

Every diffusion process here is x = alpha * clean + sigma * noise. A `Schedule` lists noise levels, a model returns a
`Prediction` of both parts whatever it was trained to output, and one reverse step is a Gaussian `Transition`.
All per-level numbers are tensors with one entry per image, so a batch may mix denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Resolution = int | tuple[int, int]
"""Size of images in pixels: the side of squares, or height and width."""


@dataclass(frozen=True, slots=True)
class Level:
    """Noise level of each latent of a batch: x = alpha * clean + sigma * noise."""

    alpha: Float[Tensor, " B"]
    sigma: Float[Tensor, " B"]
    model_time: Float[Tensor, " B"]
    """Time input of the network, in the network's own units (0 to 999 for Stable Diffusion)."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise levels that an image passes, from pure noise (index 0) to clean (index T)."""

    alpha: Float[Tensor, " levels"]
    sigma: Float[Tensor, " levels"]
    model_time: Float[Tensor, " levels"]
    kind: Literal["diffusion", "flow"] = "diffusion"
    """Forward process: alpha^2 + sigma^2 = 1 for "diffusion", alpha + sigma = 1 for "flow"."""

    @property
    def num_steps(self) -> int:
        return len(self.alpha) - 1

    def at(self, index: Int[Tensor, " B"]) -> Level:
        """Return the level of each image of a batch after `index` denoising steps."""
        index = index.to(self.alpha.device)
        return Level(self.alpha[index], self.sigma[index], self.model_time[index])


@dataclass(frozen=True, slots=True)
class Prediction:
    """Clean and noise parts that a model predicts of noisy latents, whatever it was trained to output."""

    clean: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]


@dataclass(frozen=True, slots=True)
class Transition:
    """One reverse step: p(x_next | x) = Normal(mean, std^2 I)."""

    mean: Float[Tensor, "B C H W"]
    std: Float[Tensor, " B"]
    """Standard deviation of the step with every factor included; 0 for a deterministic step."""


@dataclass(frozen=True, slots=True)
class Conditioning:
    """Encoded prompts of a batch, as the denoiser takes them."""

    states: Float[Tensor, "B L D"]
    """Hidden states of the text encoders, one row per token."""
    pooled: Float[Tensor, "B E"] | None = None
    """One vector per prompt, for models that take one."""
    mask: Bool[Tensor, "B L"] | None = None
    """True for real tokens, False for padding; None if the model attends to every row of `states`."""
    image: Float[Tensor, "B C Y X"] | None = None
    """Clean latents of the reference images that the prompts say how to edit; None for prompts without."""

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name; `Conditioning(**parts)` is the inverse."""
        fields = {"states": self.states, "pooled": self.pooled, "mask": self.mask, "image": self.image}
        return {name: tensor for name, tensor in fields.items() if tensor is not None}

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, index: slice | Int[Tensor, " N"]) -> Conditioning:
        """Return some rows of the batch, as a tensor's index does."""
        return self._map(lambda tensor: tensor[index])

    def repeat(self, count: int) -> Conditioning:
        """Return the whole batch `count` times in a row: (a, b) becomes (a, b, a, b)."""
        return self._map(lambda tensor: tensor.repeat(count, *[1] * (tensor.dim() - 1)))

    def to(self, target: torch.device | torch.dtype) -> Conditioning:
        """Move to a device, or convert all parts but `mask` to a floating point type."""
        keeps_mask = isinstance(target, torch.dtype)
        return self._map(lambda tensor: tensor if keeps_mask and tensor.dtype == torch.bool else tensor.to(target))

    @staticmethod
    def cat(batches: Sequence[Conditioning]) -> Conditioning:
        """Concatenate batches of one model along the batch dimension."""
        return Conditioning(**{name: torch.cat([batch.parts[name] for batch in batches]) for name in batches[0].parts})

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: function(tensor) for name, tensor in self.parts.items()})


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Conditioning of a batch that holds each distinct prompt once."""

    distinct: Conditioning
    index: Int[Tensor, " B"]
    """Row of `distinct` of each prompt of the batch."""

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Int[Tensor, " N"]) -> Conditioning:
        """Return the conditioning of some rows of the batch."""
        return self.distinct[self.index[rows]]


@dataclass(frozen=True, slots=True)
class Trajectory:
    """Sampling record of a batch of images, in float32, from which an update replays every denoising step."""

    conditioning: EncodedPrompts
    log_probs: Float[Tensor, "B T"]
    """Log-probability of each step, averaged over latent dimensions (`diffusion.gaussian.mean_log_prob`)."""
    latents: Float[Tensor, "B T+1 C H W"]
    num_rows: int
    """Images in each forward pass of the rollout; a replay is exact in half precision only with as many."""


@runtime_checkable
class Dynamics(Protocol):
    """Distribution of the next latents, given a prediction at one level; `partial(ddim, eta=1.0)` is one."""

    def __call__(
        self,
        latents: Float[Tensor, "B C H W"],
        prediction: Prediction,
        level: Level,
        next_level: Level,
    ) -> Transition: ...


@dataclass(frozen=True, slots=True)
class Sampler:
    """Noise levels, dynamics and guidance of sampling."""

    schedule: Schedule
    dynamics: Dynamics
    guidance_scale: float = 1.0
    """Scale of classifier-free guidance; 1 is off."""


@runtime_checkable
class DiffusionModel(Protocol):
    """A text-to-image diffusion model that can be sampled from."""

    def schedule(self, num_steps: int) -> Schedule: ...

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Tensor:
        """Draw latents at index 0 of a schedule, `copies` from each generator: (G * copies, C, H, W)."""
        ...

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def predict(
        self,
        latents: Float[Tensor, "B C H W"],
        level: Level,
        conditioning: Conditioning,
        *,
        guidance_scale: float,
    ) -> Prediction: ...

    def num_calls(self, guidance_scale: float) -> int:
        """Return the number of denoiser evaluations per image and prediction: 2 with classifier-free guidance."""
        ...

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Return images with a nominal range of [0, 1], not clamped, so that saturated pixels keep a gradient."""
        ...


@runtime_checkable
class Policy(DiffusionModel, Protocol):
    """A text-to-image diffusion model that can be trained."""

    denoiser: nn.Module
    """The trained network as the distribution strategy wraps it."""
    reference: nn.Module | None
    """A frozen copy of the network before training, wrapped in the same way; None if it is not needed."""

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        ...

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of generated images, in pixels."""
        ...

    @property
    def size_unit(self) -> int:
        """Pixels that the sides of images must be multiples of."""
        ...

    def encode_images(
        self, images: Float[Tensor, "B 3 Y X"], *, generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Return the clean latents of images in [0, 1], the inverse of `decode`."""
        ...

    def levels_at(self, times: Int[Tensor, " B"]) -> Level:
        """Return the noise levels of the model's training, by index: 0 is nearly clean."""
        ...

    def to_output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        """Convert a prediction to the network's parameterisation: noise, v or velocity."""
        ...

    def fingerprint(self, part: Literal["autoencoder", "text encoder"]) -> str:
        """Return a hash of a frozen part; equal hashes mean equal outputs."""
        ...

    def export(self, folder: Path, weights: Mapping[str, Tensor], *, kohya: bool = False) -> Path:
        """Write unsharded trained weights, given by name, in diffusers' format; return the subfolder of `folder`.

        With `kohya` a LoRA is also written in Kohya's key layout.
        """
        ...

    def as_reference(self) -> AbstractContextManager[None]:
        """Return a context in which `predict` uses the weights from before training."""
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
    """Score of each image for its prompt, higher is better; any callable of this shape is a reward."""

    def __call__(self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]: ...


@runtime_checkable
class MetadataReward(Protocol):
    """A reward that also takes the row of each prompt."""

    def __call__(
        self, images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str], metadata: list[dict[str, Any]]
    ) -> Float[Tensor, " B"]: ...
