"""The half of `ddpo_vs_trl.py` that runs in trl's own environment: trains by `DDPOTrainer`, or replays a trajectory."""

# trl 0.23.1 is not installed where the types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from rlhf_t2i.shapes import oracle
from rlhf_t2i.shapes.scenes import all_prompts

SETTINGS = {
    "seed": 0, "mixed_precision": "no", "sample_num_steps": 8, "sample_eta": 1.0, "sample_guidance_scale": 2.0,
    "train_cfg": True, "train_clip_range": 5e-4, "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 32, "per_prompt_stat_tracking_min_count": 16,
}  # fmt: skip
"""Those of recipes/ddpo.py on the built-in world, with guidance: without it DDPOTrainer fails on this diffusers."""


def trainer(model: str, learning_rate: float, **more: Any) -> DDPOTrainer:
    """A trainer of the whole U-Net, with the oracle as its reward."""
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=False)
    prompts, chance = all_prompts("training"), random.Random(0)

    def reward(images: torch.Tensor, prompts: list[str], metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return oracle.judge(images.float().clamp(0, 1), prompts).graded, {}

    config = DDPOConfig(**{**SETTINGS, "train_learning_rate": learning_rate, **more})
    # Without a hook for pictures DDPOTrainer fails at its own warning, and with one it asks for a tracker later.
    learner = DDPOTrainer(config, reward, lambda: (chance.choice(prompts), {}), pipeline, print)
    learner.image_samples_callback = None
    return learner


def train(arguments: argparse.Namespace) -> None:
    """Epochs of 192 pictures and two optimiser steps, until the time is up; weights and seconds after each."""
    learner = trainer(
        arguments.model, arguments.learning_rate, logdir=str(arguments.folder / "logs"), save_freq=10**6,
        sample_batch_size=64, sample_num_batches_per_epoch=3, train_batch_size=32, train_gradient_accumulation_steps=3,
    )  # fmt: skip
    learner.sd_pipeline.set_progress_bar_config(disable=True)
    seconds: list[float] = []
    for epoch in range(arguments.max_epochs):
        start = time.monotonic()
        learner.step(epoch, epoch)
        seconds.append(time.monotonic() - start)
        if (epoch + 1) % arguments.save_every == 0:
            unet = learner.accelerator.unwrap_model(learner.sd_pipeline.unet)
            unet.save_pretrained(arguments.folder / f"step_{epoch + 1:03d}" / "unet")
        if sum(seconds) > arguments.max_seconds:
            break
    (arguments.folder / "seconds.json").write_text(json.dumps(seconds))


def replay(arguments: argparse.Namespace) -> None:
    """Densities and the first update for a trajectory that was painted elsewhere."""
    given = torch.load(arguments.folder / "trajectory.pt", weights_only=True)
    count, num_steps = given["log_probs"].shape
    learner = trainer(
        arguments.model, arguments.learning_rate, logdir=str(arguments.folder / "logs"),
        sample_batch_size=count, sample_num_batches_per_epoch=1, train_batch_size=count,
    )  # fmt: skip
    learner.sd_pipeline.scheduler.set_timesteps(num_steps)
    times = learner.sd_pipeline.scheduler.timesteps
    embeddings = torch.cat([learner.neg_prompt_embed.expand_as(given["conditioning"]), given["conditioning"]])
    found: list[torch.Tensor] = []
    for step, t in enumerate(times):
        latents, following, repeated = given["latents"][:, step], given["latents"][:, step + 1], t.repeat(count)
        with torch.no_grad():
            both = learner.sd_pipeline.unet(torch.cat([latents] * 2), torch.cat([repeated] * 2), embeddings).sample
            unconditional, conditional = both.chunk(2)
            noise = unconditional + learner.config.sample_guidance_scale * (conditional - unconditional)
            output = learner.sd_pipeline.scheduler_step(noise, repeated, latents, eta=1.0, prev_sample=following)
        found.append(output.log_probs)
        loss, _, _ = learner.calculate_loss(
            latents, repeated, following, given["log_probs"][:, step], given["advantages"], embeddings
        )
        (loss / num_steps).backward()
    unet = learner.accelerator.unwrap_model(learner.sd_pipeline.unet)
    torch.nn.utils.clip_grad_norm_(unet.parameters(), learner.config.train_max_grad_norm)
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    torch.save({"log_probs": torch.stack(found, dim=1), "gradients": gradients}, arguments.folder / "replayed.pt")


def main() -> None:
    """The command line that `ddpo_vs_trl.py` uses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["train", "replay"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-epochs", type=int, default=1)
    parser.add_argument("--max-seconds", type=float, default=1e9)
    parser.add_argument("--save-every", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    {"train": train, "replay": replay}[arguments.what](arguments)


if __name__ == "__main__":
    main()
