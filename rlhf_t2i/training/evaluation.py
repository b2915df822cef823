"""Evaluation of a policy on fixed prompts and seeds, so that images before and after training can be compared."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.image_grids import NUM_COLUMNS, save_captions, save_image_grid
from rlhf_t2i.output.run_folder import CAPTIONS, EXTREMES, IMAGES, evaluation_scores, extremes_grid, image_grid
from rlhf_t2i.rewards.load import CheckedReward
from rlhf_t2i.sampling.rollout import generate
from rlhf_t2i.training.changes import fixed_with_error
from rlhf_t2i.training.metrics import ERROR, number
from rlhf_t2i.types import Policy, ProcessGroup, Sampler

_NUM_SHOWN = 4 * NUM_COLUMNS
"""Images in the grid of each evaluation."""
_NUM_EXTREMES = 6
"""Number of best images, and of worst images, shown for each reward."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Images of an evaluation set, and their scores by each reward."""

    prompts: list[str]
    seeds: list[int]
    images: Float[Tensor, "B 3 Y X"]
    scores: dict[str, Float[Tensor, " B"]]

    def summary(self) -> dict[str, float | None]:
        """Return the mean and standard error of each reward, and the diversity and its standard error.

        The standard error of a reward is None for a single image; diversity and its error are left out if undefined.
        """
        row: dict[str, float | None] = {}
        for name, scores in self.scores.items():
            row[name] = scores.mean().item()
            row[name + ERROR] = scores.std().item() / len(scores) ** 0.5 if len(scores) > 1 else None
        measured = zip(("diversity", "diversity_error"), diversity(self.images, self.prompts), strict=True)
        return {**row, **{name: value for name, value in measured if value is not None}}

    def row(self, step: int) -> dict[str, Any]:
        """Return the row of metrics.jsonl for the weights after `step` training steps."""
        return {"kind": "evaluation", "step": step, "num_images": len(self.images), **self.summary()}

    def text(self) -> str:
        """Return each reward's mean ± standard error, and the diversity, on one line."""
        row = self.summary()
        rewards = [f"{name} {fixed_with_error(number(row, name), number(row, name + ERROR))}" for name in self.scores]
        return ", ".join([*rewards, *([f"diversity {row['diversity']:.3f}"] if "diversity" in row else [])])


@dataclass
class EvaluationTable:
    """The evaluations of a run as a table of text that grows by a line with each."""

    _has_header: bool = False

    def line(self, step: int, evaluation: Evaluation, *, title: str) -> str:
        """Return the line of an evaluation, before the first one with the images' number and title, and a header."""
        row = evaluation.summary()
        cells = {"step": str(step)}
        cells |= {n: fixed_with_error(number(row, n), number(row, n + ERROR)) for n in evaluation.scores}
        cells |= {"diversity": f"{row['diversity']:.3f}"} if "diversity" in row else {}
        widths = {name: len(name) if name in ("step", "diversity") else max(len(name), 16) for name in cells}
        lines = ["  ".join(f"{text:>{widths[name]}}" for name, text in cells.items())]
        if not self._has_header:
            self._has_header = True
            header = "  ".join(f"{name:>{width}}" for name, width in widths.items())
            lines = [f"{len(evaluation.images)} images of {title}", header, *lines]
        return "\n".join(lines)


@torch.no_grad()
def evaluate(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    rewards: Sequence[CheckedReward],
    *,
    sampler: Sampler,
    microbatch_size: int,
    processes: ProcessGroup | None = None,
) -> Evaluation:
    """Sample `prompts[i]` with a generator seeded with `seeds[i]`, and score it by every reward.

    A plain diffusers pipeline with the same generator gives the same image. With several `processes` each samples an
    equal share (the last image repeatedly where it does not divide), and all return the complete evaluation.
    """
    rank, num_processes = (processes.rank, processes.num_processes) if processes else (0, 1)
    share = -(-len(prompts) // num_processes)
    indices = [min(i, len(prompts) - 1) for i in range(rank * share, (rank + 1) * share)]
    images: list[Tensor] = []
    scores: dict[str, list[Tensor]] = {reward.name: [] for reward in rewards}
    for start in range(0, share, microbatch_size):
        rows = indices[start : start + microbatch_size]
        sampled, _ = generate(
            policy,
            [prompts[i] for i in rows],
            sampler=sampler,
            generators=[torch.Generator().manual_seed(seeds[i]) for i in rows],
            microbatch_size=microbatch_size,
        )
        images.append(sampled)
        for reward in rewards:
            scores[reward.name].append(reward(sampled, [prompts[i] for i in rows]))

    def gathered(parts: Sequence[Tensor]) -> Tensor:
        own = torch.cat(list(parts))
        return (processes.gather(own) if processes else own)[: len(prompts)].cpu()

    all_scores = {name: gathered(parts) for name, parts in scores.items()}
    return Evaluation(list(prompts), list(seeds), gathered(images), all_scores)


def evaluation_set(prompts: Sequence[str], *, num_images: int, seed: int) -> tuple[list[str], list[int]]:
    """Return the prompt and seed of each of `num_images` images: the prompts in turn, and seeds from `seed` on."""
    return (
        [prompts[i % len(prompts)] for i in range(num_images)],
        [seed + i for i in range(num_images)],
    )


def diversity(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> tuple[float | None, float | None]:
    """Return how different the images of one prompt are, and the standard error of that over prompts.

    This is the root mean square distance between the pixels of two images, at 32 x 32, averaged over pairs and then
    over prompts. It is None if each prompt has one image, and the error unless at least two prompts have more.
    """
    small = F.interpolate(images, (32, 32), mode="bilinear", antialias=True, align_corners=False)
    distances: list[Tensor] = []
    for prompt in dict.fromkeys(prompts):
        own = small[[i for i, p in enumerate(prompts) if p == prompt]].flatten(1)
        if len(own) > 1:
            distances.append(torch.pdist(own).mean() / own.shape[1] ** 0.5)
    if not distances:
        return None, None
    each = torch.stack(distances)
    return each.mean().item(), each.std().item() / len(each) ** 0.5 if len(each) > 1 else None


def extremes(scores: Float[Tensor, " B"], *, count: int) -> tuple[list[int], list[int]]:
    """Return the indices of the `count` best and of the `count` worst images, the most extreme first.

    Ties are broken by index. No image is in both lists, so with few images each list is shorter.
    """
    count = min(count, len(scores) // 2)
    best = scores.sort(descending=True, stable=True).indices[:count].tolist()
    rest = [i for i in scores.sort(stable=True).indices.tolist() if i not in best]
    return best, rest[:count]


def save_evaluation(evaluation: Evaluation, folder: Path, *, step: int) -> None:
    """Write an evaluation into the `images` folder of a run folder.

    captions.json           {"prompts", "seeds", "columns"} of the image grids
    step_000010.png         grid of the first images
    step_000010.json        {"prompts", "seeds", "scores": {reward: [score of each image]}}
    extremes_000010.png     grid of the best and worst images by each reward, of the last evaluation only
    extremes.json           {"step", "columns", "cells", "best": {reward: [index]}, "worst": {reward: [index]}};
                            an index counts the images of step_000010.json, and `cells` has that of each cell
    """
    shown = slice(0, _NUM_SHOWN)
    save_image_grid(image_grid(folder, step), evaluation.images[shown])
    save_captions(folder / IMAGES / CAPTIONS, evaluation.prompts[shown], evaluation.seeds[shown])
    scores = {name: values.tolist() for name, values in evaluation.scores.items()}
    record = {"prompts": evaluation.prompts, "seeds": evaluation.seeds, "scores": scores}
    write_atomically(evaluation_scores(folder, step), json.dumps(record))
    _save_extremes(evaluation, folder, step=step)


def prune_image_grids(folder: Path, *, most: int, kept: Collection[int]) -> None:
    """Delete image grids until `most` are left: always that without which the largest gap of steps is the smallest.

    Those after the first and the last evaluation and after the steps `kept` stay.
    """
    steps = sorted(int(path.stem.removeprefix("step_")) for path in (folder / IMAGES).glob("step_*.png"))
    while len(steps) > most:
        inner = [i for i in range(1, len(steps) - 1) if steps[i] not in kept]
        step = steps.pop(min(inner, key=lambda i: steps[i + 1] - steps[i - 1]))
        image_grid(folder, step).unlink()
        image_grid(folder, step).with_suffix(".webp").unlink(missing_ok=True)


def _save_extremes(evaluation: Evaluation, folder: Path, *, step: int) -> None:
    found = {name: extremes(values, count=_NUM_EXTREMES) for name, values in evaluation.scores.items()}
    cells = sorted({i for sides in found.values() for side in sides for i in side})
    grid = extremes_grid(folder, step)
    save_image_grid(grid, evaluation.images[cells])
    record = {
        "step": step,
        "columns": NUM_COLUMNS,
        "cells": cells,
        "best": {name: best for name, (best, _) in found.items()},
        "worst": {name: worst for name, (_, worst) in found.items()},
    }
    write_atomically(folder / IMAGES / EXTREMES, json.dumps(record))
    for earlier in set(grid.parent.glob("extremes_*")) - {grid}:
        earlier.unlink()
