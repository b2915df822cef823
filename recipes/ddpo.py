"""DDPO: policy-gradient training of a diffusion model (Black et al., arXiv:2305.13301).

    accelerate launch recipes/ddpo.py
    accelerate launch recipes/ddpo.py --config recipes/configs/ddpo_sd15.yaml

The first command trains the built-in model on a CPU within minutes, the second Stable Diffusion 1.5 as published.

Denoising is a Markov decision process: each step samples the next latent from a Gaussian, so that its log-probability
is known exactly. One training step:

    sample      images_per_prompt images of each of prompts_per_step prompts, with all latents and log-probabilities
    reward      score the images: any function of images and prompts
    advantage   (reward - mean) / std of the recent rewards of the same prompt
    update      maximise min(ratio * advantage, clip(ratio, 1 - c, 1 + c) * advantage), averaged over (image, step)
                pairs, where ratio = new / old probability of a denoising step and c = clip_range
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.ddpo import Config, DdpoSettings

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.advantages import PerPromptHistory, group_relative_advantages, whole_batch_advantages
from rlhf_t2i.data.prompts import prompts_of_step
from rlhf_t2i.diffusion.gaussian import mean_kl, mean_log_prob
from rlhf_t2i.losses import clip_range_for, clipped_surrogate_loss
from rlhf_t2i.plan import or_plan
from rlhf_t2i.report import write_report
from rlhf_t2i.rewards.async_reward import AsyncReward, TotalAndScores
from rlhf_t2i.rewards.load import WeightedSum, load_rewards
from rlhf_t2i.sampling.rollout import rollout, transition_at
from rlhf_t2i.seeds import SAMPLE, UPDATE, generators_for
from rlhf_t2i.training.batching import minibatches
from rlhf_t2i.training.from_python import from_python
from rlhf_t2i.training.policy_gradient import Replay, UpdateWarnings, update_metrics
from rlhf_t2i.training.prompt_sets import load_prompt_sets
from rlhf_t2i.training.setup import make_trainer
from rlhf_t2i.training.several_rewards import any_to_learn, combined_advantages, warn_of_drowned
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Sampler, Trajectory


def main(config: Config) -> Path:
    """Sample images, score them, compute advantages, update the policy; return the run folder."""
    prompts, reward = load_prompt_sets(config), load_rewards(config.scored_rewards)
    histories = [
        PerPromptHistory(size=config.history_size, min_count=config.history_min_count)
        for _ in (reward.terms if config.combine_rewards == "gdpo" else ["the sum"])
    ]
    trainer = make_trainer(
        config, prompts, recipe="ddpo", report=write_report, keep_reference=config.kl_weight > 0, extra=histories
    )
    sampler = trainer.sampler(eta=config.eta)
    shard, warn = trainer.shard(config.prompts_per_step, name="prompts_per_step"), UpdateWarnings(trainer.print)
    for step in trainer.steps():
        all_prompts = prompts_of_step(prompts.training, step, num_prompts=config.prompts_per_step, seed=config.seed)
        own_prompts = [all_prompts[i] for i in shard for _ in range(config.images_per_prompt)]
        trajectory, (rewards, scores) = sample(
            trainer, reward, own_prompts, sampler, step=step, shard=shard, config=config
        )
        groups = trainer.gather(rewards.view(len(shard), -1)).cpu()
        methods = [partial(advantages_of, all_prompts, history=history, config=config) for history in histories]
        if step == 0 and config.combine_rewards == "sum":
            warn_of_drowned(scores, reward, gather=trainer.gather, print=trainer.print)
        advantages = combined_advantages(trainer, groups, scores, reward=reward, methods=methods, config=config)
        advantages = advantages.clamp(-config.max_advantage, config.max_advantage).to(trainer.device)
        metrics = dict[str, float]()
        if any_to_learn(advantages, step=step, print=trainer.print):
            with trainer.timed("update"):
                metrics = update(
                    trainer, trajectory, advantages[shard.start : shard.stop].flatten(),
                    generators=generators_for(config.seed, UPDATE, step, shard), sampler=sampler, config=config,
                )  # fmt: skip
            warn(step, metrics)
        del trajectory
        trainer.finish_step(step, **trainer.rollout_metrics(groups, scores), **metrics)
    return trainer.finish()


def sample(
    trainer: Trainer, reward: WeightedSum, prompts: Sequence[str], sampler: Sampler, *, step: int, shard: range,
    config: Config,
) -> tuple[Trajectory, TotalAndScores]:  # fmt: skip
    """Sample one image per prompt of this process and score them, one after another or at the same time."""
    copies, most = config.images_per_prompt, len(prompts)
    with AsyncReward(reward, batch_size=trainer.microbatches.size, group_size=copies) as async_reward:

        def sampled(size: int) -> tuple[Tensor, Trajectory]:
            async_reward.forget()  # what an attempt submitted that ran out of memory
            return rollout(
                trainer.policy, prompts, sampler=sampler, microbatch_size=size,
                generators=generators_for(config.seed, SAMPLE, step, shard),
                on_images=async_reward.submit if config.async_reward else None,
            )  # fmt: skip

        with trainer.timed("rollout"), trainer.sampling():
            images, trajectory = trainer.microbatches.fitting(sampled, most=most)
        with trainer.timed("reward"), torch.no_grad():
            if config.async_reward:
                return trajectory, async_reward.results()
            return trajectory, trainer.microbatches.fitting(
                lambda size: reward(images, prompts, batch_size=size, group_size=copies), most=most
            )


def advantages_of(
    prompts: Sequence[str],
    rewards: Float[Tensor, "P K"],
    *,
    history: PerPromptHistory,
    config: Config,
) -> Float[Tensor, "P K"]:
    """Return the advantage of each of a prompt's K images by one reward, or by the sum of all."""
    match config.advantages:
        case "per_prompt_history":
            return history(prompts, rewards)
        case "group_relative":
            return group_relative_advantages(rewards)
        case "whole_batch":
            return whole_batch_advantages(rewards)


def update(
    trainer: Trainer,
    trajectory: Trajectory,
    advantages: Float[Tensor, " B"],
    *,
    generators: Sequence[torch.Generator],
    sampler: Sampler,
    config: DdpoSettings,
) -> dict[str, float]:
    """Take num_inner_epochs x num_minibatches optimiser steps on one rollout; return metrics over all processes."""
    replay = Replay(trainer.policy, trajectory, sampler=sampler)
    clip_range = config.clip_range or clip_range_for(trajectory.latents[0, 0].numel())
    samples: list[Tensor] = []
    steps: list[dict[str, float]] = []
    for image, step in minibatches(
        generators=generators,
        images_per_prompt=config.images_per_prompt,
        window=config.trained_window,
        fraction=config.timestep_fraction,
        num_minibatches=config.num_minibatches,
        num_epochs=config.num_inner_epochs,
    ):
        gradients = partial(
            accumulate_gradients, trainer, advantages, image, step, sampler=sampler, clip_range=clip_range,
            kl_weight=config.kl_weight,
        )  # fmt: skip
        samples.append(replay.accumulated(trainer.microbatches, gradients, is_unchanged=not steps))
        steps.append(trainer.optimizer_step())
    return update_metrics(trainer, samples, steps, clip_range=clip_range, with_kl=config.kl_weight > 0)


def accumulate_gradients(
    trainer: Trainer, advantages: Float[Tensor, " B"], image: Tensor, step: Tensor, trajectory: Trajectory, *,
    sampler: Sampler, clip_range: float, kl_weight: float,
) -> Float[Tensor, "N 3"]:  # fmt: skip
    """Accumulate the gradients of one optimiser step; return loss, log-ratio and KL of each (image, step) pair."""
    policy, num_rows = trainer.policy, trajectory.num_rows
    samples: list[Tensor] = []
    microbatches = list(zip(image.split(num_rows), step.split(num_rows), strict=True))
    for i, t in trainer.accumulate(microbatches):
        inputs = trajectory.latents[i, t], t, trajectory.conditioning[i]
        kl, reference = torch.zeros(len(i), device=trainer.device), None
        if kl_weight:
            with torch.no_grad(), policy.as_reference():
                reference = transition_at(policy, *inputs, sampler=sampler, num_rows=num_rows)
        transition = transition_at(policy, *inputs, sampler=sampler, num_rows=num_rows)
        if reference is not None:
            kl = mean_kl(transition, reference)
        log_prob = mean_log_prob(transition, trajectory.latents[i, t + 1])
        loss = clipped_surrogate_loss(log_prob, trajectory.log_probs[i, t], advantages[i], clip_range=clip_range)
        loss = loss + kl_weight * kl.mean()
        trainer.backward(loss * len(i) / len(image))
        log_ratio = log_prob.detach() - trajectory.log_probs[i, t]
        samples.append(torch.stack([loss.detach().expand(len(i)), log_ratio, kl.detach()], dim=1))
    return torch.cat(samples)


train = from_python(main)


if __name__ == "__main__":
    run_command(or_plan(main), config)
