"""The reward model that people's votes teach, as options describe it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import torch

from reward_model.backbones.load import load_backbone
from reward_model.config import RewardModelConfig
from reward_model.model import GROUPS, RewardModel
from reward_model.online import OnlineRewardModel
from reward_model.scoring import LlavaReward
from rlhf_t2i.output.run_folder import reward_model_of
from rlhf_t2i.settings.live_preferences import OnlineRewardSettings
from rlhf_t2i.shapes.names import TOY_BACKBONE, TOY_BACKBONE_FOLDER

_TRAINED: dict[Literal["head", "skip_ca", "all"], tuple[str, ...]] = {
    "head": ("head",),
    "skip_ca": ("skip_ca", "head"),
    "all": GROUPS,
}


def load_online(config: OnlineRewardSettings, *, seed: int) -> OnlineRewardModel:
    """Load the reward model to go on with, or add an untrained head, SkipCA and LoRA to a backbone, on the CPU.

    Raises FileNotFoundError or ValueError if there is no such model, or if its head gives no scores.
    """
    if config.start_reward_model is not None:
        model = LlavaReward.from_pretrained(reward_model_of(config.start_reward_model), device="cpu").model
    else:
        model = untrained(config, seed=seed)
    return OnlineRewardModel(
        model, num_members=config.num_members, groups=_TRAINED[config.reward_parts],
        learning_rate=config.reward_learning_rate, batch_size=config.votes_per_batch, tie_width=config.tie_width,
        seed=seed,
    )  # fmt: skip


def untrained(config: OnlineRewardSettings, *, seed: int) -> RewardModel:
    """Return a backbone with an untrained perspective."""
    source = str(TOY_BACKBONE_FOLDER) if config.backbone == TOY_BACKBONE else config.backbone
    dtype = "bfloat16" if torch.cuda.is_available() and config.backbone != TOY_BACKBONE else "float32"
    model = RewardModel(load_backbone(source, dtype=getattr(torch, dtype)))
    model.add(
        RewardModelConfig(
            perspective="votes",
            backbone=os.path.abspath(source) if Path(source).is_dir() else source,
            model_type=model.model.config.model_type,
            width=model.backbone.width,
            lora_rank=config.reward_lora_rank,
            lora_alpha=2.0 * config.reward_lora_rank,
            lora_dropout=0.0,
            dtype=dtype,
        ),
        seed=seed,
    )
    return model
