"""Split of records by prompt, so that no validation prompt occurs in training."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from scipy.cluster.hierarchy import DisjointSet

from reward_model.types import LabelledImage, Record


def split_by_prompt(records: Sequence[Record], *, fraction: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Return training and validation records without a common prompt; about `fraction` of them are for validation.

    Prompts of one record stay together, and so do prompts that are connected through other records. These groups are
    assigned to validation in an order that depends on `seed` and their prompts only, except those that would exceed
    `fraction`. The order of the records therefore does not matter, and most prompts keep their side when records are
    added. The empty prompt counts as a prompt: all images without a prompt are on one side.

    Raises ValueError if `fraction` is not in (0, 1), or if one side would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction is {fraction}; it must be above 0 and below 1, such as 0.1.")
    group_of = _connected_prompts(records)
    sizes: dict[str, int] = defaultdict(int)
    for record in records:
        sizes[group_of[record_prompts(record)[0]]] += 1

    room = round(fraction * len(records))
    held_out: set[str] = set()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()):
        if sizes[group] <= room:
            room -= sizes[group]
            held_out.add(group)

    if not 0 < len(held_out) < len(sizes):
        side = "training" if held_out else "validation"
        raise ValueError(
            f"fraction {fraction} of {len(records)} records leaves none for {side}: they form {len(sizes)} groups "
            f"without a common prompt, of {min(sizes.values(), default=0)} to {max(sizes.values(), default=0)} "
            f"records, and no group can be split. Choose another fraction, or give separate validation data."
        )
    training = [record for record in records if group_of[record_prompts(record)[0]] not in held_out]
    validation = [record for record in records if group_of[record_prompts(record)[0]] in held_out]
    return training, validation


def record_prompts(record: Record) -> tuple[str, str]:
    """Return the prompts of both sides of a record, which are the same except in hard negatives."""
    if isinstance(record, LabelledImage):
        return record.prompt, record.prompt
    return record.winner_prompt, record.loser_prompt


def _connected_prompts(records: Iterable[Record]) -> dict[str, str]:
    """Return for every prompt the alphabetically first prompt of its connected group."""
    groups = DisjointSet()
    for record in records:
        first, second = record_prompts(record)
        groups.add(first)
        groups.add(second)
        groups.merge(first, second)
    return {prompt: first for group in groups.subsets() for first in [min(group)] for prompt in group}
