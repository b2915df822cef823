"""Evaluate weights of a diffusion model: the same prompts and seeds for all of them, scored by any rewards.

    accelerate launch recipes/evaluate_policy.py --weights base,runs/ddpo-DATE

Prints a table (mean and standard error of each reward, diversity) and writes it to table.json in the run folder, with
a grid of images for each of the weights.
"""

from __future__ import annotations

from rlhf_t2i.config import parse_config, run_command
from rlhf_t2i.settings.evaluate_policy import Config

if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    config = parse_config(Config, __doc__)

import gc
import json
from dataclasses import asdict
from pathlib import Path

from rlhf_t2i.data.prompts import load_prompts
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.models.reference_images import check_edits
from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.image_grids import save_captions, save_image_grid
from rlhf_t2i.output.run_folder import CAPTIONS, EVALUATION_TABLE, IMAGES
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.rewards.rows import check_prompts
from rlhf_t2i.rewards.trial import try_rewards
from rlhf_t2i.settings.lists import names
from rlhf_t2i.settings.ranges import BASE
from rlhf_t2i.training.evaluation import evaluate, evaluation_set
from rlhf_t2i.training.run import record_other_bases, start_run
from rlhf_t2i.types import Sampler


def main(config: Config) -> dict[str, dict[str, float | None]]:
    """Sample and score the same images with each of the weights; print, write and return a table of mean rewards."""
    from rlhf_t2i.models.load import load_policy  # takes seconds

    available = load_prompts(config.evaluation_prompts, held_out=True)
    check_edits(available, model=config.model)
    check_prompts(config.evaluation_rewards, available)
    reward = load_rewards(config.evaluation_rewards).without_groups()
    prompts, seeds = evaluation_set(available, num_images=config.num_evaluation_images, seed=config.evaluation_seed)
    try_rewards(reward, prompts)
    run = start_run({**asdict(config), "resume": False, "trackers": ""}, recipe="evaluation")
    run.print(config.defaults_text())
    record_other_bases(run, names(config.weights), config.model)
    table: dict[str, dict[str, float | None]] = {}
    for index, name in enumerate(names(config.weights)):
        policy = load_policy(
            config.model,
            device=run.device,
            dtype=run.dtype,
            weights=None if name == BASE else Path(name),
            resolution=config.image_size,
            quantization=config.quantization,
            complex_human_instruction=config.complex_human_instruction,
        )
        schedule = policy.schedule(config.num_evaluation_steps)
        sampler = Sampler(schedule, stochastic(schedule, eta=config.evaluation_eta), config.guidance_scale)
        evaluation = evaluate(
            policy,
            prompts,
            seeds,
            reward.rewards,
            sampler=sampler,
            microbatch_size=config.microbatch_size,
            processes=run,
        )
        del policy  # or it would be in memory beside the next one
        gc.collect()
        run.keep_folder()
        table[name] = evaluation.summary()
        run.print(f"{name}: {evaluation.text()}")
        if run.is_main:
            save_image_grid(run.folder / IMAGES / f"{index}.png", evaluation.images)
            save_captions(run.folder / IMAGES / CAPTIONS, prompts, seeds)
            write_atomically(run.folder / EVALUATION_TABLE, json.dumps(table, indent=1))
    run.print(f"table     {run.folder / EVALUATION_TABLE}\nimages    {run.folder / IMAGES}")
    run.close()
    return table


if __name__ == "__main__":
    run_command(main, config)
