"""DiffusionNFT: learn from good and bad images on the way to noise (Zheng et al., arXiv:2509.16117).

    accelerate launch recipes/diffusion_nft.py                                                        a laptop
    accelerate launch recipes/diffusion_nft.py --config recipes/configs/diffusion_nft_sd35m.yaml      SD 3.5 medium

Nothing of how an image was painted is needed but the image: no density, no noisy steps, any sampler and any model.
One step of training:

    paint      images_per_prompt images of each of prompts_per_step prompts, by weights that follow those that learn
    judge      any reward: images and prompts in, numbers out
    compare    goodness = 1/2 + advantage / (2 * max_advantage), of what earned more or less than others of its prompt
    disturb    noise on each image, at some of the sampler's levels
    move       towards good images, and as far away from bad ones, seen from the weights that painted
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.advantages import globally_scaled_advantages, group_relative_advantages, num_degenerate_groups
from rlhf_t2i.config import Rule, parse_config
from rlhf_t2i.diffusion.forward import noise_to
from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.losses import denoising_mse, negative_aware_loss
from rlhf_t2i.prompts import load_prompts, prompts_of_step
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.sampling.rollout import paint
from rlhf_t2i.seeds import NOISE, SAMPLE, UPDATE, generators_for
from rlhf_t2i.training.batching import minibatches
from rlhf_t2i.training.ema import rising_decay
from rlhf_t2i.training.metrics import mean_update_metrics
from rlhf_t2i.training.run import Run
from rlhf_t2i.training.trainer import Trainer, TrainerConfig, start_trainer
from rlhf_t2i.types import Level, Policy, Prediction

METRICS: Sequence[str] = ("loss", "moved", "reference_gap")


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Those of every recipe, and DiffusionNFT's own. A microbatch holds images, or noisy images of an update."""

    prompts_per_step: int = 16
    """Different prompts in one step, over all processes."""
    images_per_prompt: int = 12
    """Images of each, on one process: a group."""
    model: str = "shapes-flow"
    rewards: str = "llava_reward"
    """Comma-separated NAME or NAME=WEIGHT: judge (the built-in one), llava_reward:PATH (a LLaVA-Reward folder or Hub id),
    oracle, oracle_pass, jpeg_compressibility, jpeg_incompressibility, or module:function."""
    eta: float = 0.0
    """Noise of each step of painting, in [0, 1]."""

    advantages: Literal["global_std", "group_std"] = "global_std"
    """In standard deviations of all rewards of a step, or of a group's own."""
    max_advantage: float = 5.0
    """An advantage of so much makes an image wholly good."""
    timestep_fraction: float = 0.5
    """Share of the sampler's levels of noise that each image learns at."""
    beta: float = 1.0
    """How far good and bad lie from the weights that painted; 1 or, for several rewards, 0.1 were published."""
    kl_weight: float = 1e-4
    """Of how differently the model before training puts out its answers, squared."""
    num_minibatches: int = 1
    """Optimiser steps on each step's images; the loss takes it that these are few."""

    sampling_ema_start: int = 0
    """The weights that paint are those that learn up to this step; then ..."""
    sampling_ema_rise: float = 1e-3
    """... they keep so much more of themselves in each step ..."""
    sampling_ema_max: float = 0.5
    """... up to this share. Also published are 75, 0.0075 and 0.999, for a reward that is easily fooled."""

    def rules(self) -> list[Rule]:
        divides = self.num_minibatches >= 1 and self.images_per_prompt % self.num_minibatches == 0
        return [
            *super().rules(),
            ("prompts_per_step", self.prompts_per_step >= 1, "at least 1"),
            ("images_per_prompt", self.images_per_prompt >= 2, "at least 2, to be compared"),
            ("eta", 0 <= self.eta <= 1, "in [0, 1]"),
            ("max_advantage", self.max_advantage > 0, "positive"),
            ("timestep_fraction", 0 < self.timestep_fraction <= 1, "in (0, 1]"),
            ("beta", self.beta > 0, "positive"),
            ("kl_weight", self.kl_weight >= 0, "at least 0"),
            ("num_minibatches", divides, f"at least 1 and divide images_per_prompt ({self.images_per_prompt})"),
            ("sampling_ema_start", self.sampling_ema_start >= 0, "at least 0"),
            ("sampling_ema_rise", self.sampling_ema_rise >= 0, "at least 0"),
            ("sampling_ema_max", 0 <= self.sampling_ema_max < 1, "in [0, 1)"),
        ]


def main(config: Config) -> Run:
    """Paint, judge, compare, disturb, move."""
    reward, prompts = load_rewards(config.rewards), load_prompts(config.prompts)
    sampling_ema_decay = rising_decay(
        start=config.sampling_ema_start, rise=config.sampling_ema_rise, most=config.sampling_ema_max
    )
    trainer = start_trainer(
        config, recipe="diffusion_nft", keep_reference=config.kl_weight > 0, sampling_ema_decay=sampling_ema_decay
    )
    run, policy, sampler = trainer.run, trainer.policy, trainer.sampler(eta=config.eta)
    mine = run.my_share(config.prompts_per_step, name="prompts_per_step")
    for step in trainer.steps():
        asked = prompts_of_step(prompts, step, num_prompts=config.prompts_per_step, seed=config.seed)
        own = [asked[i] for i in mine for _ in range(config.images_per_prompt)]
        with run.timed("rollout"), trainer.sampling_ema.applied(trainer.engine.weights), trainer.painting():
            images, clean = paint(
                policy, own, sampler=sampler, batch_size=config.microbatch_size,
                generators=generators_for(config.seed, SAMPLE, step, mine),
            )  # fmt: skip
        with run.timed("reward"), torch.no_grad():
            rewards, verdicts = reward(images, own, batch_size=config.microbatch_size)
        groups = run.gather(rewards.view(len(mine), -1)).cpu()
        scaled = globally_scaled_advantages if config.advantages == "global_std" else group_relative_advantages
        advantages = scaled(groups)[mine.start : mine.stop].flatten().to(run.device)
        optimality = (0.5 + advantages / (2 * config.max_advantage)).clamp(0, 1)
        with run.timed("update"):
            metrics = update(trainer, clean, own, optimality, mine=mine, step=step, config=config)
        trainer.finish_step(
            step,
            reward=groups.mean().item(),
            reward_std=groups.std(correction=0).item(),
            degenerate_groups=num_degenerate_groups(groups),
            images=groups.numel(),
            denoiser_calls=groups.numel() * config.num_denoising_steps * policy.num_calls(config.guidance_scale),
            **run.mean({f"rewards/{name}": scores.mean().item() for name, scores in verdicts.items()}),
            **metrics,
        )
    return trainer.finish()


def update(
    trainer: Trainer,
    clean: Float[Tensor, "B C H W"],
    prompts: Sequence[str],
    optimality: Float[Tensor, " B"],
    *,
    mine: range,
    step: int,
    config: Config,
) -> dict[str, float]:
    """Learn from the images of one step: num_minibatches optimiser steps. Returns metrics of all processes.

    `moved` is how far the clean latents that the model sees are from those that the weights that painted see, squared;
    `reference_gap` is how far its output is from that of the model before training.
    """
    run, policy = trainer.run, trainer.policy
    schedule, conditioning = policy.schedule(config.num_denoising_steps), policy.encode(prompts)
    ask = partial(answer, policy, guidance_scale=config.guidance_scale)
    drawn = generators_for(config.seed, NOISE, step, mine)
    seen, steps = list[Tensor](), list[dict[str, float]]()
    for image, turn in minibatches(
        generators=generators_for(config.seed, UPDATE, step, mine), images_per_prompt=config.images_per_prompt,
        window=(0, config.num_denoising_steps), fraction=config.timestep_fraction,
        num_minibatches=config.num_minibatches, num_epochs=1,
    ):  # fmt: skip
        num_images = len(mine) * config.images_per_prompt // config.num_minibatches
        shape = (num_images, *clean.shape[1:])
        noise = torch.cat([randn(shape, generators=drawn, device=run.device) for _ in range(len(image) // num_images)])
        batches = [
            NoisedBatch(clean[i], noise[rows], schedule.at(turn[rows]), conditioning[i], optimality[i])
            for rows in torch.arange(len(image)).split(config.microbatch_size)
            for i in (image[rows],)
        ]
        with torch.no_grad(), trainer.sampling_ema.applied(trainer.engine.weights), trainer.painting():
            old = [ask(batch).clean for batch in batches]
        first = old  # not looked at where there is no reference
        if config.kl_weight:
            with torch.no_grad(), trainer.painting(), policy.as_reference():
                first = [policy.output(ask(batch), batch.level) for batch in batches]
        for batch, before, reference in zip(batches, old, first, strict=True):
            # Processes exchange gradients once, in the last backward pass.
            with trainer.engine.accumulating(last=batch is batches[-1]):
                now = ask(batch)
                # Times max_advantage an advantage of one pulls as much whatever makes an image wholly good.
                loss = config.max_advantage * negative_aware_loss(
                    now.clean, before, batch.clean, batch.optimality, beta=config.beta
                )
                facts = [loss.detach().expand(len(batch.clean)), denoising_mse(now.clean.detach(), before)]
                if config.kl_weight:
                    gap = denoising_mse(policy.output(now, batch.level), reference)
                    loss = loss + config.kl_weight * gap.mean()
                    facts.append(gap.detach())
                trainer.engine.backward(loss * len(batch.clean) / len(image))
            seen.append(torch.stack(facts, dim=1))
        steps.append(trainer.optimizer_step())
    means = run.gather(torch.cat(seen)).mean(dim=0).tolist()
    return {
        **dict(zip(METRICS, means, strict=False)),  # no gap where no reference was asked
        **mean_update_metrics(steps),
    }


@dataclass(frozen=True, eq=False)
class NoisedBatch:
    """Images, the noise that is put on them, and what else an update needs to know."""

    clean: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]
    level: Level
    conditioning: Float[Tensor, "B L D"]
    optimality: Float[Tensor, " B"]


def answer(policy: Policy, batch: NoisedBatch, *, guidance_scale: float) -> Prediction:
    """What a policy takes disturbed images for."""
    latents = noise_to(batch.clean, batch.level, batch.noise)
    return policy.predict(latents, batch.level, batch.conditioning, guidance_scale=guidance_scale)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
