"""Compare Diffusion-DPO with cached latents and as commonly written: `python benchmarks/dpo_vs_on_the_fly.py`.

The common loop reads and encodes the images and prompts of each step again; recipes/diffusion_dpo.py with a
cache_folder does so once. Both train all weights of the toy model in float32 on the same pairs of drawings, 32 in each
step in one batch, with the same noise at the same timesteps and a frozen copy as the reference; so their losses must
agree in each step. Speed and memory are measured alternately, in a process each (Linux). Prints Markdown: medians, with
the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from plain_dpo import train_on_the_fly
from timed_reward import peak_megabytes
from torch import Tensor
from trl_environment import run, say

from rlhf_t2i.data.preferences import pairs_of_step
from rlhf_t2i.seeds import NOISE, generator_for
from rlhf_t2i.shapes.pairs import SHARES, drawn_pairs

PAIRS_PER_STEP, BETA, LEARNING_RATE = 32, 50.0, 1.5e-4
TIMESTEPS = torch.arange(500, 1000)
SIDES = ("on the fly", "here", "here by default: 4 steps on each 32 pairs")
Measurement = dict[str, Any]


def write_pairs(folder: Path, count: int) -> list[dict[str, str]]:
    """Return pairs of drawings, which are written to folder/pairs.jsonl in the first call."""
    path = folder / "pairs.jsonl"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        number = iter(range(10**9))

        def save(image: Tensor) -> str:
            name = f"{next(number):06d}.png"
            pixels = (image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name)
            return name

        rows = (row for row in drawn_pairs(10 * count, "training", SHARES, seed=0, save=save) if "winner" in row)
        lines = [json.dumps(next(rows)) for _ in range(count)]
        path.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in path.read_text().splitlines()]


class Recorder:
    """Records the time at the start of each step, and the peak memory until then."""

    def __init__(self) -> None:
        self.rows: list[Measurement] = []

    def __call__(self) -> None:
        now = {"wall": time.monotonic(), "cpu": time.process_time(), "megabytes": peak_megabytes()}
        self.rows.append(now)


def on_the_fly(rows: Sequence[dict[str, str]], folder: Path, num_steps: int) -> Measurement:
    """Train with the common loop, but with the recipe's pairs, timesteps and noise."""

    def draw(step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        generators = [generator_for(0, NOISE, step, 0, row) for row in range(shape[0])]
        timesteps = torch.cat([TIMESTEPS[torch.randint(len(TIMESTEPS), (1,), generator=g)] for g in generators])
        return timesteps, torch.stack([torch.randn(shape[1:], generator=g) for g in generators])

    indices = [pairs_of_step(len(rows), step, num_pairs=PAIRS_PER_STEP, seed=0) for step in range(num_steps)]
    pairs, record = [[rows[i] for i in own] for own in indices], Recorder()
    losses = train_on_the_fly(pairs, folder, draw=draw, before_step=record, beta=BETA, learning_rate=LEARNING_RATE)
    return {"rows": record.rows, "losses": losses, "steps": 1}


def here(folder: Path, num_steps: int, *, cache: Path, num_inner_epochs: int) -> Measurement:
    """Train as the `main` of recipes/diffusion_dpo.py does, with a recorder; also measure filling the cache."""
    from recipes.diffusion_dpo import Config, load_pairs, update
    from rlhf_t2i.report import write_report
    from rlhf_t2i.training.prompt_sets import load_prompt_sets
    from rlhf_t2i.training.setup import make_trainer

    with TemporaryDirectory() as run_folder:
        config = Config(
            pairs=str(folder / "pairs.jsonl"), cache_folder=str(cache), run_folder=run_folder,
            pairs_per_step=PAIRS_PER_STEP, microbatch_size=2 * PAIRS_PER_STEP, num_inner_epochs=num_inner_epochs,
            beta=BETA, learning_rate=LEARNING_RATE, timesteps=f"{TIMESTEPS[0]}-{TIMESTEPS[-1]}", num_steps=num_steps,
            evaluation_rewards="oracle", num_evaluation_images=2, evaluate_every=0, checkpoint_every=0,
            num_cpu_threads=torch.get_num_threads(),
        )  # fmt: skip
        trainer = make_trainer(
            config, load_prompt_sets(config), recipe="diffusion_dpo", report=write_report, keep_reference=True
        )
        before = time.process_time(), time.monotonic()
        image_pairs = load_pairs(trainer, config)
        filled = {"cpu": time.process_time() - before[0], "wall": time.monotonic() - before[1]}
        record, losses = Recorder(), list[float]()
        for step in trainer.steps():
            record()
            step_indices = pairs_of_step(len(image_pairs), step, num_pairs=PAIRS_PER_STEP, seed=0)
            load = partial(image_pairs.load, step_indices, step=step)
            groups = image_pairs.groups(step_indices)
            metrics = update(trainer, load, groups=groups, step=step, timesteps=TIMESTEPS, config=config)
            trainer.finish_step(step, images=2 * len(step_indices), **metrics)
            losses.append(metrics["loss"])
    return {"rows": record.rows, "losses": losses, "steps": num_inner_epochs, "filled": filled}


def one_side(arguments: argparse.Namespace) -> None:
    """Measure one side in this process, and write the result to a file."""
    torch.set_num_threads(arguments.threads)
    folder, num_steps = arguments.output_folder / "pairs", arguments.steps
    cache = arguments.output_folder / "cache"
    match SIDES.index(arguments.side):
        case 0:
            result = on_the_fly(write_pairs(folder, arguments.pairs), folder, num_steps)
        case 1:
            shutil.rmtree(cache, ignore_errors=True)
            result = here(folder, num_steps, cache=cache, num_inner_epochs=1)
        case _:
            result = here(folder, num_steps, cache=cache, num_inner_epochs=4)
    first, last = result["rows"][1], result["rows"][-1]
    count = result["steps"] * (len(result["rows"]) - 2)
    for clock in ("wall", "cpu"):
        result[clock] = count / (last[clock] - first[clock])
    result["before"], result["peak"] = result["rows"][0]["megabytes"], last["megabytes"]
    arguments.result.write_text(json.dumps(result))


def measure(arguments: argparse.Namespace, side: str, result: Path) -> Measurement:
    """Measure one side in a process of its own."""
    command = [sys.executable, "benchmarks/dpo_vs_on_the_fly.py", "--side", side, "--result", str(result)]
    for name in ("output_folder", "pairs", "steps", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    run(command, arguments.threads)
    return json.loads(result.read_text())


def cell(values: Sequence[float], digits: int) -> str:
    """Format median, lowest and highest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Compare losses, then speed and memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/dpo-vs-on-the-fly"))
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument(
        "--steps",
        type=int,
        default=14,
        help="Steps of one measurement, of which the first and last do not count; default 14.",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="Repetitions of the measurement; default 3.")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output_folder = arguments.output_folder.absolute()
    if arguments.side:
        return one_side(arguments)
    write_pairs(arguments.output_folder / "pairs", arguments.pairs)
    found: dict[str, list[Measurement]] = {side: [] for side in SIDES}
    for repetition in range(arguments.rounds):
        for number, side in enumerate(SIDES):
            one = measure(arguments, side, arguments.output_folder / f"{repetition}-{number}.json")
            found[side].append(one)
            say(f"repetition {repetition}, {side}: {one['wall']:.2f} steps/s, {one['peak']:.0f} MB")
    plain = found[SIDES[0]]
    gaps = [abs(a - b) for a, b in zip(plain[0]["losses"], found[SIDES[1]][0]["losses"], strict=True)]
    say(f"losses of {', '.join(f'{loss:.4f}' for loss in plain[0]['losses'])}")
    say(f"differ by {gaps[0]:.1e} in the first step and by {max(gaps):.1e} at most")
    for clock in ("wall", "cpu"):
        filled = [one["filled"][clock] for one in found[SIDES[1]]]
        saved = [1 / a[clock] - 1 / b[clock] for a, b in zip(plain, found[SIDES[1]], strict=True)]
        break_even = [cost / gain for cost, gain in zip(filled, saved, strict=True)]
        say(
            f"filling the cache, {2 * arguments.pairs} images: {cell(filled, 1)} s ({clock}); which saves time after "
            f"{cell(break_even, 0)} steps, {cell([PAIRS_PER_STEP * n / arguments.pairs for n in break_even], 2)} epochs"
        )
    say("\n| | steps/s | per CPU second | peak MB | of these in training | steps/s, ratios | per CPU second |")
    say("|---|---|---|---|---|---|---|")
    for side, results in found.items():
        ratios = [[a[c] / b[c] for a, b in zip(results, plain, strict=True)] for c in ("wall", "cpu")]
        cells = [cell([one[c] for one in results], 2) for c in ("wall", "cpu")]
        cells += [cell([one["peak"] for one in results], 0), cell([one["peak"] - one["before"] for one in results], 0)]
        say(f"| {side} | {' | '.join([*cells, *(cell(r, 2) for r in ratios)])} |")


if __name__ == "__main__":
    main()
