"""Diffusion-DPO with cached latents, and as it is commonly written: `python benchmarks/dpo_vs_on_the_fly.py`.

The common loop opens and encodes the images and prompts of each step anew; recipes/diffusion_dpo.py with a
cache_folder does so once. Both train all weights of the built-in model in float32 on the same pairs of drawings, 32 a
step in one batch, with the same noise at the same levels, the frozen copy that is the reference asked by itself; so
their losses must agree in each step. Speed and memory are taken in turns, each in a process of its own (Linux). Prints
Markdown: medians, with the lowest and highest.
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
TIMES = torch.arange(500, 1000)
SIDES = ("on the fly", "here", "here by default: 4 steps on each 32 pairs")
RewardModelConfig = dict[str, Any]


def write_pairs(folder: Path, count: int) -> list[dict[str, str]]:
    """Pairs of drawings in folder/pairs.jsonl; left alone if they are there."""
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


class Watch:
    """Notes when each step began, and how much memory was needed until then."""

    def __init__(self) -> None:
        self.rows: list[RewardModelConfig] = []

    def __call__(self) -> None:
        now = {"wall": time.monotonic(), "cpu": time.process_time(), "megabytes": peak_megabytes()}
        self.rows.append(now)


def on_the_fly(rows: Sequence[dict[str, str]], folder: Path, num_steps: int) -> RewardModelConfig:
    """The common loop, with the recipe's pairs and draws; by itself it would call randint and randn."""

    def draw(step: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        generators = [generator_for(0, NOISE, step, 0, row) for row in range(shape[0])]
        times = torch.cat([TIMES[torch.randint(len(TIMES), (1,), generator=g)] for g in generators])
        return times, torch.stack([torch.randn(shape[1:], generator=g) for g in generators])

    numbers = [pairs_of_step(len(rows), step, num_pairs=PAIRS_PER_STEP, seed=0) for step in range(num_steps)]
    pairs, watch = [[rows[n] for n in those] for those in numbers], Watch()
    losses = train_on_the_fly(pairs, folder, draw=draw, before_step=watch, beta=BETA, learning_rate=LEARNING_RATE)
    return {"rows": watch.rows, "losses": losses, "steps": 1}


def here(folder: Path, num_steps: int, *, cache: Path, num_inner_epochs: int) -> RewardModelConfig:
    """The `main` of recipes/diffusion_dpo.py, with a watch. What it cost to fill the cache is part of it."""
    from recipes.diffusion_dpo import Config, load_pairs, update
    from rlhf_t2i.report import write_report
    from rlhf_t2i.training.setup import make_trainer

    with TemporaryDirectory() as run_folder:
        config = Config(
            pairs=str(folder / "pairs.jsonl"), cache_folder=str(cache), run_folder=run_folder,
            pairs_per_step=PAIRS_PER_STEP, microbatch_size=2 * PAIRS_PER_STEP, num_inner_epochs=num_inner_epochs,
            beta=BETA, learning_rate=LEARNING_RATE, timesteps=f"{TIMES[0]}-{TIMES[-1]}", num_steps=num_steps,
            evaluation_rewards="oracle", num_evaluation_images=2, evaluate_every=0, checkpoint_every=0,
            num_cpu_threads=torch.get_num_threads(),
        )  # fmt: skip
        trainer = make_trainer(config, recipe="diffusion_dpo", report=write_report, keep_reference=True)
        before = time.process_time(), time.monotonic()
        files = load_pairs(trainer, config)
        filled = {"cpu": time.process_time() - before[0], "wall": time.monotonic() - before[1]}
        watch, losses = Watch(), list[float]()
        for step in trainer.steps():
            watch()
            numbers = pairs_of_step(len(files), step, num_pairs=PAIRS_PER_STEP, seed=0)
            load = partial(files.load, numbers)
            metrics = update(trainer, load, count=len(numbers), step=step, timesteps=TIMES, config=config)
            trainer.finish_step(step, images=2 * len(numbers), **metrics)
            losses.append(metrics["loss"])
    return {"rows": watch.rows, "losses": losses, "steps": num_inner_epochs, "filled": filled}


def one_side(arguments: argparse.Namespace) -> None:
    """What a process of its own does: train, and write down what was seen."""
    torch.set_num_threads(arguments.threads)
    folder, num_steps = arguments.output_folder / "pairs", arguments.steps
    cache = arguments.output_folder / "cache"
    match SIDES.index(arguments.side):
        case 0:
            facts = on_the_fly(write_pairs(folder, arguments.pairs), folder, num_steps)
        case 1:
            shutil.rmtree(cache, ignore_errors=True)
            facts = here(folder, num_steps, cache=cache, num_inner_epochs=1)
        case _:
            facts = here(folder, num_steps, cache=cache, num_inner_epochs=4)
    first, last = facts["rows"][1], facts["rows"][-1]
    count = facts["steps"] * (len(facts["rows"]) - 2)
    for clock in ("wall", "cpu"):
        facts[clock] = count / (last[clock] - first[clock])
    facts["before"], facts["peak"] = facts["rows"][0]["megabytes"], last["megabytes"]
    arguments.facts.write_text(json.dumps(facts))


def measure(arguments: argparse.Namespace, side: str, facts: Path) -> RewardModelConfig:
    """One side in a process of its own."""
    command = [sys.executable, "benchmarks/dpo_vs_on_the_fly.py", "--side", side, "--facts", str(facts)]
    for name in ("output_folder", "pairs", "steps", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    run(command, arguments.threads)
    return json.loads(facts.read_text())


def cell(values: Sequence[float], digits: int) -> str:
    """Median, lowest and highest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Agreement of the losses, then a table of speed and memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/dpo-vs-on-the-fly"))
    parser.add_argument("--pairs", type=int, default=512)
    parser.add_argument("--steps", type=int, default=14, help="of one measurement; the first and last do not count")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="turns of the measurement")
    parser.add_argument("--side", choices=SIDES, help="what a process of its own measures")
    parser.add_argument("--facts", type=Path, help="... and where it writes that")
    arguments = parser.parse_args()
    arguments.output_folder = arguments.output_folder.absolute()
    if arguments.side:
        return one_side(arguments)
    write_pairs(arguments.output_folder / "pairs", arguments.pairs)
    found: dict[str, list[RewardModelConfig]] = {side: [] for side in SIDES}
    for turn in range(arguments.rounds):
        for number, side in enumerate(SIDES):
            seen = measure(arguments, side, arguments.output_folder / f"{turn}-{number}.json")
            found[side].append(seen)
            say(f"turn {turn}, {side}: {seen['wall']:.2f} steps/s, {seen['peak']:.0f} MB")
    plain = found[SIDES[0]]
    gaps = [abs(a - b) for a, b in zip(plain[0]["losses"], found[SIDES[1]][0]["losses"], strict=True)]
    say(f"losses of {', '.join(f'{loss:.4f}' for loss in plain[0]['losses'])}")
    say(f"differ by {gaps[0]:.1e} in the first step and by {max(gaps):.1e} at most")
    for clock in ("wall", "cpu"):
        filled = [facts["filled"][clock] for facts in found[SIDES[1]]]
        saved = [1 / a[clock] - 1 / b[clock] for a, b in zip(plain, found[SIDES[1]], strict=True)]
        paid = [cost / gain for cost, gain in zip(filled, saved, strict=True)]
        say(
            f"filling the cache, {2 * arguments.pairs} images: {cell(filled, 1)} s ({clock}); paid for after "
            f"{cell(paid, 0)} steps, {cell([PAIRS_PER_STEP * p / arguments.pairs for p in paid], 2)} times all pairs"
        )
    say("\n| | steps/s | a CPU second | peak MB | of these in training | steps/s, ratio turn by turn | a CPU second |")
    say("|---|---|---|---|---|---|---|")
    for side, those in found.items():
        ratios = [[a[c] / b[c] for a, b in zip(those, plain, strict=True)] for c in ("wall", "cpu")]
        cells = [cell([facts[c] for facts in those], 2) for c in ("wall", "cpu")]
        cells += [cell([facts["peak"] for facts in those], 0), cell([f["peak"] - f["before"] for f in those], 0)]
        say(f"| {side} | {' | '.join([*cells, *(cell(r, 2) for r in ratios)])} |")


if __name__ == "__main__":
    main()
