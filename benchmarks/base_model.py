"""Measure image quality and prompt following of the toy base model: `python benchmarks/base_model.py`."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.shapes.names import TOY_MODEL, TOY_PROMPTS
from rlhf_t2i.shapes.oracle import oracle_scores, shows_something
from rlhf_t2i.shapes.scenes import all_scenes, render
from rlhf_t2i.training.evaluation import evaluate, evaluation_set
from rlhf_t2i.types import Sampler

NUM_IMAGES = 408


def main() -> None:
    """Print a table of samplers, and the pass rate of images that the autoencoder reconstructs."""
    base = load_policy(TOY_MODEL, device=torch.device("cpu"))
    rewards = load_rewards("oracle,oracle_pass").rewards
    lines = ["| prompts | steps | eta | guidance | graded | pass | sharp | diversity |", "|---" * 8 + "|"]
    for split, num_steps, eta, guidance_scale in [
        ("held-out", 8, 0.0, 1.0),
        ("held-out", 8, 1.0, 1.0),
        ("held-out", 20, 0.0, 1.0),
        ("held-out", 8, 0.0, 3.0),
        ("held-out", 8, 1.0, 3.0),
        ("training", 8, 0.0, 1.0),
        ("training", 8, 1.0, 1.0),
    ]:
        all_prompts = load_prompts(TOY_PROMPTS, held_out=split == "held-out")
        prompts, seeds = evaluation_set(all_prompts, num_images=NUM_IMAGES, seed=1_000_000)
        sampler = Sampler(base.schedule(num_steps), partial(ddim, eta=eta), guidance_scale)
        evaluation = evaluate(base, prompts, seeds, rewards, sampler=sampler, microbatch_size=68)
        row, sharp = evaluation.summary(), shows_something(evaluation.images).float().mean()
        scores = [f"{row[name]:.3f} ± {row[f'{name}/standard_error']:.3f}" for name in ("oracle", "oracle_pass")]
        lines.append(
            f"| {split} | {num_steps} | {eta:g} | {guidance_scale:g} | {scores[0]} | {scores[1]} | {sharp:.3f} "
            f"| {row['diversity']:.3f} |"
        )
    for tier in ("one", "count", "relation"):
        rng = np.random.default_rng(0)
        every = all_scenes(tier)
        scenes = [every[i] for i in rng.integers(len(every), size=1_000)]
        with torch.no_grad():
            restored = base.decode(base.autoencoder.vae.encode(render(scenes, rng=rng) * 2 - 1).latents)
        passed = oracle_scores(restored, [scene.prompt for scene in scenes]).passed.float().mean()
        lines.append(f"\nautoencoder, tier {tier}: {passed:.3f} of 1,000 reconstructions pass")
    print("\n".join(lines))  # noqa: T201


if __name__ == "__main__":
    main()
