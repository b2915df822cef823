"""Better images from a model as it is, in three lines:

    pipe = DiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5").to("cuda")
    found = best_of_n(pipe, ["a fox in the snow"], "llava_reward:path/to/judge", n=16)
    to_pil(found.best[0]).save("fox.png")

The images are chosen by any reward: one of the names that recipes take (`llava_reward:FOLDER`, `module:function`), or a
function of images in [0, 1] and prompts. What all candidates scored and what the search cost is in the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.search import best_of_n as search
from rlhf_t2i.search import fk_steering as steering
from rlhf_t2i.search.context import Candidates, RewardFunction, SearchContext, Veto
from rlhf_t2i.search.particles import PotentialName
from rlhf_t2i.types import DiffusionModel, Sampler

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]


def best_of_n(  # noqa: PLR0913  # a caller without a config wants a keyword for each
    model: DiffusionModel | DiffusionPipeline,
    prompts: Sequence[str],
    reward: RewardFunction | str,
    *,
    n: int = 16,
    prune_after: Sequence[int] = (),
    num_denoising_steps: int = 50,
    eta: float = 0.0,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    veto: Veto | None = None,
    seed: int = 0,
) -> Candidates:
    """Paint n images of each prompt; `best` of the result holds the one that the reward likes best.

    After each of `prune_after` denoising steps the worse half is given up: (10, 20) of 50 cost 45 % of all. Image i
    of prompt p is the one that diffusers' DDIM paints with the seed `seed + p * n + i`.
    """
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1.")
    sampler = _sampler(model := as_diffusion_model(model), num_denoising_steps, eta=eta, guidance_scale=guidance_scale)
    context = SearchContext(model, as_reward(reward), sampler=sampler, batch_size=batch_size, veto=veto)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts) * n)]
    if not prune_after:
        return search.best_of_n(context, prompts, generators=generators)
    keep = search.halving(n, after=prune_after)
    return search.pruned_best_of_n(context, prompts, keep=keep, generators=generators).candidates


def fk_steering(  # noqa: PLR0913
    model: DiffusionModel | DiffusionPipeline,
    prompts: Sequence[str],
    reward: RewardFunction | str,
    *,
    num_particles: int = 4,
    strength: float = 2.0,
    spread: float | None = None,
    potential: PotentialName = "difference",
    resample_after: Sequence[int] = (10, 20, 30, 40),
    ess_threshold: float = 1.0,
    num_denoising_steps: int = 50,
    eta: float = 1.0,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
    veto: Veto | None = None,
    seed: int = 0,
) -> steering.Steered:
    """Paint particles of each prompt that multiply where the reward is high (arXiv:2501.06848).

    Images follow p(image) * exp(strength * reward / spread). The reward's spread among images of one prompt is
    measured on 4 images of each of the first 16 prompts unless it is given; that is not in the result's cost.
    """
    if num_particles < 1:
        raise ValueError(f"num_particles is {num_particles}; it must be at least 1.")
    sampler = _sampler(model := as_diffusion_model(model), num_denoising_steps, eta=eta, guidance_scale=guidance_scale)
    context = SearchContext(model, as_reward(reward), sampler=sampler, batch_size=batch_size, veto=veto)
    count = len(prompts) * num_particles
    # Also where a spread is given: nothing is painted before settings that cannot work are refused.
    steering.check_steering(context, resample_after, spread=spread or 1.0, ess_threshold=ess_threshold)
    if spread is None:
        few = prompts[:16]
        pilots = [torch.Generator().manual_seed(seed + count + len(prompts) + i) for i in range(4 * len(few))]
        spread = steering.reward_spread(context, few, generators=pilots)
    return steering.fk_steering(
        context,
        prompts,
        strength=strength,
        spread=spread,
        potential=potential,
        resample_after=resample_after,
        ess_threshold=ess_threshold,
        generators=[torch.Generator().manual_seed(seed + i) for i in range(count)],
        resampling=[torch.Generator().manual_seed(seed + count + p) for p in range(len(prompts))],
    )


def to_pil(image: Float[Tensor, "3 Y X"]) -> Image.Image:
    """An image that can be shown and saved."""
    pixels = (image.clamp(0, 1) * 255).round().permute(1, 2, 0).cpu().numpy().astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(pixels))


def as_diffusion_model(model: DiffusionModel | DiffusionPipeline) -> DiffusionModel:
    """A diffusers pipeline as something that paints; its networks are shared, not copied."""
    if isinstance(model, DiffusionModel):
        return model
    from rlhf_t2i.models.load import as_policy  # takes seconds

    return as_policy(model)


def as_reward(reward: RewardFunction | str) -> RewardFunction:
    """What a name stands for; a function is one already."""
    return load_rewards(reward, finite=False) if isinstance(reward, str) else reward


def _sampler(model: DiffusionModel, num_steps: int, *, eta: float, guidance_scale: float) -> Sampler:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it must be in [0, 1].")
    schedule = model.schedule(num_steps)
    return Sampler(schedule, stochastic(schedule, eta=eta), guidance_scale)
