"""Time the whole workflow on the toy world, from human answers to published models: `python benchmarks/full_circle.py`.

    sample    pairs of images of the same prompt from the base model
    ask       recipes/collect_preferences.py; a script answers like a browser, by the scores of the oracle
    reward    recipes/train_reward_model.py on these answers
    train     recipes/ddpo.py with this reward model; the oracle is evaluated as a held-out reward
    publish   recipes/publish.py for the reward model and the diffusion model
    use       a new process loads both publications, samples and scores

Prints the seconds of each part and its results; exits with 1 if a part fails.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image

from rlhf_t2i.output.run_folder import COLLECTED_PAIRS, REWARD_METRICS, REWARD_MODEL
from rlhf_t2i.shapes import oracle
from rlhf_t2i.shapes.generated import generate_images
from rlhf_t2i.shapes.scenes import all_prompts
from rlhf_t2i.training.metrics import by_step, read_metrics

ROOT = Path(__file__).parent.parent
TIE = 0.05
"""Difference of two oracle scores, in [0, 1], below which the simulated annotator calls them equal."""
log = partial(print, flush=True)

USE = """
import sys
import torch
from diffusers import DiffusionPipeline
from reward_model import LlavaReward
from rlhf_t2i.shapes import oracle
from rlhf_t2i.shapes.scenes import all_prompts

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
reward_model = LlavaReward.from_pretrained(sys.argv[2])
pipe.set_progress_bar_config(disable=True)
prompts = all_prompts("held-out")
images = pipe(prompts, num_inference_steps=8, guidance_scale=1.0, output_type="pt",
              generator=torch.Generator().manual_seed(0)).images
passed = oracle.oracle_scores(images, prompts).passed.float().mean().item()
score = reward_model.score(images, prompts).mean().item()
print(f"{len(prompts)} held-out prompts: {passed:.2f} pass the oracle, mean score {score:.3f}")
"""


def run_recipe(name: str, *arguments: object, launch: bool = True) -> None:
    """Run a recipe, by `accelerate launch` or without; exit with its error output if it fails."""
    start = [sys.executable, "-m", "accelerate.commands.launch"] if launch else [sys.executable]
    command = [*start, f"recipes/{name}.py", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")


def sample_pairs(folder: Path, *, count: int, seed: int) -> Path:
    """Sample two images of each of `count` prompts; returns a file of pairs without a preference."""
    rng = np.random.default_rng(seed)
    prompts = [str(prompt) for prompt in rng.choice(all_prompts("training"), count)]
    sides = [
        generate_images(prompts, seed=seed + 1).images,
        generate_images(prompts[::-1], seed=seed + 2).images.flip(0),
    ]
    folder.mkdir(parents=True)
    lines: list[str] = []
    for number, prompt in enumerate(prompts):
        files = [f"{number}{side}.png" for side in "ab"]
        for file, images in zip(files, sides, strict=True):
            pixels = (images[number].permute(1, 2, 0) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(folder / file)
        lines.append(json.dumps({"prompt": prompt, "tie": files}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pairs.jsonl"


@contextmanager
def page(*arguments: object) -> Iterator[str]:
    """Serve the annotation page; yields its address."""
    command = [sys.executable, "recipes/collect_preferences.py", "--port", "0", *map(str, arguments)]
    server = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        output: list[str] = []
        for line in server.stdout:
            output.append(line)
            if line.startswith("page"):
                yield line.split()[1]
                return
        raise SystemExit("The page was not served:\n" + "".join(output))
    finally:
        server.terminate()
        server.wait()


def answer_all(address: str) -> dict[str, int]:
    """Answer all pairs through the requests of a browser, by oracle score; returns the count of each answer."""
    counts: dict[str, int] = {}
    transport = httpx.HTTPTransport(retries=8)  # the address is printed before the server listens
    with httpx.Client(base_url=address, transport=transport, timeout=30) as client:
        pair = client.post("/enter", json={"annotator": "oracle"}).raise_for_status().json()
        while pair["prompt"] is not None:
            images = [
                np.array(Image.open(io.BytesIO(client.get(f"/image/{pair[side]}").content)))
                for side in ("left", "right")
            ]
            pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
            left, right = oracle.oracle_scores(pixels, [pair["prompt"]] * 2).graded.tolist()
            key = "left" if left > right else "right"
            if abs(left - right) < TIE:
                key = "tie" if max(left, right) > 0.5 else "bad"
            counts[key] = counts.get(key, 0) + 1
            body = {"annotator": "oracle", "shown": pair["shown"], "answer": key}
            pair = client.post("/answer", json=body).raise_for_status().json()
    return counts


class Stopwatch:
    """Prints the seconds of each part."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()

    def done(self, part: str, result: str = "") -> None:
        now = time.monotonic()
        log(f"{part:<10}{now - self.last:6.0f} s  {result}")
        self.last = now

    def total(self) -> None:
        log(f"{'total':<10}{time.monotonic() - self.start:6.0f} s")


def use(*publications: Path, cwd: Path) -> str:
    """Load both publications in a new process; returns its output."""
    result = subprocess.run(
        [sys.executable, "-c", USE, *map(str, publications)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise SystemExit(result.stderr[-3000:])
    return result.stdout.strip()


def main() -> None:
    """Run all parts in a new folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/full_circle"), help="New folder for all results.")
    parser.add_argument("--pairs", type=int, default=3000, help="Number of pairs to answer, from 1 (default 3000).")
    parser.add_argument("--steps", type=int, default=20, help="Training steps of DDPO, from 1 (default 20).")
    parser.add_argument("--seed", type=int, default=0, help="Seed of all parts (default 0).")
    arguments = parser.parse_args()
    folder, seed, stopwatch = arguments.folder.absolute(), arguments.seed, Stopwatch()
    answers, reward_run, policy_run = (folder / name for name in ("answers", "reward_run", "policy_run"))

    pairs = sample_pairs(folder / "images", count=arguments.pairs, seed=seed)
    stopwatch.done("sample")
    with page("--pairs", pairs, "--run_folder", answers) as address:
        counts = answer_all(address)
    stopwatch.done("ask", ", ".join(f"{count} {key}" for key, count in sorted(counts.items())))

    run_recipe(
        "train_reward_model", "--train_data", answers / COLLECTED_PAIRS, "--readout", "last_token", "--seed", seed,
        "--run_folder", reward_run,
    )  # fmt: skip
    metric = json.loads((reward_run / REWARD_METRICS).read_text())["validation"][0]
    stopwatch.done("reward", f"{metric['name']} {metric['value']:.3f} on validation answers")

    reward = f"llava_reward:{reward_run / REWARD_MODEL}"
    run_recipe(
        "ddpo", "--rewards", reward, "--evaluation_rewards", f"oracle,oracle_pass,{reward}",
        "--num_steps", arguments.steps, "--seed", seed, "--run_folder", policy_run,
    )  # fmt: skip
    passed = [row["oracle_pass"] for row in by_step(read_metrics(policy_run), "evaluation")]
    stopwatch.done("train", f"oracle_pass {passed[0]:.3f} before, {passed[-1]:.3f} after")

    for run in (reward_run, policy_run):
        run_recipe("publish", "--run", run, "--folder", folder / "published" / run.name, launch=False)
    stopwatch.done("publish")
    published = folder / "published"
    stopwatch.done("use", use(published / policy_run.name, published / reward_run.name, cwd=folder))
    stopwatch.total()


if __name__ == "__main__":
    main()
