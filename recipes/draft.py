"""DRaFT, DRaFT-LV, AlignProp and ReFL: backpropagate a differentiable reward through sampling (arXiv:2309.17400).

    accelerate launch recipes/draft.py
    accelerate launch recipes/draft.py --config recipes/configs/draft_sd15.yaml

The first command trains the built-in model on a CPU within minutes, the second Stable Diffusion 1.5.

One training step:

    sample      one image of each of prompts_per_step prompts, keeping the graph of some denoising steps
    reward      a differentiable reward, and its gradient with respect to the pixels
    update      backpropagate that gradient through the decoder and the kept steps; one optimiser step

The methods differ in the steps whose graph is kept:

    draft       the last backprop_steps (DRaFT-K; all of them: DRaFT)
    draft_lv    the last one, repeated from num_renoisings renoised copies of each image to reduce variance
    alignprop   the last K, with K drawn uniformly from 1 to backprop_steps for each image (arXiv:2310.03739)
    refl        one random step between window_start and window_end, whose predicted clean image is scored
                (ReFL, arXiv:2304.05977)
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.draft import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.data.prompts import prompts_of_step
from rlhf_t2i.losses import reward_loss, weight_distance
from rlhf_t2i.plan import or_plan
from rlhf_t2i.report import write_report
from rlhf_t2i.rewards.gradient import ScoredImages, require_gradient, score_with_gradient
from rlhf_t2i.rewards.load import WeightedSum, load_rewards
from rlhf_t2i.sampling.backprop import DifferentiableSamples, GradientWindow, sample_with_gradient
from rlhf_t2i.seeds import SAMPLE, UPDATE, generators_for
from rlhf_t2i.training.from_python import from_python
from rlhf_t2i.training.prompt_sets import load_prompt_sets
from rlhf_t2i.training.setup import make_trainer
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Sampler


def main(config: Config) -> Path:
    """Sample images, backpropagate their rewards, update the policy; return the run folder."""
    prompts, reward = load_prompt_sets(config), load_rewards(config.rewards)
    require_gradient(reward, prompt=prompts.training[0])
    trainer = make_trainer(
        config, prompts, recipe="draft", report=write_report, keep_reference=config.kl_weight > 0,
        keep_initial_weights=config.l2_sp_weight > 0,
    )  # fmt: skip
    if config.l2_sp_weight and trainer.is_sharded:
        raise ValueError(
            "l2_sp_weight needs unsharded weights, which ZeRO-3 and FSDP2 do not have; use kl_weight, or "
            "accelerate_configs/deepspeed_zero2.yaml."
        )
    sampler = trainer.sampler(eta=config.eta)
    shard = trainer.shard(config.prompts_per_step, name="prompts_per_step")
    for step in trainer.steps():
        all_prompts = prompts_of_step(prompts.training, step, num_prompts=config.prompts_per_step, seed=config.seed)
        metrics = update(trainer, reward, all_prompts, step=step, shard=shard, sampler=sampler, config=config)
        trainer.finish_step(step, images=config.prompts_per_step, **metrics)
    return trainer.finish()


def gradient_window(config: Config, generators: Sequence[torch.Generator]) -> GradientWindow:
    """Return the denoising steps that the gradient passes, for one image of each generator."""
    num_steps, count = config.num_denoising_steps, len(generators)
    depth = config.backprop_steps or num_steps

    def drawn(first: int, end: int) -> Tensor:
        return torch.cat([torch.randint(first, end, (1,), generator=generator) for generator in generators])

    match config.method:
        case "draft":
            return GradientWindow(torch.full((count,), num_steps - depth))
        case "draft_lv":
            return GradientWindow(torch.full((count,), num_steps - 1), num_renoisings=config.num_renoisings)
        case "alignprop":
            return GradientWindow(num_steps - drawn(1, depth + 1))
        case "refl":
            return GradientWindow(drawn(*config.trained_window), jumps=True)


def update(
    trainer: Trainer,
    reward: WeightedSum,
    prompts: Sequence[str],
    *,
    step: int,
    shard: range,
    sampler: Sampler,
    config: Config,
) -> dict[str, float]:
    """Sample and score this process's prompts in microbatches, and take one optimiser step.

    Returns metrics over all processes. `saturated_share` is the fraction of the squared pixel gradient at pixels
    outside [0, 1]; it reaches the weights because the images are not clamped.
    """
    variants = 1 + config.num_renoisings if config.method == "draft_lv" else 1
    gradients = partial(
        accumulate_gradients, trainer, reward, prompts, step, sampler=sampler, shard=shard, variants=variants,
        config=config,
    )  # fmt: skip
    samples, num_calls = trainer.microbatches.accumulated(gradients, most=len(shard) * variants)
    with trainer.timed("update"):
        step_metrics = trainer.optimizer_step()
    rewards, loss, gap, saturated, squared, *scores = trainer.gather(samples).T
    names = (f"rewards/{part.name}" for part in reward.rewards)
    return {
        "reward": rewards.mean().item(),
        "reward_std": rewards.std(correction=0).item(),
        **dict(zip(names, (values.mean().item() for values in scores), strict=True)),
        "loss": loss.mean().item(),
        **({"reference_gap": gap.mean().item()} if config.kl_weight else {}),
        "saturated_share": (saturated.sum() / squared.sum().clamp_min(torch.finfo().tiny)).item(),
        "denoiser_calls": int(trainer.gather(torch.tensor([num_calls], device=trainer.device)).sum()),
        **step_metrics,
    }


def accumulate_gradients(
    trainer: Trainer, reward: WeightedSum, prompts: Sequence[str], step: int, microbatch_size: int, *,
    sampler: Sampler, shard: range, variants: int, config: Config,
) -> tuple[Float[Tensor, "B metrics"], int]:  # fmt: skip
    """Accumulate the gradients of one optimiser step; return `measurements` of all images, and denoiser calls."""
    policy, num_calls = trainer.policy, 0
    samples: list[Tensor] = []
    for rows in trainer.accumulate(torch.tensor(shard).split(max(1, microbatch_size // variants))):
        indices: list[int] = rows.tolist()
        own_prompts = [prompts[i] for i in indices]
        with trainer.timed("rollout"):
            sampled = sample_with_gradient(
                policy, own_prompts, sampler=sampler,
                window=gradient_window(config, generators_for(config.seed, UPDATE, step, indices)),
                generators=generators_for(config.seed, SAMPLE, step, indices),
                checkpointing=config.checkpoint_denoising_steps, with_reference_gap=config.kl_weight > 0,
                equal_calls=trainer.is_sharded,
            )  # fmt: skip
        with trainer.timed("reward"):
            scored = score_with_gradient(reward, sampled.images, own_prompts * variants)
        loss = config.reward_weight * reward_loss(scored.rewards, margin=config.reward_margin)
        loss = loss + config.kl_weight * sampled.reference_gap.mean()
        if config.l2_sp_weight:
            loss = loss + config.l2_sp_weight * weight_distance(policy.trainable, trainer.initial_weights)
        with trainer.timed("update"):
            trainer.backward(loss * len(rows) / len(shard))
        num_calls += sampled.num_calls
        samples.append(measurements(sampled, scored, loss)[: len(rows)])
    return torch.cat(samples), num_calls


@torch.no_grad()
def measurements(sampled: DifferentiableSamples, scored: ScoredImages, loss: Tensor) -> Float[Tensor, "B metrics"]:
    """Return what is averaged over the images of all processes, one row for each image."""
    squared = scored.pixel_gradient.square()
    outside = (sampled.images < 0) | (sampled.images > 1)
    columns = [
        scored.rewards, loss.expand(len(squared)), sampled.reference_gap,
        (squared * outside).flatten(1).sum(1), squared.flatten(1).sum(1), *scored.scores.values(),
    ]  # fmt: skip
    return torch.stack(columns, dim=1)


train = from_python(main)


if __name__ == "__main__":
    run_command(or_plan(main), config)
