"""What recipes that search for images have in common: settings, sharing the work, and results that survive a kill.

A search for one image of one prompt is finished when its `search_0000.json` is there: images are written before it,
it appears whole or not at all, and what is finished is never painted again. All randomness has an address, so neither a
stop nor the number of processes changes an image, but for what a network rounds otherwise in a batch of another size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from rlhf_t2i.config import Rule, check, names
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.files import write_atomically
from rlhf_t2i.prompts import load_prompts
from rlhf_t2i.report.search import Found, read_found, summary, write_report
from rlhf_t2i.rewards.load import WeightedSum, load_reward, load_rewards
from rlhf_t2i.search.context import Candidates, Cost, SearchContext, Veto
from rlhf_t2i.search.geneval import metadata_of, write_metadata
from rlhf_t2i.seeds import CALIBRATE, RESAMPLE, SAMPLE, generator_for, seed_for
from rlhf_t2i.training.metrics import save_image_grid
from rlhf_t2i.training.run import Run, start_run
from rlhf_t2i.types import Sampler


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """Settings that both recipes share, in the order of the flow. A recipe adds its own."""

    prompts: str = "shapes"
    """A UTF-8 file with one prompt a line (or .jsonl, GenEval's too), or the built-in world's held-out prompts."""
    images_per_prompt: int = 4
    """Images that each prompt gets, each from a search of its own."""
    searches_per_batch: int = 8
    """Searches in one batch: what a kill can cost."""

    model: str = "shapes"
    """A pipeline folder of diffusers, a Hub id, or a built-in model: shapes, or shapes-flow."""
    resolution: int | None = None
    """Height and width of images, in pixels; null is what the model was made for."""
    weights: str | None = None
    """Trained weights for it: the folder of a run, of its lora or unet, or of a checkpoint."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the networks; null takes what `accelerate launch` says."""
    num_denoising_steps: int = 8
    guidance_scale: float = 1.0
    """Of classifier-free guidance; 1 is off and halves the cost."""
    batch_size: int = 64
    """Images in one forward pass; halved when memory runs out. Changes memory and speed, never results."""

    rewards: str = "llava_reward"
    """What decides. Comma-separated NAME or NAME=WEIGHT: judge (the built-in one), llava_reward:PATH (a LLaVA-Reward folder or
    Hub id), oracle, oracle_pass, jpeg_compressibility, jpeg_incompressibility, or module:function."""
    veto: str | None = None
    """A reward that can forbid an image ..."""
    veto_below: float = 0.0
    """... by a score below this: it is returned only where all of its prompt are forbidden."""
    evaluation_rewards: str = "oracle,oracle_pass"
    """Comma-separated rewards that look at every finished image and decide nothing; may be empty."""

    resume: bool = False
    """Go on with run_folder, or with the newest run under runs/."""
    run_folder: str | None = None
    """Null is runs/RECIPE-DATE."""
    num_cpu_threads: int = 0
    """On a CPU; 0 shares all cores among the processes."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        check(self, self.rules())

    def rules(self) -> list[Rule]:
        """What the values must be; a recipe adds its own."""
        return [
            ("images_per_prompt", self.images_per_prompt >= 1, "at least 1"),
            ("searches_per_batch", self.searches_per_batch >= 1, "at least 1"),
            ("num_denoising_steps", self.num_denoising_steps >= 1, "at least 1"),
            ("guidance_scale", self.guidance_scale >= 1, "at least 1, which is off"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("resolution", self.resolution is None or self.resolution >= 1, "at least 1"),
            ("seed", self.seed >= 0, "at least 0"),
        ]


@dataclass(frozen=True, slots=True)
class Task:
    """One image to search for: which prompt, and the how manieth image of it."""

    prompt: int
    search: int
    text: str

    def seeds(self, seed: int, count: int) -> list[int]:
        """One for each image that is tried."""
        return [seed_for(seed, SAMPLE, self.prompt, self.search, i) for i in range(count)]


@dataclass(frozen=True)
class Search:
    """A run that searches: where it paints, what it has to do, and where results go."""

    config: SearchConfig
    run: Run
    context: SearchContext
    watched: WeightedSum | None
    prompts: list[str]
    metadata: list[dict[str, Any]]

    @property
    def images(self) -> Path:
        """A folder for each prompt, as GenEval's scorer reads it."""
        return self.run.folder / "images"

    def batches(self) -> Iterator[list[Task]]:
        """What this process has still to do."""
        tasks = [
            Task(prompt, search, text)
            for prompt, text in enumerate(self.prompts)
            for search in range(self.config.images_per_prompt)
        ]
        todo = [task for task in tasks if not self._marker(task).is_file()]
        for index, metadata in enumerate(self.metadata):
            path = self._folder(index) / "metadata.jsonl"
            if path.is_file() and (earlier := json.loads(path.read_text(encoding="utf-8"))) != metadata:
                raise ValueError(
                    f"Prompt {index} of {self.config.prompts} is now {metadata}, but the images in {path.parent} "
                    f"were painted for {earlier}. Restore the file, or name another --run_folder."
                )
        if self.run.is_main:  # two processes may search for the same prompt
            for index, metadata in enumerate(self.metadata):
                write_metadata(self._folder(index), metadata)
        self.run.accelerator.wait_for_everyone()  # all must have looked before the first one finishes something
        if len(todo) < len(tasks):
            self.run.say(f"Resumed: {len(tasks) - len(todo)} of {len(tasks)} images are there.")
        mine = todo[self.run.rank :: self.run.num_processes]
        size = self.config.searches_per_batch
        yield from tqdm(
            [mine[i : i + size] for i in range(0, len(mine), size)],
            desc="searching",
            disable=not self.run.is_main,
            dynamic_ncols=True,
        )

    def generators(self, tasks: Sequence[Task], count: int) -> list[torch.Generator]:
        """One for each image that is tried, whichever process tries it."""
        return [torch.Generator().manual_seed(s) for task in tasks for s in task.seeds(self.config.seed, count)]

    def resampling(self, tasks: Sequence[Task]) -> list[torch.Generator]:
        """One for each search: which of its particles have children."""
        return [generator_for(self.config.seed, RESAMPLE, task.prompt, task.search) for task in tasks]

    def pilots(self, count: int) -> list[torch.Generator]:
        """For images that only show how far a reward spreads."""
        return [generator_for(self.config.seed, CALIBRATE, i) for i in range(count)]

    def watch(self, candidates: Candidates, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """What the rewards that decide nothing say of every finished image."""
        if self.watched is None:
            return {}
        num_prompts, num = candidates.images.shape[:2]
        texts = [task.text for task in tasks for _ in range(num)]
        images, watched = candidates.images.flatten(0, 1), self.watched
        parts = self.context.in_batches(
            len(images), lambda rows: watched(images[rows], [texts[int(i)] for i in rows])[1]
        )
        return {name: torch.cat([part[name] for part in parts]).unflatten(0, (num_prompts, num)) for name in parts[0]}

    def finish(
        self,
        tasks: Sequence[Task],
        found: Candidates,
        *,
        plain: Candidates | None,
        seeds: Sequence[Sequence[int]],
        **facts: Sequence[Any],
    ) -> None:
        """Write a batch to the disk: each picked image, what plain sampling paints instead, and all that was said.

        `plain` are images of the same seeds by plain best-of-N: `found` itself if it is that, None if nobody painted
        them. Each of `facts` has an entry for each task.
        """
        searched, other = plain is not found, self.watch(found, tasks)
        said = self.watch(plain, tasks) if plain and searched else other
        for i, task in enumerate(tasks):
            folder = self._folder(task.prompt)
            if plain:
                save_image_grid(folder / "plain" / f"{task.search:04d}.png", plain.images[i, :1], num_columns=1)
            save_image_grid(folder / "samples" / f"{task.search:04d}.png", found.best[i : i + 1], num_columns=1)
            row = {
                "prompt": task.text,
                "seeds": list(seeds[i]),
                "searched": searched,
                "found": _row(found, i, other, len(tasks)),
                "plain": _row(plain, i, said, len(tasks)) if plain and searched else None,
                **{name: values[i] for name, values in facts.items()},
            }
            write_atomically(self._marker(task), json.dumps(row, allow_nan=False))

    def close(self) -> list[Found]:
        """When all processes are done: the report and a table; returns all results, those before a resume too."""
        self.run.accelerator.wait_for_everyone()
        found = read_found(self.images)
        if self.run.is_main:
            report = write_report(self.run.folder)
            self.run.say(summary(found))
            self.run.say(f"report    {report}\nimages  {self.images}")
        self.run.close()
        return found

    def _folder(self, prompt: int) -> Path:
        return self.images / f"{prompt:05d}"

    def _marker(self, task: Task) -> Path:
        return self._folder(task.prompt) / f"search_{task.search:04d}.json"


def start_search(config: SearchConfig, *, recipe: str, eta: float) -> Search:
    """Load everything. Raises what `load_rewards`, `load_prompts`, `start_run` and the model's loader do."""
    from rlhf_t2i.models.load import load_policy  # takes seconds

    rewards = load_rewards(config.rewards, finite=False)
    veto = Veto(load_reward(config.veto, finite=False), config.veto_below) if config.veto else None
    watched = load_rewards(config.evaluation_rewards) if names(config.evaluation_rewards) else None
    prompts = load_prompts(config.prompts, held_out=True)
    metadata = metadata_of(config.prompts, prompts)
    run = start_run({**asdict(config), "trackers": "", "keep_checkpoints": 0}, recipe=recipe, checkpoints=False)
    policy = load_policy(
        config.model,
        device=run.device,
        dtype=run.dtype,
        weights=Path(config.weights) if config.weights else None,
        resolution=config.resolution,
    )
    schedule = policy.schedule(config.num_denoising_steps)
    sampler = Sampler(schedule, stochastic(schedule, eta=eta), config.guidance_scale)
    context = SearchContext(policy, rewards, sampler=sampler, batch_size=config.batch_size, veto=veto)
    return Search(config, run, context, watched, prompts, metadata)


def _row(candidates: Candidates, i: int, watched: Mapping[str, Tensor], num_tasks: int) -> dict[str, Any]:
    """What is written down of one prompt's candidates; its share of the batch's cost."""
    verdict, cost = candidates.verdict, candidates.cost
    return {
        "picked": int(candidates.picked[i]),
        "scores": {name: numbers(scores[i]) for name, scores in verdict.scores.items()},
        "watched": {name: numbers(scores[i]) for name, scores in watched.items()},
        "standing": numbers(verdict.standing[i]),
        "vetoed": verdict.vetoed[i].tolist(),
        "cost": asdict(
            Cost(cost.denoiser_calls // num_tasks, cost.reward_calls // num_tasks, cost.seconds / num_tasks)
        ),
    }


def numbers(values: Tensor) -> list[float | None]:
    """JSON knows no NaN."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
