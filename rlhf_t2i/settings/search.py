"""Options that the recipes of inference-time search share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from rlhf_t2i.settings.base import Group
from rlhf_t2i.settings.by_model import by_model
from rlhf_t2i.settings.dry_run import DryRunSettings
from rlhf_t2i.settings.from_run import sampling_of_runs
from rlhf_t2i.settings.groups import ModelSettings, ProcessSettings, ResumeSettings, RewardSettings, SamplingSettings
from rlhf_t2i.settings.ranges import InputPath, OneReward, PositiveInt, PromptsPath, RewardNames
from rlhf_t2i.shapes.names import TOY_PROMPTS, TOY_SIGN_PROMPTS


def steps_rule(num_denoising_steps: int) -> str:
    """Return what a list of denoising steps before the last one must be."""
    if num_denoising_steps == 1:
        return "empty with one denoising step"
    return f"comma-separated integers, from 1 to {num_denoising_steps - 1}"


@dataclass(frozen=True, kw_only=True)
class SearchConfig(DryRunSettings, ProcessSettings, ResumeSettings, RewardSettings, SamplingSettings, ModelSettings):
    """Options of every search. Defaults of model, resolution, steps and guidance are those of the run whose weights are
    used."""

    def run_settings(self) -> Mapping[str, Any]:
        found = sampling_of_runs([self.weights] if self.weights else [], vars(self))
        return {name: found[name] for name in found if not name.startswith("evaluation_")}

    weights: Annotated[InputPath, Group("model and LoRA")] | None = None
    """Trained weights to sample with: the folder of a run, of its exported lora, unet or transformer, or of a
    checkpoint; null is the model itself."""
    prompts: PromptsPath = by_model(TOY_PROMPTS, signs=TOY_SIGN_PROMPTS)
    """Prompts to search for: a .txt file with one a line, a .jsonl (GenEval's too), .json, .csv or .parquet file
    with "prompt" in each row, hf:ID@SPLIT for a data set of the Hub, or shapes or words for the held-out prompts of the
    toy world."""
    images_per_prompt: Annotated[PositiveInt, Group("sampling")] = 4
    """Images to return for each prompt, each from a search of its own."""
    searches_per_batch: Annotated[PositiveInt, Group("system")] = 8
    """Searches that run together and are written together; a killed run loses at most these."""
    num_denoising_steps: PositiveInt = by_model(8, family="sampling_steps")
    microbatch_size: PositiveInt = by_model(64, family="microbatch_size")
    """Images in one forward pass of one process, halved when memory runs out; changes memory and speed, and results by
    rounding only."""

    veto: Annotated[OneReward, Group("reward")] | None = None
    """Reward that excludes images, one NAME (docs/rewards.md); null excludes none."""
    veto_below: Annotated[float, Group("reward")] = 0.0
    """Score of the veto reward below which an image is excluded; it is returned only if all images of its search are
    excluded."""
    evaluation_rewards: Annotated[RewardNames, Group("evaluation")] = by_model("oracle,oracle_pass", "")
    """Rewards to measure on finished images, comma-separated NAME (docs/rewards.md); they do not influence the search.
    May be empty."""
