"""Options of recipes/diffusion_dpo.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from rlhf_t2i.settings.base import Group, Rule, Settings
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.groups import DataSettings, GroupedSamplingSettings, TrainerConfig
from rlhf_t2i.settings.launch import shared_rule
from rlhf_t2i.settings.lists import whole_numbers
from rlhf_t2i.settings.mixture import MixtureSettings
from rlhf_t2i.settings.ranges import (
    SAMPLED,
    DataPaths,
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)


@dataclass(frozen=True, kw_only=True)
class PairSettings(Settings, group="data"):
    """Preference data to train on."""

    pairs: DataPaths = SAMPLED
    """Preference data: comma-separated files or folders, each PATH or FORMAT:PATH (docs/data.md); sampled makes pairs
    in each step, from images that the reward compares."""
    pairs_per_step: PositiveInt = 64
    """Pairs of the preference data in one training step, over all processes. Unused with --pairs sampled."""
    cache_folder: str | None = None
    """Folder for a cache of latents and text embeddings of the preference data; null encodes them in every step."""
    num_workers: Annotated[NonNegativeInt, Group("system")] = 0
    """Threads that decode the images of the preference data; 0 decodes one after the other."""
    random_flip: Literal["none", "pair", "image"] = "none"
    """Images of the preference data that are mirrored, left to right, with probability 1/2 in each step: none, both of
    a pair together, or each image on its own (published). A cache then holds both views of every image."""
    aspect_bucket_step: PositiveInt | None = None
    """Pixels that the sides of aspect-ratio buckets are multiples of, such as 64: each pair of the preference data is
    cropped to the nearest of sizes with about the area of the run's image size, at most twice as long as wide; null
    crops all pairs to the run's image size."""


@dataclass(frozen=True, kw_only=True)
class DpoUpdateSettings(Settings):
    """The update of Diffusion-DPO on pairs of images."""

    loss: Literal["dpo", "sft"] = "dpo"
    """Training loss: Diffusion-DPO, or supervised fine-tuning on the winners alone as a baseline."""
    beta: PositiveFloat = 50.0
    """Strength of the implicit KL penalty towards the reference model; published for SD 1.5: 2000 to 5000. Fewer latent
    numbers need less."""
    dpop_weight: NonNegativeFloat = 0.0
    """Weight of the penalty on a winner's error above the reference's (DPO-Positive, arXiv:2402.13228); 0 is plain
    DPO."""
    timesteps: str = "500-999"
    """Timesteps (noise levels) to train, within the model's 0 to 999: a range such as 0-999, or a list such as
    249,499,749,999 for a turbo model."""
    num_inner_epochs: PositiveInt = 4
    """Optimiser steps on the pairs of each step, each with new noise."""

    def rules(self) -> list[Rule]:
        timesteps = bool(whole_numbers(self.timesteps))
        return [
            *super().rules(),
            ("timesteps", timesteps, "a range such as 0-999 or a list such as 249,499,749,999"),
        ]


@dataclass(frozen=True, kw_only=True)
class Config(DataSettings, MixtureSettings, PairSettings, DpoUpdateSettings, GroupedSamplingSettings, TrainerConfig):
    """Diffusion-DPO settings. `microbatch_size` counts images, two for each pair."""

    prompts_per_step: PositiveInt = 32
    """Distinct prompts in one training step with --pairs sampled, over all processes; a multiple of the number of
    processes."""
    images_per_prompt: Annotated[int, Ge(2)] = 8
    """Images sampled for each prompt in one training step with --pairs sampled, all on one process."""
    eta: Annotated[Fraction, Group("sampling")] = 1.0
    """Noise of each denoising step with --pairs sampled; 0 is deterministic, 1 is the noise of the forward process."""
    guidance_scale: Annotated[float, Ge(1)] = by_model(1.0, family="guidance_scale")
    """Scale of classifier-free guidance in sampling and evaluation; 1 is no guidance and halves their cost. The update
    uses none."""
    pair_selection: Literal["best_worst", "all", "random"] = "best_worst"
    """Pairs among a prompt's images with --pairs sampled: best_worst takes the best against the worst, all every two,
    random one random two."""
    save_pairs: Annotated[bool, Group("checkpoints and logging")] = True
    """Write sampled pairs to RUN_FOLDER/pairs, a folder that --pairs reads."""

    proportion_empty_prompts: Fraction = 0.0
    """Fraction of the pairs, drawn at random in each step, whose two images are trained with an empty prompt, which
    classifier-free guidance needs (published: 0.2); 0 keeps all prompts."""
    lora_dropout: Annotated[Decay, Group("model and LoRA")] = 0.0
    """Fraction of the LoRA's inputs that are set to zero at random in updates; 0 is none. Results then depend on
    microbatch_size and the number of processes."""
    learning_rate: PositiveFloat = 1.5e-4
    num_steps: PositiveInt = 20
    microbatch_size: Annotated[int, Ge(2)] = by_model(64, family="pair_microbatch_size")
    """Images in one forward pass of one process, two for each pair; changes memory and speed, and results by rounding
    only, but with lora_dropout also its random masks."""

    @property
    def samples_pairs(self) -> bool:
        """True if pairs are made in each step, from images that the reward compares."""
        return self.pairs == SAMPLED

    def unused(self) -> Collection[str]:
        return [*super().unused(), *(() if self.samples_pairs else ("prompts", "rewards"))]

    def needed(self) -> Collection[str]:
        measured = isinstance(vars(self)["rewards"], str)  # it was given
        return () if self.samples_pairs else ("evaluation_prompts", *(() if measured else ("evaluation_rewards",)))

    def rules(self) -> list[Rule]:
        can_hold_back = self.samples_pairs or self.evaluation_prompts is not None
        return [
            *super().rules(),
            ("evaluation_prompts", can_hold_back, "given with pairs of your own, such as held_out.txt"),
            *([shared_rule("prompts_per_step", self.prompts_per_step)] if self.samples_pairs else []),
            self.weights_rule("" if self.samples_pairs else self.pairs),
            ("random_flip", self.random_flip == "none" or not self.samples_pairs, "none with --pairs sampled"),
            ("aspect_bucket_step", not (self.aspect_bucket_step and self.samples_pairs), "null with --pairs sampled"),
            ("lora_dropout", self.lora_dropout == 0 or self.trains_lora, "0 without a LoRA"),
        ]

    @property
    def images_per_optimizer_step(self) -> int | None:
        return None if self.samples_pairs else 2 * self.pairs_per_step
