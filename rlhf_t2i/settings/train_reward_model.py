"""Options of recipes/train_reward_model.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from rlhf_t2i.settings.base import Group, Rule, Settings
from rlhf_t2i.settings.dry_run import DryRunSettings
from rlhf_t2i.settings.groups import DataSettings, ResumeSettings, ThreadSettings
from rlhf_t2i.settings.launch import tracker_rules
from rlhf_t2i.settings.memory import AttentionSettings
from rlhf_t2i.settings.mixture import MixtureSettings
from rlhf_t2i.settings.ranges import (
    BackbonePath,
    DataPaths,
    Decay,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Precision,
)
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_PAIRS

FREE_TO_CHANGE = frozenset({
    "num_steps", "learning_rate", "projector_learning_rate", "skip_ca_learning_rate", "head_learning_rate",
    "warmup_fraction", "evaluate_every", "patience", "keep_checkpoints", "trackers", "num_cpu_threads", "num_workers",
    "gradient_checkpointing", "test_data", "attention", "dry_run", "dry_run_image_side",
})  # fmt: skip
"""Settings that may differ when training is resumed; docs/resume.md lists them."""


@dataclass(frozen=True, kw_only=True)
class BackboneSettings(Settings, group="model and LoRA"):
    """The backbone, its inputs, SkipCA and LoRA."""

    backbone: BackbonePath = TOY_BACKBONE
    """Multimodal LLM: folder or Hub id of a supported family (Phi-3.5-vision, LLaVA-1.5, Qwen2.5-VL, ...), or shapes
    for the small LLaVA of the toy world."""
    readout: Literal["last_token", "prompt_likelihood"] = "last_token"
    """Source of a score: last_token is a head on the last token (LLaVA-Reward), prompt_likelihood the log-likelihood of
    the prompt given the image, without SkipCA and head (VisualGPTScore)."""
    skip_ca: bool = True
    """Add SkipCA, cross-attention from the last token to the visual tokens; false is the paper's ablation. Unused with
    readout prompt_likelihood."""
    skip_ca_heads: PositiveInt = 1
    """Attention heads of SkipCA."""
    template: Literal["family", "published"] = "family"
    """Format of prompts: family is the backbone's own chat template, published that of the published LLaVA-Reward code,
    with the sizes to which that resizes the images of Qwen2.5-VL."""
    min_pixels: PositiveInt | None = None
    """Smallest number of pixels of an image, to which smaller ones are enlarged (Qwen's models); null is the model's
    own number."""
    max_pixels: PositiveInt | None = None
    """Largest number of pixels of an image, to which larger ones are reduced (Qwen's models); more pixels are more
    visual tokens. Null is the model's own number."""
    num_crops: PositiveInt | None = None
    """Largest number of crops of an image, for models that crop; more crops are more visual tokens. Null is the model's
    own number."""
    quantization: Literal["int8", "nf4"] | None = None
    """Storage of the frozen weights of the language model's linear layers: int8 (8 bits, torchao), nf4 (4 bits,
    bitsandbytes), or null, the backbone's precision. On one process or under DDP."""
    lora_rank: PositiveInt = 128
    """Rank of the LoRA in the language model."""
    lora_alpha: PositiveFloat = 256.0
    """LoRA scaling: adapters are multiplied by lora_alpha / lora_rank."""
    lora_dropout: Decay = 0.05
    """Fraction of the LoRA's inputs that are set to zero at random in training; 0 is none."""
    lora_only: bool = False
    """Train the LoRA only and leave projector, SkipCA and head at their initial values, which the published code does
    by mistake."""


@dataclass(frozen=True, kw_only=True)
class RewardDataSettings(Settings, group="data"):
    """Training, validation and test data."""

    train_data: DataPaths = TOY_PAIRS
    """Comma-separated data files to train on, each PATH or FORMAT:PATH (docs/data.md), or shapes for the pairs of the
    toy world."""
    validation_data: DataPaths | None = None
    """Comma-separated data files that choose the best checkpoint, each PATH or FORMAT:PATH; null holds out
    validation_fraction of the training prompts."""
    validation_fraction: Annotated[float, Gt(0), Lt(1)] = 0.05
    """Fraction of the training prompts to hold out for validation if validation_data is null."""
    test_data: DataPaths | None = None
    """Comma-separated data files to measure the finished reward model on, each PATH or FORMAT:PATH; null is none, or
    the toy world's with --train_data shapes."""
    exclude_test_prompts: bool = False
    """Remove the prompts of test_data from the training data; the number of shared prompts is printed in any case."""
    hard_negatives: Fraction = 0.0
    """Hard negatives to add, as a fraction of the training pairs. Each is the winner of a pair, which under its prompt
    should score above itself under the prompt with one error."""


@dataclass(frozen=True, kw_only=True)
class RewardOptimizerSettings(Settings, group="optimiser"):
    """AdamW, its learning rates and the length of training."""

    learning_rate: PositiveFloat = 2e-4
    """Highest learning rate of AdamW, reached after the warm-up; it then falls to zero along a cosine."""
    projector_learning_rate: PositiveFloat | None = None
    """Learning rate of the projector; null is learning_rate."""
    skip_ca_learning_rate: PositiveFloat | None = None
    """Learning rate of SkipCA; null is learning_rate."""
    head_learning_rate: PositiveFloat | None = None
    """Learning rate of the head; null is learning_rate."""
    warmup_fraction: Decay = 0.03
    """Fraction of the optimiser steps over which the learning rate rises linearly from zero."""
    adam_beta1: Decay = 0.9
    """AdamW's decay of the mean of gradients."""
    adam_beta2: Decay = 0.95
    """AdamW's decay of the mean of squared gradients."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW's decoupled weight decay."""
    max_gradient_norm: PositiveFloat = 1.0
    """Norm to which gradients over all trained weights are clipped."""
    accumulation_steps: PositiveInt = 4
    """Forward passes in one optimiser step of each process: a step has microbatch_size x accumulation_steps x processes
    records."""
    num_epochs: PositiveFloat = 1.0
    """Passes over the training data. Unused if num_steps is given."""
    num_steps: PositiveInt | None = None
    """Optimiser steps; null trains num_epochs."""

    @property
    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group of parameters."""
        own = {
            "lora": None,
            "projector": self.projector_learning_rate,
            "skip_ca": self.skip_ca_learning_rate,
            "head": self.head_learning_rate,
        }
        return {group: self.learning_rate if rate is None else rate for group, rate in own.items()}


@dataclass(frozen=True, kw_only=True)
class RewardSystemSettings(ThreadSettings, AttentionSettings, DryRunSettings, group="system"):
    """Precision, memory, randomness and processes."""

    mixed_precision: Precision | None = None
    """Precision of the backbone; null is that of `accelerate launch`. Scores, SkipCA, head and loss are always
    float32."""
    microbatch_size: PositiveInt = 8
    """Records (pairs, ties or labelled images) in one forward pass of one process. It is a factor of the optimiser
    step's size: see accumulation_steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them: less memory, about a third slower."""
    num_workers: NonNegativeInt = 0
    """Processes that load images ahead of the model; 0 loads them in the training process."""
    dry_run_image_side: PositiveInt = 1024
    """Height and width in pixels of the images that dry_run plans for."""
    seed: NonNegativeInt = 0
    """Seed of all randomness; the same seed and options give the same reward model."""


@dataclass(frozen=True, kw_only=True)
class ValidationSettings(Settings, group="evaluation"):
    """Validation and early stopping."""

    evaluate_every: PositiveInt = 100
    """Optimiser steps between validations; each writes a checkpoint."""
    max_validation_records: PositiveInt = 1000
    """Validation records that training is interrupted for, drawn once at random if there are more. The finished reward
    model is measured on all."""
    patience: NonNegativeInt = 5
    """Validations in a row without a new highest accuracy before training stops; 0 never stops early."""


@dataclass(frozen=True, kw_only=True)
class RewardCheckpointSettings(ResumeSettings, group="checkpoints and logging"):
    """Checkpoints and trackers."""

    keep_checkpoints: Annotated[int, Ge(2)] = 2
    """Checkpoints to keep, the best and the newest ones; older ones are deleted."""
    trackers: str = ""
    """Experiment trackers to log to, comma-separated: wandb, tensorboard, aim, clearml, comet_ml, dvclive, mlflow,
    swanlab, trackio."""

    def rules(self) -> list[Rule]:
        return [*super().rules(), *tracker_rules(self.trackers)]


@dataclass(frozen=True, kw_only=True)
class Config(
    RewardCheckpointSettings,
    ValidationSettings,
    RewardSystemSettings,
    RewardOptimizerSettings,
    DataSettings,
    MixtureSettings,
    RewardDataSettings,
    BackboneSettings,
):
    """Settings of LLaVA-Reward's training; the defaults are the paper's."""

    perspective: Annotated[str, Group("reward")] = "alignment"
    """Name of what the reward model scores: alignment, fidelity, safety, ranking, or a name of your own."""
    loss: Literal["bradley_terry", "general_preference", "cross_entropy"] = "bradley_terry"
    """Training loss: bradley_terry or general_preference (the general preference model) for pairs, cross_entropy
    (binary) for labels."""
    temperature: PositiveFloat = 0.1
    """Divisor that turns differences of scores into log-odds; cross_entropy always uses 1."""
    tie_width: PositiveFloat = 0.5
    """Width of a tie in log-odds: images that are closer count as equal (Rao and Kupper). Used if the data has ties."""
    margin_per_rating: NonNegativeFloat = 0.0
    """Margin in log-odds by which a winner should lead, for each unit of its rating_gap. Not for cross_entropy."""

    def rules(self) -> list[Rule]:
        has_head, readout = self.readout == "last_token", "with readout prompt_likelihood, which has no"
        unused = self.loss != "cross_entropy" or not self.margin_per_rating
        is_mixed = self.data_weights is not None
        return [
            *super().rules(),
            ("margin_per_rating", unused, "0 with cross_entropy, which does not use it"),
            self.weights_rule("" if self.train_data == TOY_PAIRS else self.train_data),
            ("skip_ca", has_head or self.skip_ca, f"true {readout} SkipCA in any case"),
            ("skip_ca_heads", has_head or self.skip_ca_heads == 1, f"1 {readout} SkipCA"),
            ("skip_ca_learning_rate", has_head or self.skip_ca_learning_rate is None, f"null {readout} SkipCA"),
            ("head_learning_rate", has_head or self.head_learning_rate is None, f"null {readout} head"),
            ("hard_negatives", not (is_mixed and self.hard_negatives), "0 with data_weights"),
        ]


def with_defaults(arguments: Sequence[str], *, path: Path) -> list[str]:
    """Return the command line with `--config path` before it, unless it names --config or --backbone."""
    given = {argument.partition("=")[0] for argument in arguments}
    return list(arguments) if given & {"--config", "--backbone"} else ["--config", str(path), *arguments]
