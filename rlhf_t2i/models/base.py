"""A diffusers pipeline as a policy: what all families of models do alike."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.models.family import Family
from rlhf_t2i.models.lora import add_lora, has_lora, lora_disabled, lora_weights, trainable
from rlhf_t2i.models.quiet import only_errors
from rlhf_t2i.models.text_encoders import CutWarnings, Memory
from rlhf_t2i.types import Level, Prediction, Schedule


class PipelinePolicy:
    """A model of any family as a policy: frozen text encoders and autoencoder, a denoiser that learns."""

    def __init__(self, family: Family, *, device: torch.device, dtype: torch.dtype) -> None:
        """All computes in `dtype`, and what is frozen is held in it."""
        self.family, self.device, self.dtype = family, device, dtype
        self.network: Any = family.network.requires_grad_(False).to(device).eval()
        self.denoiser: nn.Module = self.network
        self._network_class = type(self.network)
        self.reference: nn.Module | None = None
        self._memory, self._cut = Memory(), CutWarnings()
        self._offloads_text_encoders = False

    # --- what learns ---

    def learn(self, lora_rank: int | None, *, lora_alpha: float | None, keep_reference: bool, seed: int) -> None:
        """Choose what learns: adapters of a rank on the denoiser's attention, or (None) all of it in float32.

        The seed is that of the adapters' first values. For the whole denoiser a frozen copy is kept if a reference will
        be asked for; adapters can just be switched off.
        """
        if lora_rank is not None:
            with only_errors():
                self.network.to(self.dtype)
            add_lora(
                self.network, rank=lora_rank, alpha=float(lora_alpha or lora_rank), seed=seed,
                targets=self.family.lora_targets,
            )  # fmt: skip
            return
        if keep_reference:
            self.reference = copy.deepcopy(self.network)
        self.network.float().requires_grad_(True)

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.network.enable_gradient_checkpointing()

    def offload_text_encoders(self) -> None:
        """Keep the text encoders in main memory from now on, but for the time in which they read something new."""
        self._offloads_text_encoders = True
        self._place_text_encoders(torch.device("cpu"))

    def _place_text_encoders(self, device: torch.device) -> None:
        for encoder in self.family.text_encoders:
            encoder.model.to(device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return trainable(self.network)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, `predict` answers as the model did before training (without adapters, or by its frozen copy)."""
        if has_lora(self.network):
            with lora_disabled(self.network):
                yield
            return
        if self.reference is None:
            raise RuntimeError("No reference was kept: call learn(..., keep_reference=True).")
        engine, self.denoiser = self.denoiser, self.reference
        try:
            yield
        finally:
            self.denoiser = engine

    # --- painting ---

    def schedule(self, num_steps: int) -> Schedule:
        """The levels that the stock pipeline passes in `num_steps` steps, from noise to clean.

        Raises ValueError for a number of steps that the model's schedule cannot be cut into.
        """
        return self.family.levels.schedule(num_steps)

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Float[Tensor, "B C H W"]:
        """Pure noise, `copies` latents from each generator."""
        shape = (len(generators) * copies, *self.family.latent_shape)
        return randn(shape, generators=generators, device=self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """What the denoiser is told of prompts, each different one read once; warns once of each that is cut."""
        self._cut.look(prompts, self.family.text_encoders)
        if self._offloads_text_encoders and not self._memory.knows(prompts):
            self._place_text_encoders(self.device)
            states = self._memory.read(prompts, self.family.read)
            self._place_text_encoders(torch.device("cpu"))
            return states.to(self.device)
        return self._memory.read(prompts, self.family.read).to(self.device)

    def predict(
        self,
        latents: Float[Tensor, "B C H W"],
        level: Level,
        conditioning: Float[Tensor, "B L D"],
        *,
        guidance_scale: float,
    ) -> Prediction:
        """What the denoiser sees in noisy latents, in float32; guided, if the scale is above 1."""
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)
        with autocast:
            output = self.family.output(
                self.denoiser, latents, level.model_time, conditioning, guidance_scale=guidance_scale
            )
        return self.family.levels.prediction(latents, output, level)

    def num_calls(self, guidance_scale: float) -> int:
        """How often the denoiser is asked for one prediction."""
        return 2 if guidance_scale > 1 and not self.family.is_told_guidance else 1

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Images around [0, 1], not clamped."""
        return self.family.autoencoder.decode(latents)

    # --- learning from images that are there ---

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images it paints."""
        _, height, width = self.family.latent_shape
        scale = self.family.autoencoder.pixels_per_latent
        return height * scale, width * scale

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "B 3 Y X"], *, generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """What `decode` makes images of; of a Gaussian autoencoder the mean or, with generators, a draw."""
        return self.family.autoencoder.encode(images, generators=generators)

    def levels_at(self, times: Int[Tensor, " B"]) -> Level:
        """The levels of noise that the model was trained at: 0 is nearly clean, 999 (for most models) nearly noise.

        Raises ValueError for a time that it was not trained at.
        """
        return self.family.levels.at(times)

    def output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        """A prediction in the denoiser's own terms."""
        return self.family.levels.output(prediction, level)

    def fingerprint(self, part: Literal["autoencoder", "text encoder"]) -> str:
        """A hash of all that the answers of a frozen part depend on: weights, scaling, tokenizer and precision."""
        autoencoder, encoders = self.family.autoencoder, self.family.text_encoders
        if part == "autoencoder":
            modules, dtype = [autoencoder.vae], autoencoder.dtype
            scaling, *others = autoencoder.settings
            settings = [scaling, self.image_size, *others]
        else:
            modules, dtype = [encoder.model for encoder in encoders], self.dtype
            settings = [part for e in encoders for part in (e.max_length, e.tokenizer.get_vocab())]
        digest = hashlib.sha256(json.dumps([str(dtype), settings], sort_keys=True).encode())
        for module in modules:
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # --- taking it elsewhere ---

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write the trained weights so that plain diffusers loads them; returns which folder they are in.

        That is `folder/lora` or, of a whole denoiser, `folder/unet` or `folder/transformer`. They are given, because
        this process may hold but a part of each.
        """
        component = self.family.component
        if has_lora(self.network):
            self.family.pipeline_class.save_lora_weights(
                folder / "lora",
                **{
                    f"{component}_lora_layers": lora_weights(self.network, weights),
                    f"{component}_lora_adapter_metadata": self.network.peft_config["default"].to_dict(),
                },
            )
            return folder / "lora"
        network: Any = self._network_class.from_config(self.network.config)
        expected = network.state_dict()
        network.load_state_dict({**{n: b for n, b in self.network.named_buffers() if n in expected}, **weights})
        network.save_pretrained(folder / component)
        return folder / component
