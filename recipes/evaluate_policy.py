"""How good are these weights? Any checkpoint x prompts x rewards, on the same prompts and seeds.

    accelerate launch recipes/evaluate_policy.py --weights base,runs/ddpo-DATE

Prints a table (mean, standard error, diversity), and writes it with one strip of images for each of the weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rlhf_t2i.config import names, parse_config
from rlhf_t2i.diffusion.transitions import stochastic
from rlhf_t2i.image_grids import save_captions, save_image_grid
from rlhf_t2i.prompts import load_prompts
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.training.evaluation import Evaluation, evaluate, evaluation_set
from rlhf_t2i.training.run import start_run
from rlhf_t2i.training.run_folder import CAPTIONS, EVALUATION_TABLE, IMAGES
from rlhf_t2i.types import Sampler


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields in the order of the flow."""

    model: str = "shapes"
    """A pipeline folder of diffusers, a Hub id, or a built-in model: shapes, or shapes-flow."""
    resolution: int | None = None
    """Height and width of images, in pixels; null is what the model was made for."""
    weights: str = "base"
    """Comma-separated: base (the model itself), and folders of runs, of what they exported, or of checkpoints. A run's
    own weights are the average if it kept one (ema_decay); a checkpoint's are the last."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the networks; null takes what `accelerate launch` says."""
    prompts: str = "shapes"
    """A UTF-8 file with one prompt a line (or .jsonl), or the built-in world's held-out prompts."""
    num_images: int = 408
    """The prompts in turn, each image from its own seed."""
    evaluation_seed: int = 1_000_000
    """Of the first image; the next ones follow."""
    num_denoising_steps: int = 8
    eta: float = 0.0
    guidance_scale: float = 1.0
    rewards: str = "oracle,oracle_pass"
    """Comma-separated: judge, llava_reward:PATH, oracle, oracle_pass, jpeg_compressibility, jpeg_incompressibility, or
    module:function."""
    batch_size: int = 64
    run_folder: str | None = None
    """Null is runs/evaluation-DATE."""
    num_cpu_threads: int = 0
    """On a CPU; 0 shares all cores among the processes."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, naming them."""
        for name in ("num_images", "num_denoising_steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta is {self.eta}; it must be in [0, 1].")
        if not names(self.weights):
            raise ValueError("weights is empty; name 'base' or a folder.")


def main(config: Config) -> dict[str, dict[str, float]]:
    """Paint the same images with each of the weights, judge them, print and write the table."""
    from rlhf_t2i.models.load import load_policy  # takes seconds

    rewards = load_rewards(config.rewards).rewards
    prompts, seeds = evaluation_set(
        load_prompts(config.prompts, held_out=True), num_images=config.num_images, seed=config.evaluation_seed
    )
    run = start_run({**asdict(config), "resume": False, "trackers": ""}, recipe="evaluation")
    table: dict[str, dict[str, float]] = {}
    for index, name in enumerate(names(config.weights)):
        policy = load_policy(
            config.model,
            device=run.device,
            dtype=run.dtype,
            weights=None if name == "base" else Path(name),
            resolution=config.resolution,
        )
        schedule = policy.schedule(config.num_denoising_steps)
        sampler = Sampler(schedule, stochastic(schedule, eta=config.eta), config.guidance_scale)
        evaluation = evaluate(
            policy, prompts, seeds, rewards, sampler=sampler, batch_size=config.batch_size, processes=run
        )
        table[name] = evaluation.summary()
        run.print(row(name, evaluation))
        if run.is_main:
            save_image_grid(run.folder / IMAGES / f"{index}.png", evaluation.images)
            save_captions(run.folder / IMAGES / CAPTIONS, prompts, seeds)
            (run.folder / EVALUATION_TABLE).write_text(json.dumps(table, indent=1))
    run.print(f"table     {run.folder / EVALUATION_TABLE}\nimages    {run.folder / IMAGES}")
    run.close()
    return table


def row(name: str, evaluation: Evaluation) -> str:
    """One line of the table."""
    summary = evaluation.summary()
    means = [f"{r} {summary[r]:.3f} ± {summary[f'{r}/standard_error']:.3f}" for r in evaluation.scores]
    return f"{name}: {', '.join(means)}, diversity {summary['diversity']:.3f}"


if __name__ == "__main__":
    main(parse_config(Config, description=__doc__ or ""))
