"""Fixed prompts, fixed seeds, every reward: the same pictures before and after, so that they can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.rewards.load import CheckedReward
from rlhf_t2i.sampling.rollout import rollout
from rlhf_t2i.types import Policy, Sampler

if TYPE_CHECKING:
    from rlhf_t2i.run import Run


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Pictures of a fixed set, and what each judge says of them."""

    prompts: list[str]
    seeds: list[int]
    images: Float[Tensor, "B 3 Y X"]
    scores: dict[str, Float[Tensor, " B"]]

    def summary(self) -> dict[str, float]:
        """Mean and standard error of each reward, and the diversity."""
        row: dict[str, float] = {}
        for name, scores in self.scores.items():
            row[name] = scores.mean().item()
            row[f"{name}/standard_error"] = scores.std().item() / len(scores) ** 0.5
        return {**row, "diversity": diversity(self.images, self.prompts)}


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rewards: Sequence[CheckedReward],
    *,
    sampler: Sampler,
    batch_size: int,
    run: Run | None = None,
) -> Evaluation:
    """Paint `prompts[i]` from a generator seeded with `seeds[i]`, and let every reward judge.

    One seed is one picture: plain diffusers with the same generator paints it too. With the processes of a `run` each
    paints an equal share (the last pictures are painted twice where it does not divide) and all get the whole.
    """
    rank, num_processes = (run.rank, run.num_processes) if run else (0, 1)
    share = -(-len(prompts) // num_processes)
    mine = [min(i, len(prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
    images: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {reward.name: [] for reward in rewards}
    for start in range(0, share, batch_size):
        rows = mine[start : start + batch_size]
        painted, _ = rollout(
            policy,
            [prompts[i] for i in rows],
            sampler=sampler,
            generators=[torch.Generator().manual_seed(seeds[i]) for i in rows],
            batch_size=batch_size,
        )
        images.append(painted)
        for reward in rewards:
            scores[reward.name].append(reward(painted, [prompts[i] for i in rows]))
    own = torch.cat(images)

    def whole(tensor: Tensor) -> Tensor:
        everything = run.gather(tensor) if run else tensor
        return everything[: len(prompts)].cpu()

    verdicts = {name: whole(torch.cat(parts)) for name, parts in scores.items()}
    return Evaluation(list(prompts), list(seeds), whole(own), verdicts)


def evaluation_set(prompts: Sequence[str], *, num_images: int, seed: int) -> tuple[list[str], list[int]]:
    """Which prompt and which seed each of `num_images` pictures has: the prompts in turn, each picture its own seed."""
    return (
        [prompts[i % len(prompts)] for i in range(num_images)],
        [seed + i for i in range(num_images)],
    )


def diversity(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> float:
    """How unlike one another the pictures of one prompt are; 0 if each prompt has but one picture in it.

    The root mean square distance of two pictures' pixels at 32 x 32, averaged over pairs and then over prompts.
    """
    small = F.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False)
    distances: list[Tensor] = []
    for prompt in dict.fromkeys(prompts):
        own = small[[i for i, p in enumerate(prompts) if p == prompt]].flatten(1)
        if len(own) > 1:
            distances.append(torch.pdist(own).mean() / own.shape[1] ** 0.5)
    return torch.stack(distances).mean().item() if distances else 0.0
