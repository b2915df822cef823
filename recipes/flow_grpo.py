"""Flow-GRPO: group-relative policy optimisation of a flow model (Liu et al., arXiv:2505.05470).

    accelerate launch recipes/flow_grpo.py
    accelerate launch recipes/flow_grpo.py --config recipes/configs/flow_grpo_sd35m_pickscore.yaml

The first command trains the built-in flow model on a CPU, the second Stable Diffusion 3.5 medium.

A flow model samples deterministically. Some of its steps, those of a window, are replaced by steps of an SDE with the
same marginals, whose log-probability is known. One training step:

    sample      images_per_prompt images (a group) of each of prompts_per_step prompts, with noise within the window
    reward      score the images: any function of images and prompts
    advantage   (reward - mean of the group) / std
    update      maximise min(ratio * advantage, clip(ratio, 1 - c, 1 + c) * advantage), averaged over (image, step)
                pairs of the window, where ratio = new / old probability of a denoising step and c = clip_range

All images of a training step share one window, so that images of a group differ by their noise only. Fewer denoising
steps than in evaluation are enough to rank images. Training without guidance halves the cost of a step.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.flow_grpo import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.advantages import globally_scaled_advantages, group_relative_advantages, num_degenerate_groups
from rlhf_t2i.data.prompts import prompts_of_step
from rlhf_t2i.diffusion.gaussian import mean_kl, mean_log_prob, normalised_log_ratio, per_image, unscaled_log_ratio
from rlhf_t2i.diffusion.transitions import cps, flow_sde, windowed
from rlhf_t2i.losses import clip_range_for, clipped_surrogate_loss
from rlhf_t2i.plan import or_plan
from rlhf_t2i.report import write_report
from rlhf_t2i.rewards.async_reward import TotalAndScores
from rlhf_t2i.rewards.load import WeightedSum, load_rewards
from rlhf_t2i.sampling.rollout import noise_of_rollout, rollout, transition_at
from rlhf_t2i.seeds import SAMPLE, UPDATE, generator_for, generators_for
from rlhf_t2i.training.batching import minibatches, window_of_step
from rlhf_t2i.training.from_python import from_python
from rlhf_t2i.training.policy_gradient import Replay, UpdateWarnings, update_metrics
from rlhf_t2i.training.prompt_sets import load_prompt_sets
from rlhf_t2i.training.setup import make_trainer
from rlhf_t2i.training.several_rewards import any_to_learn, combined_advantages, warn_of_drowned
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Dynamics, Sampler, Schedule, Trajectory


def main(config: Config) -> Path:
    """Sample images, score them, compute advantages, update the policy; return the run folder."""
    prompts, reward = load_prompt_sets(config), load_rewards(config.scored_rewards)
    trainer = make_trainer(
        config, prompts, recipe="flow_grpo", report=write_report, keep_reference=config.kl_weight > 0
    )
    policy, schedule = trainer.policy, trainer.policy.schedule(config.num_denoising_steps)
    dynamics = noisy_step(schedule, config)
    shard, warn = trainer.shard(config.prompts_per_step, name="prompts_per_step"), UpdateWarnings(trainer.print)
    for step in trainer.steps():
        all_prompts = prompts_of_step(prompts.training, step, num_prompts=config.prompts_per_step, seed=config.seed)
        own_prompts = [all_prompts[i] for i in shard for _ in range(config.images_per_prompt)]
        window = noisy_window(config, step)
        first, end = (float(schedule.sigma[index]) for index in window)
        sampler = Sampler(schedule, partial(windowed, dynamics=dynamics, first=first, end=end), config.guidance_scale)
        trajectory, (rewards, scores) = sample(
            trainer, reward, own_prompts, sampler, step=step, shard=shard, config=config
        )
        groups = trainer.gather(rewards.view(len(shard), -1)).cpu()
        scaled = globally_scaled_advantages if config.advantages == "global_std" else group_relative_advantages
        methods = [scaled] * len(reward.terms)
        if step == 0 and config.combine_rewards == "sum":
            warn_of_drowned(scores, reward, gather=trainer.gather, print=trainer.print)
        advantages = combined_advantages(trainer, groups, scores, reward=reward, methods=methods, config=config)
        advantages = advantages.clamp(-config.max_advantage, config.max_advantage).to(trainer.device)
        noise = None
        if config.ratio_normalisation:
            noise = noise_of_rollout(
                policy, trajectory, generators=generators_for(config.seed, SAMPLE, step, shard),
                same_initial_noise=config.same_initial_noise,
            )  # fmt: skip
        metrics = dict[str, float]()
        if any_to_learn(advantages, step=step, print=trainer.print):
            with trainer.timed("update"):
                metrics = update(
                    trainer, trajectory, advantages[shard.start : shard.stop].flatten(), noise=noise, window=window,
                    generators=generators_for(config.seed, UPDATE, step, shard), sampler=sampler, config=config,
                )  # fmt: skip
            warn(step, metrics)
        del trajectory, noise
        trainer.finish_step(
            step,
            **trainer.rollout_metrics(groups, scores),
            degenerate_groups=num_degenerate_groups(groups),
            window_first=window[0],
            **metrics,
        )
    return trainer.finish()


def sample(
    trainer: Trainer, reward: WeightedSum, prompts: Sequence[str], sampler: Sampler, *, step: int, shard: range,
    config: Config,
) -> tuple[Trajectory, TotalAndScores]:  # fmt: skip
    """Sample one image per prompt of this process, and score them."""
    fitting = partial(trainer.microbatches.fitting, most=len(prompts))
    with trainer.timed("rollout"), trainer.sampling():
        images, trajectory = fitting(
            lambda size: rollout(
                trainer.policy, prompts, sampler=sampler, microbatch_size=size,
                generators=generators_for(config.seed, SAMPLE, step, shard),
                same_initial_noise=config.same_initial_noise,
            )
        )  # fmt: skip
    with trainer.timed("reward"), torch.no_grad():
        scores = fitting(lambda size: reward(images, prompts, batch_size=size, group_size=config.images_per_prompt))
    return trajectory, scores


def noisy_step(schedule: Schedule, config: Config) -> Dynamics:
    """Return the dynamics of noisy steps. Raises ValueError for a model that is not a flow model."""
    if schedule.kind != "flow":
        raise ValueError(
            f"flow_grpo trains flow models, and {config.model!r} is not one; for a diffusion model use recipes/ddpo.py "
            f"--advantages group_relative."
        )
    match config.dynamics:
        case "flow_sde":
            return partial(flow_sde, noise_scale=config.noise_scale, sigma_cap=float(schedule.sigma[1]))
        case "cps":
            return partial(cps, noise_scale=config.noise_scale)


def noisy_window(config: Config, step: int) -> tuple[int, int]:
    """Return the first noisy denoising step of a training step, and the one after the last."""
    return window_of_step(
        step, within=config.noisy_steps, size=config.window_size, moves_every=config.window_moves_every,
        generator=generator_for(config.seed, UPDATE, step),
    )  # fmt: skip


def update(
    trainer: Trainer,
    trajectory: Trajectory,
    advantages: Float[Tensor, " B"],
    *,
    noise: Float[Tensor, "B T C H W"] | None,
    window: tuple[int, int],
    generators: Sequence[torch.Generator],
    sampler: Sampler,
    config: Config,
) -> dict[str, float]:
    """Take num_inner_epochs x num_minibatches optimiser steps on one rollout; return metrics over all processes.

    `noise` is that of the rollout, needed to normalise ratios.
    """
    replay = Replay(trainer.policy, trajectory, sampler=sampler)
    clip_range = config.clip_range or clip_range_for(trajectory.latents[0, 0].numel())
    samples: list[Tensor] = []
    steps: list[dict[str, float]] = []
    for image, step in minibatches(
        generators=generators, images_per_prompt=config.images_per_prompt, window=window, fraction=1.0,
        num_minibatches=config.num_minibatches, num_epochs=config.num_inner_epochs,
    ):  # fmt: skip
        gradients = partial(
            accumulate_gradients, trainer, advantages, image, step, noise=noise, sampler=sampler,
            clip_range=clip_range, config=config,
        )  # fmt: skip
        samples.append(replay.accumulated(trainer.microbatches, gradients, is_unchanged=not steps))
        steps.append(trainer.optimizer_step())
    return update_metrics(trainer, samples, steps, clip_range=clip_range, with_kl=config.kl_weight > 0)


def accumulate_gradients(
    trainer: Trainer, advantages: Float[Tensor, " B"], image: Tensor, step: Tensor, trajectory: Trajectory, *,
    noise: Float[Tensor, "B T C H W"] | None, sampler: Sampler, clip_range: float, config: Config,
) -> Float[Tensor, "N 3"]:  # fmt: skip
    """Accumulate the gradients of one optimiser step; return loss, log-ratio and KL of each (image, step) pair."""
    policy, num_rows, sigma = trainer.policy, trajectory.num_rows, sampler.schedule.sigma
    samples: list[Tensor] = []
    microbatches = list(zip(image.split(num_rows), step.split(num_rows), strict=True))
    for i, t in trainer.accumulate(microbatches):
        inputs = trajectory.latents[i, t], t, trajectory.conditioning[i]
        kl, reference = torch.zeros(len(i), device=trainer.device), None
        if config.kl_weight:
            with torch.no_grad(), policy.as_reference():
                reference = transition_at(policy, *inputs, sampler=sampler, num_rows=num_rows)
        transition = transition_at(policy, *inputs, sampler=sampler, num_rows=num_rows)
        if reference is not None:
            kl = mean_kl(transition, reference)
        log_ratio = mean_log_prob(transition, trajectory.latents[i, t + 1]) - trajectory.log_probs[i, t]
        advantage = advantages[i]
        if noise is not None:
            old_mean = trajectory.latents[i, t + 1] - per_image(transition.std) * noise[i, t]
            log_ratio = normalised_log_ratio(log_ratio, transition, old_mean)
            advantage = advantage / (sigma[t] - sigma[t + 1])
        elif config.dynamics == "cps" and config.cps_log_prob == "published":
            log_ratio = unscaled_log_ratio(log_ratio, transition)
        loss = clipped_surrogate_loss(log_ratio, torch.zeros_like(log_ratio), advantage, clip_range=clip_range)
        loss = loss + config.kl_weight * kl.mean()
        trainer.backward(loss * len(i) / len(image))
        samples.append(torch.stack([loss.detach().expand(len(i)), log_ratio.detach(), kl.detach()], dim=1))
    return torch.cat(samples)


train = from_python(main)


if __name__ == "__main__":
    run_command(or_plan(main), config)
