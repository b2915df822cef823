"""Compare DDPO here and in trl 0.23.1, the last with a DDPOTrainer: `python benchmarks/ddpo_vs_trl.py`.

Both train the toy model on the oracle: 192 images in each step in batches of at most 64, 8 DDIM steps with eta 1,
guidance 2, two optimiser steps. Three comparisons: log-probabilities and gradient of one trajectory; speed, measured
alternately; seconds of training until the pass rate on held-out prompts has risen by ten points, with the best of three
learning rates. trl runs in an environment of its own, with the packages it needs.
"""

# diffusers has no usable types.
# pyright: reportPrivateImportUsage=false, reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from trl_environment import GUIDANCE, environment_for_trl, model_for_trl, run, say

from rlhf_t2i.diffusion.gaussian import mean_log_prob
from rlhf_t2i.diffusion.transitions import ddim
from rlhf_t2i.losses import clipped_surrogate_loss
from rlhf_t2i.models.load import load_policy
from rlhf_t2i.rewards.load import load_reward
from rlhf_t2i.sampling.rollout import rollout, transition_at
from rlhf_t2i.shapes.names import TOY_MODEL
from rlhf_t2i.shapes.scenes import all_prompts
from rlhf_t2i.training.evaluation import evaluate, evaluation_set
from rlhf_t2i.types import Sampler

LEARNING_RATES = (1e-4, 3e-4, 1e-3)


def agreement(python: Path, model: Path, folder: Path) -> None:
    """Print the largest differences of log-probabilities and gradients of one trajectory of eight images."""
    folder.mkdir(parents=True, exist_ok=True)
    policy = load_policy(TOY_MODEL, device=torch.device("cpu"))
    policy.set_trainable(None, keep_reference=False, seed=0)
    sampler = Sampler(policy.schedule(8), partial(ddim, eta=1.0), GUIDANCE)
    prompts = all_prompts("training")[:8]
    generators = [torch.Generator().manual_seed(i) for i in range(8)]
    _, trajectory = rollout(policy, prompts, sampler=sampler, generators=generators, microbatch_size=8)
    advantages = torch.linspace(-1, 1, 8)
    given = {
        "latents": trajectory.latents, "log_probs": trajectory.log_probs, "advantages": advantages,
        "conditioning": trajectory.conditioning[:].states,
    }  # fmt: skip
    torch.save(given, folder / "trajectory.pt")
    run([str(python), "benchmarks/trl_side.py", "replay", "--model", str(model), "--folder", str(folder)], 1)
    theirs = torch.load(folder / "replayed.pt", weights_only=True)
    for step in range(8):
        transition = transition_at(
            policy, trajectory.latents[:, step], torch.full((8,), step), trajectory.conditioning[:], sampler=sampler
        )
        log_prob = mean_log_prob(transition, trajectory.latents[:, step + 1])
        (clipped_surrogate_loss(log_prob, trajectory.log_probs[:, step], advantages, clip_range=5e-4) / 8).backward()
    torch.nn.utils.clip_grad_norm_(policy.trainable.values(), 1.0)
    ours = {name: p.grad for name, p in policy.trainable.items() if p.grad is not None}
    difference = (theirs["log_probs"] - trajectory.log_probs).abs().max().item()
    one, other = (torch.cat([g[name].flatten() for name in sorted(ours)]) for g in (ours, theirs["gradients"]))
    gradient = ((one - other).norm() / one.norm()).item()
    say(
        f"largest difference of log-probabilities {difference:.1e}; relative difference of the clipped first gradient "
        f"{gradient:.1e}"
    )


def trl_training(
    python: Path, model: Path, folder: Path, *, learning_rate: float, epochs: int, seconds: float, threads: int
) -> None:
    """Train with trl; a finished training is not repeated."""
    if (folder / "seconds.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(python), "benchmarks/trl_side.py", "train", "--model", str(model), "--folder", str(folder)]
    command += ["--learning_rate", str(learning_rate), "--max_epochs", str(epochs), "--max_seconds", str(seconds)]
    run([*command, "--threads", str(threads)], threads, TIMES=str(times_of(folder)))


def own_training(folder: Path, *options: str, epochs: int, evaluate_every: int, threads: int) -> None:
    """Train with recipes/ddpo.py; a finished training is not repeated."""
    if (folder / "unet").is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    fixed = [
        "--rewards",
        "timed_reward:graded_oracle",
        "--evaluation_rewards",
        "oracle_pass",
        "--num_cpu_threads",
        str(threads),
    ]
    fixed += ["--num_steps", str(epochs), "--evaluate_every", str(evaluate_every), "--checkpoint_every", "0"]
    fixed += ["--guidance_scale", str(GUIDANCE)]
    evaluation = [] if evaluate_every else ["--num_evaluation_images", "2"]
    run(
        [sys.executable, "recipes/ddpo.py", *fixed, *evaluation, "--run_folder", str(folder), *options],
        threads,
        TIMES=str(times_of(folder)),
    )


def times_of(folder: Path) -> Path:
    """Return the file of the times of a training's calls of the reward."""
    return folder.with_suffix(".times.jsonl")


def images_per_cpu_second(folder: Path) -> float:
    """Return the images sampled, scored and trained on in a processor second, without the first step."""
    rows = [json.loads(line) for line in times_of(folder).read_text().splitlines()]
    rows = [row for row in rows if row["images"] >= 64]
    rows = rows[192 // rows[0]["images"] :]
    return sum(row["images"] for row in rows[:-1]) / (rows[-1]["cpu"] - rows[0]["cpu"])


def own_seconds(folder: Path) -> list[float]:
    """Return the seconds of rollout, reward and update of each step."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [sum(v for k, v in row.items() if k.startswith("seconds/")) for row in rows if row["kind"] == "train"]


def own_curve(folder: Path) -> list[tuple[float, float]]:
    """Return (seconds of training, pass rate) of each evaluation."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = own_seconds(folder)
    return [(sum(seconds[: row["step"]]), row["oracle_pass"]) for row in rows if row["kind"] == "evaluation"]


def trl_curve(folder: Path, base: float) -> list[tuple[float, float]]:
    """Return (seconds of training, pass rate) of trl's snapshots, evaluated here."""
    seconds = json.loads((folder / "seconds.json").read_text())
    curve = [(0.0, base)]
    for snapshot in sorted(folder.glob("step_*")):
        policy = load_policy(TOY_MODEL, device=torch.device("cpu"), weights=snapshot)
        prompts, seeds = evaluation_set(all_prompts("held-out"), num_images=408, seed=1_000_000)
        evaluation = evaluate(
            policy, prompts, seeds, [load_reward("oracle_pass")],
            sampler=Sampler(policy.schedule(8), partial(ddim, eta=0.0), GUIDANCE), microbatch_size=64,
        )  # fmt: skip
        curve.append((sum(seconds[: int(snapshot.name[5:])]), evaluation.scores["oracle_pass"].mean().item()))
    return curve


def time_until(curve: list[tuple[float, float]], rise: float) -> float:
    """Return the seconds until the pass rate has risen by `rise`, interpolated between evaluations; inf if never."""
    goal = curve[0][1] + rise
    for (start, low), (end, high) in pairwise(curve):
        if high >= goal:
            return start + (end - start) * (goal - low) / (high - low)
    return float("inf")


def compare_speed(python: Path, model: Path, folder: Path, *, rounds: int, threads: int) -> None:
    """Train in turn, and print the images in a processor second, which other work on the machine hardly changes."""
    options = {
        "same work": ("--window_end", "1"), "one forward pass": ("--window_end", "1", "--microbatch_size", "192"),
        "channels_last": ("--window_end", "1", "--channels_last", "true"), "default": (),
    }  # fmt: skip
    for repetition in range(rounds):
        rates = dict[str, float]()
        theirs = folder / f"speed-trl-{repetition}"
        trl_training(python, model, theirs, learning_rate=3e-4, epochs=5, seconds=1e9, threads=threads)
        rates["trl"] = images_per_cpu_second(theirs)
        for name, given in options.items():
            own = folder / f"speed-{name.replace(' ', '-')}-{repetition}"
            own_training(own, *given, epochs=5, evaluate_every=0, threads=threads)
            rates[name] = images_per_cpu_second(own)
        found = ", ".join(f"{name} {rate:.1f} ({rate / rates['trl']:.2f})" for name, rate in rates.items())
        say(f"repetition {repetition}, images in a processor second (over trl's): {found}")


def main() -> None:
    """Compare gradients, speed and time to equal quality."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/ddpo-vs-trl"))
    parser.add_argument("--environment", type=Path, default=Path("runs/trl-0.23.1"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only_speed", action="store_true", help="Leave out the time to equal quality.")
    parser.add_argument("--rounds", type=int, default=3, help="Repetitions of the speed measurement; default 3.")
    parser.add_argument(
        "--max_seconds", type=float, default=240, help="Seconds of training with each learning rate; default 240."
    )
    arguments = parser.parse_args()
    python, folder, threads = (
        environment_for_trl(arguments.environment.absolute()),
        arguments.output_folder.absolute(),
        arguments.threads,
    )
    model = model_for_trl(folder / "model")
    agreement(python, model, folder / "agreement")

    compare_speed(python, model, folder, rounds=arguments.rounds, threads=threads)
    if arguments.only_speed:
        return
    best = {"trl": float("inf"), "here": float("inf")}
    for rate in LEARNING_RATES:
        own_training(
            folder / f"here-{rate}", "--learning_rate", str(rate), epochs=10, evaluate_every=2, threads=threads
        )
        curves = {"here": own_curve(folder / f"here-{rate}")}
        theirs = folder / f"trl-{rate}"
        limit = arguments.max_seconds
        trl_training(python, model, theirs, learning_rate=rate, epochs=10**6, seconds=limit, threads=threads)
        curves["trl"] = trl_curve(theirs, curves["here"][0][1])
        for name, curve in curves.items():
            seconds = time_until(curve, 0.1)
            best[name] = min(best[name], seconds)
            say(f"{name}, learning rate {rate:g}: +10 points after {seconds:.0f} s; at the end {curve[-1][1]:.3f}")
    say(f"+10 points: trl {best['trl']:.0f} s, here {best['here']:.0f} s, a ratio of {best['trl'] / best['here']:.2f}")


if __name__ == "__main__":
    main()
