"""Diffusion-DPO: direct preference optimisation of a diffusion model (Wallace et al., arXiv:2311.12908).

    accelerate launch recipes/diffusion_dpo.py
    accelerate launch recipes/diffusion_dpo.py --config recipes/configs/diffusion_dpo_sd15.yaml --pairs pairs.jsonl

The first command trains the built-in model on a CPU within minutes, on pairs that it samples and a reward compares;
the second trains Stable Diffusion 1.5 on human preferences, as published.

The denoising error of an image stands for its log-probability, and the model before training is the reference. One
training step:

    pairs       the next winners and losers of the data; or sample images_per_prompt images of each prompt and let the
                reward select pairs
    noise       the same noise at the same timestep for both images of a pair
    update      maximise log sigmoid(beta / 2 * (d_loser - d_winner)), where d = denoising error of the model - that of
                the reference
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.diffusion_dpo import Config, DpoUpdateSettings

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.data.augmentation import Augmentation
from rlhf_t2i.data.buckets import aspect_buckets
from rlhf_t2i.data.image_pairs import ImagePairs, PairBatch, instructions_of
from rlhf_t2i.data.pair_shards import PairShard, shard_pairs
from rlhf_t2i.data.preferences import choose_pairs, implicit_preference
from rlhf_t2i.data.prompts import prompts_of_step
from rlhf_t2i.data.saved_pairs import save_pairs
from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.losses import diffusion_dpo_loss
from rlhf_t2i.models.lora import lora_dropout
from rlhf_t2i.models.reference_images import check_edits
from rlhf_t2i.output.run_folder import PAIRS
from rlhf_t2i.plan import or_plan
from rlhf_t2i.prompt_rows import emptied
from rlhf_t2i.report import write_report
from rlhf_t2i.rewards.load import WeightedSum, load_rewards
from rlhf_t2i.sampling.denoising_errors import denoising_errors
from rlhf_t2i.sampling.rollout import generate
from rlhf_t2i.seeds import NOISE, SAMPLE, UPDATE, generator_for, generators_for
from rlhf_t2i.settings.lists import names, whole_numbers
from rlhf_t2i.training.from_python import from_python
from rlhf_t2i.training.metrics import mean_update_metrics
from rlhf_t2i.training.prompt_sets import load_prompt_sets
from rlhf_t2i.training.setup import make_trainer
from rlhf_t2i.training.trainer import Trainer
from rlhf_t2i.types import Policy

LoadPairs = Callable[[Sequence[int]], PairBatch]
"""Returns pairs of a step by their rows, which are of one group of `PairShard`."""
METRICS: Sequence[str] = ("loss", "winner_error", "loser_error", "accuracy")


def main(config: Config) -> Path:
    """Load or sample preference pairs, noise them, update the policy; return the run folder."""
    prompts, reward = load_prompt_sets(config), load_rewards(config.rewards) if config.samples_pairs else None
    trainer = make_trainer(
        config, prompts, recipe="diffusion_dpo", report=write_report, keep_reference=config.loss == "dpo",
        lora_dropout=config.lora_dropout,
    )  # fmt: skip
    timesteps = torch.tensor(whole_numbers(config.timesteps))
    trainer.policy.levels_at(timesteps)  # raises for timesteps that the model does not have
    pairs = None if config.samples_pairs else load_pairs(trainer, config)
    for step in trainer.steps():
        if reward is not None:
            all_prompts = prompts_of_step(prompts.training, step, num_prompts=config.prompts_per_step, seed=config.seed)
            load, row = sample_pairs(trainer, all_prompts, reward, step=step, config=config)
            groups: list[Sequence[int]] = [range(int(row["pairs"]))]
        else:
            assert pairs is not None
            indices = pairs.of_step(step, num_pairs=config.pairs_per_step, seed=config.seed)
            load, row = partial(pairs.load, indices, step=step), {"images": 2 * len(indices), "pairs": len(indices)}
            groups = [*pairs.groups(indices)]
        with trainer.timed("update"):
            metrics = update(trainer, load, groups, step=step, timesteps=timesteps, config=config)
        trainer.finish_step(step, **row, **metrics)
    return trainer.finish()


def sample_pairs(
    trainer: Trainer, prompts: Sequence[str], reward: WeightedSum, *, step: int, config: Config
) -> tuple[LoadPairs, dict[str, float]]:
    """Sample images, select pairs by their rewards; return the pairs and metrics over all processes."""
    copies = config.images_per_prompt
    shard = trainer.shard(len(prompts), name="prompts_per_step")
    own_prompts = [prompts[i] for i in shard for _ in range(copies)]
    fitting = partial(trainer.microbatches.fitting, most=len(own_prompts))
    with trainer.timed("rollout"), trainer.sampling():
        images, own_latents = fitting(
            lambda size: generate(
                trainer.policy, own_prompts, sampler=trainer.sampler(eta=config.eta), microbatch_size=size,
                generators=generators_for(config.seed, SAMPLE, step, shard),
            )
        )  # fmt: skip
    with trainer.timed("reward"), torch.no_grad():
        rewards, scores = fitting(lambda size: reward(images, own_prompts, batch_size=size, group_size=copies))
    groups = trainer.gather(rewards.view(len(shard), copies)).cpu()
    generators = generators_for(config.seed, UPDATE, step, range(len(prompts)))
    winners, losers = choose_pairs(groups, selection=config.pair_selection, generators=generators)
    if not len(winners):
        trainer.print(
            f"WARNING: in step {step + 1} all images of each prompt have the same reward; the update was skipped."
        )
    if config.save_pairs:
        path = trainer.folder / PAIRS / f"step_{step + 1:06d}.jsonl"
        save_pairs(path, images, prompts, groups, (winners, losers), first=shard.start * copies)
    latents, augmentation = trainer.gather(own_latents), augmentation_of(config)

    def load(rows: Sequence[int]) -> PairBatch:
        winner, loser = winners[rows], losers[rows]
        own = [
            (prompts[int(i) // copies], augmentation.changes(step, row))
            for i, row in zip(winner.tolist(), rows, strict=True)
        ]
        texts = [emptied(prompt) if changes.empty_prompt else prompt for prompt, changes in own]
        return PairBatch(latents[winner], latents[loser], trainer.policy.encode(texts))

    return load, {**trainer.rollout_metrics(groups, scores), "pairs": len(winners)}


def load_pairs(trainer: Trainer, config: Config) -> ImagePairs:
    """Load the pairs of all files, without ties; other records raise ValueError or are logged as skipped."""
    from reward_model.datasets import load_same_prompt_pairs
    from reward_model.datasets.summary import summarise
    from reward_model.images import to_tensor

    log = trainer.folder / (f"skipped_{trainer.rank}.jsonl" if trainer.rank else "skipped.jsonl")
    skipped = log if config.on_bad_record == "skip" else None
    records = load_same_prompt_pairs(
        names(config.pairs), skipped=skipped, log=trainer.print,
        image_root=config.image_root, image_prefix=config.image_prefix, with_references=True,
        streaming=config.streaming,
    )  # fmt: skip
    check_edits(instructions := instructions_of(records), model=config.model)
    if instructions and (config.random_flip != "none" or config.aspect_bucket_step):
        raise ValueError(
            f"random_flip is {config.random_flip} and aspect_bucket_step {config.aspect_bucket_step}; for pairs of "
            "edits, whose reference image is neither mirrored nor cropped to a bucket, they must be none and null."
        )
    trainer.print(f"{len(records):,} pairs of {summarise(records).num_prompts:,} prompts")
    sizes = list[tuple[int, int]]()
    if config.aspect_bucket_step:
        policy = trainer.policy
        sizes = aspect_buckets(policy.image_size, config.aspect_bucket_step, unit=policy.size_unit)
    pairs = ImagePairs(
        records, policy=trainer.policy, read=to_tensor, microbatch_size=config.microbatch_size,
        cache_folder=Path(config.cache_folder) if config.cache_folder else None, augmentation=augmentation_of(config),
        bucket_sizes=sizes, skipped=skipped, num_workers=config.num_workers, weights=config.weights,
    )  # fmt: skip
    if sizes:
        trainer.print(f"buckets   {', '.join('{} x {}'.format(*size) for size in sizes)}")
    pairs.fill_cache(rank=trainer.rank, num_processes=trainer.num_processes)
    trainer.wait_for_everyone()
    return pairs


def augmentation_of(config: Config) -> Augmentation:
    """Return the random changes of pairs that options ask for."""
    return Augmentation(config.random_flip, config.proportion_empty_prompts, config.seed)


def update(
    trainer: Trainer, load: LoadPairs, groups: Sequence[Sequence[int]], *, step: int, timesteps: Tensor,
    config: DpoUpdateSettings,
) -> dict[str, float]:  # fmt: skip
    """Take num_inner_epochs optimiser steps on the rows of all groups; return metrics over all processes.

    `winner_error` and `loser_error` are relative to the reference. Both above 0 is a known failure of DPO, which
    dpop_weight counteracts.
    """
    if not any(map(len, groups)):
        return {}
    shard = shard_pairs(groups, rank=trainer.rank, num_processes=trainer.num_processes)
    batches = [load(rows) for rows in shard.groups]
    samples, steps = list[Tensor](), list[dict[str, float]]()
    for epoch in range(config.num_inner_epochs):
        gradients = partial(
            accumulate_gradients, trainer, batches, shard, (step, epoch), timesteps=timesteps, config=config
        )
        samples.append(trainer.microbatches.accumulated(gradients, most=2 * max(map(len, shard.groups))))
        steps.append(trainer.optimizer_step())
    totals = torch.cat(samples).sum(0).tolist()
    sums = dict(zip(METRICS, totals, strict=False))  # sft has only the loss
    return {
        **{name: total / len(steps) for name, total in trainer.mean(sums).items()},
        **mean_update_metrics(steps),
    }


def accumulate_gradients(
    trainer: Trainer, batches: Sequence[PairBatch], shard: PairShard, moment: tuple[int, int], microbatch_size: int, *,
    timesteps: Tensor, config: DpoUpdateSettings,
) -> Float[Tensor, "N metrics"]:  # fmt: skip
    """Accumulate the gradients of the step and epoch `moment`; return the METRICS of each pair times its weight."""
    samples = list[Tensor]()
    for group, own, weight in trainer.accumulate(shard.microbatches(max(1, microbatch_size // 2))):
        generators = [generator_for(trainer.config.seed, NOISE, *moment, shard.groups[group][int(i)]) for i in own]
        with lora_dropout(trainer.policy.denoiser, seed=generators[0].initial_seed()):
            loss, sample = loss_of_pairs(
                trainer.policy, batches[group].at(own), timesteps=timesteps, config=config, generators=generators
            )
            trainer.backward(loss * weight)
        samples.append(sample * weight / len(own))
    return torch.cat(samples)


def loss_of_pairs(
    policy: Policy, pairs: PairBatch, *, timesteps: Tensor, generators: Sequence[torch.Generator],
    config: DpoUpdateSettings,
) -> tuple[Float[Tensor, ""], Float[Tensor, "B metrics"]]:  # fmt: skip
    """Return the mean loss of some pairs, and the METRICS of each pair.

    Winner and loser get the same noise at the same timestep, drawn by the pair's own generator.
    """
    drawn = torch.cat([timesteps[torch.randint(len(timesteps), (1,), generator=g)] for g in generators])
    noise = randn(pairs.winner.shape, generators=generators, device=pairs.winner.device)
    if config.loss == "sft":
        loss = denoising_errors(policy, pairs.winner, noise, policy.levels_at(drawn), pairs.conditioning).mean()
        return loss, loss.detach().expand(len(noise), 1)
    clean, noise = torch.cat([pairs.winner, pairs.loser]), noise.repeat(2, 1, 1, 1)
    inputs = clean, noise, policy.levels_at(drawn.repeat(2)), pairs.conditioning.repeat(2)
    with torch.no_grad(), policy.as_reference():
        reference_winner, reference_loser = denoising_errors(policy, *inputs).chunk(2)
    winner, loser = denoising_errors(policy, *inputs).chunk(2)
    loss = diffusion_dpo_loss(
        winner, loser, reference_winner, reference_loser, beta=config.beta, dpop_weight=config.dpop_weight
    )
    changes = torch.stack([winner - reference_winner, loser - reference_loser], dim=1).detach()
    accuracy = implicit_preference(changes[:, 1:] - changes[:, :1])
    return loss, torch.cat([loss.detach().expand(len(changes), 1), changes, accuracy], dim=1)


train = from_python(main)


if __name__ == "__main__":
    run_command(or_plan(main), config)
