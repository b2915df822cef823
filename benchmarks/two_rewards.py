"""Train on two rewards whose scales differ, summed and with GDPO: `python benchmarks/two_rewards.py`.

Flow-GRPO trains the built-in flow model on the oracle, in [0, 1], and on minus the bytes of an image as JPEG. Prints
Markdown: the change of both on held-out prompts, the mean of the seeds with the lowest and highest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from jaxtyping import Float
from torch import Tensor

from recipes import flow_grpo
from rlhf_t2i.rewards.builtin import jpeg_compressibility

QUIET, LOUD = "oracle", "benchmarks.two_rewards:minus_bytes"


def minus_bytes(images: Float[Tensor, "B 3 Y X"], prompts: Sequence[str]) -> Float[Tensor, " B"]:
    """Return minus the size as JPEG of quality 95, in bytes."""
    return 1000 * jpeg_compressibility(images, prompts)


def change(name: Literal["sum", "gdpo"], seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Train once; return the change of each reward on held-out prompts, and the ratio of their scales before."""
    result = flow_grpo.train(
        flow_grpo.Config(
            rewards=f"{QUIET},{LOUD}", evaluation_rewards="oracle_pass", prompts_per_step=8, images_per_prompt=8,
            num_steps=arguments.num_steps, evaluate_every=0, checkpoint_every=0, num_cpu_threads=1, seed=seed,
            learning_rate=6e-4,
            num_evaluation_images=arguments.num_evaluation_images,
            run_folder=str(arguments.output_folder / f"{name}-{seed}"), combine_rewards=name,
        )
    )  # fmt: skip
    first, last = result.evaluations[0], result.evaluations[-1]
    error = "/standard_error"
    return {each: last[each] - first[each] for each in (QUIET, LOUD)} | {
        "scales": first[LOUD + error] / first[QUIET + error]
    }


def main() -> None:
    """Train by each method with each seed and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--num_steps", type=int, default=6)
    parser.add_argument("--num_seeds", type=int, default=3)
    parser.add_argument("--num_evaluation_images", type=int, default=68)
    parser.add_argument("--output_folder", type=Path, default=Path("runs/two_rewards"))
    arguments = parser.parse_args()
    lines = ["| combine_rewards | change of the oracle | change of minus bytes |", "|---|---|---|"]
    for name in ("sum", "gdpo"):
        changes = [change(name, seed, arguments) for seed in range(arguments.num_seeds)]
        cells = [_cell([each[reward] for each in changes], digits) for reward, digits in ((QUIET, 3), (LOUD, 1))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(f"ratio of the standard deviations before training: {changes[0]['scales']:.0f}")  # noqa: T201
    print("\n".join(lines))  # noqa: T201


def _cell(values: Sequence[float], digits: int) -> str:
    mean = torch.tensor(values).mean().item()
    return f"{mean:+.{digits}f} ({min(values):+.{digits}f} to {max(values):+.{digits}f})"


if __name__ == "__main__":
    main()
