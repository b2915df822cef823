"""Base class of all model families: a diffusers pipeline as a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.distributed.meta import placed
from rlhf_t2i.models.autoencoder import Autoencoder
from rlhf_t2i.models.export import export_denoiser, export_lora
from rlhf_t2i.models.fingerprint import fingerprint_of
from rlhf_t2i.models.levels import Levels
from rlhf_t2i.models.lora import LoraConfiguration, add_lora, has_lora, lora_reference, target_layers, trainable
from rlhf_t2i.models.quiet import only_errors
from rlhf_t2i.models.reference import frozen_copy
from rlhf_t2i.models.reference_images import encode_rows
from rlhf_t2i.models.text_encoders import UNCONDITIONAL, PromptCache, PromptStore, TextEncoder, TruncationWarnings
from rlhf_t2i.types import Conditioning, Level, Prediction, Resolution, Schedule


class DiffusionPolicy(ABC):
    """A pipeline's frozen text encoders and autoencoder, and a denoiser that can be trained.

    A family of models is a subclass: class attributes and three methods, `load_parts`, `encode_prompts` and `denoise`.
    """

    pipeline_class: ClassVar[type[Any]]
    """The diffusers pipeline that loads a folder and saves LoRA weights."""
    title: ClassVar[str]
    """Name of the family in prose."""
    tag: ClassVar[str]
    """Tag of the family on the Hugging Face Hub."""
    is_flow: ClassVar[bool]
    """True if the stock pipeline samples with a flow scheduler, False for a diffusion scheduler such as DDIM."""
    component: ClassVar[Literal["unet", "transformer"]]
    """Name of the denoiser in the pipeline."""
    lora_targets: ClassVar[Sequence[str]]
    """Name endings of the attention layers that get LoRA adapters."""
    mlp_targets: ClassVar[Sequence[str]] = ("ff.net.0.proj", "ff.net.2")
    """Name endings of the layers that `attention_mlp` adds."""
    embeds_guidance: ClassVar[bool] = False
    """True if guidance is an input of the network, False if it takes a second forward pass."""
    replaces_solver: ClassVar[bool] = False
    """True if a flow model is saved with a multistep solver; the policy and its publications take Euler steps."""

    text_encoders: Sequence[TextEncoder]
    autoencoder: Autoencoder
    levels: Levels
    latent_shape: tuple[int, int, int]
    """Channels, height and width of the latents of one image."""
    patch: int = 1
    """Side in latents of the square that is one token; 1 for a U-Net."""

    def __init__(
        self, pipeline: Any, *, device: torch.device, dtype: torch.dtype, resolution: Resolution | None = None,
        offload_text_encoders: bool = False, prompt_store: PromptStore | None = None,
    ) -> None:  # fmt: skip
        """Take a loaded pipeline's parts; compute, and hold frozen weights, in `dtype`.

        `resolution` is that of generated images; None is the model's own. With `offload_text_encoders`
        these are on the device only while they encode new prompts. Encoded prompts are kept in `prompt_store`. Raises
        ValueError for a pipeline that cannot be trained.
        """
        self.device, self.dtype = device, dtype
        self.network: Any = placed(getattr(pipeline, self.component).requires_grad_(False).eval(), device)
        self.denoiser: nn.Module = self.network
        self.reference: nn.Module | None = None
        self.network_class = type(self.network)
        self.prompt_store = prompt_store
        self._cache, self._truncation = PromptCache(store=prompt_store), TruncationWarnings()
        self.load_parts(pipeline, resolution)
        self._offloads_text_encoders = offload_text_encoders
        if not offload_text_encoders:
            self._place_text_encoders(device)
        self.unconditional = None
        if not self.embeds_guidance:
            self.unconditional = self._encoded([UNCONDITIONAL], lambda _: self.encode_unconditional())

    # --- what a family defines ---

    @abstractmethod
    def load_parts(self, pipeline: Any, resolution: Resolution | None) -> None:
        """Set `text_encoders`, `autoencoder`, `levels` and `latent_shape`; ValueError for an unsupported pipeline."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Run the text encoders, without cache."""

    @abstractmethod
    def denoise(
        self, latents: Float[Tensor, "B C H W"], model_time: Float[Tensor, " B"], conditioning: Conditioning
    ) -> Float[Tensor, "B C H W"]:
        """Run `denoiser` without guidance; the output is float32."""

    def encode_unconditional(self) -> Conditioning:
        """Return the conditioning of the unconditional pass of classifier-free guidance, a batch of one."""
        return self.encode_prompts([""])

    def guided(
        self, latents: Float[Tensor, "B C H W"], model_time: Float[Tensor, " B"], conditioning: Conditioning, *,
        guidance_scale: float,
    ) -> Float[Tensor, "B C H W"]:  # fmt: skip
        """Return the network output with classifier-free guidance (arXiv:2207.12598), in float32.

            output = unconditional + guidance_scale * (conditional - unconditional)

        Both are rows of one forward pass, with one reference image. A scale of 1 is off: only the conditional half.
        """
        if guidance_scale <= 1 or self.unconditional is None:
            return self.denoise(latents, model_time, conditioning)
        without = replace(self.unconditional.repeat(len(conditioning)), image=conditioning.image)
        inputs = torch.cat([latents, latents]), torch.cat([model_time, model_time])
        unconditional, conditional = self.denoise(*inputs, Conditioning.cat([without, conditioning])).chunk(2)
        return self.combined(unconditional, conditional, guidance_scale)

    def leave_out_instruction(self) -> None:
        """Encode prompts without the instruction that the stock pipeline puts before them; ValueError without one."""
        raise ValueError(f"complex_human_instruction is False; it must be true for {self.title}, which has none.")

    def combined(self, unconditional: Tensor, conditional: Tensor, guidance_scale: float) -> Tensor:
        """Return the guided output from the two halves."""
        return unconditional + guidance_scale * (conditional - unconditional)

    @classmethod
    def stock_arguments(cls, guidance_scale: float) -> dict[str, Any]:
        """Return the arguments with which a call of the stock pipeline samples as the policy does; scale 1 is off."""
        return {"guidance_scale": guidance_scale}

    # --- training ---

    def set_trainable(self, lora: LoraConfiguration | None, *, keep_reference: bool, seed: int) -> None:
        """Train LoRA adapters, initialised from `seed`; None trains the full denoiser in float32.

        With `keep_reference` a frozen copy of the full denoiser is kept for `as_reference`, unless there is one from
        before; adapters need none.
        """
        if lora is not None:
            with only_errors():
                self.network.to(self.dtype)
            add_lora(self.network, lora, self.target_layers(self.network, lora.targets), seed=seed)
            return
        if keep_reference and self.reference is None:
            self.keep_reference()
        self.network.float().requires_grad_(True)

    @classmethod
    def target_layers(cls, network: nn.Module, chosen: str | None) -> Sequence[str]:
        """Return name endings of the layers of a denoiser that the option lora_targets stands for."""
        return target_layers(chosen, network, attention=cls.lora_targets, mlp=cls.mlp_targets)

    def keep_reference(self) -> None:
        """Keep a frozen copy of the denoiser as it is now for `as_reference`."""
        self.reference = frozen_copy(self.network, dtype=self.dtype)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        self.network.enable_gradient_checkpointing()

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Context in which the text encoders are on the device."""
        if not self._offloads_text_encoders:
            yield
            return
        self._place_text_encoders(self.device)
        yield
        self._place_text_encoders(torch.device("cpu"))

    def _place_text_encoders(self, device: torch.device) -> None:
        for encoder in self.text_encoders:
            encoder.model.to(device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters, by name."""
        return trainable(self.network)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Predict with the reference model: a frozen copy, a frozen LoRA, or the denoiser without its LoRA.

        Raises RuntimeError if a full denoiser is trained and no copy was kept.
        """
        if self.reference is None and has_lora(self.network):
            with lora_reference(self.network):
                yield
            return
        if self.reference is None:
            raise RuntimeError("No reference was kept: call set_trainable(..., keep_reference=True).")
        trained, self.denoiser = self.denoiser, self.reference
        try:
            yield
        finally:
            self.denoiser = trained

    # --- sampling ---

    def schedule(self, num_steps: int) -> Schedule:
        """Return the levels that the stock pipeline passes in `num_steps` steps, from noise to clean.

        Raises ValueError for a number of steps that the model's schedule does not allow.
        """
        return self.levels.schedule(num_steps)

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Float[Tensor, "B C H W"]:
        """Draw pure noise, `copies` latents from each generator."""
        return randn((len(generators) * copies, *self.latent_shape), generators=generators, device=self.device)

    @torch.no_grad()
    def _encoded(self, prompts: Sequence[str], encoder: Callable[[Sequence[str]], Conditioning]) -> Conditioning:
        with nullcontext() if self._cache.has(prompts) else self._encoding():
            return self._cache.encode(prompts, encoder).to(self.device)

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts and their reference images, each distinct one once; warn once of each that is truncated."""
        self._truncation.warn(prompts, self.text_encoders)
        return self._encoded(prompts, partial(encode_rows, self))

    def predict(
        self, latents: Float[Tensor, "B C H W"], level: Level, conditioning: Conditioning, *, guidance_scale: float
    ) -> Prediction:
        """Predict the clean and noise parts of noisy latents, in float32; guided if the scale is above 1."""
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)
        with autocast:
            output = self.guided(latents, level.model_time, conditioning, guidance_scale=guidance_scale)
        return self.levels.to_prediction(latents, output, level)

    def num_calls(self, guidance_scale: float) -> int:
        """Return the number of denoiser evaluations per image and prediction."""
        return 2 if guidance_scale > 1 and not self.embeds_guidance else 1

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Return images with a nominal range of [0, 1], not clamped."""
        return self.autoencoder.decode(latents)

    # --- training on existing images ---

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of generated images, in pixels."""
        _, height, width = self.latent_shape
        return height * self.autoencoder.pixels_per_latent, width * self.autoencoder.pixels_per_latent

    @property
    def size_unit(self) -> int:
        """Pixels that the sides of images must be multiples of."""
        return self.patch * self.autoencoder.pixels_per_latent

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "B 3 Y X"], *, generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """Return the clean latents of images in [0, 1]: an autoencoder's mean or, with generators, a draw."""
        return self.autoencoder.encode(images, generators=generators)

    def levels_at(self, times: Int[Tensor, " B"]) -> Level:
        """Return the noise levels of the model's training: 0 is nearly clean, 999 (for most models) nearly pure noise.

        Raises ValueError for an index outside of that range.
        """
        return self.levels.at(times)

    def to_output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        """Convert a prediction to the network's parameterisation: noise, v or velocity."""
        return self.levels.to_output(prediction, level)

    def fingerprint(self, part: Literal["autoencoder", "text encoder"]) -> str:
        """Return a hash of all that a frozen part's output depends on: weights, scaling, tokenizer, precision."""
        if part == "autoencoder":
            modules, dtype = [self.autoencoder.vae], self.autoencoder.dtype
            scaling, *others = self.autoencoder.settings
            settings = [scaling, self.image_size, *others]
        else:
            modules, dtype = [encoder.model for encoder in self.text_encoders], self.dtype
            settings = [part for e in self.text_encoders for part in (e.max_length, e.tokenizer.get_vocab())]
        return fingerprint_of(modules, dtype=dtype, settings=settings)

    # --- export ---

    def export(self, folder: Path, weights: Mapping[str, Tensor], *, kohya: bool = False) -> Path:
        """Write the trained weights in diffusers' format; return the subfolder of `folder` that they are in.

        That is `lora`, or `unet` or `transformer` for a full denoiser. With `kohya` a LoRA is also written in Kohya's
        key layout. `weights` are the unsharded values of `trainable`, of which this process may hold a shard only.
        """
        if has_lora(self.network):
            return export_lora(self, folder, weights, kohya=kohya)
        return export_denoiser(self, folder, weights)
