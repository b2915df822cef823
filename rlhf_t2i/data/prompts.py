"""Sets of prompts, and the prompts of each training step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlhf_t2i.data.prompt_files import read_rows
from rlhf_t2i.passed import passed
from rlhf_t2i.shapes.names import TOY_PROMPTS, TOY_SIGN_PROMPTS


def load_prompts(source: str, *, held_out: bool = False) -> list[str]:
    """Return the prompts of a source, in its order; those of a file or a data set are rows (`rlhf_t2i.prompt_rows`).

    `shapes` and `words` stand for training prompts of the toy world, or with `held_out` for held-out ones. Any other
    source, unless a caller in Python passed it, is a file or a data set, and raises what `prompt_files.read_rows` does.
    """
    if source == TOY_PROMPTS:
        from rlhf_t2i.shapes.scenes import all_prompts

        return all_prompts("held-out" if held_out else "training")
    if source == TOY_SIGN_PROMPTS:
        from rlhf_t2i.shapes.signs import sign_prompts

        return sign_prompts("held-out" if held_out else "training")
    if (prompts := passed().prompts.get(source)) is not None:
        return list(prompts)
    return list[str](read_rows(source))


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
