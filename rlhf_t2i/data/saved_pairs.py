"""Preference pairs of sampled images, saved as a preference file in the project's own format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from jaxtyping import Float, Int
from torch import Tensor

from rlhf_t2i.output.files import write_atomically
from rlhf_t2i.output.image_grids import save_image_grid
from rlhf_t2i.prompt_rows import IMAGE, EditPrompt


def save_pairs(
    path: Path,
    images: Float[Tensor, "B 3 Y X"],
    prompts: Sequence[str],
    scores: Float[Tensor, "P K"],
    chosen: tuple[Int[Tensor, " N"], Int[Tensor, " N"]],
    *,
    first: int,
) -> None:
    """Write a preference file, PATH.jsonl, and this process's images of it to a folder beside it.

    `chosen` are winners and losers from `choose_pairs`, as indices among the images of all processes; `first` is the
    index of this process's first image. The process with index 0 writes the list.
    """
    winners, losers = (side.tolist() for side in chosen)
    for index in sorted({*winners, *losers} & {*range(first, first + len(images))}):
        own = images[index - first : index - first + 1]
        save_image_grid(path.parent / path.stem / f"{index:05d}.png", own, num_columns=1)
    if first or not winners:
        return
    flat, lines = scores.flatten().tolist(), list[str]()
    for winner, loser in zip(winners, losers, strict=True):
        index = int(winner) // scores.shape[1]
        prompt = prompts[index]
        row = {
            "prompt": prompt,
            **_saved_reference(prompt, path.parent / path.stem / f"reference_{index:05d}"),
            "winner": f"{path.stem}/{winner:05d}.png",
            "loser": f"{path.stem}/{loser:05d}.png",
            "rating_gap": flat[winner] - flat[loser],
            "comment": f"scores {flat[winner]:.6g} and {flat[loser]:.6g}",
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    write_atomically(path, "".join(f"{line}\n" for line in lines))


def _saved_reference(prompt: str, copy: Path) -> dict[str, str]:
    """Copy the reference image of an instruction beside the images of its pair; return the field with its path."""
    if not isinstance(prompt, EditPrompt):
        return {}
    copy = copy.with_suffix(prompt.image.suffix)
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(prompt.image, copy)
    return {IMAGE: f"{copy.parent.name}/{copy.name}"}
