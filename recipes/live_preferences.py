"""Live votes: a diffusion model learns from people's votes while they vote (after Christiano et al., arXiv:1706.03741).

    accelerate launch recipes/live_preferences.py
    accelerate launch recipes/live_preferences.py --model PATH --prompts prompts.txt --start_reward_model PATH \\
        --evaluation_rewards pick_score:PATH

The first command trains the built-in model, and an untrained head on the small LLaVA of the toy world; the second a
model and a LLaVA-Reward of your own. Open the printed address in a browser, several people if you like. One step:

    sample      images_per_prompt images of each of prompts_per_step prompts
    ask         put the images whose comparison teaches most before people, and withdraw older ones
    learn       train the reward model's ensemble on all votes so far, half a step for each new vote
    update      DDPO or DiffusionNFT with the ensemble's mean score as the reward, or Diffusion-DPO on the voted pairs,
                or both

Nothing but the first update waits for people. Every vote is on disk before the next images appear:
RUN_FOLDER/votes/pairs.jsonl has them in the format of `train_reward_model.py --train_data` and `diffusion_dpo.py
--pairs`. The same command with --resume and --run_folder continues after a stop or a crash, with all votes.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, require, run_command
from rlhf_t2i.settings.live_preferences import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)
    require("fastapi", "uvicorn", extra="serve")

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from reward_model.checkpoint import save_adapter
from reward_model.images import to_tensor
from reward_model.online import OnlineRewardModel
from reward_model.types import PreferencePair, Record
from rlhf_t2i.access import listen
from rlhf_t2i.advantages import group_relative_advantages, whole_batch_advantages
from rlhf_t2i.annotation.live_progress import ProgressImages
from rlhf_t2i.annotation.live_serve import Progress
from rlhf_t2i.annotation.live_session import LiveSession, live_session
from rlhf_t2i.data.image_pairs import ImagePairs
from rlhf_t2i.data.prompts import prompts_of_step
from rlhf_t2i.output.run_folder import REWARD_MODEL
from rlhf_t2i.report import write_report
from rlhf_t2i.rewards.load import WeightedSum, load_rewards
from rlhf_t2i.sampling.rollout import generate, rollout
from rlhf_t2i.seeds import SAMPLE, UPDATE, generators_for
from rlhf_t2i.settings.lists import whole_numbers
from rlhf_t2i.training.ema import rising_decay
from rlhf_t2i.training.online_reward import load_online
from rlhf_t2i.training.policy_gradient import UpdateWarnings
from rlhf_t2i.training.prompt_sets import load_prompt_sets
from rlhf_t2i.training.setup import make_trainer
from rlhf_t2i.training.several_rewards import any_to_learn
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Trajectory

if TYPE_CHECKING:
    from recipes import ddpo, diffusion_dpo, diffusion_nft
else:
    from rlhf_t2i.recipes import ddpo, diffusion_dpo, diffusion_nft  # in a clone and in an installation

_NUM_PROGRESS_IMAGES = 3
_WEIGHTS_OF_SAMPLING = rising_decay(start=0, rise=0.0, most=0.0)
"""DiffusionNFT's old policy: the weights at the start of the step, with which its images were sampled."""


@dataclass(frozen=True)
class Parts:
    """What a step of training by votes works with."""

    trainer: Trainer
    reward_model: OnlineRewardModel
    people: LiveSession
    progress: ProgressImages
    added: WeightedSum | None
    """Rewards that are added to the score that votes teach."""


def main(config: Config) -> Path:
    """Sample images, ask people about some, learn from their votes, update the policy; return the run folder."""
    prompts, added = load_prompt_sets(config), load_rewards(config.rewards) if config.rewards else None
    reward_model = load_online(config, seed=config.seed)
    with listen(config.host, config.port) as listener:
        trainer = make_trainer(
            config, prompts, recipe="live_preferences", report=write_report, extra=[reward_model],
            keep_reference=config.kl_weight > 0 or config.learn != "reward_model",
            sampling_ema=_WEIGHTS_OF_SAMPLING if config.learn != "dpo" and config.update == "diffusion_nft" else None,
        )  # fmt: skip
        if trainer.num_processes > 1:
            raise ValueError(f"Live votes train on one process, not on {trainer.num_processes}: --num_processes 1.")
        temperature = reward_model.to(trainer.device).config.temperature
        with live_session(trainer.folder, listener, config, temperature=temperature, log=trainer.print) as people:
            shown = list(dict.fromkeys(prompts.evaluation))[:_NUM_PROGRESS_IMAGES]
            parts = Parts(trainer, reward_model, people, ProgressImages(people.votes.folder, shown), added)
            for step in trainer.steps():
                people.training.step = step
                all_prompts = prompts_of_step(
                    prompts.training, step, num_prompts=config.prompts_per_step, seed=config.seed
                )
                take_step(parts, all_prompts, step=step, config=config)
                people.training.progress = sample_progress(parts, config)
            people.training.step, people.training.phase = trainer.step, "saving"
            save_adapter(*reward_model.adapter(), people.votes.folder / REWARD_MODEL)
            return trainer.finish()


def take_step(parts: Parts, prompts: Sequence[str], *, step: int, config: Config) -> None:
    """Sample, ask, learn and update once."""
    trainer, reward_model, people = parts.trainer, parts.reward_model, parts.people
    own_prompts = [prompt for prompt in prompts for _ in range(config.images_per_prompt)]
    fitting = partial(trainer.microbatches.fitting, most=len(own_prompts))
    people.training.phase = "making images"
    with trainer.timed("rollout"), trainer.sampling():
        images, trajectory = fitting(
            lambda size: rollout(
                trainer.policy, own_prompts, sampler=trainer.sampler(eta=config.eta), microbatch_size=size,
                generators=generators_for(config.seed, SAMPLE, step, range(len(prompts))),
            )
        )  # fmt: skip
    with trainer.timed("reward"):
        scores = fitting(lambda size: reward_model.scores(images, own_prompts, batch_size=size))
    people.ask(images, own_prompts, scores.unflatten(1, (-1, config.images_per_prompt)), step=step)
    with trainer.timed("waiting"):
        people.wait(stop_requested=lambda: trainer.stop_requests.count > 0)
    with trainer.timed("votes"):
        records = people.votes.records()
        learned = reward_model.learn_new(records, updates_per_record=config.updates_per_vote)
    with trainer.timed("reward"), torch.no_grad():
        if learned:
            scores = fitting(lambda size: reward_model.scores(images, own_prompts, batch_size=size))
        rewards, named = scores.mean(dim=0), {"votes": scores.mean(dim=0)}
        if parts.added is not None:
            more, others = parts.added(
                images, own_prompts, batch_size=trainer.microbatches.size, group_size=config.images_per_prompt
            )
            rewards, named = rewards + more.to(rewards.device), named | others
    people.training.phase, metrics = "training on the votes so far", dict[str, float]()
    groups = rewards.view(len(prompts), -1).cpu()
    with trainer.timed("update"):
        if config.learn != "dpo":
            metrics |= update_by_reward(trainer, trajectory, prompts, groups, step=step, config=config)
        if config.learn != "reward_model":
            metrics |= update_on_pairs(trainer, records, step=step, config=config)
    row = {f"reward_model/{name}": value for name, value in learned.items()}
    trainer.finish_step(step, **trainer.rollout_metrics(groups, named), votes=people.votes.num_votes, **row, **metrics)


def update_by_reward(
    trainer: Trainer, trajectory: Trajectory, prompts: Sequence[str], rewards: Float[Tensor, "P K"], *, step: int,
    config: Config,
) -> dict[str, float]:  # fmt: skip
    """Take the optimiser steps of DDPO on a rollout, or of DiffusionNFT on its images; return metrics."""
    normalise = group_relative_advantages if config.advantages == "group_relative" else whole_batch_advantages
    advantages = normalise(rewards).clamp(-config.max_advantage, config.max_advantage).to(trainer.device)
    if not any_to_learn(advantages, step=step, print=trainer.print):
        return {}
    if config.update == "diffusion_nft":
        return diffusion_nft.update(
            trainer, trajectory.latents[:, -1], [prompt for prompt in prompts for _ in range(config.images_per_prompt)],
            (0.5 + advantages.flatten() / (2 * config.max_advantage)).clamp(0, 1), shard=range(len(prompts)), step=step,
            config=replace(config, beta=config.nft_beta),
        )  # fmt: skip
    metrics = ddpo.update(
        trainer, trajectory, advantages.flatten(), sampler=trainer.sampler(eta=config.eta), config=config,
        generators=generators_for(config.seed, UPDATE, step, range(len(prompts))),
    )  # fmt: skip
    UpdateWarnings(trainer.print)(step, metrics)
    return metrics


def update_on_pairs(trainer: Trainer, votes: Sequence[Record], *, step: int, config: Config) -> dict[str, float]:
    """Take Diffusion-DPO's optimiser steps on some of the voted pairs, ties left out; return metrics."""
    records = [one for one in votes if isinstance(one, PreferencePair) and not one.tie]
    if not records:
        return {}
    pairs = ImagePairs(records, policy=trainer.policy, read=to_tensor, microbatch_size=config.microbatch_size)
    indices = pairs.of_step(step, num_pairs=min(config.pairs_per_step, len(records)), seed=config.seed)
    metrics = diffusion_dpo.update(
        trainer, partial(pairs.load, indices, step=step), [range(len(indices))], step=step,
        timesteps=torch.tensor(whole_numbers(config.timesteps)), config=config,
    )  # fmt: skip
    return {f"dpo/{name}": value for name, value in metrics.items()}


def sample_progress(parts: Parts, config: Config) -> list[Progress]:
    """Sample the same prompts and seeds as after earlier steps; return them beside those of before."""
    trainer, prompts = parts.trainer, parts.progress.prompts
    seeds = range(config.evaluation_seed, config.evaluation_seed + len(prompts))
    with trainer.sampling():
        images, _ = generate(
            trainer.policy, prompts, microbatch_size=trainer.microbatches.size,
            sampler=trainer.sampler(eta=config.evaluation_eta, num_steps=config.num_evaluation_steps),
            generators=[torch.Generator().manual_seed(seed) for seed in seeds],
        )  # fmt: skip
    score = partial(parts.reward_model.scores, batch_size=trainer.microbatches.size)
    return parts.progress.update(images, score, temperature=parts.people.temperature, device=trainer.device)


if __name__ == "__main__":
    run_command(main, config)
