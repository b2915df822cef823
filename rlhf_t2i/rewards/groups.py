"""Rewards that compare the images of one prompt, and so need whole groups of them.

A reward, a function or an object, declares `needs_groups = True`. It is then called with the images of one prompt at a
time, all of them. What scores images one by one, or a part of a group at a time, refuses it at the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from rlhf_t2i.prompt_rows import metadata_of


def needs_groups(function: Any) -> bool:
    """Return True for a reward that compares the images of one prompt."""
    function = function.func if isinstance(function, partial) else function
    return bool(getattr(function, "needs_groups", False))


def runs_of_prompts(prompts: Sequence[str]) -> list[slice]:
    """Return the rows of each run of equal prompts, which have equal rows of metadata too."""
    rows, start, runs = metadata_of(prompts), 0, list[slice]()
    for _, run in groupby(rows):
        runs.append(slice(start, start := start + len(list(run))))
    return runs


def groups_of(prompts: Sequence[str], group_size: int | None) -> list[slice]:
    """Return the rows of each group: `group_size` images each, or by default each run of equal prompts."""
    if group_size is None:
        return runs_of_prompts(prompts)
    return [slice(start, start + group_size) for start in range(0, len(prompts), group_size)]
