"""Compare reward gradients here and in trl 0.23.1's AlignPropTrainer: `python benchmarks/draft_vs_alignprop.py`.

Both train all weights of the toy model on `timed_reward`: 64 images in each step in one batch, 8 DDIM steps with eta 0,
guidance 2, float32, the gradient through the last K steps. First images, rewards and gradients of the same noise are
compared; then speed and memory are measured alternately, in a process each (Linux).

With random K, `--method alignprop` draws K for each image, and trl draws for each denoising step of the batch whether
it has a gradient; on average 4.5 of 8 steps have one in both. trl checkpoints every call of the U-Net and has no option
for that; it is also measured with this disabled. Prints Markdown: medians, with the lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from trl_environment import GUIDANCE, environment_for_trl, model_for_trl, run, say

from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.gradient import score_with_gradient
from rlhf_t2i.rewards.load import load_rewards
from rlhf_t2i.sampling.backprop import GradientWindow, sample_with_gradient
from rlhf_t2i.shapes.names import TOY_MODEL
from rlhf_t2i.shapes.scenes import all_prompts
from rlhf_t2i.types import Sampler

STEPS = 8
"""Training steps of one measurement; the last six count, from call to call of the reward."""
ALIKE = ["--guidance_scale", str(GUIDANCE), "--ema_decay", "0"]
METHODS = {
    "K = 1": (1, ["--method", "draft", "--backprop_steps", "1", *ALIKE]),
    "K = 8, all": (8, ["--method", "draft", "--backprop_steps", "8", *ALIKE]),
    "random K": (0, ["--method", "alignprop", *ALIKE]),
}
"""trl's number of steps with gradient, 0 for random ones, and options of recipes/draft.py."""
TRL, HERE, DEFAULT = "trl", "here", "here by default: ReFL, no guidance"
VARIANTS = {
    "here, checkpoint_denoising_steps": ["--checkpoint_denoising_steps", "true"],
    "here, microbatch_size 16": ["--microbatch_size", "16"],
    "here, microbatch_size 8": ["--microbatch_size", "8"],
}
"""Options that save memory here and do not change the gradient."""
Measured = dict[str, float]


def agreement(python: Path, model: Path, folder: Path) -> None:
    """Print the largest differences of pixels, rewards and gradient for eight images from the same noise.

    At pixels outside [0, 1] the gradient would differ, because trl clamps them. These images have none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    policy = load_policy(TOY_MODEL, device=torch.device("cpu"))
    policy.set_trainable(None, keep_reference=False, seed=0)
    sampler, prompts = Sampler(policy.schedule(8), partial(ddim, eta=0.0), GUIDANCE), all_prompts("training")[:8]
    reward = load_rewards("timed_reward:reward")
    noise = policy.initial_noise([torch.Generator().manual_seed(i) for i in range(8)], copies=1)
    torch.save({"noise": noise, "prompts": prompts}, folder / "given.pt")
    for depth in (1, 4, 8):
        command = [str(python), "benchmarks/trl_side.py", "gradient", "--model", str(model), "--folder", str(folder)]
        run([*command, "--backprop_steps", str(depth)], 1)
        theirs = torch.load(folder / f"gradient-{depth}.pt", weights_only=True)
        generators = [torch.Generator().manual_seed(i) for i in range(8)]
        window = GradientWindow(torch.full((8,), 8 - depth))
        images = sample_with_gradient(policy, prompts, sampler=sampler, window=window, generators=generators).images
        rewards = score_with_gradient(reward, images, prompts).rewards
        gradient = torch.autograd.grad(-rewards.mean(), list(policy.trainable.values()))
        gradient = torch.cat([g.flatten() for g in gradient])
        other = torch.cat([theirs["gradients"][name].flatten() for name in policy.trainable])
        say(
            f"K = {depth}: largest difference of pixels {(images.clamp(0, 1) - theirs['images']).abs().max():.1e}, of "
            f"rewards {(rewards - theirs['rewards']).abs().max():.1e} (they are {rewards.min():.2f} to "
            f"{rewards.max():.2f}); relative difference of the gradient "
            f"{(gradient - other).norm() / gradient.norm():.1e}"
        )


def measure(command: list[str], times: Path, threads: int) -> Measured:
    """Return images per second, per CPU second, and peak memory of a training; a finished one is not repeated."""
    if not times.is_file():
        with TemporaryDirectory() as folder:
            run([*command, f"{folder}/run"], threads, TIMES=f"{folder}/times")
            shutil.copy(f"{folder}/times", times)
    rows = [json.loads(line) for line in times.read_text().splitlines()]
    calls = len(rows) // STEPS
    first, last = rows[calls], rows[-calls]
    count = sum(row["images"] for row in rows[calls:-calls])
    return {
        "rate": count / (last["wall"] - first["wall"]), "cpu": count / (last["cpu"] - first["cpu"]),
        "peak": rows[-1]["megabytes"],
    }  # fmt: skip


def commands(python: Path, model: Path, threads: int, images: int) -> dict[tuple[str, str], list[str]]:
    """Return the commands of one repetition, without their folder, by method and side; `images` are those of a step."""
    there = [str(python), "benchmarks/trl_side.py", "alignprop", "--model", str(model), "--threads", str(threads)]
    there += ["--max_epochs", str(STEPS), "--batch_size", str(images)]
    here = [sys.executable, "recipes/draft.py", "--rewards", "timed_reward:reward", "--num_cpu_threads", str(threads)]
    here += ["--evaluation_rewards", "oracle", "--num_evaluation_images", "2", "--evaluate_every", "0"]
    here += ["--checkpoint_every", "0", "--num_steps", str(STEPS), "--prompts_per_step", str(images)]
    found: dict[tuple[str, str], list[str]] = {}
    for method, (depth, options) in METHODS.items():
        trl = [*there, "--backprop_steps", str(depth)]
        found[method, TRL] = [*trl, "--folder"]
        found[method, HERE] = [*here, *options, "--run_folder"]
        found[method, "trl without checkpointing"] = [*trl, "--no_checkpointing", "--folder"]
        for variant, more in VARIANTS.items():
            found[method, variant] = [*here, *options, *more, "--run_folder"]
    found["", DEFAULT] = [*here, "--run_folder"]
    return found


def cell(values: list[float], digits: int) -> str:
    """Format median, lowest and highest."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Compare gradients, then speed and memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/draft-vs-alignprop"))
    parser.add_argument("--environment", type=Path, default=Path("runs/trl-0.23.1"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="Repetitions of the measurement; default 3.")
    arguments = parser.parse_args()
    folder, python = arguments.output_folder.absolute(), environment_for_trl(arguments.environment.absolute())
    model = model_for_trl(folder / "model")
    agreement(python, model, folder / "agreement")

    empty = {
        side: measure(command, folder / f"empty-{side}.jsonl", arguments.threads)["peak"]
        for (method, side), command in commands(python, model, arguments.threads, 2).items()
        if method == "K = 1" and side in (TRL, HERE)
    }
    say(f"peak memory with 2 images a step instead of 64: trl {empty[TRL]:.0f} MB, here {empty[HERE]:.0f} MB")
    found: dict[tuple[str, str], list[Measured]] = {}
    for repetition in range(arguments.rounds):
        for number, (key, command) in enumerate(commands(python, model, arguments.threads, 64).items()):
            one = measure(command, folder / f"{repetition}-{number:02d}.jsonl", arguments.threads)
            found.setdefault(key, []).append(one)
            say(f"repetition {repetition}, {' '.join(key)}: {one['rate']:.1f} images/s, {one['peak']:.0f} MB")
    say("| gradient | | images/s | per CPU second | peak MB | images/s, ratio to trl | per CPU second | memory |")
    say("|---|---|---|---|---|---|---|---|")
    for (method, side), results in found.items():
        base = found[method or "K = 1", TRL]
        ratios = [
            [here[key] / there[key] for here, there in zip(results, base, strict=True)]
            for key in ("rate", "cpu", "peak")
        ]
        cells = [cell([m["rate"] for m in results], 1), cell([m["cpu"] for m in results], 1)]
        cells += [cell([m["peak"] for m in results], 0), *(cell(r, 2) for r in ratios)]
        say(f"| {method} | {side} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
