"""Options that several commands share, a class for each set that occurs together."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from rlhf_t2i.models.table import family_entry, pipeline_class_of
from rlhf_t2i.rewards.terms import join_terms, reward_names_of
from rlhf_t2i.settings.base import Rule, Settings
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.dry_run import DryRunSettings
from rlhf_t2i.settings.evaluation import EvaluationSettings
from rlhf_t2i.settings.image_size import image_size
from rlhf_t2i.settings.launch import shared_rule, tracker_rules
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.memory import AttentionSettings, SpeedSettings, TrainingMemorySettings
from rlhf_t2i.settings.no_imports import ImportSettings
from rlhf_t2i.settings.optimizer import OptimizerSettings
from rlhf_t2i.settings.ranges import (
    InputPath,
    ModelPath,
    NonNegativeFloat,
    NonNegativeInt,
    PathPrefix,
    PositiveFloat,
    PositiveInt,
    Precision,
    PromptsPath,
    RewardNames,
)
from rlhf_t2i.shapes.names import TOY_MODEL, TOY_PROMPTS, TOY_REWARD, TOY_SIGN_PROMPTS, TOY_SIGN_REWARD


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings, group="model and LoRA"):
    """The diffusion model."""

    model: ModelPath = by_model(TOY_MODEL, TOY_MODEL)
    """Diffusion model: a diffusers pipeline folder, a Hub id, or a built-in model (shapes, shapes-flow)."""
    resolution: PositiveInt | None = by_model(None, None)
    """Side of square images in pixels; null is the size of height and width, or without them the model's native one."""
    height: PositiveInt | None = by_model(None, None)
    """Height of images in pixels, given together with width and without resolution; null is that of resolution."""
    width: PositiveInt | None = by_model(None, None)
    """Width of images in pixels, given together with height and without resolution; null is that of resolution."""
    complex_human_instruction: bool = by_model(True, True)
    """Put SANA's instruction before each prompt, as its stock pipeline does (complex human instruction); false encodes
    the prompt alone. No other family has one."""
    quantization: Literal["int8", "nf4"] | None = None
    """Storage of the linear layers' frozen weights, in denoiser and text encoders: int8 (8 bits, torchao), nf4 (4 bits,
    bitsandbytes), or null, the precision of the networks. Training needs a LoRA, on one process or under DDP."""

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """Side of square images in pixels, or their height and width; None is the model's native size."""
        return image_size(vars(self))

    def rules(self) -> list[Rule]:
        image_size(vars(self))  # or it raises
        can_leave_out = self.complex_human_instruction or family_entry(pipeline_class_of(self.model)).has_instruction
        return [*super().rules(), ("complex_human_instruction", can_leave_out, "true for a model without one")]


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings, group="model and LoRA"):
    """Adapters of the diffusion model."""

    init_weights: InputPath | None = None
    """Weights of the full denoiser to start from, in place of the model's own: a run folder, or its unet or transformer
    folder; null is the model's own."""
    init_lora: InputPath | None = None
    """LoRA to continue training, whose rank and alpha are kept: a run folder, a LoRA folder or file in the key layout
    of diffusers or Kohya, or a Hub id; null starts a new one."""
    reference_model: Literal["start", "base"] = "start"
    """Model that a KL penalty and the loss of Diffusion-DPO compare with: start is the weights that training starts
    from (init_weights, init_lora), base the model without them."""
    lora_rank: PositiveInt | None = by_model(None, family="lora_rank")
    """Rank of a new LoRA; null trains all weights of the denoiser. With init_lora, null keeps the rank of that LoRA,
    and another number is an error."""
    lora_alpha: PositiveFloat | None = None
    """LoRA scaling: adapters are multiplied by lora_alpha / lora_rank; null is lora_rank, a factor of 1."""
    lora_targets: str | None = None
    """Layers of the trained LoRA: attention, attention_mlp, all_linear, or comma-separated endings of their names, such
    as to_q,to_v; null is attention."""
    use_rslora: bool = False
    """Scale the LoRA by lora_alpha / sqrt(lora_rank) in place of lora_alpha / lora_rank (rsLoRA, arXiv:2312.03732)."""
    use_dora: bool = False
    """Train the magnitude of each output beside the LoRA, which then changes the direction alone (DoRA,
    arXiv:2402.09353)."""
    export_format: Literal["diffusers", "both"] = "diffusers"
    """Key layout of the exported LoRA: diffusers is that of diffusers, both adds Kohya's, which ComfyUI and A1111 read
    (Stable Diffusion 1.x, 2.x and XL, FLUX.1, FLUX.2 klein, Qwen-Image)."""
    lora_scale: PositiveFloat = 1.0
    """Scale of the LoRA in evaluation and export, relative to training; below 1 moves towards the base model."""

    def unused(self) -> Collection[str]:
        return [*super().unused(), *(["lora_rank"] if self.init_lora else [])]

    def rules(self) -> list[Rule]:
        kind = "the file of init_lora says it" if self.init_lora else "a LoRA is trained only with lora_rank"
        is_new = self.lora_rank is not None and not self.init_lora
        targets = self.lora_targets is None or (is_new and bool(names(self.lora_targets)))
        return [
            *super().rules(),
            (
                "lora_scale",
                self.lora_scale == 1 or self.trains_lora,
                "1 without a LoRA (lora_rank, init_lora are null)",
            ),
            ("lora_scale", self.lora_scale == 1 or not self.use_dora, "1 with use_dora, which has no such scale"),
            ("lora_targets", targets, f"null ({kind}), a preset or at least one name"),
            ("use_rslora", is_new or not self.use_rslora, f"false: {kind}"),
            ("export_format", self.export_format == "diffusers" or self.trains_lora, "diffusers without a LoRA"),
            ("use_dora", is_new or not self.use_dora, f"false: {kind}"),
        ]

    @property
    def trains_lora(self) -> bool:
        """True if a LoRA is trained, False if all weights are."""
        return self.lora_rank is not None or self.init_lora is not None


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings(Settings, group="sampling"):
    """Classifier-free guidance."""

    guidance_scale: Annotated[float, Ge(1)] = by_model(1.0, family="guidance_scale")
    """Scale of classifier-free guidance wherever the model predicts; 1 is no guidance and halves the cost."""


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(GuidanceSettings, group="sampling"):
    """Sampling, of training or of a search."""

    prompts: PromptsPath = by_model(TOY_PROMPTS, signs=TOY_SIGN_PROMPTS)
    """Prompts to train on: a .txt file with one a line, a .jsonl, .json, .csv or .parquet file with "prompt" in each
    row, hf:ID@SPLIT for a data set of the Hub, shapes or words for the training prompts of the toy
    world."""
    num_denoising_steps: PositiveInt = by_model(8, family="training_steps")
    """Denoising steps for one image."""


@dataclass(frozen=True, kw_only=True)
class RewardSettings(ImportSettings, group="reward"):
    """The reward that is optimised."""

    rewards: RewardNames = by_model(TOY_REWARD, signs=TOY_SIGN_REWARD)
    """Rewards to optimise, comma-separated NAME or NAME=WEIGHT, summed by weight (docs/rewards.md)."""

    @property
    def scored_rewards(self) -> str:
        """The rewards that sampled images are scored with."""
        return self.rewards


@dataclass(frozen=True, kw_only=True)
class FolderSettings(Settings, group="checkpoints and logging"):
    """The run folder."""

    run_folder: str | None = None
    """Folder for everything that the run writes; null makes runs/RECIPE-DATE."""


@dataclass(frozen=True, kw_only=True)
class ResumeSettings(FolderSettings, group="checkpoints and logging"):
    """A run folder that can be resumed."""

    resume: bool = False
    """Continue the run in run_folder, or without run_folder the newest run of this recipe under runs/."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings(ResumeSettings, group="checkpoints and logging"):
    """Checkpoints and trackers of training."""

    checkpoint_every: NonNegativeInt = 10
    """Training steps between checkpoints; 0 writes one only at the end or when the run is stopped."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints to keep; older ones are deleted."""
    stall_timeout: NonNegativeFloat = 1800.0
    """Seconds without a sign of work after which a process of several counts as standing still, which ends the job with
    its rank; 0 waits without end. Longer than the slowest call of a reward and the writing of a checkpoint."""
    trackers: str = ""
    """Experiment trackers to log to, comma-separated: wandb, tensorboard, aim, clearml, comet_ml, dvclive, mlflow,
    swanlab, trackio. metrics.jsonl is always written."""

    def rules(self) -> list[Rule]:
        return [*super().rules(), *tracker_rules(self.trackers)]


@dataclass(frozen=True, kw_only=True)
class SeedSettings(Settings, group="system"):
    """Randomness."""

    seed: NonNegativeInt = 0
    """Seed of all randomness; the same seed and options give the same run."""


@dataclass(frozen=True, kw_only=True)
class MicrobatchSettings(Settings, group="system"):
    """Memory."""

    microbatch_size: PositiveInt = by_model(64, family="microbatch_size")
    """Images in one forward pass of one process; changes memory and speed, and results by rounding only. Halved when
    memory runs out, unless the network is sharded."""


@dataclass(frozen=True, kw_only=True)
class PrecisionSettings(AttentionSettings, group="system"):
    """Numerical precision."""

    mixed_precision: Precision | None = None
    """Precision of the networks; null is that of `accelerate launch`. Log-probabilities, losses and advantages are
    always float32."""


@dataclass(frozen=True, kw_only=True)
class ThreadSettings(Settings, group="system"):
    """Threads."""

    num_cpu_threads: NonNegativeInt = 0
    """Threads of one process on a CPU; 0 divides all cores among the processes."""


@dataclass(frozen=True, kw_only=True)
class ProcessSettings(ThreadSettings, PrecisionSettings, MicrobatchSettings, SeedSettings, group="system"):
    """Precision, memory, randomness and threads of the processes that `accelerate launch` starts."""


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings, group="data"):
    """Reading of preference data."""

    image_root: InputPath | None = None
    """Folder that relative image paths of data files start from; null is each file's own folder. Images outside of it
    are refused."""
    image_prefix: PathPrefix | None = None
    """OLD=NEW: image paths that start with the folder OLD are read as if they started with NEW."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Treatment of a record that cannot be used, or whose image cannot: stop, or skip it, write it to skipped.jsonl in
    the run folder, and train on another one in its place. More than half of them stop in any case."""
    streaming: bool = False
    """Read the data files of hf:ID@SPLIT on the Hub when a batch needs them, instead of downloading them first. Paths
    in buckets, such as s3://bucket/pairs.jsonl, are always read so."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(
    DryRunSettings,
    ProcessSettings,
    SpeedSettings,
    TrainingMemorySettings,
    CheckpointSettings,
    EvaluationSettings,
    OptimizerSettings,
    RewardSettings,
    SamplingSettings,
    LoraSettings,
    ModelSettings,
):
    """Options of every recipe that trains a diffusion model."""

    def given_later(self) -> Collection[str]:
        return ("prompts", "rewards")

    @property
    def images_per_optimizer_step(self) -> int | None:
        """Images whose gradients one optimiser step adds up, over all processes; None if that is not a fixed number."""
        return None

    def derived(self) -> Mapping[str, Any]:
        measured = reward_names_of(self.evaluation_rewards) + reward_names_of(self.scored_rewards)
        return {"evaluation_rewards": join_terms(dict.fromkeys(measured))}

    def rules(self) -> list[Rule]:
        plain = self.quantization is None
        return [
            *super().rules(),
            ("evaluation_rewards", bool(self.evaluation_rewards), "at least one reward"),
            ("quantization", plain or self.trains_lora, "null without a LoRA (lora_rank, init_lora are null)"),
            ("quantization", plain or not self.use_dora, "null with use_dora, which needs the weights' magnitudes"),
            ("quantization", plain or not self.init_weights, "null with init_weights; publish these and train on them"),
        ]


@dataclass(frozen=True, kw_only=True)
class GroupedSamplingSettings(Settings, group="sampling"):
    """Several images of each of several prompts, whose rewards are compared."""

    prompts_per_step: PositiveInt = 16
    """Distinct prompts in one training step, over all processes; a multiple of the number of processes."""
    images_per_prompt: PositiveInt = 12
    """Images sampled for each prompt in one training step, all on one process."""

    def rules(self) -> list[Rule]:
        return [*super().rules(), shared_rule("prompts_per_step", self.prompts_per_step)]
