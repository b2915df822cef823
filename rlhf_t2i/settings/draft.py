"""Options of recipes/draft.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_t2i.settings.base import Group, Rule
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.groups import TrainerConfig
from rlhf_t2i.settings.launch import shared_rule
from rlhf_t2i.settings.ranges import (
    Decay,
    DifferentiableRewardNames,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from rlhf_t2i.shapes.names import TOY_REWARD


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Settings of DRaFT, DRaFT-LV, AlignProp and ReFL."""

    prompts_per_step: Annotated[PositiveInt, Group("sampling")] = 128
    """Distinct prompts in one optimiser step, with one image each, over all processes; a multiple of the number of
    processes."""
    eta: Annotated[Fraction, Group("sampling")] = 0.0
    """Noise of each denoising step; 0 is deterministic, 1 is the noise of the forward process."""
    rewards: DifferentiableRewardNames = by_model(TOY_REWARD)
    """Differentiable rewards to maximise, comma-separated NAME or NAME=WEIGHT, summed by weight (docs/rewards.md).
    Several are harder to exploit than one."""

    method: Literal["draft", "draft_lv", "alignprop", "refl"] = "refl"
    """Denoising steps that the gradient flows through: the last backprop_steps (draft), the last one from several
    renoised copies (draft_lv), the last K with K drawn for each image (alignprop), or one random step of a window
    (refl)."""
    backprop_steps: PositiveInt | None = None
    """K of draft (the last K steps) and alignprop (at most K steps); null is num_denoising_steps. At most
    num_denoising_steps."""
    num_renoisings: PositiveInt = 2
    """Number of renoised copies of each image with draft_lv."""
    window_start: Fraction = 0.25
    """Start of the denoising steps that refl draws from, as a fraction of sampling: 0 is pure noise, 1 the image.
    Published: 0.75."""
    window_end: Fraction = 1.0
    """End of the denoising steps that refl draws from, as a fraction of sampling: 0 is pure noise, 1 the image."""
    checkpoint_denoising_steps: Annotated[bool, Group("system")] = False
    """Recompute each differentiated denoising step and the decoder in the backward pass: memory then hardly grows with
    backprop_steps; about a third slower."""

    reward_margin: Annotated[float, Group("reward")] | None = None
    """Margin m of the hinge loss max(0, m - reward), which stops at images that are good enough; null is the loss
    -reward."""
    reward_weight: Annotated[PositiveFloat, Group("reward")] = 1.0
    """Weight of the reward's loss beside kl_weight and l2_sp_weight."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight of the mean squared difference of noise predictions from the model before training, at the differentiated
    steps; 0 keeps no reference model."""
    l2_sp_weight: NonNegativeFloat = 0.0
    """Weight of L2-SP: half the squared distance of the trained weights (with a LoRA, of its factors) from their values
    before training."""

    learning_rate: PositiveFloat = 2e-4
    warmup_steps: NonNegativeInt = 40
    ema_decay: Decay = 0.95
    num_steps: PositiveInt = 200
    evaluate_every: NonNegativeInt = 50
    checkpoint_every: NonNegativeInt = 50

    def rules(self) -> list[Rule]:
        first, end = self.trained_window
        return [
            *super().rules(),
            shared_rule("prompts_per_step", self.prompts_per_step),
            (
                "backprop_steps",
                self.backprop_steps is None or self.backprop_steps <= self.num_denoising_steps,
                f"at most num_denoising_steps ({self.num_denoising_steps})",
            ),
            (
                "backprop_steps",
                self.method in ("draft", "alignprop") or self.backprop_steps in (None, 1),
                f"null or 1, because {self.method} differentiates one step",
            ),
            ("window_end", first < end, "at least one denoising step after window_start"),
        ]

    @property
    def trained_window(self) -> tuple[int, int]:
        """The first denoising step that refl may draw, and the one after the last."""
        return round(self.window_start * self.num_denoising_steps), round(self.window_end * self.num_denoising_steps)

    @property
    def images_per_optimizer_step(self) -> int:
        return self.prompts_per_step
