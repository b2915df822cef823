"""Sets of prompts, and the prompts of each training step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_t2i.shapes.names import TOY_PROMPTS


def load_prompts(source: str, *, held_out: bool = False) -> list[str]:
    """Return the prompts of a source, in its order.

    `shapes` stands for the training prompts of the built-in world, or with `held_out` for its held-out ones. Any other
    source is the path of a UTF-8 file: one prompt a line, or, if it ends in `.jsonl`, one JSON object a line with a
    string under "prompt". Blank lines are skipped. Raises FileNotFoundError, or ValueError for a file that is empty,
    not UTF-8 or has an invalid line.
    """
    if source == TOY_PROMPTS:
        from rlhf_t2i.shapes.scenes import all_prompts

        return all_prompts("held-out" if held_out else "training")
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no prompt file {source!r}. Give the path of a text file with one prompt a line (or a .jsonl "
            f"file with a 'prompt' in each line), or {TOY_PROMPTS!r} for the built-in world."
        )
    try:
        lines = path.read_bytes().decode("utf-8").removeprefix("\ufeff").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"The prompt file {source!r} is not UTF-8: {error.reason} at byte {error.start}. Save it as UTF-8."
        ) from error
    rows = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_json_prompt(line, where=f"{source}:{number}") for number, line in rows]
    else:
        prompts = [line for _, line in rows]
    if not prompts:
        raise ValueError(f"The prompt file {source!r} holds no prompt.")
    return prompts


def _json_prompt(line: str, *, where: str) -> str:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}.") from error
    match row:
        case {"prompt": str(prompt)} if prompt.strip():
            return prompt.strip()
        case _:
            raise ValueError(f"{where} has no text under 'prompt': {line[:80]}")


def prompts_of_step(prompts: Sequence[str], step: int, *, num_prompts: int, seed: int) -> list[str]:
    """Return the prompts of a step (from 0) of endless passes over a set, each in a new random order.

    They are a function of the arguments alone, so that a resumed run needs no state and all processes agree.
    """
    start = step * num_prompts
    return [_shuffled(prompts, start + i, seed=seed) for i in range(num_prompts)]


def _shuffled(prompts: Sequence[str], position: int, *, seed: int) -> str:
    """The prompt at a position of the endless sequence; every pass has its own seed."""
    epoch, index = divmod(position, len(prompts))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return prompts[int(torch.randperm(len(prompts), generator=generator)[index])]
