"""Train the built-in diffusion model by DDPO on the scores of a head of `benchmarks/reward_heads.py`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.reward_heads_data import encode
from benchmarks.reward_heads_scores import outputs
from benchmarks.reward_heads_variants import Variant
from recipes import ddpo
from reward_model.model import RewardModel
from rlhf_t2i.shapes.names import TOY_MODEL

NUM_STEPS = 40


def train_policy(model: RewardModel, variant: Variant, *, seed: int) -> dict[str, Any]:
    """Train the built-in diffusion model on a head's scores; return rewards and the oracle's before and after.

    `gap` is the hacking gap: by how many standard deviations of the images before training the reward rose, minus the
    same of the oracle's score.
    """
    model.eval().requires_grad_(False)
    variant.eval().requires_grad_(False)

    def reward(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
        rows = torch.arange(len(images))
        return outputs(model, variant, encode(model.backbone, images, prompts), rows, rows)[:, 0]

    with tempfile.TemporaryDirectory() as folder:
        config = ddpo.Config(
            model=TOY_MODEL, num_steps=NUM_STEPS, evaluate_every=NUM_STEPS // 4, checkpoint_every=0,
            evaluation_rewards="oracle,oracle_pass", num_cpu_threads=1, seed=seed, run_folder=str(Path(folder) / "run"),
        )  # fmt: skip
        evaluations = ddpo.train(config, reward=reward).evaluations
    if evaluations[-1]["step"] < NUM_STEPS:
        raise SystemExit(f"Stopped after {evaluations[-1]['step']} of {NUM_STEPS} steps; no row is written.")
    name = next(key.removesuffix("/standard_error") for key in evaluations[0] if "reward" in key and "/" in key)
    first = evaluations[0]
    std = {key: first[f"{key}/standard_error"] * first["num_images"] ** 0.5 for key in (name, "oracle")}
    curve = [
        {
            "step": row["step"],
            "pass": row["oracle_pass"],
            "reward": (row[name] - first[name]) / std[name],
            "oracle": (row["oracle"] - first["oracle"]) / std["oracle"],
        }
        for row in evaluations
    ]
    return {"curve": curve, "gap": curve[-1]["reward"] - curve[-1]["oracle"]}
