"""Noise levels of a model's training and sampling, and the parameterisation of its output."""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportReturnType=false, reportOptionalMemberAccess=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.diffusion.gaussian import per_image
from rlhf_t2i.types import Level, Prediction, Schedule

MANY_STEPS = 200
"""Length of the schedule whose shift the levels of training have, where a shift depends on the number of steps."""


@runtime_checkable
class Levels(Protocol):
    """Noise levels of a model and the parameterisation of its output."""

    scheduler: Any
    """The diffusers scheduler that steps along these levels."""

    def schedule(self, num_steps: int) -> Schedule: ...

    def at(self, times: Int[Tensor, " B"]) -> Level:
        """Return the noise levels of the model's training, by index: 0 is nearly clean."""
        ...

    def to_prediction(
        self, latents: Float[Tensor, "B C H W"], output: Float[Tensor, "B C H W"], level: Level
    ) -> Prediction:
        """Return the clean and noise parts of `latents` that a network output stands for."""
        ...

    def to_output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        """Return the network output that stands for a prediction, the inverse of `to_prediction`."""
        ...


class DiffusionLevels:
    """Levels with alpha^2 + sigma^2 = 1; the output is noise, or v = alpha noise - sigma clean (arXiv:2202.00512)."""

    def __init__(self, config: Any, *, device: torch.device) -> None:
        """Take a scheduler's config.

        Raises ValueError for a scheduler without betas, a prediction type other than noise or v, or thresholding.
        """
        self.scheduler, self.device = _ddim_scheduler(config), device

    def schedule(self, num_steps: int) -> Schedule:
        """Return the levels that diffusers' DDIM passes in `num_steps` steps, from noise to clean.

        Raises ValueError for a number of steps that the model's schedule does not allow.
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
        alphas_cumprod = self.scheduler.alphas_cumprod
        final = alphas_cumprod[last] if last >= 0 else self.scheduler.final_alpha_cumprod
        alpha_squared = torch.cat([alphas_cumprod[times], final.reshape(1)]).to(self.device, torch.float32)
        model_time = torch.cat([times, times.new_tensor([max(last, 0)])]).to(self.device)
        return Schedule(alpha_squared.sqrt(), (1 - alpha_squared).sqrt(), model_time.float())

    def at(self, times: Int[Tensor, " B"]) -> Level:
        """Return the noise levels of the model's training: 0 is nearly clean, 999 (for most models) nearly pure noise.

        Raises ValueError for an index outside of that range.
        """
        times = times.cpu()
        check_times(times, self.scheduler.config.num_train_timesteps)
        alpha_squared = self.scheduler.alphas_cumprod[times].to(self.device, torch.float32)
        return Level(alpha_squared.sqrt(), (1 - alpha_squared).sqrt(), times.to(self.device).float())

    def to_prediction(
        self, latents: Float[Tensor, "B C H W"], output: Float[Tensor, "B C H W"], level: Level
    ) -> Prediction:
        alpha, sigma = per_image(level.alpha), per_image(level.sigma)
        if self.scheduler.config.prediction_type == "v_prediction":
            return Prediction(alpha * latents - sigma * output, alpha * output + sigma * latents)
        return Prediction((latents - sigma * output) / alpha, output)

    def to_output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        if self.scheduler.config.prediction_type == "v_prediction":
            return per_image(level.alpha) * prediction.noise - per_image(level.sigma) * prediction.clean
        return prediction.noise


class FlowLevels:
    """Levels with alpha + sigma = 1; the output is the velocity = noise - clean (arXiv:2209.03003)."""

    def __init__(
        self, config: Any, *, device: torch.device, shift: float | Callable[[int], float], even: bool = False
    ) -> None:
        """Take a scheduler's config.

        `shift` depends on the image size, for a scheduler with dynamic shifting (`shift_for`); it may be a function of
        the number of steps. With `even` the levels of a schedule are, before any shift, 1, 1 - 1/T, ..., 1/T; otherwise
        the scheduler spaces them.
        Raises ValueError for a scheduler that is not one of a flow model, and for one with invert_sigmas.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler  # takes seconds

        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if not name.startswith("FlowMatch"):
            raise ValueError(f"The model's scheduler, {name}, is not one of a flow model (FlowMatchEulerDiscrete).")
        if config.get("invert_sigmas", False):
            raise ValueError("The model's scheduler sets invert_sigmas, which is not supported; set it to false.")
        self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=False)
        self.device, self.even = device, even
        self.shift_at: Callable[[int], float] = shift if callable(shift) else lambda _: shift
        sigmas = self.scheduler.sigmas.flip(0)
        is_dynamic = self.scheduler.config.use_dynamic_shifting
        self._trained: Tensor = (
            self.scheduler.time_shift(self.shift_at(MANY_STEPS), 1.0, sigmas) if is_dynamic else sigmas
        )

    def schedule(self, num_steps: int) -> Schedule:
        """Return the levels that the stock pipeline passes in `num_steps` steps, from pure noise to clean.

        Raises ValueError for fewer than one step.
        """
        if num_steps < 1:
            raise ValueError(f"num_denoising_steps is {num_steps}; it must be at least 1.")
        even = [1 - i / num_steps for i in range(num_steps)] if self.even else None
        self.scheduler.set_timesteps(num_steps, sigmas=even, mu=self.shift_at(num_steps))
        sigma = self.scheduler.sigmas.to(self.device, torch.float32)
        times = self.scheduler.timesteps.to(self.device, torch.float32)
        return Schedule(1 - sigma, sigma, torch.cat([times, times.new_zeros(1)]), kind="flow")

    def at(self, times: Int[Tensor, " B"]) -> Level:
        """Return the levels of the model's own schedule: 0 is nearly clean, 999 (for most models) pure noise.

        Raises ValueError for an index outside of that range.
        """
        times, total = times.cpu(), len(self._trained)
        check_times(times, total)
        sigma = self._trained[times].to(self.device, torch.float32)
        return Level(1 - sigma, sigma, sigma * total)

    def to_prediction(
        self, latents: Float[Tensor, "B C H W"], output: Float[Tensor, "B C H W"], level: Level
    ) -> Prediction:
        alpha, sigma = per_image(level.alpha), per_image(level.sigma)
        return Prediction(latents - sigma * output, latents + alpha * output)

    def to_output(self, prediction: Prediction, level: Level) -> Float[Tensor, "B C H W"]:
        return prediction.noise - prediction.clean


def shift_for(num_patches: int, config: Any) -> float:
    """Return the shift towards noise of a scheduler with dynamic shifting, for an image of so many patches.

    A line through (base_image_seq_len, base_shift) and (max_image_seq_len, max_shift), as in the stock pipelines.
    """
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (largest - base) / (high - low)
    return slope * num_patches + base - slope * low


def check_times(times: Int[Tensor, " B"], total: int) -> None:
    """Raise ValueError for an index outside of the `total` levels of a model's training."""
    if not ((times >= 0) & (times < total)).all():
        raise ValueError(f"times range from {times.min()} to {times.max()}; the model was trained at 0 to {total - 1}.")


def _ddim_scheduler(config: Any) -> Any:
    """Return a DDIM scheduler over a model's own noise levels, whichever scheduler it was saved with."""
    from diffusers import DDIMScheduler  # takes seconds

    name = config.get("_class_name", "a scheduler")
    if "beta_schedule" not in config:
        raise ValueError(
            f"The model's scheduler, {name}, has no beta schedule; DDIM needs one. Flow models are not "
            f"Stable Diffusion 1.x, 2.x or XL."
        )
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise ValueError(f"The model predicts {prediction!r}; supported are 'epsilon' and 'v_prediction'.")
    if config.get("thresholding", False):
        raise ValueError(
            "The model's scheduler sets thresholding; a clipped step has no Gaussian density. Set it to false in the "
            "model's scheduler_config.json."
        )
    if config.get("rescale_betas_zero_snr", False) and prediction != "v_prediction":
        raise ValueError(
            f"The model's scheduler sets rescale_betas_zero_snr, whose first step has alpha = 0: there {prediction!r} "
            f"says nothing about the image. Such models predict 'v_prediction'; set one of the two in the model's "
            f"scheduler_config.json."
        )
    # DDIM's steps all have one length; with `linspace` they would end between the model's levels.
    spacing = config.get("timestep_spacing", "leading")
    spacing = "leading" if spacing == "linspace" else spacing
    return DDIMScheduler.from_config(config, clip_sample=False, timestep_spacing=spacing)
