"""Compare all training methods on a toy model in equal time: `python benchmarks/methods.py`.

Every method trains for the same seconds on one thread, with sampling and scoring but without evaluation. The reward
model is the reward; the oracle, which no method is trained on, measures the result. Best-of-N changes no weights: its
rows give the result of each n. Prints Markdown, the mean of the seeds with the lowest and highest; writes curves.json
and curves.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_t2i.shapes.names import TOY_FLOW_MODEL, TOY_MODEL, TOY_REWARD

ROOT = Path(__file__).parent.parent
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "DDPO": ("ddpo", {}),
    "ReFL, steps from 25 %": ("draft", {}),
    "ReFL, as published": ("draft", {"window_start": "0.75"}),
    "DRaFT-1": ("draft", {"method": "draft", "backprop_steps": "1"}),
    "DRaFT-4": ("draft", {"method": "draft", "backprop_steps": "4"}),
    "DRaFT-LV": ("draft", {"method": "draft_lv"}),
    "AlignProp": ("draft", {"method": "alignprop"}),
    "Diffusion-DPO, sampled pairs": ("diffusion_dpo", {}),
    "SFT on winners": ("diffusion_dpo", {"loss": "sft", "timesteps": "0-999", "learning_rate": "5e-5"}),
    "DiffusionNFT": ("diffusion_nft", {"model": TOY_MODEL}),
}
"""Recipe and options of each method for the toy diffusion model. With the options of DPO, SFT collapses."""
FLOW_METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "Flow-GRPO": ("flow_grpo", {}),
    "Flow-GRPO, CPS": ("flow_grpo", {"dynamics": "cps", "noise_scale": "0.8"}),
    "DiffusionNFT": ("diffusion_nft", {}),
    "DDPO": ("ddpo", {"model": TOY_FLOW_MODEL}),
    "Diffusion-DPO, sampled pairs": ("diffusion_dpo", {"model": TOY_FLOW_MODEL}),
    "ReFL, steps from 25 %": ("draft", {"model": TOY_FLOW_MODEL}),
}
"""Recipe and options of each method for the toy flow model."""
NUM_EVALUATIONS = 3
"""Evaluations of each training after the first."""


def methods_of(model: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Return recipe and options of each method for a toy model."""
    return FLOW_METHODS if model == TOY_FLOW_MODEL else METHODS


def train(name: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Train for the given seconds and return the file of the result; a finished training is not repeated."""
    recipe, options = methods_of(arguments.model)[name]
    folder = arguments.output_folder / f"{name.replace(' ', '_').replace(',', '')}-{seed}"
    done = folder.with_suffix(".json")
    if done.is_file():
        return done
    interval = arguments.seconds / NUM_EVALUATIONS
    every = max(1, round(interval / seconds_of_a_step(name, arguments)))
    start = time.monotonic()
    rewards = {"rewards": arguments.reward, "evaluation_rewards": f"oracle,oracle_pass,{arguments.reward}"}
    memory = run(
        recipe, folder, {**options, **rewards, "seed": str(seed), "evaluate_every": str(every), "num_steps": "100000"},
        until=lambda rows: trained(rows) >= arguments.seconds and rows[-1]["kind"] == "evaluation",
    )  # fmt: skip
    result = {"rows": read(folder), "megabytes": memory, "wall": time.monotonic() - start, "every": every}
    done.write_text(json.dumps(result))
    return done


def seconds_of_a_step(name: str, arguments: argparse.Namespace) -> float:
    """Return the seconds of a training step, the third of a short run."""
    recipe, options = methods_of(arguments.model)[name]
    folder = arguments.output_folder / f"pace-{name.replace(' ', '_').replace(',', '')}"
    if len(read(folder)) < 4:
        some = {"num_steps": "3", "num_evaluation_images": "2", "evaluation_rewards": "oracle", "evaluate_every": "0"}
        run(recipe, folder, {**options, **some, "rewards": arguments.reward}, until=lambda rows: False)
    return max(0.05, trained(read(folder)[-2:]))


def run(recipe: str, folder: Path, options: dict[str, str], *, until: Any) -> float:
    """Run a recipe in a process and return its peak MB; send SIGTERM once `until` is true of its rows."""
    command = [sys.executable, str(ROOT / "recipes" / f"{recipe}.py"), "--run_folder", str(folder)]
    fixed = {"num_cpu_threads": "1", "checkpoint_every": "0"}
    command += [part for key, value in {**fixed, **options}.items() for part in (f"--{key}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            if (rows := read(folder)) and until(rows):
                process.send_signal(signal.SIGTERM)
                until = lambda rows: False  # noqa: E731
            time.sleep(0.5)
    if status:
        raise SystemExit(f"{' '.join(command)} failed; see {folder.with_suffix('.log')}.")
    return usage.ru_maxrss / 1024


def read(folder: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a run's metrics."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def trained(rows: Sequence[dict[str, Any]]) -> float:
    """Return the seconds of training in these rows."""
    return sum(v for row in rows if row["kind"] == "train" for k, v in row.items() if k.startswith("seconds/"))


def curve(rows: Sequence[dict[str, Any]], reward: str) -> list[dict[str, float]]:
    """Return each evaluation with the seconds of training before it, and the reward gap as in the report."""
    indices = [i for i, row in enumerate(rows) if row["kind"] == "evaluation"]
    first = rows[indices[0]]
    reward_std = {name: first[f"{name}/standard_error"] * first["num_images"] ** 0.5 for name in (reward, "oracle")}
    points: list[dict[str, float]] = []
    for i in indices:
        gained = {name: (rows[i][name] - first[name]) / reward_std[name] for name in reward_std}
        points.append({
            "seconds": trained(rows[:i]), "pass": 100 * rows[i]["oracle_pass"], "reward": rows[i][reward],
            "gap": gained[reward] - gained["oracle"], "diversity": rows[i]["diversity"],
        })  # fmt: skip
    return points


def at(points: Sequence[dict[str, float]], seconds: float) -> dict[str, float]:
    """Return a curve's values after some seconds, interpolated between evaluations."""
    times = [p["seconds"] for p in points]
    return {name: float(np.interp(seconds, times, [p[name] for p in points])) for name in points[0]}


def cell(values: Sequence[float], digits: int) -> str:
    """Format mean, lowest and highest."""
    return f"{np.mean(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def best_of_n(seed: int, arguments: argparse.Namespace) -> list[list[float]]:
    """Return [n, pass rate, reward] of best-of-n on the model before training, for n = 1, 2, 4, 8, 16."""
    import torch

    from rlhf_t2i.search.api import best_of_n as search
    from rlhf_t2i.search.candidates import expected_best
    from rlhf_t2i.shapes import oracle
    from rlhf_t2i.shapes.scenes import all_prompts

    torch.set_num_threads(1)
    prompts = all_prompts("held-out") * arguments.searches
    from rlhf_t2i.models.load import load_policy

    model = load_policy(arguments.model, device=torch.device("cpu"))
    found = search(
        model, prompts, arguments.reward, num_candidates=16, num_denoising_steps=8, guidance_scale=1.0,
        microbatch_size=64, seed=10_000_000 * (seed + 1),
    )  # fmt: skip
    scores = found.scores.reward
    passed = oracle.oracle_scores(found.images.flatten(0, 1), [p for p in prompts for _ in range(16)]).passed
    values = passed.float().view(scores.shape)
    pass_rate, reward = expected_best(scores, values).mean(0), expected_best(scores).mean(0)
    return [[n, 100 * pass_rate[n - 1].item(), reward[n - 1].item()] for n in (1, 2, 4, 8, 16)]


def draw(curves: dict[str, list[list[dict[str, float]]]], path: Path, *, seconds: float) -> None:
    """Draw the pass rate against seconds of training, as the mean of the seeds of each method."""
    colours = (
        "#1b6ca8",
        "#d1495b",
        "#edae49",
        "#66a182",
        "#8d5a97",
        "#00798c",
        "#9a6324",
        "#444444",
        "#b59fd6",
        "#e377c2",
    )
    width, height, left, top = 760, 360, 50, 20
    lines: list[str] = []
    grid = np.linspace(0, seconds, 41)

    def place(x: float, y: float) -> str:
        return f"{left + (width - 260) * x / seconds:.1f},{top + (height - 60) * (1 - y / 100):.1f}"

    for tick in range(0, 101, 20):
        a, b = place(0, tick), place(seconds, tick)
        (x1, y1), (x2, y2) = a.split(","), b.split(",")
        lines.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 8}" y="{float(y1) + 4}" text-anchor="end">{tick}</text>')
    for tick in np.linspace(0, seconds, 5):
        x, y = place(tick, 0).split(",")
        lines.append(f'<text x="{x}" y="{float(y) + 18}" text-anchor="middle">{tick:.0f}</text>')
    for number, ((name, runs), colour) in enumerate(zip(curves.items(), colours, strict=False)):
        means = [np.mean([at(points, t)["pass"] for points in runs]) for t in grid]
        path_points = " ".join(place(t, float(m)) for t, m in zip(grid, means, strict=True))
        lines.append(f'<polyline points="{path_points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + 14 + 20 * number
        lines.append(f'<rect x="{width - 195}" y="{y - 9}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{width - 177}" y="{y + 2}">{name}</text>')
    lines.append(f'<text x="{left}" y="12">oracle pass rate on held-out prompts, %</text>')
    lines.append(f'<text x="{width - 260}" y="{height - 6}" text-anchor="end">seconds of training on one thread</text>')
    body = "\n".join(lines)
    style = 'font-family="sans-serif" font-size="12"'
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>'
        f'<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def main() -> None:
    """Train with all methods and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output_folder", type=Path, default=Path("runs/methods"))
    parser.add_argument(
        "--seconds", type=float, default=120, help="Seconds of training for each method and seed; default 120."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--searches", type=int, default=4, help="Searches of best-of-N for each held-out prompt; default 4."
    )
    parser.add_argument("--jobs", type=int, default=2, help="Concurrent trainings, with one thread each; default 2.")
    parser.add_argument("--reward", default=TOY_REWARD, help="reward model; default %(default)s")
    parser.add_argument("--model", choices=[TOY_MODEL, TOY_FLOW_MODEL], default=TOY_MODEL)
    parser.add_argument(
        "--methods", nargs="+", choices=[*METHODS, *FLOW_METHODS], help="Methods to compare; default all for the model."
    )
    arguments = parser.parse_args()
    arguments.methods = arguments.methods or list(methods_of(arguments.model))
    arguments.output_folder = arguments.output_folder.absolute()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda name: seconds_of_a_step(name, arguments), arguments.methods))
        started = {
            name: [pool.submit(train, name, seed, arguments) for seed in arguments.seeds] for name in arguments.methods
        }
        results = {name: [json.loads(f.result().read_text()) for f in futures] for name, futures in started.items()}
    curves = {name: [curve(one["rows"], arguments.reward) for one in runs] for name, runs in results.items()}
    (arguments.output_folder / "curves.json").write_text(json.dumps(curves))
    draw(curves, arguments.output_folder / "curves.svg", seconds=arguments.seconds)
    say = sys.stdout.write
    say("| method | pass, % | reward model | gap | diversity | peak MB | images |\n|---|---|---|---|---|---|---|\n")
    start = next(points[0] for runs in curves.values() for points in runs)
    say(f"| before | {start['pass']:.1f} | {start['reward']:.2f} | 0 | {start['diversity']:.3f} | | |\n")
    for name, runs in curves.items():
        ends = [at(points, arguments.seconds) for points in runs]
        sampled = [
            sum(row["images"] for row in one["rows"] if row["kind"] == "train")
            * arguments.seconds / max(trained(one["rows"]), 1e-9)
            for one in results[name]
        ]  # fmt: skip
        say(
            f"| {name} | {cell([e['pass'] for e in ends], 1)} | {cell([e['reward'] for e in ends], 2)} "
            f"| {cell([e['gap'] for e in ends], 2)} | {np.mean([e['diversity'] for e in ends]):.3f} "
            f"| {max(one['megabytes'] for one in results[name]):.0f} | {np.mean(sampled):.0f} |\n"
        )
    say("\n| best-of-n before training | pass, % | reward model | denoiser calls per image |\n|---|---|---|---|\n")
    for rows in zip(*(best_of_n(seed, arguments) for seed in arguments.seeds), strict=True):
        n = int(rows[0][0])
        say(f"| n = {n} | {cell([r[1] for r in rows], 1)} | {cell([r[2] for r in rows], 2)} | {8 * n} |\n")


if __name__ == "__main__":
    main()
