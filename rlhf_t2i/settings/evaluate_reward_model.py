"""Options of recipes/evaluate_reward_model.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf_t2i.settings.base import Group, Settings
from rlhf_t2i.settings.groups import (
    DataSettings,
    FolderSettings,
    MicrobatchSettings,
    PrecisionSettings,
    SeedSettings,
    ThreadSettings,
)
from rlhf_t2i.settings.ranges import (
    DataPaths,
    InputPaths,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Precision,
    RewardModelPath,
)
from rlhf_t2i.shapes.names import TOY_REWARD_MODEL


@dataclass(frozen=True, kw_only=True)
class TestDataSettings(Settings, group="data"):
    """Data to evaluate on."""

    test_data: DataPaths | None = None
    """Data files to evaluate on, comma-separated PATH or FORMAT:PATH (docs/data.md), or shapes for the pairs of the toy
    world; null is shapes if there are no benchmarks, else none."""
    benchmarks: InputPaths = ""
    """Published test sets to evaluate on, comma-separated NAME:PATH (docs/data.md): tifa160, mj_bench, unsafe_bench,
    image_reward, hpdv2, hpdv3, hpdv3_plus_plus, pick_a_pic, genai_bench, genai_bench_tiger, mmrb2."""


@dataclass(frozen=True, kw_only=True)
class Config(
    ThreadSettings,
    PrecisionSettings,
    MicrobatchSettings,
    SeedSettings,
    FolderSettings,
    DataSettings,
    TestDataSettings,
):
    """Settings of a reward model's evaluation."""

    reward: Annotated[RewardModelPath, Group("reward")] = TOY_REWARD_MODEL
    """Reward model to evaluate: folder or Hub id of a LLaVA-Reward, shapes or shapes-skip-ca for a built-in one, or one
    of other projects as NAME:PATH (clip, clip_score, pick_score, hps, hps_v3, image_reward, aesthetic, vqa_score,
    visual_gpt_score, unified_reward)."""
    tie_threshold: Annotated[NonNegativeFloat, Group("evaluation")] = 0.0
    """Difference of two scores up to which a benchmark counts them as a tie."""
    label_threshold: Annotated[float, Group("evaluation")] = 0.0
    """Score from which a benchmark counts an image as good (safe)."""
    num_resamples: Annotated[PositiveInt, Group("evaluation")] = 2000
    """Bootstrap resamples for the 95 % intervals of benchmarks."""
    num_shown: Annotated[NonNegativeInt, Group("evaluation")] = 20
    """Pairs on the report page: those with the largest errors."""
    mixed_precision: Precision | None = None
    """Precision of a LLaVA-Reward's backbone; null is its precision in training. Scores are always float32."""
    quantization: Annotated[Literal["int8", "nf4"], Group("model and LoRA")] | None = None
    """Storage of the linear layers of a LLaVA-Reward's language model: int8 (8 bits, torchao), nf4 (4 bits,
    bitsandbytes), or null, the backbone's precision."""
    microbatch_size: PositiveInt = 64
    """Images or pairs in one forward pass of one process; changes memory and speed, and scores by rounding only."""
    seed: NonNegativeInt = 0
    """Seed of the toy world's pairs and of the bootstrap."""
