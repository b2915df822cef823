"""Teach the toy world's model by 200 votes of the oracle while it trains: `python benchmarks/live_votes.py`.

Starts recipes/live_preferences.py and votes on its page, as fast as a quick person, until the votes are spent; then
training goes on without votes to its last step. The reward model's head and SkipCA start untrained; its backbone was
trained to caption images and to say whether a text is true of an image, never on preferences. `--voter browser` votes
in headless Chromium, by keys; `--voter http` sends the same requests as the page does, which costs the machine less.
`--method offline` first asks for all votes about images of the untouched model, chosen at random, and then trains
without any further ones: DDPO with a reward model of 200 random pairs.

Prints Markdown: the oracle's pass rate on held-out prompts before and after, minutes of wall time and of processor
time, and the votes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from PIL import Image

from rlhf_t2i.shapes.oracle import oracle_scores

EQUAL = 0.02
"""Difference of the oracle's grades up to which two images are equally good to the voter."""
METHODS = {
    "disagreement": ["--acquisition", "disagreement"],
    "entropy": ["--acquisition", "entropy"],
    "random": ["--acquisition", "random"],
    "offline": ["--acquisition", "random", "--first_votes", "VOTES"],
}


def show(line: str) -> None:
    """Print a line at once, also into a file."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def vote_on(images: list[bytes], prompt: str) -> str:
    """Return the oracle's vote on one, two or four images."""
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]
    tensors = torch.stack([torch.from_numpy(one.copy()).permute(2, 0, 1).float() / 255 for one in pixels])
    scores = oracle_scores(tensors, [prompt] * len(images))
    if len(images) == 1:
        return "good" if bool(scores.passed[0]) else "bad"
    best, second = scores.graded.sort(descending=True).values[:2].tolist()
    if best - second <= EQUAL and len(images) == 2:
        return "tie"
    return str(int(scores.graded.argmax()) + 1)


def vote_by_requests(address: str, count: int, pause: float, is_running: Callable[[], bool]) -> None:
    """Send votes as the page does; a vote that comes too late is not sent again."""
    with httpx.Client(base_url=address, trust_env=False, timeout=60) as client:
        state = client.post("/enter", json={"annotator": "oracle"}).json()
        while is_running() and state["votes"] < count:
            question, began = state["question"], time.monotonic()
            if question is None:
                if state["training"]["has_ended"]:
                    return
                time.sleep(0.2)
                state = client.get("/state", params={"annotator": "oracle"}).json()
                continue
            images = [client.get(f"/image/{name}").content for name in question["images"]]
            vote = vote_on(images, question["prompt"])
            time.sleep(max(0.0, pause - (time.monotonic() - began)))
            try:
                reply = client.post("/vote", json={"annotator": "oracle", "shown": question["shown"], "vote": vote})
            except httpx.TransportError:  # training has ended before the votes were spent
                return
            state = reply.json().get("state", reply.json())


def vote_in_browser(
    page: Any, address: str, folder: Path, count: int, pause: float, is_running: Callable[[], bool]
) -> None:
    """Press keys in a browser."""
    page.open(address)
    page.type_in("name", "oracle")
    page.press("enter")
    page.until("state !== null")
    while is_running() and page.run("return state.votes") < count:
        began = time.monotonic()
        shown = page.run(
            "return !busy && Date.now() >= guardedUntil && state.question ? ["
            "state.question.shown, state.question.prompt, state.question.images] : null"
        )
        if shown is None:
            time.sleep(0.1)
            continue
        token, prompt, names = shown
        vote = vote_on([(folder / "votes" / "images" / f"{name}.png").read_bytes() for name in names], prompt)
        time.sleep(max(0.0, pause - (time.monotonic() - began)))
        if page.run("return state.question?.shown") == token:  # a person too would look again
            page.press({"tie": "t", "good": "g", "bad": "b"}.get(vote, vote))


def measure(arguments: argparse.Namespace, method: str, seed: int) -> dict[str, Any]:
    """Run one training with votes, and return what it measured."""
    folder = arguments.output_folder / f"{method}-{arguments.question}-{seed}"
    options = [one.replace("VOTES", str(arguments.votes)) for one in METHODS[method]]
    command = [
        sys.executable, "recipes/live_preferences.py", "--run_folder", str(folder), "--port", "0", "--seed", str(seed),
        "--num_steps", str(arguments.num_steps), "--evaluate_every", str(arguments.num_steps // 2),
        "--num_cpu_threads", str(arguments.threads), "--checkpoint_every", "0", "--question", arguments.question,
        *options, *arguments.options,
    ]  # fmt: skip
    started, before = time.monotonic(), os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = next(line.split()[1] for line in process.stdout if line.startswith("page "))
        drain = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=process.stdout)
        voted = time.monotonic()
        rest = arguments.votes, arguments.seconds_per_vote, lambda: process.poll() is None
        if arguments.voter == "browser":
            from tests import browser

            with browser.chromium() as page:
                vote_in_browser(page, address, folder, *rest)
        else:
            vote_by_requests(address, *rest)
        voted = time.monotonic() - voted
        process.wait()
        drain.wait()
    after = os.times()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    votes = [json.loads(line) for line in (folder / "votes" / "votes.jsonl").read_text().splitlines()]
    return {
        "method": method, "seed": seed, "votes": len(votes), "ties": sum(vote["key"] == "tie" for vote in votes),
        "passed": [row["oracle_pass"] for row in evaluations], "minutes": (time.monotonic() - started) / 60,
        "voting": voted / 60,
        "cpu": (after.children_user + after.children_system - before.children_user - before.children_system) / 60,
    }  # fmt: skip


def main() -> None:
    """Measure each method with each seed, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_folder", type=Path, default=Path("runs/live-votes"))
    parser.add_argument("--methods", nargs="+", choices=[*METHODS], default=["disagreement", "random", "offline"])
    parser.add_argument("--question", choices=["pair", "best_of_four", "good_bad"], default="pair")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--votes", type=int, default=200)
    parser.add_argument("--num_steps", type=int, default=30)
    parser.add_argument("--seconds_per_vote", type=float, default=1.0, help="Time that the voter takes; default 1 s.")
    parser.add_argument("--voter", choices=["http", "browser"], default="http")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("options", nargs="*", help="further options of the recipe, after --")
    arguments = parser.parse_args()
    show("| method | seed | pass before, half-way, after, % | points | votes (ties) | minutes | of voting | of CPU |")
    show("|---|---|---|---|---|---|---|---|")
    for seed in arguments.seeds:
        for method in arguments.methods:
            one = measure(arguments, method, seed)
            passed = ", ".join(f"{100 * value:.1f}" for value in one["passed"])
            gain = 100 * (one["passed"][-1] - one["passed"][0])
            show(
                f"| {method} | {seed} | {passed} | {gain:+.1f} | {one['votes']} ({one['ties']}) | {one['minutes']:.1f} "
                f"| {one['voting']:.1f} | {one['cpu']:.1f} |"
            )


if __name__ == "__main__":
    main()
