"""Hold some prompts back, so that a judge is tested on what it has never read."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

from reward_model.types import LabelledImage, Record


def split_by_prompt(records: Sequence[Record], *, share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """Training and validation records, such that no prompt occurs in both; about `share` of them are for validation.

    Prompts that meet in one record stay together, as do those which are linked through others. Such groups move to
    validation in an order that only `seed` and their prompts decide, unless one would make it larger than `share`. So
    neither the order of the records matters, nor do most prompts change sides when records are added.

    The empty prompt is a prompt like any other: images without prompts all fall on one side.
    """
    if not 0 < share < 1:
        raise ValueError(f"share is {share}; it must lie between 0 and 1, ends excluded: 0.1 holds a tenth back.")
    group_of = _linked_prompts(records)
    sizes: dict[str, int] = defaultdict(int)
    for record in records:
        sizes[group_of[record_prompts(record)[0]]] += 1

    room = round(share * len(records))
    held_back: set[str] = set()
    for group in sorted(sizes, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest()):
        if sizes[group] <= room:
            room -= sizes[group]
            held_back.add(group)

    if not 0 < len(held_back) < len(sizes):
        side = "training" if held_back else "validation"
        raise ValueError(
            f"share {share} of {len(records)} records leaves none for {side}: they fall into {len(sizes)} groups that "
            f"share no prompt, of {min(sizes.values(), default=0)} to {max(sizes.values(), default=0)} records, and no "
            f"group can be cut. Choose another share, or give validation data of their own."
        )
    training = [record for record in records if group_of[record_prompts(record)[0]] not in held_back]
    validation = [record for record in records if group_of[record_prompts(record)[0]] in held_back]
    return training, validation


def record_prompts(record: Record) -> tuple[str, str]:
    """The prompts of both sides of a record, which are mostly the same."""
    if isinstance(record, LabelledImage):
        return record.prompt, record.prompt
    return record.winner_prompt, record.loser_prompt


def _linked_prompts(records: Iterable[Record]) -> dict[str, str]:
    """For every prompt the first, by alphabet, of all that it is linked with: union-find with that one as the root."""
    parent: dict[str, str] = {}

    def root(prompt: str) -> str:
        while (above := parent.setdefault(prompt, prompt)) != prompt:
            parent[prompt] = parent[above]
            prompt = above
        return prompt

    for record in records:
        first, second = sorted(map(root, record_prompts(record)))
        parent[second] = first
    return {prompt: root(prompt) for prompt in list(parent)}
