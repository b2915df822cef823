"""Inference-time search with a diffusers pipeline, without a config or a run folder.

    from rlhf_t2i.search import best_of_n, to_pil

    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
    candidates = best_of_n(pipe, ["a fox in the snow"], "llava_reward:path/to/reward_model", num_candidates=16)
    to_pil(candidates.best[0]).save("fox.png")

The reward is a name as the recipes take it (`llava_reward:FOLDER`, `module:function`) or a function of images in [0, 1]
and prompts. A prompt is a text, or a row with the text under "prompt" and what the reward needs. The result holds all
images, their scores and the cost of the search.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.prompt_rows import as_prompts
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.rewards.pixels import to_pil as to_pil  # a part of the API
from rlhf_t2i.search import candidates, steering
from rlhf_t2i.search.context import Candidates, RewardFunction, SearchContext, Veto
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.types import DiffusionModel, Sampler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]


def best_of_n(  # noqa: PLR0913  # one keyword for each setting, as there is no config
    model: DiffusionModel | DiffusionPipeline,
    prompts: Sequence[str | Mapping[str, Any]],
    reward: RewardFunction | str,
    *,
    num_candidates: int = 16,
    prune_after: Sequence[int] = (),
    num_denoising_steps: int = 50,
    eta: float = 0.0,
    guidance_scale: float = 7.5,
    microbatch_size: int = 8,
    veto: Veto | None = None,
    standardise: bool = False,
    seed: int = 0,
) -> Candidates:
    """Generate `num_candidates` images of each prompt; `best` of the result is the one with the highest reward.

    The worse half of the candidates is dropped after each number of denoising steps in `prune_after`: (10, 20) of 50
    costs 45 % of the denoiser calls. Image i of prompt p equals the image that diffusers' DDIM generates with the seed
    `seed + p * num_candidates + i`. `microbatch_size` is the number of images in one forward pass. With `standardise`
    each of several rewards is divided by its standard deviation among the images of a prompt before they are summed.
    """
    if num_candidates < 1:
        raise ValueError(f"num_candidates is {num_candidates}; it must be at least 1.")
    texts = as_prompts(prompts)
    sampler = _sampler(model := as_diffusion_model(model), num_denoising_steps, eta=eta, guidance_scale=guidance_scale)
    context = SearchContext(
        model, as_reward(reward), sampler=sampler, microbatch_size=microbatch_size, veto=veto, standardise=standardise
    )
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(texts) * num_candidates)]
    if not prune_after:
        return candidates.best_of_n(context, texts, generators=generators)
    keep = candidates.halving(num_candidates, after=prune_after)
    return candidates.pruned_best_of_n(context, texts, keep=keep, generators=generators).candidates


def fk_steering(  # noqa: PLR0913
    model: DiffusionModel | DiffusionPipeline,
    prompts: Sequence[str | Mapping[str, Any]],
    reward: RewardFunction | str,
    *,
    num_particles: int = 4,
    strength: float = 2.0,
    reward_std: float | None = None,
    potential: PotentialName = "difference",
    resample_after: Sequence[int] | None = None,
    ess_threshold: float = 1.0,
    num_denoising_steps: int = 50,
    eta: float = 1.0,
    guidance_scale: float = 7.5,
    microbatch_size: int = 8,
    veto: Veto | None = None,
    seed: int = 0,
) -> steering.SteeringResult:
    """Sample particles of each prompt that are resampled in favour of high rewards (arXiv:2501.06848).

    Images follow p(image) * exp(strength * reward / reward_std). Particles are resampled after each number of denoising
    steps in `resample_after`; None is after each fifth of them, such as 10, 20, 30 and 40 of 50. If `reward_std` is
    None, it is measured on 4 images of each of the first 16 prompts, whose cost is not part of the result's cost.
    """
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it must be at least 1.")
    texts = as_prompts(prompts)
    sampler = _sampler(model := as_diffusion_model(model), num_denoising_steps, eta=eta, guidance_scale=guidance_scale)
    context = SearchContext(model, as_reward(reward), sampler=sampler, microbatch_size=microbatch_size, veto=veto)
    count = len(texts) * num_particles
    if resample_after is None:
        resample_after = steering.evenly_spaced(num_denoising_steps)
    # Before reward_std is measured, so that settings that cannot work are refused without sampling an image.
    steering.check_steering(context, resample_after, reward_std=reward_std or 1.0, ess_threshold=ess_threshold)
    if reward_std is None:
        calibration_prompts = texts[: steering.NUM_CALIBRATION_PROMPTS]
        first = seed + count + len(texts)
        num_calibration = steering.NUM_CALIBRATION_IMAGES * len(calibration_prompts)
        calibration = [torch.Generator().manual_seed(first + i) for i in range(num_calibration)]
        reward_std = steering.measure_reward_std(context, calibration_prompts, generators=calibration)
    return steering.fk_steering(
        context,
        texts,
        strength=strength,
        reward_std=reward_std,
        potential=potential,
        resample_after=resample_after,
        ess_threshold=ess_threshold,
        generators=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        resampling=[torch.Generator().manual_seed(seed + count + p) for p in range(len(texts))],
    )


def as_diffusion_model(model: DiffusionModel | DiffusionPipeline) -> DiffusionModel:
    """Wrap a diffusers pipeline as a `DiffusionModel`; its networks are shared, not copied."""
    if isinstance(model, DiffusionModel):
        return model
    from rlhf_t2i.models.load import as_policy  # takes seconds

    return as_policy(model)


def as_reward(reward: RewardFunction | str) -> RewardFunction:
    """Load a reward given by name; return any other unchanged."""
    return load_rewards(reward, finite=False) if isinstance(reward, str) else reward


def _sampler(model: DiffusionModel, num_steps: int, *, eta: float, guidance_scale: float) -> Sampler:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1].")
    schedule = model.schedule(num_steps)
    return Sampler(schedule, stochastic(schedule, eta=eta), guidance_scale)
