"""Fixed prompts, fixed seeds, every reward: the same images before and after, so that they can be compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.files import write_atomically
from rlhf_t2i.image_grids import NUM_COLUMNS, save_captions, save_image_grid
from rlhf_t2i.rewards.load import CheckedReward
from rlhf_t2i.sampling.rollout import generate
from rlhf_t2i.training.run_folder import CAPTIONS, EXTREMES, IMAGES, evaluation_scores, extremes_grid, image_grid
from rlhf_t2i.types import Policy, ProcessGroup, Sampler

_NUM_SHOWN = 4 * NUM_COLUMNS
"""Images on the strip of each evaluation."""
_NUM_EXTREMES = 6
"""Of the best images, and of the worst, by each reward."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Images of a fixed set, and what each judge says of them."""

    prompts: list[str]
    seeds: list[int]
    images: Float[Tensor, "B 3 Y X"]
    scores: dict[str, Float[Tensor, " B"]]

    def summary(self) -> dict[str, float]:
        """Mean and standard error of each reward, and the diversity, with its error where it has one."""
        row: dict[str, float] = {}
        for name, scores in self.scores.items():
            row[name] = scores.mean().item()
            row[f"{name}/standard_error"] = scores.std().item() / len(scores) ** 0.5
        mean, error = diversity(self.images, self.prompts)
        return {**row, "diversity": mean, **({"diversity_error": error} if error is not None else {})}


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rewards: Sequence[CheckedReward],
    *,
    sampler: Sampler,
    batch_size: int,
    processes: ProcessGroup | None = None,
) -> Evaluation:
    """Paint `prompts[i]` from a generator seeded with `seeds[i]`, and let every reward judge.

    One seed is one image: plain diffusers with the same generator paints it too. With several `processes` each
    paints an equal share (the last images are painted twice where it does not divide) and all get the whole.
    """
    rank, num_processes = (processes.rank, processes.num_processes) if processes else (0, 1)
    share = -(-len(prompts) // num_processes)
    mine = [min(i, len(prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
    images: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {reward.name: [] for reward in rewards}
    for start in range(0, share, batch_size):
        rows = mine[start : start + batch_size]
        painted, _ = generate(
            policy,
            [prompts[i] for i in rows],
            sampler=sampler,
            generators=[torch.Generator().manual_seed(seeds[i]) for i in rows],
            microbatch_size=batch_size,
        )
        images.append(painted)
        for reward in rewards:
            scores[reward.name].append(reward(painted, [prompts[i] for i in rows]))
    own = torch.cat(images)

    def whole(tensor: Tensor) -> Tensor:
        everything = processes.gather(tensor) if processes else tensor
        return everything[: len(prompts)].cpu()

    verdicts = {name: whole(torch.cat(parts)) for name, parts in scores.items()}
    return Evaluation(list(prompts), list(seeds), whole(own), verdicts)


def evaluation_set(prompts: Sequence[str], *, num_images: int, seed: int) -> tuple[list[str], list[int]]:
    """Which prompt and which seed each of `num_images` images has: the prompts in turn, each image its own seed."""
    return (
        [prompts[i % len(prompts)] for i in range(num_images)],
        [seed + i for i in range(num_images)],
    )


def diversity(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> tuple[float, float | None]:
    """How unlike one another the images of one prompt are, and the standard error of that over prompts.

    The root mean square distance of two images' pixels at 32 x 32, averaged over pairs and then over prompts. It is 0
    if each prompt has but one image; the error is None unless two prompts have more.
    """
    small = F.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False)
    distances: list[Tensor] = []
    for prompt in dict.fromkeys(prompts):
        own = small[[i for i, p in enumerate(prompts) if p == prompt]].flatten(1)
        if len(own) > 1:
            distances.append(torch.pdist(own).mean() / own.shape[1] ** 0.5)
    if not distances:
        return 0.0, None
    each = torch.stack(distances)
    return each.mean().item(), each.std().item() / len(each) ** 0.5 if len(each) > 1 else None


def extremes(scores: Float[Tensor, " B"], *, count: int) -> tuple[list[int], list[int]]:
    """Which images scored best, and which worst, the utmost first; of equal ones the earliest.

    No image is both: of few images there are fewer than `count` on each side.
    """
    count = min(count, len(scores) // 2)
    best = scores.sort(descending=True, stable=True).indices[:count].tolist()
    rest = [i for i in scores.sort(stable=True).indices.tolist() if i not in best]
    return best, rest[:count]


def save_evaluation(evaluation: Evaluation, folder: Path, *, step: int) -> None:
    """Write what an evaluation saw, for people and for the report, into the images of a run folder.

    step_000010.png         a strip of the first images; captions.json says what they are
    step_000010.json        {"prompts", "seeds", "scores": {reward: [of every image]}}
    extremes_000010.png     the best and the worst images by each reward; only of the last evaluation
    extremes.json           {"step", "columns", "cells", "best": {reward: [image]}, "worst": {reward: [image]}};
                            an image is its place in step_000010.json, and `cells` names that of each cell
    """
    shown = slice(0, _NUM_SHOWN)
    save_image_grid(image_grid(folder, step), evaluation.images[shown])
    save_captions(folder / IMAGES / CAPTIONS, evaluation.prompts[shown], evaluation.seeds[shown])
    scores = {name: values.tolist() for name, values in evaluation.scores.items()}
    spoken = {"prompts": evaluation.prompts, "seeds": evaluation.seeds, "scores": scores}
    write_atomically(evaluation_scores(folder, step), json.dumps(spoken))
    _save_extremes(evaluation, folder, step=step)


def _save_extremes(evaluation: Evaluation, folder: Path, *, step: int) -> None:
    found = {name: extremes(values, count=_NUM_EXTREMES) for name, values in evaluation.scores.items()}
    cells = sorted({i for sides in found.values() for side in sides for i in side})
    strip = extremes_grid(folder, step)
    save_image_grid(strip, evaluation.images[cells])
    facts = {
        "step": step,
        "columns": NUM_COLUMNS,
        "cells": cells,
        "best": {name: best for name, (best, _) in found.items()},
        "worst": {name: worst for name, (_, worst) in found.items()},
    }
    write_atomically(folder / IMAGES / EXTREMES, json.dumps(facts))
    for earlier in set(strip.parent.glob("extremes_*")) - {strip}:
        earlier.unlink()
