"""What a run writes down as it goes: one JSON line a row, and strips of images."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from rlhf_t2i.files import write_atomically
from rlhf_t2i.report import hacking, read_metrics, reward_changes

NUM_COLUMNS = 8


class MetricsFile:
    """`metrics.jsonl` of a run folder: rows of kind "train" and "evaluation", each with its step."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        """Go on with a file, without the rows of steps that a resumed run does again."""
        self.path = folder / "metrics.jsonl"
        rows = read_metrics(folder) if resumed_step else []
        kept = [row for row in rows if row["step"] <= resumed_step]
        self.elapsed = max((row["elapsed"] for row in kept), default=0.0)
        write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row; it is on the disk before this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


def mean_update_metrics(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What several `descend` said, as one: the mean norm, and how many were left out."""
    return {
        "gradient_norm": sum(step["gradient_norm"] for step in steps) / len(steps),
        "skipped_updates": sum(step["skipped_updates"] for step in steps),
    }


def before_after(rows: Sequence[dict[str, Any]]) -> str:
    """A table of the first and the last evaluation: each reward's mean, its change, and how sure that is."""
    evaluations = [row for row in rows if row["kind"] == "evaluation"]
    first, last = evaluations[0], evaluations[-1]
    lines = [f"{'':24}{'before':>18}{'after':>18}{'change':>10}  certainty"]
    lines += [
        f"{change.name:24}{change.before:>18}{change.after:>18}{change.difference:>10}  {change.certainty}"
        for change in reward_changes(rows)
    ]
    gap = last["diversity"] - first["diversity"]
    lines.append(f"{'diversity':24}{first['diversity']:18.3f}{last['diversity']:18.3f}{gap:+10.3f}")
    if seen := hacking(rows):
        lines.append(seen.sentence)
    painted = sum(row["images"] for row in rows if row["kind"] == "train")
    lines.append(
        f"{last['num_images']} evaluation images; {last['step']} steps, {painted:,} images for training, "
        f"{last['elapsed'] / 60:.1f} minutes"
    )
    return "\n".join(lines)


def save_image_grid(path: Path, images: Float[Tensor, "B 3 Y X"], *, num_columns: int = NUM_COLUMNS) -> None:
    """Write images in [0, 1] as one PNG, row by row; the last row is filled with white."""
    count, channels, height, width = images.shape
    num_rows = -(-count // num_columns)
    sheet = torch.ones(num_rows * num_columns, channels, height, width)
    sheet[:count] = images.clamp(0, 1).cpu()
    sheet = sheet.unflatten(0, (num_rows, num_columns)).permute(0, 3, 1, 4, 2)
    pixels = (sheet.reshape(num_rows * height, num_columns * width, channels) * 255).round()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy().astype(np.uint8)).save(path)


def save_captions(path: Path, prompts: Sequence[str], seeds: Sequence[int]) -> None:
    """Say which prompt and seed each cell of the strips beside it has."""
    path.parent.mkdir(parents=True, exist_ok=True)
    captions = {"prompts": list(prompts), "seeds": list(seeds), "columns": NUM_COLUMNS}
    path.write_text(json.dumps(captions, indent=1))
