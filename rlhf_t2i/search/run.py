"""The run of a search recipe: its tasks, their distribution over processes, and results that survive a kill.

The search for one image of a prompt is finished when its `search_0000.json` exists. It is written atomically after the
images, and a resumed run skips what is finished. All random numbers are derived from the seed and the task, so neither
an interruption nor the number of processes changes an image, up to rounding in batches of another size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from reward_model.text_files import read_json, read_object
from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.reference_images import check_edits
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.image_grids import save_image_grid
from rlhf_t2i.output.run_folder import (
    IMAGES,
    PROMPT_METADATA,
    REWARD_STD,
    SEARCH_BASELINE,
    SEARCH_SAMPLES,
    prompt_folder,
    search_image,
    search_record,
)
from rlhf_t2i.rewards.load import WeightedSum, as_weighted_sum, load_reward, load_rewards
from rlhf_t2i.rewards.rows import check_prompts
from rlhf_t2i.rewards.terms import join_terms
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.search.context import PARTS_OF_GROUPS, Candidates, Cost, SearchContext, Veto
from rlhf_t2i.search.geneval import rows_to_write, write_metadata
from rlhf_t2i.search.records import SearchRecord, read_records, summary
from rlhf_t2i.search.steering import NUM_CALIBRATION_IMAGES, NUM_CALIBRATION_PROMPTS, measure_reward_std
from rlhf_t2i.seeds import CALIBRATE, RESAMPLE, SAMPLE, generator_for, seed_for
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.search import SearchConfig
from rlhf_t2i.training.run import Run, record_other_bases, start_run
from rlhf_t2i.types import Sampler


@dataclass(frozen=True, slots=True)
class Task:
    """The search for one image: the index and text of its prompt, and the number of the search for this prompt."""

    prompt: int
    search: int
    text: str

    def seeds(self, seed: int, count: int) -> list[int]:
        """Return the seed of each of `count` candidates."""
        return [seed_for(seed, SAMPLE, self.prompt, self.search, i) for i in range(count)]


@dataclass(frozen=True)
class SearchRun:
    """A run that searches for images of prompts: its context, its tasks and its results."""

    config: SearchConfig
    run: Run
    context: SearchContext
    evaluation_rewards: WeightedSum | None
    prompts: list[str]
    metadata: list[dict[str, Any]]
    """For each prompt, the content of its metadata.jsonl."""

    def batches(self) -> Iterator[list[Task]]:
        """Yield the unfinished tasks of this process in batches of `searches_per_batch`.

        Raises ValueError if the folder holds images of other prompts.
        """
        tasks = [
            Task(prompt, search, text)
            for prompt, text in enumerate(self.prompts)
            for search in range(self.config.images_per_prompt)
        ]
        todo = [task for task in tasks if not self._record(task).is_file()]
        for index, metadata in enumerate(self.metadata):
            path = self._folder(index) / PROMPT_METADATA
            if path.is_file() and (earlier := read_json(path)) != metadata:
                raise ValueError(
                    f"Prompt {index} of {self.config.prompts} is now {metadata}, but the images in {path.parent} "
                    f"were generated for {earlier}. Restore the file, or name another --run_folder."
                )
        self.run.keep_folder()
        if self.run.is_main:  # two processes may search for images of the same prompt
            for index, metadata in enumerate(self.metadata):
                write_metadata(self._folder(index), metadata)
        # Every process must have listed the unfinished tasks before the first result is written.
        self.run.accelerator.wait_for_everyone()
        if len(todo) < len(tasks):
            self.run.print(f"Resumed: {len(tasks) - len(todo)} of {len(tasks)} images are finished.")
        own = todo[self.run.rank :: self.run.num_processes]
        size = self.config.searches_per_batch
        yield from tqdm(
            [own[i : i + size] for i in range(0, len(own), size)],
            desc="searching",
            disable=not self.run.is_main,
            dynamic_ncols=True,
        )

    def generators(self, tasks: Sequence[Task], count: int) -> list[torch.Generator]:
        """Return the generators of `count` candidates for each task, equal on every process."""
        return [torch.Generator().manual_seed(s) for task in tasks for s in task.seeds(self.config.seed, count)]

    def resampling_generators(self, tasks: Sequence[Task]) -> list[torch.Generator]:
        """Return one generator per task, from which its particles are resampled."""
        return [generator_for(self.config.seed, RESAMPLE, task.prompt, task.search) for task in tasks]

    def measured_reward_std(self) -> float:
        """Return the standard deviation of the reward among images of one prompt.

        It is measured once in a run, on calibration samples of the first prompts, and read again by resumed runs.
        """
        path = self.run.folder / REWARD_STD
        if self.run.is_main and not path.is_file():
            prompts = self.prompts[:NUM_CALIBRATION_PROMPTS]
            num_images = len(prompts) * NUM_CALIBRATION_IMAGES
            generators = [generator_for(self.config.seed, CALIBRATE, i) for i in range(num_images)]
            reward_std = measure_reward_std(self.context, prompts, generators=generators)
            write_atomically(path, json.dumps({"reward_std": reward_std, "num_images": num_images}))
            self.run.print(f"The reward's standard deviation among images of one prompt is {reward_std:.3g}.")
        self.run.accelerator.wait_for_everyone()
        return read_object(path)["reward_std"]

    def evaluate(self, candidates: Candidates, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """Return the scores (P, N) of all images by the evaluation rewards, which do not influence the search."""
        rewards = self.evaluation_rewards
        if rewards is None:
            return {}
        num_prompts, num = candidates.images.shape[:2]
        texts = [task.text for task in tasks for _ in range(num)]
        images = candidates.images.flatten(0, 1)
        parts = self.context.in_batches(
            len(images), lambda rows: rewards(images[rows], [texts[int(i)] for i in rows])[1]
        )
        return {name: torch.cat([part[name] for part in parts]).unflatten(0, (num_prompts, num)) for name in parts[0]}

    def write_results(
        self,
        tasks: Sequence[Task],
        candidates: Candidates,
        *,
        baseline: Candidates | None,
        seeds: Sequence[Sequence[int]],
        **extra: Sequence[Any],
    ) -> None:
        """Write the results of a batch: for each task the selected image, the first image of the baseline, a record.

        `baseline` is plain best-of-N from the same seeds: `candidates` itself if that is what was searched, or None
        without a baseline. `extra` are further entries of the records, with one value per task.
        """
        is_baseline, evaluation = baseline is candidates, self.evaluate(candidates, tasks)
        baseline_evaluation = self.evaluate(baseline, tasks) if baseline and not is_baseline else evaluation
        for i, task in enumerate(tasks):
            folder = self._folder(task.prompt)
            if baseline:
                image = search_image(folder, SEARCH_BASELINE, task.search)
                save_image_grid(image, baseline.images[i, :1], num_columns=1)
            image = search_image(folder, SEARCH_SAMPLES, task.search)
            save_image_grid(image, candidates.best[i : i + 1], num_columns=1)
            record = {
                "prompt": task.text,
                "seeds": list(seeds[i]),
                "is_baseline": is_baseline,
                "searched": _entry(candidates, i, evaluation, len(tasks)),
                "baseline": (
                    _entry(baseline, i, baseline_evaluation, len(tasks)) if baseline and not is_baseline else None
                ),
                **{key: values[i] for key, values in extra.items()},
            }
            write_atomically(self._record(task), json.dumps(record, allow_nan=False))

    def close(self, *, report: Callable[[Path], Path]) -> list[SearchRecord]:
        """Wait for all processes, write the report of the folder, print a table; return all records of the folder."""
        self.run.accelerator.wait_for_everyone()
        records = read_records(self.run.folder)
        if self.run.is_main:
            path = report(self.run.folder)
            self.run.print(summary(records))
            self.run.print(f"report    {path}\nimages    {self.run.folder / IMAGES}")
        self.run.close()
        return records

    def _folder(self, prompt: int) -> Path:
        return prompt_folder(self.run.folder, prompt)

    def _record(self, task: Task) -> Path:
        return search_record(self._folder(task.prompt), task.search)


def start_search(config: SearchConfig, *, recipe: str, eta: float, standardise: bool = False) -> SearchRun:
    """Start the run and load the model, rewards and prompts; `standardise` is that of `SearchContext`.

    Raises what `load_rewards`, `load_prompts`, `check_edits`, `start_run` and `load_policy` raise.
    """
    from rlhf_t2i.models.load import load_policy  # takes seconds

    prompts = load_prompts(config.prompts, held_out=True)
    check_edits(prompts, model=config.model)
    for names_of_rewards in (config.rewards, config.veto and join_terms([config.veto]), config.evaluation_rewards):
        check_prompts(names_of_rewards or "", prompts)
    metadata = rows_to_write(prompts)
    rewards = load_rewards(config.rewards, finite=False)
    veto = Veto(load_reward(config.veto, finite=False), config.veto_below) if config.veto else None
    evaluation_rewards = load_rewards(config.evaluation_rewards) if names(config.evaluation_rewards) else None
    for each in (rewards, evaluation_rewards, veto and as_weighted_sum(veto.reward)):
        if each is not None:
            try_rewards(each, prompts)
            each.refuse_groups(PARTS_OF_GROUPS)
    run = start_run({**asdict(config), "trackers": ""}, recipe=recipe, checkpoints=False)
    run.print(config.defaults_text())
    record_other_bases(run, [config.weights] if config.weights else [], config.model)
    policy = load_policy(
        config.model,
        device=run.device,
        dtype=run.dtype,
        weights=Path(config.weights) if config.weights else None,
        resolution=config.image_size,
        quantization=config.quantization,
        complex_human_instruction=config.complex_human_instruction,
    )
    schedule = policy.schedule(config.num_denoising_steps)
    sampler = Sampler(schedule, stochastic(schedule, eta=eta), config.guidance_scale)
    context = SearchContext(
        policy, rewards, sampler=sampler, microbatch_size=config.microbatch_size, veto=veto, standardise=standardise
    )
    return SearchRun(config, run, context, evaluation_rewards, prompts, metadata)


def _entry(candidates: Candidates, i: int, evaluation: Mapping[str, Tensor], num_tasks: int) -> dict[str, Any]:
    """Return the scores of one task's candidates and its share of the cost of the batch, as JSON."""
    scores, cost = candidates.scores, candidates.cost
    return {
        "selected": int(candidates.selected[i]),
        "scores": {name: finite_or_none(values[i]) for name, values in scores.by_name.items()},
        "evaluation_scores": {name: finite_or_none(values[i]) for name, values in evaluation.items()},
        "rank": scores.rank[i].tolist(),
        "vetoed": scores.vetoed[i].tolist(),
        "cost": asdict(
            Cost(cost.denoiser_calls // num_tasks, cost.reward_calls // num_tasks, cost.seconds / num_tasks)
        ),
    }


def finite_or_none(values: Tensor) -> list[float | None]:
    """Return the numbers as a list for JSON, which has no NaN or infinity: None instead of those."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
