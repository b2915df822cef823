"""DDPO: teach a diffusion model by rewarding its pictures (Black et al., arXiv:2305.13301).

    accelerate launch recipes/ddpo.py                                          the built-in world, minutes on a laptop
    accelerate launch recipes/ddpo.py --config recipes/configs/ddpo_sd15.yaml  Stable Diffusion 1.5, as published

Painting is a chain of Gaussian steps, so each picture's chance is known exactly, and can be raised if the picture
earned more than others of its prompt. One step of training:

    paint      images_per_prompt pictures of each of prompts_per_step prompts, every stroke remembered
    judge      any reward: pictures and prompts in, numbers out
    compare    advantage = (reward - what this prompt earned of late) / its spread
    move       raise ratio * advantage, ratio = new / old density of a stroke, clipped to 1 +- clip_range
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.advantages import (
    PerPromptHistory,
    group_relative_advantages,
    whole_batch_advantages,
)
from rlhf_t2i.batching import minibatches
from rlhf_t2i.config import parse_config
from rlhf_t2i.diffusion.gaussian import mean_kl, mean_log_prob
from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.ema import ExponentialMovingAverage
from rlhf_t2i.evaluate import evaluate, evaluation_set
from rlhf_t2i.losses import clipped_surrogate_loss
from rlhf_t2i.prompts import load_prompts, prompts_of_step
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.run import Run, start_run
from rlhf_t2i.sampling.rollout import rollout, transition_at
from rlhf_t2i.seeds import PAINT, PICK, generators_for
from rlhf_t2i.types import Policy, Sampler, Trajectory


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields in the order of the flow."""

    prompts: str = "shapes"
    """A UTF-8 file with one prompt a line (or .jsonl), or the built-in world's training prompts."""
    evaluation_prompts: str = "shapes"
    """The same for evaluation; of the built-in world the held-out prompts."""
    prompts_per_step: int = 16
    """Different prompts in one rollout, over all processes."""
    images_per_prompt: int = 12
    """Pictures of each, on one process."""

    model: str = "shapes"
    """A StableDiffusionPipeline folder, a Hub id, or the built-in model."""
    lora_rank: int | None = None
    """Rank of the trained adapters; null trains the whole U-Net."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha / rank; null stands for alpha = rank."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the networks; null takes what `accelerate launch` says. Densities are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of keeping them: less memory, about a third slower."""

    num_denoising_steps: int = 8
    eta: float = 1.0
    """Noise of each DDIM step, in (0, 1]."""
    guidance_scale: float = 1.0
    """Classifier-free guidance in rollout, update and evaluation; 1 is off and halves the cost."""
    rewards: str = "judge"
    """Comma-separated NAME or NAME=WEIGHT: judge (the built-in one), judge:PATH (a LLaVA-Reward folder or Hub id),
    oracle, oracle_pass, jpeg_compressibility, jpeg_incompressibility, or module:function."""

    advantages: Literal["per_prompt_history", "group_relative", "whole_batch"] = "per_prompt_history"
    history_size: int = 32
    """Rewards that are remembered of each prompt."""
    history_min_count: int = 16
    """With fewer than these a prompt is compared with the whole batch."""
    max_advantage: float = 5.0

    window_start: float = 0.0
    """Train the denoising steps from here (0 is pure noise) ..."""
    window_end: float = 0.5
    """... to here (1 is the picture). Early steps decide what is painted, late ones how cleanly."""
    trained_fraction: float = 1.0
    """Of these steps, the random share that each image trains."""
    clip_range: float = 5e-4
    """Of the ratio of densities averaged over latent numbers: 1e-4 for the 16,384 of SD 1.5, more for fewer."""
    kl_weight: float = 0.0
    """Of the KL divergence from the model before training, averaged over latent numbers."""
    num_inner_epochs: int = 1
    """Times that each rollout is learnt from."""
    num_minibatches: int = 2
    """Optimiser steps in one inner epoch."""
    microbatch_size: int = 64
    """Pictures, or strokes of an update, in one forward pass. Changes memory and speed, never results."""

    learning_rate: float = 3e-4
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    weight_decay: float = 1e-4
    max_gradient_norm: float = 1.0
    ema_decay: float = 0.0
    """Evaluate and export an exponential moving average of the weights; 0 is off."""

    num_steps: int = 40
    evaluate_every: int = 10
    """Steps between evaluations, which there always are before and after; 0 has no others."""
    num_evaluation_images: int = 408
    evaluation_rewards: str = "oracle,oracle_pass,judge"
    """The same. One that is not trained on shows how much of the gain is real; the report draws the gap."""
    evaluation_eta: float = 0.0
    evaluation_seed: int = 1_000_000

    checkpoint_every: int = 10
    keep_checkpoints: int = 2
    resume: bool = False
    """Go on with the newest whole checkpoint of run_folder, or of the newest run under runs/."""
    run_folder: str | None = None
    """Null is runs/ddpo-DATE."""
    trackers: str = ""
    """Comma-separated, of wandb and tensorboard."""
    num_cpu_threads: int = 0
    """On a CPU; 0 shares all cores among the processes."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        first, end = self.trained_window
        for name, works, rule in (
            ("prompts_per_step", self.prompts_per_step >= 1, "at least 1"),
            ("images_per_prompt", self.images_per_prompt >= 1, "at least 1"),
            ("num_denoising_steps", self.num_denoising_steps >= 1, "at least 1"),
            ("eta", 0 < self.eta <= 1, "in (0, 1], because DDPO needs steps with noise"),
            ("guidance_scale", self.guidance_scale >= 1, "at least 1, which is off"),
            ("max_advantage", self.max_advantage > 0, "positive"),
            ("window_start", self.window_start >= 0, "in [0, 1]"),
            ("window_end", self.window_end <= 1 and first < end, "in [0, 1] and at least one step after window_start"),
            ("trained_fraction", 0 < self.trained_fraction <= 1, "in (0, 1]"),
            ("clip_range", self.clip_range > 0, "positive"),
            ("kl_weight", self.kl_weight >= 0, "at least 0"),
            ("num_inner_epochs", self.num_inner_epochs >= 1, "at least 1"),
            ("num_minibatches", self.num_minibatches >= 1, "at least 1"),
            ("microbatch_size", self.microbatch_size >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "positive"),
            ("max_gradient_norm", self.max_gradient_norm > 0, "positive"),
            ("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)"),
            ("num_steps", self.num_steps >= 1, "at least 1"),
            ("num_evaluation_images", self.num_evaluation_images >= 2, "at least 2"),
            ("evaluation_eta", 0 <= self.evaluation_eta <= 1, "in [0, 1]"),
            ("evaluation_seed", self.evaluation_seed >= 0, "at least 0"),
            ("keep_checkpoints", self.keep_checkpoints >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ):
            if not works:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {rule}.")
        if self.images_per_prompt % self.num_minibatches:
            raise ValueError(
                f"num_minibatches ({self.num_minibatches}) must divide images_per_prompt ({self.images_per_prompt}): "
                f"each minibatch takes the same number of pictures of every prompt."
            )

    def learning_rate_at(self, step: int) -> float:
        """Rises over the first warmup_steps, then stays."""
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1))

    @property
    def trained_window(self) -> tuple[int, int]:
        """The first trained denoising step, and the one after the last."""
        return round(self.window_start * self.num_denoising_steps), round(self.window_end * self.num_denoising_steps)


def main(config: Config) -> Run:
    """Paint, judge, compare, move; look at held-out prompts before, now and then, and after."""
    from rlhf_t2i.policies.stable_diffusion import load_stable_diffusion  # takes seconds

    reward, judges = load_rewards(config.rewards), load_rewards(config.evaluation_rewards)
    prompts = load_prompts(config.prompts)
    held_out, seeds = evaluation_set(
        load_prompts(config.evaluation_prompts, held_out=True),
        num_images=config.num_evaluation_images,
        seed=config.evaluation_seed,
    )
    run = start_run(asdict(config), recipe="ddpo")
    mine = run.my_share(config.prompts_per_step, name="prompts_per_step")
    policy = load_stable_diffusion(config.model, device=run.device, dtype=run.dtype)
    policy.learn(config.lora_rank, lora_alpha=config.lora_alpha, keep_reference=config.kl_weight > 0, seed=config.seed)
    if config.gradient_checkpointing:
        policy.checkpoint_gradients()
    optimizer = torch.optim.AdamW(
        policy.trainable.values(),
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    average = ExponentialMovingAverage(policy.trainable, decay=config.ema_decay)
    history = PerPromptHistory(size=config.history_size, min_count=config.history_min_count)
    policy.denoiser, optimizer = run.prepare(policy.denoiser, optimizer, extra=[average, history])
    run.restore()
    schedule = policy.schedule(config.num_denoising_steps)
    sampler = Sampler(schedule, partial(ddim, eta=config.eta), config.guidance_scale)
    look_sampler = replace(sampler, dynamics=partial(ddim, eta=config.evaluation_eta))

    def look() -> None:
        with average.applied(policy.trainable):
            evaluation = evaluate(
                policy, held_out, seeds, judges.rewards,
                sampler=look_sampler, batch_size=config.microbatch_size, run=run,
            )  # fmt: skip
        run.record(evaluation)

    if run.done == 0:
        look()
    for step in run.steps(config.num_steps):
        asked = prompts_of_step(prompts, step, num_prompts=config.prompts_per_step, seed=config.seed)
        own = [asked[i] for i in mine for _ in range(config.images_per_prompt)]
        with run.timed("rollout"):
            images, trajectory = rollout(
                policy, own, sampler=sampler, batch_size=config.microbatch_size,
                generators=generators_for(config.seed, PAINT, step, mine),
            )  # fmt: skip
        with run.timed("reward"), torch.no_grad():
            rewards, verdicts = reward(images, own, batch_size=config.microbatch_size)
        groups = run.gather(rewards.view(len(mine), -1)).cpu()
        advantages = compare(asked, groups, history=history, config=config).to(run.device)
        with run.timed("update"):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate_at(step)
            metrics = update(
                policy, optimizer, trajectory, advantages[mine.start : mine.stop].flatten(),
                generators=generators_for(config.seed, PICK, step, mine),
                sampler=sampler, run=run, config=config,
            )  # fmt: skip
            average.update(policy.trainable)
        if step == 0 and metrics["replay_error"] > 0.1 * config.clip_range:
            run.say(
                f"WARNING: replaying an unchanged policy moves its log-densities by {metrics['replay_error']:.1e}; "
                f"beside a clip_range of {config.clip_range} that is noise. Try the same microbatch_size on another "
                f"device, or mixed_precision: no."
            )
        verdict = {f"rewards/{name}": scores.mean().item() for name, scores in verdicts.items()}
        calls_per_image = config.num_denoising_steps * (2 if config.guidance_scale > 1 else 1)
        run.finish_step(
            step,
            reward=groups.mean().item(),
            reward_std=groups.std(correction=0).item(),
            images=groups.numel(),
            denoiser_calls=groups.numel() * calls_per_image,
            **run.mean(verdict),
            **metrics,
        )
        finished = run.done == config.num_steps
        if finished or (run.due(config.evaluate_every) and not run.stopping):
            look()
        if finished or run.due(config.checkpoint_every) or run.stopping:
            run.save()
    with average.applied(policy.trainable):
        run.finish(export=policy.export, num_steps=config.num_steps)
    return run


def compare(
    prompts: Sequence[str],
    rewards: Float[Tensor, "P K"],
    *,
    history: PerPromptHistory,
    config: Config,
) -> Float[Tensor, "P K"]:
    """How much better each picture is than those it is compared with."""
    match config.advantages:
        case "per_prompt_history":
            advantages = history(prompts, rewards)
        case "group_relative":
            advantages = group_relative_advantages(rewards)
        case "whole_batch":
            advantages = whole_batch_advantages(rewards)
    return advantages.clamp(-config.max_advantage, config.max_advantage)


def update(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    trajectory: Trajectory,
    advantages: Float[Tensor, " B"],
    *,
    generators: Sequence[torch.Generator],
    sampler: Sampler,
    run: Run,
    config: Config,
) -> dict[str, float]:
    """Learn from one rollout: num_inner_epochs x num_minibatches optimiser steps. Returns metrics of all processes.

    `replay_error` is the largest change of a log-density before the first optimiser step: 0 if all is well.
    """
    seen: list[Tensor] = []
    norms: list[float] = []
    replay_error = torch.zeros(1, device=run.device)
    num_skipped = 0
    for image, step in minibatches(
        generators=generators,
        images_per_prompt=config.images_per_prompt,
        window=config.trained_window,
        fraction=config.trained_fraction,
        num_minibatches=config.num_minibatches,
        num_epochs=config.num_inner_epochs,
    ):
        microbatches = list(zip(image.split(config.microbatch_size), step.split(config.microbatch_size), strict=True))
        for i, t in microbatches:
            strokes = trajectory.latents[i, t], t, trajectory.conditioning[i]
            kl, reference = torch.zeros(len(i), device=run.device), None
            # Processes exchange gradients once, in the last backward pass.
            last = i is microbatches[-1][0]
            with nullcontext() if last else run.accelerator.no_sync(policy.denoiser):
                if config.kl_weight:
                    with torch.no_grad(), policy.as_reference():
                        reference = transition_at(policy, *strokes, sampler=sampler)
                transition = transition_at(policy, *strokes, sampler=sampler)
                if reference is not None:
                    kl = mean_kl(transition, reference)
                log_prob = mean_log_prob(transition, trajectory.latents[i, t + 1])
                loss = clipped_surrogate_loss(
                    log_prob, trajectory.log_probs[i, t], advantages[i], clip_range=config.clip_range
                )
                loss = loss + config.kl_weight * kl.mean()
                run.accelerator.backward(loss * len(i) / len(image))
            log_ratio = log_prob.detach() - trajectory.log_probs[i, t]
            seen.append(torch.stack([loss.detach().expand(len(i)), log_ratio, kl.detach()], dim=1))
            if not norms:
                replay_error = torch.maximum(replay_error, log_ratio.abs().max())
        norms.append(float(run.accelerator.clip_grad_norm_(policy.trainable.values(), config.max_gradient_norm) or 0))
        optimizer.step()
        num_skipped += run.accelerator.optimizer_step_was_skipped  # an overflow in fp16
        optimizer.zero_grad()
    loss, log_ratio, kl = run.gather(torch.cat(seen)).T
    return {
        "loss": loss.mean().item(),
        "ratio_mean": log_ratio.exp().mean().item(),
        "ratio_std": log_ratio.square().mean().sqrt().item(),
        "clip_fraction": ((log_ratio.exp() - 1).abs() > config.clip_range).float().mean().item(),
        **({"kl": kl.mean().item()} if config.kl_weight else {}),
        "gradient_norm": sum(norm for norm in norms if math.isfinite(norm)) / len(norms),
        "skipped_updates": num_skipped,
        "replay_error": run.gather(replay_error).max().item(),
    }


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
