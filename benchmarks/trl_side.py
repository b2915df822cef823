"""Part of `ddpo_vs_trl.py` and `draft_vs_alignprop.py` that runs in trl's own environment."""

# trl 0.23.1 is not installed where the types are checked.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
import json
import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timed_reward import graded_oracle
from timed_reward import reward as timed_reward
from trl import AlignPropConfig, AlignPropTrainer, DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

from rlhf_t2i.shapes.scenes import all_prompts

SETTINGS = {
    "seed": 0, "mixed_precision": "no", "sample_num_steps": 8, "sample_eta": 1.0, "sample_guidance_scale": 2.0,
    "train_cfg": True, "train_clip_range": 5e-4, "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 32, "per_prompt_stat_tracking_min_count": 16,
}  # fmt: skip
"""Settings of recipes/ddpo.py in the toy world, with guidance: DDPOTrainer fails without it on this diffusers."""


def trainer(model: str, learning_rate: float, **more: Any) -> DDPOTrainer:
    """Return a DDPOTrainer of the full U-Net, with the oracle as reward."""
    pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=False)
    prompts, rng = all_prompts("training"), random.Random(0)

    def reward(images: torch.Tensor, prompts: list[str], metadata: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        return graded_oracle(images, prompts), {}

    config = DDPOConfig(**{**SETTINGS, "train_learning_rate": learning_rate, **more})
    # Without an image callback DDPOTrainer fails at its own warning; with one it needs a tracker later.
    engine = DDPOTrainer(config, reward, lambda: (rng.choice(prompts), {}), pipeline, print)
    engine.image_samples_callback = None
    return engine


def train(arguments: argparse.Namespace) -> None:
    """Train in epochs of 192 images and two optimiser steps for max_seconds; save weights and the seconds of each."""
    engine = trainer(
        arguments.model, arguments.learning_rate, logdir=str(arguments.folder / "logs"), save_freq=10**6,
        sample_batch_size=64, sample_num_batches_per_epoch=3, train_batch_size=32, train_gradient_accumulation_steps=3,
    )  # fmt: skip
    engine.sd_pipeline.set_progress_bar_config(disable=True)
    seconds: list[float] = []
    for epoch in range(arguments.max_epochs):
        start = time.monotonic()
        engine.step(epoch, epoch)
        seconds.append(time.monotonic() - start)
        if (epoch + 1) % arguments.save_every == 0:
            unet = engine.accelerator.unwrap_model(engine.sd_pipeline.unet)
            unet.save_pretrained(arguments.folder / f"step_{epoch + 1:03d}" / "unet")
        if sum(seconds) > arguments.max_seconds:
            break
    (arguments.folder / "seconds.json").write_text(json.dumps(seconds))


def replay(arguments: argparse.Namespace) -> None:
    """Compute log-probabilities and the first gradient of a given trajectory."""
    given = torch.load(arguments.folder / "trajectory.pt", weights_only=True)
    count, num_steps = given["log_probs"].shape
    engine = trainer(
        arguments.model, arguments.learning_rate, logdir=str(arguments.folder / "logs"),
        sample_batch_size=count, sample_num_batches_per_epoch=1, train_batch_size=count,
    )  # fmt: skip
    engine.sd_pipeline.scheduler.set_timesteps(num_steps)
    timesteps = engine.sd_pipeline.scheduler.timesteps
    embeddings = torch.cat([engine.neg_prompt_embed.expand_as(given["conditioning"]), given["conditioning"]])
    log_probs: list[torch.Tensor] = []
    for step, t in enumerate(timesteps):
        latents, following, repeated = given["latents"][:, step], given["latents"][:, step + 1], t.repeat(count)
        with torch.no_grad():
            both = engine.sd_pipeline.unet(torch.cat([latents] * 2), torch.cat([repeated] * 2), embeddings).sample
            unconditional, conditional = both.chunk(2)
            noise = unconditional + engine.config.sample_guidance_scale * (conditional - unconditional)
            output = engine.sd_pipeline.scheduler_step(noise, repeated, latents, eta=1.0, prev_sample=following)
        log_probs.append(output.log_probs)
        loss, _, _ = engine.calculate_loss(
            latents, repeated, following, given["log_probs"][:, step], given["advantages"], embeddings
        )
        (loss / num_steps).backward()
    unet = engine.accelerator.unwrap_model(engine.sd_pipeline.unet)
    torch.nn.utils.clip_grad_norm_(unet.parameters(), engine.config.train_max_grad_norm)
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    torch.save({"log_probs": torch.stack(log_probs, dim=1), "gradients": gradients}, arguments.folder / "replayed.pt")


def alignprop_trainer(arguments: argparse.Namespace, *, backprop_steps: int, batch_size: int) -> AlignPropTrainer:
    """Return an AlignPropTrainer of the full U-Net that trains `timed_reward` through the last `backprop_steps` of 8.

    0 draws the steps at random. The trainer checkpoints each call of the U-Net; `--no_checkpointing` disables that.
    """
    pipeline = DefaultDDPOStableDiffusionPipeline(arguments.model, use_lora=False)
    pipeline.rgb_with_grad = partial(pipeline.rgb_with_grad, gradient_checkpoint=arguments.checkpointing)
    prompts, rng = all_prompts("training"), random.Random(0)
    config = AlignPropConfig(
        seed=0, mixed_precision="no", sample_num_steps=8, sample_eta=0.0, sample_guidance_scale=2.0,
        train_batch_size=batch_size, train_learning_rate=2e-4, logdir=str(arguments.folder / "logs"), save_freq=10**6,
        truncated_backprop_rand=not backprop_steps, truncated_backprop_timestep=8 - backprop_steps,
        truncated_rand_backprop_minmax=(0, 7),
    )  # fmt: skip
    engine = AlignPropTrainer(
        config, lambda images, prompts, _: (timed_reward(images, prompts), {}), lambda: (rng.choice(prompts), {}),
        pipeline, print,
    )  # fmt: skip
    engine.image_samples_callback = None  # as above
    engine.sd_pipeline.set_progress_bar_config(disable=True)
    return engine


def alignprop(arguments: argparse.Namespace) -> None:
    """Train for max_epochs steps; `timed_reward` records the time."""
    engine = alignprop_trainer(arguments, backprop_steps=arguments.backprop_steps, batch_size=arguments.batch_size)
    for epoch in range(arguments.max_epochs):
        engine.step(epoch, epoch)


def gradient(arguments: argparse.Namespace) -> None:
    """Compute images, rewards and gradient of given noise and prompts."""
    given = torch.load(arguments.folder / "given.pt", weights_only=True)
    engine = alignprop_trainer(arguments, backprop_steps=arguments.backprop_steps, batch_size=len(given["noise"]))
    pipeline = engine.sd_pipeline
    pipeline.rgb_with_grad = partial(pipeline.rgb_with_grad, latents=given["noise"])
    pairs = engine._generate_samples(len(given["noise"]), prompts=given["prompts"])
    rewards = engine.compute_rewards(pairs)
    engine.calculate_loss(rewards).backward()
    unet = engine.accelerator.unwrap_model(pipeline.unet)
    gradients = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    result = {"images": pairs["images"].detach(), "rewards": rewards.detach(), "gradients": gradients}
    torch.save(result, arguments.folder / f"gradient-{arguments.backprop_steps}.pt")


def main() -> None:
    """Run one of the tasks on its command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("task", choices=["train", "replay", "alignprop", "gradient"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--max_epochs", type=int, default=1)
    parser.add_argument("--max_seconds", type=float, default=1e9)
    parser.add_argument("--save_every", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backprop_steps", type=int, default=0, help="0 draws the steps at random.")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--no_checkpointing", dest="checkpointing", action="store_false")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = {"train": train, "replay": replay, "alignprop": alignprop, "gradient": gradient}
    tasks[arguments.task](arguments)


if __name__ == "__main__":
    main()
