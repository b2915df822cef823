"""Options of recipes/live_preferences.py."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from rlhf_t2i.settings.base import Group, Rule, Settings
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.ddpo import DdpoSettings
from rlhf_t2i.settings.diffusion_dpo import DpoUpdateSettings
from rlhf_t2i.settings.ranges import (
    BackbonePath,
    InputPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RewardModelPath,
    RewardNames,
)
from rlhf_t2i.settings.server import ServerSettings
from rlhf_t2i.shapes.names import TOY_BACKBONE


@dataclass(frozen=True, kw_only=True)
class VoteSettings(Settings, group="data"):
    """Questions to people."""

    question: Literal["pair", "best_of_four", "good_bad"] = "pair"
    """Question to people: the better one of two images, the best one of four, or whether one image is good."""
    acquisition: Literal["disagreement", "entropy", "random"] = "disagreement"
    """Rule that chooses among a step's images: those on which the members of the reward model disagree most (BALD,
    arXiv:1112.5745), those whose predicted preference is nearest to one half (uncertainty sampling,
    arXiv:cmp-lg/9407020), or at random."""
    questions_per_step: PositiveInt = 8
    """Questions that each training step adds, about different prompts."""
    max_question_age: NonNegativeInt = 2
    """Training steps after which a question that nobody has answered is withdrawn, since the model has changed."""
    first_votes: PositiveInt = 16
    """Votes that the first update waits for. Nothing later waits for people."""
    guideline: Annotated[InputPath, Group("data")] | None = None
    """Text file that the page shows to annotators at the start and on request; an empty line begins a paragraph. null
    is a short general text."""


@dataclass(frozen=True, kw_only=True)
class OnlineRewardSettings(Settings, group="reward"):
    """The reward model that votes teach."""

    learn: Literal["reward_model", "dpo", "both"] = "reward_model"
    """Training of the diffusion model: by the reward model that votes teach (see update), by Diffusion-DPO on the voted
    pairs (the reward model then only chooses questions), or both in each step."""
    update: Annotated[Literal["ddpo", "diffusion_nft"], Group("algorithm")] = "ddpo"
    """Update by the reward model: DDPO, or DiffusionNFT, which needs the images of the step and no
    log-probabilities."""
    nft_beta: Annotated[PositiveFloat, Group("algorithm")] = 1.0
    """Distance of DiffusionNFT's implicit positive and negative policies from the weights that sampled."""
    start_reward_model: RewardModelPath | None = None
    """LLaVA-Reward that votes go on to teach: folder of the run that trained it or of the model, a Hub id, or
    shapes-skip-ca for a built-in one; null is an untrained one on the backbone."""
    backbone: Annotated[BackbonePath, Group("model and LoRA")] = by_model(TOY_BACKBONE)
    """Multimodal LLM: folder or Hub id of a supported family (Phi-3.5-vision, LLaVA-1.5, Qwen2.5-VL, ...), or shapes
    for the small LLaVA of the toy world. Unused with start_reward_model."""
    reward_parts: Literal["head", "skip_ca", "all"] = "skip_ca"
    """Trained parts of the reward model: the head alone, SkipCA and head, or also LoRA and projector."""
    reward_lora_rank: PositiveInt = 16
    """Rank of the LoRA of an untrained reward model, whose alpha is twice the rank."""
    num_members: PositiveInt = 5
    """Members of the reward model's ensemble, each with its own SkipCA and head. The reward is their mean."""
    reward_learning_rate: PositiveFloat = 5e-4
    """Learning rate of the reward model (AdamW)."""
    updates_per_vote: PositiveFloat = 0.5
    """Optimiser steps of the reward model for each new vote, on batches of all votes so far."""
    votes_per_batch: PositiveInt = 32
    """Pairs, or labelled images, in one optimiser step of the reward model."""
    tie_width: Annotated[PositiveFloat, Group("algorithm")] = 0.5
    """Width of a tie in log-odds: images that are closer count as equal (Rao and Kupper). Used if the data has ties."""


@dataclass(frozen=True, kw_only=True)
class Config(ServerSettings, VoteSettings, OnlineRewardSettings, DpoUpdateSettings, DdpoSettings):
    """Settings of training by live votes. `microbatch_size` counts images in sampling and scoring, (image, step) pairs
    in DDPO's update, and images in Diffusion-DPO's, two for each pair."""

    images_per_prompt: Annotated[int, Ge(2)] = 12
    """Images sampled for each prompt in one training step (a group), all on one process."""
    advantages: Literal["group_relative", "whole_batch"] = "group_relative"
    """Mean and standard deviation that rewards are normalised by: of the prompt's images in this step (group_relative),
    or of all images in this step (whole_batch). Not of earlier steps, as each vote changes the scale of the scores."""
    rewards: RewardNames = by_model("", "")
    """Rewards to add to the score that votes teach, comma-separated NAME or NAME=WEIGHT, summed by weight
    (docs/rewards.md); empty adds none."""
    pairs_per_step: Annotated[PositiveInt, Group("data")] = 32
    """Pairs of the preference data in one training step, over all processes. Unused with --learn reward_model."""
    num_inner_epochs: PositiveInt = 1
    """Passes of DDPO over the images of a training step, and optimiser steps of Diffusion-DPO on its pairs."""

    def unused(self) -> Collection[str]:
        unused = [*super().unused(), *(["backbone"] if self.start_reward_model else [])]
        by_reward = self.learn != "dpo"
        if not by_reward:
            unused.append("update")
        if not (by_reward and self.update == "diffusion_nft"):
            unused.append("nft_beta")
        if not (by_reward and self.update == "ddpo"):
            unused += ["window_start", "window_end", "clip_range"]
        return unused

    def needed(self) -> Collection[str]:
        return ("evaluation_rewards",)

    def given_later(self) -> Collection[str]:
        return ()  # there is no `train` for callers in Python

    def rules(self) -> list[Rule]:
        num_images = {"pair": 2, "best_of_four": 4, "good_bad": 1}[self.question]
        fits = self.images_per_prompt >= num_images
        return [
            *super().rules(),
            ("dry_run", not self.dry_run, "false; recipes/ddpo.py plans the same updates"),
            ("images_per_prompt", fits, f"at least {num_images}, as many as a question shows"),
            ("learn", self.learn == "reward_model" or self.question != "good_bad",
             "reward_model with --question good_bad, which gives no pairs"),
            ("acquisition", self.acquisition != "disagreement" or self.num_members > 1,
             "entropy or random with one member, which cannot disagree"),
        ]  # fmt: skip
