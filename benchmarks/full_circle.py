"""The whole loop on the built-in world, by the recipes' own commands: `python benchmarks/full_circle.py`.

    paint     pairs of images of one prompt, by the model before any tuning
    ask       recipes/collect_preferences.py; who answers sees only what a browser shows, and goes by the oracle
    judge     recipes/train_reward_model.py on these answers and nothing else
    tune      recipes/ddpo.py with this judge; the oracle watches
    publish   recipes/publish.py, judge and painter
    use       a process that knows only the two published folders paints and scores

Prints how long each part took, and the last table; exits with 1 if something did not work.
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

from rlhf_t2i.shapes import oracle
from rlhf_t2i.shapes.generated import generate_images
from rlhf_t2i.shapes.scenes import all_prompts

ROOT = Path(__file__).parent.parent
CLEARLY = 0.05
"""Less of a difference in the oracle's score is a tie."""
say = partial(print, flush=True)

USE = """
import sys
import torch
from diffusers import DiffusionPipeline
from reward_model import LlavaReward
from rlhf_t2i.shapes import oracle
from rlhf_t2i.shapes.scenes import all_prompts

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], dtype=torch.float32)
judge = LlavaReward.from_pretrained(sys.argv[2])
pipe.set_progress_bar_config(disable=True)
prompts = all_prompts("held-out")
images = pipe(prompts, num_inference_steps=8, guidance_scale=1.0, output_type="pt",
              generator=torch.Generator().manual_seed(0)).images
passed = oracle.oracle_scores(images, prompts).passed.float().mean().item()
score = judge.score(images, prompts).mean().item()
print(f"{len(prompts)} held-out prompts: {passed:.2f} pass the oracle, mean score {score:.3f}")
"""


def recipe(name: str, *arguments: object, launch: bool = True) -> None:
    """To its end."""
    start = [sys.executable, "-m", "accelerate.commands.launch"] if launch else [sys.executable]
    command = [*start, f"recipes/{name}.py", *map(str, arguments)]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-3000:]}")


def sample_pairs(folder: Path, *, count: int, seed: int) -> Path:
    """Two images of each of so many prompts, in the format of a pair that nobody has judged."""
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
    """The server of the page; its address."""
    command = [sys.executable, "recipes/collect_preferences.py", "--port", "0", *map(str, arguments)]
    server = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        said: list[str] = []
        for line in server.stdout:
            said.append(line)
            if line.startswith("page"):
                yield line.split()[1]
                return
        raise SystemExit("The page was not served:\n" + "".join(said))
    finally:
        server.terminate()
        server.wait()


def answer_all(address: str) -> dict[str, int]:
    """What a browser does, with the oracle in the chair: look at both images, press a key, until no pair is left."""
    pressed: dict[str, int] = {}
    patient = httpx.HTTPTransport(retries=8)  # the address is printed before the server listens
    with httpx.Client(base_url=address, transport=patient, timeout=30) as client:
        pair = client.post("/enter", json={"annotator": "oracle"}).raise_for_status().json()
        while pair["prompt"] is not None:
            seen = [
                np.array(Image.open(io.BytesIO(client.get(f"/image/{pair[side]}").content)))
                for side in ("left", "right")
            ]
            pixels = torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).float() / 255
            left, right = oracle.oracle_scores(pixels, [pair["prompt"]] * 2).graded.tolist()
            key = "left" if left > right else "right"
            if abs(left - right) < CLEARLY:
                key = "tie" if max(left, right) > 0.5 else "bad"
            pressed[key] = pressed.get(key, 0) + 1
            body = {"annotator": "oracle", "shown": pair["shown"], "answer": key}
            pair = client.post("/answer", json=body).raise_for_status().json()
    return pressed


def main() -> None:
    """Once round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/full-circle"), help="new")
    parser.add_argument("--pairs", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=20, help="of DDPO")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, seed = arguments.folder.absolute(), arguments.seed
    begun = last = time.monotonic()

    def done(part: str) -> None:
        nonlocal last
        now = time.monotonic()
        say(f"{part:<10}{now - last:6.0f} s")
        last = now

    pairs = sample_pairs(folder / "images", count=arguments.pairs, seed=seed)
    done("painted")
    with page("--pairs", pairs, "--run_folder", folder / "answers") as address:
        pressed = answer_all(address)
    done("asked")
    say(f"          {', '.join(f'{count} {key}' for key, count in sorted(pressed.items()))}")
    trained = folder / "answers" / "pairs.jsonl"
    recipe("train_reward_model", "--train_data", trained, "--seed", seed, "--run_folder", folder / "reward_model")
    done("llava_reward")
    measured = json.loads((folder / "reward_model" / "metrics.json").read_text())["validation"][0]
    say(f"          {measured['name']} {measured['value']:.3f} on held-out prompts of the answers")
    judge = f"llava_reward:{folder / 'judge' / 'judge'}"
    recipe(
        "ddpo", "--rewards", judge, "--evaluation_rewards", f"oracle,oracle_pass,{judge}",
        "--num_steps", arguments.steps, "--seed", seed, "--run_folder", folder / "painter",
    )  # fmt: skip
    done("tuned")
    rows = [json.loads(line) for line in (folder / "painter" / "metrics.jsonl").read_text().splitlines()]
    looks = [row["oracle_pass"] for row in rows if row["kind"] == "evaluation"]
    say(f"          oracle_pass {looks[0]:.3f} before, {looks[-1]:.3f} after")
    for name in ("llava_reward", "painter"):
        recipe("publish", "--run", folder / name, "--folder", folder / "published" / name, launch=False)
    done("published")
    published = [str(folder / "published" / name) for name in ("painter", "llava_reward")]
    used = subprocess.run(
        [sys.executable, "-c", USE, *published], cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    if used.returncode:
        raise SystemExit(used.stderr[-3000:])
    done("used")
    say(f"          {used.stdout.strip()}")
    say(f"{'together':<10}{time.monotonic() - begun:6.0f} s")


if __name__ == "__main__":
    main()
