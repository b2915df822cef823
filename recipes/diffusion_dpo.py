"""Diffusion-DPO: teach a diffusion model by pairs of images (Wallace et al., arXiv:2311.12908).

    accelerate launch recipes/diffusion_dpo.py                      the built-in world, minutes on a laptop
    accelerate launch recipes/diffusion_dpo.py --pairs pairs.jsonl \\
        --config recipes/configs/diffusion_dpo_sd15.yaml            what people preferred; SD 1.5, as published

A denoiser that likes an image removes noise from it with a small error. So the errors of a preferred image are
lowered against those of the other one, both measured from the model before training. One step of training:

    pairs      the next of a file; or paint images_per_prompt images of each prompt and let a reward choose two
    disturb    the same noise, at the same level, on both images of a pair
    compare    moved = error of the noise found by the model - that of the reference, of winner and of loser
    move       raise log sigmoid(beta / 2 * (moved_loser - moved_winner))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.config import Rule, names, parse_config, whole_numbers
from rlhf_t2i.data.preferences import (
    ImagePairs,
    PairBatch,
    choose_pairs,
    implicit_preference,
    numbers_of_step,
    save_pairs,
    share_of,
)  # fmt: skip
from rlhf_t2i.diffusion.gaussian import randn
from rlhf_t2i.losses import diffusion_dpo_loss
from rlhf_t2i.prompts import load_prompts, prompts_of_step
from rlhf_t2i.report import write_report
from rlhf_t2i.rewards.load import WeightedSum, load_rewards
from rlhf_t2i.sampling.denoising_errors import denoising_errors
from rlhf_t2i.sampling.rollout import generate
from rlhf_t2i.seeds import NOISE, SAMPLE, UPDATE, generator_for, generators_for
from rlhf_t2i.training.metrics import mean_update_metrics
from rlhf_t2i.training.trainer import Trainer, TrainerConfig, make_trainer
from rlhf_t2i.types import Policy

LoadPairs = Callable[[Sequence[int]], PairBatch]
"""From the numbers of a step's pairs, as `share_of` deals them out, to what an update needs."""
METRICS: Sequence[str] = ("loss", "winner_error", "loser_error", "accuracy")


@dataclass(frozen=True, kw_only=True)
class Config(TrainerConfig):
    """Those of every recipe, and Diffusion-DPO's own. An update uses no guidance; only painting does."""

    pairs: str = "judged"
    """Comma-separated FORMAT:PLACE (docs/data.md), preference files or folders; judged makes pairs in each step."""
    image_root: str | None = None
    """Where relative image paths start; null is each file's own folder. No image may lie outside of it."""
    image_prefix: str | None = None
    """OLD=NEW: image paths that start with the folder OLD are read as if they started with NEW."""
    unpack_folder: str = "runs/images"
    """Where images are written that lie within tables and archives."""
    on_bad_record: Literal["error", "skip"] = "error"
    """Stop at a record that is no pair of one prompt, or write it to skipped.jsonl in the run folder."""
    pairs_per_step: int = 64
    """Pairs of a file in one step, over all processes."""
    cache_folder: str | None = None
    """Where latents and text embeddings of a file's pairs are kept; null encodes them anew each time."""
    prompts_per_step: int = 32
    """Of judged pairs: different prompts in one step, over all processes."""
    images_per_prompt: int = 8
    """Of judged pairs: images of each, on one process."""
    eta: float = 1.0
    """Of judged pairs: noise of each step of painting, in [0, 1]."""
    rewards: str = "llava_reward"
    """Of judged pairs: comma-separated NAME or NAME=WEIGHT, as in every recipe."""
    choice: Literal["best_worst", "all", "random"] = "best_worst"
    """Of judged pairs: which of a prompt's images make pairs."""
    keep_pairs: bool = True
    """Write judged pairs to RUN_FOLDER/pairs, which --pairs can be given."""
    loss: Literal["dpo", "sft"] = "dpo"
    """sft trains on the winners alone, as if they were ordinary images: the baseline."""
    beta: float = 50.0
    """How firmly the reference is kept to: 2000 to 5000 for the 16,384 latent numbers of SD 1.5, less for fewer."""
    winner_guard: float = 0.0
    """Above 0: how often an error of the winner that rose counts again (DPO-Positive, arXiv:2402.13228)."""
    times: str = "500-999"
    """Levels of noise to learn at: a range (0-999 is all), or a list such as 249,499,749,999 for a turbo model."""
    num_inner_epochs: int = 4
    """Optimiser steps on each step's pairs, each with new noise."""
    learning_rate: float = 1.5e-4
    num_steps: int = 20

    def rules(self) -> list[Rule]:
        return [
            *super().rules(),
            ("pairs_per_step", self.pairs_per_step >= 1, "at least 1"),
            ("prompts_per_step", self.prompts_per_step >= 1, "at least 1"),
            ("images_per_prompt", self.images_per_prompt >= 2, "at least 2, to make a pair"),
            ("eta", 0 <= self.eta <= 1, "in [0, 1]"),
            ("beta", self.beta > 0, "positive"),
            ("winner_guard", self.winner_guard >= 0, "at least 0, which is off"),
            ("times", bool(whole_numbers(self.times)), "a range such as 0-999 or a list such as 249,499,749,999"),
            ("num_inner_epochs", self.num_inner_epochs >= 1, "at least 1"),
            ("microbatch_size", self.microbatch_size >= 2, "at least 2: both images of a pair"),
        ]


def main(config: Config) -> Path:
    """Load or sample preference pairs, noise them, update the policy; return the run folder."""
    judged = config.pairs == "judged"
    reward, prompts = (load_rewards(config.rewards), load_prompts(config.prompts)) if judged else (None, [])
    trainer = make_trainer(config, recipe="diffusion_dpo", report=write_report, keep_reference=config.loss == "dpo")
    times = torch.tensor(whole_numbers(config.times))
    trainer.policy.levels_at(times)  # refuses those that the model does not know
    files = None if judged else load_pairs(trainer, config)
    for step in trainer.steps():
        if reward is not None:
            asked = prompts_of_step(prompts, step, num_prompts=config.prompts_per_step, seed=config.seed)
            load, row = sample_pairs(trainer, asked, reward, step=step, config=config)
        else:
            assert files is not None
            numbers = numbers_of_step(len(files), step, num_pairs=config.pairs_per_step, seed=config.seed)
            load, row = partial(files.load, numbers), {"images": 2 * len(numbers), "pairs": len(numbers)}
        with trainer.timed("update"):
            metrics = update(trainer, load, count=int(row["pairs"]), step=step, times=times, config=config)
        trainer.finish_step(step, **row, **metrics)
    return trainer.finish()


def sample_pairs(
    trainer: Trainer, prompts: Sequence[str], reward: WeightedSum, *, step: int, config: Config
) -> tuple[LoadPairs, dict[str, float]]:
    """Paint each prompt and let the reward choose: pairs by number, and metrics of all processes."""
    copies = config.images_per_prompt
    mine = trainer.shard(len(prompts), name="prompts_per_step")
    own = [prompts[i] for i in mine for _ in range(copies)]
    with trainer.timed("rollout"), trainer.sampling():
        images, painted = generate(
            trainer.policy, own, sampler=trainer.sampler(eta=config.eta), microbatch_size=config.microbatch_size,
            generators=generators_for(config.seed, SAMPLE, step, mine),
        )  # fmt: skip
    with trainer.timed("reward"), torch.no_grad():
        rewards, verdicts = reward(images, own, batch_size=config.microbatch_size)
    scores = trainer.gather(rewards.view(len(mine), copies)).cpu()
    generators = generators_for(config.seed, UPDATE, step, range(len(prompts)))
    winners, losers = choose_pairs(scores, choice=config.choice, generators=generators)
    if not len(winners):
        trainer.print(
            f"WARNING: in step {step + 1} all images of each prompt earned the same: nothing could be learnt."
        )
    if config.keep_pairs:
        path = trainer.folder / "pairs" / f"step_{step + 1:06d}.jsonl"
        save_pairs(path, images, prompts, scores, (winners, losers), first=mine.start * copies)
    latents, conditioning = trainer.gather(painted), trainer.policy.encode(prompts)

    def load(rows: Sequence[int]) -> PairBatch:
        winner, loser = winners[rows], losers[rows]
        return PairBatch(latents[winner], latents[loser], conditioning[winner // copies])

    return load, {
        "reward": scores.mean().item(), "reward_std": scores.std(correction=0).item(),
        **trainer.mean({f"rewards/{name}": seen.mean().item() for name, seen in verdicts.items()}),
        "images": scores.numel(), "pairs": len(winners),
        "denoiser_calls": scores.numel() * config.num_denoising_steps * trainer.policy.num_calls(config.guidance_scale),
    }  # fmt: skip


def load_pairs(trainer: Trainer, config: Config) -> ImagePairs:
    """The pairs of all files, without ties; other records are refused, or written down as skipped."""
    from reward_model.datasets import load_same_prompt_pairs
    from reward_model.images import to_tensor

    log = trainer.folder / (f"skipped_{trainer.rank}.jsonl" if trainer.rank else "skipped.jsonl")
    found = load_same_prompt_pairs(
        names(config.pairs), skipped=log if config.on_bad_record == "skip" else None, log=trainer.print,
        image_root=config.image_root, image_prefix=config.image_prefix, unpack_to=config.unpack_folder,
    )  # fmt: skip
    trainer.print(f"{len(found):,} pairs of {len({pair.winner_prompt for pair in found}):,} prompts")
    files = ImagePairs(
        found, policy=trainer.policy, read=to_tensor, batch_size=config.microbatch_size,
        cache_folder=Path(config.cache_folder) if config.cache_folder else None,
    )  # fmt: skip
    files.fill_cache(rank=trainer.rank, num_processes=trainer.num_processes)
    trainer.wait_for_everyone()
    return files


def update(
    trainer: Trainer, load: LoadPairs, *, count: int, step: int, times: Tensor, config: Config
) -> dict[str, float]:
    """Learn from `count` pairs, once in each inner epoch. Returns metrics of all processes.

    `winner_error` and `loser_error` are how far the errors moved from the reference's: both above 0 is DPO's known
    failing, for which there is winner_guard.
    """
    if not count:
        return {}
    policy = trainer.policy
    share = share_of(count, rank=trainer.rank, num_processes=trainer.num_processes)
    batch = load(share.rows)
    microbatches = share.microbatches(config.microbatch_size // 2)
    seen, steps = list[Tensor](), list[dict[str, float]]()
    for epoch in range(config.num_inner_epochs):
        for own, weight in trainer.accumulate(microbatches):
            draws = [generator_for(config.seed, NOISE, step, epoch, share.rows[int(i)]) for i in own]
            loss, facts = loss_of_pairs(policy, batch.at(own), times=times, generators=draws, config=config)
            trainer.backward(loss * weight)
            seen.append(facts * weight / len(own))
        steps.append(trainer.optimizer_step())
    totals = torch.cat(seen).sum(0).tolist()
    sums = dict(zip(METRICS, totals, strict=False))  # sft has but the first
    return {
        **{name: total / len(steps) for name, total in trainer.mean(sums).items()},
        **mean_update_metrics(steps),
    }


def loss_of_pairs(
    policy: Policy, pairs: PairBatch, *, times: Tensor, generators: Sequence[torch.Generator], config: Config
) -> tuple[Float[Tensor, ""], Float[Tensor, "B metrics"]]:
    """The mean loss of some pairs, and of each pair what METRICS names.

    Winner and loser are disturbed by the same noise to the same level, drawn by the pair's own generator.
    """
    drawn = torch.cat([times[torch.randint(len(times), (1,), generator=generator)] for generator in generators])
    noise = randn(pairs.winner.shape, generators=generators, device=pairs.winner.device)
    if config.loss == "sft":
        loss = denoising_errors(policy, pairs.winner, noise, policy.levels_at(drawn), pairs.conditioning).mean()
        return loss, loss.detach().expand(len(noise), 1)
    both = torch.cat([pairs.winner, pairs.loser]), noise.repeat(2, 1, 1, 1)
    asked = *both, policy.levels_at(drawn.repeat(2)), pairs.conditioning.repeat(2)
    with torch.no_grad(), policy.as_reference():
        reference_winner, reference_loser = denoising_errors(policy, *asked).chunk(2)
    winner, loser = denoising_errors(policy, *asked).chunk(2)
    loss = diffusion_dpo_loss(
        winner, loser, reference_winner, reference_loser, beta=config.beta, winner_guard=config.winner_guard
    )
    moved = torch.stack([winner - reference_winner, loser - reference_loser], dim=1).detach()
    agrees = implicit_preference(moved[:, 1:] - moved[:, :1])
    return loss, torch.cat([loss.detach().expand(len(moved), 1), moved, agrees], dim=1)


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
