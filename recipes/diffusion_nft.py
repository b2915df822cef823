"""DiffusionNFT: negative-aware fine-tuning in the forward process (Zheng et al., arXiv:2509.16117).

    accelerate launch recipes/diffusion_nft.py
    accelerate launch recipes/diffusion_nft.py --config recipes/configs/diffusion_nft_sd35m.yaml

The first command trains the built-in flow model on a CPU, the second Stable Diffusion 3.5 medium.

The update needs the sampled images only: no log-probabilities and no stochastic steps, so that any sampler and any
model will do. One training step:

    sample      images_per_prompt images of each of prompts_per_step prompts, from an EMA of the trained weights
    reward      score the images: any function of images and prompts
    advantage   (reward - mean of the prompt's images) / std
    update      add noise to the images at some of the sampler's levels; move the implicit positive policy towards each
                image with weight r and the implicit negative policy with weight 1 - r, where
                r = 1/2 + advantage / (2 * max_advantage) is the image's optimality probability
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.diffusion_nft import Config, NftUpdateConfig

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.advantages import globally_scaled_advantages, group_relative_advantages, num_degenerate_groups
from rlhf_t2i.data.prompts import prompts_of_step
from rlhf_t2i.diffusion.forward import noise_to
from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.losses import denoising_mse, negative_aware_loss
from rlhf_t2i.plan import or_plan
from rlhf_t2i.report import write_report
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.sampling.rollout import encode_distinct, generate
from rlhf_t2i.seeds import NOISE, SAMPLE, UPDATE, generators_for
from rlhf_t2i.training.batching import minibatches
from rlhf_t2i.training.ema import rising_decay
from rlhf_t2i.training.from_python import from_python
from rlhf_t2i.training.metrics import mean_update_metrics
from rlhf_t2i.training.prompt_sets import load_prompt_sets
from rlhf_t2i.training.setup import make_trainer
from rlhf_t2i.training.several_rewards import any_to_learn, combined_advantages, warn_of_drowned
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Conditioning, EncodedPrompts, Level, Policy, Prediction, Schedule

METRICS: Sequence[str] = ("loss", "sampling_gap", "reference_gap")


def main(config: Config) -> Path:
    """Sample images, score them, compute optimality, noise them, update the policy; return the run folder."""
    prompts, reward = load_prompt_sets(config), load_rewards(config.scored_rewards)
    sampling_ema = rising_decay(
        start=config.sampling_ema_start, rise=config.sampling_ema_rise, most=config.sampling_ema_max
    )
    trainer = make_trainer(
        config, prompts, recipe="diffusion_nft", report=write_report, keep_reference=config.kl_weight > 0,
        sampling_ema=sampling_ema,
    )  # fmt: skip
    policy, sampler = trainer.policy, trainer.sampler(eta=config.eta)
    shard = trainer.shard(config.prompts_per_step, name="prompts_per_step")
    fitting = partial(trainer.microbatches.fitting, most=len(shard) * config.images_per_prompt)
    for step in trainer.steps():
        all_prompts = prompts_of_step(prompts.training, step, num_prompts=config.prompts_per_step, seed=config.seed)
        own_prompts = [all_prompts[i] for i in shard for _ in range(config.images_per_prompt)]
        with trainer.timed("rollout"), trainer.sampling(average="sampling"):
            images, clean = fitting(
                lambda size, prompts=own_prompts, step=step: generate(
                    policy, prompts, sampler=sampler, microbatch_size=size,
                    generators=generators_for(config.seed, SAMPLE, step, shard),
                )
            )  # fmt: skip
        with trainer.timed("reward"), torch.no_grad():
            rewards, scores = fitting(
                lambda size, images=images, prompts=own_prompts: reward(
                    images, prompts, batch_size=size, group_size=config.images_per_prompt
                )
            )
        del images  # neither update nor next sampling should need memory for it
        groups = trainer.gather(rewards.view(len(shard), -1)).cpu()
        scaled = globally_scaled_advantages if config.advantages == "global_std" else group_relative_advantages
        methods = [scaled] * len(reward.terms)
        if step == 0 and config.combine_rewards == "sum":
            warn_of_drowned(scores, reward, gather=trainer.gather, print=trainer.print)
        advantages = combined_advantages(trainer, groups, scores, reward=reward, methods=methods, config=config)
        own_advantages = advantages[shard.start : shard.stop].flatten().to(trainer.device)
        optimality = (0.5 + own_advantages / (2 * config.max_advantage)).clamp(0, 1)
        metrics = dict[str, float]()
        if any_to_learn(advantages, step=step, print=trainer.print):
            with trainer.timed("update"):
                metrics = update(trainer, clean, own_prompts, optimality, shard=shard, step=step, config=config)
        del clean
        trainer.finish_step(
            step,
            **trainer.rollout_metrics(groups, scores),
            degenerate_groups=num_degenerate_groups(groups),
            **metrics,
        )
    return trainer.finish()


def update(
    trainer: Trainer,
    clean: Float[Tensor, "B C H W"],
    prompts: Sequence[str],
    optimality: Float[Tensor, " B"],
    *,
    shard: range,
    step: int,
    config: NftUpdateConfig,
) -> dict[str, float]:
    """Take num_minibatches optimiser steps on the images of one step; return metrics over all processes.

    `sampling_gap` is the mean squared difference of predicted clean latents from those of the sampling weights;
    `reference_gap` that of the model's outputs from those before training.
    """
    policy, schedule = trainer.policy, trainer.policy.schedule(config.num_denoising_steps)
    conditioning = encode_distinct(policy, prompts)
    noise_generators = generators_for(config.seed, NOISE, step, shard)
    samples, steps = list[Tensor](), list[dict[str, float]]()
    for image, level in minibatches(
        generators=generators_for(config.seed, UPDATE, step, shard), images_per_prompt=config.images_per_prompt,
        window=(0, config.num_denoising_steps), fraction=config.timestep_fraction,
        num_minibatches=config.num_minibatches, num_epochs=1,
    ):  # fmt: skip
        num_images = len(shard) * config.images_per_prompt // config.num_minibatches
        shape, num_levels = (num_images, *clean.shape[1:]), len(image) // num_images
        noise = torch.cat([randn(shape, generators=noise_generators, device=trainer.device) for _ in range(num_levels)])
        # A batch is made where it is needed: the encoded prompts of all would take more memory than anything else.
        batch_of = noised_batches(
            clean, noise, image, level, schedule=schedule, conditioning=conditioning, optimality=optimality
        )
        gradients = partial(accumulate_gradients, trainer, batch_of, len(image), config=config)
        samples.append(trainer.microbatches.accumulated(gradients, most=len(image)))
        steps.append(trainer.optimizer_step())
    means = trainer.gather(torch.cat(samples)).mean(dim=0).tolist()
    return {
        **dict(zip(METRICS, means, strict=False)),  # no reference_gap without a reference
        **mean_update_metrics(steps),
    }


def accumulate_gradients(
    trainer: Trainer, batch_of: BatchOf, count: int, microbatch_size: int, *, config: NftUpdateConfig
) -> Float[Tensor, "N metrics"]:
    """Accumulate the gradients of one optimiser step on `count` noised images; return the METRICS of each."""
    policy, batches = trainer.policy, torch.arange(count).split(microbatch_size)
    predict = partial(predict_noised, policy, guidance_scale=config.guidance_scale)
    with torch.no_grad(), trainer.sampling(average="sampling"):
        old_predictions = [predict(batch_of(rows)).clean for rows in batches]
    references: list[Tensor | None] = [None] * len(batches)
    if config.kl_weight:
        with torch.no_grad(), trainer.sampling(), policy.as_reference():
            references = [policy.to_output(predict(b), b.level) for b in map(batch_of, batches)]
    samples = list[Tensor]()
    for rows, old, reference in trainer.accumulate([*zip(batches, old_predictions, references, strict=True)]):
        batch = batch_of(rows)
        new = predict(batch)
        # Times max_advantage, so that an advantage of 1 has the same gradient whatever max_advantage is.
        loss = config.max_advantage * negative_aware_loss(
            new.clean, old, batch.clean, batch.optimality, beta=config.beta
        )
        sample = [loss.detach().expand(len(batch.clean)), denoising_mse(new.clean.detach(), old)]
        if reference is not None:
            gap = denoising_mse(policy.to_output(new, batch.level), reference)
            loss = loss + config.kl_weight * gap.mean()
            sample.append(gap.detach())
        trainer.backward(loss * len(batch.clean) / count)
        samples.append(torch.stack(sample, dim=1))
    return torch.cat(samples)


@dataclass(frozen=True, eq=False)
class NoisedBatch:
    """Clean latents, the noise to add to them, and what the loss needs."""

    clean: Float[Tensor, "B C H W"]
    noise: Float[Tensor, "B C H W"]
    level: Level
    conditioning: Conditioning
    optimality: Float[Tensor, " B"]


BatchOf = Callable[[Int[Tensor, " M"]], NoisedBatch]
"""Returns the batch of some of the noised images of an optimiser step."""


def noised_batches(
    clean: Float[Tensor, "B C H W"],
    noise: Float[Tensor, "N C H W"],
    image: Int[Tensor, " N"],
    level: Int[Tensor, " N"],
    *,
    schedule: Schedule,
    conditioning: EncodedPrompts,
    optimality: Float[Tensor, " B"],
) -> BatchOf:
    """Return a function that makes the batch of some of N rows, each an image at a noise level."""

    def batch_of(rows: Int[Tensor, " M"]) -> NoisedBatch:
        i = image[rows]
        return NoisedBatch(clean[i], noise[rows], schedule.at(level[rows]), conditioning[i], optimality[i])

    return batch_of


def predict_noised(policy: Policy, batch: NoisedBatch, *, guidance_scale: float) -> Prediction:
    """Return the policy's prediction from the noised latents of a batch."""
    latents = noise_to(batch.clean, batch.level, batch.noise)
    return policy.predict(latents, batch.level, batch.conditioning, guidance_scale=guidance_scale)


train = from_python(main)


if __name__ == "__main__":
    run_command(or_plan(main), config)
