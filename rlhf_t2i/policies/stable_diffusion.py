"""Stable Diffusion 1.x and 2.x: any `StableDiffusionPipeline` folder or Hub id, with noise or v prediction."""

# diffusers and transformers have no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportOptionalOperand=false, reportReturnType=false
from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, cast

import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from rlhf_t2i.diffusion.gaussian import per_image, randn
from rlhf_t2i.parallel.state import stored_weights
from rlhf_t2i.policies.lora import add_lora, has_lora, lora_disabled, lora_weights, trainable
from rlhf_t2i.types import Level, Prediction, Schedule

BUILT_IN = Path(__file__).parent.parent / "shapes" / "weights"
"""What the model name `shapes` stands for."""


class StableDiffusion:
    """A Stable Diffusion model as a policy: frozen text encoder and autoencoder, a U-Net that learns."""

    def __init__(self, pipeline: StableDiffusionPipeline, *, device: torch.device, dtype: torch.dtype) -> None:
        """Take a loaded pipeline's parts. Text encoder and autoencoder are held in `dtype`, and all computes in it.

        Raises ValueError for a scheduler without betas, a prediction type other than noise or v, or thresholding.
        """
        self.scheduler = _ddim_scheduler(pipeline.scheduler.config)
        self.device, self.dtype = device, dtype
        self.tokenizer: Any = pipeline.tokenizer
        self.text_encoder: Any = pipeline.text_encoder.requires_grad_(False).to(device, dtype).eval()
        self.vae: Any = pipeline.vae.requires_grad_(False).to(device, dtype).eval()
        self._pixels_per_latent: int = pipeline.vae_scale_factor
        self.unet: Any = pipeline.unet.requires_grad_(False).to(device).eval()
        self.denoiser: nn.Module = self.unet
        self.reference: nn.Module | None = None
        self._warned: set[str] = set()
        self._empty = self.encode([""])

    # --- what learns ---

    def learn(self, lora_rank: int | None, *, lora_alpha: float | None, keep_reference: bool, seed: int) -> None:
        """Choose what learns: adapters of a rank on the U-Net's attention, or (None) the whole U-Net in float32.

        The seed is that of the adapters' first values. For the whole U-Net a frozen copy is kept if a reference will be
        asked for; adapters can just be switched off.
        """
        if lora_rank is not None:
            with only_errors():
                self.unet.to(self.dtype)
            add_lora(self.unet, rank=lora_rank, alpha=float(lora_alpha or lora_rank), seed=seed)
            return
        if keep_reference:
            self.reference = copy.deepcopy(self.unet)
        self.unet.float().requires_grad_(True)

    def checkpoint_gradients(self) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.unet.enable_gradient_checkpointing()

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by name."""
        return trainable(self.unet)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within it, `predict` answers as the model did before training (without adapters, or by its frozen copy)."""
        if has_lora(self.unet):
            with lora_disabled(self.unet):
                yield
            return
        if self.reference is None:
            raise RuntimeError("No reference was kept: call learn(..., keep_reference=True).")
        learner, self.denoiser = self.denoiser, self.reference
        try:
            yield
        finally:
            self.denoiser = learner

    # --- painting ---

    def schedule(self, num_steps: int) -> Schedule:
        """The levels that diffusers' DDIM passes in `num_steps` steps, from noise to clean.

        Raises ValueError for a number of steps that the model's schedule cannot be cut into.
        """
        total = self.scheduler.config.num_train_timesteps
        spacing = self.scheduler.config.timestep_spacing
        if not 1 <= num_steps <= total or (spacing != "leading" and total % num_steps):
            raise ValueError(
                f"num_denoising_steps is {num_steps}; with {spacing!r} spacing it must divide the {total} steps that "
                f"the model was trained with."
                if 1 <= num_steps <= total
                else f"num_denoising_steps is {num_steps}; it must be between 1 and {total}."
            )
        self.scheduler.set_timesteps(num_steps)
        times = self.scheduler.timesteps.to(torch.int64)
        if int(times[0]) >= total:
            raise ValueError(f"num_denoising_steps is {num_steps}; with this model's steps_offset it must be less.")
        last = int(times[-1]) - total // num_steps
        products = self.scheduler.alphas_cumprod
        final = products[last] if last >= 0 else self.scheduler.final_alpha_cumprod
        kept = torch.cat([products[times], final.reshape(1)]).to(self.device, torch.float32)
        model_time = torch.cat([times, times.new_tensor([max(last, 0)])]).to(self.device)
        return Schedule(kept.sqrt(), (1 - kept).sqrt(), model_time.float())

    def initial_noise(self, generators: Sequence[torch.Generator], *, copies: int) -> Float[Tensor, "B C H W"]:
        """Pure noise, `copies` latents from each generator."""
        shape = (len(generators) * copies, self.unet.config.in_channels, *self._latent_size)
        return randn(shape, generators=generators, device=self.device)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Float[Tensor, "B L D"]:
        """The text encoder's states, each different prompt encoded once; warns once of each prompt that is cut."""
        unique = list(dict.fromkeys(prompts))
        length = self.tokenizer.model_max_length
        full = self.tokenizer(unique, verbose=False).input_ids
        for prompt, ids in zip(unique, full, strict=True):
            if len(ids) > length and prompt not in self._warned:
                self._warned.add(prompt)
                warnings.warn(
                    f"The text encoder reads {length} tokens and this prompt has {len(ids)}; its end is cut off: "
                    f"{prompt!r}",
                    stacklevel=2,
                )
        tokens = self.tokenizer(unique, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if uses_mask else None
        states = self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0]
        index = {prompt: i for i, prompt in enumerate(unique)}
        return states[[index[prompt] for prompt in prompts]]

    def predict(
        self,
        latents: Float[Tensor, "B C H W"],
        level: Level,
        conditioning: Float[Tensor, "B L D"],
        *,
        guidance_scale: float,
    ) -> Prediction:
        """What the U-Net sees in noisy latents, in float32, with classifier-free guidance if its scale is above 1.

        output = unconditional + guidance_scale * (conditional - unconditional)      (arXiv:2207.12598)
        """
        if guidance_scale <= 1:
            output = self._denoise(latents, level.model_time, conditioning)
        else:
            empty = self._empty.expand_as(conditioning)
            doubled = torch.cat([latents, latents]), torch.cat([level.model_time] * 2)
            both = self._denoise(*doubled, torch.cat([empty, conditioning]))
            unconditional, conditional = both.chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        alpha, sigma = per_image(level.alpha), per_image(level.sigma)
        if self.scheduler.config.prediction_type == "v_prediction":
            return Prediction(alpha * latents - sigma * output, alpha * output + sigma * latents)
        return Prediction((latents - sigma * output) / alpha, output)

    def _denoise(self, latents: Tensor, model_time: Tensor, conditioning: Tensor) -> Tensor:
        autocast = nullcontext() if self.dtype == torch.float32 else torch.autocast(self.device.type, dtype=self.dtype)
        with autocast:
            sample = latents.to(self.unet.dtype)
            text = conditioning.to(self.unet.dtype)
            return self.denoiser(sample, model_time, text, return_dict=False)[0].float()

    def decode(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 Y X"]:
        """Pictures around [0, 1], not clamped."""
        scaled = latents / self.vae.config.scaling_factor
        return self.vae.decode(scaled.to(self.dtype), return_dict=False)[0].float() / 2 + 0.5

    # --- learning from pictures that are there ---

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures it paints."""
        height, width = self._latent_size
        return height * self._pixels_per_latent, width * self._pixels_per_latent

    @property
    def _latent_size(self) -> tuple[int, int]:
        size = self.unet.config.sample_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @torch.no_grad()
    def encode_images(
        self, images: Float[Tensor, "B 3 Y X"], *, generators: Sequence[torch.Generator] | None = None
    ) -> Float[Tensor, "B C H W"]:
        """The latents that `decode` makes pictures of, in float32.

        Of a Gaussian autoencoder their mean or, with generators that share the images equally, a draw. A tiny
        autoencoder has but one answer.
        """
        encoded = self.vae.encode((2 * images - 1).to(self.device, self.dtype), return_dict=False)[0]
        if isinstance(encoded, Tensor):
            return encoded.float() * self.vae.config.scaling_factor
        latents = encoded.mean.float()
        if generators is not None:
            latents = latents + encoded.std.float() * randn(latents.shape, generators=generators, device=self.device)
        return latents * self.vae.config.scaling_factor

    def levels_at(self, times: Int[Tensor, " B"]) -> Level:
        """The levels of noise that the model was trained at: 0 is nearly clean, 999 (for most models) nearly noise.

        Raises ValueError for a time that it was not trained at.
        """
        times, total = times.cpu(), self.scheduler.config.num_train_timesteps
        if not ((times >= 0) & (times < total)).all():
            raise ValueError(f"times go from {times.min()} to {times.max()}; the model knows 0 to {total - 1}.")
        kept = self.scheduler.alphas_cumprod[times].to(self.device, torch.float32)
        return Level(kept.sqrt(), (1 - kept).sqrt(), times.to(self.device).float())

    def output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        """A prediction in the U-Net's own terms: the noise, or v = alpha noise - sigma clean (arXiv:2202.00512)."""
        if self.scheduler.config.prediction_type == "v_prediction":
            return per_image(level.alpha) * prediction.noise - per_image(level.sigma) * prediction.clean
        return prediction.noise

    def fingerprint(self, part: Literal["autoencoder", "text encoder"]) -> str:
        """A hash of all that the answers of a frozen part depend on: weights, scaling, tokenizer and precision."""
        module, settings = {
            "autoencoder": (self.vae, [self.vae.config.scaling_factor, self.picture_size]),
            "text encoder": (self.text_encoder, [self.tokenizer.model_max_length, self.tokenizer.get_vocab()]),
        }[part]
        digest = hashlib.sha256(json.dumps([str(self.dtype), settings], sort_keys=True).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    # --- taking it elsewhere ---

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> Path:
        """Write the trained weights so that plain diffusers loads them: `folder/lora` or `folder/unet`; returns which.

        They are given, because this process may hold but a part of each.
        """
        if has_lora(self.unet):
            StableDiffusionPipeline.save_lora_weights(
                folder / "lora",
                unet_lora_layers=lora_weights(self.unet, weights),
                unet_lora_adapter_metadata=self.unet.peft_config["default"].to_dict(),
            )
            return folder / "lora"
        unet = UNet2DConditionModel.from_config(self.unet.config)
        unet.load_state_dict(weights)
        unet.save_pretrained(folder / "unet")
        return folder / "unet"


@contextmanager
def only_errors() -> Iterator[None]:
    """Keep diffusers from remarks and progress bars that tell a user nothing."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        diffusers_logging.enable_progress_bar()
        transformers_logging.enable_progress_bar()


def load_stable_diffusion(
    model: str, *, device: torch.device, dtype: torch.dtype = torch.float32, weights: Path | None = None
) -> StableDiffusion:
    """Load `shapes` (the built-in model), a pipeline folder or a Hub id, and put trained `weights` into it.

    Raises FileNotFoundError or ValueError, saying what is missing, for a path that is not a Stable Diffusion pipeline,
    and for weights that are none of what a run writes: its folder, its lora, unet or one of its checkpoints.
    """
    path = BUILT_IN if model == "shapes" else Path(model)
    if path.exists() and not (path / "model_index.json").is_file():
        raise ValueError(
            f"{str(path)!r} is not a diffusers pipeline: it has no model_index.json. Give the folder that "
            f"`StableDiffusionPipeline.save_pretrained` wrote, or a Hub id."
        )
    if not path.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"There is no model folder {model!r}. Give 'shapes' for the built-in model, the folder of a "
            f"StableDiffusionPipeline, or a Hub id such as 'owner/name'."
        )
    source = str(path) if path.exists() else model
    with only_errors():
        try:
            declared = StableDiffusionPipeline.load_config(source)["_class_name"]
            if declared != "StableDiffusionPipeline":
                raise ValueError(
                    f"{model!r} is a {declared}; here only a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x) can "
                    f"be trained."
                )
            pipeline = StableDiffusionPipeline.from_pretrained(
                source, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
            )
        except OSError as error:
            raise FileNotFoundError(
                f"The model {model!r} could not be loaded, neither as a folder nor from the Hub: {error}"
            ) from error
        pipeline = cast(StableDiffusionPipeline, pipeline)
        if weights is not None:
            _load_weights(pipeline, weights)
        return StableDiffusion(pipeline, device=device, dtype=dtype)


def _load_weights(pipeline: Any, path: Path) -> None:
    """Put what a run learnt into a pipeline, whichever of its folders is given."""
    if stored := stored_weights(path):
        config: dict[str, Any] = yaml.safe_load((path.parent.parent / "config.yaml").read_text())
        if config["lora_rank"] is not None:
            add_lora(
                pipeline.unet,
                rank=config["lora_rank"],
                alpha=float(config["lora_alpha"] or config["lora_rank"]),
                seed=0,
            )
        unknown = stored.keys() - pipeline.unet.state_dict().keys()
        if unknown:
            raise ValueError(f"The checkpoint {str(path)!r} is of another model: it has {sorted(unknown)[:3]}.")
        pipeline.unet.load_state_dict(stored, strict=False)
        return
    for folder in (path, path / "lora", path / "unet"):
        if (folder / "pytorch_lora_weights.safetensors").is_file():
            pipeline.load_lora_weights(folder)
            return
        if (folder / "diffusion_pytorch_model.safetensors").is_file():
            trained = UNet2DConditionModel.from_pretrained(folder, dtype=torch.float32)
            pipeline.unet.load_state_dict(trained.state_dict())
            return
    raise FileNotFoundError(
        f"{str(path)!r} holds no trained weights. Give a finished run's folder, its 'lora' or 'unet' folder, or one of "
        f"its checkpoints."
    )


def _ddim_scheduler(config: Any) -> DDIMScheduler:
    """DDIM over a model's own levels of noise, whichever scheduler it was saved with."""
    name = config.get("_class_name", "a scheduler")
    if "beta_schedule" not in config:
        raise ValueError(
            f"The model's scheduler, {name}, has no beta schedule; DDIM needs one. Flow models are not "
            f"Stable Diffusion 1.x or 2.x."
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"The model predicts {prediction!r}; supported are 'epsilon' and 'v_prediction'.")
    if config.get("thresholding", False):
        raise ValueError(
            "The model's scheduler sets thresholding; a clipped step has no Gaussian density. Set it to false in the "
            "model's scheduler_config.json."
        )
    if config.get("rescale_betas_zero_snr", False):
        raise ValueError(
            "The model's scheduler sets rescale_betas_zero_snr, whose first step has alpha = 0; set it to false."
        )
    # DDIM's steps are all equally long; with `linspace` they would end between its levels.
    spacing = config.get("timestep_spacing", "leading")
    spacing = "leading" if spacing == "linspace" else spacing
    return DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing=spacing)
